"""What fusing a model changes, and what it does not; and which weights it leaves out."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wn_surgery as wn
from tests.fused.models import Net, X, assert_same, fused, nodes, normed, train
from wn_surgery.fused import shared
from wn_surgery.fused.choice import choose, cut


def test_values_are_the_same_bit_for_bit() -> None:
    assert torch.equal(fused()(X), normed()(X))


def test_one_node_for_the_group() -> None:
    assert len(nodes(fused())) == 1 and len(nodes(normed())) == 5


def test_training_is_the_same() -> None:
    assert_same()


def test_training_on_axes_that_torch_has_kernels_for_is_bit_exact() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.Tanh(), nn.Conv1d(6, 6, 3))
        wn.apply(model, {"types": "Conv1d"})
        return model

    plain, whole = make(), make()
    wn.fuse(whole)
    for a, b in zip(train(whole), train(plain), strict=True):
        assert torch.equal(a, b)


def test_names_and_state_dicts_are_untouched() -> None:
    model, other = fused(), normed()
    model(X)
    assert list(model.state_dict()) == list(other.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in other.named_modules()]
    assert [(s.name, s.layout) for s in wn.sites(model)] == [
        (s.name, s.layout) for s in wn.sites(other)
    ]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_fused_on_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = fused()
    model(X).sum().backward()
    twin = copied(model)
    assert torch.equal(twin(X), normed()(X)) and len(nodes(twin)) == 1
    if copied is not copy.copy:
        with torch.no_grad():
            twin.front.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr,operator]
        assert not torch.equal(twin(X), model(X))
    assert torch.equal(model(X), normed()(X)) and len(nodes(model)) == 1


def test_unfuse_leaves_nothing() -> None:
    model, other = fused(), normed()
    model(X)
    assert wn.unfuse(model) == 1
    for a, b in zip(model.modules(), other.modules(), strict=True):
        assert a.__dict__.keys() == b.__dict__.keys()
        assert not a._forward_hooks and not a._forward_pre_hooks
        assert not a._forward_hooks_always_called
    assert torch.equal(model(X), other(X))


def test_fusing_again_replaces_the_first() -> None:
    model = fused()
    wn.fuse(model)
    assert len(model._forward_pre_hooks) == 1 and len(nodes(model)) == 1
    assert wn.unfuse(model) == 1


def test_a_dropped_model_is_freed_without_the_collector() -> None:
    model = fused()
    model(X).sum().backward()
    weights = [weakref.ref(model.front.parametrizations.weight.original1)]  # type: ignore[union-attr,arg-type]
    gc.disable()
    try:
        del model
        assert weights[0]() is None
    finally:
        gc.enable()


def test_torchs_parametrization_becomes_ours() -> None:
    model = Net()
    plain = copy.deepcopy(model)
    parametrizations.weight_norm(model.front)
    g = model.front.parametrizations.weight.original0  # type: ignore[union-attr]
    fusion = wn.fuse(model)
    assert [(m.name, m.path) for m in fusion.members] == [("front.weight", "cpu")]
    assert model.front.parametrizations.weight.original0 is g  # type: ignore[union-attr]
    torch.testing.assert_close(model(X), plain(X))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_legacy_hook_is_left_out_until_migrated() -> None:
    model = normed()
    wn.remove(model.middle[2])
    torch.nn.utils.weight_norm(model.middle[2])  # type: ignore[arg-type]
    fusion = wn.fuse(model)
    left_out = {m.name: m.why for m in fusion.members if m.path == "off"}
    assert left_out == {"middle.2.weight": "legacy layout: call wn_surgery.migrate(model) first"}
    assert "middle.2.weight  off          legacy" in str(fusion)
    before = model(X)
    wn.migrate(model)
    assert {m.path for m in fusion.members} == {"cpu"}
    assert torch.equal(model(X), before)


def test_repr_and_table() -> None:
    fusion = wn.fuse(normed())
    assert repr(fusion) == "Fusion(mode='auto', {'cpu': 5})"
    assert str(fusion).endswith("5 of 5 weights in 1 groups")


def test_groups_are_cut_at_dtype_and_size() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4), nn.Linear(4, 4),
        nn.Linear(600, 600), nn.Linear(4, 4),
    )  # fmt: skip
    wn.apply(model, {"types": "Linear"})
    assert [m.group for m in wn.fuse(model).members] == [0, 1, 2, 2, 3, 4]
    assert list(cut([])) == []


def test_auto_takes_torchs_operators_on_cuda_and_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wn_surgery.fused.choice._why_off", lambda site: "")

    def chosen(device: str) -> tuple[str, str]:
        site: Any = SimpleNamespace(tensor=SimpleNamespace(device=torch.device(device)))
        choice = choose(site, "auto")
        return choice.path, choice.why

    assert chosen("cuda") == chosen("cpu") == ("cpu", "")
    assert chosen("mps") == ("off", "no fused path on mps")


@pytest.mark.parametrize("device", ["meta"])
def test_the_meta_device_is_left_out(device: str) -> None:
    model = normed().to(device)
    fusion = wn.fuse(model)
    assert {m.why for m in fusion.members} == {"its parameters are on the meta device"}
    assert model(X.to(device)).shape == (2, 4, 3)


class Mine(Tensor):
    """A class of somebody's tensors."""


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.ones(4, 1)


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("original0", torch.ones(4, 1).as_subclass(Mine), "its parameters are of class Mine"),
        ("original0", inference_tensor(), "were made under torch.inference_mode()"),
        ("original0", torch.ones(4, 1).double(), "g and v differ in dtype or device"),
        ("original1", torch.ones(4, 3, dtype=torch.complex64), "no fused path for complex64"),
        ("original1", torch.ones(4, 0), "it has no elements"),
    ],
)
def test_parameters_that_no_group_takes(part: str, value: Tensor, why: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    wn.apply(model, nn.Linear)
    plist: Any = model[0].parametrizations
    setattr(plist.weight, part, nn.Parameter(value, requires_grad=False))
    (member,) = wn.fuse(model).members
    assert member.path == "off" and why in member.why


def test_torchs_parametrization_that_came_later_is_left_out_until_migrated() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    wn.apply(model[0], nn.Linear)
    fusion = wn.fuse(model)
    parametrizations.weight_norm(model[1])
    wn.apply(model[2], nn.Linear)
    before = model(torch.ones(2, 3))
    assert [member.path for member in fusion.members] == ["cpu", "off", "cpu"]
    assert "call wn_surgery.migrate(model) first" in fusion.members[1].why
    wn.migrate(model)
    assert torch.equal(model(torch.ones(2, 3)), before)
    assert [member.path for member in fusion.members] == ["cpu"] * 3


def test_unfusing_lets_go_of_an_interrupted_call() -> None:
    class Held:
        pass

    class Interrupted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal reference
            held = Held()
            reference = weakref.ref(held)
            super().forward(x)
            raise KeyboardInterrupt

    reference: weakref.ref[Held] | None = None
    model = Interrupted(nn.Linear(3, 4))
    wn.apply(model, nn.Linear)
    wn.fuse(model)
    try:
        model(torch.ones(2, 3))
    except KeyboardInterrupt as error:
        error.__traceback__ = None
    wn.unfuse(model)
    assert reference is not None and reference() is None


def test_what_cannot_be_fused_is_an_error() -> None:
    with pytest.raises(wn.FusionError, match="Net has no weight-normed parameter to fuse"):
        wn.fuse(Net())
    with pytest.raises(ValueError, match="expected one of 'auto', 'triton', 'cpu'"):
        wn.fuse(normed(), "fast")  # type: ignore[arg-type]
    model = normed().to("meta")
    with pytest.raises(wn.FusionError, match=r"front.weight \(and 4 more\) cannot take .*'cpu'"):
        wn.fuse(model, "cpu")
    assert not model._forward_pre_hooks
    assert not any("_fused_weight" in m.__dict__ for m in model.modules())
    with pytest.raises(wn.FusionError, match="Net is not fused"), shared(Net()):
        raise AssertionError("not reached")
    model = normed()
    for context in (wn.folded, wn.writable):
        with context(model), pytest.raises(wn.FoldedModelError, match="front is inside"):
            wn.fuse(model)


def test_a_site_belongs_to_one_root() -> None:
    model = fused()
    inner = wn.fuse(model.middle)
    assert {m.why for m in inner.members} == {"another fused module above or below has it already"}
    assert torch.equal(model(X), normed()(X)) and len(nodes(model)) == 1
