"""torch's four functions under torch's names, on every layout."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.fingerprints import assert_same, of_model
from tests.layers import LAYERS
from tests.makers import Double, legacy, ours, parametrized, shaken
from wn_surgery import compat
from wn_surgery.model import layouts

Maker = Callable[..., Any]
TORCHS: list[tuple[Maker, Maker]] = [
    (compat.weight_norm, legacy),
    (compat.parametrizations.weight_norm, parametrized),
]
EVERY: list[Maker] = [
    legacy,
    parametrized,
    ours,
    compat.weight_norm,
    compat.parametrizations.weight_norm,
]
REMOVERS: list[Maker] = [
    compat.remove_weight_norm,
    lambda layer, name="weight": compat.parametrize.remove_parametrizations(layer, name),
]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def test_an_import_line_of_torch_works_with_another_start() -> None:
    """`wn_surgery.compat` for `torch.nn.utils`: what is not about weight norm is torch's."""
    from wn_surgery.compat import clip_grad_norm_, remove_weight_norm, spectral_norm, weight_norm
    from wn_surgery.compat.parametrizations import orthogonal
    from wn_surgery.compat.parametrize import is_parametrized

    assert clip_grad_norm_ is nn.utils.clip_grad_norm_ and spectral_norm is nn.utils.spectral_norm
    assert orthogonal is nn.utils.parametrizations.orthogonal
    assert is_parametrized is nn.utils.parametrize.is_parametrized
    assert remove_weight_norm(weight_norm(linear())).weight.requires_grad
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from wn_surgery.compat import no_such_name")


def test_the_arguments_are_torchs() -> None:
    utils = nn.utils
    for mine, torchs in [
        (compat.weight_norm, utils.weight_norm),
        (compat.remove_weight_norm, utils.remove_weight_norm),
        (compat.parametrizations.weight_norm, utils.parametrizations.weight_norm),
        (compat.parametrize.remove_parametrizations, utils.parametrize.remove_parametrizations),
    ]:
        names, expected = (
            [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
            for function in (mine, torchs)
        )
        assert names == expected


@pytest.mark.parametrize(("mine", "torchs"), TORCHS)
@pytest.mark.parametrize("dim", [0, 1, -1, None, -2])
def test_the_layout_is_that_of_torchs_function(mine: Maker, torchs: Maker, dim: int | None) -> None:
    layer, other = mine(linear(), "weight", dim), torchs(linear(), "weight", dim)
    state, expected = layer.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=3e-7, atol=0)
    # Optimizers go by position.
    assert [key for key, _ in layer.named_parameters()] == [k for k, _ in other.named_parameters()]
    assert torch.equal(layer.weight, linear().weight)  # torch's has other bits
    other.load_state_dict(state)
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), other(x))
    assert wn.sites(layer)[0].norm == wn.sites(other)[0].norm


@pytest.mark.parametrize("mine", [mine for mine, _ in TORCHS])
@pytest.mark.parametrize("kind", sorted(LAYERS.keys() - {"padded", "layer_norm2d"}))  # zeros
def test_every_kind_of_layer(mine: Maker, kind: str) -> None:
    build = LAYERS[kind]
    layer = build()
    plain = copy.deepcopy(layer)
    for name, parameter in plain.named_parameters(recurse=False):
        if parameter.ndim > 1 and parameter.is_floating_point():
            assert mine(layer, name) is layer
            assert compat.remove_weight_norm(layer, name) is layer
    assert_same(of_model(plain, identity=False), of_model(layer, identity=False))


@pytest.mark.parametrize("remove", REMOVERS)
@pytest.mark.parametrize("make", EVERY)
@torch.no_grad()
def test_each_remover_knows_each_layout(make: Maker, remove: Maker) -> None:
    layer = shaken(make(linear()))
    layer(torch.ones(1, 3))
    weight = layer.weight.detach().clone()
    frozen = {name: p.requires_grad_(False) for name, p in layer.named_parameters()}
    assert frozen and remove(layer) is layer
    assert type(layer) is nn.Linear and list(layer._parameters) == ["weight", "bias"]
    assert torch.equal(layer.weight, weight) and not layer.weight.requires_grad
    assert not layer._forward_pre_hooks and not layer._load_state_dict_pre_hooks
    pickle.dumps(layer)
    with pytest.raises(ValueError, match="weight"):
        remove(layer)


