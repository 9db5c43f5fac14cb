"""What ``check`` says of a target is what happens: everything here is exported for real."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.fingerprints import assert_same, of_model
from tests.torch_facts.versions import OLD
from wn_surgery.export import check, stripped_copy, verify

if folder := os.environ.get("WN_TORCHAO"):  # one that is not installed: pip install --target
    sys.path.append(folder)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What exporters have to say about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(64, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x)[0]
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Subclass(nn.Linear):
    pass


SEQUENCE, CHANNELS, ROWS = torch.randn(2, 5, 64), torch.randn(2, 32, 12), torch.randn(2, 64)
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 200)), SEQUENCE),
    "subclass": (lambda: nn.Sequential(Subclass(64, 200)), SEQUENCE),
    "conv": (lambda: nn.Sequential(nn.Conv1d(32, 64, 5)), CHANNELS),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(32, 64, 5)), CHANNELS),
    "lstm": (Recurrent, SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "cell": (Cell, ROWS),
    "embedding": (lambda: nn.Sequential(nn.Embedding(200, 64)), torch.tensor([[1, 2, 3]])),
    "attention": (Attention, SEQUENCE),
}


def build(kind: str, layout: str) -> tuple[Any, Tensor]:
    """A small model with weight norm on every weight, as it is when it was just built."""
    torch.manual_seed(0)
    make, x = KINDS[kind]
    model = make().eval()
    for module in list(model.modules()):
        for name in [key for key, held in module._parameters.items() if held is not None]:
            if module._parameters[name].ndim < 2:  # type: ignore[union-attr]
                continue
            if layout == "legacy":
                nn.utils.weight_norm(module, name)
            elif layout == "torch":
                nn.utils.parametrizations.weight_norm(module, name)
            elif layout == "ours":
                wn.apply(module, {"names": "", "params": name})
    return model, x


def effects(model: nn.Module, target: Any) -> set[str]:
    return {finding.effect for finding in check(model, target).findings}


LAYOUTS = ("legacy", "torch", "ours")


# The graph targets ---------------------------------------------------------------------------


def operators(model: nn.Module, x: Tensor) -> int:
    graph = torch.export.export(model, (x,)).graph
    return sum(node.op == "call_function" for node in graph.nodes)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_programs_compute_each_weight(kind: str, layout: str) -> None:
    if OLD and layout == "legacy" and kind in ("lstm", "gru"):
        pytest.skip("torch exports no legacy weight norm of an RNN")
    model, x = build(kind, layout)
    assert effects(model, "torch.export") == effects(model, "aotinductor") == {"bloats"}
    plain = stripped_copy(model)
    assert check(plain, "torch.export").ok
    assert operators(model, x) > operators(plain, x) == operators(build(kind, "plain")[0], x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traces_compute_each_weight(kind: str, layout: str, tmp_path: Path) -> None:
    def nodes(model: nn.Module) -> int:
        traced: Any = torch.jit.trace(model, (x,))
        traced.save(tmp_path / "traced.pt")
        assert verify(model, tmp_path / "traced.pt", x).exact
        return len(list(traced.inlined_graph.nodes()))

    model, x = build(kind, layout)
    assert effects(model, "torchscript-trace") == {"bloats"}
    plain = stripped_copy(model)
    assert nodes(model) > nodes(plain)


@pytest.mark.parametrize("kind", ["linear", "transposed", "lstm", "attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scripts_break(kind: str, layout: str, tmp_path: Path) -> None:
    model, x = build(kind, layout)
    assert effects(model, "torchscript-script") == {"breaks"}

    def save_and_run(module: nn.Module) -> None:
        scripted: Any = torch.jit.script(module)
        scripted.save(tmp_path / "scripted.pt")
        assert verify(module, tmp_path / "scripted.pt", x).max_abs < 1e-6

    with pytest.raises(Exception) as caught:  # noqa: PT011 - of which class is torch's affair
        save_and_run(model)
    expected = {"legacy": "__name__", "ours": "NamedExpr", "torch": ""}[layout]
    assert expected in str(caught.value)
    assert not isinstance(caught.value, AssertionError)
    save_and_run(stripped_copy(model))


def to_onnx(model: nn.Module, x: Tensor, path: Path) -> list[str]:
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.skipif(OLD, reason="torch's ONNX exporter did otherwise")
@pytest.mark.parametrize("rows", [128, 129])
def test_the_onnx_exporter_folds_small_weights_itself(rows: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, rows)).eval()
    wn.apply(model, "linears")
    preflight = check(model, "onnx")
    kept = "ReduceL2" in to_onnx(model, torch.randn(2, 64), tmp_path / "model.onnx")
    assert kept == (not preflight.ok) == (rows == 129)


class Chain(nn.Module):
    """One layer of each kind that onnxruntime treats in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 64)
        self.linear = nn.Linear(64, 180)
        self.up = nn.ConvTranspose1d(180, 32, 5)
        self.conv = nn.Conv1d(32, 96, 3)
        nn.init.zeros_(self.conv.bias)  # left out of the graph, as in a vocoder just built
        self.cell = nn.LSTMCell(96, 80)
        self.rnn = nn.GRU(80, 80, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.conv(self.up(self.linear(self.embedding(tokens)).transpose(1, 2)))
        out: Tensor = self.rnn(self.cell(y[:, :, 0])[0][:, None])[0]
        return out


def sizes_in_eight_bits(model: nn.Module, x: Tensor, folder: Path) -> set[int]:
    """How many elements each of the quantized initializers has."""
    from onnxruntime.quantization import quantize_dynamic

    to_onnx(model, x, folder / "source.onnx")
    quantize_dynamic(folder / "source.onnx", folder / "target.onnx")
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    initializers = onnx.load(folder / "target.onnx").graph.initializer
    return {math.prod(each.dims) for each in initializers if each.data_type in kinds}


@pytest.mark.skipif(OLD, reason="torch's ONNX exporter did otherwise")
def test_onnxruntime_passes_over_computed_weights_in_silence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), torch.tensor([[1, 2, 3]])
    wn.apply(model, {"names": "*", "params": "weight*"})
    size = {each.name: math.prod(each.shape) for each in wn.sites(model) if each.normed}
    found = {each.name: each.effect for each in check(model, "ort-quantize").findings}
    assert found.keys() == size.keys()
    passed_over = {size[name] for name, effect in found.items() if effect == "unquantized"}
    never = {size[name] for name, effect in found.items() if effect == "bloats"}
    assert len(passed_over) == 5 and len(never) == 2
    assert not sizes_in_eight_bits(model, x, tmp_path) & {*size.values()}
    stripped = sizes_in_eight_bits(stripped_copy(model), x, tmp_path)
    assert stripped >= passed_over and not stripped & never


