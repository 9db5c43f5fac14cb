"""Bad input: each has its own exception, says what to do, and changes nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import wn_surgery as wn
from tests.makers import Double, Tied
from wn_surgery.rules.sources import RulesLike


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 1)
        self.net = nn.Sequential(self.conv)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def with_zero_row() -> nn.Module:
    model = linear()
    with torch.no_grad():
        model[1].weight[1] = 0  # type: ignore[index]
    return model


def with_inf() -> nn.Module:
    model = linear()
    with torch.no_grad():
        model[1].weight[1, 0] = torch.inf  # type: ignore[index]
    return model


def integers() -> nn.Module:
    model = linear()
    model[0].weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int32), requires_grad=False)
    return model


def float8() -> nn.Module:
    model = linear()
    weight = torch.ones(4, 3).to(torch.float8_e4m3fn)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(3, 4), nn.Conv1d(2, 2, 1))


def normed() -> nn.Module:
    model = linear()
    wn.apply(model, "linears")
    return model


def stacked() -> nn.Module:
    model = normed()
    parametrize.register_parametrization(model[0], "weight", Double())  # type: ignore[index]
    return model


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)))


def half_with_eps() -> nn.Module:
    return linear().half()


def inference() -> nn.Module:
    with torch.inference_mode():
        return linear()


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which needs a process group: walk() knows wrappers by their name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


DistributedDataParallel.__module__ = "torch.nn.parallel.distributed"


def ddp() -> nn.Module:
    return nn.Sequential(DistributedDataParallel(linear()))


def grouped_transpose() -> nn.Module:
    return nn.ConvTranspose1d(4, 4, 3, groups=2)


def filled(value: float, dtype: torch.dtype = torch.float32, width: int = 3) -> nn.Module:
    """A layer whose rows have norms of ``value`` times a root of ``width``."""
    model = nn.Sequential(nn.Linear(width, 2, dtype=dtype))
    with torch.no_grad():
        model[0].weight.fill_(value)  # type: ignore[operator]
    return model


def sparse() -> nn.Module:
    model = linear()
    model[0].weight = nn.Parameter(torch.eye(4, 3).to_sparse())  # type: ignore[union-attr]
    return model


def nested() -> nn.Module:
    model = linear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    model[0]._parameters["weight"] = nn.Parameter(rows)  # type: ignore[index]
    return model


def plain_tensor() -> nn.Module:
    model = linear()
    model[0]._parameters["weight"] = torch.ones(4, 3)  # type: ignore[index]
    return model


LINEARS = {"types": "Linear"}
WIDE = {"types": "Linear", "norm_dtype": "float32"}
CASES: list[tuple[Callable[[], nn.Module], RulesLike, type[wn.WeightNormError], str]] = [
    (linear, {"types": "Conv2d"}, wn.UnmatchedRuleError, "no Conv2d in the model"),
    (linear, {"names": "2"}, wn.UnmatchedRuleError, "holds '0', '1'"),
    (linear, {"names": "0", "params": "wieght"}, wn.UnmatchedRuleError, "params=['weight']"),
    (linear, {"names": "0.weight"}, wn.UnmatchedRuleError, "names='0', params='weight'"),
    (linear, {"names": "**", "exclude_types": "Module"}, wn.UnmatchedRuleError, "excluded"),
    (linear, {"names": "0", "params": "b*"}, wn.UnmatchedRuleError, "fewer than two dim"),
    (
        lambda: nn.Sequential(nn.LayerNorm(3)),
        {"names": "0"},
        wn.UnmatchedRuleError,
        "params='re:weight' without wildcards",
    ),
    (linear, [LINEARS, LINEARS], wn.UnmatchedRuleError, "shadowed"),
    (linear, [LINEARS, {"action": "skip", "names": "o"}], wn.UnmatchedRuleError, "rule 2"),
    (
        Shared,
        [{"names": "conv"}, {"action": "skip", "names": "net.0"}],
        wn.ConflictingNamesError,
        "{conv,net.0}",
    ),
    (Shared, [{"names": "conv"}, {"names": "net.0", "dim": 1}], wn.ConflictingNamesError, "dim=1"),
    (normed, {"types": "Linear", "dim": 1}, wn.ExistingSiteError, "replace=True"),
    (normed, {"types": "Linear", "train_g": False}, wn.ExistingSiteError, "train_g=False"),
    (Tied, {"types": "Linear"}, wn.TiedParameterError, "head.weight is tied to embed.weight"),
    (
        Tied,
        [
            {"types": "Linear", "tied": "together", "g_init": 2.0},
            {"types": "Embedding", "tied": "together", "g_init": 3.0},
        ],
        wn.ConflictingNamesError,
        "says apply dim=0, g_init=",
    ),
    (
        Tied,
        [{"types": "Linear", "tied": "together"}, {"action": "skip", "types": "Embedding"}],
        wn.ConflictingNamesError,
        "embed.weight",
    ),
    (with_zero_row, LINEARS, wn.ZeroNormError, "eps > 0"),
    (with_inf, LINEARS, wn.ZeroNormError, "1.weight has 1 slice"),
    (
        lambda: nn.Sequential(nn.Identity(), nn.Bilinear(1, 0, 2)),
        {"types": "Bilinear"},
        wn.ZeroNormError,
        "no elements",
    ),
    (half_with_eps, {"types": "Linear", "eps": 1e-12}, wn.ZeroNormError, "norm_dtype"),
    (lambda: nn.Sequential(nn.LazyLinear(2)), LINEARS, wn.LazyParameterError, "forward pass"),
    (lambda: nn.Sequential(nn.LazyConv1d(2, 1)), {"names": "**"}, wn.LazyParameterError, "forward"),
    (integers, LINEARS, wn.NonFloatingError, "torch.int32"),
    (sparse, LINEARS, wn.NonFloatingError, "0.weight is stored as sparse_coo"),
    (plain_tensor, LINEARS, wn.NonFloatingError, "0.weight is a plain tensor"),
    # The norm is looked at as the forward computes it, and g as it is stored.
    (lambda: filled(1e30), {"types": "Linear", "eps": 1e-12}, wn.ZeroNormError, "not finite"),
    (with_inf, {"types": "Linear", "eps": 1e-12}, wn.ZeroNormError, "1.weight has 1 slice"),
    (
        lambda: filled(1e-30, torch.float64),
        WIDE,
        wn.ZeroNormError,
        "too small or large for float32",
    ),
    (lambda: filled(1e25, torch.float64), WIDE, wn.ZeroNormError, "too small or large for float32"),
    (
        lambda: filled(700.0, torch.float16, 10_000),
        {**WIDE, "eps": 1e-6},
        wn.ZeroNormError,
        "g is stored in float16",
    ),
    (lambda: filled(1e-22), LINEARS, wn.ZeroNormError, "too small or large for float32"),
    (linear, {"types": "Linear", "g_init": 1e300}, wn.RuleError, "g_init=1e+300 does not fit"),
    (linear, {"types": "Linear", "g_init": -1e-300}, wn.RuleError, "at least 1.18e-38"),
    (lambda: filled(1e-14), {"types": "Linear", "g_init": 1e30}, wn.ZeroNormError, "g_init=1e+30"),
    (nested, {"names": "0"}, wn.NonFloatingError, "0.weight is stored as nested"),
    (linear, {wn.Rule(types="Linear")}, wn.RuleError, "got a set; write a list"),
    (linear, {"types": "Linear", "eps": 1e300}, wn.RuleError, "eps=1e+300 does not fit float32"),
    (half_with_eps, {"types": "Linear", "eps": 1e6}, wn.RuleError, "does not fit float16"),
    (half_with_eps, {**WIDE, "eps": 1e6}, wn.RuleError, "does not fit float16"),
    (
        linear,
        {"types": "Linear", "where": lambda _, module: module.weight > 0},
        wn.RuleError,
        "where returned a tensor of shape (4, 3)",
    ),
    (float8, LINEARS, wn.QuantizedWeightError, "float8_e4m3fn"),
    (quantized, {"names": "0"}, wn.QuantizedWeightError, "before quantization"),
    (ddp, LINEARS, wn.WrappedModuleError, "DistributedDataParallel"),
    (inference, LINEARS, wn.InferenceModeError, "leave inference mode"),
    (stacked, {"types": "Linear", "dim": 1}, wn.StackedParametrizationError, "Double"),
    (spectral, LINEARS, wn.StackedParametrizationError, "SpectralNorm"),
    (linear, {"types": "Linear", "dim": 2}, wn.DimensionError, "from 0 to 1"),
    (linear, {"types": "Linear", "dim": (0, 5)}, wn.DimensionError, "(4, 3)"),
    (grouped_transpose, {"names": "", "dim": "out"}, wn.DimensionError, "groups=2"),
    (
        lambda: nn.ParameterDict({"weight": torch.ones(2, 2)}),
        {"names": "", "dim": "out"},
        wn.DimensionError,
        "ParameterDict",
    ),
]


def state(model: nn.Module) -> list[Any]:
    """What must not change: structure by identity, tensors by version and address."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, id(module), type(module), list(module._forward_pre_hooks.items())))
        found.append(list(module._load_state_dict_pre_hooks.items()))
        for key, parameter in module._parameters.items():
            found.append((key, id(parameter), getattr(parameter, "requires_grad", None)))
            if parameter is not None and parameter.is_nested:
                found.append([row.tolist() for row in parameter.unbind()])
            elif parameter is not None and parameter.layout is not torch.strided:
                found.append(parameter.to_dense().tolist())
            elif parameter is not None and not nn.parameter.is_lazy(parameter):
                found.append((parameter.data_ptr(), parameter.tolist()))
    return found


