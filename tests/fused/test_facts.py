"""What torch does that whole-model evaluation is built around; each test fails if it changes."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint


def stepped(**options: bool) -> tuple[int, bool]:
    """By how much a step raises the version of a parameter, and whether it changes it."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    before, version = parameter.detach().clone(), parameter._version
    torch.optim.AdamW([parameter], lr=0.1, **options).step()
    return parameter._version - version, not torch.equal(parameter, before)


def test_a_fused_optimizer_raises_no_version() -> None:
    assert stepped(fused=True) == (0, True)
    raised, changed = stepped(foreach=False)
    assert raised > 0 and changed


def test_writes_through_data_raise_no_version() -> None:
    parameter = nn.Parameter(torch.ones(3))
    version, address = parameter._version, parameter.data_ptr()
    parameter.data.mul_(2)
    parameter.data.copy_(torch.zeros(3))
    parameter.detach().numpy()[0] = 5
    assert parameter._version == version and parameter.data_ptr() == address
    assert parameter.tolist() == [5, 0, 0]
    parameter.data = torch.ones(3)
    assert parameter._version == version and parameter.data_ptr() != address


def test_no_hook_is_called_after_an_interrupt() -> None:
    class Interrupted(nn.Module):
        def __init__(self, error: type[BaseException]) -> None:
            super().__init__()
            self.error = error

        def forward(self) -> None:
            raise self.error

    called: list[type[BaseException]] = []

    def note(module: nn.Module, *_: Any) -> None:
        assert isinstance(module, Interrupted)
        called.append(module.error)

    for error in (RuntimeError, KeyboardInterrupt):
        module = Interrupted(error)
        module.register_forward_hook(note, always_call=True)
        with pytest.raises(error):
            module()
    assert called == [RuntimeError]


def test_a_checkpoint_counts_saved_tensors() -> None:
    """So a weight must not be saved where it is computed and not where it is reused."""
    v, g = torch.randn(3, 3, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    known: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        if not known:
            known.append(torch._weight_norm(v, g, 0))
        return x @ known[0]

    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(CheckpointError, match="number of tensors"):
        checkpoint(run, x, use_reentrant=False).sum().backward()


def nodes(output: Tensor) -> int:
    """How many operations autograd would go back through."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen and "AccumulateGrad" not in type(node).__name__:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_torch_has_no_kernel_for_a_middle_axis() -> None:
    v = torch.randn(4, 3, 2, requires_grad=True)

    def count(dim: int, *shape: int) -> int:
        return nodes(torch._weight_norm(v, torch.ones(shape, requires_grad=True), dim))

    assert count(0, 4, 1, 1) == count(2, 1, 1, 2) == 1
    assert count(1, 1, 3, 1) > 5


def test_a_function_with_many_outputs_waits_for_all_that_are_used() -> None:
    """Its backward runs once, with None for what was not used: one node serves a group."""

    class Twins(torch.autograd.Function):
        calls: ClassVar[list[list[bool]]] = []

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
            ctx.set_materialize_grads(False)
            return 2 * x, 3 * x, 4 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
            Twins.calls.append([grad is not None for grad in grads])
            return grads[0]

    x = torch.ones(1, requires_grad=True)
    first, second, _ = Twins.apply(x)
    (first.sin() + second.cos() + first).sum().backward()
    assert Twins.calls == [[True, True, False]]
