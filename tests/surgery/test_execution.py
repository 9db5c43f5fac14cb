"""apply, remove and migrate on every layout, whoever applied it."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

import wn_surgery as wn
from tests.makers import Double, legacy, ours, parametrized
from wn_surgery.model import records
from wn_surgery.rules.sources import RuleFields

MAKERS = [legacy, parametrized, ours]
Maker = Callable[..., nn.Module]

LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: nn.Linear(5, 4), "weight"),
    "conv": (lambda: nn.Conv1d(4, 6, 3, groups=2), "weight"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "weight"),
    "embedding": (lambda: nn.Embedding(7, 3), "weight"),
    "lstm": (lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True), "weight_hh_l0_reverse"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
}


def turned(module: nn.Module, name: str) -> Tensor:
    """Make g and v differ from a fresh apply, as after training, and give the weight."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.endswith((f"{name}_g", f"{name}.original0")):
                parameter.mul_(1.7)
            if key.endswith((f"{name}_v", f"{name}.original1")):
                parameter.mul_(0.3)
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
        weight: Tensor = getattr(module, name).detach().clone()
    return weight


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("make", MAKERS)
def test_removal_is_bit_exact_and_leaves_nothing(make: Maker, layer: str, dim: int | None) -> None:
    build, name = LAYERS[layer]
    plain = build()
    module = make(copy.deepcopy(plain), name, dim)
    weight = turned(module, name)
    report = wn.remove(module)
    assert report.changed == (name,)
    assert torch.equal(getattr(module, name), weight)
    assert type(getattr(module, name)) is nn.Parameter
    assert type(module) is type(plain)
    assert [key for key, _ in module.named_parameters()] == [
        key for key, _ in plain.named_parameters()
    ]
    assert list(module.state_dict()) == list(plain.state_dict())
    assert not module._forward_pre_hooks and not module._load_state_dict_pre_hooks
    assert module.__dict__.keys() == plain.__dict__.keys()
    pickle.loads(pickle.dumps(module))
    assert wn.remove(module).changed == ()


@pytest.mark.parametrize("make", MAKERS)
def test_removal_keeps_requires_grad_and_the_memory_format(make: Maker) -> None:
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    module = make(conv)
    for key, parameter in module.named_parameters():
        if key != "bias":  # the legacy form un-freezes
            parameter.requires_grad_(False)
    with torch.no_grad():
        wn.remove(module)
    assert type(module.weight) is nn.Parameter
    assert not module.weight.requires_grad and module.bias.requires_grad  # type: ignore[union-attr]
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", MAKERS)
def test_a_frozen_magnitude_does_not_freeze_the_weight(make: Maker) -> None:
    module = make(nn.Linear(3, 4))
    g = next(p for key, p in module.named_parameters() if key.endswith(("_g", "original0")))
    g.requires_grad_(False)
    wn.remove(module)
    assert module.weight.requires_grad


def test_a_users_subclass_of_the_legacy_hook() -> None:
    class Scaled(LegacyHook):
        def compute_weight(self, module: nn.Module) -> Tensor:
            return 2 * super().compute_weight(module)

    module = legacy(nn.Linear(3, 4))
    (hook,) = module._forward_pre_hooks.values()
    hook.__class__ = Scaled
    module(torch.zeros(1, 3))
    weight = module.weight.detach().clone()
    # Its values are not g · v/‖v‖: they can be kept, not computed by another layout.
    with pytest.raises(wn.StackedParametrizationError, match="Scaled"):
        wn.migrate(module)
    wn.remove(module)
    assert torch.equal(module.weight, weight)


def test_legacy_is_folded_from_g_and_v_not_from_a_stale_weight() -> None:
    source, module = legacy(nn.Linear(3, 4)), legacy(nn.Linear(3, 4))
    module.load_state_dict(source.state_dict())  # module.weight is now stale
    wn.remove(module)
    assert torch.equal(module.weight, source.weight)