@pytest.mark.parametrize(
    ("make", "rules", "kind", "says"), CASES, ids=[f"{c[2].__name__}-{c[3]}" for c in CASES]
)
def test_bad_input_is_refused_whole(
    make: Callable[[], nn.Module],
    rules: RulesLike,
    kind: type[wn.WeightNormError],
    says: str,
) -> None:
    model = make()
    before = state(model)
    with pytest.raises(kind) as caught:
        wn.apply(model, rules)
    assert type(caught.value) is kind
    assert says in str(caught.value)
    assert state(model) == before
    # The plan is the same refusal, and can be had for printing.
    with pytest.raises(kind):
        wn.plan(model, rules)
    if "where" in says or isinstance(rules, set):  # no plan comes of it
        return
    shown = wn.plan(model, rules, check=False)
    assert shown.problems and says in str(shown)
    assert state(model) == before


def test_every_exception_has_a_case() -> None:
    raised = {case[2] for case in CASES}
    elsewhere = {
        wn.CallbackError,
        wn.CheckpointError,
        wn.CheckpointFileError,
        wn.CheckpointMismatchError,
        wn.CompatError,
        wn.ExportError,
        wn.InitializationError,
        wn.RuleFileError,
        wn.FoldedModelError,
        wn.FusionError,
        wn.RanksError,
        wn.MissingSiteError,
        wn.ModelError,
        wn.WeightNormError,
    }
    family = {
        value
        for value in vars(wn.errors).values()
        if isinstance(value, type) and issubclass(value, wn.WeightNormError)
    }
    assert family == raised | elsewhere


