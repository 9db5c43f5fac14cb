"""Small weights with rows of one shape are computed as one; none of them can tell."""

from __future__ import annotations

import copy
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wn_surgery as wn
from tests.fused.models import spec_of
from tests.fused.test_cpu import pairs
from wn_surgery.fused.evaluator import Evaluator, Spec, Stacks, evaluate
from wn_surgery.norm.operator import weight_norm

# Two stacks: 0, 2 and 5; 1 and 4. The others are by themselves.
SPECS = [
    spec_of((4, 3, 2), 0),
    spec_of((5, 7), 0),
    spec_of((2, 3, 2), 0),
    spec_of((4, 3, 2), 1),
    spec_of((2, 7), 0),
    spec_of((1, 3, 2), 0),
    spec_of((4, 3, 2), 0, eps=0.1),
    spec_of((4,), 0),
    spec_of((200, 300), 0),
    spec_of((201, 300), 0),
]


def stacked(
    v: list[Tensor], g: list[Tensor], specs: list[Spec] = SPECS, out: torch.dtype | None = None
) -> list[Tensor]:
    stacks = Stacks(specs, v[0].itemsize)
    return list(evaluate(Evaluator(stacks.specs), v, g, out, stacks))


def alone(v: list[Tensor], g: list[Tensor], specs: list[Spec] = SPECS) -> list[Tensor]:
    return [weight_norm(x, m, *spec.norm) for spec, x, m in zip(specs, v, g, strict=True)]