def test_removal_by_rule_and_by_the_rules_that_were_applied() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Conv1d(1, 1, 1))
    rules = [{"types": ["Linear", "Conv1d"]}, {"action": "skip", "names": "1"}]
    assert wn.apply(model, rules).changed == ("0.weight", "2.weight")
    assert wn.remove(model, {"action": "remove", "names": "0"}).changed == ("0.weight",)
    assert wn.remove(model, rules).changed == ("2.weight",)
    assert wn.remove(model, rules).changed == ()


def test_applying_is_bit_exact_and_idempotent() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 64, 7), nn.ReLU(), nn.ConvTranspose1d(64, 8, 16))
    x = torch.randn(2, 8, 30)
    before = model(x)
    rules = [{"types": "Conv1d"}, {"types": "ConvTranspose1d", "dim": "out"}]
    assert len(wn.apply(model, rules).changed) == 2
    assert torch.equal(model(x), before)
    parameters = list(model.parameters())
    assert wn.apply(model, rules).changed == ()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model[2].parametrizations.weight.original0.shape == (1, 8, 1)


@pytest.mark.parametrize("make", [legacy, parametrized])
def test_what_torch_applied_is_what_the_rule_asks_for(make: Maker) -> None:
    model = nn.Sequential(make(nn.Linear(3, 4)))
    assert wn.apply(model, {"types": "Linear"}).changed == ()
    assert wn.sites(model)[0].held.maker == "torch"  # type: ignore[union-attr]


def test_options() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4).bfloat16(), nn.Linear(3, 4))
    with torch.no_grad():
        model[2].weight[0] = 0
    wn.apply(
        model,
        [
            {"names": "0", "g_init": 1.0, "train_g": False, "dim": None},
            {"names": "1", "norm_dtype": "float32"},
            {"names": "2", "eps": 1e-6},
        ],
    )
    head, half, zero = (layer.parametrizations.weight for layer in model)
    assert head.original0.shape == () and head.original0.item() == 1.0
    assert not head.original0.requires_grad and head.original1.requires_grad
    assert model[0].weight.norm().item() == pytest.approx(1.0)
    assert half.original0.dtype == torch.bfloat16
    assert half[0].norm_dtype == torch.float32
    model[2](torch.ones(1, 3)).sum().backward()
    # The zero row stays zero, and can leave zero: its gradient is that of a plain weight.
    assert torch.equal(model[2].weight[0], torch.zeros(3))
    assert torch.equal(zero.original1.grad[0], torch.ones(3))


def test_replacing_options() -> None:
    model = nn.Sequential(legacy(nn.Linear(3, 4)))
    weight = turned(model[0], "weight")
    report = wn.apply(model, {"types": "Linear", "dim": 1, "replace": True})
    assert report.steps[0]["action"] == "replace"
    assert torch.equal(model[0].weight, weight)
    assert [key for key, _ in wn.remove(model) and model.named_parameters()] == [
        "0.weight",
        "0.bias",
    ]


def _gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    module(x).square().sum().backward()
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return sorted(found, key=lambda grad: (grad.ndim, grad.shape))


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_migration_keeps_everything(dim: int | None) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(legacy(nn.Conv1d(3, 5, 4), dim=dim))
    turned(model[0], "weight")
    model[0].weight_g.requires_grad_(False)
    held = (model[0].weight_g, model[0].weight_v)
    old_checkpoint = {key: value + 0 for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 9)
    output, gradients = model(x), _gradients(model, x)

    assert wn.migrate(model).changed == ("0.weight",)
    plist = model[0].parametrizations.weight
    assert plist.original0 is held[0] and plist.original1 is held[1]
    assert torch.equal(model(x), output)
    for a, b in zip(_gradients(model, x), gradients, strict=True):
        if dim in (0, 2):  # torch's kernel, before and after
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b)
    assert not plist.original0.requires_grad and plist.original1.requires_grad
    model.load_state_dict(old_checkpoint, strict=True)
    model.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(copy.deepcopy(model)(x), output)

    wn.migrate(model, to="legacy")
    assert model[0].weight_g is held[0] and model[0].weight_v is held[1]
    assert torch.equal(model(x), output)
    model.load_state_dict(old_checkpoint, strict=True)
    assert wn.migrate(model, to="legacy").changed == ()


