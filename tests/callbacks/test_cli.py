"""The callback in LightningCLI's YAML; the program is the one in examples/."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.callbacks.lightning_tools import QUIET, normed
from wn_surgery.callbacks.lightning import WeightNorm

pytestmark = [
    pytest.mark.processes,
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*`rank_zero_only`|.*LightningCLI's args parameter"),
    # How Lightning 2.6 calls jsonargparse.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    # Lightning's summary of the model with example inputs.
    pytest.mark.filterwarnings("ignore:The total number of parameters detected"),
]

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "lightning_cli.py"
CONFIG = PROGRAM.with_suffix(".yaml")


def program() -> Any:
    spec = importlib.util.spec_from_file_location("lightning_cli", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lightning_cli"] = module  # jsonargparse looks classes up by their module
    spec.loader.exec_module(module)
    return module


def config(tmp_path: Path, **init_args: Any) -> Path:
    """The example's configuration in a folder of the test's own, with other arguments."""
    content = yaml.safe_load(CONFIG.read_text())
    settings = content["trainer"]
    settings |= {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
    settings["default_root_dir"] = str(tmp_path)
    settings["logger"]["init_args"]["save_dir"] = str(tmp_path)
    own = settings["callbacks"][0]["init_args"]
    own["export_to"] = str(tmp_path / "digits.onnx")
    own |= init_args
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_example_trains_saves_its_rules_and_exports(tmp_path: Path) -> None:
    cli = program().main(["fit", "--config", str(config(tmp_path))])
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, WeightNorm)]
    assert [rule.action for rule in callback.rules] == ["apply", "skip"]
    assert normed(cli.model) == ["body.0.weight", "body.2.weight"]
    assert cli.trainer.callback_metrics["val_accuracy"] > 0.5
    assert (tmp_path / "digits.onnx").stat().st_size > 10_000
    saved = Path(cli.trainer.log_dir) / "config.yaml"
    rules = yaml.safe_load(saved.read_text())["trainer"]["callbacks"][0]["init_args"]["rules"]
    assert rules[0]["types"] == ["Conv2d", "Linear"] and rules[0]["eps"] == 1e-12
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert "body.0.weight" in state  # save_layout: plain


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def test_print_config_round_trips(tmp_path: Path) -> None:
    first = run("fit", "--config", str(config(tmp_path)), "--print_config")
    assert first.returncode == 0, first.stderr
    (tmp_path / "printed.yaml").write_text(first.stdout)
    again = run("fit", "--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert again.stdout == first.stdout
    rules = yaml.safe_load(first.stdout)["trainer"]["callbacks"][0]["init_args"]["rules"]
    assert [(rule["action"], rule["names"]) for rule in rules] == [
        ("apply", None),
        ("skip", "head"),
    ]


@pytest.mark.parametrize(
    ("init_args", "said"),
    [
        ({"rules": [{"types": "Conv2d", "nmes": "body"}]}, "nmes"),
        ({"rules": [{"types": "Conv2d", "dim": -1}]}, "dim=-1"),
        ({"rules": "hifgan"}, "hifigan"),
        ({"save_layout": "flat"}, "flat"),
        ({"fold_on_evl": True}, "fold_on_evl"),
    ],
    ids=["unknown field", "wrong value", "unknown preset", "unknown layout", "unknown argument"],
)
def test_wrong_configurations_stop_before_anything_is_built(
    tmp_path: Path, init_args: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, **init_args)
    with pytest.raises((SystemExit, ValueError)) as caught:
        program().main(["fit", "--config", str(path)])
    assert said in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize("rules", ["convolutions", "file", {"types": "Conv2d"}])
def test_rules_are_a_preset_a_file_or_one_rule(tmp_path: Path, rules: Any) -> None:
    if rules == "file":
        rules = str(tmp_path / "rules.yaml")
        Path(rules).write_text("rules:\n  - {types: Conv2d}\n")
    path = config(tmp_path, rules=rules, export_to=None)
    cli = program().main(["fit", "--config", str(path), "--trainer.limit_train_batches=2"])
    assert normed(cli.model) == ["body.0.weight", "body.2.weight"]
