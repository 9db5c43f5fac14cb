"""Values of a rule's fields: normal forms, errors, and how types are named."""

from __future__ import annotations

import gc
import sys
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from wn_surgery.errors import RuleError
from wn_surgery.rules import fields
from wn_surgery.rules.rule import matches_class, matches_module
from wn_surgery.rules.sources import Rule


def message(**fields: Any) -> str:
    with pytest.raises(RuleError) as caught:
        Rule(**fields)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("names", None, None),
        ("names", "a", ("a",)),
        ("names", "", ("",)),
        ("names", ["a", "b.**"], ("a", "b.**")),
        ("names", (name for name in "ab"), ("a", "b")),
        ("types", None, None),
        ("types", "Conv1d", ("Conv1d",)),
        ("types", nn.Linear, (nn.Linear,)),
        ("types", [nn.Linear, "nn.Conv1d"], (nn.Linear, "nn.Conv1d")),
        ("types", "f.<locals>.Net", ("f.<locals>.Net",)),
        ("params", "weight_hh_l*", ("weight_hh_l*",)),
        ("params", ["a", "b"], ("a", "b")),
        ("exclude_names", "a", ("a",)),
        ("exclude_names", [], ()),
        ("exclude_types", nn.Linear, (nn.Linear,)),
        ("exclude_types", [], ()),
        ("dim", 0, 0),
        ("dim", 63, 63),
        ("dim", [2], 2),
        ("dim", (2, 0), (0, 2)),
        ("dim", [1, 0], (0, 1)),
        ("dim", None, None),
        ("dim", (), ()),
        ("dim", [], ()),
        ("dim", "out", "out"),
        ("dim", torch.tensor(1), 1),
        ("eps", 1, 1.0),
        ("eps", 0, 0.0),
        ("norm_dtype", None, None),
        ("norm_dtype", "float32", torch.float32),
        ("norm_dtype", "torch.bfloat16", torch.bfloat16),
        ("norm_dtype", torch.float64, torch.float64),
        ("g_init", None, None),
        ("g_init", 1, 1.0),
        ("g_init", -0.5, -0.5),
        ("train_g", False, False),
        ("tied", "together", "together"),
        ("replace", True, True),
        ("label", "here", "here"),
    ],
)
def test_normal_forms(field: str, given: object, kept: object) -> None:
    fields: dict[str, Any] = {field: given}
    value = getattr(Rule(**fields), field)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"action": "aply"}, "action: expected one of 'apply', 'remove', 'skip', got 'aply'; did"),
        ({"action": "remov"}, "did you mean 'remove'?"),
        ({"action": None}, "action: expected one of"),
        ({"action": ["apply"]}, "action: expected one of"),
        ({"names": []}, "names: an empty list matches nothing; leave names out"),
        ({"names": 3}, "names: expected a string or a list, got 3 (int)"),
        ({"names": b"a"}, "names: expected a string or a list"),
        ({"names": {"a": 1}}, "names: expected a string or a list"),
        ({"names": ["a", True]}, "names: expected a pattern as a string, got True (bool); put it"),
        ({"names": "a**b"}, "names: '**' stands for whole segments"),
        ({"names": "re:("}, "names: 're:(' is not a regular expression"),
        ({"names": "{1..99999}"}, "names: the braces"),
        ({"types": []}, "types: an empty list matches nothing"),
        ({"types": 3}, "types: expected a string or a list"),
        ({"types": [3]}, "types: expected a class or its name, got 3 (int)"),
        ({"types": [list[int]]}, "types: expected a class or its name"),
        ({"types": "Conv*"}, "a base class matches its subclasses"),
        ({"types": ""}, "types: expected a class name"),
        ({"types": "nn..Linear"}, "types: expected a class name"),
        ({"types": object}, "types: every module is an 'object'; leave types out"),
        ({"types": "object"}, "types: every module is an 'object'"),
        ({"params": None}, "params: expected a string or a list"),
        ({"params": []}, "params: an empty list"),
        ({"params": ""}, "params: no parameter has an empty name; write '*'"),
        ({"params": "a["}, "params: a '['"),
        ({"where": "x"}, "where: expected a Python function"),
        ({"exclude_names": "a..b"}, "exclude_names: 'a..b' has an empty segment"),
        ({"exclude_names": None}, "exclude_names: expected a string or a list"),
        ({"exclude_types": "Foo bar"}, "exclude_types: expected a class name"),
        ({"exclude_types": object}, "exclude_types: every module"),
        ({"dim": -1}, "torch stores None as -1, so to torch -1 is the whole tensor while -2"),
        ({"dim": (0, -2)}, "count the axis from the front"),
        ({"dim": (1, 1)}, "dim: expected distinct axes"),
        ({"dim": True}, "dim: expected an axis (int)"),
        ({"dim": [True]}, "dim: expected an axis (int)"),
        ({"dim": 1.0}, "dim: expected an axis (int)"),
        ({"dim": 64}, "up to 63"),
        ({"dim": "None"}, "write null"),
        ({"dim": "oout"}, "did you mean 'out'?"),
        ({"eps": -1e-6}, "eps: expected 0 or more"),
        ({"eps": float("nan")}, "eps: expected a finite number"),
        ({"eps": float("inf")}, "eps: expected a finite number"),
        ({"eps": "1e-12"}, "eps: expected a finite number, got '1e-12'"),
        ({"eps": True}, "eps: expected a finite number"),
        ({"eps": None}, "eps: expected a finite number"),
        ({"norm_dtype": "float23"}, "did you mean 'float32'?"),
        ({"norm_dtype": torch.int32}, "norm_dtype: expected a floating dtype"),
        ({"norm_dtype": torch.complex64}, "norm_dtype: expected a floating dtype"),
        ({"norm_dtype": torch.float8_e4m3fn}, "norm_dtype: expected a floating dtype"),
        ({"norm_dtype": 32}, "norm_dtype: expected a floating dtype"),
        ({"g_init": float("inf")}, "g_init: expected a finite number"),
        ({"g_init": 10**400}, "g_init: expected a finite number"),
        ({"g_init": False}, "g_init: expected a finite number"),
        ({"g_init": "norm"}, "g_init: expected a finite number"),
        ({"train_g": 1}, "train_g: expected true or false, got 1"),
        ({"train_g": "no"}, "train_g: expected true or false"),
        ({"tied": "toghether"}, "did you mean 'together'?"),
        ({"replace": None}, "replace: expected true or false"),
        ({"label": 3}, "label: expected a string"),
    ],
)
def test_errors_name_the_rule_the_field_and_what_was_got(fields: dict[str, Any], said: str) -> None:
    text = message(**fields)
    assert said in text
    assert text.startswith("Rule(action=")
    assert f"{next(iter(fields))}=" in text


