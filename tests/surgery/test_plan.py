"""The plan: what it says, as a table and as JSON, and that it only reads."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from torch import nn

import wn_surgery as wn
from wn_surgery.rules.sources import RulesLike


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.LayerNorm(4), nn.Conv1d(4, 4, 3, groups=2), nn.Linear(4, 3)
    )


RULES: RulesLike = [
    {"types": ["Conv1d", "Linear"]},
    {"names": "2", "dim": [0, 2], "eps": 1e-6},
    {"action": "skip", "types": "Linear"},
]
TABLE = """\
site      layout                 dim     shape      g          why     shadowed
--------  ---------------------  ------  ---------  ---------  ------  --------
0.weight  plain -> parametrized  0       (4, 2, 3)  (4, 1, 1)  rule 1
2.weight  plain -> parametrized  (0, 2)  (4, 2, 3)  (4, 1, 3)  rule 2  rule 1
3.weight  plain (skip)                   (3, 4)                rule 3  rule 1
2 of 3 matched parameters change; 79 parameters -> 95 (g adds 16)
rule 1: apply types=Conv1d|Linear
rule 2: apply names=2 dim=0,2 eps=1e-06
rule 3: skip types=Linear"""


def test_the_table() -> None:
    assert str(wn.plan(model(), RULES)) == TABLE


def test_the_json() -> None:
    plan = wn.plan(model(), RULES)
    data = json.loads(plan.to_json())
    assert data == json.loads(json.dumps(plan.to_dict()))
    assert data["parameters"] == 79 and data["parameters_after"] == 95
    assert data["steps"][1] == {
        "names": ["2.weight"],
        "type": "Conv1d",
        "layout": "plain",
        "shape": [4, 2, 3],
        "dtype": "float32",
        "maker": None,
        "dim": None,
        "eps": None,
        "action": "apply",
        "after": "parametrized",
        "dim_after": [0, 2],
        "eps_after": 1e-6,
        "g_shape": [4, 1, 3],
        "shadowed": [1],
        "why": "rule 2",
    }
    assert json.loads(json.dumps(wn.apply(model(), RULES).to_dict()))["changed"] == [
        "0.weight",
        "2.weight",
    ]


def test_the_totals_are_those_of_the_model_afterwards() -> None:
    network = model()
    for rules in (RULES, {"types": "Conv1d", "replace": True, "dim": 1}, {"action": "remove"}):
        plan = wn.plan(network, rules, on_unmatched="ignore")
        assert plan.parameters == sum(p.numel() for p in network.parameters())
        wn.apply(network, rules, on_unmatched="ignore")
        assert sum(p.numel() for p in network.parameters()) == plan.parameters + plan.added


def test_a_rule_about_everything_says_so_and_means_what_it_can() -> None:
    network = model()
    network.register_buffer("scale", torch.ones(2, 2))
    network[0].register_parameter("codes", None)
    network[3].codes = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    plan = wn.plan(network, {"params": "*"})
    assert [step.site.name for step in plan.steps] == ["0.weight", "2.weight", "3.weight"]
    assert "which is everything that may be matched" in str(plan)


def test_vectors_only_by_name() -> None:
    assert not wn.plan(model(), {"types": "LayerNorm"}, on_unmatched="ignore").steps
    plan = wn.plan(model(), {"types": "LayerNorm", "params": "bias"}, check=False)
    (step,) = plan.steps
    assert step.site.name == "1.bias"  # zeros: named, but refused for what it holds
    assert [type(problem) for problem in plan.problems] == [wn.ZeroNormError]


@pytest.mark.parametrize(
    ("layer", "param", "dim"),
    [
        (nn.Linear(3, 4), "weight", 0),
        (nn.Conv2d(4, 6, 3, groups=2), "weight", 0),
        (nn.ConvTranspose1d(3, 5, 2), "weight", 1),
        (nn.ConvTranspose1d(4, 8, 2, groups=4), "weight", (0, 1)),
        (nn.ConvTranspose1d(3, 5, 2), "bias", 0),
        (nn.ConvTranspose1d(4, 8, 2, groups=2), "bias", 0),
        (nn.Embedding(5, 3), "weight", 1),
        (nn.EmbeddingBag(5, 3), "weight", 1),
        (nn.Bilinear(2, 3, 4), "weight", 0),
        (nn.LSTM(2, 3), "weight_hh_l0", 0),
        (nn.GRUCell(2, 3), "weight_ih", 0),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_output_axis(layer: nn.Module, param: str, dim: int | tuple[int, ...]) -> None:
    (step,) = wn.plan(layer, {"names": "", "params": param, "dim": "out"}).steps
    assert step.norm is not None and step.norm.dim == dim


def test_the_output_axis_of_a_depthwise_transposed_convolution_scales_one_channel() -> None:
    layer = nn.ConvTranspose1d(4, 8, 2, groups=4, bias=False)
    wn.apply(layer, {"names": "", "dim": "out"})
    x = torch.ones(1, 4, 3)
    before = layer(x)
    with torch.no_grad():
        layer.parametrizations.weight.original0.view(-1)[5] *= 2  # type: ignore[union-attr]
    changed = (layer(x) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [5]


def test_the_axis_of_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = nn.Sequential(Conv1D(6, 4))
    (step,) = wn.plan(layer, "linears").steps
    assert step.norm is not None and step.norm.dim == 1


def test_where() -> None:
    rule = wn.Rule(where=lambda name, module: getattr(module, "out_channels", 0) == 4)
    assert [step.site.name for step in wn.plan(model(), rule).steps] == ["0.weight", "2.weight"]
    never = wn.Rule(types="Linear", where=lambda name, module: False)
    with pytest.raises(wn.UnmatchedRuleError, match="`where` predicate is false"):
        wn.plan(model(), never)


def test_meta_models_are_planned_and_patched() -> None:
    with torch.device("meta"):
        network = model()
    assert len(wn.apply(network, RULES).changed) == 2
    assert network[0].weight.is_meta
    plain = model()
    network.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert torch.equal(network[0].weight, plain[0].weight)


def test_each_of_many_layers_that_are_alike_is_looked_at() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    network[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)
    network[2].weight = nn.Parameter(torch.zeros(0, 2))
    network[3].weight = nn.Parameter(torch.ones(2))
    network[4].weight.ds_id = 0  # as ZeRO marks what it shards
    with torch.inference_mode():
        network[5].weight = nn.Parameter(torch.ones(2, 2))
    found = wn.plan(network, {"types": "Linear"}, check=False)
    assert [(problem.kind, problem.site) for problem in found.problems] == [
        ("dtype", "1.weight"),
        ("zero_norm", "2.weight"),
        ("wrapped", "4.weight"),
        ("inference", "5.weight"),
    ]
    assert [step.site.name for step in found.steps if step.norm] == [
        "0.weight",
        "4.weight",
        "5.weight",
    ]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_garbage_collector_is_as_it_was(frozen: bool) -> None:
    if frozen:
        gc.freeze()
    try:
        wn.plan(model(), RULES)
        assert gc.isenabled() and bool(gc.get_freeze_count()) is frozen
        gc.disable()
        wn.plan(model(), RULES)
        assert not gc.isenabled() and bool(gc.get_freeze_count()) is frozen
    finally:
        gc.enable()
        gc.unfreeze()


def test_suggestions() -> None:
    network = nn.ModuleDict({"encoder": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
    for rule, says in [
        ({"names": "q_proj"}, "did you mean '**.q_proj' ('encoder.q_proj')"),
        ({"names": "encoder.q_porj"}, "did you mean 'encoder.q_proj'"),
        ({"names": "Encoder.q_proj"}, "case-sensitive"),
        ({"names": "encoder.layers.0"}, "'encoder' exists and holds 'q_proj'"),
        ({"names": "re:enc"}, "no module is named 're:enc'"),
        ({"names": "encoder.q_proj", "types": "Conv1d"}, "the types there are 'Linear'"),
        ({"types": "linear"}, "did you mean 'Linear'"),
    ]:
        with pytest.raises(wn.UnmatchedRuleError) as caught:
            wn.plan(network, rule)
        assert says in str(caught.value), rule
