"""Where something records what a fused model does, it records the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import wn_surgery as wn
from tests.fused.models import X, fused, gradients, normed
from tests.torch_facts.versions import OLD

pytestmark = pytest.mark.usefixtures("both_paths")

# torch.compile looks at the .grad of every tensor it is given, also of plain models.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def test_the_whole_model_compiles_in_one_graph() -> None:
    model, other = fused(), normed()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(X), other(X))
        compiled(X).sum().backward()
        other(X).sum().backward()
    torch.testing.assert_close(gradients(model), gradients(other))
    torch.testing.assert_close(model(X), other(X))  # and, after it, as before it


def test_a_compiled_part_of_an_eager_model() -> None:
    """The scope is open then, and a value in it must not become a constant."""
    model, other = fused(), normed()
    model(X)
    model.middle = torch.compile(model.middle, fullgraph=True, backend="aot_eager")  # type: ignore[assignment]
    for each in (model, other):
        for _ in range(2):
            each(X).sum().backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.mul_(1.1)
    torch.testing.assert_close(model(X), other(X))
    torch.testing.assert_close(gradients(model), gradients(other))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


def test_equal_blocks_compile_as_often_as_plain_ones() -> None:
    def frames(norm: bool) -> int:
        torch._dynamo.reset()
        model = nn.Sequential(*[Block() for _ in range(12)])
        if norm:
            wn.apply(model, {"types": "Linear"})
            wn.fuse(model)
            model(torch.ones(1, 4))
        counter = CompileCounter()
        for block in model:
            block.compile(backend=counter)
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
        return int(counter.frame_count)

    assert frames(norm=True) == frames(norm=False)


def test_weights_computed_eagerly_around_a_compiled_model() -> None:
    """Inside ``folded`` a weight is an input of the graph: weight norm stays out of it."""
    model, other = fused(), normed()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        with wn.folded(model):
            compiled(X).sum().backward()
        other(X).sum().backward()
        with torch.no_grad():
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                a.mul_(1.1)
                b.mul_(1.1)
    torch.testing.assert_close(gradients(model), gradients(other))
    assert counter.frame_count == 1


def test_a_parametrization_of_another_layer_stays_its_own() -> None:
    """torch puts a property on the class, which here is that of every weight-normed Linear."""
    other, layer = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    wn.apply(other, "linears")
    wn.apply(layer, "linears")
    parametrize.register_parametrization(other[0], "bias", nn.ReLU())
    assert layer[0].bias is layer[0]._parameters["bias"] and (other[0].bias >= 0).all()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(1, 4)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_has_the_formula(strict: bool) -> None:
    if OLD and strict:
        pytest.skip("torch.export in strict mode refuses hooks that ask for a frame")
    model = fused().eval()
    model(X)
    exported = torch.export.export(model, (X,), strict=strict)
    torch.testing.assert_close(exported.module()(X), model(X))
    names = set(exported.state_dict)
    assert any(name.endswith("original1") for name in names)
    assert not any("_fused" in name for name in names)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.* is deprecated:DeprecationWarning")
def test_a_trace_has_the_formula() -> None:
    model, other = fused().eval(), normed().eval()
    traced = torch.jit.trace(model, (X,))
    assert any(name.endswith("original1") for name, _ in traced.named_parameters())
    for each in (traced, other):
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if name.endswith("original0"):
                    parameter.mul_(2)
    torch.testing.assert_close(traced(X), other(X))


def test_make_fx_has_the_formula() -> None:
    model = fused()
    model(X)
    graph = make_fx(model)(X)
    assert "norm" in graph.code
    torch.testing.assert_close(graph(X), model(X))
