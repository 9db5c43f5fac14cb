"""Directions that are put back: the function stays, the effective learning rate is constant."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

import wn_surgery as wn
from tests.makers import Tied, legacy, ours, parametrized, shaken
from wn_surgery.model import records
from wn_surgery.rules.sources import dump_rules, load_rules

RENORMALIZED: dict[str, Any] = {"types": "Linear", "renormalize": True}


def mlp(**options: Any) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    wn.apply(net, {**RENORMALIZED, **options})
    return net


def norms(model: nn.Module) -> list[Tensor]:
    """‖v‖ of each slice, in float64."""
    found = []
    for site in wn.sites(model):
        v = site.held.v.detach()  # type: ignore[union-attr]
        kept = [] if site.dim is None else [site.dim] if isinstance(site.dim, int) else site.dim
        axes = [axis for axis in range(v.ndim) if axis not in kept]
        found.append(v.double().square().sum(axes).sqrt() if axes else v.double().abs())
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return all(torch.equal(now[key], value) for key, value in before.items())


# What it does to a model -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (lambda: nn.Linear(5, 7), {}),
        (lambda: nn.Linear(5, 7), {"dim": 1}),
        (lambda: nn.Linear(5, 7), {"dim": None}),
        (lambda: nn.Linear(5, 7), {"dim": [0, 1]}),
        (lambda: nn.Linear(5, 7), {"eps": 1e-3}),
        (lambda: nn.Linear(5, 7, dtype=torch.float64), {}),
        (lambda: nn.Linear(5, 7, dtype=torch.float64), {"norm_dtype": "float32"}),
        (lambda: nn.Linear(5, 7, dtype=torch.bfloat16), {"norm_dtype": "float32"}),
        (lambda: nn.Linear(5, 7, dtype=torch.float16), {}),
        (lambda: nn.Conv2d(3, 4, 3), {"dim": [0, 1]}),
        (lambda: nn.ConvTranspose1d(3, 4, 3), {"dim": "out"}),
        (lambda: nn.Linear(300, 1000), {}),  # too large to be stacked
    ],
)
@torch.no_grad()
def test_the_weight_stays_and_the_norm_is_as_asked(layer: Any, options: dict[str, Any]) -> None:
    model = nn.Sequential(layer(), layer())
    wn.apply(model, {"names": "*", **options})
    shaken(model, 0.5)
    before = [module.weight.clone() for module in model]
    computed = getattr(torch, options.get("norm_dtype", "float64"))
    last = torch.finfo(before[0].dtype).eps
    digits = max(last, torch.finfo(computed).eps)
    for norm, expected in ((1.0, 1.0), (3.0, 3.0), ("rms", None)):
        assert wn.renormalize(model, norm) == ("0.weight", "1.weight")  # type: ignore[arg-type]
        for site, found in zip(wn.sites(model), norms(model), strict=True):
            slices = found.numel() if expected is None else 1
            wanted = math.sqrt(math.prod(site.shape) / slices) if expected is None else expected
            torch.testing.assert_close(
                found, torch.full_like(found, wanted), rtol=4 * last, atol=0.0
            )
    for module, weight in zip(model, before, strict=True):
        # Three roundings of v, and those of the forward.
        torch.testing.assert_close(module.weight, weight, rtol=8 * digits, atol=0.0)


@pytest.mark.parametrize("put", [legacy, parametrized, ours])
def test_every_layout(put: Any) -> None:
    model = nn.Sequential(put(nn.Conv1d(3, 4, 3)))
    x = torch.randn(2, 3, 9)
    before = model(x)
    assert wn.renormalize(model, 2.0) == ("0.weight",)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(norms(model)[0], torch.full((4,), 2.0, dtype=torch.float64))


def test_complex_weights() -> None:
    layer = nn.Linear(4, 3, dtype=torch.complex64)
    wn.apply(layer, names="")
    before = layer.weight.detach().clone()
    wn.renormalize(layer, 1.0)
    torch.testing.assert_close(layer.weight.detach(), before)
    v = layer.parametrizations.weight.original1  # type: ignore[union-attr]
    torch.testing.assert_close(v.detach().norm(dim=1), torch.ones(3, dtype=v.real.dtype))


def test_a_tied_direction_is_scaled_once() -> None:
    model = Tied()
    wn.apply(model, {"names": "head", "tied": "together", "renormalize": 0.5})
    assert wn.renormalize(model) == ("embed.weight",)
    for found in norms(model):
        torch.testing.assert_close(found, torch.full((5,), 0.5, dtype=torch.float64))


def test_ends_of_a_tie_that_want_different_norms() -> None:
    model = Tied()
    wn.apply(model, {"names": "head", "tied": "together", "renormalize": 0.5})
    model.head.parametrizations.weight.renormalize = 2.0  # type: ignore[union-attr,assignment]
    before = state(model)
    with pytest.raises(wn.ModelError, match=r"head\.weight and embed\.weight share one v.*2 along"):
        wn.renormalize(model)
    assert unchanged(model, before)


def test_frozen_directions_stay_bit_for_bit() -> None:
    model = mlp()
    frozen = model[0].parametrizations.weight.original1  # type: ignore[union-attr]
    frozen.requires_grad_(False)  # type: ignore[union-attr,operator]
    before = frozen.detach().clone()  # type: ignore[union-attr,operator]
    assert wn.renormalize(model) == ("2.weight", "4.weight")
    assert torch.equal(frozen, before)  # type: ignore[arg-type]
    model.requires_grad_(False)
    assert wn.renormalize(model) == ()


def test_a_fused_model_sees_it() -> None:
    model, x = mlp(), torch.randn(4, 6)
    twin = copy.deepcopy(model)
    wn.fuse(model, "cpu")
    with torch.no_grad():
        model(x)
        site = next(s for s in wn.sites(model) if s.name == "2.weight")
        for each in (site.held, next(s for s in wn.sites(twin) if s.name == "2.weight").held):
            each.v[0] *= -1  # type: ignore[union-attr]
    for net in (model, twin):
        wn.renormalize(net)
    assert torch.equal(model(x), twin(x))


def test_few_calls_whatever_the_number_of_layers() -> None:
    class Count(TorchDispatchMode):
        calls = 0

        @override
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            # Making a view starts nothing on a device.
            self.calls += (
                not torch._C._dispatch_has_kernel_for_dispatch_key(
                    func.name(), "CompositeImplicitAutograd"
                )
                and "view" not in str(func.tags)
                and func.overloadpacket not in VIEWS
            )
            return func(*args, **(kwargs or {}))

    def calls(layers: int) -> int:
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
        wn.apply(model, RENORMALIZED)
        with Count() as count:
            assert len(wn.renormalize(model)) == layers
        return count.calls

    assert calls(40) == calls(4) <= 12


VIEWS = {torch.ops.aten.unbind, torch.ops.aten.detach, torch.ops.aten.unsqueeze}


# eps, and what g has to do ---------------------------------------------------------------


def test_g_absorbs_what_eps_has_held_back() -> None:
    layer = nn.Linear(16, 3, bias=False, dtype=torch.float64)
    wn.apply(layer, {"names": "", "eps": 0.25})
    v = layer.parametrizations.weight.original1  # type: ignore[union-attr]
    g = layer.parametrizations.weight.original0  # type: ignore[union-attr]
    with torch.no_grad():
        v[1] *= 1e-3  # type: ignore[index]
    before, kept = layer.weight.detach().clone(), g.detach().clone()  # type: ignore[operator]
    assert (v.norm(dim=1) > 0.25).tolist() == [True, False, True]  # type: ignore[operator,union-attr]
    wn.renormalize(layer, 1.0)
    torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-14, atol=0.0)
    # A slice above eps keeps its g to the bit.
    assert torch.equal(g[0::2], kept[0::2]) and not torch.equal(g[1], kept[1])  # type: ignore[index]


def test_a_frozen_g_has_nothing_to_absorb_with() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    wn.apply(model, {"types": "Linear", "eps": 0.1, "train_g": False})
    assert wn.renormalize(model, 1.0) == ("0.weight", "1.weight")  # all norms are above eps
    with torch.no_grad():
        model[1].parametrizations.weight.original1[2] *= 1e-3  # type: ignore[union-attr,index]
    before = state(model)
    with pytest.raises(wn.ModelError, match=r"1\.weight has 1 slice\(s\).*below eps=0\.1.*frozen"):
        wn.renormalize(model, 1.0)
    assert unchanged(model, before)
    model[1].parametrizations.weight.original0.requires_grad_(True)  # type: ignore[union-attr]
    weight = model[1].weight.detach().clone()
    wn.renormalize(model, 1.0)
    torch.testing.assert_close(model[1].weight.detach(), weight)


def test_a_norm_below_eps() -> None:
    model = mlp(renormalize=None, eps=0.5)
    before = state(model)
    with pytest.raises(wn.ModelError, match=r"0\.weight has eps=0\.5.*put back to norm 0\.25"):
        wn.renormalize(model, 0.25)
    assert unchanged(model, before)
    with pytest.raises(wn.RuleError, match=r"weight has eps=2\.0.*put back to norm 1"):
        wn.apply(nn.Linear(2, 2), {**RENORMALIZED, "eps": 2.0})
    with pytest.raises(wn.RuleError, match=r"float16, which norm 1e\+06 does not fit"):
        wn.apply(nn.Linear(2, 2).half(), {**RENORMALIZED, "renormalize": 1e6})


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-30])
def test_a_slice_without_a_direction_changes_nothing(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].parametrizations.weight.original1[3].fill_(value)  # type: ignore[union-attr,index]
    before = {key: value for key, value in state(model).items() if not value.isnan().any()}
    with pytest.raises(wn.ZeroNormError, match=r"2\.weight has 1 slice\(s\) along dim=0") as caught:
        wn.renormalize(model)
    assert caught.value.site == "2.weight" and unchanged(model, before)


def test_what_has_no_weight_norm() -> None:
    with pytest.raises(wn.ModelError, match="Linear has no weight norm to renormalize"):
        wn.renormalize(nn.Linear(2, 2), 1.0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wn.apply(model, names="0")
    with pytest.raises(
        wn.UnmatchedRuleError, match=r"names='1' matches no module with weight norm"
    ):
        wn.renormalize(model, 1.0, names=["0", "1"])
    assert wn.renormalize(model, 1.0, names="0") == ("0.weight",)
    with pytest.raises(
        wn.ModelError, match=r"no weight norm of Sequential says.*renormalize: true"
    ):
        wn.renormalize(model)


def test_models_that_cannot_be_written_to_now() -> None:
    model = mlp()
    with torch.no_grad(), wn.folded(model), pytest.raises(wn.ModelError, match=r"inside folded"):
        wn.renormalize(model)
    with pytest.raises(wn.ModelError, match="meta device"):
        wn.renormalize(copy.deepcopy(model).to("meta"))
    sharded = copy.deepcopy(model)
    sharded[0].parametrizations.weight.original1.ds_id = 1  # type: ignore[union-attr]
    with pytest.raises(wn.ModelError, match=r"0\.weight is sharded"):
        wn.renormalize(sharded)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, "unit", "1"])
def test_what_is_not_a_norm(norm: Any) -> None:
    with pytest.raises(ValueError, match="renormalize: expected"):
        wn.renormalize(mlp(), norm)


def test_projecting_without_an_optimizer() -> None:
    with pytest.raises(ValueError, match="give optimizers="):
        wn.renormalize(mlp(), project=True)


# Rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [(True, 1.0), (False, None), (None, None), (2, 2.0), ("rms", "rms")],
)
def test_a_rule_says_it_and_it_is_recorded(given: Any, kept: Any, tmp_path: Path) -> None:
    rule = wn.Rule(types="Linear", renormalize=given)
    assert rule.renormalize == kept and copy.deepcopy(rule) == rule
    for name in ("rules.yaml", "rules.json"):
        dump_rules([rule], tmp_path / name)
        assert load_rules(tmp_path / name) == (rule,)
    model = nn.Sequential(nn.Linear(2, 2))
    wn.apply(model, rule)
    (site,) = records.record(model)
    assert site.get("renormalize") == kept
    other = nn.Sequential(nn.Linear(2, 2))
    wn.apply(other, records.replay([site]))
    assert records.record(other) == [site]
    wn.migrate(model, to="legacy")
    wn.migrate(model)
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert records.record(again) == [site]


def test_text_in_a_file_is_read_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("- {types: Linear, renormalize: 1e1}\n")
    assert load_rules(tmp_path / "rules.yaml")[0].renormalize == 10.0


@pytest.mark.parametrize("value", [0, -1, math.inf, "rsm", [1], "1e1"])
def test_a_rule_that_is_wrong(value: Any) -> None:
    with pytest.raises(wn.RuleError, match="renormalize: expected"):
        wn.Rule(renormalize=value)


def test_rules_over_weight_norm_that_is_there() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    wn.apply(model, types="Linear")
    with pytest.raises(
        wn.ModelError, match=r"already carries.*renormalize=1\.0; give.*replace=True"
    ):
        wn.apply(model, RENORMALIZED)
    assert wn.apply(model, {**RENORMALIZED, "replace": True}).changed == ("0.weight",)
    assert wn.apply(model, RENORMALIZED).changed == ()
    assert wn.apply(model, types="Linear").changed == ()  # it says nothing about it
    assert records.record(model)[0]["renormalize"] == 1.0
    assert wn.apply(model, types="Linear", replace=True).changed == ("0.weight",)
    assert "renormalize" not in records.record(model)[0]


def test_one_shared_module_with_two_rules() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(2, 2)
    rules = [{"names": "a", "renormalize": True}, {"names": "b"}]
    with pytest.raises(wn.ModelError, match="conflicting rules under its names"):
        wn.apply(model, rules)


def test_it_is_not_for_checkpoints() -> None:
    with pytest.raises(wn.RuleError, match="renormalize are about training"):
        wn.checkpoints.convert(
            nn.Linear(2, 2).state_dict(),
            "parametrized",
            rules={"names": "", "renormalize": True},
        )


# Optimizers --------------------------------------------------------------------------------------


def test_only_what_the_given_optimizers_hold() -> None:
    model = mlp()
    one = torch.optim.SGD(model[0].parameters(), lr=0.1)
    other = torch.optim.SGD(model[2].parameters(), lr=0.1)
    before = state(model)
    assert wn.renormalize(model, optimizers=one) == ("0.weight",)
    assert wn.renormalize(model, optimizers=[one, other]) == ("0.weight", "2.weight")
    assert torch.equal(before["4.parametrizations.weight.original1"], norms_of(model, 4))
    bias = torch.optim.SGD([model[0].bias], lr=0.1)
    assert wn.renormalize(model, optimizers=bias) == ()


def norms_of(model: nn.Sequential, index: int) -> Tensor:
    v: Tensor = model[index].parametrizations.weight.original1  # type: ignore[union-attr,assignment]
    return v.detach()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.1), "exp_avg"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), "exp_avg"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
    ],
)
@pytest.mark.parametrize("dim", [0, 1, None, [0, 1]])
def test_the_radial_part_of_a_moment(make: Any, key: str, dim: Any) -> None:
    model = mlp(dim=dim)
    optimizer = make(model.parameters())
    wn.renormalize(model, optimizers=optimizer, project=True)  # before there is a state
    x = torch.randn(16, 6)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    before = {p: optimizer.state[p][key].clone() for p in model.parameters()}
    wn.renormalize(model, optimizers=optimizer, project=True)
    directions = {id(site.held.v): site for site in wn.sites(model)}  # type: ignore[union-attr]
    for parameter, moment in before.items():
        now = optimizer.state[parameter][key]
        if id(parameter) not in directions:
            assert torch.equal(now, moment)
            continue
        kept = () if dim is None else (dim,) if isinstance(dim, int) else dim
        axes = [axis for axis in range(2) if axis not in kept]
        v = parameter.detach()
        radial = (now * v).sum(axes) if axes else now * v
        assert radial.abs().max() < 1e-6 * moment.norm() * v.norm()
        # What was taken away is along v, so what is left is at right angles to it.
        torch.testing.assert_close(
            now.square().sum() + (moment - now).square().sum(), moment.square().sum()
        )


def test_moments_stay_without_project() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    wn.renormalize(model, optimizers=optimizer)
    for number, kept in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[number][key]) for key, value in kept.items())


def test_schedule_free_keeps_the_function_of_both_its_weights() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model, x = mlp(), torch.randn(8, 6)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    optimizer.train()
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    twin = copy.deepcopy((model, optimizer.state_dict()))
    training = model(x).detach()
    assert len(wn.renormalize(model, optimizers=optimizer)) == 3
    torch.testing.assert_close(model(x).detach(), training)
    optimizer.eval()
    evaluated = model(x).detach()
    other = schedulefree.AdamWScheduleFree(twin[0].parameters(), lr=0.05)
    other.load_state_dict(twin[1])
    other.eval()
    assert not torch.allclose(evaluated, training)
    torch.testing.assert_close(evaluated, twin[0](x).detach())


# Training: what the papers say ------------------------------------------------------------------


def test_the_effective_learning_rate_is_constant_and_otherwise_falls() -> None:
    """Without it ‖v‖ grows with every step of gradient descent, and lr/‖v‖² falls."""
    rates: dict[bool, list[list[float]]] = {}
    for put_back in (True, False):
        torch.manual_seed(0)
        model = mlp()
        wn.renormalize(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        x, seen = torch.randn(32, 6), []
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(model(x), x[:, :2].sin()).backward()
            optimizer.step()
            if put_back:
                wn.renormalize(model)
            sites = wn.statistics(model, optimizer).sites
            seen.append([site.effective_lr or 0.0 for site in sites])
        rates[put_back] = seen
    for row in rates[True]:
        assert row == pytest.approx([0.3] * 3, rel=1e-6)
    for site in range(3):
        falling = [row[site] for row in rates[False]]
        assert all(b < a for a, b in pairwise(falling))


def test_gradient_descent_on_the_sphere() -> None:
    """With g fixed at 1 it is projected gradient descent of unit rows, written out by hand."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 5, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    rows = F.normalize(layer.weight.detach(), dim=1)
    wn.apply(layer, {"names": "", "g_init": 1.0, "train_g": False, "renormalize": True})
    wn.renormalize(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    optimizer.register_step_post_hook(lambda *_: wn.renormalize(layer) and None)
    for _ in range(25):
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        optimizer.step()
        gradient = 2 * (x @ rows.T - y).T @ x / y.numel()
        tangent = gradient - rows * (gradient * rows).sum(1, keepdim=True)
        rows = F.normalize(rows - 0.2 * tangent, dim=1)
    torch.testing.assert_close(layer.weight.detach(), rows, rtol=1e-12, atol=1e-14)


class MPLinear(nn.Module):
    """Forced weight normalization by the equations of Karras et al. 2024 (equations 47 and 66)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    @override
    def forward(self, x: Tensor) -> Tensor:
        fan_in = self.weight.shape[1]
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self._unit(self.weight))
        out: Tensor = x @ (self._unit(self.weight) / math.sqrt(fan_in)).T
        return out

    @staticmethod
    def _unit(w: Tensor) -> Tensor:
        """Rows with a mean square of 1."""
        return w / (w.square().mean(1, keepdim=True).sqrt() + 1e-4)


def test_forced_weight_normalization_trains_alike() -> None:
    """The preset of EDM2, next to the layer of the paper, under Adam."""
    torch.manual_seed(0)
    shapes = [(16, 6), (16, 16), (2, 16)]
    weights = [torch.randn(shape) for shape in shapes]
    reference = nn.Sequential(*[MPLinear(weight) for weight in weights])
    model = nn.Sequential(*[nn.Linear(i, o, bias=False) for o, i in shapes])
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.copy_(weight)
    wn.apply(model, "edm2")
    wn.renormalize(model)
    x = torch.randn(64, 6)
    curves = []
    for net in (reference, model):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        if net is model:
            optimizer.register_step_post_hook(lambda *_: wn.renormalize(model) and None)
        curve = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = F.mse_loss(F.silu(net(x)), x[:, :2].abs())
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.8 * curves[0][0]
    # The paper adds 1e-4 to a mean square of 1.
    torch.testing.assert_close(curves[1], curves[0], rtol=3e-3, atol=1e-4)


@pytest.mark.parametrize("put_back", [True, False])
def test_the_steps_of_adam(put_back: bool) -> None:
    """Under gradients without a drift, a step turns v by lr at first, and by lr/√t without it."""
    layer = ours(nn.Linear(256, 8, bias=False), renormalize="rms")
    wn.renormalize(layer)
    v = layer.parametrizations.weight.original1
    optimizer = torch.optim.Adam([v], lr=0.1, betas=(0.0, 0.999))
    angles = []
    for _ in range(200):
        before = F.normalize(v.detach(), dim=1)
        noise = torch.randn_like(v)
        v.grad = noise - before * (before * noise).sum(1, keepdim=True)  # as the norm's backward
        optimizer.step()
        if put_back:
            wn.renormalize(layer)
        angles.append(float((before * F.normalize(v.detach(), dim=1)).sum(1).acos().mean()))
    first, last = sum(angles[:10]) / 10, sum(angles[-10:]) / 10
    assert first == pytest.approx(0.1, rel=0.1)
    # ‖v‖² grows by lr² for each step: 1 + 200 · 0.01.
    assert last == pytest.approx(0.1 if put_back else 0.1 / math.sqrt(3), rel=0.1)


def test_resuming_is_exact() -> None:
    def run(steps: int, net: nn.Module, optimizer: Any, start: int) -> None:
        for step in range(start, start + steps):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            wn.renormalize(net)

    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run(4, model, optimizer, 0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(4, model, optimizer, 4)
    other = mlp()
    again = torch.optim.AdamW(other.parameters(), lr=0.01)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    run(4, other, again, 4)
    assert unchanged(other, state(model))


def test_mixed_precision() -> None:
    """Autocast computes in bfloat16, while v is float32 and goes back to its norm exactly."""
    model, x = mlp(), torch.randn(8, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        wn.renormalize(model)
    for found in norms(model):
        torch.testing.assert_close(found, torch.ones_like(found), rtol=3e-7, atol=0.0)


def test_a_step_that_a_scaler_skips_moves_nothing() -> None:
    model = mlp()
    wn.renormalize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(len(wn.renormalize(model))))
    scaler = torch.amp.GradScaler("cpu")
    before = state(model)
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == math.inf:
            assert calls == [] and unchanged(model, before)
    assert calls == [3] and not unchanged(model, before)


def test_an_average_of_the_weights_is_left_alone() -> None:
    model, x = mlp(), torch.randn(8, 6)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        wn.renormalize(model)
        average.update_parameters(model)
    # The mean of unit vectors is shorter; its direction is the mean direction, and that counts.
    assert all(bool((found < 1 - 1e-6).any()) for found in norms(average))
    out = average(x).detach()
    wn.renormalize(average)
    torch.testing.assert_close(average(x).detach(), out)
