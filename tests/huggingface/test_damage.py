"""Checkpoints of patched models of which a part does not fit, is cut off, or is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wn_surgery as wn
from tests.makers import DECODER, llama
from wn_surgery.huggingface import (
    WeightNormConfig,
    built_in_keys,
    model_on_meta,
    patch_model,
)

TOKENS = torch.arange(8)[None]


def saved(folder: Path, **options: Any) -> Any:
    """A patched Llama, and its checkpoint in the folder."""
    model = llama().eval()
    patch_model(model, WeightNormConfig())
    model.save_pretrained(folder, **options)
    return model


def load(folder: Path, **options: Any) -> Any:
    return hf.LlamaForCausalLM.from_pretrained(folder, **options)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weights(folder: Path, *parts: str) -> None:
    """Save again without the tensors whose names have all the parts."""
    path = folder / "model.safetensors"
    state = load_file(path)
    kept = {key: value for key, value in state.items() if not all(part in key for part in parts)}
    assert len(kept) < len(state)
    save_file(kept, path, metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def misfit(folder: Path) -> None:
    edit_config(folder, intermediate_size=24)


def truncated(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-40])


def cut_in_its_header(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:40])


def gone(folder: Path) -> None:
    shards(folder)[1].unlink()


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (misfit, RuntimeError, "ignore_mismatched_sizes"),
        (truncated, SafetensorError, "incomplete metadata, file not fully covered"),
        (cut_in_its_header, SafetensorError, "header"),
        (gone, FileNotFoundError, r"model-00002-of-00003\.safetensors"),
    ],
)
def test_it_is_refused_and_left_as_it_is(
    damage: Callable[[Path], None], error: type[Exception], said: str, tmp_path: Path
) -> None:
    saved(tmp_path, max_shard_size="10KB")
    load(tmp_path)
    damage(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(error, match=said):
        load(tmp_path)
    assert contents(tmp_path) == before


def test_plain_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    edit_config(tmp_path, intermediate_size=24)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, quantization_config=WeightNormConfig())


def test_sites_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(wn.UnmatchedRuleError, match=r"names model\.layers\.1\.self_attn"):
        load(tmp_path)


# What a checkpoint lacks ----------------------------------------------------------------------


def normed(model: nn.Module) -> dict[str, wn.Site]:
    return {site.name: site for site in wn.sites(model) if site.normed}


def weight(site: wn.Site) -> Tensor:
    value: Tensor = getattr(site.module, site.param)
    return value.detach()


def assert_drawn(site: wn.Site, std: float = 0.02) -> None:
    """As the class draws a weight, with g its norm."""
    assert site.held is not None and site.held.g is not None
    drawn = weight(site)
    assert drawn.isfinite().all(), site.name
    assert float(drawn.std()) == pytest.approx(std, rel=0.2), site.name
    norms = drawn.norm(dim=1 - int(str(site.dim)), keepdim=True)
    torch.testing.assert_close(site.held.g.detach(), norms)


@pytest.mark.parametrize("lacking", ["01", "0", "1"])
def test_weights_that_it_lacks_are_drawn(lacking: str, tmp_path: Path) -> None:
    """And are not what happens to be in memory, be it g, v, or both that it lacks."""
    model = saved(tmp_path)
    kinds = ("up", "down")
    names = {
        f"model.layers.1.mlp.{kind}_proj.parametrizations.weight.original{part}"
        for kind in kinds
        for part in lacking
    }
    for name in names:
        drop_weights(tmp_path, name)
    loaded, said = load(tmp_path, output_loading_info=True)
    assert said["missing_keys"] == names
    before, after = normed(model), normed(loaded)
    for kind in kinds:
        name = f"model.layers.1.mlp.{kind}_proj.weight"
        assert_drawn(after.pop(name))
        assert not torch.equal(weight(normed(loaded)[name]), weight(before.pop(name)))
    for name, site in after.items():
        assert torch.equal(weight(site), weight(before[name])), name
    assert "initialize_weights" not in vars(loaded)  # nothing of ours stays behind


@pytest.mark.parametrize("plain", [False, True], ids=["patched", "plain"])
def test_weights_of_another_shape_are_drawn_where_that_is_asked_for(
    plain: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if plain:
        llama().save_pretrained(tmp_path)
        options["quantization_config"] = WeightNormConfig()
    else:
        saved(tmp_path)
    edit_config(tmp_path, intermediate_size=24)
    loaded = load(tmp_path, **options)
    drawn = [site for name, site in normed(loaded).items() if ".mlp." in name]
    assert len(drawn) == 6
    for site in drawn:
        assert_drawn(site)
    loaded(TOKENS, labels=TOKENS).loss.backward()


def test_a_class_may_draw_its_weights_from_above(tmp_path: Path) -> None:
    """GPT-2 scales the projections into its residual stream by its depth."""
    config = hf.GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=8, n_head=2)
    model = hf.GPT2LMHeadModel(config)
    patch_model(model, WeightNormConfig())
    model.save_pretrained(tmp_path)
    drop_weights(tmp_path, "h.7.attn")
    sites = normed(hf.GPT2LMHeadModel.from_pretrained(tmp_path))
    assert_drawn(sites["transformer.h.7.attn.c_attn.weight"])
    assert_drawn(sites["transformer.h.7.attn.c_proj.weight"], std=0.02 / 16**0.5)


def test_a_stack_of_which_one_weight_is_there(tmp_path: Path) -> None:
    """Several weights in one module: those that are there are read."""
    more = {"num_local_experts": 3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, **more))
    rule = {"names": "**.experts", "params": ["gate_up_proj", "down_proj"], "dim": (0, 1)}
    patch_model(model, WeightNormConfig([rule]))
    model.save_pretrained(tmp_path)
    drop_weights(tmp_path, "layers.1.", "experts", "down_proj")
    before, after = normed(model), normed(hf.MixtralForCausalLM.from_pretrained(tmp_path))
    (lost,) = [
        name for name, site in after.items() if not torch.equal(weight(site), weight(before[name]))
    ]
    assert lost == "model.layers.1.mlp.experts.down_proj"
    assert float(weight(after[lost]).std()) == pytest.approx(0.02, rel=0.2)


def test_code_in_a_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask, and run it for whoever types y."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(wn.CheckpointError, match="without running code"):
        model_on_meta(tmp_path)
    assert built_in_keys(tmp_path) == frozenset()
    assert not (tmp_path / "ran").exists()
