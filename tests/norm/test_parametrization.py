"""The module class: shared by all modules of a base class, and torch's own from outside."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wn_surgery as wn
from tests.makers import Double
from wn_surgery.norm.module_class import base_class, class_for, computed_names, is_managed
from wn_surgery.norm.options import NormOptions

X = torch.linspace(-1, 1, 6).view(2, 3)


def ours(module: nn.Module, params: str = "weight", **options: Any) -> Any:
    """Put weight norm on, and move g away from where the plain weight had it."""
    wn.apply(module, {"names": "", "params": params, **options})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("original0"):
                parameter.mul_(1.7)
    return module


def lstm() -> Any:
    return ours(nn.LSTM(3, 4), "weight_*")


# The shared class ---------------------------------------------------------------------------


def test_one_class_for_each_base_and_set_of_names() -> None:
    one, two = ours(nn.Linear(3, 4)), ours(nn.Linear(5, 6), dim=1, eps=1e-3)
    assert type(one) is type(two) is class_for(nn.Linear, ["weight"])
    assert type(one).__bases__ == (nn.Linear,) and type(one).__name__ == "ParametrizedLinear"
    assert type(ours(nn.Bilinear(3, 3, 2))) is not type(one)
    some, others = ours(nn.LSTM(3, 4), "weight_ih_l0"), ours(nn.LSTM(3, 4), "weight_hh_l0")
    assert type(some) is not type(others)
    for module, name in [(some, "weight_hh_l0"), (others, "weight_ih_l0")]:
        wn.apply(module, {"names": "", "params": name})
    assert type(some) is type(others)  # whatever the order in which they came
    assert set(computed_names(type(some))) == {"weight_ih_l0", "weight_hh_l0"}
    # The compiler of torch 2.6 follows no subclass.
    assert type(vars(type(some))["weight_ih_l0"]) is property


def test_torch_takes_it_for_a_parametrized_module() -> None:
    layer = ours(nn.Linear(3, 4))
    assert parametrize.is_parametrized(layer) and parametrize.is_parametrized(layer, "weight")
    assert not parametrize.is_parametrized(layer, "bias")
    assert parametrize.type_before_parametrizations(layer) is nn.Linear is base_class(layer)
    assert isinstance(layer, nn.Linear) and is_managed(type(layer))
    assert repr(layer.parametrizations.weight[0]) == "WeightNorm(dim=0)"
    theirs = parametrizations.weight_norm(nn.Linear(3, 4))
    for names in (nn.Module.named_parameters, nn.Module.named_buffers, nn.Module.named_modules):
        assert [name for name, _ in names(layer)] == [name for name, _ in names(theirs)]


def test_torch_removes_it() -> None:
    layer, other = ours(nn.Linear(3, 4)), ours(nn.Linear(3, 4))
    weight, beside = layer.weight.detach().clone(), other.weight.detach().clone()
    copied = copy.deepcopy(layer)
    parametrize.remove_parametrizations(copied, "weight")
    assert type(copied) is nn.Linear and type(copied.weight) is nn.Parameter
    assert torch.equal(copied.weight, weight)
    # torch deletes the property from the class; these two share it.
    assert torch.equal(layer.weight, weight) and torch.equal(other.weight, beside)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight) and torch.equal(other.weight, beside)
    ours(layer)
    assert type(layer) is type(other)


def test_torch_removes_one_of_several() -> None:
    module, other, x = lstm(), lstm(), torch.randn(5, 1, 3)
    expected, beside = module(x)[0].detach(), other(x)[0].detach()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrize.remove_parametrizations(module, name)
        assert type(getattr(module, name)) is nn.Parameter
        assert torch.equal(other(x)[0], beside)
    assert type(module) is nn.LSTM
    assert torch.equal(module(x)[0], expected)


def test_torch_parametrizes_another_parameter_of_one_module() -> None:
    layer, other = ours(nn.Linear(3, 4)), ours(nn.Linear(3, 4))
    bias, beside = layer.bias.detach().clone(), other(X).detach()
    parametrize.register_parametrization(layer, "bias", Double())
    torch.testing.assert_close(layer.bias.detach(), bias)  # Double has a right inverse
    assert torch.equal(pickle.loads(pickle.dumps(layer))(X), layer(X))
    # torch has added a property to the class that both share.
    assert other.bias is other._parameters["bias"]
    assert torch.equal(other(X), beside)
    assert torch.equal(copy.deepcopy(other)(X), beside)
    other.bias = nn.Parameter(torch.zeros(4))
    assert other.bias is other._parameters["bias"]
    other.bias = None
    assert other.bias is None
    # FSDP1 puts a plain tensor in the place of a Parameter, and back.
    del other.bias
    for value in (torch.ones(4), None):
        other.bias = value
        assert "bias" in vars(other)
        del other.bias
    for gone in (delattr, getattr):
        with pytest.raises(AttributeError, match="bias"):
            gone(other, "bias")
    with pytest.raises(AttributeError, match="has no deleter"):
        del other.weight
    parametrize.remove_parametrizations(layer, "bias")
    assert torch.equal(layer.bias, bias) and parametrize.is_parametrized(layer, "weight")
    wn.remove(layer)
    assert type(layer) is nn.Linear and torch.equal(layer.bias, bias)


def test_torch_stacks_another_parametrization_on_the_weight() -> None:
    layer, other = ours(nn.Linear(3, 4)), ours(nn.Linear(3, 4))
    weight, beside = layer.weight.detach().clone(), other.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Double())
    assert torch.equal(layer.weight, 2 * weight)
    layer(X).sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None
    assert torch.equal(pickle.loads(pickle.dumps(layer))(X), layer(X))
    layer.weight = torch.full((4, 3), 0.5)
    torch.testing.assert_close(layer.weight.detach(), torch.full((4, 3), 0.5))
    with pytest.raises(wn.StackedParametrizationError, match="Double"):
        wn.remove(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert torch.equal(other.weight, beside)


def test_classes_go_with_their_last_module() -> None:
    def make() -> tuple[Any, ...]:
        class Local(nn.Linear):
            pass

        layer = ours(Local(3, 4))
        copied = copy.deepcopy(layer)
        assert type(copied) is type(layer)
        wn.remove(copied)
        return layer, weakref.ref(type(layer)), weakref.ref(Local)

    layer, cls, base = make()
    gc.collect()
    assert cls() is type(layer) and base() is not None
    del layer
    gc.collect()  # a class is always part of a cycle
    assert cls() is None
    gc.collect()  # the shared class held its base
    assert base() is None


# Copies -------------------------------------------------------------------------------------


def _saved(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "pickle protocol 0": lambda module: pickle.loads(pickle.dumps(module, protocol=0)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 4), lambda: nn.Sequential(nn.Linear(3, 4))])
def test_copies_are_whole_and_apart(build: Callable[[], nn.Module], copies: str) -> None:
    model = build()
    wn.apply(model, {"types": "Linear", "dim": 1, "eps": 1e-3, "norm_dtype": torch.float64})
    model.eval().requires_grad_(False)
    expected = model(X)
    copied = COPIES[copies](model)
    assert torch.equal(copied(X), expected)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert not any(p.requires_grad for p in copied.parameters())
    assert not any(module.training for module in copied.modules())
    (site,) = wn.sites(copied)
    assert type(site.module) is type(wn.sites(model)[0].module)
    assert site.norm == NormOptions(1, 1e-3, torch.float64)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert torch.equal(model(X), expected)
    wn.remove(copied)
    assert torch.equal(model(X), expected)
    assert [name for name, _ in copied.named_parameters()] == [
        name for name, _ in build().named_parameters()
    ]


@pytest.mark.parametrize("copies", COPIES)
def test_copies_of_a_recurrent_network_compute_their_own_weights(copies: str) -> None:
    module, x = lstm(), torch.randn(5, 1, 3)
    expected = module(x)[0].detach()
    copied = COPIES[copies](module)
    with torch.no_grad():
        copied.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.equal(copied(x)[0], expected)
    assert torch.equal(module(x)[0], expected)


def test_a_shallow_copy_shares_its_tensors_as_a_plain_one_does() -> None:
    layer = ours(nn.Linear(3, 4))
    copied = copy.copy(layer)
    assert type(copied) is type(layer) and copied.parametrizations is layer.parametrizations
    assert torch.equal(copied(X), layer(X))


def _work(model: nn.Module, inputs: Tensor, outputs: Any) -> None:
    """What the child process does; it finds the function by its module and name."""
    with torch.no_grad():
        # As lists: tensors would need the child to stay alive until they are read.
        outputs.put((type(model[0]).__name__, model(inputs).tolist()))


@pytest.mark.processes
def test_a_spawned_process_gets_a_working_model() -> None:
    model = nn.Sequential(ours(nn.Linear(3, 4)))
    context = torch.multiprocessing.get_context("spawn")
    outputs = context.Queue()
    child = context.Process(target=_work, args=(model, X, outputs))
    child.start()
    try:
        name, out = outputs.get(timeout=900)
        child.join(timeout=900)
    finally:
        if child.is_alive():
            child.kill()
    assert child.exitcode == 0 and name == "ParametrizedLinear"
    torch.testing.assert_close(torch.tensor(out), model(X).detach())


# Users' own classes -------------------------------------------------------------------------


class Recording(nn.Linear):
    """Has its own ``__setattr__``, which must still see what it saw before."""

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("seen", []).append(name)
        super().__setattr__(name, value)


class Stateful(nn.Linear):
    """Leaves a cache out of its pickles."""

    cache: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["restored"] = True


class Reducing(nn.Linear):
    """Is pickled by way of its constructor."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.in_features, self.out_features), self.__dict__.copy())


