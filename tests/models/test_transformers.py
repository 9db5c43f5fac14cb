"""Every architecture of transformers that carries weight norm.

Higgs Audio's tokenizer, which needs torchaudio to be imported, is in test_twins.py.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import wn_surgery as wn

from .residue import plain_keys, residue
from .zoo import TRANSFORMERS

FAMILIES = list(TRANSFORMERS)
OWN = [name for name, entry in TRANSFORMERS.items() if entry.own is not None]


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_remove_in_one_call(family: str) -> None:
    entry = TRANSFORMERS[family]
    model = entry.normed()
    carried = [site.name for site in wn.sites(model) if site.normed]
    keys, grads = list(model.state_dict()), {p.requires_grad for p in model.parameters()}
    output = entry.run(model)
    report = wn.remove(model)
    assert list(report.changed) == carried and carried
    assert torch.equal(entry.run(model), output)
    assert residue(model) == []
    assert set(model.state_dict()) == plain_keys(keys)
    assert {p.requires_grad for p in model.parameters()} == grads
    if entry.own is not None:
        plain = entry.build()
        wn.remove(plain)  # a part of VITS and the speech model in XCodec have it from __init__
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [name for name, _ in model.named_parameters()] == [
            name for name, _ in plain.named_parameters()
        ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_apply_by_rule_is_the_models_own(family: str) -> None:
    entry = TRANSFORMERS[family]
    own = entry.normed()
    torch.manual_seed(0)
    ours = entry.build().eval()
    if entry.own is None:
        wn.remove(ours)
    plain = entry.run(ours)
    wn.apply(ours, entry.rules)
    # g is the kernel's own norm, so the plain model's output is kept bit for bit.
    assert torch.equal(entry.run(ours), plain)
    theirs, mine = own.state_dict(), ours.state_dict()
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        if key.endswith("original0"):
            torch.testing.assert_close(mine[key], value, rtol=3e-7, atol=0)
        elif entry.own is not None:
            assert torch.equal(mine[key], value), key
    ours.load_state_dict(theirs, strict=True)
    assert torch.equal(entry.run(ours), entry.run(own))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_migrated_models_can_be_copied_pickled_and_folded(family: str) -> None:
    entry = TRANSFORMERS[family]
    model = entry.normed()
    wn.migrate(model)
    # Before the first run, at which transformers hangs local functions into some models.
    pickled = pickle.loads(pickle.dumps(model))
    output = entry.run(entry.normed())
    for other in (model, copy.deepcopy(model), pickled):
        assert torch.equal(entry.run(other), output)
    with wn.folded(model):
        assert torch.equal(entry.run(model), output)


@pytest.mark.parametrize("family", OWN)
def test_the_models_own_remover(family: str) -> None:
    """As of transformers 5.23 most raise: `apply` parametrizes, `remove` looks for a hook."""
    entry = TRANSFORMERS[family]
    model = entry.normed()
    owners = entry.owners(model)
    if entry.own_remover:
        acoustic = nn.ModuleList([model.acoustic_encoder, model.acoustic_decoder])
        carried = [site.name for site in wn.sites(acoustic) if site.normed]
        for layer in owners:
            layer.remove_weight_norm()
        # torch's load hooks stay behind.
        with pytest.raises(AttributeError, match="_weight_norm_compat_hook"):
            pickle.dumps(acoustic)
        assert list(wn.remove(acoustic).leftovers) == carried and carried
        assert residue(acoustic) == []
        pickle.dumps(acoustic)
    else:
        with pytest.raises(ValueError, match="weight_norm of 'weight' not found"):
            owners[-1].remove_weight_norm()


def test_the_zoo_is_complete() -> None:
    """A family that begins to carry weight norm has to be added."""
    models = Path(transformers.__file__).parent / "models"
    carrying = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if "weight_norm(" in path.read_text(encoding="utf-8")
    }
    known = {
        "fastspeech2_hifigan": "fastspeech2_conformer",
        "speecht5_hifigan": "speecht5",
        "pocket_tts": "pocket_tts_audio_tokenizer",
    }
    assert carrying - {known.get(name, name) for name in TRANSFORMERS} == {
        "higgs_audio_v2_tokenizer"
    }
