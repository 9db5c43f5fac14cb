"""The fields of a rule: what each accepts, what it becomes, and how types are named.

Each function takes what the user gave and returns the form that a `Rule` keeps, or raises
`RuleError`, whose message the rule puts after its own text.
"""

from __future__ import annotations

import difflib
import math
import operator
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakKeyDictionary

import torch

from wn_surgery.errors import RuleError
from wn_surgery.norm.options import Dim, dtype_name
from wn_surgery.rules.patterns import PatternError, PatternSet

if TYPE_CHECKING:
    from collections.abc import Sequence
__all__ = ["MAX_DIM", "did_you_mean", "type_matches", "type_spelling"]

MAX_DIM: Final = 63  # torch allows 64 dimensions

_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """``"; did you mean '…'?"`` with the choice spelled most like ``word``, or nothing."""
    near = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """Check that ``value`` is one of the ``allowed`` words."""
    if isinstance(value, str) and value in allowed:
        return value
    expected = ", ".join(map(repr, allowed))
    raise RuleError(
        f"{name}: expected one of {expected}, got {value!r}{did_you_mean(value, allowed)}"
    )


def flag(name: str, value: object) -> bool:
    """Check that ``value`` is a bool, and not something that merely acts as one."""
    if isinstance(value, bool):
        return value
    raise RuleError(f"{name}: expected true or false, got {value!r}")


def strings(name: str, value: object, *, or_none: bool = False) -> tuple[str, ...]:
    """Make a tuple of patterns of one string or several, and check each; none only if allowed."""
    patterns = _items(name, value, str, or_none or name.startswith("exclude_"))
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise RuleError(
                f"{name}: expected a pattern as a string, got {pattern!r} "
                f"({type(pattern).__name__}); put it in quotes"
            )
        if name == "params" and not pattern:
            raise RuleError("params: no parameter has an empty name; write '*' for all of them")
    try:
        PatternSet.of(patterns)
    except PatternError as error:
        raise RuleError(f"{name}: {error}") from None
    return patterns


def types(name: str, value: object) -> tuple[str | type, ...]:
    """Make a tuple of classes and class names of one or several, and check each."""
    found = _items(name, value, (str, type), name.startswith("exclude_"))
    for item in found:
        if isinstance(item, str):
            _check_type_name(name, item)
        elif not isinstance(item, type):
            raise RuleError(
                f"{name}: expected a class or its name, got {item!r} ({type(item).__name__})"
            )
        if item in ("object", "builtins.object", object):
            raise RuleError(f"{name}: every module is an 'object'; leave {name} out to match all")
    return found


def dim(value: object) -> Dim | Literal["out"]:
    """Normalise ``dim``: an axis, distinct axes in order, None (the whole tensor) or "out".

    No axes are the whole tensor too, with a g that has the weight's rank, which FSDP can cut.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if value == "out":
            return "out"
        null = value.lower() == "none"
        hint = "; write null (None in Python)" if null else did_you_mean(value, ["out"])
        raise RuleError(f"dim: expected an axis, axes, None or 'out', got {value!r}{hint}")
    if not isinstance(value, list | tuple):
        return _axis(value)
    axes = sorted(map(_axis, value))
    if len(set(axes)) < len(axes):
        raise RuleError(f"dim: expected distinct axes, got {value!r}")
    return axes[0] if len(axes) == 1 else tuple(axes)


def eps(value: object) -> float:
    """Normalise ``eps``: a finite number, 0 or more."""
    number = _finite("eps", value)
    if number < 0:
        raise RuleError(f"eps: expected 0 or more, got {value!r}; it bounds the norm from below")
    return number


def g_init(value: object) -> float | None:
    """Normalise ``g_init``: None (keep the weight as it is) or the number that fills g."""
    return None if value is None else _finite("g_init", value)


def renormalize(value: object) -> float | Literal["rms"] | None:
    """Normalise ``renormalize``: None, ``"rms"``, or the norm that v is put back to."""
    if value is None or value is False:
        return None
    if value is True:
        return 1.0
    if isinstance(value, str):
        if value == "rms":
            return "rms"
        raise RuleError(
            f"renormalize: expected true, false, a norm or 'rms', got {value!r}"
            f"{did_you_mean(value, ['rms'])}"
        )
    number = _finite("renormalize", value)
    if number <= 0:
        raise RuleError(f"renormalize: expected a norm above 0, true or 'rms', got {value!r}")
    return number


def norm_dtype(value: object) -> torch.dtype | None:
    """Normalise ``norm_dtype``: None or one of torch's real floating dtypes of 16 bits or more."""
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if isinstance(value, torch.dtype | str) and name in _DTYPES:
        return _DTYPES[name]
    raise RuleError(
        f"norm_dtype: expected a floating dtype ({', '.join(_DTYPES)}), got {value!r}"
        f"{did_you_mean(name, _DTYPES)}"
    )