class Mould(ABC):
    @abstractmethod
    def cast(self) -> str: ...


class Abstract(Mould, nn.Linear):
    def cast(self) -> str:
        return "iron"


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("cls", [Recording, Stateful, Reducing, Abstract])
def test_users_classes_survive(cls: type[nn.Linear], copies: str) -> None:
    layer = cls(3, 4)
    layer.cache = lambda: "not pickled"
    if cls is not Stateful and copies != "deepcopy":
        del layer.cache
    plain = layer.weight.detach().clone()
    ours(layer)
    copied = COPIES[copies](layer)
    assert torch.equal(copied(X), layer(X)) and isinstance(copied, cls)
    assert base_class(copied) is cls and type(copied) is type(layer)
    if cls is Recording:
        layer.note = 1
        assert layer.seen[-1] == "note"
    if cls is Stateful:
        assert copied.restored and "cache" not in copied.__dict__
    if cls is Abstract:
        assert isinstance(type(layer), ABCMeta) and copied.cast() == "iron"
    wn.remove(copied)
    assert type(copied) is cls
    torch.testing.assert_close(copied.weight.detach(), 1.7 * plain)


def test_a_local_class_with_a_metaclass_of_its_own() -> None:
    class Meta(ABCMeta):
        marks: list[str] = []  # noqa: RUF012

        def __setattr__(cls, name: str, value: Any) -> None:
            if not name.startswith("_"):
                Meta.marks.append(name)
            super().__setattr__(name, value)

    class Local(nn.Linear, metaclass=Meta):
        pass

    layer, other = ours(Local(3, 4)), ours(Local(3, 4))
    assert isinstance(type(layer), Meta)
    type(layer).colour = "red"
    assert Meta.marks == ["colour"]  # the metaclass is still asked
    weight = other.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is Local and torch.equal(other.weight, weight)