def test_a_kind_can_be_caught_by_its_class_and_by_its_name() -> None:
    with pytest.raises(wn.ModelError) as caught:
        wn.apply(Tied(), {"types": "Linear"})
    error = caught.value
    assert (error.kind, error.site) == ("tied", "head.weight")
    assert type(error) is wn.TiedParameterError and "TiedParameterError" not in wn.__all__
    assert type(wn.ModelError("text", kind="tied")) is wn.TiedParameterError
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert (str(again), again.kind, again.site) == (str(error), "tied", "head.weight")
    for old in (IndexError, wn.DimensionError):
        with pytest.raises(old):
            wn.apply(linear(), {"types": "Linear", "dim": 2})


def test_a_new_name_is_an_error_of_its_own_kind() -> None:
    class Mine(wn.ModelError):
        pass

    assert Mine("text").kind == "model" and Mine("text").site is None
    assert type(wn.ModelError("text", kind="model")) is wn.ModelError
    with pytest.raises(KeyError):
        wn.ModelError("text", kind="tide")


@pytest.mark.parametrize("verb", [wn.remove, wn.migrate])
def test_removal_and_migration_refuse_wrapped_models(verb: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(DistributedDataParallel(normed()))
    if verb is wn.migrate:
        parametrizations.weight_norm(model[0].module[0], "bias")  # something to migrate
    before = state(model)
    with pytest.raises(wn.WrappedModuleError):
        verb(model)
    assert state(model) == before


def test_under_inference_mode() -> None:
    model, other = linear(), normed()
    with torch.inference_mode():
        with pytest.raises(wn.InferenceModeError):
            wn.apply(model, LINEARS)
        with pytest.raises(wn.InferenceModeError):
            wn.remove(other)


def test_stacked_weight_norm_is_not_removed_in_part() -> None:
    model = stacked()
    with pytest.raises(wn.StackedParametrizationError, match="Double"):
        wn.remove(model)
    assert parametrize.is_parametrized(model[1])  # type: ignore[index]


def test_legacy_cannot_hold_what_torch_cannot_compute() -> None:
    model = linear()
    wn.apply(model, {"names": "0", "eps": 1e-6})
    before = state(model)
    with pytest.raises(wn.StackedParametrizationError, match="eps=1e-06"):
        wn.migrate(model, to="legacy")
    assert state(model) == before
    with pytest.raises(ValueError, match="expected 'parametrized' or 'legacy'"):
        wn.migrate(model, to="plain")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: [", "rules.yaml"),
        ("rules: 3", "list"),
        ("- {action: apply, nmaes: a}", "did you mean 'names'"),
        ("- 7", "rule 1"),
    ],
)
def test_rule_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    model = linear()
    before = state(model)
    with pytest.raises(wn.RuleFileError) as caught:
        wn.apply(model, path)
    assert says in str(caught.value)
    assert state(model) == before


