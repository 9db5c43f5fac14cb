"""``verify``: whatever was exported is run, and every difference is found and measured."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.fingerprints import assert_same, of_model
from wn_surgery.export import stripped_copy, verify

X = torch.sin(torch.arange(2 * 3 * 9) / 3.0).reshape(2, 3, 9)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What exporters have to say about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """Two inputs, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"hidden": y, "pair": (self.head(y) * scale, y.argmax(1))}


def made() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    wn.apply(model, {"names": "*"})
    return model


INPUTS = (X, torch.tensor(2.0))


# Kinds of exports ------------------------------------------------------------------------------


def test_an_exported_program_and_its_file(tmp_path: Path) -> None:
    model = made()
    program = torch.export.export(stripped_copy(model), INPUTS)
    torch.export.save(program, tmp_path / "model.pt2")
    for exported in (
        program,
        program.module(),
        tmp_path / "model.pt2",
        str(tmp_path / "model.pt2"),
    ):
        found = verify(model, exported, INPUTS)
        assert found.exact and found.max_abs == 0 and found.max_ulp == 0
        assert repr(found) == "<Verification of 3 outputs: exact>"
        assert [each.name for each in found.outputs] == ["hidden", "pair.0", "pair.1"]
        assert [each.dtype for each in found.outputs] == ["float32", "float32", "int64"]
    named = {"x": X, "scale": INPUTS[1]}
    assert verify(model, torch.export.export(stripped_copy(model), (), named), named).exact


def test_an_onnx_file_and_its_session(tmp_path: Path) -> None:
    import onnxruntime

    model, path = made(), tmp_path / "model.onnx"
    torch.onnx.export(stripped_copy(model), INPUTS, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for exported in (path, session):
        for inputs in (INPUTS, {"x": X, "scale": INPUTS[1]}, {"scale": INPUTS[1], "x": X}):
            found = verify(model, exported, inputs)
            assert found.max_abs < 1e-5 and found.outputs[2].max_ulp == 0
    with pytest.raises(wn.ExportError, match=r"takes 2 inputs \(x, scale\); got 1;"):
        verify(made_for_one(), path, X)
    with pytest.raises(wn.ExportError, match="got 2, named"):
        verify(lenient(), path, {"x": X, "y": X})
    with pytest.raises(wn.ExportError, match="input x is bfloat16"):
        verify(lenient(), path, (X.bfloat16(), INPUTS[1]))


def made_for_one() -> nn.Module:
    return nn.Linear(9, 9).eval()


class Lenient(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return torch.zeros(2)


def lenient() -> nn.Module:
    return Lenient().eval()


def test_torchscript_and_its_files(tmp_path: Path) -> None:
    model = made_for_one()
    wn.apply(model, "linears")
    traced: Any = torch.jit.trace(stripped_copy(model), (X,))
    scripted: Any = torch.jit.script(stripped_copy(model))
    traced.save(tmp_path / "traced.pt")
    scripted.save(tmp_path / "scripted.ts")
    for exported in (traced, scripted, tmp_path / "traced.pt", tmp_path / "scripted.ts"):
        assert verify(model, exported, X).exact


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, g++")
@pytest.mark.skipif(
    "WN_SURGERY_LONG" not in os.environ, reason="compiles for 20 s; in make test-long"
)
def test_an_aotinductor_package(tmp_path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    model = nn.Linear(9, 2).eval()
    wn.apply(model, "linears")
    program = torch.export.export(stripped_copy(model), (X,))
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = tmp_path / "model.pt2"
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    found = verify(model, path, X)
    assert found.max_abs < 1e-6
    with torch.no_grad():
        model.bias.add_(1)
    assert math.isclose(verify(model, path, X).max_abs, 1, abs_tol=1e-5)


def test_a_compiled_package_is_told_from_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/wrapper.so", b"")
    model = made_for_one()
    monkeypatch.setattr("torch._inductor.aoti_load_package", {str(path): model}.get)
    assert verify(model, path, X).exact


# What is found ---------------------------------------------------------------------------------


def test_a_difference_is_found_where_it_is() -> None:
    model = made()

    def wrong(x: Tensor, scale: Tensor) -> Any:
        output = model(x, scale)
        output["pair"][0][1, 2, 0] += 0.5
        return output

    found = verify(model, wrong, INPUTS)
    assert [each.differing for each in found.outputs] == [0, 1, 0]
    assert math.isclose(found.max_abs, 0.5, rel_tol=1e-5) and not found.exact
    largest = model(*INPUTS)["pair"][0].abs().max()
    assert math.isclose(found.outputs[1].largest, largest, rel_tol=1e-6)
    assert json.loads(json.dumps(found.to_dict()))["outputs"][1]["shape"] == [2, 4, 2]
    lines = str(found).splitlines()
    assert lines[0].startswith("output  shape  dtype    largest  max abs")
    assert lines[3].split()[:3] == ["pair.0", "2x4x2", "float32"]


class Given(nn.Module):
    """Gives back its input."""

    def forward(self, x: Any) -> Any:
        return x


def differences(one: Any, other: Any) -> Any:
    return verify(Given().eval(), lambda _: other, one)


def test_ulps_count_every_half_number() -> None:
    """All of them in order, negative, subnormal and infinite ones too."""
    bits = torch.arange(0, 0x7C01, dtype=torch.int32).to(torch.int16)
    positive = bits.view(torch.float16)
    assert positive.diff().min() > 0 and positive[-1] == math.inf
    ordered = torch.cat([-positive.flip(0), positive])
    for here in (0, 1, 0x7BFF, 0x7C00, 0x7C01, 0x7C02, 0xF801):
        steps = torch.arange(len(ordered)).sub(here).abs()
        steps -= ((torch.arange(len(ordered)) >= 0x7C01) != (here >= 0x7C01)).long()  # two zeros
        for at in range(0, len(ordered), 997):
            assert differences(ordered[at], ordered[here]).max_ulp == steps[at]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ulps_of_neighbours(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -3e-39, 1e30, -1.0, 0.0], dtype=dtype)
    up = x
    for steps in range(1, 4):
        up = torch.nextafter(up, torch.full_like(up, math.inf))
        assert differences(x, up).max_ulp == differences(up, x).max_ulp == steps
    assert differences(torch.tensor(0.0), torch.tensor(-0.0)).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_difference_is_no_overflow(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    found = differences(torch.tensor([top, -top]).to(dtype), torch.tensor([-top, top]).to(dtype))
    exponents, mantissa = (254, 23) if dtype is torch.float32 else (2046, 52)
    assert found.max_ulp == 2.0 * ((exponents + 1) * 2**mantissa - 1)


def test_what_is_no_number() -> None:
    nan, inf = math.nan, math.inf
    assert differences(torch.tensor([nan, inf, -inf]), torch.tensor([nan, inf, -inf])).exact
    for one, other in [(nan, 1.0), (1.0, nan), (inf, 1.0), (inf, -inf), (nan, inf)]:
        found = differences(torch.tensor([one, 2.0]), torch.tensor([other, 2.0]))
        assert found.max_abs == inf and found.outputs[0].differing == 1, (one, other)
        assert found.max_ulp == inf or not {one, other} & {nan}
    assert math.isnan(differences(torch.tensor([nan]), torch.tensor([nan])).outputs[0].largest)


def test_other_dtypes() -> None:
    third = torch.tensor([1 / 3])
    found = differences(third, third.half())
    assert found.outputs[0].dtype == "float32 -> float16" and found.exact
    assert differences(third, third.half() * 2).max_ulp == 1024
    assert differences(torch.tensor([3, 5]), torch.tensor([3, 9])).max_ulp == 4
    assert differences(torch.tensor([True]), torch.tensor([False])).max_abs == 1
    turned = differences(torch.tensor([1 + 2j]), torch.tensor([1 + 4j]))
    assert turned.max_abs == 2 and turned.outputs[0].shape == (1,)
    eight = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    assert differences(eight, eight.float() + 1).max_abs == 1
    assert differences(torch.zeros(0, 3), torch.zeros(0, 3)).exact
    assert differences(torch.zeros(2), torch.zeros(2).numpy()).exact


def test_outputs_of_any_form() -> None:
    @dataclass
    class Output:
        first: Tensor
        rest: list[Any]

    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x, [None, x + 1, {"a": x, "none": None}])

    found = verify(Gives().eval(), lambda x: [x, x + 1, x], X)
    assert [each.name for each in found.outputs] == ["first", "rest.1", "rest.2.a"]
    assert found.exact


def test_a_model_of_transformers() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    model = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8, 8),
            conv_stride=(4, 4),
            conv_kernel=(8, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        )
    ).eval()
    wave = torch.sin(torch.arange(400) / 7).reshape(1, 400)
    found = verify(model, stripped_copy(model), {"input_values": wave})
    assert found.exact
    assert [each.name for each in found.outputs] == ["last_hidden_state", "extract_features"]