# The weight as an attribute -----------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda t: t, nn.Parameter])
def test_an_assigned_weight_goes_into_g_and_v_by_value(wrap: Callable[[Tensor], Tensor]) -> None:
    layer = ours(nn.Linear(3, 4))
    held = list(layer.parametrizations.weight.parameters())
    versions = [parameter._version for parameter in held]
    weight = wrap(torch.linspace(1, 2, 12, dtype=torch.float64).view(4, 3))
    layer.weight = weight
    assert [*map(id, layer.parametrizations.weight.parameters())] == [*map(id, held)]
    assert torch.equal(layer.weight, weight.float())
    assert all(p._version > before for p, before in zip(held, versions, strict=True))
    with torch.no_grad():
        weight.mul_(-1)
    assert (layer.weight > 0).all()
    assert "weight" not in layer._parameters and "weight" not in layer.__dict__


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (None, TypeError, "expected a tensor"),
        (3.0, TypeError, "expected a tensor"),
        (torch.ones(2, 2), ValueError, r"expected a weight of shape \(4, 3\), got \(2, 2\)"),
        (torch.zeros(4, 3), wn.ZeroNormError, r"4 slice\(s\)"),
        (torch.full((4, 3), torch.nan), wn.ZeroNormError, "not finite"),
    ],
)
def test_what_cannot_be_assigned(value: Any, error: type[Exception], match: str) -> None:
    layer = ours(nn.Linear(3, 4))
    before = layer.weight.detach().clone()
    with pytest.raises(error, match=match):
        layer.weight = value
    assert torch.equal(layer.weight, before)


