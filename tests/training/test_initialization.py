"""Initialization from a batch, against the paper's formula written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import wn_surgery as wn

torch.manual_seed(0)


def moments(y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    flat = y.detach().double().movedim(axis, 0).flatten(1)
    return flat.mean(1), flat.std(1, correction=0)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, Any]] = {
    "linear": (lambda: nn.Linear(5, 7), (32, 5), -1, 0),
    "linear over time": (lambda: nn.Linear(5, 7), (8, 6, 5), -1, 0),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), (8, 3, 20), 1, 0),
    "conv1d grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (8, 4, 20), 1, 0),
    "conv1d unbatched": (lambda: nn.Conv1d(3, 6, 3), (3, 50), 0, 0),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3), (4, 3, 9, 9), 1, 0),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (4, 2, 5, 5, 5), 1, 0),
    "transposed": (lambda: nn.ConvTranspose1d(3, 5, 4), (8, 3, 10), 1, "out"),
    "transposed depthwise": (
        lambda: nn.ConvTranspose1d(4, 8, 4, groups=4),
        (8, 4, 10),
        1,
        "out",
    ),
    "gpt2's": (lambda: Conv1D(6, 5), (16, 5), -1, "out"),
    "bilinear": (lambda: nn.Linear(5, 7, dtype=torch.float64), (32, 5), -1, 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_g_and_bias_are_the_papers(name: str) -> None:
    """g = 1/σ[t] and b = -μ[t]/σ[t], with t = v · x/‖v‖ for the layer at g = 1, b = 0."""
    make, shape, axis, dim = LAYERS[name]
    layer = make()
    x = torch.randn(shape, dtype=next(layer.parameters()).dtype) + 0.5
    wn.apply(layer, {"names": "", "dim": dim})
    held = wn.sites(layer)[0].held
    assert held is not None and held.g is not None and held.v is not None
    v = held.v.detach().clone()

    unit = make().double()
    norm = wn.sites(layer)[0].norm
    assert norm is not None
    kept = {norm.dim} if isinstance(norm.dim, int) else set(norm.dim or ())
    axes = [i for i in range(v.ndim) if i not in kept]
    with torch.no_grad():
        unit.weight.copy_(v.double() / v.double().square().sum(axes, keepdim=True).sqrt())  # type: ignore[operator]
        unit.bias.zero_()  # type: ignore[operator,union-attr]
    mean, std = moments(unit(x.double()), axis)

    result = wn.initialize_from_batch(layer, x)
    assert list(result.initialized) == ["weight"] and not result.skipped
    torch.testing.assert_close(held.g.flatten().double(), 1 / std, rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.bias.double(), -mean / std, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    assert torch.equal(held.v, v)
    mean, std = moments(layer(x), axis)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        (nn.ConvTranspose1d(3, 5, 4), (8, 3, 10), 0),
        (nn.Linear(5, 7), (32, 5), None),
        (nn.Conv2d(3, 4, 3), (4, 3, 8, 8), (0, 1)),
        (nn.Conv1d(3, 4, 3), (4, 3, 8), 2),
    ],
)
def test_other_axes_are_scaled_by_one_number(
    layer: nn.Module, shape: tuple[int, ...], dim: Any
) -> None:
    x = torch.randn(shape)
    wn.apply(layer, {"names": "", "dim": dim})
    held = wn.sites(layer)[0].held
    assert held is not None and held.g is not None
    before = held.g.detach().clone()
    wn.initialize_from_batch(layer, x)
    ratios = (held.g / before).flatten()
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    mean, std = moments(layer(x), -1 if isinstance(layer, nn.Linear) else 1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    assert float(std.square().mean()) == pytest.approx(1, rel=1e-4)


def network(**rule: Any) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))
    wn.apply(model, {"types": "Linear", **rule})
    return model


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))


def outputs(model: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.detach()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", [{}, {"eps": 1e-6}, {"norm_dtype": torch.float64}])
def test_layers_see_what_initialized_layers_give(fused: bool, rule: dict[str, Any]) -> None:
    model = network(**rule)
    if fused:
        wn.fuse(model)
    wn.initialize_from_batch(model, X)
    for name, y in outputs(model).items():
        mean, std = moments(y, -1)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-4, atol=0, msg=name)


def test_gradients_of_the_first_step_are_those_of_the_initialized_model() -> None:
    first, second = network(), network()
    with wn.initializing(first):
        loss = first(X).square().mean()
    loss.backward()
    wn.initialize_from_batch(second, X)
    second(X).square().mean().backward()
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def test_nothing_else_changes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
            self.drop, self.head = nn.Dropout(), nn.Linear(8, 2)
            self.table = nn.Embedding(3, 4)

        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            out: Tensor = self.head(self.drop(self.norm(self.layer(scale * x))))
            return out

    model = Model()
    wn.apply(model, [{"types": "Linear"}, {"action": "skip", "names": "head"}])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    torch.manual_seed(7)
    random = torch.get_rng_state()
    wn.initialize_from_batch(model, X, scale=2.0)
    assert torch.equal(random, torch.get_rng_state())
    changed = {"layer.bias", "layer.parametrizations.weight.original0"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != (key in changed), key
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_and_autocast() -> None:
    model = network().bfloat16()
    wn.initialize_from_batch(model, X.bfloat16())
    for y in outputs(model, X.bfloat16()).values():
        assert y.float().std(0, correction=0).sub(1).abs().max() < 0.03
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        wn.initialize_from_batch(model, X)
    assert outputs(model)["0"].std(0, correction=0).sub(1).abs().max() < 0.03


def test_layers_without_a_bias_keep_their_mean() -> None:
    layer = nn.Linear(4, 3, bias=False)
    wn.apply(layer, "linears")
    x = X + 1
    wn.initialize_from_batch(layer, x)
    mean, std = moments(layer(x), -1)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-4, atol=0)
    assert mean.abs().max() > 0.1


def test_a_module_that_is_called_twice_is_set_by_its_first_call() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    wn.apply(model, {"names": "0"})
    result = wn.initialize_from_batch(model, X)
    assert list(result.initialized) == ["0.weight"]
    torch.testing.assert_close(layer(X).std(0, correction=0), torch.ones(4))


def test_torchs_parametrization_is_initialized_too() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    wn.initialize_from_batch(layer, X)
    torch.testing.assert_close(layer(X).std(0, correction=0), torch.ones(3))


def test_what_is_left_out_is_said() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen, self.rnn = nn.Linear(4, 4), nn.LSTM(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.frozen(self.used(x)))
            return out

    model = Model()
    rules = [
        {"types": "Linear"},
        {"types": "LSTM", "params": "weight_ih_l0"},
        {"names": "frozen", "train_g": False},
    ]
    wn.apply(model, rules)
    result = wn.initialize_from_batch(model, X, names="{used,unused,frozen,rnn}")
    assert list(result.initialized) == ["used.weight"]
    assert result.skipped == {
        "unused.weight": "not called",
        "frozen.weight": "its g is frozen",
        "rnn.weight_ih_l0": "the output of LSTM is not linear in it",
        "head.weight": "not in names",
    }
    assert "skipped: its g is frozen" in str(result)


def test_channels_that_do_not_vary_only_lose_their_mean() -> None:
    layer = nn.Linear(4, 3)
    wn.apply(layer, "linears")
    x = X.clone()
    with torch.no_grad():
        v = layer.parametrizations.weight.original1  # type: ignore[union-attr,index]
        v.zero_()[:, 0] = 1.0
        v[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    x[:, 1] = 5.0  # all that channel 0 sees
    before = wn.sites(layer)[0].held.g.detach().clone()  # type: ignore[union-attr]
    result = wn.initialize_from_batch(layer, x)
    assert result.constant == {"weight": 1}
    assert "1 constant channels" in str(result)
    after = wn.sites(layer)[0].held.g  # type: ignore[union-attr]
    assert torch.equal(after[0], before[0])  # type: ignore[index]
    assert layer(x)[:, 0].abs().max() < 1e-5
    torch.testing.assert_close(layer(x)[:, 1:].std(0, correction=0), torch.ones(2))


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a broken layer")


def nan_inputs(model: nn.Module) -> None:
    wn.initialize_from_batch(model, torch.full_like(X, torch.nan))


def one_row(model: nn.Module) -> None:
    wn.initialize_from_batch(model, X[:1])


def breaks(model: nn.Module) -> None:
    wn.initialize_from_batch(nn.Sequential(model, Breaks()), X)


def interrupted(model: nn.Module) -> None:
    with wn.initializing(model):
        model(X)
        raise KeyboardInterrupt


def never_called(model: nn.Module) -> None:
    with wn.initializing(model):
        pass


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (nan_inputs, wn.InitializationError, "output of 0.weight is not finite"),
        (one_row, wn.InitializationError, r"1 value for each output channel.*larger batch"),
        (breaks, RuntimeError, "a broken layer"),
        (interrupted, KeyboardInterrupt, None),
        (never_called, wn.InitializationError, "called none of 0.weight"),
    ],
)
def test_what_fails_changes_nothing(
    act: Callable[[nn.Module], None], error: type[BaseException], said: str | None
) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=said):
        act(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_that_cannot_be_initialized() -> None:
    with pytest.raises(wn.InitializationError, match="apply weight norm to linear layers"):
        wn.initialize_from_batch(nn.Linear(4, 2), X)
    model = network()
    wn.migrate(model, to="legacy")
    with pytest.raises(wn.InitializationError, match=r"legacy layout: call wn_surgery\.migrate"):
        wn.initialize_from_batch(model, X)
    model = network()
    for compiled in (torch.compile(model, backend="eager"), model):
        model.compile(backend="eager")
        with pytest.raises(wn.InitializationError, match=r"before torch\.compile"):
            wn.initialize_from_batch(compiled, X)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["one"] = self.one(x)
        self.seen["other"] = self.other(self.seen["one"].tanh() * 3)
        return self.seen["other"]


def test_a_tied_g_is_set_by_the_first_call_alone() -> None:
    model = Tied()
    wn.apply(model, {"types": "Linear", "tied": "together"})
    x = torch.randn(500, 4)
    result = wn.initialize_from_batch(model, x)
    assert list(result.initialized) == ["one.weight"]
    assert result.skipped == {"other.weight": "its g or bias is that of one.weight"}
    model(x)
    mean, std = moments(model.seen["one"], -1)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)


def test_a_bias_that_is_frozen_or_computed() -> None:
    x = torch.randn(100, 4) + 3
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    wn.apply(model, "linears")
    assert list(wn.initialize_from_batch(model, x).initialized) == ["0.weight"]
    assert torch.equal(model[0].bias, before)
    std = moments(model(x), -1)[1]
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-4, atol=1e-4)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.normal_(model[0].bias)
    wn.apply(model, {"names": "0", "params": "bias", "dim": None})
    wn.apply(model, "linears")
    result = wn.initialize_from_batch(model, x)
    assert list(result.initialized) == ["1.weight"]
    assert "its bias is computed" in result.skipped["0.weight"]


def test_a_scale_that_does_not_fit_the_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    wn.apply(model, "linears")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(wn.InitializationError, match=r"varies by .*does not fit float32"):
        wn.initialize_from_batch(model, torch.randn(50, 4) * 1e-41)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    wn.apply(empty, "linears")
    with pytest.raises(wn.InitializationError, match="meta device"):
        wn.initialize_from_batch(empty, torch.empty(50, 4, device="meta"))


def test_a_buffer_that_the_forward_resizes_is_put_back() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("cache", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.cache.resize_(5).fill_(1.0)
            return self.layer(x)

    model = Growing()
    wn.apply(model, "linears")
    cache = model.cache
    wn.initialize_from_batch(model, torch.randn(50, 4))
    assert model.cache is cache and cache.tolist() == [0.0, 0.0]


def test_buffers_that_the_forward_exchanges_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.layer(x)

    model = Counting()
    wn.apply(model, "linears")
    calls = model.calls
    wn.initialize_from_batch(model, torch.randn(50, 4))
    assert model.calls is calls and calls.item() == 0


class TakesNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, names: str = "") -> Tensor:
        return self.layer(x) * (1.0 if names else torch.nan)


def test_a_forward_that_takes_names() -> None:
    model = TakesNames()
    wn.apply(model, "linears")
    for called in (model, nn.DataParallel(model)):
        with pytest.raises(wn.ModelError, match=r"has an argument names.*initializing\(model") as e:
            wn.initialize_from_batch(called, X, names=["layer"])
        assert e.value.kind == "initialization"
    with torch.no_grad(), wn.initializing(model, names="layer") as result:
        assert model(X, names="given").isfinite().all()
    assert list(result.initialized) == ["layer.weight"]
    assert repr(result) == "<Initialization: 1 initialized, 0 skipped>"
    assert list(wn.initialize_from_batch(model, X, "given").initialized) == ["layer.weight"]


def test_a_g_of_a_class_of_its_own_is_left_alone() -> None:
    class Sharded(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    wn.apply(model, "linears")
    plist = model[0].parametrizations.weight
    plist.original0 = Sharded(plist.original0.detach())
    found = wn.initialize_from_batch(model, torch.randn(16, 3))
    assert found.skipped == {"0.weight": "its g is a Sharded"}
