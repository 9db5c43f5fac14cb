"""The MiniLM example, shortened: real pretrained weights, end to end."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.torch_facts.versions import OLD

PATH = Path(__file__).parents[2] / "examples" / "minilm.py"


@pytest.mark.filterwarnings("ignore:.*`torchvision`|.*is deprecated:FutureWarning")
@pytest.mark.skipif(OLD, reason="torch's ONNX exporter did otherwise")
def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("minilm", PATH)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    code = example.main(["--steps", "2", "--build", str(tmp_path)])
    printed = capsys.readouterr().out
    print(printed)  # for the reader of a failure
    assert code == 0
    assert "36 layers of 22,7" in printed and "36 weight-normed layers" in printed
    assert printed.count("  ok    ") == 5 and "FAIL" not in printed
    assert (tmp_path / "minilm.png").read_bytes().startswith(b"\x89PNG")
    assert 80e6 < (tmp_path / "minilm.onnx").stat().st_size < 100e6
