"""A stripped copy: plain, equal to the bit, and made without touching the live model."""

from __future__ import annotations

import copy
import copyreg
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests import makers
from tests.fingerprints import Fingerprint, assert_same, of_model
from tests.makers import normed
from wn_surgery.export import stripped_copy
from wn_surgery.fused import is_fused


class Net(nn.Module):
    """Convolutions, an RNN, batch statistics, a tie, a layer of which only some has a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 6, 4, stride=2, padding=1)
        self.body = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.rnn = nn.LSTM(8, 4, batch_first=True, proj_size=3)
        self.mixed = nn.MultiheadAttention(3, 1, batch_first=True)
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.again = self.body  # one module under two names

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.again(self.up(x).relu())).transpose(1, 2)
        y = self.rnn(y)[0]
        logits: Tensor = self.head(self.mixed(y, y, y)[0] + self.embedding.weight.mean(0))
        return logits


NORMED = [
    ("up", "weight"),
    ("body", "weight"),
    ("rnn", "weight_hh_l0"),
    ("rnn", "weight_hr_l0"),
    ("mixed", "in_proj_weight"),
]
RULES = [{"names": path, "params": param} for path, param in NORMED]


def legacy(model: nn.Module) -> None:
    for path, param in NORMED:
        makers.legacy(model.get_submodule(path), param)


def parametrized(model: nn.Module) -> None:
    for path, param in NORMED:
        nn.utils.parametrizations.weight_norm(model.get_submodule(path), param)


def ours(model: nn.Module) -> None:
    wn.apply(model, RULES)


def fused(model: nn.Module) -> None:
    wn.apply(model, RULES)
    wn.fuse(model)


LAYOUTS: list[Callable[[nn.Module], None]] = [legacy, parametrized, ours, fused]
# When it is copied, torch's own RNN reads its computed weights into these again.
AGAIN = ("rnn: ._flat_weights", "rnn: ._flat_weight_refs")
X = torch.sin(torch.arange(2 * 2 * 5) / 3.0).reshape(2, 2, 5)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        yield


def made(layout: Callable[[nn.Module], None] | None = None) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    if layout is not None:
        layout(model)
    return model


def seen(model: nn.Module) -> Fingerprint:
    """The live model by identity, once Python has made the notes that copying puts on classes."""
    for module in model.modules():
        copyreg._slotnames(type(module))  # type: ignore[attr-defined]
    return of_model(model, identity=True)


@pytest.mark.parametrize("state", ["as built", "after a forward", "folded", "folded in grad mode"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_copy_is_plain_and_equal_and_the_live_model_is_as_it_was(
    layout: Callable[[nn.Module], None], state: str
) -> None:
    model = made(layout)
    twin = made(layout)
    wn.remove(twin)
    with torch.no_grad():
        expected = model(X)
    with ExitStack() as stack:
        if state == "after a forward":
            model(X)  # leaves tensors with a graph behind
        elif state.startswith("folded"):
            if state == "folded":
                stack.enter_context(torch.no_grad())
            stack.enter_context(wn.folded(model))
        random = torch.get_rng_state()
        before = seen(model)
        plain = stripped_copy(model)
        assert_same(before, seen(model), skip=AGAIN)
        assert torch.equal(torch.get_rng_state(), random)
    assert type(plain) is Net
    assert not normed(plain)
    # Nothing is left of weight norm: it is what removing it from the model itself gives.
    assert_same(of_model(twin), of_model(plain))
    with torch.no_grad():
        assert torch.equal(plain(X), expected)
        assert torch.equal(model(X), expected)
    assert is_fused(model) == (layout is fused)
    assert not is_fused(plain)
    assert len(normed(model)) == len(NORMED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_costs_the_memory_of_the_computed_weights(layout: Callable[[nn.Module], None]) -> None:
    model = made(layout)
    plain = stripped_copy(model)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own = {
        name: parameter
        for name, parameter in plain.named_parameters()
        if parameter.untyped_storage().data_ptr() not in held
    }
    assert sorted(own) == sorted(f"{path}.{param}" for path, param in NORMED)
    live = dict(model.named_parameters())
    shared = plain.named_parameters()
    assert all(parameter is not live.get(name) for name, parameter in shared)
    assert plain.head.weight is plain.embedding.weight


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_done_to_the_copy_is_not_done_to_the_model(
    layout: Callable[[nn.Module], None],
) -> None:
    model = made(layout)
    model.embedding.weight.tag = "kept"  # type: ignore[attr-defined]
    before = seen(model)
    plain = stripped_copy(model)
    assert plain.embedding.weight.tag == "kept"  # type: ignore[attr-defined]
    plain.train()(X).sum().backward()  # batch statistics and gradients
    plain.requires_grad_(False).double()(X.double())
    plain.to("meta")
    assert_same(before, seen(model), skip=AGAIN)
    assert stripped_copy(made(layout)).training is False
    assert stripped_copy(made(layout).train()).training is True


def test_parameters_are_shared_and_buffers_are_not() -> None:
    """As its documentation says: what the live model learns goes on in the copy's plain layers."""
    model = made(ours)
    plain = stripped_copy(model)
    apart = copy.deepcopy(plain)
    with torch.no_grad():
        model.embedding.weight.fill_(3.0)
        model.body.parametrizations.weight.original0.zero_()  # type: ignore[union-attr, index]
        model.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]
    assert bool((plain.embedding.weight == 3.0).all())
    assert bool(plain.body.weight.any())
    assert not bool((plain.norm.running_mean == 3.0).any())  # type: ignore[union-attr]
    assert not bool((apart.embedding.weight == 3.0).any())


