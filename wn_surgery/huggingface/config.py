"""The config: rules and the sites they gave, as JSON inside the model's own config."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import wn_surgery as wn
from wn_surgery.errors import RuleError
from wn_surgery.huggingface.bases import PreTrainedModel, QuantizationConfigMixin
from wn_surgery.norm import savers
from wn_surgery.rules.sources import Rule, RulesLike, as_rules

__all__ = ["FILE", "METHOD", "ConfigLike", "WeightNormConfig", "as_config", "recorded"]

VERSION = 1
FILE = "weight_norm_config.json"
# What transformers prints where this library has not been imported ("Unknown quantization type,
# got ...", and in guard.py "Unknown fusion type: ..."), so it says what to do.
METHOD = "weight_norm (pip install wn-surgery, and import wn_surgery.huggingface before loading)"

_KNOWN = ("quant_method", "version", "rules", "sites", "model_type")


class WeightNormConfig(QuantizationConfigMixin):
    """Rules for :func:`patch_model`, and once it has run the sites where they put weight norm.

    It travels as the model config's ``quantization_config``, the one place where transformers lets
    another library take part in loading. A reload replays the sites: rules that match otherwise in
    another release, or a preset that has changed, do not change what a checkpoint means.

    Args:
        rules: a rule, a list of rules or dicts, a path to YAML or JSON, or a preset's name;
            None for :func:`rules_for` the model's type.
        sites: what the rules gave; filled by :func:`patch_model`.
        model_type: of the model that was patched; filled by :func:`patch_model`.
        version: of the format.

    Raises:
        RuleError: the rules are wrong, or hold a predicate, which no file can.

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
        self.quant_method: Any = METHOD
        self.version = version
        self.rules: tuple[Rule, ...] | None = None if rules is None else as_rules(rules)
        for rule in self.rules or ():
            rule.to_dict()  # a predicate is refused here, by name
        self.sites = None if sites is None else [dict(site) for site in sites]
        self.model_type = model_type

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON data."""
        self._warn_of_absent_sites()
        rules = None if self.rules is None else [rule.to_dict() for rule in self.rules]
        return {
            "quant_method": self.quant_method,
            "version": self.version,
            "rules": rules,
            "sites": None if self.sites is None else [dict(site) for site in self.sites],
            "model_type": self.model_type,
        }

    def _warn_of_absent_sites(self) -> None:
        """Say so where a model is being saved that has none of the weight norm noted here.

        ``from_config`` builds a plain model on a config that speaks of weight norm.
        """
        frame = savers.asking()
        model = None if frame is None else frame.f_locals["self"]
        if frame is None or not self.sites or not isinstance(model, PreTrainedModel):
            return
        if recorded(model.config) is self and not any(site.normed for site in wn.sites(model)):
            name = type(model).__name__
            savers.warn(
                frame,
                f"the config of {name} speaks of weight norm on {self.sites[0]['name']}, which the "
                "model does not have; from_pretrained will put it there. patch_model(model, "
                "model.config.quantization_config) puts it there now, and unpatch_model(model) "
                "takes it out of the config",
            )

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dict that transformers reads from a file: it asks either for its method."""
        return self.to_dict().get(key, default)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``weight_norm_config.json`` into a folder, which is made if it is not there."""
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
                data = data.get("quantization_config") or {}
            if _is_ours(data):
                return cls(**data)
        raise RuleError(
            f"{folder} has neither {FILE} nor a config.json of a model that patch_model() patched",
            kind="file",
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightNormConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


ConfigLike: TypeAlias = WeightNormConfig | RulesLike | None
"""A config, whatever stands for rules, or None for the usual rules of the model's type."""


def as_config(config: ConfigLike) -> WeightNormConfig:
    """The config that somebody means.

    Args:
        config: a config, which is returned; the same as JSON data; a rule, a list of rules or
            dicts, a path to YAML or JSON, or a preset's name; None for :func:`rules_for` the
            model's type.

    Returns:
        The config.

    Raises:
        RuleError: the rules are wrong.

    Example:
        >>> from wn_surgery.huggingface.config import as_config
        >>> as_config([{"names": "head"}]).rules[0].names
        ('head',)
        >>> as_config(None).rules is None
        True
    """
    if isinstance(config, WeightNormConfig):
        return config
    if isinstance(config, Mapping) and _is_ours(config):
        return WeightNormConfig(**config)
    return WeightNormConfig(config)


def recorded(config: Any) -> WeightNormConfig | None:
    """What a model's config says about weight norm; as JSON data where no model was loaded."""
    held = getattr(config, "quantization_config", None)
    if isinstance(held, WeightNormConfig):
        return held
    return WeightNormConfig(**held) if isinstance(held, Mapping) and _is_ours(held) else None


def _is_ours(data: Any) -> bool:
    return isinstance(data, Mapping) and "weight_norm" in str(data.get("quant_method"))
