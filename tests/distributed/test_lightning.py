"""Lightning's strategies on two processes over gloo: what one process gets, they get."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import fsdp2_on_the_cpu
from tests.distributed.launching import launch
from tests.torch_facts.versions import OLD

# One worker runs them all: the fixture is of a whole minute.
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("lightning strategies")]
STRATEGIES = ("auto", "ddp", "ddp_spawn", *(() if OLD else ("sharded",)))
G, V = "parametrizations.weight.original0", "parametrizations.weight.original1"


def run(strategy: str, folder: Path) -> Any:
    launch("lightning_runs.py", strategy, folder)
    return torch.load(folder / f"{strategy}.pt", weights_only=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda strategy: run(strategy, folder), STRATEGIES)
        return dict(zip(STRATEGIES, results, strict=True))


def assert_close(left: dict[str, Any], right: dict[str, Any], tolerance: float) -> None:
    assert len(left["losses"]) == len(right["losses"]) > 0
    for mine, theirs in zip(left["losses"], right["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    assert left["state"].keys() == right["state"].keys()
    for key, value in left["state"].items():
        torch.testing.assert_close(value, right["state"][key], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("usual", 1e-4),
        ("accumulated", 1e-4),
        ("bf16", 3e-2),
        ("gan", 1e-4),
        ("initialized", 1e-4),
        ("renormalized", 1e-4),
        ("resumed parametrized", 1e-4),
        ("resumed plain", 1e-4),
    ],
)
def test_ddp_gets_what_one_process_gets(found: dict[str, Any], case: str, tolerance: float) -> None:
    # That resuming is bit-exact is asserted by the script, in each process.
    assert_close(found["auto"][case], found["ddp"][case], tolerance)


@fsdp2_on_the_cpu
def test_fsdp2_gets_what_one_process_gets(found: dict[str, Any]) -> None:
    sharded = found["sharded"]
    assert_close(found["auto"]["usual"], sharded["usual"], 1e-4)
    assert sharded["usual"]["history"] == list(range(1, 9))
    assert f"model.2.{V}" in sharded["usual"]["state"]


@fsdp2_on_the_cpu
def test_layers_sharded_without_weight_norm_are_refused_with_the_line_to_add(
    found: dict[str, Any],
) -> None:
    said = found["sharded"]["Forgets"]
    assert said.startswith("WrappedModuleError")
    # The script's Sharded does just that, and its losses are right.
    assert "call wn_surgery.apply(self, rules) in configure_model() before sharding" in said


@fsdp2_on_the_cpu
def test_a_sharded_run_cannot_save_plain(found: dict[str, Any]) -> None:
    assert "save_layout='plain' needs whole tensors" in found["sharded"]["Sharded"]


@fsdp2_on_the_cpu
def test_a_scalar_g_is_refused_before_fsdp_does(found: dict[str, Any]) -> None:
    assert "ModelParallelStrategy cannot cut scalars; write dim=[]" in found["sharded"]["scalar"]


def test_the_weights_of_spawned_processes_come_back(found: dict[str, Any]) -> None:
    trained = found["ddp"]["usual"]["state"]
    for case in ("usual", "patched before"):
        back = found["ddp_spawn"][case]["state"]
        for name in ("model.0", "model.2"):
            g, v = trained[f"{name}.{G}"], trained[f"{name}.{V}"]
            weight = torch._weight_norm(v, g, 0)
            if case == "usual":
                torch.testing.assert_close(back[f"{name}.weight"], weight, rtol=0, atol=1e-4)
                assert f"{name}.{G}" not in back
            else:
                torch.testing.assert_close(back[f"{name}.{V}"], v, rtol=0, atol=1e-4)
        torch.testing.assert_close(back["model.head.bias"], trained["model.head.bias"])
    values = [found["ddp_spawn"][case]["metrics"][0]["val"] for case in ("usual", "patched before")]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_spawned_processes_export(found: dict[str, Any], tmp_path_factory: Any) -> None:
    from safetensors.torch import load_file

    folder = next(tmp_path_factory.getbasetemp().glob("runs*"))
    exported = load_file(folder / "usual.safetensors")
    back = found["ddp_spawn"]["usual"]["state"]
    assert exported.keys() == back.keys()
    for key, value in exported.items():
        assert torch.equal(value, back[key])
