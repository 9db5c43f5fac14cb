"""What is done to a fused model: surgery, casts, contexts, copies of its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.fused.models import X, assert_same, fused, gradients, nodes, normed

pytestmark = pytest.mark.usefixtures("both_paths")


def test_members_that_change_while_fused() -> None:
    model, other = fused(), normed()
    for each in (model, other):
        each(X)
        each.front.parametrizations.weight.original1.requires_grad_(False)  # type: ignore[union-attr,operator]
        wn.remove(each.middle)
        each.head = nn.Linear(16, 3)
        torch.manual_seed(7)
        each.head.reset_parameters()
        each.double()
    x = X.double()
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    for each in (model, other):
        each(x).sum().backward()
    torch.testing.assert_close(gradients(model), gradients(other))


def test_a_cast_model_is_fused_again_at_the_next_forward(both_paths: str) -> None:
    model = fused().double()
    model(X.double())
    fusion = next(iter(model._forward_pre_hooks.values())).fusion
    found: set[Any] = set()
    model.head.register_forward_pre_hook(lambda m, _: found.add(m.weight.grad_fn))
    model.front.register_forward_pre_hook(lambda m, _: found.add(m.weight.grad_fn))
    model(X.double())
    assert len(found) == 1 and {m.path for m in fusion.members} == {both_paths}


def test_removal_takes_the_hooks_away_with_the_last_member() -> None:
    model = fused()
    before = model(X)
    wn.remove(model.middle)
    assert model._forward_pre_hooks
    wn.remove(model)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert torch.equal(model(X), before)


def test_a_second_parametrization_on_top() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    model, other = fused(), normed()
    for each in (model, other):
        each(X)
        torch.nn.utils.parametrize.register_parametrization(each.front, "weight", Double())
    assert torch.equal(model(X), other(X)) and torch.equal(model(X), other(X))


def test_options_that_are_edited() -> None:
    model, other = fused(), normed()
    for each in (model, other):
        each(X)
        each.front.parametrizations.weight[0].eps = 100.0  # type: ignore[union-attr,index]
    assert torch.equal(model(X), other(X)) and not torch.equal(model(X), normed()(X))


def test_folded_and_writable_inside_a_fused_model() -> None:
    model, other = fused(), normed()
    with torch.no_grad(), wn.folded(model):
        assert torch.equal(model(X), other(X))
    for each in (model, other):
        with wn.writable(each):
            nn.init.constant_(each.front.weight, 0.25)
    assert torch.equal(model(X), other(X)) and len(nodes(model)) == 1


def test_functional_calls_with_other_parameters() -> None:
    model, other = fused(), normed()
    params = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, params, (X,))
    wanted = torch.func.functional_call(other, params, (X,))
    assert torch.equal(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), list(params.values())),
        torch.autograd.grad(wanted.sum(), list(params.values())),
    )
    assert torch.equal(model(X), other(X))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_and_forward_mode() -> None:
    model, other = fused(), normed()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], net: nn.Module) -> Tensor:
        return torch.func.functional_call(net, p, (X,)).square().mean()

    for transform in (torch.func.grad, torch.func.jacfwd):
        found, wanted = transform(loss)(params, model), transform(loss)(params, other)
        torch.testing.assert_close(found, wanted)


def test_second_order_through_the_model() -> None:
    def penalty(model: nn.Module) -> Tensor:
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        loss = slope.square().sum()
        loss.backward()
        return loss.detach()

    assert_same(penalty)


def test_recurrent_layers() -> None:
    def make(fuse: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"rnn": nn.LSTM(3, 4, num_layers=2), "fc": nn.Linear(4, 2)})
        model.forward = lambda x: model.fc(model.rnn(x)[0])  # type: ignore[method-assign,operator]
        wn.apply(model, {"types": ["LSTM", "Linear"], "params": "weight*"})
        if fuse:
            wn.fuse(model)
        return model

    x = torch.randn(5, 2, 3)
    for _ in range(2):
        model, other = make(True), make(False)
        assert torch.equal(model(x), other(x))
        for each in (model, other):
            each(x).sum().backward()
        torch.testing.assert_close(gradients(model), gradients(other))
