"""The command line, through its entry point's function."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wn_surgery.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["wn-surgery", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    state = {"a.weight_g": torch.tensor([[10.0]]), "a.weight_v": torch.tensor([[3.0, 4.0]])}
    save_file({**state, "b.weight_v": torch.ones(2)}, path)
    return path


def test_inspect(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", file) == 0
    out = capsys.readouterr().out
    assert "a.weight  legacy  0" in out and "b.weight_v: its other half is missing" in out
    assert run(monkeypatch, "inspect", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["layout"] == "legacy"


def test_strip_and_convert(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = file.with_name("b.safetensors")
    assert run(monkeypatch, "strip", file, out) == 0
    assert torch.equal(load_file(out)["a.weight"], torch.tensor([[6.0, 8.0]]))
    assert run(monkeypatch, "convert", file, out, "--to", "parametrized") == 0
    assert "a.parametrizations.weight.original0" in load_file(out)


def test_refusals_are_one_line_and_codes(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "strip", file, file) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "--in-place" in err
    assert run(monkeypatch, "strip", file) == 2
