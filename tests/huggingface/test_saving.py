"""Models that share a config, parts of models, and weight norm that patch_model() did not make."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import wn_surgery as wn
from tests.makers import DECODER, normed, shaken
from wn_surgery.callbacks.lightning import WeightNorm
from wn_surgery.huggingface import (
    WeightNormConfig,
    conversions,
    patch_model,
    rules_for,
    save_pretrained,
    unpatch_model,
)
from wn_surgery.norm.parametrization import WeightNorm as Parametrization

TOKENS = torch.arange(8)[None]
SIZES = {**DECODER, "num_hidden_layers": 1}
QUERIES, KEYS = ([{"names": f"**.{name}_proj"}] for name in "qk")


def llama(config: Any = None) -> Any:
    return hf.LlamaForCausalLM(config or hf.LlamaConfig(**SIZES)).eval()


def reloaded(model: Any, folder: Path, kind: Any = None) -> Any:
    """Saved and loaded, with nothing that is not found, and the same in all of it."""
    model.save_pretrained(folder)
    again, said = (kind or type(model)).from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    return again


# One config for several models ----------------------------------------------------------------


def test_models_of_one_config_are_patched_and_saved_by_themselves(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**SIZES)
    before = config.to_dict()
    one, other, plain = llama(config), llama(config), llama(config)
    patch_model(one, QUERIES)
    patch_model(other, KEYS)
    assert config.to_dict() == before and plain.config is config
    (query,) = normed(reloaded(shaken(one), tmp_path / "one"))
    (key,) = normed(reloaded(shaken(other), tmp_path / "other"))
    assert query.endswith("q_proj.weight") and key.endswith("k_proj.weight")
    assert not normed(reloaded(plain, tmp_path / "plain"))
    unpatch_model(other)
    assert normed(reloaded(one, tmp_path / "again")) == [query]
    # Every part of a model has the model's config.
    held = {id(part.config) for part in one.modules() if hasattr(part, "config")}
    assert held == {id(one.config)}


def test_a_model_that_is_built_on_the_config_of_a_patched_one(tmp_path: Path) -> None:
    model = llama()
    patch_model(model, QUERIES)
    fresh = llama(model.config)
    with pytest.warns(UserWarning, match=r"names weight norm on model.* unpatch_model\(model\)"):
        fresh.save_pretrained(tmp_path)
    assert len(normed(type(fresh).from_pretrained(tmp_path))) == 1  # as it says
    unpatch_model(fresh)
    assert not normed(reloaded(fresh, tmp_path / "fresh"))
    assert len(normed(reloaded(model, tmp_path / "model"))) == 1
    # As read from a file, the note is plain data.
    model.save_pretrained(tmp_path)
    fresh = llama(hf.AutoConfig.from_pretrained(tmp_path))
    patch_model(fresh, fresh.config.quantization_config)
    assert len(normed(reloaded(fresh, tmp_path / "from a file"))) == 1


def test_the_config_of_a_live_model_is_taken_for_loading(tmp_path: Path) -> None:
    model = shaken(llama())
    patch_model(model)
    model.save_pretrained(tmp_path)
    for kind in (hf.LlamaForCausalLM, hf.AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path, config=model.config)
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
        assert again.config.quantization_config == model.config.quantization_config
        unpatch_model(again)
        assert model.config.quantization_config.sites  # it is another one
    # Without a folder at all: weights in memory.
    again = hf.LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


# Parts and wholes -----------------------------------------------------------------------------


def vision_encoder_decoder() -> Any:
    vision = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    text = hf.GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    return hf.VisionEncoderDecoderModel(config)


def llava() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    text = hf.LlamaConfig(**SIZES)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))


def whisper() -> Any:
    return hf.WhisperModel(
        hf.WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            vocab_size=32,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=10,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


PARTS = pytest.mark.parametrize(
    ("build", "part"),
    [
        (vision_encoder_decoder, "decoder"),
        (vision_encoder_decoder, "encoder"),
        (llava, "model.language_model"),
        (llama, "model"),
        (whisper, "encoder"),
    ],
)
LINEARS = [{"types": ["Linear", "transformers.pytorch_utils.Conv1D"], "tied": "skip", "dim": "out"}]


@PARTS
def test_a_part_that_is_patched_is_saved_with_the_whole(
    build: Callable[[], Any], part: str, tmp_path: Path
) -> None:
    model = build()
    before = json.dumps(model.config.to_dict(), default=str)
    patch_model(model.get_submodule(part), LINEARS)
    assert json.dumps(model.config.to_dict(), default=str) == before
    names = normed(shaken(model))
    assert names and all(name.startswith(part) for name in names)
    again = reloaded(model, tmp_path / "whole")
    assert normed(again) == names
    # And the part is saved and unpatched by itself, of either.
    for each in (model, again):
        alone = reloaded(each.get_submodule(part), tmp_path / "part")
        assert [f"{part}.{name}" for name in normed(alone)] == names
    unpatch_model(again.get_submodule(part))
    assert not normed(again)
    owner = names[0].rpartition(".")[0]
    expected: Any = model.get_submodule(owner).weight
    torch.testing.assert_close(again.get_submodule(owner).weight, expected)


@PARTS
def test_a_part_of_a_patched_whole_is_saved_by_itself(
    build: Callable[[], Any], part: str, tmp_path: Path
) -> None:
    model = build()
    patch_model(model, LINEARS)
    noted = model.config.quantization_config.to_dict()
    alone = reloaded(shaken(model).get_submodule(part), tmp_path / "part")
    assert normed(alone)
    assert model.config.quantization_config.to_dict() == noted
    # As does the whole, and a part of what was loaded.
    again = reloaded(model, tmp_path / "whole")
    reloaded(again.get_submodule(part), tmp_path / "again")


def test_parts_keep_their_part_of_the_config() -> None:
    model = llava()
    given = model.config
    patch_model(model, LINEARS)
    assert model.config is not given
    assert model.model.language_model.config is model.config.text_config
    assert model.model.language_model.layers[0].self_attn.config is model.config.text_config
    unpatch_model(model)
    assert model.model.vision_tower.config is model.config.vision_config
    assert model.config.to_dict() == given.to_dict()


def test_rules_of_two_patches_are_all_in_the_record(tmp_path: Path) -> None:
    model = vision_encoder_decoder()
    patch_model(model.decoder, LINEARS)
    patch_model(model, [{"names": "encoder.**", "types": "Linear"}])
    again = reloaded(shaken(model), tmp_path)
    assert {name.partition(".")[0] for name in normed(again)} == {"encoder", "decoder"}


def speech_encoder_decoder() -> Any:
    speech = hf.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    text = hf.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    config = hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(speech, text)
    return hf.SpeechEncoderDecoderModel(config)


@pytest.mark.parametrize("part", ["", "encoder", "encoder.encoder.pos_conv_embed"])
def test_what_the_class_builds_is_found_though_a_part_was_unpatched(
    part: str, tmp_path: Path
) -> None:
    model = shaken(speech_encoder_decoder())
    (name,) = normed(model)
    convolution = model.get_submodule(name.rpartition(".")[0])
    unpatch_model(model.get_submodule(part))
    assert not normed(model)
    model.save_pretrained(tmp_path)
    again, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    found = again.get_submodule(name.rpartition(".")[0])
    torch.testing.assert_close(found.weight, convolution.weight)


# Weight norm that patch_model() did not put on ------------------------------------------------


def test_apply_is_noted_when_the_model_is_saved(tmp_path: Path) -> None:
    model = llama()
    wn.apply(model.model.layers[0], [{"types": "Linear", "train_g": False, "eps": 1e-6}])
    again = reloaded(shaken(model), tmp_path / "a", hf.AutoModelForCausalLM)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert not hasattr(model.config, "quantization_config")
    assert not any(s.held.g.requires_grad for s in wn.sites(again) if s.held)  # type: ignore[union-attr]
    # More of it on a patched model, and less.
    wn.apply(again, {"names": "lm_head"})
    assert "lm_head.weight" in normed(reloaded(shaken(again), tmp_path / "b"))
    wn.remove(again, {"names": "model.**"})
    assert normed(reloaded(again, tmp_path / "c")) == ["lm_head.weight"]
    save_pretrained(model, tmp_path / "plain", layout="plain")
    assert "weight_norm" not in (tmp_path / "plain" / "config.json").read_text()
    plain = type(model).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits)


class Own(hf.LlamaForCausalLM):
    """A constructor that calls this library."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        wn.apply(self, QUERIES)


