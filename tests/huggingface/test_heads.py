"""Heads of which g is given and frozen, as DINO has it: patched, saved, loaded and exchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import wn_surgery as wn
from wn_surgery.huggingface import WeightNormConfig, patch_model, rules_for, save_pretrained

PIXELS = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "mlp_ratio": 2,
    "image_size": 8,
    "patch_size": 4,
}
RULE = "dino-head"


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, num_labels=5))


def dinov2() -> Any:
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, num_labels=5))


CLASSIFIERS = pytest.mark.parametrize("build", [vit, dinov2])


def patched(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    # What a body has is not the head's business.
    patch_model(model, WeightNormConfig([{"names": "**.attention.**", "types": "Linear"}]))
    patch_model(model, WeightNormConfig(RULE))
    return model


def head(model: Any) -> wn.Site:
    (site,) = [site for site in wn.sites(model) if site.name == "classifier.weight"]
    return site


def assert_unit(model: Any, rows: int = 5) -> None:
    """g is 1 and frozen, and so the rows of the weight have the norm 1."""
    held = head(model).held
    assert held is not None and held.g is not None and held.v is not None
    assert torch.equal(held.g, torch.ones(rows, 1))
    assert not held.g.requires_grad and held.v.requires_grad
    torch.testing.assert_close(model.classifier.weight.norm(dim=1), torch.ones(rows))
    assert all(p.requires_grad for p in model.parameters() if p is not held.g)


def step(model: Any) -> Tensor:
    """One step of training, and what the weight was before."""
    before: Tensor = model.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    model(PIXELS, labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    return before


@CLASSIFIERS
def test_it_is_reloaded_frozen(build: Callable[[], Any], tmp_path: Path) -> None:
    model = patched(build)
    assert_unit(model)
    step(model)
    model.save_pretrained(tmp_path)
    noted = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["sites"]
    site = noted[-1]
    assert site["name"] == "classifier.weight" and len(noted) == 5
    assert (site["dim"], site["g_init"], site["train_g"]) == (0, 1.0, False)
    loaded = type(model).from_pretrained(tmp_path)
    assert_unit(loaded)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(loaded(PIXELS).logits, model(PIXELS).logits)
    assert not torch.equal(step(loaded), loaded.classifier.weight)
    assert_unit(loaded)
    # And the config does it for another model.
    fresh = build()
    patch_model(fresh, loaded.config.quantization_config)
    assert_unit(fresh)


@CLASSIFIERS
def test_fine_tuning_for_other_labels_draws_another_head(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    patched(build).save_pretrained(tmp_path)
    loaded = type(build()).from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert_unit(loaded, rows=7)
    assert not torch.equal(step(loaded), loaded.classifier.weight)


@CLASSIFIERS
def test_plain_weights_are_read_as_patching_reads_them(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    model = build().eval()
    model.save_pretrained(tmp_path / "plain")
    loaded = type(model).from_pretrained(
        tmp_path / "plain", quantization_config=WeightNormConfig(RULE)
    )
    assert_unit(loaded)
    patch_model(model, WeightNormConfig(RULE))
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert loaded.config.quantization_config.sites == model.config.quantization_config.sites
    with torch.no_grad():
        assert torch.equal(loaded(PIXELS).logits, model(PIXELS).logits)
    save_pretrained(loaded, tmp_path / "export", layout="plain")
    exported = type(model).from_pretrained(tmp_path / "export")
    assert torch.equal(exported.classifier.weight, loaded.classifier.weight)


def test_a_body_leaves_out_the_head(tmp_path: Path) -> None:
    patched(dinov2).save_pretrained(tmp_path)
    body = hf.Dinov2Model.from_pretrained(tmp_path)
    assert sum(site.normed for site in wn.sites(body)) == 4
    assert all(parameter.requires_grad for parameter in body.parameters())


def test_resizing_keeps_a_frozen_g_frozen() -> None:
    config = hf.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = hf.GPT2LMHeadModel(config)
    rule = {"names": "{transformer.wte,lm_head}", "tied": "together", "train_g": False}
    patch_model(model, WeightNormConfig(rule))
    model.resize_token_embeddings(40, mean_resizing=False)
    for module in (model.transformer.wte, model.lm_head):
        parts: nn.Module = module.parametrizations.weight
        assert parts.original0.shape == (40, 1) and not parts.original0.requires_grad
        assert parts.original1.requires_grad


@CLASSIFIERS
def test_the_rules_of_the_blocks_and_the_head(build: Callable[[], Any]) -> None:
    model = build()
    rules = [*rules_for(model.config.model_type), "dino-head"]
    report = patch_model(model, WeightNormConfig(rules))
    assert len(report.changed) == 7 and report.changed[-1] == "classifier.weight"
    assert_unit(model)
