"""Checkpoint files: as the conversion in memory, and written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wn_surgery as wn
from tests.checkpoints.makers import listing, same, shards, tensors
from wn_surgery.checkpoints.io.atomic import Output
from wn_surgery.checkpoints.io.safetensors_file import File

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
convert, convert_file = wn.checkpoints.convert, wn.checkpoints.convert_file


@pytest.mark.parametrize("to", ["plain", "parametrized", "legacy"])
def test_safetensors_equal_the_conversion_in_memory(tmp_path: Path, to: Any) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors(), source, metadata={"format": "pt"})
    source.chmod(0o640)
    before = source.read_bytes()
    done = convert_file(source, target, to)
    assert done.files == (target,) and set(done.weights) == {"a.weight", "b.weight"}
    assert same(load_file(target), convert(tensors(), to))
    assert target.stat().st_mode & 0o777 == 0o640 and source.read_bytes() == before
    with File(target) as opened:
        assert opened.metadata == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_rules_put_weight_norm_on_in_a_file(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    plain = convert(tensors())
    save_file(plain, source)
    rules = [{"names": "a"}, {"names": "b", "dim": 1}]
    seen: list[int] = []
    convert_file(source, target, "parametrized", rules=rules, progress=seen.append)
    assert same(load_file(target), convert(plain, "parametrized", rules=rules))
    assert sum(seen) == sum(tensor.nbytes for tensor in load_file(target).values())
    with pytest.raises(wn.UnmatchedRuleError, match="no plain tensor of the checkpoint"):
        convert_file(source, tmp_path / "c.safetensors", "legacy", rules=[{"names": "c"}])
    save_file({"a.weight": torch.zeros(2, 2)}, source)
    with pytest.raises(wn.ZeroNormError, match="whose norm is zero"):
        convert_file(source, tmp_path / "c.safetensors", "legacy", rules=[{"names": "a"}])
    assert not (tmp_path / "c.safetensors").exists()


def test_tensors_stay_aligned(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"a.weight": torch.randn(3, 3, dtype=torch.complex64), "b": torch.ones(1)}, source)
    convert_file(source, target, "parametrized", rules=[{"names": "a"}])
    with File(target) as opened:
        first = min(entry.start for entry in opened.entries.values())
        assert first % 8 == 0
        places = {name: (entry.start - first) % 8 for name, entry in opened.entries.items()}
    assert places["a.parametrizations.weight.original1"] == 0
    assert same(convert(load_file(target)), load_file(source))


def test_spectral_norm_in_a_file(tmp_path: Path) -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 6, 3)).eval()
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(layer.state_dict(), source)
    assert convert_file(source, target).kept_spectral == ("weight",)
    assert same(load_file(target), load_file(source))
    assert convert_file(source, target, also="spectral_norm").spectral == ("weight",)
    assert torch.equal(load_file(target)["weight"], layer.weight)


# Folders ------------------------------------------------------------------------------------


def test_g_and_v_in_different_shards(tmp_path: Path) -> None:
    shards(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"no part of the model")
    done = convert_file(tmp_path / "a", tmp_path / "b")
    assert done.files[-1] == tmp_path / "b" / "model.safetensors.index.json"
    loaded: dict[str, torch.Tensor] = {}
    for path in done.files:
        loaded |= load_file(path) if path.suffix == ".safetensors" else {}
    expected = convert(tensors())
    assert same(loaded, expected)
    index = json.loads(done.files[-1].read_text())
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"0.safetensors", "1.safetensors", "tokenizer.json", done.files[-1].name}
    mode = (tmp_path / "a").stat().st_mode
    assert (tmp_path / "b").stat().st_mode == mode


def test_an_index_stands_for_its_folder(tmp_path: Path) -> None:
    index = shards(tmp_path / "a")
    convert_file(index, tmp_path / "b", "parametrized")
    assert (tmp_path / "b" / index.name).is_file()


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file(tensors(), tmp_path / "a" / "model.safetensors")
    (tmp_path / "b").mkdir()  # empty, and so as good as none
    convert_file(tmp_path / "a", tmp_path / "b")
    assert same(load_file(tmp_path / "b" / "model.safetensors"), convert(tensors()))
    (tmp_path / "c").mkdir()
    torch.save(tensors(), tmp_path / "c" / "pytorch_model.bin")
    convert_file(tmp_path / "c", tmp_path / "d")
    assert same(torch.load(tmp_path / "d" / "pytorch_model.bin"), convert(tensors()))


def test_folders_are_never_converted_in_place_or_into_others(tmp_path: Path) -> None:
    shards(tmp_path / "a")
    before = listing(tmp_path)
    with pytest.raises(wn.CheckpointError, match="never in place"):
        convert_file(tmp_path / "a", tmp_path / "a")
    with pytest.raises(wn.CheckpointError, match="never in place"):
        convert_file(tmp_path / "a", tmp_path / "a", in_place=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_bytes(b"earlier")
    with pytest.raises(wn.CheckpointFileError, match="there already"):
        convert_file(tmp_path / "a", tmp_path / "b")
    assert listing(tmp_path) == {**before, "b/mine": b"earlier"}


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


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    shards(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    convert_file(tmp_path / "snapshot", tmp_path / "b")
    assert (tmp_path / "b" / "0.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"steps": 3}}', "has no weight_map"),
        ('{"weight_map": {"steps": "pytorch_model-1.bin"}}', "only sharded safetensors"),
        ('{"weight_map": {"steps": "0.safetensors"}}', "only in one of them"),
        ('{"weight_map": {"steps": "gone.safetensors"}}', "No such file"),
    ],
)
def test_indexes_that_are_damaged(tmp_path: Path, content: str, message: str) -> None:
    shards(tmp_path / "a").write_text(content)
    with pytest.raises(wn.CheckpointError, match=message):
        convert_file(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


# PyTorch files ------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_torch_files(tmp_path: Path, old: bool) -> None:
    source, target = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    state = tensors()
    if old:
        del state["eight"]  # which torch's old format does not know
    content = {"epoch": 2, "state_dict": state, "ema": dict(state)}
    torch.save(content, source, _use_new_zipfile_serialization=not old)
    source.chmod(0o604)
    convert_file(source, target)
    loaded = torch.load(target)
    assert loaded["epoch"] == 2 and same(loaded["state_dict"], convert(state))
    shared = loaded["ema"]["a.weight"], loaded["state_dict"]["a.weight"]
    assert shared[0].data_ptr() == shared[1].data_ptr()
    assert target.stat().st_mode & 0o777 == 0o604
    if not old:
        assert target.stat().st_size <= source.stat().st_size  # nothing is there twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickles_that_would_run_code(tmp_path: Path) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"x": Evil(tmp_path / "ran")}, source)
    target.write_bytes(b"earlier")
    with pytest.raises(wn.CheckpointError, match=r"holds posix\.mkdir, and .*full_pickle=True"):
        convert_file(source, target)
    assert not (tmp_path / "ran").exists() and target.read_bytes() == b"earlier"
    convert_file(source, target, full_pickle=True)
    assert (tmp_path / "ran").is_dir()  # so it is: the flag says what it risks


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x00" * 100])
def test_torch_files_that_are_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(wn.CheckpointError, match=r"a\.pt' is "):
        convert_file(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_torchscript_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a/data.pkl", b"")
        file.writestr("a/constants.pkl", b"")
    with pytest.raises(wn.CheckpointError, match=r"a\.pt' is "):
        convert_file(tmp_path / "a.pt", tmp_path / "b.pt")


# Whole or not at all --------------------------------------------------------------------------


def test_output_equal_to_input(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    (tmp_path / "soft.safetensors").symlink_to(path)
    (tmp_path / "hard.safetensors").hardlink_to(path)
    for name in ("a", "soft", "hard"):
        with pytest.raises(wn.CheckpointError, match="the input itself"):
            convert_file(path, tmp_path / f"{name}.safetensors")
    assert same(load_file(path), tensors())
    convert_file(path, path, in_place=True)
    assert same(load_file(path), convert(tensors()))
    assert same(load_file(tmp_path / "hard.safetensors"), tensors())  # by a rename


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("gone.pt", "b.pt", "neither a file nor a folder"),
        ("a.safetensors", "b.pt", "another ending"),
        ("a.safetensors", "gone/b.safetensors", "No such file"),
        ("a.txt", "b.txt", "the ending '.txt' is none of"),
        ("empty", "b", "has none of model.safetensors.index.json"),
        ("a.safetensors", "folder.safetensors", "is a folder"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, source: str, target: str, message: str) -> None:
    save_file(tensors(), tmp_path / "a.safetensors")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    before = listing(tmp_path)
    with pytest.raises(wn.CheckpointError, match=message):
        convert_file(tmp_path / source, tmp_path / target)
    assert listing(tmp_path) == before


def test_a_full_disk_leaves_the_earlier_output(tmp_path: Path) -> None:
    """The limit on a process's files stands for a disk: both end in a write that fails."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"a.weight_g": torch.ones(512, 1), "a.weight_v": torch.ones(512, 512)}, source)
    target.write_bytes(b"earlier")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(wn.CheckpointFileError, match="File too large; nothing was changed"):
            convert_file(source, target)
        with pytest.raises(wn.CheckpointFileError, match="File too large"):
            convert_file(source, target, "parametrized")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert target.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("no mount is allowed here")
    try:
        source = tmp_path / "a.safetensors"
        save_file({"a.weight_g": torch.ones(512, 1), "a.weight_v": torch.ones(512, 1024)}, source)
        torch.save(load_file(source), tmp_path / "a.pt")
        (tmp_path / "a").mkdir()
        shutil.copy(source, tmp_path / "a" / "model.safetensors")
        for name, target in [
            ("a.safetensors", "b.safetensors"),
            ("a.pt", "b.pt"),
            ("a", "folder"),
        ]:
            with pytest.raises(wn.CheckpointFileError, match="No space left on device"):
                convert_file(tmp_path / name, disk / target)
            assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.safetensors"
    save_file(tensors(), source)

    def refused(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Root may do anything, so that a mode alone would test nothing there.
    monkeypatch.setattr("os.open", refused)
    with pytest.raises(wn.CheckpointFileError, match="Permission denied; nothing was changed"):
        convert_file(source, tmp_path / "b.safetensors")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(wn.CheckpointFileError, match=r"cannot read .*Permission denied"):
        convert_file(source, tmp_path / "b.safetensors")


@pytest.mark.parametrize("kind", ["file", "torch", "folder"])
def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    if kind == "folder":
        shards(tmp_path / "a")
        source, target = tmp_path / "a", tmp_path / "b"
    else:
        ending = ".pt" if kind == "torch" else ".safetensors"
        source, target = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
        torch.save(tensors(), source) if kind == "torch" else save_file(tensors(), source)
    before = listing(tmp_path)
    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_file(source, target)
    assert listing(tmp_path) == before


def test_kills_leave_source_and_earlier_output_whole(tmp_path: Path) -> None:
    """kill -9 at 50 random moments of strips that follow each other without a pause."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    state = {
        f"{i}.weight_{p}": torch.randn(256, 256 if p == "v" else 1) for i in range(4) for p in "gv"
    }
    save_file(state, source)
    convert_file(source, target)
    before, after = source.read_bytes(), target.read_bytes()
    # A fork is up at once; importing torch 50 times would take minutes.
    code = (
        "import os, signal, sys, time, random; from wn_surgery.checkpoints import convert_file\n"
        "random.seed(0)\n"
        "for _ in range(50):\n"
        "    child = os.fork()\n"
        "    while child == 0: convert_file(*sys.argv[1:])\n"
        "    time.sleep(random.uniform(0.005, 0.05))\n"
        "    os.kill(child, signal.SIGKILL)\n"
        "    assert os.waitpid(child, 0)[1] == signal.SIGKILL\n"
        "    print(flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(target)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None and run.stdin is not None
        for _ in range(50):
            assert run.stdout.readline() == "\n"
            assert source.read_bytes() == before and target.read_bytes() == after
            print(file=run.stdin, flush=True)
    assert run.returncode == 0
    left = {path.suffix for path in tmp_path.iterdir()} - {".safetensors"}
    assert left <= {".tmp"}  # hidden, and of no name that anything reads


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """100 MB and twice the largest tensor, above what the imports take; here 40 MB do."""
    state = {f"{i}.weight_g": torch.ones(1024, 1) for i in range(24)}
    state |= {f"{i}.weight_v": torch.ones(1024, 1024) for i in range(24)}  # 4 MB each
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    code = (
        "import sys, threading; from wn_surgery.checkpoints import convert_file\n"
        "def anonymous():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.split('RssAnon:')[1].split()[0]) // 1024\n"
        "peak, done = 0, False\n"
        "def watch():\n"
        "    global peak\n"
        "    while not done: peak = max(peak, anonymous())\n"
        "before = anonymous()\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "convert_file(*sys.argv[1:]); done = True; thread.join(); print(peak - before)\n"
    )
    for ending in ("safetensors", "pt"):
        run = subprocess.run(
            [sys.executable, "-c", code, tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
            timeout=900,
        )
        assert int(run.stdout) < 40, ending


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(tensors(), source)
    with File(source) as file:
        os.truncate(source, source.stat().st_size - 8)
        last = max(file.entries.values(), key=lambda entry: entry.end)
        name = next(name for name, entry in file.entries.items() if entry == last)
        with pytest.raises(wn.CheckpointError, match="became shorter"):
            file.tensor(name)
        with (
            pytest.raises(wn.CheckpointError, match="became shorter"),
            io.FileIO(tmp_path / "out", "w") as out,
        ):
            file.copy(name, out)


# What is written is checked ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_system_that_writes_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As Linux does for more than 2 GiB, which torch.save does not notice."""
    source, target = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    (torch.save if kind == "pt" else save_file)(tensors(), source)
    calls: list[int] = []

    def write_some(file: Output, data: memoryview) -> int:
        calls.append(len(data))
        return io.FileIO.write(file, data[:7])

    monkeypatch.setattr(Output, "write_some", write_some)
    wn.checkpoints.convert_file(source, target, verify=True)
    assert len(calls) > 100
    expected = wn.checkpoints.convert(tensors())
    assert same(load_file(target) if kind == "safetensors" else torch.load(target), expected)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_disk_that_fills_anywhere_in_the_last_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source, target = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    (torch.save if kind == "pt" else save_file)(tensors(), source)
    wn.checkpoints.convert_file(source, target, "parametrized")
    size, before = target.stat().st_size, target.read_bytes()
    room = [0]

    def write_some(file: Output, data: memoryview) -> int:
        left = room[0] - file.tell()
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return io.FileIO.write(file, data[:left])

    monkeypatch.setattr(Output, "write_some", write_some)
    monkeypatch.setattr("wn_surgery.checkpoints.io.safetensors_file.sys.platform", "other")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for missing in range(1, min(size, 4096) + 1):
        room[0] = size - missing
        with pytest.raises(wn.CheckpointFileError, match="No space left"):
            wn.checkpoints.convert_file(source, target, "parametrized")
    assert target.read_bytes() == before and sorted(tmp_path.iterdir()) == [source, target]
    room[0] = size
    wn.checkpoints.convert_file(source, target, "parametrized")


LIMITED = """
import resource, signal, sys
import wn_surgery as wn
source, target, size = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for missing in (1, 22, 500, 4000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size) - missing, resource.RLIM_INFINITY))
    try:
        wn.checkpoints.convert_file(source, target, "parametrized")
        print("written")
    except wn.CheckpointFileError as error:
        print("refused" if "File too large" in str(error) else error)
"""


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_limit_of_the_system(tmp_path: Path, kind: str) -> None:
    source, target = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    (torch.save if kind == "pt" else save_file)(tensors(), source)
    wn.checkpoints.convert_file(source, target, "parametrized")
    size = target.stat().st_size
    target.unlink()
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(target), str(size)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.stdout == "refused\n" * 4, run.stderr[-2000:]
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.skipif("WN_SURGERY_LONG" not in os.environ, reason="writes 4 GB: make test-long")
def test_a_storage_of_more_than_two_gibibytes(tmp_path: Path) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    big = torch.zeros(540_000_000)
    big[-1] = 7
    torch.save({**tensors(), "embedding": big}, source)
    wn.checkpoints.convert_file(source, target)
    found = torch.load(target, mmap=True)["embedding"]
    assert found.shape == big.shape and found[-1] == 7
    target.unlink()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_what_is_read_back_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A disk that keeps other bytes than it was given."""
    source, target = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    (torch.save if kind == "pt" else save_file)(tensors(), source)
    fsync = os.fsync
    weight = wn.checkpoints.convert(tensors())["a.weight"].numpy().tobytes()

    def spoil(descriptor: int) -> None:
        fsync(descriptor)
        for path in tmp_path.glob(".wn-surgery-*"):
            content = bytearray(path.read_bytes())
            place = content.find(weight)
            assert place > 0
            content[place] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(wn.CheckpointFileError, match="is not what was written"):
        wn.checkpoints.convert_file(source, target, verify=True)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("cut", [1, 30, 400])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_an_output_that_is_cut_takes_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cut: int
) -> None:
    source, target = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    (torch.save if kind == "pt" else save_file)(tensors(), source)

    def shorten(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - cut)

    monkeypatch.setattr(os, "fsync", shorten)
    with pytest.raises(wn.CheckpointError):
        wn.checkpoints.convert_file(source, target)
    assert list(tmp_path.iterdir()) == [source]
