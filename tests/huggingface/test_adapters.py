"""PEFT's adapters on weight-normed models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import wn_surgery as wn
from tests.makers import llama
from wn_surgery.huggingface import (
    WeightNormConfig,
    merge_adapter,
    merge_and_unload,
    patch_model,
)

TOKENS = torch.arange(8)[None]
RULES = [{"names": "**.{q,k,v,o}_proj"}]


def patched() -> Any:
    model = llama()
    patch_model(model, WeightNormConfig(RULES))
    return model


def tuned(model: Any, **options: Any) -> Any:
    """A PEFT model after a few steps, so that its adapters are not zero."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    made = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW((p for p in made.parameters() if p.requires_grad), lr=0.1)
    before = float(made(TOKENS, labels=TOKENS).loss.detach())
    for _ in range(5):
        optimizer.zero_grad()
        made(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert float(made(TOKENS, labels=TOKENS).loss.detach()) < before
    return made.eval()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_merging_is_right(dora: bool, tmp_path: Path) -> None:
    with torch.enable_grad():
        made = tuned(patched(), use_dora=dora)
    expected = made(TOKENS).logits
    g = made.base_model.model.model.layers[0].self_attn.q_proj.base_layer.parametrizations
    before = g.weight.original0.clone()
    merged: Any = merge_and_unload(made)
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=0, atol=1e-5)
    assert sum(site.normed for site in wn.sites(merged)) == 8
    assert not torch.equal(g.weight.original0, before)
    merged.save_pretrained(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS).logits, merged(TOKENS).logits)


@torch.no_grad()
def test_why_there_is_a_function_for_it() -> None:
    """PEFT's own merge writes into a tensor that was only just computed."""
    with torch.enable_grad():
        made = tuned(patched())
    expected = made(TOKENS).logits
    lost = made.merge_and_unload()
    assert (lost(TOKENS).logits - expected).abs().max() > 1e-2
    with torch.enable_grad():
        plain = tuned(llama())
    expected = plain(TOKENS).logits
    torch.testing.assert_close(plain.merge_and_unload()(TOKENS).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_merging_in_place_and_back() -> None:
    with torch.enable_grad():
        made = tuned(patched())
    expected = made(TOKENS).logits
    merge_adapter(made)
    torch.testing.assert_close(made(TOKENS).logits, expected, rtol=0, atol=1e-5)
    with wn.writable(made):
        made.unmerge_adapter()
    torch.testing.assert_close(made(TOKENS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_weight_norm_under_adapters_that_are_there_already(dora: bool) -> None:
    made = tuned(llama(), use_dora=dora)
    expected = made(TOKENS).logits.detach()
    # A broad rule: nothing that belongs to an adapter is touched.
    report = patch_model(made.base_model.model, WeightNormConfig({"types": "Linear"}))
    assert report.changed and not any("lora_" in name for name in report.changed)
    torch.testing.assert_close(made(TOKENS).logits, expected, rtol=0, atol=1e-5)
    made(TOKENS, labels=TOKENS).loss.backward()
    assert (
        made.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad
        is not None
    )


def test_adapters_may_be_named() -> None:
    made = tuned(llama())
    rules = WeightNormConfig({"names": "**.lora_A.default"})
    report = patch_model(made.base_model.model, rules)
    assert len(report.changed) == 4 and all("lora_A" in name for name in report.changed)


def test_models_without_adapters() -> None:
    with pytest.raises(TypeError, match=r"expected a PEFT model that has merge_and_unload\(\)"):
        merge_and_unload(nn.Linear(2, 2))