def test_migration_adopts_torchs_parametrization() -> None:
    model = nn.Sequential(parametrized(nn.Linear(3, 4)), parametrized(nn.Linear(4, 2)))
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)
    x = torch.randn(2, 3)
    output = model(x)
    wn.migrate(model)
    assert type(model[0]) is type(model[1])
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), output)
    assert wn.migrate(model).changed == ()


def test_five_cycles_leave_no_residue() -> None:
    layer = nn.Linear(3, 4)
    fresh = {key: value for key, value in layer.__dict__.items() if key != "_parameters"}
    for make in [legacy, parametrized, ours, parametrized, legacy]:
        make(layer)
        wn.remove(layer)
    assert {key: value for key, value in layer.__dict__.items() if key != "_parameters"} == fresh


def test_stripping_a_copy_leaves_the_original_alone() -> None:
    for make in (parametrized, ours):
        layer = make(nn.Linear(3, 4))
        other = copy.deepcopy(layer)
        wn.remove(other)
        assert parametrize.is_parametrized(layer) and layer.weight.shape == (4, 3)


def test_custom_attributes_of_a_parameter_survive() -> None:
    layer = nn.Linear(3, 4)
    layer.weight.no_weight_decay = True  # type: ignore[attr-defined]
    wn.apply(layer, {"names": ""})
    assert layer.parametrizations.weight.original1.no_weight_decay  # type: ignore[union-attr]
    wn.remove(layer)
    assert layer.weight.no_weight_decay  # type: ignore[attr-defined]


def test_a_report_keeps_no_tensor_alive() -> None:
    import gc
    import weakref

    layer = ours(nn.Linear(3, 4))
    v = weakref.ref(layer.parametrizations.weight.original1)  # type: ignore[union-attr]
    report = wn.remove(layer)
    gc.collect()
    assert report.changed and v() is None


def test_parametrizing_another_parameter_by_torch_and_by_us() -> None:
    layer = parametrized(nn.LSTM(2, 3), "weight_ih_l0")
    dynamic = type(layer)
    ours(layer, "weight_hh_l0")
    x = torch.randn(4, 1, 2)
    output = layer(x)[0]
    wn.remove(layer, {"action": "remove", "params": "weight_hh_l0"})
    assert type(layer) is dynamic
    ours(layer, "weight_hh_l0")
    wn.remove(layer, {"action": "remove", "params": "weight_ih_l0"})
    assert parametrize.is_parametrized(layer, "weight_hh_l0")
    wn.remove(layer)
    assert type(layer) is nn.LSTM
    assert torch.equal(layer(x)[0], output)


def test_a_name_that_torch_gave_the_shared_class_is_harmless_elsewhere() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    for layer in (one, other):
        wn.apply(layer, {"names": "", "params": "bias"})
    parametrize.register_parametrization(one, "weight", nn.Identity())
    assert type(one) is type(other)
    x = torch.randn(2, 3)
    expected = other(x)
    legacy(other)  # sets a plain attribute `weight`
    torch.testing.assert_close(other(x), expected)
    wn.remove(other)
    assert type(other) is nn.Linear
    assert torch.equal(one(x), one(x))


def test_replacing_thaws_and_refills_g() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    wn.apply(model, {"types": "Linear", "train_g": False})
    weight = model[0].weight.detach().clone()
    g = model[0].parametrizations.weight.original0
    assert not g.requires_grad
    # Whoever froze it may have done so since: only replace=True says otherwise.
    assert not wn.apply(model, {"types": "Linear"}).changed
    assert not wn.apply(model, {"types": "Linear", "g_init": 2.0}).changed
    assert wn.apply(model, {"types": "Linear", "replace": True}).changed == ("0.weight",)
    assert model[0].parametrizations.weight.original0.requires_grad
    assert torch.equal(model[0].weight, weight)
    filled = {"types": "Linear", "g_init": 2.0, "replace": True}
    assert wn.apply(model, filled).changed == ("0.weight",)
    assert model[0].parametrizations.weight.original0.flatten().tolist() == [2.0] * 4
    assert not wn.apply(model, filled).changed
    for make in (legacy, parametrized):
        model = nn.Sequential(make(nn.Linear(3, 4)))
        assert wn.apply(model, filled).changed == ("0.weight",)
        assert model[0].parametrizations.weight.original0.flatten().tolist() == [2.0] * 4


