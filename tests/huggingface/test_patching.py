"""Patching models of transformers by config, saving them, and getting them back."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import wn_surgery as wn
from tests.makers import DECODER, llama, shaken
from tests.models.zoo import TRANSFORMERS
from wn_surgery.huggingface import (
    WeightNormConfig,
    patch_model,
    repair,
    rules_for,
    save_pretrained,
    unpatch_model,
)

TOKENS = torch.arange(8)[None]
SIZES = {**DECODER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=32,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def bert() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
        )
    )


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=3))


def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


def seq2seq(model: Any) -> Tensor:
    return model(TOKENS, decoder_input_ids=TOKENS).logits


def pixels(model: Any) -> Tensor:
    return model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).logits


EXPERTS = [{"names": "**.experts", "params": ["gate_up_proj", "down_proj"], "dim": (0, 1)}]
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor], Any]] = {
    "llama": (lambda: llama(**SIZES), logits, None),
    "gpt2": (gpt2, logits, None),
    "bert": (bert, logits, None),
    "bert, tied": (
        bert,
        logits,
        [
            {
                "types": ["Linear", "Embedding"],
                "names": "{cls,bert}.**.{decoder,word_embeddings}",
                "tied": "together",
                "eps": 1e-6,
            }
        ],
    ),
    "t5": (t5, seq2seq, None),
    "vit": (vit, pixels, None),
    "mixtral": (mixtral, logits, EXPERTS),
}


def build(name: str) -> tuple[Any, Callable[[Any], Tensor], WeightNormConfig]:
    make, run, rules = MODELS[name]
    torch.manual_seed(0)
    return make().eval(), run, WeightNormConfig(rules)


def assert_same(left: nn.Module, right: nn.Module) -> None:
    assert list(left.state_dict()) == list(right.state_dict())
    for key, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[key]), key


def reload(model: Any, folder: Path, **options: Any) -> Any:
    """Load by the Auto class or by its own, and see that nothing is missing."""
    loaded, said = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not said["missing_keys"] and not said["unexpected_keys"], said
    assert not said["mismatched_keys"] and not said.get("error_msgs"), said
    return loaded


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_patched_model_is_saved_and_comes_back(name: str, tmp_path: Path) -> None:
    model, run, config = build(name)
    before = run(model)
    report = patch_model(model, config)
    assert report.changed
    torch.testing.assert_close(run(model), before, rtol=0, atol=1e-6)
    shaken(model, 0.1)
    model.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    loaded = reload(model, tmp_path / "a")
    assert_same(model, loaded)
    assert torch.equal(run(loaded), run(model))
    assert loaded.config.quantization_config == model.config.quantization_config
    assert not getattr(loaded, "is_quantized", False)
    assert getattr(loaded, "hf_quantizer", None) is None
    # And again: what was loaded is saved in the same way.
    loaded.save_pretrained(tmp_path / "b")
    assert_same(model, reload(loaded, tmp_path / "b"))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_plain_copy_loads_without_this_library(name: str, tmp_path: Path) -> None:
    model, run, config = build(name)
    patch_model(model, config)
    shaken(model, 0.1)
    expected, keys = run(model), list(model.state_dict())
    save_pretrained(model, tmp_path, layout="plain")
    assert list(model.state_dict()) == keys
    assert isinstance(model.config.quantization_config, WeightNormConfig)
    assert "weight_norm" not in (tmp_path / "config.json").read_text()
    loaded = reload(model, tmp_path)
    assert not any(site.normed for site in wn.sites(loaded))
    torch.testing.assert_close(run(loaded), expected, rtol=0, atol=1e-6)
    report = unpatch_model(model)
    assert report.changed
    assert torch.equal(run(loaded), run(model))
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_unpatched_model_is_an_ordinary_one(name: str, tmp_path: Path) -> None:
    model, run, config = build(name)
    expected, names = run(model), [key for key, _ in model.named_parameters()]
    patch_model(model, config)
    unpatch_model(model)
    assert [key for key, _ in model.named_parameters()] == names
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = reload(model, tmp_path)
    assert torch.equal(run(loaded), run(model))
    patch_model(model, config)
    model.save_pretrained(tmp_path)
    assert_same(model, reload(model, tmp_path))


@pytest.mark.parametrize("name", ["llama", "bert, tied", "mixtral"])
@torch.no_grad()
def test_ways_to_load(name: str, tmp_path: Path) -> None:
    model, run, config = build(name)
    patch_model(model, config)
    shaken(model, 0.1)
    model.save_pretrained(tmp_path)
    half = reload(model, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for key, value in half.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].bfloat16())
    mapped = reload(model, tmp_path, device_map="cpu")
    assert torch.equal(run(mapped), run(model))


@torch.no_grad()
def test_parts_on_disk(tmp_path: Path) -> None:
    model, run, config = build("llama")
    patch_model(model, config)
    shaken(model, 0.1)
    model.save_pretrained(tmp_path / "saved")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    offloaded = type(model).from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    torch.testing.assert_close(run(offloaded), run(model))


@torch.no_grad()
def test_other_checkpoints_load_into_a_patched_model(tmp_path: Path) -> None:
    model, run, config = build("llama")
    model.save_pretrained(tmp_path / "plain")
    patch_model(model, config)
    from_plain = reload(model, tmp_path / "plain", quantization_config=config)
    assert torch.equal(run(from_plain), run(model))
    assert_same(model, from_plain)
    wn.migrate(model, to="legacy")
    model.save_pretrained(tmp_path / "legacy")
    from_legacy = reload(model, tmp_path / "legacy")
    assert_same(from_plain, from_legacy)
    from_legacy.save_pretrained(tmp_path / "again")
    assert_same(from_legacy, reload(model, tmp_path / "again"))


def test_auto_classes_and_from_config(tmp_path: Path) -> None:
    model, _, config = build("llama")
    patch_model(model, config)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    body = hf.AutoModel.from_pretrained(tmp_path)
    assert [site.normed for site in wn.sites(body)] == [
        site.normed for site in wn.sites(model.model)
    ]
    fresh = hf.AutoModelForCausalLM.from_config(loaded.config)
    assert not any(site.normed for site in wn.sites(fresh))
    patch_model(fresh, fresh.config.quantization_config)
    assert list(fresh.state_dict()) == list(model.state_dict())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_what_users_do_with_a_model_goes_on_working(tmp_path: Path) -> None:
    for name in ("llama", "bert, tied", "t5"):
        model, run, config = build(name)
        patch_model(model, config)
        model.tie_weights()
        model.resize_token_embeddings(40)
        model.gradient_checkpointing_enable()
        model.train()
        run(model).square().mean().backward()
        for site in wn.sites(model):
            if site.held is not None and site.held.g is not None:
                assert site.held.g.grad is not None, site.name
        model.eval()
        model.save_pretrained(tmp_path / name)
        assert_same(model, reload(model, tmp_path / name))
    model, run, config = build("llama")
    expected = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    patch_model(model, config)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), expected)
    model.set_attn_implementation("eager")
    copied = copy.deepcopy(model)
    assert_same(model, copied)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


def test_tied_embeddings_stay_tied_or_are_left_alone(tmp_path: Path) -> None:
    model, _, config = build("bert, tied")
    patch_model(model, config)
    embed, head = model.bert.embeddings.word_embeddings, model.cls.predictions.decoder
    for one, two in zip(
        embed.parametrizations.weight.parameters(),
        head.parametrizations.weight.parameters(),
        strict=True,
    ):
        assert one is two
    model.save_pretrained(tmp_path)
    loaded = reload(model, tmp_path)
    assert loaded.cls.predictions.decoder.weight.equal(
        loaded.bert.embeddings.word_embeddings.weight
    )
    assert (
        loaded.cls.predictions.decoder.parametrizations.weight.original1
        is loaded.bert.embeddings.word_embeddings.parametrizations.weight.original1
    )
    with pytest.raises(wn.TiedParameterError):
        patch_model(
            build("bert")[0],
            WeightNormConfig({"types": "Embedding", "names": "**.word_embeddings", "eps": 1e-6}),
        )


def test_a_tie_that_a_rule_has_cut_stays_cut(tmp_path: Path) -> None:
    model, _, _ = build("bert, tied")
    rule = {"names": "bert.embeddings.word_embeddings", "tied": "untie", "eps": 1e-6}
    patch_model(model, WeightNormConfig(rule))
    model.save_pretrained(tmp_path / "a")
    loaded = shaken(reload(model, tmp_path / "a"))
    loaded.save_pretrained(tmp_path / "b")
    again = reload(loaded, tmp_path / "b")
    weights = again.bert.embeddings.word_embeddings.weight, again.cls.predictions.decoder.weight
    assert not torch.equal(*weights)
    assert torch.equal(weights[0], loaded.bert.embeddings.word_embeddings.weight)


FAMILIES = [
    name for name in TRANSFORMERS if isinstance(TRANSFORMERS[name].build(), hf.PreTrainedModel)
]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_that_have_weight_norm_of_their_own(family: str, tmp_path: Path) -> None:
    """Stripped, saved by save_pretrained itself, and loaded into the class as it is."""
    entry = TRANSFORMERS[family]
    model: Any = entry.normed()
    shaken(model, 0.1)
    expected = entry.run(model)
    assert unpatch_model(model).changed
    assert torch.equal(entry.run(model), expected)
    model.save_pretrained(tmp_path)
    loaded = reload(model, tmp_path).eval()
    torch.testing.assert_close(entry.run(loaded), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if TRANSFORMERS[name].own is not None]
)
@torch.no_grad()
def test_repair_mends_their_own_remover(family: str) -> None:
    entry = TRANSFORMERS[family]
    model = entry.normed()
    expected = entry.run(model)
    assert repair(model) is model
    for owner in entry.owners(model):
        owner.remove_weight_norm()
    assert torch.equal(entry.run(model), expected)
    assert not any(site.normed for owner in entry.owners(model) for site in wn.sites(owner))
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


# The config ---------------------------------------------------------------------------------


def test_the_config_is_json_and_comes_back(tmp_path: Path) -> None:
    model, _, config = build("mixtral")
    patch_model(model, config)
    noted = model.config.quantization_config
    assert noted.sites[0] == {
        "name": "model.layers.0.mlp.experts.gate_up_proj",
        "dim": [0, 1],
        "eps": 0.0,
        "norm_dtype": None,
    }
    assert config.sites is None  # the given one is not changed
    noted.save_pretrained(tmp_path)
    assert WeightNormConfig.from_pretrained(tmp_path) == noted
    model.save_pretrained(tmp_path / "model")
    assert WeightNormConfig.from_pretrained(tmp_path / "model") == noted
    assert WeightNormConfig.from_dict(json.loads(json.dumps(noted.to_dict()))) == noted


def test_a_folder_of_a_model_that_is_not_patched_has_no_note(tmp_path: Path) -> None:
    build("llama")[0].save_pretrained(tmp_path)
    with pytest.raises(wn.RuleError, match=re.escape(str(tmp_path))):
        WeightNormConfig.from_pretrained(tmp_path)


def test_unpatching_keeps_a_fusion_that_is_not_ours() -> None:
    model, _, config = build("llama")
    patch_model(model, config)
    # A config may have lost the guard, or have fusions of the user's beside it.
    for fusions in (None, {"patch_embeddings": True}):
        changed = copy.deepcopy(model)
        changed.config.fusion_config = fusions
        unpatch_model(changed)
        assert changed.config.fusion_config == fusions
        assert not hasattr(changed.config, "quantization_config")


def test_a_config_of_a_later_release_is_read_with_a_warning() -> None:
    data = WeightNormConfig("linears").to_dict() | {"version": 7, "colour": "blue"}
    with pytest.warns(UserWarning, match=r"version 7.*reads version 1.*colour"):
        assert WeightNormConfig.from_dict(data).rules == WeightNormConfig("linears").rules


def test_a_reload_replays_the_sites_and_not_the_rules(tmp_path: Path) -> None:
    model, _, config = build("llama")
    patch_model(model, config)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"]["rules"] = [{"action": "apply", "types": ["Conv3d"]}]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_same(model, reload(model, tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5", "vit", "wav2vec2", "dac"])
def test_presets_match_their_models(model_type: str) -> None:
    if model_type in MODELS:
        model: Any = MODELS[model_type][0]()
    else:
        model = TRANSFORMERS[model_type].build()
        wn.remove(model)
    changed = wn.apply(model, rules_for(model_type)).changed
    assert changed
    assert not any(
        "embed_tokens" in name or "lm_head" in name or "norm" in name for name in changed
    )
    with pytest.raises(wn.RuleError, match="'lama'; did you mean 'llama'"):
        rules_for("lama")


# Bad input ----------------------------------------------------------------------------------


def test_a_config_that_does_not_fit_changes_nothing() -> None:
    model, _, _ = build("llama")
    before = list(model.state_dict())
    other, _, config = build("bert")
    patch_model(other, config)
    noted = other.config.quantization_config
    with pytest.raises(wn.UnmatchedRuleError, match="made for a bert model, this is a llama"):
        patch_model(model, noted)
    noted.model_type = None
    with pytest.raises(wn.UnmatchedRuleError, match="LlamaForCausalLM does not have"):
        patch_model(model, noted)
    with pytest.raises(wn.UnmatchedRuleError):
        patch_model(model, WeightNormConfig({"types": "Conv1d"}))
    with pytest.raises(TypeError, match=r"expected a model of transformers.*wn_surgery\.apply"):
        patch_model(nn.Linear(2, 2), WeightNormConfig("linears"))  # type: ignore[arg-type]
    with pytest.raises(wn.RuleError, match="where"):
        WeightNormConfig(wn.Rule(where=lambda name, module: True))
    assert list(model.state_dict()) == before
    assert not hasattr(model.config, "quantization_config")


def test_a_quantized_model_is_refused() -> None:
    model, _, config = build("llama")
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(
        wn.QuantizedWeightError, match=r"quantized \(torchao\); patch the model bef"
    ):
        patch_model(model, config)
    assert not any(site.normed for site in wn.sites(model))


def test_broken_folders(tmp_path: Path) -> None:
    model, _, config = build("llama")
    patch_model(model, config)
    with pytest.raises(wn.RuleFileError, match="has neither weight_norm_config"):
        WeightNormConfig.from_pretrained(tmp_path)
    (tmp_path / "weight_norm_config.json").write_text("{")
    with pytest.raises(wn.RuleFileError, match="is not JSON"):
        WeightNormConfig.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|header|invalid"):
        type(model).from_pretrained(tmp_path / "model")
    assert weights.read_bytes() == content[: len(content) // 2]
    with pytest.raises(ValueError, match="layout='flat'"):
        save_pretrained(model, tmp_path, layout="flat")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"has a remove_weight_norm\(\) method"):
        repair(model)


def test_the_table_of_removers_is_up_to_date() -> None:
    import importlib.util

    root = Path(__file__).parents[2]
    if f"transformers=={hf.__version__}\n" not in (root / "constraints.txt").read_text():
        pytest.skip("the table is of the pinned transformers")
    path = root / "docs" / "make_removers_table.py"
    spec = importlib.util.spec_from_file_location("_removers", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.table()
    assert made in script.PAGE.read_text(), "run python docs/make_removers_table.py --write"
    assert made.count("ValueError: weight_norm of 'weight' not found") == 9


def test_optimizers_follow_the_weights_to_g_and_v() -> None:
    torch.manual_seed(0)
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    patch_model(model, {"names": "**.q_proj"}, optimizers=[optimizer])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    unpatch_model(model, optimizers=[optimizer])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