def test_attributes_of_the_module() -> None:
    layer = ours(nn.Linear(3, 4))
    assert hasattr(layer, "weight") and "weight" not in dict(layer.named_parameters())
    with pytest.raises(AttributeError, match="deleter"):
        del layer.weight
    with pytest.raises(AttributeError, match="'ParametrizedLinear' object has no attribute 'wait'"):
        _ = layer.wait
    with pytest.raises(KeyError, match="already exists"):
        layer.register_parameter("weight", nn.Parameter(torch.ones(4, 3)))
    assert [name for name, _ in layer.named_parameters()] == [
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ]
    wn.remove(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    del layer.weight
    assert not hasattr(layer, "weight")


def test_methods_of_the_module_reach_g_and_v() -> None:
    layer = ours(nn.Linear(3, 4))
    plist = layer.parametrizations.weight
    assert not layer.eval().parametrizations.weight[0].training
    assert layer.train().parametrizations.weight[0].training
    weight = layer.weight.detach().clone()
    assert layer.double().weight.dtype == plist.original0.dtype == torch.float64
    torch.testing.assert_close(layer.weight.detach(), weight.double())
    assert torch.equal(layer.to(torch.float32).weight, weight)
    assert layer.to(torch.bfloat16)(X.bfloat16()).dtype == torch.bfloat16
    layer.float()(X).sum().backward()
    layer.zero_grad()
    assert plist.original0.grad is None and plist.original1.grad is None
    assert not layer.requires_grad_(False).weight.requires_grad
    assert layer.share_memory().parametrizations.weight.original1.is_shared()
    assert layer.to("meta").weight.is_meta


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.constant_(module.weight, 0.5)


def test_initializers_take_effect() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(3, 4)
    layer = ours(nn.Linear(3, 4))
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.testing.assert_close(layer.weight, plain.weight)
    model = nn.Sequential(layer, nn.Linear(4, 4))
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    model.apply(initialize)
    assert torch.equal(layer.weight, torch.full((4, 3), 0.5))
    assert layer.parametrizations.weight.original0 is g and g.grad_fn is None and v.is_leaf
    # As DCGAN does, by the class's name and through .data.
    model.apply(lambda m: m.weight.data.fill_(0.25) if "Linear" in type(m).__name__ else None)
    torch.testing.assert_close(layer.weight, torch.full((4, 3), 0.25))


def test_recurrent_layers_are_reset_as_plain_ones() -> None:
    plain, layer = nn.LSTM(3, 4), nn.LSTM(3, 4)
    wn.apply(layer, {"names": "", "params": "weight*"})
    for each in (plain, layer):
        torch.manual_seed(5)
        each.reset_parameters()
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
        torch.testing.assert_close(getattr(layer, name), getattr(plain, name))


def test_an_initializer_that_fails_changes_nothing() -> None:
    layer = ours(nn.Linear(3, 4))
    before = {key: value.clone() for key, value in layer.state_dict().items()}

    def zero(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    def stop(module: nn.Module) -> None:
        initialize(module)
        if isinstance(module, nn.Linear):
            raise RuntimeError("stopped")

    with pytest.raises(wn.ZeroNormError, match="Linear"):
        layer.apply(zero)
    with pytest.raises(RuntimeError, match="stopped"):
        layer.apply(stop)
    with pytest.raises(wn.ZeroNormError):
        nn.Module.apply(nn.Sequential(layer), zero)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    assert layer.weight is not layer.weight  # nothing holds it any more


def test_what_reads_or_removes_inside_apply() -> None:
    layer = ours(nn.Linear(3, 4))
    before = layer.parametrizations.weight.original0.clone()
    seen: list[bool] = []
    layer.apply(lambda m: seen.append(parametrize.is_parametrized(m)))
    assert seen[-1] and torch.equal(layer.parametrizations.weight.original0, before)
    layer.apply(lambda m: isinstance(m, nn.Linear) and wn.remove(m))
    assert type(layer) is nn.Linear
    layer = ours(nn.Linear(3, 4))
    layer.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
    assert not torch.equal(layer.parametrizations.weight.original0, before)


def test_init_subclass_is_about_the_users_classes() -> None:
    registered: list[type] = []

    class Tagged(nn.Linear):
        def __init_subclass__(cls, *, tag: str, **options: Any) -> None:
            super().__init_subclass__(**options)
            registered.append(cls)

    class Layer(Tagged, tag="one"):
        pass

    layer = ours(Layer(3, 4))
    assert registered == [Layer] and isinstance(layer, Layer)
    assert type(layer).__bases__ == (Layer,)
    wn.remove(layer)
    assert type(layer) is Layer


def test_torchs_removal_of_what_it_parametrized_before_us() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "bias", Twice())
    bias = layer.bias.detach().clone()
    ours(layer)
    parametrize.remove_parametrizations(layer, "bias")
    assert torch.equal(layer.bias, bias) and "bias" in layer._parameters
    wn.remove(layer)
    assert type(layer) is nn.Linear


def test_hooks_on_the_parametrization_run() -> None:
    layer = ours(nn.Linear(3, 4))
    called: list[str] = []
    layer.parametrizations.weight.register_forward_hook(lambda *_: called.append("list"))
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: called.append("norm"))
    layer(torch.ones(1, 3))
    assert called == ["norm", "list"]
