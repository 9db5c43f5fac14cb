"""What computes a group of weights: values and gradients, and the autograd node around them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from wn_surgery.errors import ModelError
from wn_surgery.norm.math import Axes, gradients, like, values
from wn_surgery.norm.modes import builds_graph
from wn_surgery.norm.nodes import check_unwritten, differentiable_gradients
from wn_surgery.norm.options import NormOptions

__all__ = ["Evaluator", "Gradients", "Lasting", "Reuse", "Spec", "Stacks", "evaluate", "stale"]

_T = TypeVar("_T")

# Where copying costs as much as it saves.
_STACKED_BYTES = 32 * 2**10


class Spec(NamedTuple):
    """What one weight of a group is: its shape, which is that of v, and how it is normed."""

    shape: tuple[int, ...]
    norm: NormOptions = NormOptions()

    @property
    def axes(self) -> Axes | None:
        """The three axes that norms are taken over; ``None`` where three are not enough."""
        return Axes.of(self.shape, self.norm.dim)


class Gradients(NamedTuple):
    """Gradients with respect to each v and each g; ``None`` where the weight has none."""

    v: list[Tensor | None]
    g: list[Tensor | None]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> Gradients:
        """From those of v and g, weight by weight."""
        return cls([v for v, _ in pairs], [g for _, g in pairs])


class Evaluator:
    """Computes all weights of one group, and their gradients, outside of autograd.

    This one calls torch's operators, on any device. The weights are those of
    :func:`wn_surgery.norm.operator.weight_norm` bit for bit.
    """

    def __init__(self, specs: Sequence[Spec]) -> None:
        self.specs = specs
        self._options = [tuple(spec.norm) for spec in specs]

    def forward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], Any]:
        """The weights in ``out_dtype`` (``None``: that of v), and norms for :meth:`backward`."""
        found = [values(x, m, *o) for o, x, m in zip(self._options, v, g, strict=True)]
        weights = [w if out_dtype is None else w.to(out_dtype) for w, _ in found]
        return weights, [norms for _, norms in found]

    def backward(
        self, v: Sequence[Tensor], g: Sequence[Tensor], norms: Any, grads: Sequence[Tensor | None]
    ) -> Gradients:
        """The gradients of v and g, given those of the weights in any layout, or ``None``."""
        return Gradients.of([
            (None, None) if grad is None else gradients(grad, x, m, n, *options)
            for options, x, m, n, grad in zip(self._options, v, g, norms, grads, strict=True)
        ])  # fmt: skip


class Stacks:
    """Small weights with rows of one shape, stacked: each stack is computed as one tall weight.

    The rows of a weight do not depend on each other, so the bits are the same, and a hundred small
    weights cost a call of torch's kernel for each shape of a row. A stack is a copy, which would
    cost more than it saves for large weights: those are computed one by one.

    Attributes:
        specs: one for each stack, for the evaluator.
    """

    def __init__(self, specs: Sequence[Spec], itemsize: int) -> None:
        found: dict[Hashable, list[int]] = {}
        for i, (shape, norm) in enumerate(specs):
            # In rows, and by torch's kernel: of its sums one knows that a row is summed by itself.
            small = len(shape) > 1 and math.prod(shape) * itemsize <= _STACKED_BYTES
            rows = norm == NormOptions() and small
            found.setdefault(shape[1:] if rows else i, []).append(i)
        self.stacks = list(found.values())
        self._shares = [[specs[i].shape[0] for i in stack] for stack in self.stacks]
        self.specs = [
            Spec((sum(shares), *specs[stack[0]].shape[1:]), specs[stack[0]].norm)
            if len(stack) > 1 else specs[stack[0]]
            for stack, shares in zip(self.stacks, self._shares, strict=True)
        ]  # fmt: skip
        order = [i for stack in self.stacks for i in stack]
        self._places = sorted(range(len(order)), key=order.__getitem__)
        # Of these there are other layouts than one.
        self._laid_out = [
            i for stack in self.stacks if len(stack) > 1 for i in stack if len(specs[i].shape) > 3
        ]

    def stack(self, members: Sequence[Tensor]) -> list[Tensor]:
        """A tensor for each stack, from one for each member."""
        return [
            torch.cat([members[i] for i in stack]) if len(stack) > 1 else members[stack[0]]
            for stack in self.stacks
        ]

    def member(self, place: int, row: int) -> int:
        """Which member has this row of a stack."""
        ends = itertools.accumulate(self._shares[place])
        return next(i for i, end in zip(self.stacks[place], ends, strict=True) if row < end)

    def unstack(self, stacked: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
        """A tensor for each member, in the layout of its v, from one for each stack.

        Outside of autograd.
        """
        parts: list[Tensor] = []
        # Below autograd, a part of a tensor is not a view of it: each weight has a version of its
        # own, and may be written to as any other output of a node.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            for tensor, shares in zip(stacked, self._shares, strict=True):
                if len(shares) == 1:
                    parts.append(tensor)
                else:
                    parts += torch.split(tensor, shares)
            found = [parts[place] for place in self._places]
            for i in self._laid_out:
                if found[i].is_contiguous() != v[i].is_contiguous():
                    found[i] = like(found[i].contiguous(), v[i])
        return found

    def stack_gradients(
        self, grads: Sequence[Tensor | None], v: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """As :meth:`stack`; zero for a member without a gradient, ``None`` for a stack of them."""
        found: list[Tensor | None] = []
        for stack in self.stacks:
            mine = [grads[i] for i in stack]
            if len(stack) == 1 or all(grad is None for grad in mine):
                found.append(mine[0])
            else:
                filled = (
                    torch.zeros_like(v[i]) if grad is None else grad
                    for i, grad in zip(stack, mine, strict=True)
                )
                found.append(torch.cat(list(filled)))
        return found


@dataclass(slots=True)
class Reuse:
    """Whether weights were read in another ``call`` than the first that read them."""

    call: int | None = None
    happened: bool = False


class Lasting(NamedTuple):
    """The names of weights that last until the next optimizer step, and their reuse till then."""

    names: Sequence[str]
    reuse: Reuse


# The autograd node ----------------------------------------------------------------------------


def evaluate(
    evaluator: Evaluator,
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    out: torch.dtype | None = None,
    stacks: Stacks | None = None,
    lasting: Lasting | None = None,
) -> Sequence[Tensor]:
    """The weights of a group, from one node if any of them needs a gradient; in dtype ``out``.

    ``evaluator`` is that of the ``stacks``, where there are any. ``lasting`` is for weights that
    outlive a forward: a backward after their reuse checks that g and v still give them.
    """
    if builds_graph():
        needed = tuple(x.requires_grad or m.requires_grad for x, m in zip(v, g, strict=True))
        if any(needed):
            x, m = (v, g) if stacks is None else (stacks.stack(v), stacks.stack(g))
            return _group(evaluator, stacks, (v, g), needed, out, lasting, *x, *m)
    # Not inference tensors: those have no version, by which a write into them is seen.
    with torch.inference_mode(False), torch.no_grad():
        if stacks is None:
            return evaluator.forward(v, g, out)[0]
        return stacks.unstack(evaluator.forward(stacks.stack(v), stacks.stack(g), out)[0], v)


class _Group(torch.autograd.Function):
    """One node for a group.

    It saves no tensor in autograd's sense: activation checkpointing counts saved tensors, and must
    find as many whether a weight was computed or reused. So the first backward frees nothing, and
    two losses that share the weights may each have theirs. It refers to g and v, which the model
    holds anyway, and to the norms; not to the weights, so there is no cycle.
    """

    @staticmethod
    def forward(
        ctx: Any,
        evaluator: Evaluator,
        stacks: Stacks | None,
        members: tuple[Sequence[Tensor], Sequence[Tensor]],
        needed: tuple[bool, ...],
        out_dtype: torch.dtype | None,
        lasting: Lasting | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        v, g = _halves(tensors)
        weights, norms = evaluator.forward(v, g, out_dtype)
        # Aliases without a node, by which there would be a cycle.
        ctx.kept = None if lasting is None else (lasting, out_dtype, [w.detach() for w in weights])
        if stacks is not None:
            weights = stacks.unstack(weights, members[0])
        ctx.set_materialize_grads(False)
        if not all(needed):
            frozen = (w for w, wanted in zip(weights, needed, strict=True) if not wanted)
            ctx.mark_non_differentiable(*frozen)
        ctx.evaluator, ctx.stacks, ctx.members, ctx.norms = evaluator, stacks, members, norms
        ctx.versions = [t._version for tensors in members for t in tensors]
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        v, g = ctx.members
        # A backward may reach a part of the group only. It does not concern the rest.
        if [t._version for tensors in ctx.members for t in tensors] != ctx.versions:
            for x, m, *before, grad in zip(v, g, *_halves(ctx.versions), grads, strict=True):
                if grad is not None:
                    check_unwritten(x, m, tuple(before))
        whole: Sequence[Tensor | None] = grads
        if (stacks := ctx.stacks) is not None:
            whole = stacks.stack_gradients(grads, v)
            edges = ctx.next_functions
            for place, stack in enumerate(stacks.stacks):
                reached = [grads[i] is not None for i in stack]
                if any(reached) and not all(reached):
                    _reach_only(edges[place][0], reached)
                    _reach_only(edges[place + len(stacks.stacks)][0], reached)
            # Again, so that the stacks of the forward need not be kept for so long.
            v, g = stacks.stack(v), stacks.stack(g)
        if ctx.kept is not None and ctx.kept[0].reuse.happened:
            _check_kept(ctx, v, g, whole)
        if torch.is_grad_enabled():  # with create_graph
            every = zip(ctx.evaluator.specs, v, g, whole, strict=True)
            found = Gradients.of([
                (None, None) if grad is None else differentiable_gradients(grad, x, m, *spec.norm)
                for spec, x, m, grad in every
            ])  # fmt: skip
        else:
            found = ctx.evaluator.backward(v, g, ctx.norms, whole)
        wanted = ctx.needs_input_grad[6:]
        both = zip((*found.v, *found.g), wanted, strict=True)
        return (*[None] * 6, *(grad if want else None for grad, want in both))


# Past Function.apply, as in norm/nodes.py; torch leaves it untyped.
_past: Any = super(torch.autograd.Function, _Group)
_group: Callable[..., tuple[Tensor, ...]] = _past.apply


def _check_kept(
    ctx: Any, v: Sequence[Tensor], g: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> None:
    """Raise where g and v, or their stacks, no longer give a weight that has a gradient.

    Exactly: torch does not count what is written through ``.data``, numpy or the storage.
    """
    (names, _), out_dtype, kept = ctx.kept
    with torch.no_grad():
        now = ctx.evaluator.forward(v, g, out_dtype)[0]
        for place, (weight, before, grad) in enumerate(zip(now, kept, grads, strict=True)):
            if grad is None or torch.equal(weight, before):
                continue
            # The NaNs of a diverged model are as they were.
            differs = (weight != before) & ~(weight.isnan() & before.isnan())
            if len(found := differs.nonzero()):
                row = int(found[0][0]) if weight.ndim else 0
                raise stale(names[place if ctx.stacks is None else ctx.stacks.member(place, row)])


def stale(name: str) -> ModelError:
    """The error of a lasting weight that its g and v no longer give."""
    why = (
        f"{name}: its g, v or weight was written to through .data, numpy or its storage after its "
        "weight had been computed for this step, and nothing counts such a write, so that the "
        "forward read the old weight; no gradient of it was given. Write to the Parameter under "
        "torch.no_grad(), write before the first forward after a step, or call wn_surgery.fuse() "
        "without optimizers"
    )
    return ModelError(why, kind="fusion", site=name)


def _reach_only(node: Any, reached: Sequence[bool]) -> None:
    """In this backward, let the node of a ``torch.cat`` give a gradient to some inputs only.

    By itself it would give zeros to the others: a step of an optimizer would then decay a weight
    that took no part.
    """
    if node is None:  # nothing in the stack needs a gradient
        return
    task = torch._C._current_graph_task_id()

    def after(grad_inputs: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
        if torch._C._current_graph_task_id() != task:  # another backward through the same graph
            return None
        handle.remove()
        return tuple(x if got else None for x, got in zip(grad_inputs, reached, strict=True))

    handle = node.register_hook(after)


def _halves(both: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T]]:
    count = len(both) // 2
    return both[:count], both[count:]
