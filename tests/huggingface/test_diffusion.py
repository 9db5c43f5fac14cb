"""Models of diffusers: patched, saved, and reloaded by the note in their config."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import wn_surgery as wn
from wn_surgery.huggingface import WeightNormConfig, patch_model, save_pretrained, unpatch_model
from wn_surgery.model.sites import normed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers: Any = pytest.importorskip("diffusers")

# accelerate, at each load of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NOISE = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
SOUND = torch.linspace(-1, 1, 64).reshape(1, 1, 64)


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    ).eval()


def oobleck() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        decoder_channels=8,
        decoder_input_channels=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        audio_channels=1,
    ).eval()


def shaken(model: Any) -> Any:
    """The model after a training: no g is the norm that it was drawn with."""
    with torch.no_grad():
        for site in normed(model):
            site.held.g.mul_(1.25)
    return model


def same(one: Any, other: Any) -> None:
    """The bits of the tensors are the same; outputs depend on where in memory they lie."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    torch.testing.assert_close(one(NOISE, 1).sample, other(NOISE, 1).sample)


def patched() -> Any:
    model = unet()
    patch_model(model, "convolutions")
    return shaken(model)


@torch.no_grad()
def test_a_patched_model_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    model = unet()
    expected = model(NOISE, 1).sample
    report = patch_model(model, "convolutions")
    assert torch.equal(model(NOISE, 1).sample, expected)
    assert model.config.quantization_config.model_type == "UNet2DModel"
    shaken(model)
    model.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert {site.name for site in normed(again)} == set(report.changed)
    same(again, model)
    assert not getattr(again, "is_quantized", False)
    # What was loaded trains, saves and is patched like what was made.
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    again.save_pretrained(tmp_path / "again")
    third = diffusers.UNet2DModel.from_pretrained(tmp_path / "again")
    same(third, model)
    assert third.config.quantization_config == model.config.quantization_config
    assert not patch_model(again, "convolutions").changed


@torch.no_grad()
def test_dtypes_and_shards(tmp_path: Path) -> None:
    model = patched()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = diffusers.UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for mine, theirs in zip(normed(again), normed(model), strict=True):
        assert torch.equal(mine.held.g, theirs.held.g.bfloat16())


@torch.no_grad()
def test_plain(tmp_path: Path) -> None:
    model = patched()
    note = model.config.quantization_config
    save_pretrained(model, tmp_path, layout="plain")
    assert model.config.quantization_config is note
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == set(
        unet().state_dict()
    )
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert not normed(again)
    torch.testing.assert_close(again(NOISE, 1).sample, model(NOISE, 1).sample)
    # A model without a note, too, and here without the warning.
    applied = unet()
    wn.apply(applied, "convolutions")
    save_pretrained(applied, tmp_path, layout="plain")
    assert not normed(diffusers.UNet2DModel.from_pretrained(tmp_path))


@torch.no_grad()
def test_unpatched(tmp_path: Path) -> None:
    patched().save_pretrained(tmp_path)
    model = diffusers.UNet2DModel.from_pretrained(tmp_path)
    expected = model(NOISE, 1).sample
    unpatch_model(model)
    assert torch.equal(model(NOISE, 1).sample, expected)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    same(diffusers.UNet2DModel.from_pretrained(tmp_path), model)


@torch.no_grad()
def test_plain_weights_under_a_note(tmp_path: Path) -> None:
    """Weight norm that ``remove`` took off, which leaves the note, comes back on the weights."""
    model = unet()
    patch_model(model, [{"types": "Conv2d", "g_init": 2.0, "train_g": False}])
    shaken(model)
    wn.remove(model)
    with pytest.warns(UserWarning, match="which the model does not have"):
        model.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert normed(again) and not any(site.held.g.requires_grad for site in normed(again))
    assert again.config.quantization_config.sites[0]["g_init"] == 2.0
    torch.testing.assert_close(again(NOISE, 1).sample, model(NOISE, 1).sample)


@torch.no_grad()
def test_weight_norm_that_the_note_does_not_name(tmp_path: Path) -> None:
    model = unet()
    patch_model(model, [{"names": "conv_in"}])
    wn.apply(model, {"names": "conv_out"})
    with pytest.warns(UserWarning, match=r"no weight norm on conv_out\.weight.*use .*patch_model"):
        shaken(model).save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert [site.name for site in normed(again)] == ["conv_in.weight"]
    torch.testing.assert_close(again(NOISE, 1).sample, model(NOISE, 1).sample)


@torch.no_grad()
def test_rules_at_loading(tmp_path: Path) -> None:
    model = unet()
    model.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(
        tmp_path, quantization_config=WeightNormConfig("convolutions")
    )
    assert normed(again) and again.config.quantization_config.sites
    patch_model(model, "convolutions")
    same(again, model)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    model = patched()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["sites"][0]["name"] = "conv_new.weight"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(wn.CheckpointMismatchError, match=r"names conv_new\.weight, of which"):
        diffusers.UNet2DModel.from_pretrained(tmp_path)


def test_refusals() -> None:
    model = unet()
    with pytest.raises(wn.RuleError, match="no usual rules for model type 'UNet2DModel'"):
        patch_model(model)
    with pytest.raises(wn.UnmatchedRuleError):
        patch_model(model, [{"names": "nothing"}])
    assert "quantization_config" not in model.config and not normed(model)
    other = WeightNormConfig([{"names": "x"}], sites=[], model_type="AutoencoderKL")
    with pytest.raises(wn.UnmatchedRuleError, match="made for a AutoencoderKL model"):
        patch_model(model, other)


@torch.no_grad()
@pytest.mark.parametrize("way", ["over", "again", "legacy", "removed"])
def test_a_codec_that_has_weight_norm_by_birth(way: str, tmp_path: Path) -> None:
    model = shaken(oobleck())
    expected = model.encode(SOUND).latent_dist.mode()
    if way != "over":
        unpatch_model(model)
    patch_model(model, "convolutions")
    if way == "legacy":
        wn.migrate(model, to="legacy")
    if way == "removed":
        wn.remove(model)
    torch.testing.assert_close(model.encode(SOUND).latent_dist.mode(), expected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path / "normed")
    assert any("names weight norm on" in str(w.message) for w in caught) == (way == "removed")
    again = type(model).from_pretrained(tmp_path / "normed")
    torch.testing.assert_close(again.encode(SOUND).latent_dist.mode(), expected)
    assert len(normed(again)) == len(normed(oobleck()))
    # Its class reads g and v, so a plain folder has them where it looks for them.
    save_pretrained(model, tmp_path / "plain", layout="plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(again.encode(SOUND).latent_dist.mode(), expected)


@pytest.mark.processes
def test_without_this_library_loading_says_what_to_install(tmp_path: Path) -> None:
    patched().save_pretrained(tmp_path)
    code = f"import diffusers; diffusers.UNet2DModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install wn-surgery, and import wn_surgery.huggingface before" in done.stderr