# What it leaves alone, and what it refuses -----------------------------------------------------


class Noisy(nn.Module):
    """Draws random numbers and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(torch.randn_like(x))
        out: Tensor = self.layer(x)
        return out


def test_both_see_the_same_and_leave_everything_as_it_was() -> None:
    model = Noisy().eval()
    wn.apply(model, "linears")
    plain = stripped_copy(model)
    x = X.clone()
    before, random = of_model(model, identity=True), torch.get_rng_state()
    assert verify(model, plain, x).exact
    assert verify(model, plain, {"x": x}).exact
    assert verify(Listed().eval(), lambda xs: [xs[0].zero_(), xs[1]], ([x * 0, x],)).exact
    assert_same(before, of_model(model, identity=True))
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, X)


class Listed(nn.Module):
    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [xs[0].clone(), xs[1]]


def refusals(folder: Path) -> list[tuple[Callable[[], Any], str]]:
    model = made_for_one()
    (folder / "model.bin").write_bytes(b"")
    (folder / "model.pt2").write_bytes(b"no archive")
    return [
        (lambda: verify(model.train(), model, X), "Linear is in training mode"),
        (lambda: verify(model.eval(), folder / "absent.onnx", X), "is not a file"),
        (lambda: verify(model, folder / "model.bin", X), r"model\.bin: expected \.onnx"),
        (lambda: verify(model, folder / "model.pt2", X), r"not a \.pt2 archive"),
        (lambda: verify(model, 3, X), "cannot run a int"),  # type: ignore[arg-type]
        (
            lambda: verify(model, lambda x: [x, x], X),
            r"1 output tensors \(output\) and the export 2",
        ),
        (lambda: verify(model, lambda x: x[0], X), r"output output has shape \(3, 9\)"),
        (lambda: verify(Given().eval(), lambda x: None, {"x": None}), "0 output tensors"),
    ]


@pytest.mark.parametrize("number", range(8))
def test_what_cannot_be_compared_is_refused(number: int, tmp_path: Path) -> None:
    call, message = refusals(tmp_path)[number]
    with pytest.raises(wn.ExportError, match=message):
        call()


def test_without_onnxruntime_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wn-surgery\[export\]'"):
        verify(made_for_one(), path, X)
