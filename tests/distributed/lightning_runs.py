"""Trains small modules under one of Lightning's strategies: ``lightning_runs.py STRATEGY FOLDER``.

Every strategy sees the same batches, whole in one process or in halves in two, and writes what
it got to ``FOLDER/STRATEGY.pt``: the losses of each case and the weights at its end.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import wn_surgery as wn
from tests.distributed.launching import leave
from wn_surgery.callbacks.lightning import WeightNorm

warnings.filterwarnings("ignore")

RULES = [{"types": "Linear"}, {"action": "skip", "names": "**.head"}]


class Module(lp.LightningModule):
    """Keeps each loss, as the mean over the processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.losses: list[float] = []
        self.model = self.layers()

    @staticmethod
    def layers() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
        net.add_module("head", nn.Linear(8, 1))
        return net

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        data = TensorDataset(x, x.sum(1, keepdim=True))
        count, rank = self.trainer.world_size, self.trainer.global_rank
        sampler: Any = DistributedSampler(data, count, rank, shuffle=False)
        return DataLoader(data, batch_size=8 // count, sampler=sampler)

    val_dataloader = train_dataloader

    def keep(self, loss: Tensor) -> None:
        self.losses.append(
            float(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean"))
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = F.mse_loss(self.model(batch[0]), batch[1])
        self.keep(loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", F.mse_loss(self.model(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(wn.parameter_groups(self, weight_decay=0.1), lr=1e-2)


class Gan(Module):
    """A generator and a discriminator with rules of their own, optimized by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0]
        first, second = self.optimizers()  # type: ignore[misc]
        loss = F.softplus(self.critic(self.model(real).detach())).mean()
        loss = loss + F.softplus(-self.critic(real)).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.keep(loss)
        first.zero_grad()
        fooled = F.softplus(-self.critic(self.model(real))).mean()
        self.manual_backward(fooled)
        first.step()
        self.keep(fooled)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(wn.parameter_groups(part, weight_decay=0.1), lr=1e-2)
            for part in (self.model, self.critic)
        ]


class Sharded(Module):
    """As the callback's error says: the rules in configure_model, before fully_shard."""

    applies = True

    def __init__(self) -> None:
        super().__init__()
        del self.model

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if hasattr(self, "model"):
            return
        torch.manual_seed(0)
        self.model = self.layers()
        if self.applies:
            wn.apply(self, RULES)
        mesh = self.device_mesh["data_parallel"]
        for module in (self.model[0], self.model[2], self.model):  # type: ignore[index]
            fully_shard(module, mesh=mesh)


class Forgets(Sharded):
    applies = False


def gan_rules() -> list[dict[str, Any]]:
    return [
        {"types": "Linear", "names": "model.**", "dim": None},
        {"types": "Linear", "names": "critic.**", "eps": 1e-6},
    ]


CASES: dict[str, tuple[Callable[[], Module], list[dict[str, Any]], dict[str, Any]]] = {
    "usual": (Module, RULES, {}),
    "accumulated": (Module, RULES, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "bf16": (Module, RULES, {"precision": "bf16-mixed"}),
    "gan": (Gan, gan_rules(), {}),
    "initialized": (Module, RULES, {"init_from_batch": True}),
    "renormalized": (Module, [{**RULES[0], "renormalize": "rms"}, RULES[1]], {}),
}


def trainer(strategy: str, processes: int, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    return lp.Trainer(
        strategy=strategy if strategy != "sharded" else lp.strategies.ModelParallelStrategy(2, 1),
        devices=processes,
        callbacks=list(callbacks),
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, lp.callbacks.ModelCheckpoint) for c in callbacks),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )


def run(strategy: str, folder: Path) -> dict[str, Any]:
    processes = 1 if strategy == "auto" else 2
    results: dict[str, Any] = {}
    for name, (kind, rules, options) in CASES.items():
        module, more = kind(), dict(options)
        callback = WeightNorm(rules, init_from_batch=more.pop("init_from_batch", False))
        # Each of a GAN's losses leaves parameters unused, with and without weight norm.
        unused = strategy == "ddp" and kind is Gan
        how = "ddp_find_unused_parameters_true" if unused else strategy
        trainer(how, processes, callback, **more).fit(module)
        results[name] = {"losses": module.losses, "state": module.state_dict()}
        if processes > 1 and name == "renormalized":
            for parameter in module.parameters():  # the same to the bit, without a broadcast
                there = [torch.empty_like(parameter) for _ in range(processes)]
                torch.distributed.all_gather(there, parameter.detach())
                assert all(torch.equal(other, parameter) for other in there)
    for layout in ("parametrized", "plain"):
        results[f"resumed {layout}"] = resumed(strategy, processes, folder / strategy / layout)
    return results


def resumed(strategy: str, processes: int, folder: Path) -> dict[str, Any]:
    """Two epochs and two more after resuming."""
    module = Module()
    for epochs, path in ((2, None), (4, folder / "epoch=1.ckpt")):
        module = Module()
        saver = lp.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        callback = WeightNorm(RULES, save_layout=folder.name)  # type: ignore[arg-type]
        made = trainer(strategy, processes, callback, saver, epochs=epochs)
        made.fit(module, ckpt_path=path)
    whole = Module()
    trainer(strategy, processes, WeightNorm(RULES), epochs=4).fit(whole)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key
    return {"losses": module.losses, "state": module.state_dict()}


def run_sharded() -> dict[str, Any]:
    from torch.distributed.tensor import DTensor

    results: dict[str, Any] = {}
    module = Sharded()
    callback = WeightNorm(RULES, log_every_n_steps=1)
    made = trainer("sharded", 2, callback)
    made.fit(module)
    assert isinstance(module.model[0].parametrizations.weight.original1, DTensor)  # type: ignore[index,union-attr]
    state = {key: value.full_tensor() for key, value in module.state_dict().items()}
    results["usual"] = {"losses": module.losses, "state": state, "history": callback.history.steps}
    one_norm = [{"types": "Linear", "dim": None}]
    for name, kind, callback in (
        ("Forgets", Forgets, WeightNorm(RULES)),
        ("Sharded", Sharded, WeightNorm(RULES, save_layout="plain")),
        ("scalar", Sharded, WeightNorm(one_norm)),
    ):
        try:
            trainer("sharded", 2, callback).fit(kind())
        except wn.WeightNormError as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def run_spawned(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, before in (("usual", False), ("patched before", True)):
        module = Module()
        if before:
            wn.apply(module, RULES)
        path = folder / f"{name}.safetensors"
        trainer("ddp_spawn", 2, WeightNorm(RULES, export_to=path)).fit(module)
        results[name] = {"losses": [], "state": module.state_dict()}
        results[name]["metrics"] = trainer("auto", 1, WeightNorm(RULES)).validate(
            module, verbose=False
        )
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    which, out = sys.argv[1], Path(sys.argv[2])
    if which == "ddp_spawn":
        found = run_spawned(out)
    else:
        found = run_sharded() if which == "sharded" else run(which, out)
    if lp.utilities.rank_zero_only.rank == 0:
        torch.save(found, out / f"{which}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    leave()
