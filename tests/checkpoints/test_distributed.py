"""Folders of torch.distributed.checkpoint: read, converted, and refused where they are damaged."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.utils._pytree import tree_leaves

import wn_surgery as wn
from tests.checkpoints.makers import listing
from wn_surgery.checkpoints.io.distributed import Distributed

convert_file = wn.checkpoints.convert_file
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def normed() -> nn.Sequential:
    model = network()
    wn.apply(model, nn.Linear)
    return model


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


# Older versions of torch find out for themselves that there is one process.
ALONE: Any = {"no_dist": True} if "no_dist" in inspect.signature(dcp.save).parameters else {}


def saved(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """A folder with a model, its optimizer's moments by name, and something that is no tensor."""
    model = normed() if model is None else model
    optimizer = trained(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {names[p]: dict(state) for p, state in optimizer.state.items()}
    state = {"model": model.state_dict(), "optim": {"state": moments}, "notes": {"epoch": 3}}
    dcp.save(state, checkpoint_id=folder, **ALONE)
    return model


def loaded(folder: Path, model: nn.Module) -> nn.Module:
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder, **ALONE)
    model.load_state_dict(state["model"])
    return model


def in_pieces(folder: Path, by: int = 3) -> None:
    """Cut each tensor of two axes into two pieces, as two ranks would have written it."""
    path = folder / ".metadata"
    said: Metadata = pickle.loads(path.read_bytes())
    whole = Distributed(folder)
    stored = {
        key: part.tensor(name) for part in whole.parts.values() for name, key in part.keys.items()
    }
    info = next(iter(said.storage_data.values()))
    with (folder / "more.distcp").open("wb") as file:
        for key, value in said.state_dict_metadata.items():
            if key not in stored or stored[key].ndim != 2 or len(stored[key]) <= by:
                continue
            value.chunks = []
            for start, piece in ((by, stored[key][by:]), (0, stored[key][:by])):
                offset = torch.Size([start, 0])
                value.chunks.append(ChunkStorageMetadata(offset, piece.shape))
                place = file.tell()
                torch.save(piece.clone(), file)
                said.storage_data[MetadataIndex(key, offset)] = type(info)(
                    "more.distcp", place, file.tell() - place
                )
    path.write_bytes(pickle.dumps(said))


@pytest.mark.parametrize("pieces", [False, True])
def test_a_folder_becomes_plain(tmp_path: Path, pieces: bool) -> None:
    model = saved(tmp_path / "a")
    if pieces:
        in_pieces(tmp_path / "a")
    before = listing(tmp_path / "a")
    with pytest.warns(UserWarning, match="state of 4 tensors is left out"):
        done = convert_file(tmp_path / "a", tmp_path / "b", verify=True)
    assert done.weights == ("0.weight", "2.weight") and done.files == (tmp_path / "b",)
    assert listing(tmp_path / "a") == before
    plain = loaded(tmp_path / "b", network())
    wn.remove(model)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    # What is not the model's stays; a plain weight has no place for the moments of g and v.
    old, new = Distributed(tmp_path / "a"), Distributed(tmp_path / "b")
    assert old.blobs == new.blobs == ["notes.epoch"]
    assert old.blob("notes.epoch") == new.blob("notes.epoch")
    moments = ("optim", "state", "0.bias")
    assert [place[-1] for place in new.parts if place[0] == "optim"] == ["0.bias", "2.bias"]
    assert torch.equal(old.parts[moments].tensor("exp_avg"), new.parts[moments].tensor("exp_avg"))