@pytest.mark.parametrize("make", [ours, legacy, parametrized, lambda module: module])
def test_the_same_rule_does_not_fill_a_trained_g_again(
    make: Callable[[nn.Module], nn.Module],
) -> None:
    """A framework gives the rules again for each of its stages."""
    model = nn.Sequential(make(nn.Linear(3, 4)))
    rule = {"types": "Linear", "g_init": 2.0, "replace": True}
    assert wn.apply(model, rule).changed
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
    # As load_from_checkpoint does: built again, and told by the record what it had.
    reloaded = nn.Sequential(nn.Linear(3, 4))
    wn.apply(reloaded, records.replay(records.record(model)))
    reloaded.load_state_dict(model.state_dict())
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reloaded):
        assert not wn.apply(each, rule).changed
        assert each[0].parametrizations.weight.original0.flatten().tolist() == [6.0] * 4
    other = {**rule, "g_init": 5.0}
    kept = wn.apply(model, {**other, "replace": False})
    assert kept.steps[0]["why"] == "rule 1, already there (replace=True fills g)"
    assert not kept.changed and wn.apply(model, other).changed
    assert model[0].parametrizations.weight.original0.flatten().tolist() == [5.0] * 4


def test_thawing_does_not_fill_again() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    rule = {"types": "Linear", "g_init": 2.0, "train_g": False}
    wn.apply(model, rule)
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
    assert wn.apply(model, {**rule, "train_g": True, "replace": True}).changed
    g = model[0].parametrizations.weight.original0
    assert g.requires_grad
    torch.testing.assert_close(g.flatten(), torch.full((4,), 6.0))


def test_replacing_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4))
    rule = {"types": "Linear", "g_init": 2.0, "replace": True}
    assert wn.apply(model, rule).changed and not wn.apply(model, rule).changed


IN_ANOTHER_PROCESS = """
import sys, torch
layer = torch.load(sys.argv[1], weights_only=False)
for _ in range(9):
    layer.register_forward_pre_hook(lambda *_: None)
with torch.no_grad():
    before = layer(torch.ones(1, 3))
    layer.weight_g.mul_(2)
    assert not torch.equal(layer(torch.ones(1, 3)), before)
torch.nn.utils.remove_weight_norm(layer)
print("done")
"""


@pytest.mark.processes
def test_a_legacy_hook_keeps_its_place_in_the_process_that_unpickles(tmp_path: Path) -> None:
    layer = ours(nn.Linear(3, 4))
    wn.migrate(layer, to="legacy")
    torch.save(layer, tmp_path / "layer.pt")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_ANOTHER_PROCESS, str(tmp_path / "layer.pt")],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.stdout == "done\n", run.stderr[-2000:]


# Shorthands -----------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 4, 1), nn.Sequential(nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("rules", "fields", "rule"),
    [
        (nn.Linear, {}, wn.Rule(types=nn.Linear)),
        ([nn.Linear, nn.Conv1d], {}, wn.Rule(types=[nn.Linear, nn.Conv1d])),
        # One rule: what the model does not have is no rule that matches nothing.
        ((nn.Linear, nn.Bilinear), {}, wn.Rule(types=[nn.Linear, nn.Bilinear])),
        (None, {"types": nn.Linear, "names": "2.**"}, wn.Rule(types=nn.Linear, names="2.**")),
        (
            None,
            {"types": "Conv1d", "dim": 1, "eps": 1e-6},
            wn.Rule(types="Conv1d", dim=1, eps=1e-6),
        ),
    ],
)
def test_a_class_or_fields_stand_for_one_rule(
    rules: Any, fields: dict[str, Any], rule: wn.Rule
) -> None:
    model = network()
    plan = wn.plan(model, rules, **fields)
    assert plan.rules == (rule,)
    done = wn.apply(model, rules, **fields)
    assert done.changed == tuple(step.site.name for step in plan.changes) != ()
    assert wn.remove(model, rules, **fields).changed == done.changed


