"""Rules from wherever they come: Python, dicts, presets, and files of YAML or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast

from wn_surgery.errors import RuleError
from wn_surgery.rules.fields import did_you_mean
from wn_surgery.rules.presets import PRESETS, preset
from wn_surgery.rules.rule import Rule, RuleAction, Tied

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import torch
    import yaml
    from torch import nn

__all__ = ["Rule", "RulesLike", "RuleFields", "as_rules", "dump_rules", "given_rules", "load_rules"]

RulesLike: TypeAlias = Rule | Mapping[str, Any] | str | os.PathLike[str] | Iterable[Any] | type[Any]
"""A Rule, a mapping, a preset's name, a file, an iterable of these, a class, or several."""


class RuleFields(TypedDict, total=False):
    """The fields of one rule as keyword arguments: see :class:`wn_surgery.Rule`."""

    action: RuleAction
    names: str | Iterable[str] | None
    types: str | type | Iterable[str | type] | None
    params: str | Iterable[str]
    where: Callable[[str, nn.Module], bool] | None
    exclude_names: str | Iterable[str]
    exclude_types: str | type | Iterable[str | type]
    dim: int | tuple[int, ...] | list[int] | Literal["out"] | None
    eps: float
    norm_dtype: torch.dtype | str | None
    g_init: float | None
    train_g: bool
    renormalize: bool | float | Literal["rms"] | None
    tied: Tied
    replace: bool
    label: str | None


def given_rules(call: str, rules: RulesLike | None, fields: RuleFields) -> tuple[Rule, ...]:
    """The rules that a public function was given: as rules, or as the fields of one rule."""
    for name in fields:
        if name not in RuleFields.__annotations__:
            known = [*RuleFields.__annotations__, "optimizers", "on_unmatched"]
            raise TypeError(f"{call}() has no argument {name!r}{did_you_mean(name, known)}")
    if rules is not None and fields:
        raise TypeError(
            f"{call}() got rules and also {', '.join(f'{name}=' for name in fields)}, which is "
            "a rule of its own; give either, or put it into the list of rules"
        )
    if rules is None and not fields:
        raise TypeError(
            f"{call}() needs rules, as in {call}(model, nn.Linear) or {call}(model, names='*')"
        )
    return as_rules(rules) if rules is not None else (Rule(**fields),)


_YAML = (".yaml", ".yml")
_SUFFIXES = (*_YAML, ".json")


def as_rules(rules: RulesLike) -> tuple[Rule, ...]:
    """The rules in anything that stands for rules: objects, dicts, names and files.

    Args:
        rules: A Rule; a dict of a rule's fields, or of ``rules``, as a file holds it; a preset's
            name; the path of a YAML or JSON file; an iterable of these; or a class, or a list
            or tuple of classes, for one rule with these ``types``.

    Returns:
        The rules in order, presets replaced by theirs.

    Raises:
        RuleError: Something in it is not a rule; the message says which, by its place in the
            list. A file that cannot be read or understood has ``kind="file"``.

    Example:
        >>> from wn_surgery.rules.sources import as_rules
        >>> for rule in as_rules(["tcn", {"action": "skip", "names": "head"}]):
        ...     print(rule.describe())
        apply types=torch.nn.Conv1d exclude_names=**.downsample
        skip names=head
    """
    if isinstance(rules, Rule):
        return (rules,)
    if isinstance(rules, type) or (
        isinstance(rules, list | tuple) and rules and all(isinstance(each, type) for each in rules)
    ):
        return (Rule(types=rules),)
    if isinstance(rules, str):
        return _from_text(rules)
    if isinstance(rules, os.PathLike):
        return load_rules(rules)
    if isinstance(rules, Mapping):
        if set(rules) == {"rules"}:
            return _from_document(rules, None)
        return _from_mapping(rules)
    if isinstance(rules, Set):
        raise RuleError(
            f"expected the rules in their order, for the last that matches wins; got a "
            f"{type(rules).__name__}; write a list"
        )
    if isinstance(cast("object", rules), Iterable) and not isinstance(rules, bytes):
        return tuple(rule for i, item in enumerate(rules) for rule in _item(item, i + 1))
    raise RuleError(
        "expected a Rule, a dict, a list of them, a file or a preset's name, "
        f"got {type(rules).__name__}"
    )


