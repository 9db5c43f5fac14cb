"""Putting weight norm where a config says, and saying in the config where it was put."""

from __future__ import annotations

from typing import Any

import wn_surgery as wn
from wn_surgery.huggingface.adapters import without_adapters
from wn_surgery.huggingface.bases import PreTrainedModel
from wn_surgery.huggingface.config import WeightNormConfig
from wn_surgery.huggingface.noting import joined
from wn_surgery.huggingface.presets import rules_for
from wn_surgery.model import records
from wn_surgery.model.sites import normed
from wn_surgery.rules.sources import Rule

__all__ = ["freeze", "put"]


def put(model: PreTrainedModel, config: WeightNormConfig, *, replace: bool = False) -> wn.Report:
    """Put weight norm on a model by a config, and write into the config what was put where.

    Args:
        model: of transformers.
        config: with rules, or with sites to replay.
        replace: sites are replayed over weight norm with other options, of the model's class.

    Raises:
        WeightNormError: the config does not fit the model; neither has changed.
    """
    if config.sites is not None:
        rules, meant = tuple(_replayed(model, config, replace)), config.rules
    else:
        meant = rules_for(model.config.model_type) if config.rules is None else config.rules
        rules = without_adapters(model, meant)
    said = [_said(step) for step in wn.plan(model, rules).steps]
    report = wn.apply(model, rules)
    config.rules, config.model_type = meant, model.config.model_type
    config.sites = joined(records.record(model), said)
    return report


def _said(step: wn.Step) -> dict[str, Any]:
    """What a rule says about the g of a site, where that is not the norm of the weight."""
    said: dict[str, Any] = {"name": step.site.name}
    if step.rule is not None and step.rule.g_init is not None:
        said["g_init"] = step.rule.g_init
    if step.rule is not None and not step.rule.train_g:
        said["train_g"] = False
    return said


def freeze(model: PreTrainedModel, config: WeightNormConfig) -> None:
    """Freeze each g that the config says is not trained: loading makes new Parameters."""
    frozen = {site["name"] for site in config.sites or () if not site.get("train_g", True)}
    for site in normed(model):
        if site.name in frozen:
            site.held.g.requires_grad_(False)


def _replayed(model: PreTrainedModel, config: WeightNormConfig, replace: bool) -> list[Rule]:
    """The rules for the sites that a config names, and for no others.

    A body is loaded from the checkpoint of the whole model, and the other way round: then the
    names differ by the body's prefix, and what belongs to a head may be lacking.

    Raises:
        UnmatchedRuleError: the model lacks one of them; nothing has changed.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for site in wn.sites(model) for name in site.names}
    body = f"{model.base_model_prefix}."
    found: list[dict[str, Any]] = []
    lacking: list[str] = []
    for site in config.sites or ():
        name = site["name"]
        spellings = [name, name.removeprefix(body), f"{body}{name}"]
        here = next((each for each in spellings if each in known), None)
        if here is not None:
            found.append({**site, "name": here})
        else:
            lacking.append(name)
    part = type(model).__name__ not in (getattr(model.config, "architectures", None) or ())
    if lacking and not (part and found):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise wn.UnmatchedRuleError(
            f"the weight-norm config names {lacking[0]}{more}, which {type(model).__name__} does "
            "not have; it is of another model, or of another release of transformers"
        )
    return records.replay(found, replace=replace)
