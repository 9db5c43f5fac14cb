"""An exception at any line of execution leaves the model and the optimizer as they were."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import wn_surgery as wn
from tests.fingerprints import assert_same, difference, of_model, of_optimizer
from wn_surgery.model import layouts, undo
from wn_surgery.norm import math, parametrization
from wn_surgery.surgery import execution, optimizers
from wn_surgery.surgery.plan import Plan
from wn_surgery.surgery.planning import build_migration, build_removal

FILES = {
    module.__file__ for module in (execution, layouts, math, optimizers, parametrization, undo)
}


class Injected(BaseException):
    """What no code of anybody catches."""


def _try_lines() -> range:
    """The lines of ``_carry_out`` that may fail: the body of its ``try``."""
    source, first = inspect.getsourcelines(execution._carry_out)
    (function,) = ast.parse(textwrap.dedent("".join(source))).body
    (guarded,) = (node for node in ast.walk(function) if isinstance(node, ast.Try))
    last = guarded.body[-1].end_lineno
    assert last is not None
    return range(first + guarded.body[0].lineno - 1, first + last)


class Interruption:
    """Raise at the ``number``-th line that runs inside the ``try`` of ``_carry_out``."""

    def __init__(self, number: int, error: type[BaseException]) -> None:
        self.count = 0
        self._number = number
        self._error = error
        self._inside = False
        self._lines = _LINES

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        # Rolling back runs the same files, but from the lines of the handler.
        if frame.f_code is execution._carry_out.__code__ or (
            self._inside and frame.f_code.co_filename in FILES
        ):
            return self._line
        return None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if frame.f_code is execution._carry_out.__code__ and event == "line":
            self._inside = frame.f_lineno in self._lines
        if event == "line" and self._inside:
            self.count += 1
            if self.count == self._number:
                self._inside = False
                raise self._error
        return self._line


_LINES = _try_lines()


def model_of_every_layout() -> nn.Module:
    """Plain, legacy, torch's, ours; tied, shared, frozen; a layer that lists its own weights; one
    with a load hook that torch's removal has left behind.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(4, 3),
        nn.Linear(3, 4),
        nn.Conv1d(2, 4, 2, bias=False),
        nn.LSTM(2, 3),
        nn.Linear(4, 2),
        nn.Linear(2, 2),
    )
    parametrize.remove_parametrizations(parametrizations.weight_norm(model[4]), "weight")
    model[1].weight = model[0].weight
    model.append(model[4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[2])
    parametrizations.weight_norm(model[3], "weight_hh_l0")
    parametrizations.spectral_norm(model[3], "weight_ih_l0")
    wn.apply(model, {"names": "5", "dim": None})
    model[2].weight_g.requires_grad_(False)
    return model


def trained(model: nn.Module, make: Callable[..., torch.optim.Optimizer]) -> Any:
    """An optimizer that has state, over two groups where it can have two."""
    held = list(model.parameters())
    optimizer: Any = make(
        held if make is _lbfgs else [{"params": held[::2]}, {"params": held[1::2], "lr": 0.5}]
    )

    def closure() -> torch.Tensor:
        for parameter in held:
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        return torch.ones(())

    optimizer.step(closure)
    return optimizer


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def _lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=1e-3, max_iter=2)


def _by_rules(*last: dict[str, Any]) -> Callable[[nn.Module], Plan]:
    rules: list[dict[str, Any]] = [
        {"types": ["Embedding", "Linear"], "tied": "together", "train_g": False},
        {"names": "{4,6}", "dim": 1, "eps": 1e-6},
        {"names": "3", "params": "weight_hh_l0", "dim": 1, "replace": True},
        {"action": "skip", "names": "5"},
        *last,
    ]
    return lambda model: wn.plan(model, rules, on_unmatched="ignore")


PLANS: dict[str, Callable[[nn.Module], Plan]] = {
    "apply and replace": _by_rules({"names": "{2,5}", "dim": 1, "g_init": 0.5, "replace": True}),
    "untie": _by_rules({"names": "{0,1}", "tied": "untie"}),
    "remove": build_removal,
    "parametrized": lambda model: build_migration(model, "parametrized"),
    "legacy": lambda model: build_migration(model, "legacy"),
}


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("make", [_adam, _lbfgs])
@pytest.mark.parametrize("what", PLANS)
def test_a_failure_at_any_line_leaves_all_as_it_was(
    what: str, make: Callable[..., torch.optim.Optimizer], error: type[BaseException]
) -> None:
    model = model_of_every_layout()
    optimizer = trained(model, make)
    plan = PLANS[what](model)
    assert plan.changes
    before, steps = of_model(model, identity=True), of_optimizer(optimizer)
    # Every line once; each 13th where it is the same lines again.
    stride = 1 if make is _adam and error is Injected and what != "untie" else 13
    for number in range(1, 100_000, stride):
        interruption = Interruption(number, error)
        try:
            with interruption:
                execution.execute(plan, [optimizer])
        except error:
            # Raised between the last line of a `with torch.no_grad()` and its end, which a
            # trace function can do and code cannot, the context is never left.
            torch.set_grad_enabled(True)
            assert_same(before, of_model(model, identity=True))
            assert_same(steps, of_optimizer(optimizer))
        else:
            break
    # The last run went through: it has done something, in so many lines.
    assert interruption.count < number and interruption.count > 10 * len(plan.changes)
    assert difference(before, of_model(model, identity=True))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_plan_that_cannot_be_carried_out_touches_no_optimizer() -> None:
    model = model_of_every_layout()
    optimizer = trained(model, _adam)
    before, steps = of_model(model, identity=True), of_optimizer(optimizer)
    for bad in ({"types": "Linear"}, {"types": "Linear", "dim": 7, "tied": "together"}):
        with pytest.raises(wn.WeightNormError):
            wn.apply(model, bad, optimizers=[optimizer])
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        wn.remove(model, optimizers=[optimizer, object()])
    assert_same(before, of_model(model, identity=True))
    assert_same(steps, of_optimizer(optimizer))
