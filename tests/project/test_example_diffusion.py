"""The example of a diffusion model, with few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "digits_diffusion.py"


def test_it_trains_draws_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("digits_diffusion", PATH)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    picture = tmp_path / "digits.png"
    # It is 0 only if the renormalized layers kept one effective learning rate.
    assert example.main(["--steps", "40", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "weight norm: held-out loss" in out and "directions renormalized: held-out" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
