"""PEFT's adapters on weight-normed models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

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


class Net(nn.Module):
    """The kinds of layers that adapters go on."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(11, 8), nn.Linear(8, 12)
        self.conv, self.out = nn.Conv1d(12, 6, 3), nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.lin(self.emb(ids))).transpose(1, 2)
        return self.out(torch.tanh(self.conv(x)).transpose(1, 2))


LIN, BOTH = ["lin"], ["lin", "conv"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["emb", *BOTH]),
    "lora_bias": lambda: peft.LoraConfig(r=2, target_modules=LIN, lora_bias=True),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=BOTH, use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=2, target_modules=LIN, init_lora_weights="pissa"),
    "ia3": lambda: peft.IA3Config(target_modules=["lin", "out"], feedforward_modules=["out"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=BOTH),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=BOTH),
    # These write into weight.data without an assignment.
    "oft": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=LIN),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=LIN),
    "tokens": lambda: peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 3]),
}
NORM = {"types": ["Linear", "Conv1d", "Embedding"], "names": ["emb", "lin", "conv", "out"]}


def adapted(kind: str, patched: str | None) -> Any:
    """A model with adapters that do something; weight norm comes before or after them, or not."""
    torch.manual_seed(0)
    net = Net()
    if patched == "before":
        wn.apply(net, NORM)
    made = peft.get_peft_model(cast(Any, net), ADAPTERS[kind]())
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    if patched == "after":
        wn.apply(
            made, {"names": ["**.base_layer", "**.out", "**.token_adapter"], "params": "weight"}
        )
    assert patched is None or sum(site.normed for site in wn.sites(made)) >= 2
    return made.eval()


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate:UserWarning")  # IA3
@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.parametrize("kind", ADAPTERS)
@torch.no_grad()
def test_the_own_methods_of_peft_are_right(kind: str, patched: str) -> None:
    ids = torch.arange(10)[None]
    for safe in (False, True):
        plain, normed = adapted(kind, None), adapted(kind, patched)
        base = plain(ids)
        torch.testing.assert_close(normed(ids), base)
        weights = _weights(plain)
        for made in (plain, normed):
            made.merge_adapter(safe_merge=safe)
        moved = [
            name for name, weight in _weights(plain).items() if not weight.equal(weights[name])
        ]
        assert moved  # so that a lost merge would be seen
        _compare(plain, normed, ids)
        for made in (plain, normed):
            made.unmerge_adapter()
        _compare(plain, normed, ids)
        plain, normed = (made.merge_and_unload(safe_merge=safe) for made in (plain, normed))
        assert type(normed) is Net
        _compare(plain, normed, ids)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the layers beneath adapters, by their place in the net."""
    found = {}
    for name in ("emb", "lin", "conv", "out"):
        layer: Any = model.get_submodule(
            name if isinstance(model, Net) else f"base_model.model.{name}"
        )
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        found[name] = layer.weight.detach().clone()
    return found


def _compare(plain: Any, normed: Any, ids: torch.Tensor) -> None:
    for name, weight in _weights(plain).items():
        torch.testing.assert_close(_weights(normed)[name], weight)
    torch.testing.assert_close(normed(ids), plain(ids))


@torch.no_grad()
def test_a_merge_that_weight_norm_cannot_store_raises() -> None:
    normed = adapted("ia3", "before")
    layer = normed.base_model.model.lin
    layer.ia3_l["default"][2] = 0
    before = layer.get_base_layer().weight.clone()
    for merge in (normed.merge_adapter, normed.merge_and_unload):
        with pytest.raises(wn.ZeroNormError, match=r"Linear\.weight: the new weight has 1 slice"):
            merge()
        assert torch.equal(layer.get_base_layer().weight, before) and not layer.merged


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@torch.no_grad()
def test_why_there_is_a_function_for_it() -> None:
    """The weight norm of torch itself loses PEFT's own merge."""
    ids = torch.arange(10)[None]
    for apply in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm):
        expected = adapted("lora", None).merge_and_unload()(ids)
        lost, kept = adapted("lora", None), adapted("lora", None)
        for made in (lost, kept):
            apply(made.base_model.model.lin.get_base_layer())
        assert (lost.merge_and_unload()(ids) - expected).abs().max() > 1e-2
        torch.testing.assert_close(merge_and_unload(kept)(ids), expected)


def test_copies_of_a_model_with_adapters_on_convolutions() -> None:
    """PEFT makes them of the class of the layer, which has weight norm; they have not."""
    made = adapted("lora", "before")
    ids = torch.arange(10)[None]
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(ids), made(ids))
        assert type(again.base_model.model.conv.lora_A.default) is nn.Conv1d


@torch.no_grad()
def test_merging_in_place_and_back() -> None:
    with torch.enable_grad():
        made = tuned(patched())
    expected = made(TOKENS).logits
    merge_adapter(made)
    torch.testing.assert_close(made(TOKENS).logits, expected, rtol=0, atol=1e-5)
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


def test_adapters_are_saved_alone(tmp_path: Path) -> None:
    model = patched()
    try:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    model.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in written and "config.json" not in written
    other = patched()
    other.load_state_dict(model.state_dict(), strict=False)
    other.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(other.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


def test_adapters_may_be_named() -> None:
    made = tuned(llama())
    rules = WeightNormConfig({"names": "**.lora_A.default"})
    report = patch_model(made.base_model.model, rules)
    assert len(report.changed) == 4 and all("lora_A" in name for name in report.changed)


def test_models_without_adapters() -> None:
    with pytest.raises(TypeError, match=r"expected a PEFT model that has merge_and_unload\(\)"):
        merge_and_unload(nn.Linear(2, 2))
