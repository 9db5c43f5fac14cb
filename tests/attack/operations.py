"""What is done to a network and to its twin, and how the two are compared."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.checkpoint import checkpoint

import wn_surgery as wn
from tests.fused.models import COMPILER
from wn_surgery.fused import Mode, is_fused, shared

from .twin import KEYS, LAYERS, Layer, Twin

WIDTH = 3
RATE = 0.05
MODES: list[Mode] = ["auto", "native"] if COMPILER else ["auto"]


class Net(nn.Module):
    """Three layers, of which one may be skipped and one is read twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in LAYERS)
        self.middle: Callable[[], None] | None = None
        self.recompute = ""

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        h = torch.tanh(self.a(x))
        if not skip:
            if self.recompute:
                h = checkpoint(self.b, h, use_reentrant=self.recompute == "reentrant")
            else:
                h = self.b(h)
            h = torch.tanh(h)
        if self.middle is not None:
            self.middle()
        h = h + torch.tanh(h @ self.a.weight)
        out: Tensor = self.c(h)
        return out


class Pair:
    """A network, its twin, and the choices of one sequence."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.net = Net(seed)
        self.twin = Twin(
            {
                name: Layer(
                    {"w": layer.weight.detach().double(), "bias": layer.bias.detach().double()},
                    {"w": True, "bias": True},
                )
                for name, layer in ((name, getattr(self.net, name)) for name in LAYERS)
            }
        )
        torch.manual_seed(seed)
        self.x = torch.randn(4, WIDTH)

    # What the two are, side by side ---------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.net.a.bias.dtype

    def parameter(self, name: str, what: str) -> nn.Parameter:
        return self.net.get_parameter(f"{name}.{self.twin.layers[name].names()[what]}")

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{what}": self.parameter(name, what)
            for name, layer in self.twin.layers.items()
            for what in layer.values
        }

    def names(self, *layouts: str) -> list[str]:
        return [name for name, layer in self.twin.layers.items() if layer.layout in layouts]

    def choose(self, *layouts: str) -> str | None:
        names = self.names(*layouts)
        return self.rng.choice(names) if names else None

    def close(self, found: Tensor, wanted: Tensor, what: str, atol: float = 1e-4) -> None:
        torch.testing.assert_close(
            found.detach().double(),
            wanted.detach(),
            rtol=1e-3,
            atol=atol,
            msg=lambda m: f"{what}: {m}",
        )

    def call(self, skip: bool = False) -> Tensor:
        out: Tensor = self.net(self.x.to(self.dtype), skip)
        return out

    def expected(self, skip: bool = False) -> Tensor:
        return self.twin.forward(self.x.double(), skip, self.twin.leaves()).detach()

    def compare(self) -> None:
        """Names, values, what trains, and the output."""
        held = self.net.state_dict()
        wanted = {
            f"{name}.{key}"
            for name, layer in self.twin.layers.items()
            for key in layer.names().values()
        }
        assert set(held) == wanted, f"keys {sorted(held)}, expected {sorted(wanted)}"
        for key, parameter in self.parameters().items():
            name, what = key.split(".")
            layer = self.twin.layers[name]
            self.close(parameter, layer.values[what], key)
            assert parameter.requires_grad == layer.trains[what], f"requires_grad of {key}"
        with torch.no_grad():
            self.close(self.call(), self.expected(), "output")

    def compare_gradients(self) -> None:
        for key, parameter in self.parameters().items():
            wanted = self.twin.grads.get(key)
            assert (parameter.grad is None) == (wanted is None), (
                f"gradient of {key} is {parameter.grad}"
            )
            if parameter.grad is not None and wanted is not None:
                self.close(parameter.grad, wanted, f"gradient of {key}")

    def backward(self, skip: bool = False) -> None:
        for parameter in self.net.parameters():
            parameter.grad = None
        loss = self.call(skip).square().sum()
        if loss.requires_grad:
            loss.backward()
        self.twin.backward(
            lambda leaves: self.twin.forward(self.x.double(), skip, leaves).square().sum()
        )
        self.compare_gradients()

    @contextlib.contextmanager
    def hook(self, handle: Any) -> Generator[None]:
        try:
            yield
        finally:
            handle.remove()


# Surgery --------------------------------------------------------------------------------------


def put_on(pair: Pair) -> None:
    name = pair.choose("plain")
    if name is None:
        return
    dim, eps = pair.rng.choice([0, 0, 1, None]), pair.rng.choice([0.0, 0.0, 1e-6])
    train_g = pair.rng.random() < 0.8
    wn.apply(pair.net, {"names": name, "dim": dim, "eps": eps, "train_g": train_g})
    pair.twin.layers[name].put_on("parametrized", dim, eps, train_g)


def put_on_all(pair: Pair) -> None:
    if not pair.names("parametrized", "legacy"):
        wn.apply(pair.net, {"types": "Linear"})
        for layer in pair.twin.layers.values():
            layer.put_on("parametrized", 0, 0.0, True)


def take_off(pair: Pair) -> None:
    name = pair.choose("parametrized", "legacy")
    if name is not None:
        wn.remove(pair.net, {"names": name})
        pair.twin.layers[name].take_off()


def take_off_by_torch(pair: Pair) -> None:
    name = pair.choose("parametrized")
    if name is not None and all(pair.twin.layers[name].trains[what] for what in "gv"):
        remove_parametrizations(getattr(pair.net, name), "weight")
        pair.twin.layers[name].take_off()


def to_legacy(pair: Pair) -> None:
    layers = [pair.twin.layers[name] for name in pair.names("parametrized")]
    if any(layer.eps for layer in layers):
        malformed_call(pair, lambda: wn.migrate(pair.net, to="legacy"))
        return
    wn.migrate(pair.net, to="legacy")
    for layer in layers:
        layer.layout = "legacy"


def to_parametrized(pair: Pair) -> None:
    wn.migrate(pair.net)
    for name in pair.names("legacy"):
        pair.twin.layers[name].layout = "parametrized"


def fuse(pair: Pair) -> None:
    if pair.names("parametrized"):
        # What is asked for by name must fit all weights.
        wn.fuse(pair.net, "auto" if pair.names("legacy") else pair.rng.choice(MODES))


def unfuse(pair: Pair) -> None:
    wn.unfuse(pair.net)


def malformed_call(pair: Pair, call: Callable[[], object]) -> None:
    try:
        call()
    except (wn.WeightNormError, ValueError, TypeError):
        pair.compare()
    else:
        raise AssertionError("bad input was taken")


def malformed(pair: Pair) -> None:
    bad: list[Callable[[], object]] = [
        lambda: wn.apply(pair.net, {"types": "Conv9"}),
        lambda: wn.apply(pair.net, {"names": "a", "dim": 7, "replace": True}),
        lambda: wn.migrate(pair.net, to="sideways"),  # type: ignore[arg-type]
        lambda: wn.apply(nn.Linear, "linears"),  # type: ignore[arg-type]
        lambda: wn.remove(pair.net, {"names": "nowhere"}),
    ]
    malformed_call(pair, pair.rng.choice(bad))


# Reading and training -------------------------------------------------------------------------


def backward(pair: Pair) -> None:
    pair.backward(skip=pair.rng.random() < 0.3)


def without_grad(pair: Pair) -> None:
    mode = pair.rng.choice([torch.no_grad, torch.inference_mode])
    with mode():
        pair.close(pair.call(), pair.expected(), "output")
        if mode is torch.inference_mode:
            with torch.enable_grad():
                pair.close(pair.call(), pair.expected(), "output in inference mode with grad")


def two_losses(pair: Pair) -> None:
    scope = shared(pair.net) if is_fused(pair.net) else contextlib.nullcontext()
    for parameter in pair.net.parameters():
        parameter.grad = None
    with scope:
        one, other = pair.call().square().sum(), pair.call(skip=True).sin().sum()
    for loss in (one, other):
        if loss.requires_grad:
            loss.backward()
    x = pair.x.double()
    pair.twin.backward(
        lambda leaves: (
            pair.twin.forward(x, False, leaves).square().sum()
            + pair.twin.forward(x, True, leaves).sin().sum()
        )
    )
    pair.compare_gradients()


def second_order(pair: Pair) -> None:
    def penalty(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
        return slope.square().sum()

    for parameter in pair.net.parameters():
        parameter.grad = None
    loss = penalty(pair.net, pair.x.to(pair.dtype))
    wanted = [p for p in pair.net.parameters() if p.requires_grad]
    if wanted:
        for parameter, grad in zip(
            wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True
        ):
            parameter.grad = grad
    pair.twin.backward(
        lambda leaves: penalty(lambda x: pair.twin.forward(x, False, leaves), pair.x.double())
    )
    # A bias behind the last non-linearity: zero here, unused there.
    for key, parameter in pair.parameters().items():
        found, expected = parameter.grad, pair.twin.grads.get(key)
        if found is not None and expected is not None:
            # A small element is a difference of large ones: in float32 the twin is as far off.
            atol = max(1e-4, 1e-5 * float(expected.abs().max()))
            pair.close(found, expected, f"second order of {key}", atol=atol)
        for other in (found, expected):
            assert (found is None) == (expected is None) or other is None or not other.any(), key


def train(pair: Pair) -> None:
    pair.backward(skip=pair.rng.random() < 0.3)
    step(pair)


def step(pair: Pair) -> None:
    kind = pair.rng.choice(["sgd", "adamw", "foreach", "fused", "fused sgd"])
    trained = [p for p in pair.net.parameters() if p.requires_grad]
    if not trained:
        return
    optimizer: torch.optim.Optimizer
    if "sgd" in kind:
        optimizer = torch.optim.SGD(trained, RATE, fused=kind == "fused sgd")
    else:
        optimizer = torch.optim.AdamW(
            trained,
            RATE,
            eps=0.1,
            weight_decay=0.1,
            foreach=kind == "foreach",
            fused=kind == "fused",
        )
    optimizer.step()

    def update(p: Tensor, grad: Tensor) -> Tensor:
        if "sgd" in kind:
            return p - RATE * grad
        return p * (1 - RATE * 0.1) - RATE * grad / (grad.abs() + 0.1)

    pair.twin.step(update)


def freeze(pair: Pair) -> None:
    key = pair.rng.choice(list(pair.parameters()))
    name, what = key.split(".")
    trains = not pair.twin.layers[name].trains[what]
    pair.parameter(name, what).requires_grad_(trains)
    pair.twin.layers[name].trains[what] = trains


def _write(pair: Pair, name: str, through_data: bool) -> None:
    what = pair.rng.choice([key for key in pair.twin.layers[name].values if key != "bias"])
    parameter, factor = pair.parameter(name, what), pair.rng.choice([0.5, 1.5, 2.0])
    if through_data and pair.rng.random() < 0.5:
        parameter.data = parameter.data * factor
    elif through_data:
        parameter.data.mul_(factor)
    else:
        with torch.no_grad():
            parameter.mul_(factor)
    pair.twin.scale(name, what, factor)


def write(pair: Pair) -> None:
    _write(pair, pair.rng.choice(LAYERS), through_data=pair.rng.random() < 0.5)


# Within a call --------------------------------------------------------------------------------


def _within(pair: Pair, act: Callable[[], None], grad: bool) -> None:
    """Do something between the two reads of ``a``, in the network and in the twin."""
    before = pair.twin.leaves()
    acted = False

    def middle() -> None:
        nonlocal acted
        assert not acted
        acted = True
        act()

    pair.net.middle = middle
    try:
        with torch.set_grad_enabled(grad):
            found = pair.call()
            wanted = pair.twin.forward(pair.x.double(), False, before, pair.twin.leaves)
        pair.close(found, wanted, "output of a call with something in between")
        if grad and found.requires_grad:
            found.square().sum().backward()
    finally:
        pair.net.middle = None
        for parameter in pair.net.parameters():
            parameter.grad = None


def write_within(pair: Pair) -> None:
    if pair.twin.layers["a"].layout != "legacy":  # whose hook computes it once a call, as torch's
        _within(pair, lambda: _write(pair, "a", through_data=False), grad=False)


def step_within(pair: Pair) -> None:
    if pair.names("legacy"):
        return
    pair.backward()
    _within(pair, lambda: step(pair), grad=False)


def freeze_within(pair: Pair) -> None:
    if pair.twin.layers["a"].layout == "legacy":
        return
    layer = pair.twin.layers["a"]
    kept = dict(layer.trains)
    for parameter in pair.net.parameters():
        parameter.grad = None
    for what in layer.trains:
        pair.parameter("a", what).requires_grad_(False)
        layer.trains[what] = False

    def thaw() -> None:
        for what in layer.trains:
            pair.parameter("a", what).requires_grad_(True)
            layer.trains[what] = True

    first = pair.twin.leaves()
    pair.net.middle = thaw
    try:
        found = pair.call().square().sum()
        found.backward()
        second: dict[str, dict[str, Tensor]] = {}

        def again() -> dict[str, dict[str, Tensor]]:
            second.update(pair.twin.leaves())
            return {**first, "a": second["a"]}

        wanted = pair.twin.forward(pair.x.double(), False, first, again).square().sum()
        wanted.backward()
        for what in layer.values:
            if what != "bias":
                grad, expected = pair.parameter("a", what).grad, second["a"][what].grad
                assert grad is not None and expected is not None, f"gradient of a.{what}"
                pair.close(grad, expected, f"gradient of a.{what}, thawed within the call")
    finally:
        pair.net.middle = None
        for what, trains in kept.items():
            pair.parameter("a", what).requires_grad_(trains)
            layer.trains[what] = trains
        for parameter in pair.net.parameters():
            parameter.grad = None


def scribble_within(pair: Pair) -> None:
    """A write into the tensor that .weight returns is lost, where the weight is computed."""
    if pair.twin.layers["a"].layout != "parametrized":
        return

    def scribble() -> None:
        with torch.no_grad():
            pair.net.a.weight.fill_(7.0)

    _within(pair, scribble, grad=False)


def interrupt(pair: Pair) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    pair.net.middle = stop
    try:
        pair.call()
    except KeyboardInterrupt:
        pair.net.middle = None
    else:
        raise AssertionError("not interrupted")
    _write(pair, "a", through_data=True)
    direct(pair)


def direct(pair: Pair) -> None:
    name = pair.rng.choice(LAYERS)
    layer = pair.twin.layers[name]
    with torch.no_grad():
        found = getattr(pair.net, name)(pair.x.to(pair.dtype))
    pair.close(
        found,
        pair.x.double() @ layer.weight(layer.values).T + layer.values["bias"],
        f"{name} alone",
    )


def another_thread(pair: Pair) -> None:
    problems: list[BaseException] = []
    expected = pair.expected()
    stop = threading.Event()
    legacy = bool(pair.names("legacy"))

    def work() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    if legacy:
                        return  # one attribute for all threads
                    with wn.folded(pair.net):
                        pair.close(pair.call(), expected, "output in another thread")
                    pair.close(pair.call(), expected, "output in another thread")
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            pair.backward()
    finally:
        stop.set()
        thread.join()
    if problems:
        raise problems[0]


# Contexts, hooks, copies ----------------------------------------------------------------------


def folded(pair: Pair) -> None:
    with wn.folded(pair.net):
        with torch.no_grad(), wn.folded(pair.net):
            pair.close(pair.call(), pair.expected(), "output while folded")
        pair.backward()
    with contextlib.suppress(ZeroDivisionError), torch.no_grad(), wn.folded(pair.net):
        raise ZeroDivisionError


def writable(pair: Pair) -> None:
    name = pair.rng.choice(LAYERS)
    new = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=_generator(pair))
    with contextlib.suppress(ZeroDivisionError), wn.writable(pair.net):
        getattr(pair.net, name).weight.data.copy_(new)
        if pair.twin.layers[name].layout != "plain":
            raise ZeroDivisionError  # nothing was written
    if pair.twin.layers[name].layout == "plain":
        pair.twin.layers[name].write(new)
    with wn.writable(pair.net), torch.no_grad():
        getattr(pair.net, name).weight.copy_(new)
    pair.twin.layers[name].write(new)


def _generator(pair: Pair) -> torch.Generator:
    return torch.Generator().manual_seed(pair.rng.randrange(1 << 30))


def reset(pair: Pair) -> None:
    name, seed = pair.choose("plain", "parametrized"), pair.rng.randrange(1 << 30)
    if name is None:
        return
    torch.manual_seed(seed)
    fresh = nn.Linear(WIDTH, WIDTH, dtype=pair.dtype)
    torch.manual_seed(seed)
    getattr(pair.net, name).reset_parameters()
    pair.twin.layers[name].write(fresh.weight.detach().double())
    pair.twin.layers[name].values["bias"] = fresh.bias.detach().double()


def initialize(pair: Pair) -> None:
    value = pair.rng.uniform(0.2, 0.9)  # never the one that is there: that is no write

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not hasattr(module, "weight_g"):
            nn.init.constant_(module.weight, value)
            module.weight.data[0, 0] = -value

    pair.net.apply(init)
    wanted = torch.full((WIDTH, WIDTH), value, dtype=torch.float64)
    wanted[0, 0] = -value
    for name in pair.names("plain", "parametrized"):
        pair.twin.layers[name].write(wanted)


def hooked_parametrization(pair: Pair) -> None:
    name = pair.choose("parametrized")
    if name is None:
        return
    plist = getattr(pair.net, name).parametrizations.weight
    target = pair.rng.choice([plist, plist[0]])
    layer = pair.twin.layers[name]
    with pair.hook(target.register_forward_hook(lambda *args: 2 * args[-1])), torch.no_grad():
        found = pair.call()
    layer.values["g"] = layer.values["g"] * 2
    pair.close(found, pair.expected(), "output with a hook on the parametrization")
    layer.values["g"] = layer.values["g"] / 2


def hooked_gradients(pair: Pair) -> None:
    trained = [p for p in pair.net.parameters() if p.requires_grad]

    def look(grad: Tensor | None) -> None:
        assert grad is not None, "a gradient hook was called without a gradient"

    with contextlib.ExitStack() as stack:
        for parameter in trained:
            stack.enter_context(pair.hook(parameter.register_hook(look)))
            stack.enter_context(
                pair.hook(parameter.register_post_accumulate_grad_hook(lambda p: look(p.grad)))
            )
        pair.backward(skip=True)


def recomputed(pair: Pair) -> None:
    pair.net.recompute = pair.rng.choice(["reentrant", "non-reentrant"])
    try:
        if pair.net.recompute == "non-reentrant":
            pair.backward()
            # Whatever happens between the forward and its backward.
            for parameter in pair.net.parameters():
                parameter.grad = None
            loss = pair.call().square().sum()
            pair.rng.choice([fuse, unfuse])(pair)
            with torch.no_grad():
                pair.call()
            if loss.requires_grad:
                loss.backward()
            pair.compare_gradients()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no input of the checkpoint trains
                if all(pair.twin.layers["a"].trains.values()):
                    pair.backward()
    finally:
        pair.net.recompute = ""


def copied(pair: Pair) -> None:
    if not pair.names("legacy"):  # torch's hook keeps a tensor that cannot be copied
        pair.net = pair.rng.choice([copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])(
            pair.net
        )


def cast(pair: Pair) -> None:
    pair.net.to(pair.rng.choice([torch.float32, torch.float64]))


def loaded(pair: Pair) -> None:
    state: dict[str, Tensor] = {}
    for name, layer in pair.twin.layers.items():
        if layer.layout == "plain":
            layer.values["w"] = layer.values["w"] * 1.5
            state[f"{name}.weight"] = layer.values["w"]
        else:
            layer.values["g"] = layer.values["g"] * 1.5
            layout = pair.rng.choice(
                ["legacy"] if layer.layout == "legacy" else ["plain", "legacy", "parametrized"]
            )
            if layout == "plain":
                w = layer.weight(layer.values)
                layer.write(w)
                state[f"{name}.weight"] = w
            else:
                g, v = KEYS[layout]  # type: ignore[index]
                state |= {f"{name}.{g}": layer.values["g"], f"{name}.{v}": layer.values["v"]}
        state[f"{name}.bias"] = layer.values["bias"]
    pair.net.load_state_dict({key: value.to(pair.dtype) for key, value in state.items()})


OPERATIONS: tuple[Callable[[Pair], None], ...] = (
    put_on, put_on_all, put_on_all, take_off, take_off_by_torch, to_legacy, to_parametrized,
    fuse, fuse, fuse, unfuse, malformed,
    backward, backward, without_grad, two_losses, second_order, train, train, freeze, write, write,
    write_within, step_within, freeze_within, scribble_within, interrupt, direct, another_thread,
    folded, writable, reset, initialize, hooked_parametrization, hooked_gradients, recomputed,
    copied, cast, loaded,
)  # fmt: skip
