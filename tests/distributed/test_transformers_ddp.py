"""The Trainer of transformers on two processes over gloo, by accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import wn_surgery as wn
from tests.distributed.launching import launch

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("transformers ddp")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trainer")
    launch("trainer_run.py", made, 2, processes=2)
    launch("trainer_run.py", made, 1)
    return made


@pytest.mark.parametrize(
    ("case", "tolerance"), [("usual", 1e-4), ("accumulated", 1e-4), ("bf16", 2e-2)]
)
def test_two_processes_get_what_one_gets(folder: Path, case: str, tolerance: float) -> None:
    one, two = (torch.load(folder / f"{count}.pt", weights_only=True)[case] for count in (1, 2))
    assert list(one) == list(two)
    assert any("parametrizations" in key for key in one)
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=tolerance, msg=key)


def test_a_plain_copy_is_exported_by_the_first(folder: Path) -> None:
    model: Any = hf.LlamaForCausalLM.from_pretrained(folder / "plain")
    assert not any(site.normed for site in wn.sites(model))
