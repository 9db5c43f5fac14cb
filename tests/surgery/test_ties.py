"""Tied parameters and shared modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import wn_surgery as wn


class Language(nn.Module):
    """An embedding and a head that are one matrix, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


HEAD = {"names": "head", "tied": "together"}
TOKENS = torch.tensor([[0, 1, 2, 5]])


def one(model: Language) -> bool:
    a, b = model.embed.parametrizations.weight, model.head.parametrizations.weight
    return a.original0 is b.original0 and a.original1 is b.original1


def test_together_through_training_state_dict_copy_and_removal() -> None:
    torch.manual_seed(0)
    model = Language()
    before = model(TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    report = wn.apply(model, HEAD, optimizers=[optimizer])
    assert report.changed == ("embed.weight", "head.weight")
    assert "tied to head.weight" in str(report)
    assert one(model) and torch.equal(model(TOKENS), before)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).logsumexp(-1).sum().backward()
        optimizer.step()
    assert torch.equal(model.embed.weight, model.head.weight)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) == 4

    state = model.state_dict()
    key = "parametrizations.weight.original1"
    assert state[f"embed.{key}"].data_ptr() == state[f"head.{key}"].data_ptr()
    other = Language()
    wn.apply(other, HEAD)
    other.load_state_dict(state, strict=True)
    assert one(other) and torch.equal(other(TOKENS), model(TOKENS))
    assert one(copy.deepcopy(model)) and one(pickle.loads(pickle.dumps(model)))

    output = model(TOKENS)
    wn.remove(model, optimizers=[optimizer])
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(TOKENS), output)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters()
    }


def test_a_plain_tied_checkpoint_loads() -> None:
    plain, model = Language(), Language()
    wn.apply(model, HEAD)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert one(model) and torch.equal(model(TOKENS), plain(TOKENS))


def test_both_ends_matched() -> None:
    model = Language()
    rules = {"types": ["Embedding", "Linear"], "exclude_names": "body"}
    with pytest.raises(wn.TiedParameterError, match=r"embed\.weight is tied to head\.weight"):
        wn.apply(model, rules)
    wn.apply(model, {**rules, "tied": "together"})
    assert one(model)
    # 'out' is another axis for an embedding than for a linear layer.
    with pytest.raises(wn.ConflictingNamesError, match="one tied parameter"):
        wn.apply(Language(), {**rules, "tied": "together", "dim": "out"})


def test_skip_and_untie() -> None:
    model = Language()
    report = wn.apply(model, {"types": "Linear", "tied": "skip"})
    assert report.changed == ("body.weight",)
    assert model.head.weight is model.embed.weight

    model = Language()
    weight = model.embed.weight
    assert wn.apply(model, {"names": "head", "tied": "untie"}).changed == ("head.weight",)
    v = model.head.parametrizations.weight.original1
    assert model.embed.weight is weight and v.data_ptr() != weight.data_ptr()
    plan = wn.plan(Language(), {"names": "head", "tied": "untie"})
    assert plan.added == 6 * 4 + 6


def test_what_a_tie_skips_may_have_zero_rows() -> None:
    """As BERT's decoder has, which is tied to embeddings whose padding is zero."""

    def padded() -> Language:
        model = Language()
        with torch.no_grad():
            model.embed.weight[0] = 0
        return model

    assert wn.apply(padded(), {"types": "Linear", "tied": "skip"}).changed == ("body.weight",)
    for tied in ("together", "untie"):
        with pytest.raises(wn.ZeroNormError, match="weight has 1 slice"):
            wn.apply(padded(), {"names": "head", "tied": tied})


def test_untying_one_end_keeps_the_other_in_the_optimizer() -> None:
    model = Language()
    optimizer = torch.optim.Adam(model.parameters())
    model(TOKENS).sum().backward()
    optimizer.step()
    report = wn.apply(model, {"names": "head", "tied": "untie"}, optimizers=[optimizer])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(model.embed.weight),
        *(id(p) for p in model.head.parameters()),
        *(id(p) for p in model.body.parameters()),
    ]
    assert model.embed.weight in optimizer.state and report.optimizers[0].reset == []
    assert str(report.optimizers[0]).startswith("Adam: 0 parameters -> 2 in group 0")


def test_untying_every_end_copies_once() -> None:
    model = Language()
    rules = {"names": "{embed,head}", "tied": "untie"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = wn.plan(model, rules)
    wn.apply(model, rules, optimizers=[optimizer])
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters()
    }
    pointers = {
        layer.parametrizations.weight.original1.data_ptr() for layer in (model.embed, model.head)
    }
    assert len(pointers) == 2
    assert sum(p.numel() for p in model.parameters()) == plan.parameters + plan.added


