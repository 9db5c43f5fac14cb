"""What torch's weight norm does next to what ours does: the proof of docs/torch.md.

Each test shows torch's behaviour first, so that the page cannot outlive it: when a release of
torch mends something, its test fails, and the page loses a line. *Legacy* is
``torch.nn.utils.weight_norm``, *parametrized* is ``torch.nn.utils.parametrizations.weight_norm``.
"""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.utils import parametrize, remove_weight_norm

import wn_surgery as wn
from tests.makers import Tied, legacy, ours, parametrized
from tests.torch_facts.versions import newer_torch

Maker = Callable[..., Any]


def strip(module: nn.Module) -> Any:
    """Remove torch's parametrization with torch's function."""
    return parametrize.remove_parametrizations(module, "weight")


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def trainable(module: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in module.named_parameters() if name != "bias"}


TORCHS: list[Maker] = [legacy, parametrized]
EVERY: list[Maker] = [legacy, parametrized, ours]


# --- Writing to the weight --------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
def test_a_write_to_the_weight_is_lost(make: Maker) -> None:
    layer, x = make(linear()), torch.randn(2, 3)
    before = layer(x)
    nn.init.ones_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(7)
        layer.weight.data.copy_(torch.zeros(4, 3))
    assert torch.equal(layer(x), before)

    # In the context all of these take effect, whoever put the weight norm on.
    with wn.writable(layer):
        nn.init.ones_(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(7)
    torch.testing.assert_close(layer(x), F.linear(x, torch.full((4, 3), 7.0), layer.bias))


def test_an_assigned_tensor_becomes_v_itself() -> None:
    layer, x = legacy(linear()), torch.randn(2, 3)
    before = layer(x)
    layer.weight = torch.ones(4, 3)
    assert torch.equal(layer(x), before)

    layer, weight = parametrized(linear()), torch.ones(4, 3)
    layer.weight = weight
    assert layer.parametrizations.weight.original1.data_ptr() == weight.data_ptr()
    weight.mul_(-1)  # reaches into the layer
    assert (layer.weight < 0).all()

    layer, weight = ours(linear()), torch.ones(4, 3)
    layer.weight = weight
    weight.mul_(-1)
    assert (layer.weight > 0).all()


def test_the_legacy_weight_is_stale_after_loading() -> None:
    source = legacy(linear())
    with torch.no_grad():
        source.weight_g.mul_(2)
    for make, fresh in [(legacy, False), (parametrized, True), (ours, True)]:
        layer = make(linear())
        before = layer.weight.detach().clone()
        layer.load_state_dict(source.state_dict())
        assert torch.equal(layer.weight, before) is not fresh
        # remove() folds g and v, and so is right in every layout.
        wn.remove(layer)
        torch.testing.assert_close(layer.weight.detach(), 2 * before)


# --- Copies -----------------------------------------------------------------------------------


def test_legacy_modules_cannot_be_deep_copied() -> None:
    layer = legacy(linear())
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(layer)
    with torch.no_grad():
        layer(torch.randn(2, 3))
    copy.deepcopy(layer)  # what this forward has left has no graph
    layer(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(layer)
    copy.deepcopy(parametrized(linear()))

    for layer in (ours(linear()), legacy(linear())):
        wn.migrate(layer)
        layer(torch.randn(2, 3))
        assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_parametrized_modules_cannot_be_pickled() -> None:
    pickle.dumps(legacy(linear()))
    layer = parametrized(linear())
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(layer)

    for layer in (ours(linear()), parametrized(linear())):
        wn.migrate(layer)
        assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)


def test_stripping_a_copy_breaks_the_original() -> None:
    layer = parametrized(linear())
    strip(copy.deepcopy(layer))
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        layer(torch.randn(2, 3))

    for make, remove in [(parametrized, wn.remove), (ours, wn.remove), (ours, strip)]:
        layer = make(linear())
        before = layer.weight.detach().clone()
        remove(copy.deepcopy(layer))
        assert torch.equal(layer.weight, before)


# --- Removing ---------------------------------------------------------------------------------


def test_the_legacy_remover_does_not_know_the_parametrization() -> None:
    with pytest.raises(ValueError, match="weight_norm of 'weight' not found"):
        remove_weight_norm(parametrized(linear()))
    with pytest.raises(ValueError, match="does not have a parametrization"):
        parametrize.remove_parametrizations(legacy(linear()), "weight")

    for make in EVERY:
        layer = make(linear())
        assert wn.remove(layer).changed == ("weight",)
        assert type(layer) is nn.Linear


@pytest.mark.parametrize("frozen", [False, True])
def test_a_stripped_weight_becomes_a_buffer(frozen: bool) -> None:
    """Under ``no_grad``, and where g and v are frozen, also with grad enabled."""
    layer = parametrized(linear().requires_grad_(not frozen))
    with torch.set_grad_enabled(frozen):
        strip(layer)
    assert list(layer._parameters) == ["bias"] and list(layer._buffers) == ["weight"]

    layer = legacy(linear().requires_grad_(not frozen))
    with torch.set_grad_enabled(frozen):
        remove_weight_norm(layer)
    assert list(layer._parameters) == ["bias", "weight"] and not layer._buffers

    layer = ours(linear().requires_grad_(not frozen))
    with torch.set_grad_enabled(frozen):
        wn.remove(layer)
    assert list(layer._parameters) == ["weight", "bias"] and not layer._buffers
    assert layer.weight.requires_grad is not frozen


def test_stripping_changes_the_order_of_parameters() -> None:
    layer = linear()
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()

    def resumed(layer: nn.Module) -> bool:
        """Whether each parameter gets the state that was its own."""
        again = torch.optim.Adam(layer.parameters())
        again.load_state_dict(copy.deepcopy(saved))
        return all(again.state[p]["exp_avg"].shape == p.shape for p in layer.parameters())

    for make in TORCHS:
        layer = make(linear())
        remove_weight_norm(layer) if make is legacy else strip(layer)
        assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]
        assert not resumed(layer)

    for make in EVERY:
        layer = make(linear())
        wn.remove(layer)
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        assert resumed(layer)