class Base(nn.Linear):
    class Inner(nn.Module):
        pass


class Derived(Base):
    pass


class Linear(nn.Module):
    """Of the same name as torch's, and no relation."""


@pytest.mark.parametrize(
    ("wanted", "module_type", "expected"),
    [
        (nn.Linear, nn.Linear, True),
        (nn.Linear, Derived, True),
        (Derived, nn.Linear, False),
        (nn.Module, Derived, True),
        ("Linear", nn.Linear, True),
        ("Linear", Derived, True),
        ("Linear", Linear, True),
        ("Base", Derived, True),
        ("Derived", Base, False),
        ("Module", Derived, True),
        ("linear", nn.Linear, False),
        ("Lin", nn.Linear, False),
        ("_ConvNd", nn.ConvTranspose2d, True),
        ("torch.nn.modules.linear.Linear", Derived, True),
        ("torch.nn.Linear", Derived, True),
        ("torch.nn.Linear", Linear, False),
        ("nn.Linear", Derived, True),
        ("nn.Linear", Linear, False),
        ("linear.Linear", nn.Linear, True),
        ("ear.Linear", nn.Linear, False),
        ("nn.modules.linear.Linear", nn.Linear, True),
        ("torch.nn.modules.Linear", nn.Linear, True),
        ("torch.Linear", nn.Linear, False),
        ("nowhere.Linear", nn.Linear, False),
        ("torch.nn.Conv1d", nn.Linear, False),
        ("Base.Inner", Base.Inner, True),
        ("Inner", Base.Inner, True),
        (f"{__name__}.Base.Inner", Base.Inner, True),
        (f"{__name__}.Base", Derived, True),
    ],
)
def test_types_go_along_the_bases(wanted: Any, module_type: type, expected: bool) -> None:
    rule = Rule(types=wanted)
    for _ in range(2):  # the second answer comes from the cache
        assert matches_class(rule, module_type) is expected
    assert matches_module(rule, "a", module_type) is expected
    assert matches_module(Rule(exclude_types=wanted), "a", module_type) is not expected
    assert matches_class(Rule(types=["Nothing", wanted]), module_type) is expected


def test_a_parametrized_module_matches_as_what_it_was() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert type(module) is not nn.Linear
    assert matches_class(Rule(types=["torch.nn.Linear"]), type(module))
    original = nn.utils.parametrize.type_before_parametrizations(module)
    assert matches_class(Rule(types=nn.Linear), original)


def test_a_local_class_is_named_with_its_function() -> None:
    class Local(nn.Module):
        pass

    name = fields.type_spelling(Local)
    assert "<locals>" in name
    assert matches_class(Rule(types=name), Local)


def test_a_package_whose_attributes_raise_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rude(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    monkeypatch.setitem(sys.modules, "rude", Rude("rude"))
    assert not matches_class(Rule(types="rude.Derived"), Derived)


def test_no_class_is_kept_alive() -> None:
    class Gone(nn.Module):
        pass

    assert not matches_class(Rule(types=["Linear", Gone]), nn.Conv1d)
    assert matches_class(Rule(types=["Linear", "Gone"]), Gone)
    reference = weakref.ref(Gone)
    del Gone
    gc.collect()
    assert reference() is None
