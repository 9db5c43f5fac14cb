"""Files from strangers: refused with an error of ours, and nothing is written or run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import wn_surgery as wn
from tests.checkpoints.makers import tensors

pytestmark = pytest.mark.processes

convert_file, inspect = wn.checkpoints.convert_file, wn.checkpoints.inspect
# make fuzz asks for many more.
CASES = settings(
    max_examples=int(os.environ.get("WN_SURGERY_FUZZ", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def hostile(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b"\x01", "cut off"),
        (hostile({}, length=1 << 63), "cut off"),
        (hostile({}, b"12345678", length=3), "not JSON"),
        (hostile(b"[" * 5000), "not JSON"),
        (hostile(b"\xff\xfe"), "not JSON"),
        (hostile(b"[]"), "not a JSON object"),
        (hostile(b'{"a":{},"a":{}}'), "a key is there twice"),
        (hostile({"a": 3}), "needs dtype, shape and data_offsets"),
        (hostile({"a": {**ONE, "more": 1}}, b"1234"), "and nothing else"),
        (hostile({"a": ONE}), "end at byte"),
        (hostile({"a": ONE}, b"12345"), "end at byte"),
        (hostile({"a": ONE, "b": ONE}, b"1234"), "'b' begins at"),
        (hostile({"a": {**ONE, "data_offsets": [4, 8]}}, b"12345678"), "'a' begins at"),
        (hostile({"a": {**ONE, "data_offsets": [4, 0]}}, b"1234"), "which is not what"),
        (hostile({"a": {**ONE, "data_offsets": [0, 4, 8]}}, b"1234"), "needs two offsets"),
        (hostile({"a": {**ONE, "shape": [-1]}}, b"1234"), "not sizes"),
        (hostile({"a": {**ONE, "shape": [True]}}, b"1234"), "not sizes"),
        (hostile({"a": {**ONE, "shape": [1.0]}}, b"1234"), "not sizes"),
        (hostile({"a": {**ONE, "shape": [1 << 80]}}, b"1234"), "not sizes"),
        (hostile({"a": {**ONE, "shape": [1] * 65}}, b"1234"), "at most 64 axes"),
        (
            hostile({"a": {**ONE, "shape": [0, 1 << 61, 8], "data_offsets": [0, 0]}}),
            "too large for any memory",
        ),
        (hostile({"a": {**ONE, "dtype": "PICKLE"}}, b"1234"), "unknown dtype 'PICKLE'"),
        (hostile({"a": {**ONE, "dtype": ["F32"]}}, b"1234"), "unknown dtype"),
        (hostile({"\ud800": ONE}, b"1234"), "not Unicode text"),
        (hostile({"__metadata__": {"a": 1}}), "must map text to text"),
        (hostile({"__metadata__": ["a"]}), "must map text to text"),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(wn.CheckpointError, match=message) as refused:
        convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "not a sound safetensors file" in str(refused.value) and "\n" not in str(refused.value)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # a hole: no disk is used
    with pytest.raises(wn.CheckpointError, match="over the limit"):
        inspect(tmp_path / "a.safetensors")


def test_dtypes_that_torch_does_not_have_are_copied(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
        "b": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [2, 4]},
    }
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    source.write_bytes(hostile(header, b"1234"))
    convert_file(source, target)
    assert target.read_bytes().endswith(b"1234")
    weights = {
        "weight_g": {"dtype": "F4", "shape": [2, 1], "data_offsets": [0, 1]},
        "weight_v": {"dtype": "F4", "shape": [2, 2], "data_offsets": [1, 3]},
    }
    source.write_bytes(hostile(weights, b"123"))
    with pytest.raises(wn.CheckpointError, match="quantized before its weight norm"):
        convert_file(source, target)


# What is not a number -------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("a.weight_v", 0.0, "v has 8 slices of zero or non-finite norm"),
        ("a.weight_v", float("nan"), "v has 8 slices of zero or non-finite norm"),
        ("a.weight_v", float("inf"), "v has 8 slices of zero or non-finite norm"),
        ("a.weight_g", float("nan"), "g has 8 numbers that are not finite"),
        ("b.weight_g", float("-inf"), "g has 6 numbers that are not finite"),
    ],
)
def test_weights_that_would_not_be_numbers(
    tmp_path: Path, ending: str, part: str, value: float, message: str
) -> None:
    state = tensors()
    state[part].fill_(value)
    source, target = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    save_file(state, source) if ending == ".safetensors" else torch.save(state, source)
    with pytest.raises(wn.ZeroNormError, match=message):
        convert_file(source, target)
    assert not target.exists()
    convert_file(source, target, non_finite="keep")
    convert_file(source, target, "parametrized")  # which computes nothing
    kinds = {finding.kind for finding in inspect(source).findings}
    assert kinds == ({"zero"} if value == 0.0 else {"non-finite"})


def test_large_weights_are_numbers(tmp_path: Path) -> None:
    state = {"weight_g": torch.full((64, 1), 3e38), "weight_v": torch.ones(64, 1)}
    plain = wn.checkpoints.convert(state)["weight"]
    assert bool((plain == 3e38).all())  # though their sum is not finite


# Fuzzing --------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [
        *(
            f"{prefix}weight{end}"
            for prefix in ("", "a.")
            for end in ("", "_g", "_v", "_orig", "_u")
        ),
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
        "parametrizations.weight.0._u",
        "__metadata__",
        "x/../y",
        "\x00",
    ]
)
SIZES = st.one_of(st.integers(0, 4), st.integers(-2, 1 << 70))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "F64", "C64", "U8", "F4", "BOOL", "X", ""]),
        "shape": st.lists(SIZES, max_size=4),
        "data_offsets": st.lists(SIZES, max_size=3),
    }
)
HEADERS = st.dictionaries(NAMES, st.one_of(ENTRIES, st.none(), st.integers()), max_size=5)


@st.composite
def sound_headers(draw: st.DrawFn) -> bytes:
    """Headers whose lines are all true, of tensors that do not belong together."""
    lines: dict[str, Any] = {}
    place = 0
    for name in draw(st.lists(NAMES.filter(lambda name: name[0] != "_"), max_size=5, unique=True)):
        dtype, size = draw(st.sampled_from([("F32", 4), ("F16", 2), ("I8", 1), ("F64", 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        for length in shape:
            size *= length
        lines[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    return hostile(lines, draw(st.binary(min_size=place, max_size=place)))


def attempt(folder: Path, ending: str, content: bytes) -> None:
    source, target = folder / f"a{ending}", folder / f"b{ending}"
    source.write_bytes(content)
    for act in (
        lambda: inspect(source),
        lambda: convert_file(source, target, also="spectral_norm"),
        lambda: convert_file(source, target, "legacy"),
    ):
        with contextlib.suppress(wn.WeightNormError):
            act()
        assert set(folder.iterdir()) <= {source, target}
    assert source.read_bytes() == content
    if target.exists() and ending == ".safetensors":
        load_file(target)


@CASES
@given(st.one_of(HEADERS.map(lambda header: hostile(header, b"\0" * 16)), sound_headers()))
def test_made_up_headers(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    attempt(tmp_path_factory.mktemp("fuzz"), ".safetensors", content)


@CASES
@given(st.data(), st.sampled_from([".safetensors", ".pt", ".old.pt"]))
def test_flipped_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    ending = ".safetensors" if kind == ".safetensors" else ".pt"
    state = {key: value for key, value in tensors().items() if key != "eight"}
    path = folder / f"a{ending}"
    if ending == ".pt":
        torch.save(state, path, _use_new_zipfile_serialization=kind == ".pt")
    else:
        save_file(state, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    attempt(folder, ending, bytes(content))


# PyTorch files ------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    return {"c.weight_g": torch.rand(8, 1, 1) + 1, "c.weight_v": torch.randn(8, 4, 3)}


def pair(g: Any, v: Any) -> dict[str, Any]:
    return {"c.weight_g": g, "c.weight_v": v}


def nest(times: int, make: Any) -> Any:
    content: Any = torch.ones(1)
    for _ in range(times):
        content = make(content)
    return content


def holds_itself() -> dict[str, Any]:
    held: list[Any] = []
    held.append(held)
    return {"held": held, **good()}


quantized = lambda: torch.quantize_per_tensor(torch.randn(8, 4), 0.1, 0, torch.qint8)  # noqa: E731
COMPLEX = torch.randn(8, 4, dtype=torch.complex64)
# What is refused by every command that computes, with what, and what is not refused at all.
ODD: dict[str, tuple[Any, str | None]] = {
    "stride 0, small": (
        lambda: pair(torch.ones(1).expand(1 << 22, 1), torch.ones(1, 1).expand(1 << 22, 1 << 4)),
        "share their elements",
    ),
    "stride 0, terabytes": (
        lambda: pair(torch.ones(8, 1), torch.ones(1, 1).expand(8, 1 << 50)),
        "share their elements",
    ),
    "lists of lists": (lambda: {"x": nest(40, lambda a: [a, a]), **good()}, "over and over"),
    "dicts of dicts": (lambda: {"x": nest(40, lambda a: {"a": a, "b": a})}, "over and over"),
    "deep": (lambda: {"x": nest(300, lambda a: [a]), **good()}, "deep"),
    "a list in itself": (holds_itself, "holds itself"),
    "quantized pair": (lambda: pair(torch.ones(8, 1), quantized()), "quantized"),
    "sparse pair": (lambda: pair(torch.ones(8, 1), torch.eye(8).to_sparse()), "expected"),
    "meta and not": (lambda: pair(torch.ones(8, 1), torch.ones(8, 4, device="meta")), "meta"),
    "nested pair": (
        lambda: pair(torch.ones(2, 1), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        "",
    ),
    "quantized beside": (lambda: {**good(), "q": quantized()}, None),
    "nested beside": (
        lambda: {**good(), "n": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        None,
    ),
    "conjugated": (lambda: pair(torch.ones(8, 1), COMPLEX.conj()), None),
    "negated": (lambda: pair(torch.ones(8, 1), COMPLEX.conj().imag), None),
    "meta pair": (
        lambda: pair(torch.ones(8, 1, device="meta"), torch.ones(8, 4, device="meta")),
        None,
    ),
    "overlapping": (
        lambda: pair(torch.ones(8, 1), torch.randn(99).as_strided((8, 4), (1, 2))),
        None,
    ),
}
LIMITS = """
import pickle, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch, wn_surgery as wn
from pathlib import Path
torch.set_num_threads(1)
convert, inspect = wn.checkpoints.convert_file, wn.checkpoints.inspect
compare = wn.checkpoints.compare
folder = Path(sys.argv[1])
torch.save({"a.weight_g": torch.ones(2, 1), "a.weight_v": torch.ones(2, 2)}, folder / "warm")
(folder / "warm").rename(folder / "warm.pt")
convert(folder / "warm.pt", folder / "out.pt", verify=True)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.RLIM_INFINITY))
rules = {"names": "**"}
calls = {
    "inspect": lambda path, out: str(inspect(path)),
    "strip": lambda path, out: convert(path, out, verify=True),
    "convert": lambda path, out: convert(path, out, "parametrized"),
    "apply": lambda path, out: convert(path, out, "parametrized", rules=rules),
    "compare": lambda path, out: str(compare(path, path)),
}
for path in sorted(folder.glob("odd*.pt")):
    for name, call in calls.items():
        (folder / "out.pt").unlink(missing_ok=True)
        began = time.process_time()
        try:
            call(path, folder / "out.pt")
            said = "done"
        except wn.CheckpointError as error:
            said = "refused: " + " ".join(str(error).split())
        except wn.WeightNormError as error:
            said = type(error).__name__
        except BaseException as error:
            said = f"FOREIGN {error!r}"
        slow = "SLOW " if time.process_time() - began > 10 else ""
        left = sorted(p.name for p in folder.glob(".wn-surgery-*"))
        print(path.stem, name, slow + (f"LEFT {left} " if left else "") + said, sep="|")
