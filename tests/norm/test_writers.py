"""Weights that PEFT's code reads: what it writes into them takes effect."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn
from wn_surgery.norm.writers import Followed


@pytest.fixture(autouse=True)
def _peft_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if "peft" not in sys.modules:
        monkeypatch.setitem(sys.modules, "peft", ModuleType("peft"))


def layer() -> Any:
    made = nn.Linear(4, 6)
    wn.apply(made, {"types": "Linear"})
    return made


def run(module: str, line: str, **names: Any) -> Any:
    """Run a line as if it stood in a module, and return what it calls ``result``."""
    scope = {"__name__": module, "torch": torch, "nn": nn, **names}
    exec(line, scope)
    return scope.get("result")


WRITES = [
    "layer.weight.data = delta.clone()",
    "layer.weight.data += delta",
    "layer.weight.data -= delta",
    "w = layer.weight; w.data = w.data * 2 + delta",
    "layer.weight.data.add_(delta)",
    "w = layer.weight.data; w.copy_(delta)",
    "layer.weight.data[:, 1:3] = delta[:, :2]",
    "layer.weight.data.reshape(-1)[3:].mul_(-3)",
    "layer.weight.data.T[0] += 1",
    "layer.weight.data.chunk(2)[1].copy_(delta[:3])",
    "layer.weight.detach().view(-1).scatter_add_(0, torch.arange(3), torch.ones(3))",
    "torch.add(delta, 1, out=layer.weight.data)",
    "with torch.no_grad(): layer.weight.mul_(delta)",
    "with torch.no_grad(): layer.weight.copy_(delta)",
    "with torch.inference_mode(): layer.weight.data += delta",
    "with torch.inference_mode(): layer.weight.data.reshape(-1)[3:] = 5",
]


@pytest.mark.parametrize("line", WRITES)
def test_a_write_is_that_into_a_plain_layer(line: str) -> None:
    normed, plain, delta = layer(), nn.Linear(4, 6), torch.randn(6, 4)
    plain.load_state_dict({"weight": normed.weight.detach(), "bias": normed.bias.detach()})
    before = normed.weight.detach().clone()
    g = normed.parametrizations.weight.original0
    for each in (normed, plain):
        run("peft.tuners.lora.layer", line, layer=each, delta=delta)
    assert not torch.equal(before, plain.weight)
    torch.testing.assert_close(normed.weight, plain.weight)
    # The Parameters stay, so that optimizers hold them still.
    assert normed.parametrizations.weight.original0 is g
    torch.testing.assert_close(g.flatten(), plain.weight.norm(dim=1))


@pytest.mark.parametrize("line", WRITES)
def test_other_code_reads_plain_tensors(line: str) -> None:
    normed, delta = layer(), torch.randn(6, 4)
    before = normed.weight.detach().clone()
    run("loader", line, layer=normed, delta=delta)
    assert torch.equal(normed.weight, before)
    assert type(run("loader", "result = layer.weight", layer=normed)) is torch.Tensor
    assert type(run("peft.utils.x", "result = layer.weight", layer=normed)) is torch.Tensor


def test_results_that_are_not_views_are_plain() -> None:
    normed = layer()
    other = torch.zeros(6, 4)
    before = normed.weight.detach().clone()
    lines = (
        "layer.weight.data.clone()",
        "layer.weight + 1",
        "layer.weight.data.to(torch.float64)",
        "other[:].add_(layer.weight.data)",
    )
    for line in lines:
        result = run("peft.tuners.x", f"result = {line}", layer=normed, other=other)
        assert type(result) is torch.Tensor
        result.zero_()
    assert torch.equal(normed.weight, before)


def test_gradients_reach_g_and_v() -> None:
    normed = layer()
    x = torch.randn(3, 4)
    run(
        "peft.tuners.x", "nn.functional.linear(x, layer.weight).sum().backward()", x=x, layer=normed
    )
    found = [p.grad.clone() for p in normed.parametrizations.parameters()]
    normed.zero_grad()
    nn.functional.linear(x, normed.weight).sum().backward()
    for one, p in zip(found, normed.parametrizations.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_no_parameter_is_made_that_writes_into_the_layer() -> None:
    with pytest.raises(RuntimeError, match="Creating a Parameter"):
        run("peft.tuners.x", "nn.Parameter(layer.weight.data)", layer=layer())


def test_a_write_that_weight_norm_cannot_store_raises_and_changes_nothing() -> None:
    normed = layer()
    before = [p.detach().clone() for p in normed.parameters()]
    with pytest.raises(wn.ZeroNormError, match=r"Linear\.weight: the new weight has 1 slice"):
        run("peft.tuners.x", "layer.weight.data[2] = 0", layer=normed)
    with pytest.raises(ValueError, match="expected a weight of shape"):
        run("peft.tuners.x", "layer.weight.data = torch.ones(4, 6)", layer=normed)
    with wn.folded(normed), pytest.raises(wn.ModelError, match=r"inside folded\(\)"):
        run("peft.tuners.x", "layer.weight.data += 1", layer=normed)
    for one, p in zip(before, normed.parameters(), strict=True):
        assert torch.equal(one, p)


@torch.no_grad()
def test_a_fused_model_sees_the_write() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wn.apply(model, nn.Linear)
    wn.fuse(model)
    x = torch.randn(2, 4)
    model(x)
    run("peft.tuners.x", "layer.weight.data *= -2", layer=model[1])
    expected = nn.functional.linear(model[0](x), model[1].weight, model[1].bias)
    assert torch.equal(model(x), expected)


def test_a_compiled_read_is_not_followed() -> None:
    normed = layer()
    read = run("peft.tuners.x", "result = lambda x: x @ layer.weight.T", layer=normed)
    x = torch.randn(3, 4)
    compiled = torch.compile(read, backend="eager", fullgraph=True)
    assert type(compiled(x)) is torch.Tensor
    torch.testing.assert_close(compiled(x), x @ normed.weight.T)
    assert isinstance(run("peft.tuners.x", "result = layer.weight", layer=normed), Followed)