def test_load_hooks_stay_behind() -> None:
    layer = linear()
    for _ in range(5):
        strip(parametrized(layer))
    assert len(layer._load_state_dict_pre_hooks) == 5
    with pytest.raises(AttributeError, match="_weight_norm_compat_hook"):
        pickle.dumps(layer)

    layer = linear()
    for _ in range(5):
        remove_weight_norm(legacy(layer))
    for make in EVERY * 5:
        wn.remove(make(layer))
    assert not layer._load_state_dict_pre_hooks and not layer._forward_pre_hooks
    pickle.dumps(layer)


# --- Training ---------------------------------------------------------------------------------


def test_an_earlier_optimizer_trains_nothing() -> None:
    def trained(make: Callable[[nn.Module, torch.optim.Optimizer], object]) -> bool:
        layer = linear()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        make(layer, optimizer)
        layer(torch.ones(2, 3)).sum().backward()
        before = [p.detach().clone() for n, p in layer.named_parameters() if n != "bias"]
        optimizer.step()
        after = [p for n, p in layer.named_parameters() if n != "bias"]
        return not all(map(torch.equal, before, after))

    assert not trained(lambda layer, _: legacy(layer))
    assert not trained(lambda layer, _: parametrized(layer))
    # Ours too, unless it is told of the optimizer: nothing in a model says who trains it.
    assert not trained(lambda layer, _: ours(layer))
    assert trained(lambda layer, optimizer: wn.apply(layer, "linears", optimizers=[optimizer]))


def test_legacy_unfreezes_frozen_weights() -> None:
    layer = legacy(linear().requires_grad_(False))
    assert trainable(layer) == {"weight_g": True, "weight_v": True}
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    remove_weight_norm(layer)
    assert trainable(layer) == {"weight": True}

    assert not any(trainable(parametrized(linear().requires_grad_(False))).values())
    layer = ours(linear().requires_grad_(False))
    assert not any(trainable(layer).values())
    wn.remove(layer)
    assert trainable(layer) == {"weight": False}