"""


@pytest.mark.filterwarnings("ignore")
def test_odd_torch_files_in_bounded_time_and_memory(tmp_path: Path) -> None:
    for number, (make, _) in enumerate(ODD.values()):
        torch.save(make(), tmp_path / f"odd{number:02}.pt")
    run = subprocess.run(
        [sys.executable, "-c", LIMITS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split("|", 2) for line in run.stdout.splitlines()]
    assert len(lines) == 5 * len(ODD)
    names = list(ODD)
    for stem, command, said in lines:
        name = names[int(stem.removeprefix("odd"))]
        assert not any(word in said for word in ("FOREIGN", "SLOW", "LEFT")), (name, command, said)
        expected = ODD[name][1]
        if expected is None and command in ("strip", "convert", "inspect"):
            assert said == "done", (name, command, said)
        elif expected is not None and command == "strip":
            assert said.startswith("refused") and expected in said, (name, command, said)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """torch maps the file, and would take the compressed bytes for the tensors'."""
    torch.save(good(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record.filename))
    with pytest.raises(wn.CheckpointError, match="is compressed, as torch writes none"):
        inspect(tmp_path / "b.pt")


def test_a_quantized_tensor_cannot_be_compared(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({**good(), "q": quantized()}, tmp_path / "a.pt")
    with pytest.raises(wn.CheckpointError, match="'q' is quantized"):
        wn.checkpoints.compare(tmp_path / "a.pt", tmp_path / "a.pt")
