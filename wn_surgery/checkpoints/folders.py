"""Folders that hold a checkpoint: which files belong to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wn_surgery.checkpoints.containers import recorded
from wn_surgery.checkpoints.io.distributed import METADATA
from wn_surgery.checkpoints.io.safetensors_file import reading
from wn_surgery.checkpoints.io.torch_file import SUFFIXES
from wn_surgery.errors import CheckpointError, CheckpointFileError
from wn_surgery.norm.options import NormOptions

__all__ = ["Source", "copy_companions", "find", "read_json"]

INDEX = "model.safetensors.index.json"
_IN_FOLDERS = (INDEX, "model.safetensors", "pytorch_model.bin", METADATA)
# What a transformers folder has beside weights: configs, tokenizers, templates, code, cards.
_COMPANIONS = (".json", ".txt", ".model", ".md", ".py", ".jinja", ".yaml", ".yml", ".tiktoken")


@dataclass(frozen=True)
class Source:
    """A checkpoint on the disk."""

    path: Path  # what the user named
    main: Path  # the file, or the index of the shards
    files: tuple[Path, ...]  # those with tensors, in the order of the index
    index: dict[str, Any] | None  # its content; None for a single file
    config: dict[str, Any] | None  # the content of the folder's config.json; None for a file

    @property
    def is_torch(self) -> bool:
        """Whether it is a PyTorch file."""
        return self.main.suffix in SUFFIXES

    @property
    def is_distributed(self) -> bool:
        """Whether it is a folder that ``torch.distributed.checkpoint`` has written."""
        return self.main.name == METADATA

    @property
    def is_folder(self) -> bool:
        """Whether the user named a folder, or an index, which stands for its folder."""
        return self.path.is_dir() or self.index is not None

    @property
    def patched(self) -> Mapping[str, Any] | None:
        """What the folder's config says about weight norm of this library."""
        said = (self.config or {}).get("quantization_config")
        ours = isinstance(said, dict) and "weight_norm" in str(said.get("quant_method"))
        return said if ours else None

    @property
    def known(self) -> dict[str, NormOptions]:
        """The options that the config has recorded."""
        sites = (self.patched or {}).get("sites")
        return {} if sites is None else recorded(sites, f"{str(self.path / 'config.json')!r}")


def find(path: Path) -> Source:
    """The files of a checkpoint: of a file, an index, or a folder with transformers' names."""
    if path.is_dir():
        main = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
        if main is None and any(path.glob("*.distcp")):
            raise CheckpointFileError(
                f"{str(path)!r} has .distcp files but no {METADATA}, which is written last: its "
                "save did not end; take an earlier checkpoint"
            )
        if main is None:
            raise CheckpointFileError(
                f"{str(path)!r} has none of {', '.join(_IN_FOLDERS)}; name the file itself"
            )
    elif path.is_file():
        main = path
    else:
        raise CheckpointFileError(f"{str(path)!r} is neither a file nor a folder")
    if main.name == METADATA:
        return Source(main.parent, main, (), None, None)
    if main.suffix not in (*SUFFIXES, ".safetensors", ".json"):
        raise CheckpointError(
            f"{str(path)!r}: the ending {main.suffix!r} is none of .safetensors, .index.json, "
            f"{', '.join(SUFFIXES)}"
        )
    config = path / "config.json"
    content = read_json(config) if path.is_dir() and config.is_file() else None
    if main.suffix != ".json":
        return Source(path, main, (main,), None, content)
    index = read_json(main)
    return Source(path, main, _shards(main, index), index, content)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        with reading(path):
            found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(found).__name__}, not an object")
    return found


def _shards(main: Path, index: dict[str, Any]) -> tuple[Path, ...]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{str(main)!r} has no weight_map of tensors to file names")
    # The hub's cache links both the index and the shards to one other folder.
    roots = {main.parent.resolve(), main.resolve().parent}
    for name in set(shards.values()):
        plain = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
        if not plain or (main.parent / name).resolve().parent not in roots:
            raise CheckpointError(
                f"{str(main)!r} names the shard {name!r}, which is not a file of its own folder"
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{str(main)!r} has the shard {name!r}: only sharded safetensors are read; load "
                "the model and save it again"
            )
    return tuple(main.parent / name for name in dict.fromkeys(shards.values()))


def copy_companions(source: Source, target: Path, plain: bool) -> list[Path]:
    """Copy what makes a folder of weights a model: config, tokenizer, and the like.

    With ``plain``, the new config does not ask for weight norm. Returns the new files.
    """
    written: list[Path] = []
    if not source.path.is_dir():
        return written
    for path in sorted(source.path.iterdir()):
        is_index = path.name.endswith(".index.json")
        if path.suffix not in _COMPANIONS or is_index or not path.is_file():
            continue
        new = target / path.name
        if path.name == "config.json" and plain and source.patched is not None:
            config = _without_weight_norm(source.config or {})
            new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            shutil.copymode(path, new)
        else:
            shutil.copy(path, new)
        written.append(new)
    return written


def _without_weight_norm(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that asks transformers for nothing of this library."""
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    fusions = result.get("fusion_config")
    if isinstance(fusions, dict):
        # Where a patched model says what to install; wn_surgery/huggingface/guard.py.
        kept = {key: value for key, value in fusions.items() if not key.startswith("weight_norm")}
        result["fusion_config"] = kept
        if not kept:
            del result["fusion_config"]
    return result