@pytest.mark.parametrize("make", TORCHS)
def test_tied_weights_come_apart(make: Maker) -> None:
    def step(model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.arange(5)).square().sum().backward()
            optimizer.step()
        model(torch.arange(5))  # lets a legacy hook compute the weight
        return model

    model = Tied()
    make(model.head)
    # v and the embedding are two parameters in one memory: each step moves both.
    v = next(p for n, p in model.head.named_parameters() if n.endswith(("_v", "original1")))
    assert v.data_ptr() == model.embed.weight.data_ptr()
    assert not torch.equal(step(model).head.weight, model.embed.weight)

    model = Tied()
    with pytest.raises(wn.TiedParameterError, match="tied to embed"):
        wn.apply(model, "linears")
    wn.apply(model, {"types": "Linear", "tied": "together"})
    assert torch.equal(step(model).head.weight, model.embed.weight)


# --- Gradients and values ---------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
def test_second_order_gradients_are_wrong(dim: int) -> None:
    def right(make: Maker) -> bool:
        torch.manual_seed(0)
        layer = make(nn.Linear(3, 4, bias=False, dtype=torch.float64), dim=dim)
        names = [name for name, _ in layer.named_parameters()]
        x = torch.randn(5, 3, dtype=torch.float64)

        def loss(*values: Tensor) -> Tensor:
            out = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
            return out.pow(3).sum()

        values = [p.detach().requires_grad_() for p in layer.parameters()]
        return torch.autograd.gradgradcheck(loss, values, raise_exception=False)

    assert not right(legacy) and not right(parametrized)
    assert right(ours)


# torch 2.13 scripts its decompositions when forward-mode AD is used for the first time.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_missing() -> None:
    def tangent(make: Maker) -> Tensor:
        layer, x = make(linear()), torch.randn(2, 3)
        values = {name: p.detach() for name, p in layer.named_parameters()}
        tangents = {name: torch.ones_like(p) for name, p in values.items()}
        return torch.func.jvp(
            lambda values: torch.func.functional_call(layer, values, (x,)), (values,), (tangents,)
        )[1]

    for make in TORCHS:
        with pytest.raises(NotImplementedError, match="forward AD with _weight_norm_interface"):
            tangent(make)
    assert tangent(ours).isfinite().all()


@pytest.mark.parametrize("make", TORCHS)
def test_dim_minus_one_is_the_whole_tensor(make: Maker) -> None:
    def g_shape(dim: int | None) -> tuple[int, ...]:
        return tuple(
            next(p for n, p in make(linear(), dim=dim).named_parameters() if n != "bias").shape
        )

    assert g_shape(-1) == g_shape(None) == ()
    assert g_shape(-2) == g_shape(0) == (4, 1)  # while -2 counts from the end
    assert g_shape(1) == (1, 3)

    with pytest.raises(wn.RuleError, match="to torch -1 is the whole tensor"):
        wn.Rule(dim=-1)
    # What torch has made of -1 is understood.
    assert wn.sites(make(linear(), dim=-1))[0].dim is None