def test_there_and_back(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    convert_file(tmp_path / "a", tmp_path / "b", "legacy")
    convert_file(tmp_path / "b", tmp_path / "c", "parametrized")
    for one, other in zip(
        loaded(tmp_path / "c", normed()).parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    plain = saved(tmp_path / "d", network())
    convert_file(tmp_path / "d", tmp_path / "e", "parametrized", rules={"names": "2"})
    wn.apply(plain, {"names": "2"})
    state = plain.state_dict()
    found = Distributed(tmp_path / "e").parts[("model",)]
    assert set(found.entries) == set(state)
    assert all(torch.equal(found.tensor(key), state[key]) for key in state)


@pytest.mark.parametrize("flat", [False, True])
def test_optimizers_follow_the_names(tmp_path: Path, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = normed()
    weights, moments = get_state_dict(model, trained(model), options=options)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=tmp_path / "a", **ALONE)
    convert_file(tmp_path / "a", tmp_path / "b", "legacy", verify=True)
    found = Distributed(tmp_path / "b")
    keys = [*found.blobs, *(key for part in found.parts.values() for key in part.keys.values())]
    assert not any("original" in key for key in keys)
    assert any(key == "optim.state.0.weight_g.exp_avg" for key in keys)
    # A run in the old layout goes on from there and back again.
    convert_file(tmp_path / "b", tmp_path / "c", "parametrized", verify=True)
    again = normed()
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.1)
    weights, state = get_state_dict(again, optimizer, options=options)
    both = {"model": weights, "optim": state}
    dcp.load(both, checkpoint_id=tmp_path / "c", **ALONE)
    set_state_dict(
        again, optimizer, model_state_dict=weights, optim_state_dict=both["optim"], options=options
    )
    ours = tree_leaves(get_state_dict(again, optimizer, options=options)[1])
    for one, other in zip(ours, tree_leaves(moments), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("pieces", [False, True])
def test_the_model_becomes_a_safetensors_file(tmp_path: Path, pieces: bool) -> None:
    model = saved(tmp_path / "a")
    if pieces:
        in_pieces(tmp_path / "a")
    convert_file(tmp_path / "a", tmp_path / "plain.safetensors", verify=True)
    wn.remove(model)
    found, wanted = load_file(tmp_path / "plain.safetensors"), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    both = {"model": normed().state_dict(), "ema": normed().state_dict()}
    dcp.save(both, checkpoint_id=tmp_path / "two", **ALONE)
    with pytest.raises(wn.CheckpointError, match=r"holds 2 of models: model, ema"):
        convert_file(tmp_path / "two", tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_flat_state_dicts_and_inspection(tmp_path: Path) -> None:
    model = normed()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "a", **ALONE)
    found = wn.checkpoints.inspect(tmp_path / "a")
    assert [tensor.name for tensor in found.tensors] == ["0.weight", "2.weight"]
    convert_file(tmp_path / "a", tmp_path / "b.safetensors")
    assert wn.checkpoints.compare(tmp_path / "a", tmp_path / "b.safetensors").equal()
    saved(tmp_path / "c")
    names = [tensor.name for tensor in wn.checkpoints.inspect(tmp_path / "c").tensors]
    assert names == ["model/0.weight", "model/2.weight"]


WITHIN = """
import resource, sys, tempfile
from wn_surgery.checkpoints import convert_file
small, source, target, limit = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    convert_file(small, folder)  # so that everything is imported
data = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + (int(limit) << 20), resource.RLIM_INFINITY))
convert_file(source, target, verify=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is on what Linux counts")
@pytest.mark.parametrize("kind", ["pieces", "pieces to a file", "shards"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, kind: str) -> None:
    """Of 72 MB in tensors of 24 MB: twice one, and 15 MB; the pages promise 100 MB."""
    rows, names = 1536, ["0", "1", "2"]
    # Normed along the other axis than that by which safetensors files are folded row by row.
    state = {f"{name}.weight_g": torch.ones(1, 4096) for name in names}
    state |= {f"{name}.weight_v": torch.ones(rows, 4096) for name in names}
    source = tmp_path / "a"
    if kind == "shards":
        shards(source, state, names)
    else:
        dcp.save({"model": state}, checkpoint_id=source, **ALONE)
        in_pieces(source, rows // 2)
    saved(tmp_path / "tiny")
    target = tmp_path / ("b.safetensors" if kind == "pieces to a file" else "b")

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", WITHIN, tmp_path / "tiny", source, target,
             str(limit)],
            # What is freed goes back to the system, as it does for tensors of 32 MB and more.
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                 "MALLOC_MMAP_THRESHOLD_": "1000000"},
            capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip

    foreseen = convert_file(source, target, dry_run=True).cost
    assert foreseen is not None and foreseen.memory == 2 * (24 << 20) + 4 * 4096
    assert foreseen.read == 3 * ((24 << 20) + 4 * 4096) and foreseen.written == 3 * (24 << 20)
    failed = run(2 * 24 - 8)
    assert failed.returncode != 0 and "memory" in failed.stderr and not target.exists()
    done = run(2 * 24 + 15)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_reads_metadata_alone(tmp_path: Path) -> None:
    """Of a folder whose one weight has more than a terabyte, which nothing could read."""
    saved(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.distcp")
    start, columns = file.stat().st_size, 1 << 36
    v = "model.0.parametrizations.weight.original1"

    def grow(said: Any) -> None:
        value = said.state_dict_metadata[v]
        value.size = value.chunks[0].sizes = torch.Size([6, columns])
        info = said.storage_data[MetadataIndex(v, torch.Size([0, 0]))]
        info.offset, info.length = start, 6 * columns * 4 + 1000

    edited(tmp_path / "a", grow)
    os.truncate(file, start + 6 * columns * 4 + 1000)  # sparse
    with pytest.warns(UserWarning, match="state of 4 tensors is left out"):
        done = convert_file(tmp_path / "a", tmp_path / "b", dry_run=True, verify=True)
    assert done.weights == ("0.weight", "2.weight") and done.files == (tmp_path / "b",)
    large = 6 * columns * 4
    # Of the rest 2 g, a small v, biases, and the moments and steps of those.
    plain = 4 * (6 * 2 + 6 + 2) + 2 * 4 * (6 + 2) + 2 * 4
    assert done.cost == wn.checkpoints.Cost(
        read=large + plain + 4 * (6 + 2), written=large + plain, memory=2 * large + 4 * 6
    )
    one = convert_file(tmp_path / "a", tmp_path / "b.safetensors", "legacy", dry_run=True).cost
    # No tensor is computed with: g and v are copied.
    assert one is not None and one.memory == large and one.read == one.written
    (tmp_path / "full" / "x").mkdir(parents=True)
    with pytest.raises(wn.CheckpointFileError, match="is there already"):
        convert_file(tmp_path / "a", tmp_path / "full", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "full"]


def shards(folder: Path, state: dict[str, torch.Tensor], names: list[str]) -> None:
    """A folder of safetensors files, one for each name."""
    folder.mkdir()
    places = {key: f"{key[0]}.safetensors" for key in state}
    for name in names:
        mine = {key: value for key, value in state.items() if key.startswith(name)}
        save_file(mine, folder / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/wn-surgery-was-here",)


def edited(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / ".metadata"
    said = pickle.loads(path.read_bytes())
    change(said)
    path.write_bytes(pickle.dumps(said))


def first(said: Metadata) -> Any:
    return said.state_dict_metadata["model.0.bias"]


def _name(said: Any, name: str) -> None:
    for info in said.storage_data.values():
        info.relative_path = name


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "code": (lambda s: setattr(s, "planner_data", Evil()), r"it names (posix|nt)\.system"),
    "elsewhere": (lambda s: _name(s, "../x.distcp"), "not in its own folder"),
    "nowhere": (lambda s: _name(s, "y.distcp"), "cannot read .*y.distcp"),
    "expands": (lambda s: setattr(first(s), "size", torch.Size([1 << 40])), "do not make up"),
    "expands in a piece": (
        lambda s: (
            setattr(first(s), "size", torch.Size([1 << 40])),
            setattr(first(s).chunks[0], "sizes", torch.Size([1 << 40])),
        ),
        "bytes",
    ),
    "outside": (lambda s: setattr(first(s).chunks[0], "sizes", torch.Size([9])), "outside"),
    "no pieces": (lambda s: first(s).chunks.clear(), "do not make up"),
    "unplaced": (lambda s: s.storage_data.clear(), "does not say where"),
    "negative": (
        lambda s: [setattr(i, "offset", -1) for i in s.storage_data.values()], "not a size"
    ),
    "wrong types": (lambda s: setattr(s, "state_dict_metadata", 3), "AttributeError"),
    "other axes": (lambda s: setattr(first(s), "size", torch.Size([2, 3])), "other axes"),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_hostile_metadata(tmp_path: Path, what: str) -> None:
    saved(tmp_path / "a")
    change, said = EDITS[what]
    edited(tmp_path / "a", change)
    for call in (
        lambda: convert_file(tmp_path / "a", tmp_path / "b"),
        lambda: wn.checkpoints.inspect(tmp_path / "a"),
    ):
        with pytest.raises(wn.CheckpointError, match=said):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_half_written_folders(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.distcp")
    for name in ("unfinished", "missing", "cut", "torn", "damaged"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    (tmp_path / "unfinished" / ".metadata").unlink()
    (tmp_path / "missing" / file.name).unlink()
    os.truncate(tmp_path / "cut" / file.name, file.stat().st_size - 1)
    os.truncate(tmp_path / "torn" / ".metadata", 100)
    content = bytearray(file.read_bytes())
    content[20:4000] = b"\0" * 3980
    (tmp_path / "damaged" / file.name).write_bytes(content)
    for name, said in {
        "unfinished": "its save did not end",
        "missing": "No such file",
        "cut": "is cut off",
        "torn": "is damaged",
        "damaged": "is damaged",
    }.items():
        with pytest.raises(wn.CheckpointError, match=said):
            convert_file(tmp_path / name, tmp_path / "b")
        assert not (tmp_path / "b").exists()


def test_pieces_that_overlap(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    in_pieces(tmp_path / "a")

    def overlap(said: Any) -> None:
        value = said.state_dict_metadata["model.0.parametrizations.weight.original1"]
        later = value.chunks[0]
        info = said.storage_data.pop(
            MetadataIndex("model.0.parametrizations.weight.original1", later.offsets)
        )
        later.offsets = torch.Size([1, 0])
        index = MetadataIndex("model.0.parametrizations.weight.original1", later.offsets)
        said.storage_data[index] = info

    edited(tmp_path / "a", overlap)
    with pytest.raises(wn.CheckpointError, match="pieces overlap"):
        convert_file(tmp_path / "a", tmp_path / "b")


def test_targets_that_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(wn.CheckpointError, match="never in place"):
        convert_file(tmp_path / "a", tmp_path / "a", in_place=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(wn.CheckpointFileError, match="is there already"):
        convert_file(tmp_path / "a", tmp_path / "full")
    saved(tmp_path / "plain", network())
    with pytest.raises(wn.UnmatchedRuleError):
        convert_file(tmp_path / "plain", tmp_path / "b", "parametrized", rules={"names": "nope"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "full", "plain"]


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.distributed.checkpoint.filesystem.os, "fsync", full)
    with pytest.raises(wn.CheckpointFileError, match="No space left"):
        convert_file(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_damaged_list_of_names(tmp_path: Path) -> None:
    model = normed()
    weights, moments = get_state_dict(model, trained(model))
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=tmp_path / "a", **ALONE)
    said = pickle.loads((tmp_path / "a" / ".metadata").read_bytes())
    info = said.storage_data[MetadataIndex("optim.param_groups.0.params")]
    path = tmp_path / "a" / info.relative_path
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + info.length] = bytes(info.length)
    path.write_bytes(content)
    with pytest.raises(wn.CheckpointError, match=r"'optim.param_groups.0.params' is damaged"):
        convert_file(tmp_path / "a", tmp_path / "b", "legacy")
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
