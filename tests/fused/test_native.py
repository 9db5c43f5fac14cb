"""The compiled path: its bits, how it is built, and what it leaves behind."""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.fused.models import COMPILER, Net, X, normed
from tests.torch_facts.versions import OLD
from wn_surgery.fused.native import building

pytestmark = [
    pytest.mark.xdist_group("native"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def compiled() -> Net:
    model = normed()
    wn.fuse(model, "native")
    return model


class Reads(nn.Module):
    """Weights of many kinds, and a forward that reads them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Any]:
        return [layer.weight for layer in self.layers]


def channels_last() -> nn.Module:
    return nn.Conv2d(6, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{f"row of {n}": lambda n=n: nn.Linear(n, 7) for n in (1, 3, 8, 15, 64, 129)},
    "convolution": lambda: nn.Conv1d(24, 24, 3),
    "large": lambda: nn.Linear(300, 200),
    "channels last": channels_last,
    "float64": lambda: nn.Linear(9, 4).double(),
    "bfloat16": lambda: nn.Linear(40, 4).bfloat16(),
    "float16": lambda: nn.Linear(40, 4).half(),
    "transposed": lambda: nn.ConvTranspose1d(6, 4, 2),
}
TYPES = ["Linear", "Conv1d", "Conv2d", "ConvTranspose1d"]
OPTIONS = [{}, {"dim": 1}, {"dim": "out"}, {"dim": None}, {"eps": 1e-3}, {"dim": [0, 1]}]


def made(options: dict[str, Any], kind: str) -> Reads:
    torch.manual_seed(0)
    model = Reads([LAYERS[kind](), LAYERS[kind](), nn.Linear(5, 3)])
    if any(p.dtype is not torch.float32 for p in model.layers[0].parameters()):
        options = {**options, "norm_dtype": "float32"} if options.get("eps") else options
    wn.apply(model, {"types": TYPES, **options})
    with torch.no_grad():
        for layer in model.layers:
            layer.parametrizations.weight.original0.mul_(1.5)  # type: ignore[union-attr,operator]
    return model


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_of_values_and_gradients(options: dict[str, Any], kind: str) -> None:
    usual, fused = made(options, kind), made(options, kind)
    wn.fuse(fused, "native")
    with torch.no_grad():
        for w, x in zip(usual(), fused(), strict=True):
            assert torch.equal(w, x) and w.stride() == x.stride() and not x.requires_grad
    seeds = [torch.randn_like(w) for w in usual()]
    for model in (usual, fused):
        torch.autograd.backward(model(), seeds)
    for p, q in zip(usual.parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            assert torch.equal(p.grad, q.grad) and p.grad.stride() == q.grad.stride()


def test_second_derivatives_and_batched_gradients() -> None:
    found: list[list[Tensor]] = []
    for model in (normed(), compiled()):
        parameters = list(model.parameters())
        out = model(X).square().sum()
        first = torch.autograd.grad(out, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        out = model(X)
        many = torch.eye(out.numel()).view(-1, *out.shape)
        batched = torch.autograd.grad(out, parameters, many, is_grads_batched=True)
        found.append([*first, *second, *batched])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_backward_reaches_what_it_reaches() -> None:
    usual, fused = normed(), compiled()
    for model in (usual, fused):
        for part in (model.front.parametrizations.weight, model.middle[2].parametrizations.weight):  # type: ignore[union-attr]
            part.original0.requires_grad_(False)  # type: ignore[union-attr,operator]
        model.head.parametrizations.weight.original1.requires_grad_(False)  # type: ignore[union-attr,operator]
        model(X).sum().backward()
    for p, q in zip(usual.parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (q.grad is not None and torch.equal(p.grad, q.grad))


def test_a_write_between_forward_and_backward() -> None:
    model = compiled()
    loss = model(X).sum()
    with torch.no_grad():
        model.front.parametrizations.weight.original1.add_(1)  # type: ignore[union-attr,operator]
    with pytest.raises(RuntimeError, match=r"the v of a weight of shape \(6, 2, 3\) is at version"):
        loss.backward()


def test_the_loops_give_the_bits_of_torchs_kernels() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    wanted = {"AVX2": 8, "AVX512": 16}.get(capability)
    if wanted is None or OLD:
        pytest.skip(f"what {capability} gives in torch {torch.__version__} is not known")
    assert building.load().lanes == wanted


def test_nothing_is_left() -> None:
    gc.collect()
    gc.disable()
    try:
        model = compiled()
        model(X).sum().backward()
        with torch.no_grad():
            model(X)
        gone = weakref.ref(model), weakref.ref(model.front.parametrizations.weight.original1)  # type: ignore[union-attr]
        del model
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


def test_a_cycle_through_a_hook_is_collected() -> None:
    model = compiled()
    model(X)
    norm = model.front.parametrizations.weight[0]  # type: ignore[union-attr,index]
    norm.register_forward_hook(functools.partial(lambda *_: None, model))  # type: ignore[union-attr,operator]
    gone = weakref.ref(model)
    del model, norm
    gc.collect()
    assert gone() is None


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_fused_on_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = compiled()
    wanted = model(X)
    other = copied(model)
    assert torch.equal(other(X), wanted)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert torch.equal(model(X), wanted) and not torch.equal(other(X), wanted)


# How it is built ----------------------------------------------------------------------------


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As if nothing had been built or loaded; the folder for what is."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    for cached in (building.load, building.why_not):
        cached.cache_clear()
    yield tmp_path
    for cached in (building.load, building.why_not):
        cached.cache_clear()


@pytest.fixture
def broken(anew: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that fails; the folder for what is built."""
    source = anew / "slots.cpp"
    source.write_text("#error no such luck\n", encoding="utf-8")
    monkeypatch.setattr(building, "_SOURCE", source)
    return anew / "built"


def test_what_cannot_be_compiled_is_an_error_that_changes_nothing(broken: Path) -> None:
    model = normed()
    before = list(vars(model.front.parametrizations.weight))  # type: ignore[arg-type]
    with pytest.raises(wn.ModelError, match=r"C\+\+ compiler(.|\n)*no such luck") as caught:
        wn.fuse(model, "native")
    assert caught.value.kind == "fusion" and "mode='auto'" in str(caught.value)
    assert not model._forward_pre_hooks
    assert list(vars(model.front.parametrizations.weight)) == before  # type: ignore[arg-type]
    assert not broken.exists()


def test_what_is_kept_and_cannot_be_loaded_is_built_again(broken: Path) -> None:
    name = building._name()
    place = broken / name / f"{name}{EXTENSION_SUFFIXES[0]}"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"no program")
    with pytest.raises(wn.ModelError, match="no such luck"):  # by the compiler, not the loader
        wn.fuse(normed(), "native")


def test_a_copy_where_nothing_can_be_compiled(request: pytest.FixtureRequest) -> None:
    model = compiled()
    wanted = model(X)
    request.getfixturevalue("broken")
    other = copy.deepcopy(model)
    assert torch.equal(other(X), wanted)
    (before, after) = (next(iter(m._forward_pre_hooks.values())).fusion for m in (model, other))
    assert {m.path for m in before.members} == {"native"}
    assert {m.path for m in after.members} == {"cpu"} and "no such luck" in after.members[0].why


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    made = tmp_path / "made.so"
    made.write_bytes(b"program")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.warns(UserWarning, match="TORCH_EXTENSIONS_DIR"):
        building._keep(made, tmp_path / "file" / "name" / "made.so")
    building._keep(made, tmp_path / "new" / "name" / "made.so")
    assert (tmp_path / "new" / "name" / "made.so").read_bytes() == b"program"
    assert [path.name for path in (tmp_path / "new" / "name").iterdir()] == ["made.so"]


def test_another_torch_has_a_build_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    name = building._name()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert building._name() != name


def test_only_the_cpu() -> None:
    model = nn.Linear(3, 2, device="meta")
    wn.apply(model, {"names": ""})
    with pytest.raises(wn.ModelError, match="meta device"):
        wn.fuse(model, "native")
