"""A mixture of 256 experts whose weights are two 3-D parameters, as transformers stores them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import wn_surgery as wn

transformers = pytest.importorskip("transformers")

EXPERTS = ["gate_up_proj", "down_proj"]
RULES: list[dict[str, Any]] = [
    {"types": "Linear"},
    {"names": "**.experts", "params": EXPERTS, "dim": [0, 1]},  # a norm for each row of each
]


def mixture() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=256, num_experts_per_tok=4, experts_implementation="eager",
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


class Computed(TorchDispatchMode):
    """Counts how often all experts of a layer are scaled."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith("aten::mul") and tuple(result.shape) == (256, 16, 16):
            self.count += 1
        return result


def step(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.AdamW(wn.parameter_groups(model, weight_decay=0.01), lr=1e-2)
    loss: torch.Tensor = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_256_experts_are_planned_trained_and_made_plain() -> None:
    model = mixture()
    tokens = torch.randint(0, 32, (2, 16))
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(tokens).logits
    plan = wn.plan(model, RULES)
    experts = [each for each in plan.changes if each.site.param in EXPERTS]
    assert [each.site.shape for each in experts] == [(256, 16, 16), (256, 16, 8)] * 2
    wn.apply(model, RULES)
    sites = {site.name: site for site in wn.sites(model) if site.normed}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert sites[name].held.g.shape == (256, 16, 1)
    assert torch.equal(model(tokens).logits, before)

    # transformers' own loop reads a parameter for each expert that has tokens.
    fused = copy.deepcopy(model)
    wn.fuse(fused)
    with torch.no_grad(), Computed() as one_by_one:
        model(tokens)
    with torch.no_grad(), Computed() as at_once:
        fused(tokens)
    assert one_by_one.count > 2 * 20  # the whole weight each time
    assert at_once.count == 2  # in a group, once a forward in each layer
    losses = [step(each, tokens) for each in (model, fused)]
    torch.testing.assert_close(*losses)
    for one, other in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    g = sites[name].held.g
    assert g.grad is not None and 20 < int((g.grad != 0).any(dim=1).sum()) <= 256

    after = model(tokens).logits
    report = wn.remove(model)
    assert len(report.changed) == len(plan.changes)
    assert torch.equal(model(tokens).logits, after)
    assert model.state_dict().keys() == plain.keys()
    assert not torch.equal(model.get_parameter(name), plain[name])
