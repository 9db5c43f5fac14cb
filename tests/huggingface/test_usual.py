"""The usual rules of models that no paper says any of: from how they are built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import wn_surgery as wn
from wn_surgery.huggingface import patch_model, rules_for

SMALL = (
    *("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"),
    *("n_layers", "num_decoder_layers", "num_encoder_layers", "num_experts", "num_local_experts"),
)
TYPES = [
    *("albert", "audio-spectrogram-transformer", "bart", "beit", "bloom", "clap", "clip"),
    *("codegen", "cohere", "convbert", "convnextv2", "deberta-v2", "deepseek_v3", "deit"),
    *("distilbert", "electra", "gemma3", "gpt_neo", "granite", "idefics3", "lfm2", "longformer"),
    *("llava", "m2m_100", "mamba", "marian", "mixtral", "mobilebert", "modernbert", "mpnet", "mpt"),
    *("olmoe", "pegasus", "qwen2_5_vl", "qwen2_moe", "qwen3_moe", "roformer", "rwkv"),
    *("segformer", "siglip", "swin", "swinv2", "switch_transformers", "whisper", "xlm-roberta"),
]
APART = ("embed", "head", "router", "gate", "shared_expert_gate", "norm", "classifier", "pooler")


def shrink(config: Any) -> Any:
    """Two of whatever a model has many of; widths cost nothing on the meta device."""
    given = config.to_dict()
    for name in SMALL:
        if isinstance(given.get(name), int):
            setattr(config, name, 2)
    if isinstance(given.get("layer_types"), list):
        config.layer_types = given["layer_types"][:2]
    for name in config.sub_configs or {}:
        if isinstance(getattr(config, name, None), hf.PreTrainedConfig):
            shrink(getattr(config, name))
    return config


def on_meta(model_type: str) -> Any:
    with torch.device("meta"):
        return hf.AutoModel.from_config(shrink(hf.AutoConfig.for_model(model_type)))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_linear_layers_of_the_blocks(model_type: str) -> None:
    model = on_meta(model_type)
    rules = rules_for(model)
    plan = wn.plan(model, rules)
    assert f"usual rules for {model_type}, from its repeated blocks" in str(plan)
    changed = {step.site.name.removesuffix(".weight") for step in plan.changes}
    # What has numbers on its way is in a list, and a list of layers is one of blocks.
    numbered = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdecimal() for part in name.split("."))
    }
    assert changed and changed <= numbered
    for name in numbered - changed:
        assert set(name.split(".")) & set(APART) or name.split(".")[-1].isdecimal(), name
    for name in changed:
        assert not set(name.split(".")) & set(APART), name
    with pytest.raises(wn.RuleError, match=rf"'{model_type}'.*give the model: rules_for\(model\)"):
        rules_for(model_type)


def test_the_head_of_a_model_is_not_among_them() -> None:
    config = shrink(hf.AutoConfig.for_model("segformer"))
    with torch.device("meta"):
        model = hf.SegformerForSemanticSegmentation(config)
    (rule,) = rules_for(model)
    assert rule.names and all(name.startswith("segformer.") for name in rule.names)


def test_routers_stay_plain() -> None:
    model = on_meta("qwen2_moe")
    gates = [name for name, _ in model.named_parameters() if "shared_expert_gate" in name]
    changed = {step.site.name for step in wn.plan(model, rules_for(model)).changes}
    assert gates and not changed & set(gates)
    assert any("shared_expert.gate_proj" in name for name in changed)


def test_a_model_is_patched_by_them_and_reloads(tmp_path: Any) -> None:
    sizes = {"dim": 16, "hidden_dim": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 12}
    torch.manual_seed(0)
    model = hf.DistilBertForMaskedLM(hf.DistilBertConfig(**sizes)).eval()
    tokens = torch.arange(6)[None]
    before = model(tokens).logits
    report = patch_model(model)
    assert len(report.changed) == 12
    assert "rule 1: apply types=Linear" in str(report) and "from its repeated blocks" in str(report)
    assert torch.equal(model(tokens).logits, before)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, before)
    assert sum(site.normed for site in wn.sites(again)) == 12


def test_a_model_without_blocks() -> None:
    with torch.device("meta"):
        model = hf.ResNetModel(hf.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8))
    with pytest.raises(
        wn.RuleError, match=r"'resnet': ResNetModel is not a model.*repeated blocks.*patch_m"
    ):
        rules_for(model)
