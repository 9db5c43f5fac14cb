"""The rule as a value: equality, matching, describing, dicts and round trips."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wn_surgery.errors import RuleError
from wn_surgery.rules.patterns import PatternError, compile_pattern
from wn_surgery.rules.rule import (
    has_axes,
    is_universal,
    last_match,
    matches_class,
    matches_module,
    matches_param,
    takes_rank,
)
from wn_surgery.rules.sources import Rule, as_rules, dump_rules, load_rules


class Base(nn.Linear):
    pass


class Derived(Base):
    pass


def message(**fields: Any) -> str:
    with pytest.raises(RuleError) as caught:
        Rule(**fields)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


@pytest.mark.parametrize("action", ["remove", "skip"])
@pytest.mark.parametrize(
    "option",
    [
        {"dim": 1},
        {"dim": None},
        {"eps": 1e-3},
        {"norm_dtype": "float32"},
        {"g_init": 1.0},
        {"train_g": False},
        {"replace": True},
    ],
)
def test_options_of_apply_mean_nothing_elsewhere(action: str, option: dict[str, Any]) -> None:
    (name,) = option
    assert f"{name}: means nothing for action {action!r}" in message(action=action, **option)
    Rule(action="apply", **option)


def test_tied_is_for_apply_and_remove() -> None:
    assert Rule(action="remove", tied="together").tied == "together"
    assert "tied: means nothing for action 'skip'" in message(action="skip", tied="together")


def test_fields_are_given_by_name_only() -> None:
    with pytest.raises(TypeError):
        Rule("apply")  # type: ignore[call-arg]


def test_the_defaults_of_the_signature_are_those_of_the_fields() -> None:
    signature = inspect.signature(Rule).parameters
    public = {f.name: f.default for f in dataclasses.fields(Rule) if f.init}
    assert public == {name: parameter.default for name, parameter in signature.items()}


def test_a_rule_is_a_value() -> None:
    rule = Rule(names="a", types=[nn.Linear], dim=(1, 0), label="x")
    same = Rule(names=["a"], types=nn.Linear, dim=[0, 1], label="y")
    assert rule == same
    assert hash(rule) == hash(same)
    assert rule != Rule(names="a", types="Linear", dim=(0, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.dim = 1  # type: ignore[misc]
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert other == rule
        assert other.label == "x"
        assert matches_module(other, "a", nn.Linear)
    replaced = dataclasses.replace(rule, names=("b",))
    assert replaced.names == ("b",)
    assert replaced.label == "x"
    assert matches_module(replaced, "b", nn.Linear)
    assert not matches_module(replaced, "a", nn.Linear)


def test_repr_is_the_call_that_makes_the_rule() -> None:
    rule = Rule(action="apply", names=["a", "b"], dim=None, eps=0.5, g_init=1)
    assert repr(rule) == "Rule(action='apply', names=('a', 'b'), dim=None, eps=0.5, g_init=1.0)"
    assert eval(repr(rule)) == rule
    assert repr(Rule()) == "Rule(action='apply')"


def predicate(name: str, module: nn.Module) -> bool:
    return True


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (Rule(), "apply"),
        (Rule(action="skip", names="**.conv_post"), "skip names=**.conv_post"),
        (
            Rule(types=["Conv1d", nn.ConvTranspose1d], names="decoder.**", dim=1, eps=1e-12),
            "apply types=Conv1d|ConvTranspose1d names=decoder.** dim=1 eps=1e-12",
        ),
        (Rule(dim=(0, 2), norm_dtype="float32"), "apply dim=0,2 norm_dtype=float32"),
        (Rule(dim=None, train_g=False, label="x"), "apply dim=None train_g=False"),
        (Rule(where=predicate, exclude_types="A"), "apply where=predicate exclude_types=A"),
    ],
)
def test_describe(rule: Rule, line: str) -> None:
    assert rule.describe() == line


def test_options() -> None:
    rule = Rule(dim=None, eps=0.5, norm_dtype="float32", g_init=1, train_g=False, replace=True)
    assert rule.options() == {
        "dim": None,
        "eps": 0.5,
        "norm_dtype": torch.float32,
        "g_init": 1.0,
        "train_g": False,
        "renormalize": None,
    }


@pytest.mark.parametrize(
    ("rule", "universal"),
    [
        (Rule(), True),
        (Rule(names="**"), True),
        (Rule(names=["**", "a"]), True),
        (Rule(params="*"), True),
        (Rule(names="a.**"), False),
        (Rule(types="Linear"), False),
        (Rule(names="**", types="Linear"), False),
    ],
)
def test_is_universal(rule: Rule, universal: bool) -> None:
    assert is_universal(rule) is universal


def test_fields_combine_with_and_values_with_or() -> None:
    rule = Rule(
        names=["a.**", "b"],
        types=["Linear", nn.Conv1d],
        exclude_names=["a.x", "**.lora"],
        exclude_types=[Derived],
        where=lambda name, module: False,  # not asked by matches_module
    )
    assert matches_module(rule, "a.y", nn.Linear)
    assert matches_module(rule, "b", nn.Conv1d)
    assert matches_module(rule, "a", Base)
    assert not matches_module(rule, "c", nn.Linear)
    assert not matches_module(rule, "b", nn.Conv2d)
    assert not matches_module(rule, "a.x", nn.Linear)
    assert not matches_module(rule, "a.y.lora", nn.Linear)
    assert not matches_module(rule, "a.y", Derived)
    assert matches_module(Rule(), "", nn.Module)


def test_params() -> None:
    assert matches_param(Rule(), "weight")
    assert not matches_param(Rule(), "weight_hh_l0")
    rule = Rule(params=["weight_hh_l*", "in_proj_weight"])
    assert matches_param(rule, "weight_hh_l0_reverse")
    assert matches_param(rule, "in_proj_weight")
    assert not matches_param(rule, "weight")


@pytest.mark.parametrize(
    ("params", "param", "named"),
    [
        ("scale", "scale", True),
        (["weight", "scale"], "weight", True),
        ("sc*", "scale", False),
        ("{scale,shift}", "scale", False),
        ("scale", "shift", False),
        ("re:weight", "weight", True),
        ("re:weigh.", "weight", False),
        # The default names no one: it would bring in every LayerNorm.
        ("weight", "weight", False),
    ],
)
def test_parameters_named_literally(params: Any, param: str, named: bool) -> None:
    rule = Rule(params=params)
    assert takes_rank(rule, param, 1) is named
    assert takes_rank(rule, param, 2)


def test_the_last_rule_decides_about_a_name_and_a_rank() -> None:
    rules = (Rule(names="a.**"), Rule(names="a.b", action="skip"), Rule(params="scale"))
    assert last_match(rules, "a.c", "weight", 2) is rules[0]
    assert last_match(rules, "a.b", "weight", 2) is rules[1]
    assert last_match(rules, "a.b", "scale", 1) is rules[2]
    assert last_match(rules, "a.b", "weight", 1) is None
    assert last_match(rules, "b", "weight", 2) is None


def test_a_tensor_has_the_axes_of_a_dim_or_not() -> None:
    assert has_axes(0, None) and has_axes(2, 1) and has_axes(2, (0, 1))
    assert not has_axes(2, 2) and not has_axes(2, (0, 2))


def test_to_dict_holds_what_is_not_at_its_default() -> None:
    assert Rule().to_dict() == {"action": "apply"}
    rule = Rule(
        names=["a", "b"],
        types=[nn.Conv1d, "Linear", Base],
        params="w*",
        dim=[0, 1],
        norm_dtype=torch.bfloat16,
        label="gone",
    )
    data = rule.to_dict()
    assert data == {
        "action": "apply",
        "names": ["a", "b"],
        "types": ["torch.nn.Conv1d", "Linear", f"{__name__}.Base"],
        "params": "w*",
        "dim": [0, 1],
        "norm_dtype": "bfloat16",
    }
    assert json.loads(json.dumps(data)) == data
    assert matches_class(Rule.from_dict(data), Derived)


@pytest.mark.parametrize("name", ["", "a.json", "a.yaml"])
def test_a_rule_with_a_predicate_is_not_written(name: str, tmp_path: Path) -> None:
    rule = Rule(names="a", where=predicate)
    with pytest.raises(RuleError, match=r"names=a.*where=predicate is a Python predicate"):
        dump_rules(rule, tmp_path / name) if name else rule.to_dict()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"dims": 1}, "unknown field 'dims'; did you mean 'dim'?"),
        ({"name": "a"}, "unknown field 'name'; did you mean 'names'?"),
        ({"exclude_name": "a"}, "did you mean 'exclude_names'?"),
        ({"zzz": 1}, "unknown field 'zzz'; the fields are action, names"),
        ({1: 1}, "unknown field 1"),
        ({"_names": None}, "unknown field '_names'"),
        ({"eps": "small"}, "eps: expected a finite number, got 'small'"),
        ({"eps": "nan"}, "eps: expected a finite number"),
        ("apply", "expected a mapping of fields, got 'apply' (str)"),
        ([], "expected a mapping of fields, got [] (list)"),
    ],
)
def test_from_dict_errors(data: Any, said: str) -> None:
    with pytest.raises(RuleError) as caught:
        Rule.from_dict(data)
    assert said in str(caught.value)


def test_numbers_may_be_text_in_a_dict() -> None:
    assert Rule.from_dict({"eps": "1e-12", "g_init": "1"}) == Rule(eps=1e-12, g_init=1.0)


PATTERN = st.text(max_size=10).filter(lambda text: text.isprintable() and _valid(text))
TYPE = st.sampled_from(["Linear", "nn.Conv1d", "a.<locals>.B"])
PARAM = PATTERN.filter(bool)


def _valid(text: str) -> bool:
    try:
        compile_pattern(text)
    except PatternError:
        return False
    return True


def several(item: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return item | st.lists(item, min_size=1, max_size=3)


MATCHING = {
    "names": st.none() | several(PATTERN),
    "types": st.none() | several(TYPE),
    "params": several(PARAM),
    "exclude_names": several(PATTERN),
    "exclude_types": several(TYPE),
}
OPTIONS = {
    "dim": st.none()
    | st.just("out")
    | st.integers(0, 63)
    | st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True),
    "eps": st.floats(0, allow_nan=False, allow_infinity=False),
    "norm_dtype": st.none() | st.sampled_from(["float32", torch.bfloat16]),
    "g_init": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "train_g": st.booleans(),
    "tied": st.sampled_from(["error", "skip", "together", "untie"]),
    "replace": st.booleans(),
}


def make(fields: dict[str, Any]) -> Rule:
    return Rule(**fields)


OTHER = {"action": st.sampled_from(["remove", "skip"])}
RULES = st.one_of(
    st.fixed_dictionaries({}, optional={**MATCHING, **OPTIONS}).map(make),
    st.fixed_dictionaries(OTHER, optional=MATCHING).map(make),
)


@settings(deadline=None)
@given(st.lists(RULES, max_size=3))
def test_round_trips(rules: list[Rule]) -> None:
    expected = tuple(rules)
    assert tuple(Rule.from_dict(rule.to_dict()) for rule in rules) == expected
    with tempfile.TemporaryDirectory() as folder:
        for name in ("rules.json", "rules.yaml"):
            dump_rules(rules, Path(folder, name))
            assert load_rules(Path(folder, name)) == expected
    assert as_rules([rule.to_dict() for rule in rules]) == expected
    for rule in rules:
        assert eval(repr(rule), {"Rule": Rule, "torch": torch}) == rule
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert rule.describe().startswith(rule.action)
