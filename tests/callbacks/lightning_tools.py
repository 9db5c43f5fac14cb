"""Modules, data and Trainers for the tests of the Lightning callback."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import wn_surgery as wn

# Lightning's advice, which is not about what is tested.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

RULES = [{"types": "Linear"}, {"action": "skip", "names": "**.head"}]
G, V = "parametrizations.weight.original0", "parametrizations.weight.original1"


def loader(count: int = 16) -> DataLoader[Any]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    # With a generator of its own it takes no numbers from torch's.
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, batch_size=4, generator=torch.Generator())


class Recipe:
    """What a LightningModule of either package needs besides its layers."""

    model: nn.Module

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(self.model(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))  # type: ignore[attr-defined]

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)  # type: ignore[attr-defined]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
    net.add_module("head", nn.Linear(8, 1))
    return net


class Module(Recipe, lp.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = layers()


class OldModule(Recipe, pytorch_lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = layers()


class Late(Recipe, lp.LightningModule):
    """Builds its layers in configure_model, as large models do."""

    calls = 0

    def configure_model(self) -> None:
        self.calls += 1
        if not hasattr(self, "model"):
            self.model = layers()


class LateInSetup(Recipe, lp.LightningModule):
    def setup(self, stage: str) -> None:
        if not hasattr(self, "model"):
            self.model = layers()


class Halves(Recipe, lp.LightningModule):
    """Has layers from __init__ that match, and builds others that match too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(layers())

    def configure_model(self) -> None:
        if len(self.model) == 1:  # type: ignore[arg-type]
            self.model.append(nn.Linear(1, 1))  # type: ignore[operator]


def trainer(*callbacks: Any, package: Any = lp, epochs: int = 2, **options: Any) -> Any:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return package.Trainer(callbacks=list(callbacks), **{**settings, **options})


def normed(module: nn.Module) -> list[str]:
    return [site.name for site in wn.sites(module) if site.normed]


def assert_same_state(left: Any, right: Any) -> None:
    """Two state dicts are equal to the bit, keys and all."""
    assert list(left) == list(right)
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def assert_same_optimizer(left: Any, right: Any) -> None:
    """Two optimizers' states are equal to the bit."""
    left, right = left.state_dict(), right.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for number, state in left["state"].items():
        for key, value in state.items():
            assert torch.equal(value, right["state"][number][key]), (number, key)