def test_frozen_and_tied_weights_stay_so() -> None:
    model = made()
    model.body.weight.requires_grad_(False)
    wn.apply(model, [{"names": "body"}, {"names": "{embedding,head}", "tied": "together"}])
    plain = stripped_copy(model)
    assert plain.body.weight.requires_grad is False
    assert plain.body.bias is not None and plain.body.bias.requires_grad
    assert plain.head.weight is plain.embedding.weight
    assert plain.again is plain.body


class Remembering(nn.Module):
    """Keeps what its last forward made, as stateful networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls = 0
        self.seen: dict[str, list[Tensor]] = {"outputs": []}
        self.layer.register_forward_hook(self.count)

    def count(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        self.seen["outputs"].append(self.layer(x))
        return self.seen["outputs"][-1]


def test_what_a_forward_left_behind_is_copied() -> None:
    model = Remembering()
    wn.apply(model, "linears")
    out = model(torch.ones(1, 2))
    model.itself = {"loop": []}  # type: ignore[assignment]
    model.itself["loop"].append(model.itself)  # type: ignore[operator, index]
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    plain = stripped_copy(model)
    assert torch.equal(plain.seen["outputs"][0], out)
    assert plain.seen["outputs"][0].grad_fn is None
    assert model.seen["outputs"][0] is out
    plain(torch.ones(1, 2))
    # A hook that is a method of the model is the copy's own.
    assert (model.calls, plain.calls) == (1, 2)
    assert len(model.seen["outputs"]) == 1


def test_a_compiled_model_gives_the_model() -> None:
    model = made(ours)
    with torch.no_grad():
        expected = model(X)
        plain = stripped_copy(torch.compile(model, backend="eager"))
        assert type(plain) is Net and torch.equal(plain(X), expected)
    within = nn.Sequential(nn.Linear(2, 2))
    wn.apply(within, "linears")
    within[0].compile(backend="eager")
    assert not normed(stripped_copy(within))


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    wn.apply(model, "linears")
    model[0].lock = threading.Lock()
    before = seen(model)
    with pytest.raises(wn.ExportError, match=r"Sequential cannot be copied: 0\.lock \(lock\)"):
        stripped_copy(model)
    assert_same(before, seen(model))


def test_what_cannot_be_stripped_is_said_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    wn.apply(model, "linears")
    before = seen(model)
    with torch.inference_mode(), pytest.raises(wn.InferenceModeError, match=r"0\.weight"):
        stripped_copy(model)
    assert_same(before, seen(model))
    nn.utils.parametrizations.spectral_norm(model[0])
    before = seen(model)
    with pytest.raises(wn.StackedParametrizationError, match=r"0\.weight"):
        stripped_copy(model)
    assert_same(before, seen(model))


def test_a_wrapped_model_is_refused_with_what_to_copy(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = nn.Sequential(nn.Linear(2, 2))
        wn.apply(model, "linears")
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(wn.WrappedModuleError, match=r"stripped_copy\(ddp\.module\)"):
            stripped_copy(wrapped)
        assert not normed(stripped_copy(wrapped.module))
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_weight_norm_is_copied_too() -> None:
    model = made()
    plain = stripped_copy(model)
    assert_same(of_model(model), of_model(plain))
    assert plain.up.weight.data_ptr() == model.up.weight.data_ptr()


def test_a_script_in_the_model_is_copied_as_it_is() -> None:
    with warnings.catch_warnings(action="ignore"):  # deprecated
        model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 2))
    wn.apply(model, names="1")
    x = torch.ones(1, 3)
    plain = stripped_copy(model)
    assert torch.equal(plain(x), model(x)) and type(plain[1]) is nn.Linear
