"""The demo, end to end: shortened to a few seconds, so hardly trained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch

from tests.torch_facts.versions import OLD

PATH = Path(__file__).parents[2] / "examples" / "digits_tcn.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_tcn", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_network_is_causal_and_sees_the_whole_image(demo: ModuleType) -> None:
    torch.manual_seed(0)
    blocks = demo.TCN().eval().blocks
    pixels = torch.randn(1, 1, 64, requires_grad=True)
    (middle,) = torch.autograd.grad(blocks(pixels)[0, :, 40].sum(), pixels)
    assert not middle[0, 0, 41:].any()
    (last,) = torch.autograd.grad(blocks(pixels)[0, :, -1].sum(), pixels)
    assert last[0, 0, 0] != 0


def test_the_data_is_split_and_complete(demo: ModuleType) -> None:
    train, test = demo.digits(None)
    assert (len(train), len(test)) == (1347, 450)
    assert train.tensors[0].shape == (1347, 1, 64)
    assert sorted(test.tensors[1].unique().tolist()) == list(range(10))


@pytest.mark.skipif(OLD, reason="torch's ONNX exporter did otherwise")
def test_a_short_run(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epochs", "2", "--samples", "400", "--build", str(tmp_path)]
    code = demo.main([*arguments, "--threshold", "0.05"])
    printed = capsys.readouterr().out
    print(printed)  # for the reader of a failure
    assert code == 0
    assert "6 of 7 matched parameters change" in printed
    assert "epoch   2/2" in printed
    assert "same prediction as the trained model: 100 of 100" in printed
    assert "normalization left in the stripped graph: none" in printed
    assert "FAIL" not in printed
    live, stripped = (
        {node.op_type for node in onnx.load(tmp_path / name).graph.node}
        for name in ("digits_tcn_live.onnx", "digits_tcn.onnx")
    )
    assert demo.NORM_OPS & live
    assert not demo.NORM_OPS & stripped


@pytest.mark.skipif(OLD, reason="torch's ONNX exporter did otherwise")
def test_a_model_below_the_threshold_fails(
    demo: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_training(*args: object) -> float:
        return 0.5

    monkeypatch.setattr(demo, "train", no_training)
    assert demo.main(["--samples", "40", "--build", str(tmp_path)]) == 1
    assert "FAIL  test accuracy 50.00%, at least 95% asked" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_progress_redraws_one_line_on_a_terminal(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    data = demo.digits(130)
    torch.manual_seed(0)
    demo.train(demo.TCN(channels=4), data, epochs=3)
    out = capsys.readouterr().out
    assert [part.count("epoch") for part in out.split("\r")] == [1, 1, 1]
    assert out.endswith("\n")
