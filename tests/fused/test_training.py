"""A fused model in loops of every kind gives the losses and gradients it gave before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wn_surgery as wn
from tests.fused.models import RULES, Net, X, assert_same, fused, gradients, nodes, normed

pytestmark = pytest.mark.usefixtures("both_paths")


def test_gradient_accumulation() -> None:
    def step(model: nn.Module) -> Tensor:
        first = model(X).square().mean()
        first.backward()
        second = model(-X).sin().mean()
        second.backward()
        return first + second

    assert_same(step)


@pytest.mark.parametrize("backwards", [1, 2])
def test_two_forwards_and_one_or_two_backwards(backwards: int) -> None:
    def step(model: nn.Module) -> Tensor:
        first, second = model(X).square().mean(), model(-X).sin().mean()
        if backwards == 1:
            (first + second).backward()
        else:
            first.backward()
            second.backward()
        return first + second

    assert_same(step)
    assert_same(step, "not reentrant")


def test_two_losses_of_one_forward() -> None:
    def step(model: nn.Module) -> Tensor:
        out = model(X)
        out[0].sum().backward(retain_graph=True)
        out[1].sum().backward()
        return out.sum()

    assert_same(step)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_activation_checkpointing(kind: str) -> None:
    x = X.clone().requires_grad_()  # the reentrant kind needs an input with a gradient

    def step(model: nn.Module) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    assert_same(step, kind)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpointing_a_part_on_its_own_after_a_step(kind: str) -> None:
    """Its backward must not see the weights that the model's own last forward kept."""
    h = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def step(model: nn.Module) -> Tensor:
        model(X).square().mean().backward()
        for parameter in model.parameters():
            parameter.data.add_(0.1)  # unseen by any version
        out = checkpoint(model.middle, h, use_reentrant=kind == "reentrant")
        loss = out.square().mean()
        loss.backward()
        return loss.detach()

    assert_same(step, "not reentrant")


def test_reading_a_weight_between_forward_and_backward_of_a_checkpoint() -> None:
    def step(model: nn.Module) -> Tensor:
        loss = model(X).square().mean()
        assert model.middle[0].weight.norm() > 0  # type: ignore[index,union-attr]
        loss.backward()
        return loss

    assert_same(step, "not reentrant")


def test_evaluation_between_steps() -> None:
    def step(model: nn.Module) -> Tensor:
        loss = model(X).square().mean()
        model.eval()
        with torch.no_grad():
            before = model(X)
        with torch.inference_mode():
            assert torch.equal(model(X), before)
        model.train()
        loss.backward()
        return loss + before.sum()

    assert_same(step)


def test_writes_through_data_between_forwards() -> None:
    model = fused().eval()
    with torch.no_grad():
        first = model(X)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        second = model(X)
    other = normed()
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    assert not torch.equal(first, second) and torch.equal(second, other(X))


def test_an_in_place_edit_inside_a_forward_is_seen() -> None:
    class Editing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            with torch.no_grad():
                self.fc.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr,operator]
            return h, self.fc(x)  # type: ignore[return-value]

    model = Editing()
    wn.apply(model, {"types": "Linear"})
    wn.fuse(model)
    with torch.no_grad():
        first, second = model(torch.ones(1, 3))
        bias = model.fc.bias
        torch.testing.assert_close(2 * (first - bias), second - bias)


def test_exceptions_inside_forward() -> None:
    model = fused()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 8))
    with torch.no_grad():
        model.front.parametrizations.weight.original0.data.mul_(2)  # type: ignore[union-attr]
    other = normed()
    with torch.no_grad():
        other.front.parametrizations.weight.original0.data.mul_(2)  # type: ignore[union-attr]
    assert torch.equal(model.front.weight, other.front.weight)  # outside: nothing is kept
    assert torch.equal(model(X), other(X))


def test_an_interrupt_inside_forward() -> None:
    """torch calls no hook then, so the scope never hears of the forward's end."""
    model, other = fused(), normed()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.up.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    for each in (model, other):
        each.front.parametrizations.weight.original0.data.mul_(2)  # type: ignore[union-attr]
    assert torch.equal(model(X), other(X)) and len(nodes(model)) == 1


def test_a_root_that_calls_itself() -> None:
    class Twice(Net):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            h = super().forward(x)
            return h + self(x, again=False) if again else h

    model = Twice()
    wn.apply(model, RULES)
    wanted = model(X)
    wn.fuse(model)
    assert torch.equal(model(X), wanted) and torch.equal(model(X), wanted)


def test_a_part_called_on_its_own() -> None:
    h = torch.randn(2, 6, 8)
    model, other = fused(), normed()
    model(X)
    for each in (model, other):
        for parameter in each.parameters():
            parameter.data.mul_(1.5)
        each.middle(h).sum().backward()
    assert torch.equal(model.middle(h), other.middle(h))
    torch.testing.assert_close(gradients(model), gradients(other))