def load_rules(path: str | os.PathLike[str]) -> tuple[Rule, ...]:
    """Read a rule file: a mapping with the key ``rules``, or a bare list.

    Args:
        path: A file whose name ends in ``.yaml``, ``.yml`` or ``.json``.

    Returns:
        The rules, each labelled with the file and its place in it, counted from 1.

    Raises:
        RuleError: ``kind="file"``: the file cannot be read, is neither YAML nor JSON, needs a
            package that is missing, or holds something else than rules.

    Example:
        >>> import tempfile, pathlib, wn_surgery as wn
        >>> from wn_surgery.rules.sources import dump_rules, load_rules
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "rules.json")
        ...     dump_rules(wn.Rule(types="Linear"), file)
        ...     load_rules(file) == (wn.Rule(types="Linear"),)
        True
    """
    name = os.fspath(path)
    suffix = _suffix(name)
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RuleError(f"{name}: file not found (from {Path.cwd()})", kind="file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RuleError(f"{name}: cannot be read: {error}", kind="file") from error
    read = _yaml_document if suffix in _YAML else _json_document
    return _from_document(read(text, name), name)


def dump_rules(rules: RulesLike, path: str | os.PathLike[str]) -> None:
    """Write a rule file in one step: a file that is there is replaced, or left as it is.

    Args:
        rules: Anything that `as_rules` takes.
        path: A file whose name ends in ``.yaml``, ``.yml`` or ``.json``.

    Raises:
        RuleError: A rule has a ``where`` and cannot be written; or (``kind="file"``) the file
            cannot be written, its name ends in something else, or PyYAML is missing.

    Example:
        See `load_rules`.
    """
    name = os.fspath(path)
    is_yaml = _suffix(name) in _YAML
    document = {"rules": [rule.to_dict() for rule in as_rules(rules)]}
    if is_yaml:
        options = {"sort_keys": False, "default_flow_style": None, "allow_unicode": True}
        text: str = _yaml(name).safe_dump(document, **options, width=100)
    else:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    # A link goes on pointing at its target, which is what gets replaced.
    target = Path(os.path.realpath(name))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RuleError(f"{name}: cannot be written: {error}", kind="file") from error


def _json_document(text: str, source: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise RuleError(f"{source}: not JSON: {error}", kind="file") from error


def _yaml_document(text: str, source: str) -> object:
    yaml_module = _yaml(source)

    class Loader(yaml_module.SafeLoader):  # type: ignore[name-defined, misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            # PyYAML keeps the last of two equal keys, in silence. Merged keys come in later.
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            _refuse_duplicates(keys, f"line {node.start_mark.line + 1}: ")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        return yaml_module.load(text, Loader=Loader)
    except RuleError as error:
        raise RuleError(f"{source}: {error}", kind="file") from error
    except (yaml_module.YAMLError, ValueError, RecursionError) as error:
        hint = "a pattern with '*', '{' or '[' needs quotes in YAML"
        raise RuleError(f"{source}: not YAML ({hint}): {error}", kind="file") from error


def _from_text(text: str) -> tuple[Rule, ...]:
    if text in PRESETS:
        return preset(text)
    if text.endswith(_SUFFIXES) or Path(text).is_file():
        return load_rules(text)
    raise RuleError(
        f"{text!r} is neither a preset nor a rule file{did_you_mean(text, PRESETS)} "
        f"(the presets are {', '.join(PRESETS)}; a file's name ends in {', '.join(_SUFFIXES)})"
    )


def _from_mapping(data: Mapping[str, Any]) -> tuple[Rule, ...]:
    if not isinstance(cast("object", data), Mapping) or "preset" not in data:
        return (Rule.from_dict(data),)
    others = [key for key in data if key != "preset"]
    if others:
        raise RuleError(f"'preset' stands alone, got {others[0]!r} beside it; write another rule")
    if not isinstance(data["preset"], str):
        raise RuleError(f"preset: expected a name, got {data['preset']!r}")
    return preset(data["preset"])


def _item(item: object, number: int) -> tuple[Rule, ...]:
    """The rules of one item of a Python list; an error says its place."""
    if not isinstance(item, Rule | Mapping | str | os.PathLike | list | tuple):
        raise RuleError(
            f"rule {number}: expected a Rule, a dict or a preset's name, got {type(item).__name__}"
        )
    try:
        return as_rules(item)
    except RuleError as error:
        if error.kind == "file":
            raise
        raise RuleError(f"rule {number}: {error.detail}") from error


def _from_document(document: object, source: str | None) -> tuple[Rule, ...]:
    """The rules in what a file holds; ``source`` is None for a dict that came from Python."""
    place, kind = ("", None) if source is None else (f"{source}, ", "file")
    items = document.get("rules") if isinstance(document, Mapping) else document
    others = [key for key in document if key != "rules"] if isinstance(document, Mapping) else []
    if others or not isinstance(items, list | tuple):
        got = "nothing" if items is None else type(items).__name__
        if others:
            got = f"the key {others[0]!r}{did_you_mean(others[0], ['rules'])}"
        whole = "" if source is None else f"{source}: "
        raise RuleError(
            f"{whole}expected a list of rules under the key 'rules', got {got}", kind=kind
        )
    rules: list[Rule] = []
    for number, item in enumerate(items, start=1):
        where = f"{place}rule {number}"
        try:
            if isinstance(item, Rule):
                found: tuple[Rule, ...] = (item,)
            else:
                # Only presets go by a bare name here: a file does not include other files.
                found = _from_mapping({"preset": item} if isinstance(item, str) else item)
        except RuleError as error:
            raise RuleError(f"{where}: {error.detail}", kind=kind) from error
        if source is not None:
            found = tuple(
                replace(rule, label=where) if rule.label is None else rule for rule in found
            )
        rules += found
    return tuple(rules)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_duplicates([key for key, _ in pairs])
    return dict(pairs)


def _refuse_duplicates(keys: list[Any], place: str = "") -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise RuleError(f"{place}the key {key!r} stands twice in one mapping; remove one")


def _suffix(name: str) -> str:
    suffix = Path(name).suffix.lower()
    if suffix not in _SUFFIXES:
        raise RuleError(
            f"{name}: the name of a rule file ends in {', '.join(_SUFFIXES)}; got {suffix!r}",
            kind="file",
        )
    return suffix


def _yaml(source: str) -> ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise RuleError(
            f"{source}: YAML needs PyYAML; run `pip install 'wn-surgery[yaml]'`, or use JSON",
            kind="file",
        ) from error
    return yaml
