"""Distributed checkpoints of a sharded model: saved on two ranks, read on one and on four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import wn_surgery as wn
from tests.checkpoints.test_distributed import ALONE
from tests.distributed.conftest import fsdp2_on_the_cpu
from tests.distributed.dcp_run import build
from tests.distributed.launching import launch
from wn_surgery.checkpoints.io.distributed import Distributed

pytestmark = [
    pytest.mark.processes,
    pytest.mark.xdist_group("dcp"),
    fsdp2_on_the_cpu,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def run(folder: Path, what: str, count: int) -> Any:
    launch("dcp_run.py", folder, what, processes=count)
    return torch.load(folder / f"{what}.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dcp")
    run(made, "save", 2)
    return made


def results(folder: Path) -> Any:
    return torch.load(folder / "save.pt", weights_only=True)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_resumes_bit_for_bit(folder: Path) -> None:
    found = results(folder)
    assert equal(found["resumed"], found["straight"])
    assert not equal(found["saved"], found["straight"])


def test_one_process_and_four_read_what_two_have_saved(folder: Path) -> None:
    saved = results(folder)["saved"]
    state = {"model": build().state_dict()}
    dcp.load(state, checkpoint_id=folder / "saved", **ALONE)
    assert equal(state["model"], saved)
    assert equal(run(folder, "load", 4)["loaded"], saved)


def test_conversion_of_pieces(folder: Path) -> None:
    saved = results(folder)["saved"]
    pieces = Distributed(folder / "saved").parts[("model",)].entries
    assert any(len(entry.pieces) == 2 for entry in pieces.values())
    wanted = build()
    wanted.load_state_dict(saved)
    wn.remove(wanted)
    with pytest.warns(UserWarning, match="state of 4 tensors is left out"):
        wn.checkpoints.convert_file(folder / "saved", folder / "plain", verify=True)
    wn.checkpoints.convert_file(folder / "saved", folder / "plain.safetensors", verify=True)
    assert equal(load_file(folder / "plain.safetensors"), wanted.state_dict())
    state = {"model": {key: torch.empty_like(t) for key, t in wanted.state_dict().items()}}
    dcp.load(state, checkpoint_id=folder / "plain", no_dist=True)
    assert equal(state["model"], wanted.state_dict())
