"""Checkpoint files: streamed, atomic, and hostile ones refused with nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import wn_surgery as wn
from wn_surgery.checkpoints.safetensors_file import open_file

convert, convert_file = wn.checkpoints.convert, wn.checkpoints.convert_file


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight_g": torch.rand(8, 1, 1) + 0.5,
        "a.weight_v": torch.randn(8, 4, 3),
        "a.bias": torch.zeros(8),
        "b.weight_g": torch.rand(1, 6).half() + 0.5,
        "b.weight_v": torch.randn(5, 6).half(),
        "steps": torch.tensor([3]),
        "none": torch.zeros(0, 4),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


@pytest.mark.parametrize("to", ["plain", "parametrized", "legacy"])
def test_safetensors_equal_the_conversion_in_memory(tmp_path: Path, to: Any) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors(), source, metadata={"format": "pt"})
    source.chmod(0o640)
    assert convert_file(source, target, to) == [target]
    assert same(load_file(target), convert(tensors(), to))
    assert target.stat().st_mode & 0o777 == 0o640
    opened = open_file(target)
    opened.close()
    assert opened.metadata == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def shards(folder: Path) -> Path:
    folder.mkdir()
    state = tensors()
    parts = [{k: t for k, t in state.items() if k.endswith("_g") is one} for one in (True, False)]
    weight_map = {}
    for number, part in enumerate(parts):
        save_file(part, folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_g_and_v_in_different_shards(tmp_path: Path) -> None:
    shards(tmp_path / "a")
    written = convert_file(tmp_path / "a", tmp_path / "b")
    assert written[-1].name == "model.safetensors.index.json"
    loaded: dict[str, torch.Tensor] = {}
    for path in written[:-1]:
        loaded |= load_file(path)
    expected = convert(tensors())
    assert same(dict(sorted(loaded.items())), dict(sorted(expected.items())))
    index = json.loads(written[-1].read_text())
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "link.safetensors"])
def test_a_shard_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    index = shards(tmp_path / "a")
    save_file(tensors(), tmp_path / "x.safetensors")
    (tmp_path / "a" / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    made = json.loads(index.read_text())
    made["weight_map"]["steps"] = name
    index.write_text(json.dumps(made))
    with pytest.raises(wn.CheckpointError, match="not a file of its own folder"):
        convert_file(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_torch_files_and_pickles_that_would_run_code(tmp_path: Path) -> None:
    source, target = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save({"epoch": 2, "state_dict": tensors()}, source)
    convert_file(source, target)
    loaded = torch.load(target)
    assert loaded["epoch"] == 2 and same(loaded["state_dict"], convert(tensors()))

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, source)
    before = target.read_bytes()
    with pytest.raises(wn.CheckpointError, match="could run code"):
        convert_file(source, target)
    assert not (tmp_path / "ran").exists() and target.read_bytes() == before


def test_output_equal_to_input(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    (tmp_path / "link.safetensors").symlink_to(path)
    with pytest.raises(wn.CheckpointError, match="the input itself"):
        convert_file(path, tmp_path / "link.safetensors")
    convert_file(path, path, in_place=True)
    assert same(load_file(path), convert(tensors()))


def test_a_full_disk_leaves_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors(), source)
    target.write_bytes(b"earlier")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(wn.CheckpointError, match="No space left"):
        convert_file(source, target)
    assert target.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 2


def hostile(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        hostile({}, length=1 << 63),
        hostile(b"[" * 5000),
        hostile(b"[]"),
        hostile(b'{"a":{},"a":{}}'),
        hostile({"a": ONE}),
        hostile({"a": ONE, "b": ONE}, b"1234"),
        hostile({"a": {**ONE, "data_offsets": [4, 8]}}, b"12345678"),
        hostile({"a": {**ONE, "shape": [-1]}}, b"1234"),
        hostile({"a": {**ONE, "shape": [0, 1 << 61, 8], "data_offsets": [0, 0]}}),
        hostile({"a": {**ONE, "dtype": "PICKLE"}}, b"1234"),
        hostile({"\ud800": ONE}, b"1234"),
        hostile({"__metadata__": {"a": 1}}),
        hostile({"a": ONE}, b"12345"),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(wn.CheckpointError, match="no sound safetensors file"):
        convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert len(list(tmp_path.iterdir())) == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_flipped_bytes_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    source, target = folder / "a.safetensors", folder / "b.safetensors"
    save_file(tensors(), source)
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    source.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    try:
        convert_file(source, target)
    except wn.CheckpointError:
        assert not target.exists()
    else:
        load_file(target)


def test_kills_leave_source_and_earlier_output_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    state = {
        f"{i}.weight_{p}": torch.randn(512, 512 if p == "v" else 1) for i in range(8) for p in "gv"
    }
    save_file(state, source)
    convert_file(source, target)
    before, after = source.read_bytes(), target.read_bytes()
    code = (
        "import sys; from wn_surgery.checkpoints import convert_file\n"
        "print(flush=True)\nwhile True: convert_file(*sys.argv[1:])"
    )
    killed = [sys.executable, "-c", code, str(source), str(target)]
    for round_ in range(4):
        run = subprocess.Popen(killed, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(0.02 + 0.017 * round_)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        run.stdout.close()
        assert source.read_bytes() == before and target.read_bytes() == after
