"""Files that earlier versions wrote: module paths in pickles, layouts, records, configs.

``0.1.0`` is the version of that name; ``before-rooms`` its last state before the modules moved into
folders. ``write.py`` wrote both.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import wn_surgery as wn
import wn_surgery.huggingface

from .write import Net, data, plain, trainer

FOLDERS = [
    path for path in sorted(Path(__file__).parent.iterdir()) if (path / "data.pickle").is_file()
]
folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def outputs(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "outputs.pt")


def test_there_are_some() -> None:
    assert {path.name for path in FOLDERS} >= {"0.1.0", "before-rooms"}


@folders
@pytest.mark.parametrize("name", ["model", "fused", "legacy"])
def test_a_pickled_model_computes_the_same_and_is_stripped(folder: Path, name: str) -> None:
    model = torch.load(folder / f"{name}.pt", weights_only=False)
    x, expected = outputs(folder)["x"], outputs(folder)[name]
    assert torch.equal(model(x), expected)
    assert wn.remove(model).changed
    assert [type(layer) for layer in model] == [type(layer) for layer in plain()]
    assert torch.equal(model(x), expected)


@folders
def test_a_pickle_loads_in_a_process_that_has_not_imported_the_library(folder: Path) -> None:
    script = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False); "
        "import wn_surgery as wn; assert callable(wn.plan) and callable(wn.statistics); "
        "assert len(wn.remove(model).changed) == 3"
    )
    subprocess.run([sys.executable, "-c", script, folder / "fused.pt"], check=True, timeout=900)


@folders
def test_pickled_results_are_what_they_were(folder: Path) -> None:
    with (folder / "data.pickle").open("rb") as file:
        report, rule, statistics = pickle.load(file)
    assert report.changed == ("0.weight", "2.weight", "4.weight")
    assert rule == wn.Rule(names="a.*")
    assert [site.name for site in statistics.sites] == list(report.changed)
    assert callable(wn.plan)
    assert callable(wn.statistics)


@folders
def test_a_state_dict_loads(folder: Path) -> None:
    model = plain()
    wn.apply(model, [{"names": "*", "eps": 1e-12}, {"names": "4", "g_init": 2.0}])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(model(outputs(folder)["x"]), outputs(folder)["model"])


@folders
@pytest.mark.parametrize("layout", ["parametrized", "plain", "legacy"])
def test_a_lightning_checkpoint_resumes(folder: Path, layout: str, tmp_path: Path) -> None:
    module = Net()
    run = trainer(tmp_path, max_epochs=2, save_layout=layout)
    run.fit(module, data(), ckpt_path=folder / f"lightning-{layout}.pt", weights_only=True)
    assert run.current_epoch == 2
    again = Net()
    state = torch.load(folder / f"lightning-{layout}.pt", weights_only=True)["state_dict"]
    again.load_state_dict(wn.checkpoints.convert(state, to="plain"))
    torch.testing.assert_close(
        again.net(outputs(folder)["x"]), outputs(folder)[f"lightning-{layout}"]
    )


@folders
def test_a_patched_model_of_transformers_reloads(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    assert torch.equal(model(torch.arange(5)[None]).logits, outputs(folder)["llama"])
