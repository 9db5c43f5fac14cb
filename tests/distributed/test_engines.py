"""Every engine that people train on against one process, and what it refuses."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.distributed.conftest import fsdp2_on_the_cpu
from tests.distributed.launching import launch

pytestmark = [
    pytest.mark.processes,
    pytest.mark.xdist_group("parallel"),
    fsdp2_on_the_cpu,
]
DEEPSPEED = [f"DeepSpeed, ZeRO-{stage}" for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("engines")
    launch("engine_runs.py", folder / "found.pt", folder, processes=2)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(scope="module")
def with_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; test_partitioned.py has its marks")
    folder = tmp_path_factory.mktemp("deepspeed")
    launch("engine_runs.py", folder / "found.pt", folder, *DEEPSPEED, processes=2)
    return torch.load(folder / "found.pt", weights_only=True)


def of_all(said: str) -> list[str]:
    ranks = said.split("\n--\n")
    assert len(ranks) == 2
    return ranks


def test_every_engine_trains_what_one_process_trains(found: Any) -> None:
    assert len(found) == 10
    for name, result in found.items():
        assert result["difference"] <= 1e-6, name


@pytest.mark.parametrize("flat", [False, True])
def test_fsdp1_holds_what_it_was_given(found: Any, flat: bool) -> None:
    result = found[f"FSDP1, use_orig_params={not flat}"]
    for said in of_all(result["late"]):
        assert said.startswith("WrappedModuleError") and "is held by FSDP" in said
    for name in ("apply", "remove"):
        for said in of_all(result[name]):
            assert said.startswith("WrappedModuleError[embed.weight]: embed.weight is held by FSDP")
    for name in ("statistics", "folded", "writable", "initialize_from_batch"):
        for said in of_all(result[name]):
            assert said.startswith("WrappedModuleError[embed.weight]") and "summon_full_" in said
    for said in of_all(result["parameter_groups"]):
        assert "make the groups before the model is wrapped" in said
    for said in of_all(result["remove from a part"]):
        expected = "StackedParametrizationError[weight]" if flat else "WrappedModuleError[weight]"
        assert said.startswith(expected)
    # By the lines of the messages.
    for name in ("plain", "statistics inside", "writable inside"):
        assert result[name] <= 1e-6, name
    assert all("doesn't support scalar" in said for said in of_all(result["dim=None"]))
    assert of_all(result["dim=[]"]) == ["no error"] * 2


def test_accelerate_resumes(found: Any) -> None:
    kinds = {"DDP": "DistributedDataParallel", "FSDP2": "FSDPNet"}
    for name, kind in kinds.items():
        result = found[f"accelerate, {name}"]
        assert (result["kind"], result["resumed"]) == (kind, 0.0)
    # accelerate's own: the moments of FSDP1 do not come back, of plain weights neither.
    fsdp1 = found["accelerate, FSDP1"]
    assert fsdp1["resumed"] > 1e-3 and fsdp1["resumed, plain"] > 1e-3


def test_the_trainer_says_what_fsdp_cannot(found: Any) -> None:
    result = found["Trainer, fsdp"]
    for name in ("a scalar", "a scalar, patched"):
        for said in of_all(result[name]):
            assert said.startswith("CallbackError") and "write dim=[]" in said
    for said in of_all(result["export_to"]):
        assert "wn-surgery strip" in said


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(with_deepspeed: Any, stage: int) -> None:
    result = with_deepspeed[f"DeepSpeed, ZeRO-{stage}"]
    for name in ("difference", "statistics inside", "plain"):
        assert result[name] <= 1e-6, name
    assert result["a write survives"] < 1.0  # of 100: the optimizer has a copy
    changes = ["apply", "remove", "remove by the engine"]
    if stage == 3:
        changes += ["statistics", "folded", "apply under zero.Init", "plan under zero.Init"]
    for name in (*changes, "writable", "initialize_from_batch"):
        for said in of_all(result[name]):
            assert said.startswith("WrappedModuleError[embed.weight]"), name
            assert "DeepSpeed ZeRO" in said