def states() -> dict[str, dict[str, Tensor]]:
    """State dicts of one trained layer, in every layout."""
    made = {make.__name__: shaken(make(linear()), 0.0) for make in (legacy, parametrized)}
    layer = linear()
    with torch.no_grad():
        layer.weight.mul_(2.5)
    return {name: each.state_dict() for name, each in made.items()} | {"plain": layer.state_dict()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mine", [mine for mine, _ in TORCHS])
@pytest.mark.parametrize("layout", ["legacy", "parametrized", "plain"])
def test_checkpoints_of_every_layout_load(mine: Maker, layout: str, assign: bool) -> None:
    state = states()[layout]
    layer = nn.Sequential(mine(linear()))
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        each.load_state_dict({f"0.{key}": value for key, value in state.items()}, assign=assign)
        reference = linear()
        if layout != "plain":
            reference = (legacy if layout == "legacy" else parametrized)(reference)
        reference.load_state_dict(state)
        x = torch.randn(2, 3)
        torch.testing.assert_close(each(x), reference(x), rtol=3e-7, atol=1e-7)
    assert layer[0](x).grad_fn is not None


def test_a_bad_checkpoint_is_reported_by_its_own_name() -> None:
    layer = compat.weight_norm(linear())
    with pytest.raises(RuntimeError, match="size mismatch for weight_v"):
        layer.load_state_dict({"weight": torch.ones(5, 3), "bias": torch.ones(4)})
    with pytest.raises(RuntimeError, match="weight: the new weight has 4 slice"):
        layer.load_state_dict({"weight": torch.zeros(4, 3), "bias": torch.ones(4)})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight_g\""):
        layer.load_state_dict({"bias": torch.ones(4)})


def test_the_load_hook_goes_with_the_weight_norm() -> None:
    layer = compat.weight_norm(linear())
    wn.migrate(layer)
    assert not layer._load_state_dict_pre_hooks
    layer = compat.weight_norm(linear())
    with wn.writable(layer):
        nn.init.ones_(layer.weight)
    assert len(layer._load_state_dict_pre_hooks) == 1
    legacy_remover = nn.utils.remove_weight_norm
    assert wn.remove(legacy_remover(layer)).leftovers == ("weight",)
    assert not layer._load_state_dict_pre_hooks
    # Two parameters, and the hook of somebody else.
    cell = nn.LSTMCell(2, 3)
    cell.register_load_state_dict_pre_hook(lambda *_: None)
    for name in ("weight_ih", "weight_hh"):
        compat.weight_norm(cell, name)
    compat.remove_weight_norm(cell, "weight_ih")
    assert len(cell._load_state_dict_pre_hooks) == 2
    plain = nn.LSTMCell(2, 3).state_dict()
    cell.load_state_dict(plain)
    torch.testing.assert_close(cell.weight_hh_g, plain["weight_hh"].norm(dim=1, keepdim=True))


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("mine", [mine for mine, _ in TORCHS])
def test_twice_is_an_error(make: Maker, mine: Maker) -> None:
    layer = make(linear())
    before = of_model(layer, identity=True)
    says = "Cannot register two weight_norm hooks on the same parameter weight"
    with pytest.raises(RuntimeError, match=says) as caught:
        mine(layer)
    assert isinstance(caught.value, wn.WeightNormError) and caught.value.kind == "existing"
    assert_same(before, of_model(layer, identity=True))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("empty", None)
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.again = self.weight
        self.register_buffer("buffer", torch.ones(2, 2))
        self.below = nn.Linear(2, 2)


BAD: list[tuple[Callable[[], Any], str, Any, type[Exception], str]] = [
    (linear, "wait", 0, AttributeError, "no parameter 'wait'; its own parameters are weight, bias"),
    (linear, "wait", 0, ValueError, "no parameter 'wait'"),
    (nn.ReLU, "weight", 0, AttributeError, "ReLU has no parameter 'weight'; .* none"),
    (Own, "empty", 0, AttributeError, "no parameter 'empty'"),
    (Own, "buffer", 0, ValueError, "no parameter 'buffer'"),
    (Own, "below.weight", 0, ValueError, "no parameter 'below.weight'"),
    (Own, "weight", 0, wn.TiedParameterError, "tied to again"),
    (linear, "weight", 2, IndexError, "dim=2 is out of range"),
    (linear, "weight", -3, IndexError, "dim=-3 is out of range .* expected -2 to 1"),
    (linear, "weight", "out", TypeError, "dim='out'"),
    (linear, "weight", (0, 1), TypeError, r"dim=\(0, 1\)"),
    (linear, "weight", True, TypeError, "dim=True"),
    (lambda: nn.Linear(2, 2).to(torch.float8_e4m3fn), "weight", 0, TypeError, "quantized"),
    (lambda: nn.utils.spectral_norm(linear()), "weight", 0, wn.WeightNormError, "SpectralNorm"),
    (lambda: None, "weight", 0, TypeError, "expected a model"),
    (lambda: nn.Linear, "weight", 0, TypeError, "make an object of it"),
]


@pytest.mark.parametrize("mine", [mine for mine, _ in TORCHS])
@pytest.mark.parametrize(("make", "name", "dim", "error", "says"), BAD)
def test_bad_input(
    mine: Maker, make: Maker, name: str, dim: Any, error: type[Exception], says: str
) -> None:
    module = make()
    before = of_model(module, identity=True) if isinstance(module, nn.Module) else None
    with pytest.raises(error, match=says):
        mine(module, name, dim)
    if before is not None:
        assert_same(before, of_model(module, identity=True))