def number_from_text(value: object) -> object:
    """Read a number that YAML left as text: YAML 1.1 takes ``1e-12`` for a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def type_matches(wanted: Iterable[str | type], module_type: type) -> bool:
    """Whether ``module_type`` is one of the ``wanted`` classes, or a subclass of one.

    A bare name is compared with the name of every class along the MRO, a dotted one with its
    qualified name (from any segment on), and with where a package exports it again:
    ``torch.nn.Conv1d`` and ``nn.Conv1d`` are ``torch.nn.modules.conv.Conv1d``.
    """
    return any(
        _is_named(module_type, item) if isinstance(item, str) else issubclass(module_type, item)
        for item in wanted
    )


def type_spelling(cls: type) -> str:
    """The dotted name of a class: the public one of a torch layer, else the qualified one."""
    if getattr(torch.nn, cls.__name__, None) is cls:
        return f"torch.nn.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


# Weak keys, and only strings inside: a class that a user made may go when its model goes.
_NAMED: WeakKeyDictionary[type, dict[str, bool]] = WeakKeyDictionary()


def _is_named(module_type: type, spelling: str) -> bool:
    known = _NAMED.setdefault(module_type, {})
    if spelling not in known:
        known[spelling] = any(_spells(spelling, cls) for cls in module_type.__mro__[:-1])
    return known[spelling]


def _spells(spelling: str, cls: type) -> bool:
    package, _, name = spelling.rpartition(".")
    if not package:
        return cls.__name__ == name
    if f".{cls.__module__}.{cls.__qualname__}".endswith(f".{spelling}"):
        return True
    if cls.__name__ != name:
        return False
    if package == "nn" or package.startswith("nn."):
        package = f"torch.{package}"
    # Nothing is imported here: a package that exports the class has been imported already.
    try:
        return getattr(sys.modules.get(package), name, None) is cls
    except Exception:  # noqa: BLE001  # a package's own lazy __getattr__ may raise anything
        return False


def _check_type_name(name: str, spelling: str) -> None:
    parts = spelling.split(".")
    if all(part.isidentifier() or part == "<locals>" for part in parts):
        return
    hint = "; a base class matches its subclasses" if set(spelling) & set("*?[{") else ""
    raise RuleError(
        f"{name}: expected a class name such as 'Conv1d' or 'torch.nn.Conv1d', "
        f"got {spelling!r}{hint}"
    )


def _items(
    name: str, value: object, single: type | tuple[type, ...], or_none: bool
) -> tuple[Any, ...]:
    if isinstance(value, single):
        return (value,)
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise RuleError(
            f"{name}: expected a string or a list, got {value!r} ({type(value).__name__})"
        )
    items = tuple(value)
    if not items and not or_none:
        raise RuleError(f"{name}: an empty list matches nothing; leave {name} out instead")
    return items


def _axis(value: object) -> int:
    try:
        axis = operator.index(value)  # type: ignore[arg-type]  # that is what is tested
    except TypeError:
        axis = None
    if axis is None or isinstance(value, bool):
        raise RuleError(f"dim: expected an axis (int), axes, None or 'out', got {value!r}")
    if axis < 0:
        raise RuleError(
            f"dim: expected None or an axis that is not negative, got {axis}; torch stores None "
            "as -1, so to torch -1 is the whole tensor while -2 is an axis. Write None (null in "
            "a file) for the whole tensor, or count the axis from the front"
        )
    if axis > MAX_DIM:
        raise RuleError(f"dim: expected an axis up to {MAX_DIM}, torch's last, got {axis}")
    return axis


def _finite(name: str, value: object) -> float:
    with suppress(OverflowError):  # an int may be too large for a float
        if isinstance(value, int | float) and type(value) is not bool and math.isfinite(value):
            return float(value)
    raise RuleError(f"{name}: expected a finite number, got {value!r}")