def test_onnxruntime_refuses_a_computed_convolution_with_a_bias(tmp_path: Path) -> None:
    model, x = build("conv", "ours")
    assert effects(model, "ort-quantize") == {"breaks"}
    with pytest.raises(ValueError, match="to be an initializer"):
        sizes_in_eight_bits(model, x, tmp_path)
    for bias in (None, nn.Parameter(torch.zeros(64))):
        model[0].bias = bias
        assert effects(model, "ort-quantize") == {"unquantized"}
    assert effects(model.to("meta"), "ort-quantize") == {"breaks"}  # of which nothing is known


# Quantization in torch -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dynamic_quantization_in_torch(kind: str, layout: str) -> None:
    def quantize_and_run(module: nn.Module) -> None:
        torch.ao.quantization.quantize_dynamic(module, dtype=torch.qint8)(x)

    model, x = build(kind, layout)
    broken = effects(model, "torch-quantize")
    assert broken <= {"breaks"}
    if broken:
        with pytest.raises((AttributeError, AssertionError, RuntimeError)):
            quantize_and_run(model)
    else:
        quantize_and_run(model)
    quantize_and_run(stripped_copy(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchao(kind: str, layout: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantize_and_run(module: nn.Module) -> None:
        quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
        module(x)

    model, x = build(kind, layout)
    plain = stripped_copy(model)
    broken = effects(model, "torchao")
    assert broken <= {"breaks"}
    if broken:
        with pytest.raises((TypeError, KeyError, NotImplementedError)):
            quantize_and_run(model)
    else:
        quantize_and_run(model)
    quantize_and_run(plain)


# Attention -----------------------------------------------------------------------------------


def test_a_legacy_hook_on_an_attention_output_never_runs() -> None:
    model, x = build("attention", "legacy")
    assert effects(model, "torchscript-trace") == {"bloats", "breaks"}
    with pytest.raises(RuntimeError, match="requires grad as a constant"):
        torch.jit.trace(model, (x,))
    with torch.no_grad():
        model.attention.out_proj.weight_g.mul_(2)
    stale = check(model, "torch.export").findings[-1]
    assert (stale.name, stale.effect) == ("attention.out_proj.weight", "stale")
    program = torch.export.export(model, (x,))
    assert verify(model, program, x).max_abs < 1e-6  # the live model has it wrong as well
    assert verify(stripped_copy(model), program, x).max_abs > 1e-2


def test_other_layouts_of_attention_are_computed() -> None:
    for layout in ("torch", "ours"):
        model, x = build("attention", layout)
        assert effects(model, "torch.export") == {"bloats"}
        with torch.no_grad():
            model.attention.out_proj.parametrizations.weight.original0.mul_(2)
        assert verify(stripped_copy(model), torch.export.export(model, (x,)), x).max_abs < 1e-6


# The answer itself ---------------------------------------------------------------------------


def test_the_table_and_the_data() -> None:
    model = nn.Sequential(nn.Linear(64, 200), nn.Conv1d(200, 64, 3), nn.Linear(2, 2))
    wn.apply(model, {"names": "{0,1}"})
    before = of_model(model, identity=True)
    preflight = check(model, "ort-quantize")
    assert_same(before, of_model(model, identity=True))
    assert [(each.name, each.effect) for each in preflight.findings] == [
        ("0.weight", "unquantized"),
        ("1.weight", "breaks"),
    ]
    lines = str(preflight).splitlines()
    assert lines[2].startswith("0.weight  parametrized  unquantized  quantize_dynamic passes over")
    assert lines[-1].startswith(
        "2 of 2 weight-normed parameters would cause problems with ort-quantize; export"
    )
    assert json.loads(json.dumps(preflight.to_dict()))["findings"][1] == {
        "name": "1.weight",
        "type": "Conv1d",
        "layout": "parametrized",
        "effect": "breaks",
        "why": preflight.findings[1].why,
    }
    plain = check(stripped_copy(model), "ort-quantize")
    assert (plain.ok, str(plain)) == (True, "no problem with ort-quantize")
    assert repr(plain) == "<Preflight for ort-quantize: 0 findings, 0 normed>"
    harmless = check(model[1], "torchao")
    assert "1 weight-normed parameters do no harm here" in str(harmless)


def test_what_is_stacked_is_found_and_cannot_be_stripped_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 200)).eval()
    wn.apply(model, "linears")
    nn.utils.parametrizations.spectral_norm(model[0])
    preflight = check(model, "torch.export")
    assert [each.layout for each in preflight.findings] == ["other"]
    assert "stripped_copy" not in str(preflight)
    nn.utils.parametrizations.spectral_norm(plain := nn.Linear(4, 4))
    assert check(plain, "torch.export").ok


def test_fused_and_folded_models_are_checked_as_what_they_are() -> None:
    model, x = build("conv", "ours")
    wn.fuse(model)
    assert effects(model, "torch.export") == {"bloats"}
    assert operators(model, x) > operators(stripped_copy(model), x)
    with pytest.raises(Exception, match="__name__"):
        torch.jit.script(model)
    wn.unfuse(model)
    with wn.folded(model):
        assert effects(model, "torchscript-script") == {"breaks"}


def test_an_unknown_target_is_an_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match=r"expected one of 'onnx', 'torch\.export'"):
        check(nn.Linear(2, 2), "tensorrt")  # type: ignore[arg-type]