class Kernels(TorchDispatchMode):
    """Counts the calls of torch's kernels for weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"forward": 0, "backward": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_weight_norm_interface" in str(func):
            self.calls["backward" if "backward" in str(func) else "forward"] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_stacked() -> None:
    stacks = Stacks(SPECS, 4)
    assert stacks.stacks == [[0, 2, 5], [1, 4], [3], [6], [7], [8], [9]]
    assert [spec.shape for spec in stacks.specs[:2]] == [(7, 3, 2), (7, 7)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_the_same(dtype: torch.dtype) -> None:
    v, g = pairs(SPECS, dtype)
    results = []
    for weights in (alone(v, g), stacked(v, g)):
        grads = torch.autograd.grad([w.sin().sum() for w in weights], [*v, *g])
        results.append([*weights, *grads])
    with torch.no_grad():
        assert all(map(torch.equal, stacked(v, g), results[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_a_stack_is_one_call_of_the_kernel() -> None:
    model = nn.Sequential(*(nn.Conv1d(8, 8, 3, padding=1) for _ in range(10)))
    wn.apply(model, nn.Conv1d)
    wn.fuse(model)
    with Kernels() as kernels:
        model(torch.ones(1, 8, 5)).sum().backward()
    assert kernels.calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_member_that_a_backward_does_not_reach_gets_none(create_graph: bool) -> None:
    v, g = pairs(SPECS)
    weights = stacked(v, g)
    # Twice through one graph, and each time to other members.
    for reached in ([0, 5, 4], [2], [0, 2, 5], [1]):
        chosen = [weights[i].square().sum() for i in reached]
        found = torch.autograd.grad(
            chosen, [*v, *g], allow_unused=True, create_graph=create_graph, retain_graph=True
        )
        wanted = torch.autograd.grad(
            [alone(v, g)[i].square().sum() for i in reached], [*v, *g], allow_unused=True
        )
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) is (other is None)
            if one is not None and other is not None:
                # With create_graph by the formula, and otherwise by torch's kernel.
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 if create_graph else 0)
    for tensor in (*v, *g):
        assert tensor.grad is None


def test_a_stack_of_which_only_g_needs_a_gradient() -> None:
    v, g = pairs(SPECS)
    v = [tensor.detach() for tensor in v]
    found = torch.autograd.grad(stacked(v, g)[0].sum(), g, allow_unused=True)
    assert [grad is not None for grad in found] == [i == 0 for i in range(len(SPECS))]
    wanted = torch.autograd.grad(alone(v, g)[0].sum(), g[0])
    torch.testing.assert_close(found[:1], wanted)


def test_a_backward_that_was_cut_off_does_not_reach_into_the_next() -> None:
    v, g = pairs(SPECS)
    weights = stacked(v, g)

    def fail(grad: Tensor) -> None:
        raise ArithmeticError

    # After the node of the weights, and before the one that the hook waits at.
    handle = g[0].register_hook(fail)
    with pytest.raises(ArithmeticError):
        torch.autograd.backward(weights[0].sum(), retain_graph=True, inputs=[*v, *g])
    handle.remove()
    for tensor in (*v, *g):
        tensor.grad = None
    found = torch.autograd.grad(weights[2].square().sum(), [*v, *g], allow_unused=True)
    wanted = torch.autograd.grad(alone(v, g)[2].square().sum(), [v[2], g[2]])
    assert [grad is not None for grad in found] == [i == 2 for i in range(len(SPECS))] * 2
    torch.testing.assert_close((found[2], found[2 + len(SPECS)]), wanted)


def test_an_optimizer_leaves_a_skipped_layer_alone() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for i in (0, 2):
                x = self.layers[i](x)
            return x

    model = Skips()
    wn.apply(model, nn.Linear)
    wn.fuse(model)
    before = copy.deepcopy(model.layers[1].state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    after = model.layers[1].state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_second_order() -> None:
    small = SPECS[:7]
    v, g = ([t.detach().double().requires_grad_() for t in ts] for ts in pairs(small))

    def through(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(stacked(list(tensors[:7]), list(tensors[7:]), small))

    assert torch.autograd.gradcheck(through, (*v, *g))
    assert torch.autograd.gradgradcheck(through, (*v, *g))


def test_batched_gradients() -> None:
    v, g = pairs(SPECS[:3])
    weights = stacked(v, g, SPECS[:3])
    grads = [torch.eye(w.numel()).view(-1, *w.shape)[:4] for w in weights]
    found = torch.autograd.grad(weights, [*v, *g], grads, is_grads_batched=True)
    wanted = torch.autograd.grad(alone(v, g, SPECS[:3]), [*v, *g], grads, is_grads_batched=True)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("frozen", ["v", "g", "both"])
def test_frozen_members_of_a_stack(frozen: str) -> None:
    v, g = pairs(SPECS)
    for tensor in {"v": v[:1], "g": g[:1], "both": [v[0], g[0]]}[frozen]:
        tensor.requires_grad_(False)
    weights = stacked(v, g)
    assert weights[0].requires_grad is (frozen != "both")
    sum(w.sin().sum() for w in weights).backward()  # type: ignore[union-attr]
    for tensor in (*v, *g):
        assert (tensor.grad is not None) is tensor.requires_grad


def test_each_weight_has_a_version_of_its_own() -> None:
    v, g = pairs(SPECS)
    weights = stacked(v, g)
    kept = weights[2] * weights[2]  # saved for backward
    with torch.no_grad():
        weights[0].mul_(2)
    assert not any(w._is_view() for w in weights) and weights[2]._version == 0
    kept.sum().backward()


def test_layouts_in_a_stack() -> None:
    specs = [spec_of((4, 3, 2, 2), 0)] * 3
    v, g = pairs(specs)
    for kinds in ("lll", "lcl", "ccl"):
        formats = [torch.channels_last if k == "l" else torch.contiguous_format for k in kinds]
        xs = [x.detach().to(memory_format=f) for x, f in zip(v, formats, strict=True)]
        weights = stacked(xs, g, specs)
        for w, x, wanted in zip(weights, xs, alone(xs, g, specs), strict=True):
            assert torch.equal(w, wanted) and w.stride() == x.stride()


def test_a_stack_is_dropped_with_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ReferenceType[Tensor]] = []
    cat = torch.cat

    def watched(tensors: Any) -> Tensor:
        result = cat(tensors)
        made.append(ref(result))
        return result

    monkeypatch.setattr(torch, "cat", watched)
    v, g = pairs(SPECS[:3])
    weights = stacked(v, g, SPECS[:3])
    assert len(made) == 2 and not any(each() is not None for each in made)
    weights[0].sum().backward()
    assert len(made) == 5 and not any(each() is not None for each in made)
