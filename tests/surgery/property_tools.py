"""What the property tests share: their settings, and surgery as they ask for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import wn_surgery as wn
from tests.fingerprints import assert_same, of_model
from tests.surgery.strategies import Case, Tree
from wn_surgery.model import layouts
from wn_surgery.model.sites import sites_of, walk
from wn_surgery.model.undo import UndoLog
from wn_surgery.surgery import execution
from wn_surgery.surgery.optimizers import OptimizerEdit
from wn_surgery.surgery.plan import Plan

CASES = int(os.environ.get("WN_SURGERY_CASES", "1000"))


def share(percent: int) -> settings:
    """Settings for a property that gets ``percent`` of all cases."""
    return settings(
        max_examples=max(1, CASES * percent // 100),
        # The ordinary run is the same each time; the long one looks for something new.
        derandomize="WN_SURGERY_CASES" not in os.environ,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def planned(model: nn.Module, case: Case) -> Plan:
    return wn.plan(model, case.rules, on_unmatched="ignore", check=False)


def apply(model: nn.Module, case: Case, **options: Any) -> wn.Report:
    return wn.apply(model, case.rules, on_unmatched="ignore", **options)


def applied(case: Case, model: nn.Module) -> wn.Report | None:
    """Apply the rules; None if they cannot be, and then nothing may have changed."""
    problems = planned(model, case).problems
    if not problems:
        return apply(model, case)
    before = of_model(model, identity=True)
    with pytest.raises(wn.WeightNormError) as caught:
        apply(model, case)
    assert type(caught.value) is type(problems[0])
    assert_same(before, of_model(model, identity=True))
    return None


def ties_of_one_parameter(tree: Tree) -> Tree:
    """The tree with every tie by memory made a tie of one Parameter."""
    return replace(tree, ties=tuple((first, second, True) for first, second, _ in tree.ties))


def removed(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> bool:
    """Remove all weight norm; False if it is refused, as it must be under something else."""
    before = of_model(model, identity=True)
    if stacked(model):
        with pytest.raises(wn.StackedParametrizationError):
            wn.remove(model, optimizers=optimizers)
        assert_same(before, of_model(model, identity=True))
        return False
    wn.remove(model, optimizers=optimizers)
    return True


def stacked(model: nn.Module) -> bool:
    """Whether something else is put on top of a weight norm, which removing refuses."""
    sites = [site for node in walk(model) for site in sites_of(node)]
    return any("WeightNorm + " in site.held.maker for site in sites if site.held is not None)


def other(model: nn.Module) -> bool:
    """Whether something that is not weight norm computes a weight."""
    return any(site.layout == "other" for node in walk(model) for site in sites_of(node))


class Injected(BaseException):
    """What no code of anybody catches."""


@contextmanager
def failing_at(number: int) -> Iterator[None]:
    """Raise before or after a call inside execution: at the ``number``-th such moment."""
    moments = 0

    def tick() -> None:
        nonlocal moments
        moments += 1
        if moments == number:
            raise Injected

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = function(*args, **kwargs)
            tick()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in _STEPS.items():
            for name in names:
                patch.setattr(owner, name, around(getattr(owner, name)))
        yield


_STEPS: dict[Any, tuple[str, ...]] = {
    layouts: ("clear", "put_plain", "put_parametrized", "put_legacy", "refresh", "hand_over"),
    execution: ("_values", "magnitude"),
    OptimizerEdit: ("replace",),
    UndoLog: ("record",),
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with state over two groups."""
    held = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    groups = [{"params": held[::2], "lr": 0.25}, {"params": held[1::2], "lr": 0.5}]
    optimizer = torch.optim.Adam(groups)
    values = [p.detach().clone() for p in held]
    for parameter in held:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(held, values, strict=True):
            parameter.copy_(value)  # a step may make a norm zero
    return optimizer
