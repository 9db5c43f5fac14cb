"""Mutations of real checkpoint files, through every command, with limits on time and memory.

Whatever a file holds, a command ends with a documented exit code, in time, and leaves nothing
that is not whole. ``WN_SURGERY_ATTACK=100000`` asks for more files (``make attack``).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.makers import tensors

FILES = max(120, int(os.environ.get("WN_SURGERY_ATTACK", "0")) // 50)
CHUNKS = 4
SECONDS = 10
pytestmark = pytest.mark.processes

# One process for many files: it is told their names, and says how each command ended.
CHILD = """
import contextlib, io, os, resource, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from wn_surgery.cli import main
torch.set_num_threads(1)
COMMANDS = (
    ["inspect"], ["inspect", "--json"], ["doctor"], ["strip", "OUT"], ["strip", "OUT", "--verify"],
    ["convert", "OUT", "--to", "parametrized"], ["apply", "OUT", '{"names": "**"}', "--rank", "2"],
    ["diff", "SAME"],
)

def run(path, command):
    out = path.with_name("out" + path.suffix)
    out.unlink(missing_ok=True)
    words = [{"OUT": str(out), "SAME": str(path)}.get(word, word) for word in command[1:]]
    sys.argv = ["wn-surgery", command[0], str(path), *words]
    said, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    slow = time.process_time() - began > SECONDS
    left = [p.name for p in path.parent.iterdir() if p.name.startswith(".wn-surgery")]
    if code in (3, 4) and out.exists():
        left.append(out.name)
    print(path.name, command[0], code, int(slow), left or "-", file=sys.__stdout__)
    if code == 70:
        print(said.getvalue()[-1500:], file=sys.__stderr__)

paths = [Path(line.strip()) for line in sys.stdin]
run(paths[0], COMMANDS[4])  # everything is imported once
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (2 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
for path in paths[1:]:
    before = path.read_bytes()
    for command in COMMANDS:
        run(path, command)
    assert path.read_bytes() == before
print("done", file=sys.__stdout__)
""".replace("SECONDS", str(SECONDS))


def originals(folder: Path) -> list[Path]:
    """A small file of every kind."""
    state = {key: value for key, value in tensors().items() if key != "eight"}
    spectral = {
        "s.weight_orig": torch.randn(4, 3),
        "s.weight_u": torch.randn(4),
        "s.weight_v": torch.randn(3),
    }
    save_file(state | spectral, folder / "a.safetensors")
    torch.save(state | spectral, folder / "a.pt")
    torch.save(
        {
            "epoch": 3,
            "state_dict": state,
            "optimizer_states": [{"state": {0: {"m": torch.ones(2)}}}],
        },
        folder / "a.ckpt",
    )
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


def mutated(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, size = rng.randrange(len(found)), rng.choice([1, 4, 40])
        kind = rng.choice(["flip", "flip", "head", "cut", "drop", "repeat", "zeros", "ones"])
        if kind == "flip":
            found[place] ^= 1 << rng.randrange(8)
        elif kind == "head":  # where headers and pickles are
            found[rng.randrange(min(400, len(found)))] = rng.randrange(256)
        elif kind == "cut":
            del found[max(1, place) :]
        elif kind == "drop":
            del found[place : place + size]
        elif kind == "repeat":
            found[place:place] = found[place : place + size]
        else:
            size = len(found[place : place + size])
            found[place : place + size] = bytes([255 * (kind == "ones")]) * size
        found = found or bytearray(b"\0")
    return bytes(found)


def rezipped(path: Path, target: Path, rng: random.Random) -> None:
    """The records of a PyTorch file, of which some are gone, doubled or changed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            data = old.read(record.filename)
            kind = rng.choice(["keep", "keep", "keep", "drop", "change", "double", "swap"])
            if kind == "drop":
                continue
            if kind == "change" and data:
                data = mutated(data, rng)
            name = record.filename
            if kind == "swap":
                name = rng.choice(old.namelist())
            if name not in new.namelist():
                new.writestr(name, data)
            if kind == "double":
                new.writestr(f"{name}/again", data)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_command_on_mutated_files(tmp_path: Path, chunk: int) -> None:
    (tmp_path / "originals").mkdir()
    sources = originals(tmp_path / "originals")
    rng = random.Random(chunk)
    names = [sources[0]]
    for number in range(FILES // CHUNKS):
        source = rng.choice(sources)
        path = tmp_path / f"m{number:05}{source.suffix}"
        if source.suffix != ".safetensors" and source.stem == "a" and rng.random() < 0.5:
            rezipped(source, path, rng)
        else:
            path.write_bytes(mutated(source.read_bytes(), rng))
        names.append(path)
    ran = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="\n".join(map(str, names)),
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = ran.stdout.splitlines()
    assert lines[-1] == "done" and len(lines) == 2 + 8 * (len(names) - 1)
    for line in lines[:-1]:
        name, command, code, slow, left = line.split(" ", 4)
        assert code in ("0", "1", "3", "4"), f"{line}: {ran.stderr[-1500:]}"
        assert code != "1" or command in ("diff", "doctor"), line
        assert slow == "0" and left == "-", line
        assert (tmp_path / name).exists() or name == sources[0].name
