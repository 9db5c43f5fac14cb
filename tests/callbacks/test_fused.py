"""The Lightning callback's ``fused`` option in real Trainers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import wn_surgery as wn
from wn_surgery.callbacks.lightning import Fused, WeightNorm
from wn_surgery.callbacks.lightning.fusing import fuse
from wn_surgery.fused import is_fused

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

RULES = [{"types": ["Linear", "Conv1d"]}]


class Base(lp.LightningModule):
    """Says at each step which modules are fused roots."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.roots: set[str] = set()

    def note(self) -> None:
        self.roots |= {name for name, module in self.named_modules() if is_fused(module)}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.note()
        return F.mse_loss(self.predict(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.note()
        self.predict(batch[0])

    test_step = validation_step

    def predict(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Nested(Base):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
        self.stages = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Tanh())])
        self.head = nn.Sequential(nn.Linear(8, 1))

    def predict(self, x: Tensor) -> Tensor:
        h = self.front(x)
        for stage in self.stages:
            h = stage(h)
        out: Tensor = self.head(h)
        return out


class Flat(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out

    def predict(self, x: Tensor) -> Tensor:
        out: Tensor = self(x)
        return out


def loader() -> DataLoader[Any]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def trainer(callback: WeightNorm, tmp_path: Path, **options: Any) -> lp.Trainer:
    return lp.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


@pytest.mark.parametrize(("make", "roots"), [(Nested, {"front", "stages.0", "head"}), (Flat, {""})])
@pytest.mark.parametrize("fused", ["auto", "cpu"])
def test_training_is_the_same_to_the_bit(
    make: type[Base], roots: set[str], fused: Fused, tmp_path: Path
) -> None:
    runs = {}
    for mode in (fused, "off"):
        module = make()
        trainer(WeightNorm(RULES, fused=mode), tmp_path).fit(module, loader(), loader())
        assert module.roots == (roots if mode == fused else set())
        runs[mode] = module.state_dict()
    assert runs[fused].keys() == runs["off"].keys()
    for key, value in runs[fused].items():
        assert torch.equal(value, runs["off"][key])


def test_nothing_is_left_behind_and_every_run_is_fused(tmp_path: Path) -> None:
    module, callback = Nested(), WeightNorm(RULES, fused="auto", fold_on_eval=False)
    made = trainer(callback, tmp_path)
    made.fit(module, loader(), loader())
    for run in (made.validate, made.test):
        assert not any(is_fused(m) for m in module.modules())
        assert not any("_fused_weight" in vars(m) for m in module.modules())
        module.roots.clear()
        run(module, loader(), verbose=False)
        assert module.roots == {"front", "stages.0", "head"}


def test_a_path_that_cannot_be_taken_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(wn.FusionError, match="cannot take the path 'triton'"):
        trainer(WeightNorm(RULES, fused="triton"), tmp_path).fit(Nested(), loader())
    with pytest.raises(ValueError, match="expected 'auto', 'off', 'triton', 'cpu'"):
        WeightNorm(RULES, fused="yes")  # type: ignore[arg-type]


class Accumulating(Flat):
    """Says which tensors its first layer had as weight, batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.weights.append(self.first.weight)
        return loss


def test_once_per_step(tmp_path: Path) -> None:
    found = {}
    for once in (True, False):
        module = Accumulating()
        made = trainer(
            WeightNorm(RULES, once_per_step=once),
            tmp_path,
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
        )
        made.fit(module, loader(), loader())
        same = [a is b for a, b in pairwise(module.weights)]
        assert same == (([True, False] * 4)[:-1] if once else [False] * 7)
        assert not any(is_fused(m) for m in module.modules())
        found[once] = module.state_dict()
    for key, value in found[True].items():
        assert torch.equal(value, found[False][key])
    with pytest.raises(ValueError, match="leave out fused='off'"):
        WeightNorm(RULES, once_per_step=True, fused="off")


def test_auto_fuses_on_the_cpu_alone() -> None:
    for device, fused in (("cpu", True), ("meta", False)):
        module = Nested()
        wn.apply(module, RULES)
        fuse(module.to(device), "auto")
        assert any(is_fused(each) for each in module.modules()) is fused
