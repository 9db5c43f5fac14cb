"""A rule: what to match, and what to do with it."""

# No postponed annotations here: jsonargparse (Lightning's command line) would then read the
# types of the attributes, which are the normalised forms, and refuse a plain string for `names`.
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn

from wn_surgery.errors import RuleError
from wn_surgery.rules import fields
from wn_surgery.rules.fields import (
    did_you_mean,
    type_matches,
    type_spelling,
)
from wn_surgery.rules.patterns import PatternSet

__all__ = ["Rule"]

Action: TypeAlias = Literal["apply", "remove", "skip"]
Tied: TypeAlias = Literal["error", "skip", "together", "untie"]
Dim: TypeAlias = int | tuple[int, ...] | Literal["out"] | None
TypeSpec: TypeAlias = str | type
Predicate: TypeAlias = Callable[[str, nn.Module], bool]

_DEFAULT_PARAMS = ("weight",)
_OPTIONS = ("dim", "eps", "norm_dtype", "g_init", "train_g")
_TIED = ("error", "skip", "together", "untie")
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
            tensor; ``"out"`` for the output channels of each known type of layer.
        eps: A lower bound for ‖v‖; 0.0 gives torch's exact values.
        norm_dtype: The dtype to compute norms in, such as ``"float32"``; None is the weight's.
        g_init: A number to fill g with; None keeps the weight as it is.
        train_g: False freezes g.
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

    action: Action = "apply"
    names: tuple[str, ...] | None = None
    types: tuple[TypeSpec, ...] | None = None
    params: tuple[str, ...] = _DEFAULT_PARAMS
    where: Predicate | None = None
    exclude_names: tuple[str, ...] = ()
    exclude_types: tuple[TypeSpec, ...] = ()
    dim: Dim = 0
    eps: float = 0.0
    norm_dtype: torch.dtype | None = None
    g_init: float | None = None
    train_g: bool = True
    tied: Tied = "error"
    replace: bool = False
    label: str | None = field(default=None, compare=False)
    _names: PatternSet | None = field(init=False, compare=False)
    _params: PatternSet = field(init=False, compare=False)
    _excluded: PatternSet = field(init=False, compare=False)

    def __init__(
        self,
        *,
        action: Action = "apply",
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
        names = self.names
        object.__setattr__(self, "_names", None if names is None else PatternSet.of(names))
        object.__setattr__(self, "_params", PatternSet.of(self.params))
        object.__setattr__(self, "_excluded", PatternSet.of(self.exclude_names))

    def __repr__(self) -> str:
        return _spelled({name: getattr(self, name) for name in _FIELDS})

    def matches_module(self, path: str, module_type: type) -> bool:
        """Tell whether names, types and the two exclusions let a module through.

        The predicate ``where`` is not asked.

        Args:
            path: The module's dotted path; the root's is the empty string.
            module_type: Its class, before any parametrization.

        Returns:
            True if the rule matches.

        Example:
            >>> import torch, wn_surgery as wn
            >>> rule = wn.Rule(names="**.fc", types="Linear", exclude_names="head.**")
            >>> [rule.matches_module(path, torch.nn.Linear) for path in ("fc", "a.fc", "head.fc")]
            [True, True, False]
        """
        return self.matches_class(module_type) and self.matches_path(path)

    def matches_class(self, module_type: type) -> bool:
        """Tell whether ``types`` and ``exclude_types`` let a class through.

        Args:
            module_type: The class, before any parametrization.

        Returns:
            True if they do.

        Example:
            >>> import torch, wn_surgery as wn
            >>> wn.Rule(types="Module", exclude_types="Linear").matches_class(torch.nn.Bilinear)
            True
        """
        return self.type_matches(module_type) and not type_matches(self.exclude_types, module_type)

    def matches_path(self, path: str) -> bool:
        """Tell whether ``names`` and ``exclude_names`` let a path through.

        Args:
            path: The module's dotted path; the root's is the empty string.

        Returns:
            True if they do.

        Example:
            >>> import wn_surgery as wn
            >>> wn.Rule(names="**.fc", exclude_names="head.**").matches_path("head.fc")
            False
        """
        if self._names is not None and not self._names.matches(path):
            return False
        return not self._excluded.matches(path)

    def type_matches(self, module_type: type) -> bool:
        """Tell whether ``types`` fits a class or one of its bases; ``exclude_types`` is not asked.

        Args:
            module_type: The class, before any parametrization.

        Returns:
            True if it fits, or if the rule has no ``types``.

        Example:
            >>> import torch, wn_surgery as wn
            >>> wn.Rule(types="nn.Conv1d").type_matches(torch.nn.Conv1d)
            True
        """
        return self.types is None or type_matches(self.types, module_type)

    def matches_param(self, param: str) -> bool:
        """Tell whether ``params`` matches a name of the module's own parameters.

        Args:
            param: The name, such as ``"weight"``.

        Returns:
            True if a pattern matches it.

        Example:
            >>> import wn_surgery as wn
            >>> wn.Rule(params="weight_hh_l*").matches_param("weight_hh_l0")
            True
        """
        return self._params.matches(param)

    def names_param_literally(self, param: str) -> bool:
        """Tell whether the rule asks for this very parameter, even one of fewer than 2 axes.

        It does if a pattern of ``params`` is its name, and ``params`` is not the default, since
        ``weight`` alone would bring in every LayerNorm. ``re:weight`` asks for a 1-D ``weight``.

        Args:
            param: The parameter's name.

        Returns:
            True if the rule names it.

        Example:
            >>> import wn_surgery as wn
            >>> wn.Rule(params=["scale"]).names_param_literally("scale")
            True
            >>> wn.Rule().names_param_literally("weight")
            False
        """
        if f"re:{re.escape(param)}" in self.params:
            return True
        return self.params != _DEFAULT_PARAMS and param in {
            pattern.source for pattern in self._params.patterns if pattern.literal
        }

    @property
    def is_universal(self) -> bool:
        """True if the rule has no types, and no names either, or only ``**``."""
        return self.types is None and (self.names is None or "**" in self.names)

    def options(self) -> dict[str, Any]:
        """Give the options of weight norm itself: dim, eps, norm_dtype, g_init, train_g.

        Returns:
            A new dict.

        Example:
            >>> import wn_surgery as wn
            >>> wn.Rule(dim=None).options()
            {'dim': None, 'eps': 0.0, 'norm_dtype': None, 'g_init': None, 'train_g': True}
        """
        return {name: getattr(self, name) for name in _OPTIONS}

    def describe(self) -> str:
        """Say the rule in one line: the action, then every field that is not at its default.

        Returns:
            The line.

        Example:
            >>> import wn_surgery as wn
            >>> wn.Rule(action="skip", names=["**.conv_post", "head"]).describe()
            'skip names=**.conv_post|head'
        """
        order = ["types", "names", *(name for name in _FIELDS if name not in ("types", "names"))]
        words = [
            f"{name}={_word(getattr(self, name))}"
            for name in order
            if name not in ("action", "label") and getattr(self, name) != _FIELDS[name]
        ]
        return " ".join([self.action, *words])

    def to_dict(self) -> dict[str, Any]:
        """Give the rule as plain JSON types: the action and all that is not at its default.

        Classes become dotted names, and the label stays behind.

        Returns:
            A new dict, from which `from_dict` makes an equal rule.

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
        changed = {
            name: _plain(getattr(self, name))
            for name in _FIELDS
            if name not in ("action", "label") and getattr(self, name) != _FIELDS[name]
        }
        return {"action": self.action, **changed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Rule":
        """Make a rule from a mapping of field names to values.

        Args:
            data: As `to_dict` gives it. ``eps`` and ``g_init`` may be text, for in YAML 1.1
                ``1e-12`` is a string.

        Returns:
            The rule.

        Raises:
            RuleError: A field is unknown, or its value is wrong.

        Example:
            >>> import wn_surgery as wn
            >>> wn.Rule.from_dict({"types": "Linear", "eps": "1e-12"})
            Rule(action='apply', types=('Linear',), eps=1e-12)
        """
        if not isinstance(cast("object", data), Mapping):
            detail = f"expected a mapping of fields, got {data!r} ({type(data).__name__})"
            raise RuleError(detail)
        for key in data:
            if key not in _FIELDS:
                near = did_you_mean(key, _FIELDS) or f"; the fields are {', '.join(_FIELDS)}"
                detail = f"unknown field {key!r}{near}"
                raise RuleError(f"rule {dict(data)!r}: {detail}", detail=detail)
        values: dict[str, Any] = dict(data)
        for name in ("eps", "g_init"):
            if name in values:
                values[name] = fields.number_from_text(values[name])
        return cls(**values)


_FIELDS: dict[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(Rule).parameters.items()
}


def _normalised(given: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(given)
    values["action"] = fields.choice("action", given["action"], ("apply", "remove", "skip"))
    for name in ("names", "params", "exclude_names"):
        optional = name == "names" and given[name] is None
        values[name] = None if optional else fields.strings(name, given[name])
    for name in ("types", "exclude_types"):
        optional = name == "types" and given[name] is None
        values[name] = None if optional else fields.types(name, given[name])
    if given["where"] is not None and not callable(given["where"]):
        raise RuleError(
            f"where: expected a Python function (name, module) -> bool, got {given['where']!r}; "
            "a rule in a file cannot have one"
        )
    for name in ("dim", "eps", "norm_dtype", "g_init"):
        values[name] = getattr(fields, name)(given[name])
    for name in ("train_g", "replace"):
        values[name] = fields.flag(name, given[name])
    values["tied"] = fields.choice("tied", given["tied"], _TIED)
    if not isinstance(given["label"], str | None):
        raise RuleError(f"label: expected a string, got {given['label']!r}")
    if values["action"] != "apply":
        for name in _APPLY_ONLY:
            # Removing one end of a tie needs to be told what becomes of the other.
            if name == "tied" and values["action"] == "remove":
                continue
            if values[name] != _FIELDS[name]:
                raise RuleError(
                    f"{name}: means nothing for action {values['action']!r}; leave it out, or "
                    "write action 'apply'"
                )
    return values


def _spelled(values: Mapping[str, Any]) -> str:
    """Write a rule as the call that makes it, from fields that need not be valid."""
    shown = [
        f"{name}={value!r}"
        for name, value in values.items()
        if name == "action" or type(value) is not type(_FIELDS[name]) or value != _FIELDS[name]
    ]
    return f"Rule({', '.join(shown)})"


def _word(value: object) -> str:
    """Write a field's value for a table."""
    if isinstance(value, tuple):
        separator = "," if isinstance(value[0], int) else "|"
        return separator.join(map(_word, value))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(getattr(value, "__name__", value))


def _plain(value: object) -> object:
    """Write a field's value in the types that JSON has."""
    if isinstance(value, tuple):
        items = [_plain(item) for item in value]
        return items[0] if len(items) == 1 else items
    if isinstance(value, torch.dtype):
        return _word(value)
    return type_spelling(value) if isinstance(value, type) else value
