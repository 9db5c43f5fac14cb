"""Clipping by direction: what is clipped depends on the function, not on ‖v‖."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.makers import shaken


class Net(nn.Module):
    """With weight norm along several axes, a plain layer, and a frozen one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(3, 4, 3)
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 6)
        self.plain = nn.Linear(6, 2)
        self.frozen = nn.Linear(2, 2)
        rules: list[dict[str, Any]] = [
            {"names": "conv", "dim": "out"},
            {"names": "a"},
            {"names": "b", "dim": None},
            {"names": "frozen"},
        ]
        wn.apply(self, [{**rule, **options} for rule in rules])
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.tanh(self.a(self.conv(x).transpose(1, 2))))
        out: Tensor = self.frozen(self.plain(y))
        return out


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def backward(model: nn.Module) -> None:
    torch.manual_seed(1)
    model(torch.randn(8, 3, 5)).square().mean().mul(30).backward()


def lengthened(model: nn.Module) -> nn.Module:
    """The same function with other ‖v‖ in each site."""
    longer = copy.deepcopy(model)
    for site, factor in zip(wn.sites(longer), (0.01, 7.0, 300.0, 2.0), strict=False):
        if site.normed:
            site.held.v.data *= factor  # type: ignore[union-attr]
    return longer


def test_with_directions_of_norm_1_it_is_what_torch_does() -> None:
    model = Net()
    wn.renormalize(model, 1.0)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        backward(each)
    norm = wn.clip_gradients(model, 0.5)
    expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    assert expected > 0.5
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_length_of_v_decides_nothing() -> None:
    model = Net()
    shaken(model, 0.5)
    other = lengthened(model)
    for each in (model, other):
        backward(each)
    theirs = [nn.utils.get_total_norm(gradients(each)) for each in (model, other)]
    assert abs(theirs[0] / theirs[1] - 1) > 0.5  # torch's norm depends on ‖v‖
    before = gradients(other)
    norms = [wn.clip_gradients(each, 0.5) for each in (model, other)]
    torch.testing.assert_close(norms[0], norms[1])
    for now, then in zip(gradients(other), before, strict=True):  # by one number
        torch.testing.assert_close(now, then * (0.5 / norms[1]))


def test_it_is_the_gradient_of_the_direction() -> None:
    """‖v‖ · ∇v is what autograd gives for v/‖v‖ held as a parameter of norm 1."""
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    model = nn.Sequential(layer)
    wn.apply(model, {"names": "*", "train_g": False})
    shaken(model, 0.5)
    x = torch.randn(7, 5, dtype=torch.float64)
    model(x).pow(3).sum().backward()
    held: Any = layer.parametrizations.weight
    g, v = held.original0.detach(), held.original1.detach()
    u = (v / v.norm(dim=1, keepdim=True)).requires_grad_()
    (x @ (g * u / u.norm(dim=1, keepdim=True)).T).pow(3).sum().backward()
    assert u.grad is not None
    torch.testing.assert_close(wn.clip_gradients(model, math.inf), u.grad.norm())


def test_below_the_limit_no_bit_changes() -> None:
    model = Net()
    backward(model)
    before = gradients(model)
    norm = wn.clip_gradients(model, 1e6)
    assert 0 < norm < 1e6
    assert all(map(torch.equal, gradients(model), before))