@pytest.mark.parametrize(
    ("rules", "fields", "says"),
    [
        ("linears", {"names": "0"}, r"got rules and also names="),
        (None, {}, r"apply\(\) needs rules, as in apply\(model, nn.Linear\)"),
        (None, {"typs": nn.Linear}, r"apply\(\) has no argument 'typs'; did you mean 'types'\?"),
        ("linears", {"optimizer": None}, r"no argument 'optimizer'; did you mean 'optimizers'\?"),
    ],
)
def test_rules_are_given_once(rules: Any, fields: dict[str, Any], says: str) -> None:
    model = network()
    with pytest.raises(TypeError, match=says):
        wn.apply(model, rules, **fields)
    assert not any(site.normed for site in wn.sites(model))


def test_the_shorthand_has_the_fields_of_a_rule() -> None:
    assert list(RuleFields.__annotations__) == list(inspect.signature(wn.Rule).parameters)


def test_a_report_is_no_model_and_says_so() -> None:
    model: Any = wn.apply(network(), nn.Linear)
    with pytest.raises(TypeError, match=r"cannot be called.*in place of `model = wn.apply\("):
        model(torch.zeros(1, 3))
    for name in ("forward", "parameters", "state_dict", "train", "eval", "to", "layer1"):
        with pytest.raises(AttributeError, match=rf"a Report has no '{name}': apply, remove and"):
            getattr(model, name)
        assert not hasattr(model, name)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again == model


def test_what_is_shown_at_a_prompt_is_short() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(80)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    plan = wn.plan(model, nn.Linear)
    assert repr(plan) == "<Plan: 80 of 80 matched parameters change; rules=1, problems=0>"
    assert repr(plan.steps[0]) == "<Step 0.weight: apply, plain -> parametrized, dim=0>"
    report = wn.apply(model, nn.Linear, optimizers=optimizer)
    assert repr(report) == "<Report: 80 parameters changed, 1 optimizer>"
    assert repr(report.optimizers[0]) == "<OptimizerChange SGD: 80 -> 160 in group 0; 80 reset>"
    assert repr(wn.plan(model, nn.Linear).steps[0]) == "<Step 0.weight: keep, dim=0>"
    assert "80 of 80 matched parameters changed;" in str(report)


# What torch's removal leaves ---------------------------------------------------------------------


def leaving(layer: nn.Module, name: str = "weight", times: int = 1) -> Any:
    """Put weight norm on and take it off with torch's functions, which leaves their load hook."""
    for _ in range(times):
        parametrize.remove_parametrizations(parametrizations.weight_norm(layer, name), name)
    return layer


def test_a_load_hook_that_was_left_behind_is_taken_off_and_reported() -> None:
    model = nn.Sequential(leaving(nn.Linear(2, 3), times=3), leaving(nn.GRU(3, 2), "weight_hh_l0"))
    model.append(parametrizations.weight_norm(nn.Linear(2, 2)))
    weights = {name: tensor.clone() for name, tensor in model[:2].state_dict().items()}
    with pytest.raises(AttributeError, match="_weight_norm_compat_hook"):
        pickle.dumps(model[:2])
    says = "2 load hooks left behind by another removal, to take off: 0.weight, 1.weight_hh_l0"
    plan = wn.plan(model, action="remove", params="*")
    assert says in str(plan)
    assert plan.to_dict()["leftovers"] == ["0.weight", "1.weight_hh_l0"]
    assert len(model[0]._load_state_dict_pre_hooks) == 3  # a plan only reads

    report = wn.remove(model)
    assert report.changed == ("2.weight",)
    assert report.leftovers == ("0.weight", "1.weight_hh_l0")
    assert report.to_dict()["leftovers"] == list(report.leftovers)
    assert repr(report) == "<Report: 1 parameter changed, 2 load hooks>"
    assert says.replace("to take", "taken") in str(report)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    pickle.loads(pickle.dumps(model))
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in model[:2].state_dict().items()
    )
    again = wn.remove(model)
    assert again.leftovers == () and "left behind" not in str(again)
    assert repr(again) == "<Report: 0 parameters changed>"


def test_a_load_hook_on_what_torch_has_made_a_buffer() -> None:
    layer = nn.Linear(2, 3)
    layer.weight.requires_grad_(False)
    assert "weight" in leaving(layer)._buffers
    assert wn.remove(layer).leftovers == ("weight",)
    pickle.dumps(layer)


