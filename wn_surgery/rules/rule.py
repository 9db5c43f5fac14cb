"""A rule: what to match, and what to do with it."""

# No postponed annotations here: jsonargparse (Lightning's command line) would then read the
# types of the attributes, which are the normalised forms, and refuse a plain string for `names`.
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import nn

from wn_surgery.errors import RuleError
from wn_surgery.norm.options import Dim, dtype_name, kept_axes
from wn_surgery.rules import fields
from wn_surgery.rules.fields import did_you_mean, type_matches, type_spelling
from wn_surgery.rules.patterns import PatternSet

__all__ = ["Rule"]

RuleAction: TypeAlias = Literal["apply", "remove", "skip"]
Tied: TypeAlias = Literal["error", "skip", "together", "untie"]
TypeSpec: TypeAlias = str | type
Predicate: TypeAlias = Callable[[str, nn.Module], bool]

_DEFAULT_PARAMS = ("weight",)
_OPTIONS = ("dim", "eps", "norm_dtype", "g_init", "train_g", "renormalize")
_APPLY_ONLY = (*_OPTIONS, "tied", "replace")


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Rule:
    """One instruction: what to match, and what to do with it.

    Fields combine with AND, the values within a field with OR. Where several rules match a
    site, the last one wins, whole. The attributes are the normalised forms: tuples, and None
    for "any".

    Args:
        action: ``"apply"``, ``"remove"`` or ``"skip"``.
        names: Patterns over the module's dotted path; None is any. See `docs/rules.md`.
        types: Classes, bare names or dotted names, matched along the MRO; None is any.
        params: Patterns over the module's own parameter names.
        where: A predicate ``(name, module) -> bool``; a rule that has one cannot be written
            to a file.
        exclude_names: Patterns of paths that are left out.
        exclude_types: Classes, and names of classes, that are left out.
        dim: The axis that keeps its own norms, or several; None for one norm over the whole
            tensor, with a scalar g; ``[]`` for the same with a g of the weight's rank, which FSDP
            can cut; ``"out"`` for the output channels of each known type of layer.
        eps: A lower bound for ‖v‖; 0.0 gives torch's exact values.
        norm_dtype: The dtype to compute norms in, such as ``"float32"``; None is the weight's.
        g_init: A number to fill g with; None keeps the weight as it is.
        train_g: False freezes g.
        renormalize: The norm that :func:`wn_surgery.renormalize` puts each slice of v back to;
            True is 1.0, ``"rms"`` is the square root of the slice's size; None leaves v alone.
        tied: What to do with a parameter tied to another: ``"error"``, ``"skip"``,
            ``"together"`` or ``"untie"``.
        replace: True replaces a weight norm that has other options.
        label: Where the rule comes from, for messages and tables; not a part of equality.

    Raises:
        RuleError: A field is wrong; the message says which, what was expected, and what to
            write.

    Example:
        >>> import wn_surgery as wn
        >>> rule = wn.Rule(types=["Conv1d", "ConvTranspose1d"], names="decoder.**", eps=1e-12)
        >>> rule.names
        ('decoder.**',)
        >>> print(rule.describe())
        apply types=Conv1d|ConvTranspose1d names=decoder.** eps=1e-12
    """

    action: RuleAction = "apply"
    names: tuple[str, ...] | None = None
    types: tuple[TypeSpec, ...] | None = None
    params: tuple[str, ...] = _DEFAULT_PARAMS
    where: Predicate | None = None
    exclude_names: tuple[str, ...] = ()
    exclude_types: tuple[TypeSpec, ...] = ()
    dim: int | tuple[int, ...] | Literal["out"] | None = 0
    eps: float = 0.0
    norm_dtype: torch.dtype | None = None
    g_init: float | None = None
    train_g: bool = True
    tied: Tied = "error"
    replace: bool = False
    label: str | None = field(default=None, compare=False)
    _names: PatternSet | None = field(init=False, compare=False)
    _params: PatternSet = field(init=False, compare=False)
    _exclude_names: PatternSet | None = field(init=False, compare=False)
    renormalize: float | Literal["rms"] | None = None  # the last, see __setstate__

    def __init__(
        self,
        *,
        action: RuleAction = "apply",
        names: str | Iterable[str] | None = None,
        types: TypeSpec | Iterable[TypeSpec] | None = None,
        params: str | Iterable[str] = _DEFAULT_PARAMS,
        where: Predicate | None = None,
        exclude_names: str | Iterable[str] = (),
        exclude_types: TypeSpec | Iterable[TypeSpec] = (),
        dim: int | tuple[int, ...] | list[int] | Literal["out"] | None = 0,
        eps: float = 0.0,
        norm_dtype: torch.dtype | str | None = None,
        g_init: float | None = None,
        train_g: bool = True,
        renormalize: bool | float | Literal["rms"] | None = None,
        tied: Tied = "error",
        replace: bool = False,
        label: str | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        try:
            values = _normalised(given)
        except RuleError as error:
            raise RuleError(f"{_spelled(given)}: {error}", detail=str(error)) from None
        for name, value in values.items():
            object.__setattr__(self, name, value)
        for name in ("names", "params", "exclude_names"):
            # None for any name, and for none that is excluded.
            patterns = PatternSet.of(values[name]) if values[name] else None
            object.__setattr__(self, f"_{name}", patterns)

    def __setstate__(self, state: list[Any]) -> None:
        # A pickle has the values in their order, and that of 0.1.0 no `renormalize`.
        for name, value in zip(self.__dataclass_fields__, [*state, None], strict=False):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return _spelled({name: getattr(self, name) for name in _FIELDS})

    def options(self) -> dict[str, Any]:
        """The options of weight norm itself, from dim to renormalize."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def describe(self) -> str:
        """The rule in one line: the action, then every field that is not at its default.

        Example:
            >>> import wn_surgery as wn
            >>> wn.Rule(action="skip", names=["**.conv_post", "head"]).describe()
            'skip names=**.conv_post|head'
        """
        order = ["types", "names", *(name for name in _FIELDS if name not in ("types", "names"))]
        given = self._given()
        words = [f"{name}={_word(given[name])}" for name in order if name in given]
        return " ".join([self.action, *words])

    def _given(self) -> dict[str, Any]:
        """The fields, without action and label, that are not at their defaults."""
        values = {name: getattr(self, name) for name in _FIELDS if name not in ("action", "label")}
        return {name: value for name, value in values.items() if value != _FIELDS[name]}

    def to_dict(self) -> dict[str, Any]:
        """The rule as plain JSON types, from which `from_dict` makes an equal rule.

        It has the action and every field that is not at its default. Classes become dotted names;
        the label is left out.

        Raises:
            RuleError: The rule has a ``where``, which is Python code.

        Example:
            >>> import torch, wn_surgery as wn
            >>> wn.Rule(types=torch.nn.Linear, norm_dtype=torch.float32).to_dict()
            {'action': 'apply', 'types': 'torch.nn.Linear', 'norm_dtype': 'float32'}
        """
        if self.where is not None:
            raise RuleError(
                f"rule `{self.describe()}`: where={_word(self.where)} is a Python predicate and "
                "cannot be written; use names, types or params, or keep this rule in Python"
            )
        given = {name: _plain(value) for name, value in self._given().items()}
        return {"action": self.action, **given}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Rule":
        """Make a rule from a mapping of field names to values.

        Args:
            data: As `to_dict` gives it. ``eps``, ``g_init`` and ``renormalize`` may be text: in
                YAML 1.1, ``1e-12`` is a string.

        Raises:
            RuleError: A field is unknown, or its value is wrong.

        Example:
            >>> import wn_surgery as wn
            >>> wn.Rule.from_dict({"types": "Linear", "eps": "1e-12"})
            Rule(action='apply', types=('Linear',), eps=1e-12)
        """
        if not isinstance(cast("object", data), Mapping):
            raise RuleError(f"expected a mapping of fields, got {data!r} ({type(data).__name__})")
        for key in data:
            if key not in _FIELDS:
                near = did_you_mean(key, _FIELDS) or f"; the fields are {', '.join(_FIELDS)}"
                detail = f"unknown field {key!r}{near}"
                raise RuleError(f"rule {dict(data)!r}: {detail}", detail=detail)
        numbers = {
            name: fields.number_from_text(data[name])
            for name in ("eps", "g_init", "renormalize")
            if name in data
        }
        return cls(**{**data, **numbers})


_FIELDS: dict[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(Rule).parameters.items()
}


def _normalised(given: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(given)
    values["action"] = fields.choice("action", given["action"], get_args(RuleAction))
    for name in ("names", "params", "exclude_names", "types", "exclude_types"):
        if given[name] is not None or name not in ("names", "types"):
            check = fields.types if name.endswith("types") else fields.strings
            values[name] = check(name, given[name])
    if given["where"] is not None and not callable(given["where"]):
        raise RuleError(
            f"where: expected a Python function (name, module) -> bool, got {given['where']!r}; "
            "a rule in a file cannot have one"
        )
    for name in ("dim", "eps", "norm_dtype", "g_init", "renormalize"):
        values[name] = getattr(fields, name)(given[name])
    for name in ("train_g", "replace"):
        values[name] = fields.flag(name, given[name])
    values["tied"] = fields.choice("tied", given["tied"], get_args(Tied))
    if not isinstance(given["label"], str | None):
        raise RuleError(f"label: expected a string, got {given['label']!r}")
    if values["action"] != "apply":
        for name in _APPLY_ONLY:
            # A removal of one end of a tie has to say what becomes of the other.
            ends_tie = name == "tied" and values["action"] == "remove"
            if values[name] != _FIELDS[name] and not ends_tie:
                raise RuleError(
                    f"{name}: means nothing for action {values['action']!r}; leave it out, or "
                    "write action 'apply'"
                )
    return values


def matches_class(rule: Rule, module_type: type) -> bool:
    """Whether ``types`` and ``exclude_types`` let a class (before any parametrization) through."""
    included = rule.types is None or type_matches(rule.types, module_type)
    return included and not type_matches(rule.exclude_types, module_type)


def matches_path(rule: Rule, path: str) -> bool:
    """Whether ``names`` and ``exclude_names`` let a module's path through; the root's is empty."""
    return bool(path_test(rule)(path))


def path_test(rule: Rule) -> Callable[[str], object]:
    """What says whether ``names`` and ``exclude_names`` let a path through: for many paths."""
    included = rule._names.test if rule._names else lambda _: True
    if not rule._exclude_names:
        return included
    excluded = rule._exclude_names.test
    return lambda path: included(path) and not excluded(path)


def matches_module(rule: Rule, path: str, module_type: type) -> bool:
    """Whether names, types and the two exclusions let a module through; ``where`` is not asked."""
    return matches_class(rule, module_type) and matches_path(rule, path)


def matches_param(rule: Rule, param: str) -> bool:
    """Whether ``params`` matches the name of a module's own parameter."""
    return rule._params.matches(param)


def takes_rank(rule: Rule, param: str, rank: int) -> bool:
    """Whether the rule is about parameters of so many axes: vectors only where it names them.

    It does if a pattern of ``params`` is the name, and ``params`` is not the default, since
    ``weight`` alone would bring in every LayerNorm. ``re:weight`` asks for a 1-D ``weight``.
    """
    if rank >= 2 or f"re:{re.escape(param)}" in rule.params:
        return True
    named = (pattern.source for pattern in rule._params.patterns if pattern.literal)
    return rule.params != _DEFAULT_PARAMS and param in named


def last_match(rules: Sequence[Rule], path: str, param: str, rank: int) -> Rule | None:
    """The rule that decides about a tensor of which only name and rank are known: the last."""
    found = (r for r in reversed(rules) if matches_param(r, param) and matches_path(r, path))
    return next((rule for rule in found if takes_rank(rule, param, rank)), None)


@functools.lru_cache
def has_axes(rank: int, dim: Dim) -> bool:
    """Whether a tensor with so many axes has those of ``dim``."""
    return all(axis < rank for axis in kept_axes(dim))


def is_universal(rule: Rule) -> bool:
    """Whether the rule is about everything: no types, and no names either, or ``**``."""
    return rule.types is None and (rule.names is None or "**" in rule.names)


def _spelled(values: Mapping[str, Any]) -> str:
    """A rule as the call that makes it, from fields that need not be valid."""
    shown = [
        f"{name}={value!r}"
        for name, value in values.items()
        if name == "action" or type(value) is not type(_FIELDS[name]) or value != _FIELDS[name]
    ]
    return f"Rule({', '.join(shown)})"


def _word(value: object) -> str:
    """A field's value for a table."""
    if value == ():
        return "[]"
    if isinstance(value, tuple):
        separator = "," if isinstance(value[0], int) else "|"
        return separator.join(map(_word, value))
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return str(getattr(value, "__name__", value))


def _plain(value: object) -> object:
    """A field's value in the types that JSON has."""
    if isinstance(value, tuple):
        items = [_plain(item) for item in value]
        return items[0] if len(items) == 1 else items
    if isinstance(value, torch.dtype):
        return _word(value)
    return type_spelling(value) if isinstance(value, type) else value
