"""A long training with operations at random moments: no bit changes, and nothing is left behind.

``WN_SURGERY_SOAK=300000`` asks for more steps (``make soak``).
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from collections.abc import Callable, Generator

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.makers import legacy, llama, parametrized
from wn_surgery.fused import shared
from wn_surgery.huggingface import patch_model, unpatch_model

from .soak import RULES, Net, Run, soak

STEPS = int(os.environ.get("WN_SURGERY_SOAK", "2000"))
RULE_LIST = list(RULES.values())

# torch's own advice, at each to_legacy.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


@pytest.fixture(autouse=True)
def _one_thread() -> Generator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_long_training_is_as_if_left_alone_and_leaves_nothing_behind() -> None:
    _, settled, *_, last = soak(STEPS)
    assert not last.beyond(settled), (settled, last)


def test_a_wrong_bit_is_noticed() -> None:
    def nudge(run: Run, x: Tensor) -> None:
        with torch.no_grad():
            run.net.conv.bias.mul_(1 + 2e-7)  # type: ignore[union-attr]

    with pytest.raises(AssertionError, match=r"step \d+: .* after \['nudge'"):
        soak(100, operations=[nudge])


def test_what_is_left_behind_is_noticed() -> None:
    kept: list[object] = []

    def tensors(run: Run, x: Tensor) -> None:
        kept.append(x.clone())

    def classes(run: Run, x: Tensor) -> None:
        kept.append(type("Left", (), {}))

    def networks(run: Run, x: Tensor) -> None:
        kept.append(run.net)
        run.replace(copy.deepcopy(run.net))

    for leave, what in ((tensors, "tensors"), (classes, "classes")):
        _, settled, *_, last = soak(100, operations=[leave])
        assert what in last.beyond(settled)
    with pytest.raises(AssertionError, match=r"'networks'.* left a network"):
        soak(100, operations=[networks])


# Freed at once ----------------------------------------------------------------------------------

X = torch.randn(3, 2, 8)


def applied(net: Net) -> None:
    wn.apply(net, RULE_LIST)
    net(X).sum().backward()


def in_the_legacy_layout(net: Net) -> None:
    legacy(net.conv)
    net(X).sum().backward()
    wn.migrate(net)
    wn.migrate(net, to="legacy")
    net(X).sum().backward()


def fused(net: Net) -> None:
    applied(net)
    wn.fuse(net)
    net(X).sum().backward()
    with torch.no_grad(), shared(net):
        net(X), net(X)


def interrupted(net: Net) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    fused(net)
    handle = net.rnn.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        net(X)
    handle.remove()
    wn.unfuse(net)


def unfused(net: Net) -> None:
    fused(net)
    wn.unfuse(net)


def folded(net: Net) -> None:
    applied(net)
    with torch.no_grad(), wn.folded(net):
        net(X)


def written(net: Net) -> None:
    applied(net)
    with wn.writable(net):
        nn.init.ones_(net.conv.weight)
    net.head.reset_parameters()
    net.apply(lambda module: None)


def initialized(net: Net) -> None:
    wn.apply(net, [RULES["conv"], RULES["up"]])
    wn.initialize_from_batch(net, X)


def copied(net: Net) -> None:
    fused(net)
    copy.deepcopy(net)
    pickle.loads(pickle.dumps(net))
    wn.export.stripped_copy(net)


def removed(net: Net) -> None:
    fused(net)
    wn.remove(net)
    net(X).sum().backward()


def looked_at(net: Net) -> None:
    fused(net)
    optimizer = torch.optim.SGD(wn.parameter_groups(net, weight_decay=0.1), 0.1)
    wn.remove(net, RULES["conv"], optimizers=optimizer)
    str(wn.plan(net, "convolutions"))
    str(wn.sites(net))
    str(wn.statistics(net, optimizer))


def refused(net: Net) -> None:
    applied(net)
    for call in (
        lambda: wn.apply(net, {"types": "Conv9"}),
        lambda: wn.apply(net, {"names": "conv", "dim": 7, "replace": True}),
    ):
        with pytest.raises(wn.WeightNormError):
            call()
    wn.migrate(net)


@pytest.fixture
def _no_collector() -> Generator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left(model: nn.Module) -> dict[str, weakref.ref[object]]:
    """References to all that makes up a model."""
    parts = {**dict(model.named_modules()), **dict(model.named_parameters())}
    return {f"{name} ({type(part).__name__})": weakref.ref(part) for name, part in parts.items()}


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize(
    "use",
    [
        applied,
        copied,
        folded,
        fused,
        in_the_legacy_layout,
        initialized,
        interrupted,
        looked_at,
        refused,
        removed,
        unfused,
        written,
    ],
)
def test_a_model_that_is_dropped_is_freed_without_the_collector(use: Callable[[Net], None]) -> None:
    net = Net()
    before = left(net)
    use(net)
    parts = before | left(net)
    del net
    assert not [name for name, part in parts.items() if part() is not None]


@pytest.mark.usefixtures("_no_collector")
def test_torchs_own_parametrization_waits_for_the_collector() -> None:
    layer = parametrized(nn.Linear(2, 2))
    gone = weakref.ref(layer)
    del layer
    assert gone() is not None
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("_no_collector")
def test_a_patched_model_that_is_dropped_is_freed_without_the_collector() -> None:
    tokens = torch.arange(6).reshape(1, 6)

    def alive(use: Callable[[nn.Module], object]) -> list[str]:
        model = llama()
        use(model)
        model(tokens).logits.sum().backward()
        parts = left(model)
        del model
        return [name for name, part in parts.items() if part() is not None]

    assert alive(lambda model: None) == []  # transformers itself leaves none
    assert alive(patch_model) == []
    assert alive(lambda model: (patch_model(model), wn.fuse(model))) == []
    assert alive(lambda model: (patch_model(model), unpatch_model(model))) == []