def test_eps_stands_for_a_shorter_v() -> None:
    """Below eps the weight is g · v / eps, in which the direction moves by ∇v · eps."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    wn.apply(model, {"names": "*", "train_g": False, "eps": 100.0, "g_init": 1.0})
    model(torch.randn(5, 4)).square().sum().backward()
    (v,) = (site.held.v for site in wn.sites(model))  # type: ignore[union-attr]
    torch.testing.assert_close(wn.clip_gradients(model, math.inf), 100.0 * v.grad.norm())  # type: ignore[union-attr]


@pytest.mark.parametrize("prepare", [lambda m: wn.migrate(m, to="legacy"), wn.fuse])
def test_other_layouts(prepare: Any) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    prepare(model)
    for each in (model, twin):
        backward(each)
    torch.testing.assert_close(wn.clip_gradients(model, 0.5), wn.clip_gradients(twin, 0.5))


def test_half_precision_beside_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).to(torch.bfloat16)
    wn.apply(model, {"types": "Linear", "norm_dtype": "float32"})
    model.append(nn.Linear(3, 1))
    model[2].weight.grad = torch.ones_like(model[2].weight)
    for part in model[:2].parameters():
        part.grad = torch.ones_like(part)
    total = wn.clip_gradients(model, 1.0)
    assert total > 1
    assert wn.clip_gradients(model, math.inf) == pytest.approx(1.0, rel=1e-2)


def test_tied_directions_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    wn.apply(model, {"types": "Linear", "tied": "together"})
    wn.renormalize(model, 1.0)
    model(torch.randn(3, 4)).square().sum().backward()
    expected = nn.utils.get_total_norm(gradients(model))
    torch.testing.assert_close(wn.clip_gradients(model, math.inf), expected)


def test_only_what_an_optimizer_holds() -> None:
    model = Net()
    backward(model)
    optimizer = torch.optim.SGD(model.a.parameters(), lr=0.1)
    before = gradients(model.conv)
    norm = wn.clip_gradients(model, 1e-3, optimizers=optimizer)
    assert norm > 1e-3
    torch.testing.assert_close(
        wn.clip_gradients(model, math.inf, optimizers=optimizer), torch.tensor(1e-3)
    )
    assert all(map(torch.equal, gradients(model.conv), before))


def test_a_hook_of_the_optimizer_clips_before_each_step() -> None:
    """As docs/recipes.md says it for loops that you do not write yourself."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def clip(*_: Any) -> None:
        wn.clip_gradients(model, 1e-3)

    optimizer.register_step_pre_hook(clip)
    backward(model)
    before = [p.detach().clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    moved = [p for p in model.parameters() if p.grad is not None]
    for now, then, slope in zip(moved, before, gradients(model), strict=True):
        torch.testing.assert_close(now.detach(), then - slope)
    torch.testing.assert_close(
        wn.clip_gradients(model, math.inf), torch.tensor(1e-3), rtol=0.05, atol=0
    )


def test_without_gradients() -> None:
    assert wn.clip_gradients(Net(), 1.0) == 0


def test_gradients_that_are_not_finite() -> None:
    model = Net()
    backward(model)
    grad = model.a.parametrizations.weight.original1.grad  # type: ignore[union-attr]
    grad[0, 0] = math.nan  # type: ignore[index,operator]
    before = gradients(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        wn.clip_gradients(model, 1.0, error_if_nonfinite=True)
    for now, then in zip(gradients(model), before, strict=True):
        torch.testing.assert_close(now, then, equal_nan=True, rtol=0, atol=0)
    assert wn.clip_gradients(model, math.inf).isnan()


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan, "1", None])
def test_what_is_not_a_limit(max_norm: Any) -> None:
    with pytest.raises(ValueError, match=r"max_norm=.*expected a number above 0"):
        wn.clip_gradients(Net(), max_norm)


def test_without_weight_norm() -> None:
    with pytest.raises(wn.ModelError, match=r"Linear has no weight norm.*clip_grad_norm_"):
        wn.clip_gradients(nn.Linear(2, 2), 1.0)


def test_sharded_directions_are_refused() -> None:
    model = Net()
    backward(model)
    before = gradients(model)
    model.a.parametrizations.weight.original1.ds_id = 1  # type: ignore[union-attr,assignment]
    with pytest.raises(wn.ModelError, match=r"a\.weight is sharded") as caught:
        wn.clip_gradients(model, 1.0)
    assert caught.value.kind == "wrapped"
    assert all(map(torch.equal, gradients(model), before))