def test_unmatched_rules_can_be_tolerated() -> None:
    rules = [LINEARS, {"names": "nowhere"}]
    for verb in (wn.plan, wn.apply):
        with pytest.warns(wn.UnmatchedRuleWarning, match="rule 2") as caught:
            verb(linear(), rules, on_unmatched="warn")
        assert caught[0].filename == __file__  # where this library was called
    model = linear()
    report = wn.apply(model, rules, on_unmatched="ignore")
    assert report.changed == ("0.weight", "1.weight")
    assert "rule 2 decides nothing" in str(report)
    with pytest.raises(ValueError, match="on_unmatched"):
        wn.plan(model, rules, on_unmatched="raise")  # type: ignore[arg-type]


def test_several_problems_of_a_kind_are_one_error() -> None:
    model = nn.Sequential(*(nn.LazyLinear(2) for _ in range(9)))
    with pytest.raises(wn.LazyParameterError, match=r"The same holds for 1\.weight.* and 3 more"):
        wn.apply(model, LINEARS)


CALLS: dict[str, Callable[[Any], object]] = {
    "apply": lambda model: wn.apply(model, "linears"),
    "remove": wn.remove,
    "migrate": wn.migrate,
    "plan": lambda model: wn.plan(model, "linears"),
    "sites": wn.sites,
    "folded": lambda model: wn.folded(model).__enter__(),
    "writable": lambda model: wn.writable(model).__enter__(),
    "fuse": wn.fuse,
    "unfuse": wn.unfuse,
    "statistics": wn.statistics,
    "parameter_groups": lambda model: wn.parameter_groups(model, weight_decay=0.1),
    "initialize_from_batch": wn.initialize_from_batch,
    "initializing": lambda model: wn.initializing(model).__enter__(),
    "stripped_copy": wn.export.stripped_copy,
    "check": lambda model: wn.export.check(model, "onnx"),
    "verify": lambda model: wn.export.verify(model, lambda x: x, torch.ones(1)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", [None, nn.Linear, [nn.Linear(2, 2)], torch.ones(2)], ids=repr)
def test_what_is_no_model(call: str, model: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a model, which is an nn\.Module; got (a|the) "):
        CALLS[call](model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_script_module_cannot_be_changed() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    for call in (lambda: wn.apply(model, "linears"), lambda: wn.remove(model)):
        with pytest.raises(wn.WeightNormError, match="TorchScript"):
            call()


def test_optimizers_that_are_none() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = state(model)
    for given, says in (
        (None, "a NoneType"),
        ("sgd", "a str"),
        ({"one": optimizer}, "a dict"),
        (scheduler, "StepLR, which is a learning-rate scheduler"),
        ([scheduler], "StepLR, which is a learning-rate scheduler"),
        ([model], "expected a torch.optim.Optimizer"),
    ):
        with pytest.raises(TypeError, match=says):
            wn.apply(model, "linears", optimizers=given)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=says):
            wn.statistics(model, given)  # type: ignore[arg-type]
    assert state(model) == before
    wn.apply(model, "linears", optimizers=optimizer)
    (site, _) = wn.statistics(model, optimizer).sites
    assert site.effective_lr is not None
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) == 6


def test_names_and_patterns_of_the_wrong_type() -> None:
    model = normed()
    for call in (
        lambda: wn.initialize_from_batch(model, torch.ones(2, 3), names=3),  # type: ignore[arg-type]
        lambda: wn.initialize_from_batch(model, torch.ones(2, 3), names="{a"),
        lambda: wn.parameter_groups(model, weight_decay=0.1, no_decay=[None]),  # type: ignore[list-item]
    ):
        with pytest.raises(wn.WeightNormError):
            call()
    for decay in (torch.inf, torch.nan, -1.0, "0.1", None):
        with pytest.raises(ValueError, match="finite number"):
            wn.parameter_groups(model, weight_decay=decay)  # type: ignore[arg-type]
    assert len(wn.parameter_groups(model, weight_decay=0.1, no_decay=[])) == 2


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_sparse_parameter_elsewhere_is_nobodys_business() -> None:
    model = linear()
    model.other = nn.Parameter(torch.eye(3).to_sparse())
    model.rows = nn.Parameter(torch.eye(3).to_sparse_csr(), requires_grad=False)
    assert wn.apply(model, "linears").changed == ("0.weight", "1.weight")
    wn.migrate(model, to="legacy")
    wn.migrate(model)
    assert wn.remove(model).changed == ("0.weight", "1.weight")


def test_fake_tensors_have_no_norms_to_look_at() -> None:
    with torch._subclasses.FakeTensorMode():
        model = linear()
        wn.apply(model, "linears")
        assert model(torch.ones(2, 3)).shape == (2, 2)
        model[0].weight = torch.ones(4, 3)  # type: ignore[index]
        model.load_state_dict({"0.weight": torch.ones(4, 3)}, strict=False)
        wn.remove(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("own", [False, True])
def test_attention_never_runs_a_hook_on_its_output(own: bool) -> None:
    model = nn.MultiheadAttention(4, 1)
    if own:  # put there by the user, of a class that tells nothing
        model.out_proj = nn.Linear(4, 4)  # type: ignore[assignment]
    wn.apply(model, {"names": "out_proj"})
    before = state(model)
    with pytest.raises(wn.StackedParametrizationError, match="never calls the module"):
        wn.migrate(model, to="legacy")
    assert state(model) == before
    torch.nn.utils.weight_norm(wn.remove(model) and model.out_proj)
    assert [each.effect for each in wn.export.check(model, "onnx").findings] == ["stale"]
    wn.migrate(model)  # out of it, that is the cure
    assert wn.sites(model)[-1].layout == "parametrized"


def test_values_that_a_weight_cannot_take() -> None:
    model = normed()
    before = state(model)
    with pytest.raises(ValueError, match="expected a real weight, got one of dtype"):
        model[0].weight = torch.ones(4, 3, dtype=torch.complex64)  # type: ignore[index]
    wrong = {"0.weight": torch.ones(4, 3, dtype=torch.complex64)}
    with pytest.raises(RuntimeError, match="expected a real tensor"):
        model.load_state_dict(wrong, strict=False)
    assert state(model) == before


def test_kinds_of_weights_that_g_and_v_cannot_follow() -> None:
    model = normed()
    before = state(model)
    for wrong, says in (
        (torch.ones(4, 3).to_sparse(), "stored as sparse_coo; expected a dense tensor"),
        (torch.ones(4, 3).to_mkldnn(), "stored as _mkldnn"),
    ):
        with pytest.raises(wn.NonFloatingError, match=says):
            model[0].weight = wrong  # type: ignore[index]
    for dtype in (torch.int32, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(wn.NonFloatingError, match=f"dtype {dtype}"):
            model[0].parametrizations.weight[0].right_inverse(torch.ones(4, 3).to(dtype))  # type: ignore[index,union-attr]
    assert state(model) == before
