"""Models of other packages: two with the legacy hook, two with torch's parametrization."""

from __future__ import annotations

import copy

import pytest
import torch

import wn_surgery as wn

from .residue import plain_keys, residue
from .zoo import LEGACY, PARAMETRIZED, Model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*jit.* is deprecated:DeprecationWarning"),  # snac
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_tcn"),
]
ENTRIES = [
    pytest.param(entry, layout, id=name)
    for layout, entries in (("legacy", LEGACY), ("parametrized", PARAMETRIZED))
    for name, entry in entries.items()
]


@pytest.mark.parametrize(("entry", "layout"), ENTRIES)
@torch.no_grad()
def test_removal_migration_and_state_dicts(entry: Model, layout: str) -> None:
    model = entry.normed()
    output = entry.run(model)
    checkpoint = {key: value.clone() for key, value in model.state_dict().items()}
    carried = [site for site in wn.sites(model) if site.normed]
    assert carried and {site.layout for site in carried} == {layout}

    migrated = model
    wn.migrate(migrated)
    assert torch.equal(entry.run(migrated), output)
    migrated.load_state_dict(checkpoint, strict=True)
    assert torch.equal(entry.run(migrated), output)

    stripped = copy.deepcopy(migrated)
    wn.remove(stripped)
    assert torch.equal(entry.run(stripped), output)
    assert residue(stripped) == []
    assert set(stripped.state_dict()) == plain_keys(list(checkpoint))

    direct = entry.normed()
    wn.remove(direct)
    assert torch.equal(entry.run(direct), output)
    assert residue(direct) == []