@pytest.mark.parametrize("kind", ["own", "migrated"])
def test_a_class_that_builds_it_needs_no_note(kind: str, tmp_path: Path) -> None:
    if kind == "own":
        model: Any = Own(hf.LlamaConfig(**SIZES))
    else:
        model = speech_encoder_decoder()
        wn.migrate(model)
    reloaded(shaken(model), tmp_path)
    assert "weight_norm" not in (tmp_path / "config.json").read_text()
    # It stays g and v in the other layout, which is what the class loads.
    save_pretrained(model, tmp_path / "plain", layout="plain")
    _, said = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(said.values()), said


def test_other_weight_norm_than_the_class_puts_on(tmp_path: Path) -> None:
    model = speech_encoder_decoder()
    (name,) = normed(model)
    rule = {"names": name.rpartition(".")[0], "dim": 0, "eps": 1e-6, "replace": True}
    patch_model(model, [rule])
    again = reloaded(shaken(model), tmp_path)
    (site,) = [site for site in wn.sites(again) if site.normed]
    assert site.dim == 0 and site.norm is not None and site.norm.eps == 1e-6


class Wide(hf.LlamaForCausalLM):
    """Has an argument that is in no config."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__(config)
        self.extra = nn.Linear(width, width)
        if width > 4:
            parametrizations.weight_norm(self.extra)


def test_a_class_with_arguments_of_its_own(tmp_path: Path) -> None:
    model: Any = Wide(hf.LlamaConfig(**SIZES), 4)
    wn.apply(model, [*QUERIES, {"names": "extra"}])
    shaken(model).save_pretrained(tmp_path / "a")
    again = Wide.from_pretrained(tmp_path / "a", width=4)
    assert normed(again) == normed(model) and len(normed(again)) == 2
    assert torch.equal(again.extra.weight, model.extra.weight)
    save_pretrained(again, tmp_path / "b", layout="plain")
    assert not normed(Wide.from_pretrained(tmp_path / "b", width=4))
    # What it puts on itself cannot be known: that is said, when it is saved.
    model = Wide(hf.LlamaConfig(**SIZES), 6)
    unpatch_model(model)
    with pytest.warns(UserWarning, match=r"Wide cannot be built again from its config"):
        model.save_pretrained(tmp_path / "c")


class Writes(hf.LlamaForCausalLM):
    """Saves in a way of its own."""

    def save_pretrained(self, path: Path) -> None:  # type: ignore[override]
        torch.save(self.state_dict(), path / "weights.pt")


def test_what_cannot_be_noted_is_refused(tmp_path: Path) -> None:
    model: Any = Writes(hf.LlamaConfig(**SIZES))
    wn.apply(model, QUERIES)
    with pytest.raises(wn.CheckpointMismatchError, match=r"patch_model\(model, rules\) instead"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    wn.remove(model)
    patch_model(model, QUERIES)
    model.save_pretrained(tmp_path)
    model = llama()
    wn.apply(model, QUERIES)
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(wn.QuantizedWeightError, match="has a quantization"):
        model.save_pretrained(tmp_path)
    with pytest.raises(
        TypeError, match="expected a model of transformers or diffusers, got Linear"
    ):
        save_pretrained(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", ["together", "untie"])
def test_ties_that_nobody_has_told_the_model_of(tied: str, tmp_path: Path) -> None:
    def gpt2() -> Any:
        sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))

    rule = {"names": "{transformer.wte,lm_head}", "tied": tied}
    model = gpt2()
    wn.apply(model, rule)
    with pytest.raises(wn.CheckpointMismatchError, match=r"ties .*\.weight.*patch_model\("):
        model.save_pretrained(tmp_path)
    model = gpt2()
    patch_model(model, rule)
    reloaded(shaken(model), tmp_path)


@pytest.mark.filterwarnings("ignore:the config of .* names weight norm on:UserWarning")
def test_the_note_goes_with_the_last_weight_norm_that_the_class_does_not_build(
    tmp_path: Path,
) -> None:
    model = speech_encoder_decoder()
    built = normed(model)
    patch_model(model, [{"names": "decoder.**.query"}])
    wn.migrate(model)
    wn.remove(model, {"names": "decoder.**"})
    assert normed(reloaded(shaken(model), tmp_path)) == built
    assert "weight_norm" not in (tmp_path / "config.json").read_text()


def test_ranks_that_do_not_write_do_not_write(tmp_path: Path) -> None:
    model = llama()
    wn.apply(model, QUERIES)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()


# Whatever stands for rules --------------------------------------------------------------------


def test_whatever_stands_for_rules(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(QUERIES))
    query = "model.layers.0.self_attn.q_proj.weight"
    noted = WeightNormConfig(QUERIES)
    for rules in (QUERIES, QUERIES[0], wn.Rule(**QUERIES[0]), str(file), file, noted):
        assert patch_model(llama(), rules).changed == (query,), rules
    assert patch_model(llama(), noted.to_dict()).changed == (query,)
    assert len(patch_model(llama()).changed) == len(patch_model(llama(), None).changed) == 7
    assert "lm_head.weight" in patch_model(llama(), "linears").changed
    model = llava()
    assert len(wn.plan(model, rules_for(model)).changes) > 7  # of both its parts
    with pytest.raises(wn.RuleError, match=r"expected a Rule, a dict.*got int"):
        patch_model(model, 3)  # type: ignore[arg-type]
    assert not normed(model) and not hasattr(model.config, "quantization_config")


class Wrapped(lp.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = llama().train()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_model_that_lightning_has_trained(tmp_path: Path) -> None:
    module = Wrapped()
    lp.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WeightNorm([{"names": "model.model.layers.**", "types": "Linear"}])],
    ).fit(module, DataLoader(TensorDataset(TOKENS.repeat(4, 1)), batch_size=2))
    again = reloaded(module.model.eval(), tmp_path)
    assert len(normed(again)) == 7


def test_a_conversion_and_its_reverse() -> None:
    """What transformers may ask of each conversion that a model carries."""
    split = conversions._Split(Parametrization(dim=1).options)
    weight = torch.rand(2, 3)
    parts = split.convert({"w": [weight]}, ["w"], ["g", "v"])
    assert parts["g"].shape == (1, 3) and torch.equal(parts["v"], weight)
    back = split.reverse_op.convert({k: [v] for k, v in parts.items()}, ["g", "v"], ["w"])
    torch.testing.assert_close(back["w"], weight)


@pytest.mark.parametrize("name", ["huggingface.ties _translated", "reloading AsBuilt"])
def test_pickles_of_0_1_0_find_what_has_moved(name: str) -> None:
    module, attribute = name.split()
    found = pickle.loads(f"cwn_surgery.{module}\n{attribute}\n.".encode())
    assert found.__name__ == attribute and found.__module__ != f"wn_surgery.{module}"


def test_a_conversion_that_0_1_0_pickled_converts() -> None:
    """It held the module WeightNorm in the place of the options."""
    merge = conversions._Merge.__new__(conversions._Merge)
    merge.__setstate__({"norm": Parametrization(dim=1)})
    g, v = torch.ones(1, 3), torch.rand(2, 3)
    (w,) = merge.convert({"g": [g], "v": [v]}, ["g", "v"], ["w"]).values()
    assert torch.equal(w, Parametrization(dim=1)(g, v))