def test_removing_one_end_of_a_tie() -> None:
    model = Language()
    wn.apply(model, HEAD)
    rule = {"action": "remove", "names": "head"}
    with pytest.raises(wn.TiedParameterError, match=r"tied to embed\.weight"):
        wn.remove(model, rule)
    assert one(model)
    assert wn.remove(model, {**rule, "tied": "skip"}).changed == ()
    wn.remove(copy.deepcopy(model), {**rule, "tied": "together"})
    plan = wn.plan(model, {**rule, "tied": "untie"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wn.remove(model, {**rule, "tied": "untie"}, optimizers=[optimizer])
    assert sum(p.numel() for p in model.parameters()) == plan.parameters + plan.added
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters()
    }
    assert type(model.head) is nn.Linear and torch.equal(model.head.weight, model.embed.weight)
    assert len(wn.sites(model)[0].names) == 1 and wn.sites(model)[0].layout == "parametrized"


def test_replacing_keeps_the_tie() -> None:
    model = Language()
    wn.apply(model, HEAD)
    wn.apply(model, {**HEAD, "dim": 1, "replace": True})
    assert one(model) and model.head.parametrizations.weight.original0.shape == (1, 4)


def test_migration_keeps_the_tie() -> None:
    model = Language()
    wn.apply(model, HEAD)
    wn.migrate(model, to="legacy")
    assert model.head.weight_v is model.embed.weight_v
    wn.migrate(model)
    assert one(model)


def test_parameters_that_share_memory_are_tied() -> None:
    model = Language()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    with pytest.raises(wn.TiedParameterError):
        wn.apply(model, {"names": "head"})
    wn.apply(model, HEAD)
    assert one(model)


@pytest.mark.parametrize("tied", ["together", "untie", "skip"])
@pytest.mark.parametrize("ends", [1, 2, 3])
def test_parameters_are_counted_where_ends_share_memory(tied: Any, ends: int) -> None:
    """The last of three ends is another Parameter in the memory of the first two."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    weight = model[0].weight
    model[1].weight, model[2].weight = weight, nn.Parameter(weight.detach())
    names = [str(i) for i in range(ends)]
    plan = wn.plan(model, names=names, tied=tied)
    assert plan.parameters == 18
    expected = plan.to_dict()["parameters_after"]
    wn.apply(model, names=names, tied=tied)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("tied", ["together", "untie"])
def test_an_optimizer_holds_each_once_where_ends_share_memory(tied: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    optimizer = torch.optim.AdamW(model.parameters())
    wn.apply(model, names="*", tied=tied, optimizers=optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters()})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_in_the_memory_of_a_legacy_v() -> None:
    def half_tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = nn.Parameter(model[0].weight.detach())
        torch.nn.utils.weight_norm(model[0])  # its v stays in that memory
        return model

    model = half_tied()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    says = r"1\.weight has its values in the memory of 0\.weight_v"
    with pytest.raises(wn.TiedParameterError, match=says):
        wn.apply(model, names="1", tied="together")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    wn.apply(model, names="1", tied="untie")
    with torch.no_grad():
        model[0].weight_v.zero_()
    assert torch.equal(model[1].weight, before["1.weight"])


def test_the_half_tie_that_torch_leaves_is_not_a_tie() -> None:
    model = Language()
    parametrizations.weight_norm(model.head)  # v aliases the embedding's memory
    assert wn.remove(model).changed == ("head.weight",)
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()


def test_a_shared_module_is_one_site() -> None:
    conv = nn.Conv1d(2, 2, 1)
    model = nn.ModuleDict({"conv": conv, "net": nn.Sequential(conv, nn.ReLU())})
    (site,) = wn.sites(model)
    assert site.names == ("conv.weight", "net.0.weight")
    plan = wn.plan(model, {"names": "net.0"})
    assert "conv.weight = net.0.weight" in str(plan) and plan.added == 2
    before = list(model.state_dict())
    wn.apply(model, {"types": "Conv1d"})
    assert len([key for key in model.state_dict() if key.endswith("original1")]) == 2
    wn.remove(model)
    assert list(model.state_dict()) == before


def test_cycles_and_wrappers() -> None:
    inner = nn.Linear(2, 2)
    loop = nn.Module()
    loop.child = nn.Module()
    loop.child.layer = inner
    loop.child.parent = loop
    assert [site.name for site in wn.sites(loop)] == ["child.layer.weight"]
    compiled = torch.compile(nn.Sequential(inner), backend="eager")
    assert [site.name for site in wn.sites(compiled)] == ["0.weight"]
    module = nn.Module()
    module._orig_mod = nn.Sequential(nn.Linear(2, 2))  # not a wrapper: just a name
    assert [site.name for site in wn.sites(module)] == ["_orig_mod.0.weight"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_v_of_the_legacy_layout_is_no_tie_without_an_address() -> None:
    with torch.device("meta"):
        one, other = (torch.nn.utils.weight_norm(nn.Linear(4, 3)) for _ in range(2))
    other.weight_v, other.weight_g = one.weight_v, one.weight_g
    with pytest.raises(wn.TiedParameterError):
        wn.remove(nn.ModuleDict({"one": one, "other": other}), names="one")
    assert wn.remove(one).changed == ("weight",)