@pytest.mark.parametrize("dim", [0, -2])
def test_lazy_layers_are_refused(dim: int) -> None:
    for mine, _ in TORCHS:
        layer = nn.LazyLinear(3)
        with pytest.raises(ValueError, match="uninitialised"):
            mine(layer, "weight", dim)
        assert layer(torch.ones(1, 2)).shape == (1, 3)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_complex_weights_need_the_parametrized_layout() -> None:
    layer = nn.Linear(2, 2).to(torch.complex64)
    with pytest.raises(wn.StackedParametrizationError, match="complex"):
        compat.weight_norm(layer)
    weight = layer.weight.detach().clone()
    assert torch.equal(compat.parametrizations.weight_norm(layer).weight, weight)
    with pytest.raises(wn.StackedParametrizationError, match="complex"):
        wn.migrate(layer, to="legacy")


def test_zero_rows_and_attention_are_refused() -> None:
    layer = linear()
    nn.init.zeros_(layer.weight)
    for mine, _ in TORCHS:
        with pytest.raises(wn.ZeroNormError):
            mine(layer)
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(wn.StackedParametrizationError, match="legacy hook would never compute"):
        compat.weight_norm(attention.out_proj)
    compat.parametrizations.weight_norm(attention.out_proj)
    x = torch.randn(1, 2, 4)
    assert attention(x, x, x)[0].shape == x.shape


def test_what_else_is_removed() -> None:
    layer = nn.Sequential(parametrized(linear()))
    with pytest.raises(ValueError, match=r"not found in Sequential.* wn_surgery\.remove\(model\)"):
        compat.remove_weight_norm(layer)  # not what is below
    spectral = nn.utils.parametrizations.spectral_norm(linear())
    with pytest.raises(ValueError, match="weight_norm of 'weight' not found in ParametrizedLinear"):
        compat.remove_weight_norm(spectral)
    remove = compat.parametrize.remove_parametrizations
    assert type(remove(spectral, "weight")) is nn.Linear

    stacked = parametrized(linear())
    nn.utils.parametrize.register_parametrization(stacked, "weight", Double())
    weight = stacked.weight.detach().clone()
    with pytest.raises(wn.StackedParametrizationError):
        compat.remove_weight_norm(stacked)
    assert torch.equal(remove(stacked, "weight").weight, weight)
    assert not stacked._load_state_dict_pre_hooks

    with pytest.raises(ValueError, match="does not have a parametrization on weight"):
        remove(linear(), "weight")
    for make in EVERY:
        with pytest.raises(ValueError, match="from two tensors, g and v"):
            remove(make(linear()), "weight", leave_parametrized=False)
    with pytest.raises(TypeError, match="expected a model"):
        compat.remove_weight_norm(None)


def test_the_error_says_which_parameter_and_can_be_pickled() -> None:
    """From a worker process, for example; an AttributeError has fields of its own."""
    with pytest.raises(wn.MissingSiteError) as caught:
        compat.weight_norm(linear(), "wait")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (type(error), str(error)) == (type(caught.value), str(caught.value))
    assert (error.kind, error.site) == ("missing", "wait") and isinstance(error, wn.ModelError)


def test_through_apply_as_parallel_wavegan_does() -> None:
    """Both loops visit every module, and rely on the errors of torch's functions."""

    def put(module: nn.Module, weight_norm: Maker) -> None:
        try:
            weight_norm(module)
        except AttributeError:  # no weight
            return

    def take(module: nn.Module) -> None:
        try:
            compat.remove_weight_norm(module)
        except ValueError:  # no weight norm
            return

    for mine, torchs in TORCHS:
        model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Sequential(nn.ReLU(), nn.Conv1d(3, 2, 1)))
        plain = copy.deepcopy(model)
        model.apply(functools.partial(put, weight_norm=mine))
        expected = copy.deepcopy(plain)
        for layer in (expected[0], expected[1][1]):
            torchs(layer)
        assert list(model.state_dict()) == list(expected.state_dict())
        model.apply(take)
        assert_same(of_model(plain, identity=False), of_model(model, identity=False))


def test_no_warning_and_a_legacy_layer_that_can_be_copied_before_it_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = compat.weight_norm(linear())
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight_g.fill_(1)  # DINO does that
    assert torch.equal(layer.weight, linear().weight)
    assert torch.allclose(copied(torch.eye(3)).T - copied.bias[:, None], copied.weight)


def test_a_failure_between_leaves_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()
    before = of_model(layer, identity=True)

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(layouts, "put_legacy", fails)
    with pytest.raises(MemoryError):
        compat.weight_norm(layer)
    assert_same(before, of_model(layer, identity=True))
