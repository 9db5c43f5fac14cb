"""The model behind the table of docs/scaling.md, against what two processes keep and send."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import fsdp2_on_the_cpu
from tests.distributed.launching import ROOT, launch

sys.path.insert(0, str(ROOT))
try:
    from benchmarks import scaling
finally:
    sys.path.remove(str(ROOT))

ENGINES = {
    "ddp": scaling.Engine("DDP", ddp=True),
    "fsdp": scaling.Engine("FSDP2", shards=2),
    "tp": scaling.Engine("TP", tp=2),
}
STYLES = {"up": 0, "down": 1}
TOKENS = 16


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("costs") / "2.pt"
    launch("parallel_runs.py", file, "spent", processes=2)
    return torch.load(file, weights_only=True)["spent"]


@fsdp2_on_the_cpu
@pytest.mark.processes
@pytest.mark.parametrize("name", ENGINES)
def test_the_model_is_what_is_measured(measured: Any, name: str) -> None:
    from tests.distributed.cut_models import Net

    plain, added = scaling.costs(Net(), {"types": "Linear"}, ENGINES[name], STYLES, TOKENS)
    state, weights, sent = measured[f"{name} plain"]
    assert (state, weights, sent) == (plain.state, 0, plain.sent)
    normed = measured[f"{name} normed"]
    assert normed[0] - state == added.state
    assert normed[1] - weights == added.weights
    assert normed[2] - sent == added.sent


def test_the_page_has_the_table() -> None:
    pytest.importorskip("transformers")
    page = Path(scaling.PAGE).read_text(encoding="utf-8")
    assert scaling.updated(page) == page, "run python -m benchmarks.scaling"
