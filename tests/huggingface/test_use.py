"""What people do with a patched model: place, generate, attend, share and listen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from huggingface_hub import ModelCard
from torch import nn

import wn_surgery as wn
from tests.makers import llama, shaken
from wn_surgery.huggingface import (
    WeightNormConfig,
    patch_model,
    rules_for,
    save_pretrained,
    unpatch_model,
)

TOKENS = torch.arange(8)[None]


def patched() -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = llama(**ids, initializer_range=0.5).eval()  # so that what is generated varies
    patch_model(model, WeightNormConfig())
    return shaken(model, 0.1)


def assert_same(left: nn.Module, right: nn.Module) -> None:
    assert list(left.state_dict()) == list(right.state_dict())
    for key, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[key]), key


# Where the weights are ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")
@pytest.mark.parametrize("memory", [12_000, 20_000], ids=["all on disk", "a part on disk"])
@torch.no_grad()
def test_accelerate_places_what_does_not_fit_on_disk(memory: int, tmp_path: Path) -> None:
    model = patched()
    model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    placed: Any = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        device_map="auto",
        offload_folder=tmp_path / "disk",
        max_memory={"cpu": memory},
    )
    places = set(placed.hf_device_map.values())
    assert places == ({"disk"} if memory == 12_000 else {"cpu", "disk"})
    assert any(parameter.is_meta for parameter in placed.parameters())
    assert torch.equal(placed(TOKENS).logits, model(TOKENS).logits)
    placed.save_pretrained(tmp_path / "again")
    assert_same(hf.LlamaForCausalLM.from_pretrained(tmp_path / "again"), model)


@torch.no_grad()
def test_plain_weights_are_split_on_the_way_to_disk(tmp_path: Path) -> None:
    model = patched()
    save_pretrained(model, tmp_path / "plain", layout="plain")
    placed: Any = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=WeightNormConfig(),
        device_map="auto",
        offload_folder=tmp_path / "disk",
        max_memory={"cpu": 12_000},
    )
    assert set(placed.hf_device_map.values()) == {"disk"}
    torch.testing.assert_close(placed(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)


# What it does ---------------------------------------------------------------------------------


@torch.no_grad()
def test_generating_with_a_cache_and_without(tmp_path: Path) -> None:
    model = patched()
    model.save_pretrained(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    made = [
        each.generate(TOKENS, **options, use_cache=cache)
        for each in (model, loaded)
        for cache in (True, False)
    ]
    assert len(set(made[0][0, 8:].tolist())) > 1
    for other in made[1:]:
        assert torch.equal(other, made[0])
    with wn.folded(loaded):
        assert torch.equal(loaded.generate(TOKENS, **options), made[0])


@torch.no_grad()
def test_another_attention(tmp_path: Path) -> None:
    model = patched()
    model.save_pretrained(tmp_path)
    eager: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert_same(eager, model)
    out = eager(TOKENS, output_attentions=True)
    assert [each.shape for each in out.attentions] == [(1, 2, 8, 8)] * 2
    torch.testing.assert_close(out.logits, model(TOKENS).logits, rtol=0, atol=1e-5)


# Sharing it -----------------------------------------------------------------------------------


class Hub:
    """In place of the one on the network: it keeps the files that are committed."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})()

    def create_commit(self, operations: list[Any], **_: Any) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


@torch.no_grad()
def test_pushing_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    card = ModelCard("---\ntags: []\n---\nA model.")
    monkeypatch.setattr(hf.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(hf.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    model = patched()
    model.push_to_hub("somebody/patched", max_shard_size="10KB")
    assert {"README.md", "config.json", "model.safetensors.index.json"} < hub.files.keys()
    sites = json.loads(hub.files["config.json"])["quantization_config"]["sites"]
    assert len(sites) == 14
    loaded: Any = hf.AutoModelForCausalLM.from_pretrained(hub.write(tmp_path / "cache"))
    assert_same(loaded, model)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


# Speech ---------------------------------------------------------------------------------------

SPEECH = {
    "wav2vec2": (hf.Wav2Vec2Model, hf.Wav2Vec2Config),
    "hubert": (hf.HubertModel, hf.HubertConfig),
}


def speech(name: str) -> Any:
    torch.manual_seed(0)
    make, config = SPEECH[name]
    return make(
        config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    ).eval()


@pytest.mark.parametrize("name", SPEECH)
@torch.no_grad()
def test_models_that_have_it_already_and_get_it_by_preset(name: str, tmp_path: Path) -> None:
    """Their class puts it on as their preset does: it is kept, or comes back when taken off."""
    model, wave = speech(name), torch.linspace(-1, 1, 400)[None]
    assert "already there" in str(patch_model(model, WeightNormConfig()))
    assert model.config.quantization_config.rules == rules_for(name)
    assert model.config.quantization_config.sites == []  # it is the class's
    unpatch_model(model)
    report = patch_model(model, WeightNormConfig())
    assert report.changed == ("encoder.pos_conv_embed.conv.weight",)
    shaken(model, 0.1)
    model.save_pretrained(tmp_path)
    loaded, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    assert_same(loaded, model)
    assert torch.equal(loaded(wave).last_hidden_state, model(wave).last_hidden_state)


@pytest.mark.parametrize("name", SPEECH)
@torch.no_grad()
def test_their_transformer_may_have_it_too(name: str, tmp_path: Path) -> None:
    model, wave = speech(name), torch.linspace(-1, 1, 400)[None]
    patch_model(model, WeightNormConfig({"names": "encoder.layers.**", "types": "Linear"}))
    shaken(model, 0.1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert sum(site.normed for site in wn.sites(loaded)) == 13
    assert_same(loaded, model)
    assert torch.equal(loaded(wave).last_hidden_state, model(wave).last_hidden_state)
