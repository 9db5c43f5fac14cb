"""Models that transformers and Lightning cut, on two processes over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.launching import launch
from tests.torch_facts.versions import OLD

pytestmark = [
    pytest.mark.processes,
    pytest.mark.xdist_group("parallel"),
    pytest.mark.skipif(OLD, reason="an older DTensor has no rule for norms"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("frameworks")
    launch("framework_runs.py", folder / "found.pt", folder, processes=2)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize(("name", "changed"), [("llama", 9), ("mixtral", 7)])
def test_models_of_transformers_that_it_has_cut(found: Any, name: str, changed: int) -> None:
    results = found[name]
    assert results["changed"] == changed and results["cut"] >= 6
    for case in ("logits", "trained", "logits after", "folded", "removed", "logits plain"):
        assert results[case] <= 1e-5, case
    assert results["generated alike"]
    there, left = results["hooks"]
    assert there > left == 0


@pytest.mark.parametrize("who", [0, 1], ids=["configure_model", "callback"])
def test_a_lightning_module_that_cuts_its_layers(found: Any, who: int) -> None:
    results = found["lightning"][who]
    assert results["cut"]
    assert results["trained"] <= 1e-5
    assert results["steps"] == list(range(1, 21))