def test_a_load_hook_in_use_stays() -> None:
    """Older ones beside it too: they do the same, and are taken off together with weight norm."""
    layer = parametrizations.weight_norm(leaving(nn.Linear(2, 3), times=2))
    other = parametrizations.weight_norm(nn.Linear(3, 2))
    parametrize.register_parametrization(other, "weight", Double())
    model = nn.Sequential(layer, other)
    for rules in ({"action": "remove", "names": "1", "params": "bias"}, {"action": "skip"}):
        assert wn.apply(model, rules).leftovers == ()
    assert [len(module._load_state_dict_pre_hooks) for module in model] == [3, 1]
    with pytest.raises(wn.StackedParametrizationError):
        wn.remove(model)
    assert [len(module._load_state_dict_pre_hooks) for module in model] == [3, 1]
    wn.remove(model, names="0")
    assert [len(module._load_state_dict_pre_hooks) for module in model] == [0, 1]


def test_leftovers_are_taken_off_where_a_rule_removes() -> None:
    model = nn.Sequential(*[leaving(nn.Linear(2, 2)) for _ in range(4)])
    model.append(model[1])
    model[1].register_load_state_dict_pre_hook(lambda *_: None)  # of somebody else
    rules = [{"action": "remove", "names": "{1,2}"}, {"action": "skip", "names": "2"}]
    assert wn.apply(model, rules).leftovers == ("1.weight",)
    assert [len(module._load_state_dict_pre_hooks) for module in model] == [1, 1, 1, 1, 1]
    only = wn.remove(model, where=lambda path, module: path == "3")
    assert only.leftovers == ("3.weight",) and only.changed == ()


@pytest.mark.parametrize("make", [legacy, ours])
def test_a_leftover_is_gone_where_weight_norm_comes_or_goes(make: Maker) -> None:
    """It would send the g and v of a legacy checkpoint to where they are not."""
    layer = make(leaving(nn.Linear(2, 3)))
    if make is ours:
        assert not layer._load_state_dict_pre_hooks
        pickle.dumps(layer)
    assert wn.remove(layer).leftovers == ()  # it went with the weight norm
    assert not layer._load_state_dict_pre_hooks


# Beside what others compute in the same module ---------------------------------------------------


def test_the_order_of_parameters_where_torch_has_taken_one_out_first() -> None:
    model = nn.LSTM(2, 3)
    order = [name for name, _ in model.named_parameters()]
    parametrizations.weight_norm(model, "weight_ih_l0")
    wn.apply(model, params="weight_hh_l0")
    wn.remove(model)
    assert [name for name, _ in model.named_parameters()] == order


def test_surgery_takes_no_step_of_spectral_norm() -> None:
    model = nn.LSTM(2, 3)
    parametrizations.spectral_norm(model, "weight_ih_l0")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    wn.apply(model, params="weight_hh_l0")
    with torch.no_grad(), wn.folded(model):
        pass
    wn.remove(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_training_flags_of_others_stay() -> None:
    model = nn.LSTM(2, 3)
    parametrizations.spectral_norm(model, "weight_ih_l0")
    model.parametrizations.weight_ih_l0.eval()  # type: ignore[union-attr, index, operator]
    wn.apply(model, params="weight_hh_l0")
    lists: Any = model.parametrizations
    flags = [each.training for each in (lists, *lists.weight_hh_l0.modules())]
    assert flags == [True] * 3
    assert not any(each.training for each in lists.weight_ih_l0.modules())


def test_a_glob_is_about_the_same_parameters_after_surgery() -> None:
    rules = [{"params": ["bias"], "names": "0"}, {"params": "*", "names": "0", "eps": 1e-3}]
    model = nn.Sequential(nn.Linear(3, 3))
    assert wn.apply(model, rules).changed == ("0.weight", "0.bias")
    assert wn.apply(model, rules).changed == ()
    assert {site.name: site.norm and site.norm.eps for site in wn.sites(model)} == {
        "0.weight": 1e-3,
        "0.bias": 0.0,
    }
    assert len(wn.remove(model, params="*").changed) == 2
