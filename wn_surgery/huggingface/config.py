"""The config of a patched model, and the note of it in the model's own config."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from wn_surgery.errors import RuleError
from wn_surgery.model.reloading import is_model_of
from wn_surgery.model.sites import normed
from wn_surgery.norm import savers
from wn_surgery.norm.module_class import base_class
from wn_surgery.rules.sources import Rule, RulesLike, as_rules

__all__ = [
    "METHOD", "ConfigLike", "WeightNormConfig", "as_config", "fill_in", "forget", "nested",
    "put_note", "recorded", "type_of", "write",
]  # fmt: skip

VERSION = 1
PATCHED = ("transformers", "diffusers")  # the libraries whose models keep a note in their config
FILE = "weight_norm_config.json"
# transformers prints this name where this library has not been imported ("Unknown quantization
# type, got ..." and "Unknown fusion type: ..."), so the name says what to do.
METHOD = "weight_norm (pip install wn-surgery, and import wn_surgery.huggingface before loading)"
_GUARD = "fusion_config"


class _Method(str):
    """:data:`METHOD`; diffusers takes it for an enum."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return METHOD


class WeightNormConfig(QuantizationConfigMixin):
    """Rules for :func:`patch_model`, and once it has run the sites where they put weight norm.

    It travels as the model config's ``quantization_config``, where transformers lets another
    library take part in loading. A reload replays the sites, whatever the rules match by then.

    Args:
        rules: a rule, a list of rules or dicts, a path to YAML or JSON, or a preset's name;
            None for :func:`rules_for` the model.
        sites: what the rules gave; filled by :func:`patch_model`.
        model_type: of the model that was patched; filled by :func:`patch_model`.
        version: of the format.

    Raises:
        RuleError: the rules are wrong, or hold a predicate, which cannot be written to a file.

    Example:
        >>> from wn_surgery.huggingface import WeightNormConfig
        >>> config = WeightNormConfig(rules=[{"names": "**.{q,k}_proj"}])
        >>> again = WeightNormConfig.from_dict(config.to_dict())
        >>> again.rules == config.rules
        True
    """

    def __init__(
        self,
        rules: RulesLike | None = None,
        sites: Sequence[Mapping[str, Any]] | None = None,
        model_type: str | None = None,
        version: int = VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown or version > VERSION:
            warnings.warn(
                f"this weight-norm config is of version {version}, this release of wn-surgery "
                f"reads version {VERSION} and leaves out {', '.join(sorted(unknown)) or 'nothing'}",
                stacklevel=2,
            )
        self.quant_method: Any = _Method(METHOD)
        self.version = version
        self.rules: tuple[Rule, ...] | None = None if rules is None else as_rules(rules)
        for rule in self.rules or ():
            rule.to_dict()  # refuses a predicate, by name
        self.sites = None if sites is None else [dict(site) for site in sites]
        self.model_type = model_type

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON data."""
        self._warn_of_absent_sites()
        return {
            "quant_method": METHOD,
            "version": self.version,
            "rules": None if self.rules is None else [rule.to_dict() for rule in self.rules],
            "sites": None if self.sites is None else [dict(site) for site in self.sites],
            "model_type": self.model_type,
        }

    def _warn_of_absent_sites(self) -> None:
        # from_config() builds a plain model on a config that names weight norm; this is its saving.
        frame = savers.asking()
        model = None if frame is None else frame.f_locals["self"]
        if frame is None or model is None or not self.sites or is_model_of(model) not in PATCHED:
            return
        if recorded(model.config) is self and not normed(model):
            savers.warn(
                frame,
                f"the config of {type(model).__name__} names weight norm on "
                f"{self.sites[0]['name']}, which the model does not have; from_pretrained will put "
                "it there. patch_model(model, model.config.quantization_config) puts it there now, "
                "and unpatch_model(model) takes it out of the config",
            )

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field, as a dict does: transformers asks either for its method."""
        return self.to_dict().get(key, default)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``weight_norm_config.json`` into a folder, which is made if it does not exist."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WeightNormConfig:
        """Read what :meth:`save_pretrained` wrote, or the config of a saved patched model.

        Raises:
            RuleError: there is none, or it is not JSON of this kind.
        """
        for name in (FILE, "config.json"):
            path = Path(folder) / name
            if not path.is_file():
                continue
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise RuleError(f"{path} is not JSON: {error}", kind="file") from error
            if name != FILE:
                data = data.get("quantization_config")
            if note := _read(data):
                return note
        raise RuleError(
            f"{folder} has neither {FILE} nor a config.json of a model that patch_model() patched",
            kind="file",
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightNormConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


ConfigLike: TypeAlias = WeightNormConfig | RulesLike | None
"""A config, anything that gives rules, or None for the usual rules of the model's type."""


def as_config(config: ConfigLike) -> WeightNormConfig:
    """Return the config that is meant: the same one, one from JSON data, or a new one of rules."""
    return _read(config) or WeightNormConfig(cast("RulesLike | None", config))


# The note in a model's config -------------------------------------------------------------------


def recorded(config: Any) -> WeightNormConfig | None:
    """Return the note in a model's config; it is JSON data there if no model was loaded."""
    return _read(getattr(config, "quantization_config", None))


def write(config: Any, note: WeightNormConfig) -> None:
    """Note in a model's config where weight norm is, with a guard for those who cannot read it.

    transformers only warns of an unknown quantization, and goes on with random weights. An unknown
    fusion is an error. So the config also asks for one whose name says what to install; ``False``
    means that it does nothing.
    """
    config.quantization_config = note
    setattr(config, _GUARD, {**(getattr(config, _GUARD, None) or {}), METHOD: False})


def forget(config: Any) -> None:
    """Take the note and its guard out of a model's config, which may ask for other fusions."""
    if recorded(config) is None:
        return
    vars(config).pop("quantization_config")
    fusions = dict(getattr(config, _GUARD, None) or {})
    if fusions.pop(METHOD, None) is not None:
        vars(config).pop(_GUARD)
        if fusions:
            setattr(config, _GUARD, fusions)


def nested(config: Any) -> Iterator[Any]:
    """Yield the configs inside a model's config, which belong to parts of the model."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from nested(value)


def put_note(model: nn.Module, note: WeightNormConfig | None) -> None:
    """Note in a model's own config where weight norm is, or with None forget it."""
    if isinstance(model, PreTrainedModel):
        _own_config(model)
        forget(model.config) if note is None else write(model.config, note)
        return
    held: Any = model
    config = {key: held.config[key] for key in held.config if key != "quantization_config"}
    held._internal_dict = type(held.config)(
        config if note is None else {**config, "quantization_config": note}
    )
    # What has loaded it: there is nothing to dequantize.
    vars(model).pop("hf_quantizer", None)


def type_of(model: nn.Module) -> str:
    """The type of model that a config is made for: of diffusers it is the class."""
    if isinstance(model, PreTrainedModel):
        return str(model.config.model_type)
    return base_class(model).__name__


def _own_config(model: nn.Module) -> None:
    """Give a model a copy of its config, so that a note in it is not read for another model.

    Models made from one config object share it, and a part of a model shares that of the whole.
    """
    copies: dict[int, Any] = {}
    config: Any = model.config
    for part in nested(copy.deepcopy(config, copies)):
        forget(part)  # of a part that was patched by itself: the note of the whole counts
    for module in model.modules():
        held = vars(module)
        # Under any attribute name; a part of the config goes over to its copy.
        for name, value in list(held.items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                held[name] = copies[id(value)]


def fill_in(
    sites: Iterable[Mapping[str, Any]] | None, more: Iterable[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Return the sites with what ``more`` says of g and v, where they do not say it themselves."""
    known = {site["name"]: site for site in more or ()}
    filled = [dict(site) for site in sites or ()]
    for site in filled:
        for key, value in known.get(site["name"], {}).items():
            if key in ("g_init", "train_g", "renormalize"):
                site.setdefault(key, value)
    return filled


def _read(data: Any) -> WeightNormConfig | None:
    """Return a config as it is, or from its JSON data; None for anything else."""
    if isinstance(data, Mapping) and "weight_norm" in str(data.get("quant_method")):
        return WeightNormConfig(**data)
    return data if isinstance(data, WeightNormConfig) else None
