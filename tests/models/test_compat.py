"""Other people's code, as it is installed, with our functions under torch's names."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import wn_surgery as wn
import wn_surgery.huggingface
from wn_surgery import compat

from .residue import plain_keys, residue
from .zoo import LEGACY, PARAMETRIZED, TRANSFORMERS, Model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*jit.* is deprecated:DeprecationWarning"),  # snac
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_tcn"),
]
OWN = [name for name, entry in TRANSFORMERS.items() if entry.own is not None]
PACKAGES: dict[str, Model] = {**LEGACY, **PARAMETRIZED}


@pytest.mark.parametrize("family", OWN)
@torch.no_grad()
def test_the_own_remover_of_a_model_of_transformers(family: str) -> None:
    """Whether the weight norm was put on outside, by torch's function, or inside, by ours."""
    entry = TRANSFORMERS[family]
    plain = list(entry.build().state_dict())
    by_torch = entry.normed()
    with compat.installed():
        by_us = entry.normed()
    assert list(by_us.state_dict()) == list(by_torch.state_dict())
    for model in (by_torch, by_us):
        output = entry.run(copy.deepcopy(model))
        owners = entry.owners(model)
        if not entry.own_remover:
            with pytest.raises(ValueError, match="weight_norm of 'weight' not found"):
                owners[-1].remove_weight_norm()
        with compat.installed():
            for owner in owners:
                owner.remove_weight_norm()
        assert torch.equal(entry.run(copy.deepcopy(model)), output)
        assert list(model.state_dict()) == plain
        for owner in owners if family != "xcodec" else ():  # a part of it has it from __init__
            assert residue(owner) == []
            pickle.loads(pickle.dumps(owner))


@pytest.mark.parametrize("package", PACKAGES)
@torch.no_grad()
def test_a_package_that_builds_weight_norm(package: str) -> None:
    """It was imported before: each of the four has bound torch's function by name."""
    entry = PACKAGES[package]
    torchs = entry.normed()
    with compat.installed():
        model = entry.normed()
    assert list(model.state_dict()) == list(torchs.state_dict())
    names, expected = ([name for name, _ in each.named_parameters()] for each in (model, torchs))
    assert names == expected
    model.load_state_dict(torchs.state_dict(), strict=True)
    output = entry.run(torchs)
    assert torch.equal(entry.run(model), output)
    # A checkpoint of the other layout, and a plain one.
    torchs_parametrized, plain = copy.deepcopy(torchs), copy.deepcopy(torchs)
    wn.migrate(torchs_parametrized, to="legacy" if package in PARAMETRIZED else "parametrized")
    wn.remove(plain)
    for other in (torchs_parametrized, plain):
        with compat.installed():
            again = entry.normed()
        again.load_state_dict(other.state_dict(), strict=True)
        torch.testing.assert_close(entry.run(again), output)
    if package in PARAMETRIZED:
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(torchs)
    assert torch.equal(entry.run(pickle.loads(pickle.dumps(model))), output)
    assert set(wn.checkpoints.convert(model.state_dict())) == plain_keys(list(model.state_dict()))


@torch.no_grad()
def test_the_own_remover_of_styletts2_on_a_model_in_the_newer_layout() -> None:
    from styletts2.Modules.hifigan import AdaINResBlock1

    block = AdaINResBlock1(4, style_dim=3).eval()
    wn.migrate(block)
    x, style = torch.randn(1, 4, 8), torch.randn(1, 3)
    output = block(x, style)
    with pytest.raises(ValueError, match="weight_norm of 'weight' not found"):
        block.remove_weight_norm()
    with compat.installed():
        block.remove_weight_norm()
    assert residue(block) == [] and torch.equal(block(x, style), output)


@pytest.mark.parametrize("saved", ["inside", "outside"])
def test_a_model_that_was_built_inside_saves_and_reloads_everywhere(
    saved: str, tmp_path: Path
) -> None:
    """Its class puts the weight norm on, so nothing about it is in its config."""
    assert wn_surgery.huggingface  # it takes part in saving and loading
    entry = TRANSFORMERS["wav2vec2"]
    with compat.installed():
        model: Any = entry.normed()
        if saved == "inside":
            model.save_pretrained(tmp_path)
    if saved == "outside":
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not {"quantization_config", "fusion_config"} & config.keys()
    outside = type(model).from_pretrained(tmp_path)
    with compat.installed():
        inside = type(model).from_pretrained(tmp_path)
    assert [site.ours for site in wn.sites(inside) if site.normed] == [True]
    assert [site.ours for site in wn.sites(outside) if site.normed] == [False]
    with torch.no_grad():
        output = entry.run(model)
        assert torch.equal(entry.run(inside.eval()), output)
        assert torch.equal(entry.run(outside.eval()), output)