def test_zero_rows_are_nan() -> None:
    def with_zero_row() -> nn.Linear:
        layer = linear()
        with torch.no_grad():
            layer.weight[1] = 0
        return layer

    for make in TORCHS:
        layer = make(with_zero_row())
        out = layer(torch.ones(2, 3))
        out.sum().backward()
        assert out.isnan().any()
        assert all(p.grad.isnan().any() for n, p in layer.named_parameters() if n != "bias")

    layer = with_zero_row()
    with pytest.raises(wn.ZeroNormError, match="eps > 0"):
        wn.apply(layer, "linears")
    wn.apply(layer, {"types": "Linear", "eps": 1e-12})
    layer(torch.ones(2, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_applying_twice_is_accepted() -> None:
    with pytest.raises(RuntimeError, match="Cannot register two weight_norm hooks"):
        legacy(legacy(linear()))
    layer = parametrized(parametrized(linear()))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        layer(torch.randn(2, 3))

    layer = ours(linear())
    assert wn.apply(layer, {"names": "", "dim": 0}).changed == ()
    with pytest.raises(wn.ExistingSiteError, match="replace=True"):
        wn.apply(layer, {"names": "", "dim": 1})


@newer_torch
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_applying_changes_the_weight(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(512, 256, dtype=dtype)
    before = plain.weight.detach().clone()
    if (dim, dtype) != (0, torch.float64):  # there the two orders of summing happen to agree
        for make in TORCHS:
            weight = make(copy.deepcopy(plain), dim=dim).weight
            assert not torch.equal(weight, before)
            torch.testing.assert_close(weight.detach(), before)  # by a few units in the last place
    assert torch.equal(ours(plain, dim=dim).weight, before)


def test_applying_in_bfloat16_changes_the_weight_in_all_of_them() -> None:
    before = nn.Linear(512, 256, dtype=torch.bfloat16)
    weights = [make(copy.deepcopy(before)).weight for make in EVERY]
    assert not any(torch.equal(weight, before.weight) for weight in weights)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_channels_last_is_lost(dim: int | None) -> None:
    for make in EVERY:
        layer = make(nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), dim=dim)
        kept = layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert kept is (make is ours)


# --- Speed ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, make: Maker) -> None:
        super().__init__()
        self.fc = make(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


@newer_torch
def test_a_class_for_each_module_recompiles_each() -> None:
    def classes(make: Maker) -> int:
        return len({type(make(nn.Linear(4, 4))) for _ in range(12)})

    def frames(make: Maker) -> int:
        """How many times twelve equal blocks are compiled."""
        torch._dynamo.reset()
        counter = CompileCounter()
        # As in a model, all are alive: a class that nothing uses may be made anew.
        for block in [Block(make) for _ in range(12)]:
            torch.compile(block, backend=counter)(torch.randn(2, 4))
        return counter.frame_count

    assert (classes(parametrized), classes(ours)) == (12, 1)
    limit = torch._dynamo.config.cache_size_limit
    assert frames(lambda layer: layer) == frames(legacy) == 1
    assert frames(parametrized) == limit == 8  # then it gives up and runs uncompiled
    assert frames(ours) == 1
    torch._dynamo.reset()


def test_cached_is_about_the_whole_process() -> None:
    layer, other = parametrized(linear()), parametrized(linear())

    def is_cached(layer: nn.Module) -> bool:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(layer.weight is layer.weight))
        thread.start()
        thread.join()
        return found[0]

    with parametrize.cached():
        assert is_cached(other)  # another model, in another thread
    with parametrize.cached():
        with torch.no_grad():
            _ = layer.weight
        assert not layer.weight.requires_grad  # and so g and v get no gradient
    with wn.folded(layer):
        assert layer.weight is layer.weight  # of this model, in this thread
        assert not is_cached(layer) and not is_cached(other)
        with torch.no_grad():
            _ = layer.weight
        layer(torch.ones(1, 3)).sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None


# --- Keys -------------------------------------------------------------------------------------


def test_checkpoints_load_across_layouts() -> None:
    def plain(layer: nn.Module) -> Any:
        return layer

    def loads(source: Maker, target: Maker) -> bool:
        layer = target(linear())
        try:
            layer.load_state_dict(source(linear()).state_dict())
        except RuntimeError:
            return False
        return True

    layouts: list[Maker] = [plain, legacy, parametrized, ours]
    table = {
        source.__name__: [target.__name__ for target in layouts if loads(source, target)]
        for source in layouts
    }
    assert table == {
        "plain": ["plain", "ours"],
        "legacy": ["legacy", "parametrized", "ours"],
        "parametrized": ["parametrized", "ours"],
        "ours": ["parametrized", "ours"],
    }


# --- The page ---------------------------------------------------------------------------------


def test_the_page_names_every_test_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "torch.md").read_text(encoding="utf-8")
    tests = {name for name in globals() if name.startswith("test_")}
    named = set(re.findall(r"\btest_[a-z_0-9]+\b", page)) - {"test_facts"}  # the file
    assert named == tests - {test_the_page_names_every_test_and_no_other.__name__}
