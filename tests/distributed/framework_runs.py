"""Cut models of transformers and of Lightning, on two processes: ``framework_runs.py FILE FOLDER``.

Each process also computes with the whole model by itself.
"""

from __future__ import annotations

import datetime as dt
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset

import wn_surgery as wn
from tests.distributed.launching import leave
from wn_surgery.callbacks.lightning import WeightNorm

warnings.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"names": "**.experts", "params": ["gate_up_proj", "down_proj"], "dim": [0, 1]}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(one: nn.Module, other: nn.Module) -> float:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    return max(float((whole(left[key]) - whole(right[key])).abs().max()) for key in left)


def from_transformers(name: str, folder: Path, rules: list[dict[str, Any]]) -> Any:
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**SIZES)
    path = folder / name
    getattr(hf, f"{name}ForCausalLM")(config).save_pretrained(path)
    dist.barrier()  # rank 0 writes
    one: Any = hf.AutoModelForCausalLM.from_pretrained(path)
    model: Any = hf.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(1))
    report = wn.apply(model, rules)
    wn.apply(one, rules)
    cut = [site for site in wn.sites(model) if site.normed and isinstance(site.tensor, DTensor)]
    found: dict[str, Any] = {"changed": len(report.changed), "cut": len(cut)}

    def compare(what: str) -> None:
        with torch.no_grad():
            logits = model(ids).logits, one(ids).logits
        found[what] = float((logits[0] - logits[1]).abs().max())

    compare("logits")
    for each in (model, one):
        optimizer = torch.optim.AdamW(
            wn.parameter_groups(each, weight_decay=0.1), lr=1e-3, foreach=False
        )
        for _ in range(5):
            optimizer.zero_grad()
            each(ids, labels=ids).loss.backward()
            optimizer.step()
    found["trained"] = difference(model, one)
    compare("logits after")
    with torch.no_grad(), wn.folded(model):
        compare("folded")
        tokens = [each.generate(ids, max_new_tokens=3, do_sample=False) for each in (model, one)]
    found["generated alike"] = torch.equal(*tokens)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    for each in (model, one):
        wn.remove(each)
    left = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    found["hooks"] = hooks, left
    found["removed"] = difference(model, one)
    compare("logits plain")
    return found


class Module(lp.LightningModule):
    """Layers that are cut in configure_model, and normed there."""

    cut = applies = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 1)

    def configure_model(self) -> None:
        if self.cut:
            mesh: DeviceMesh = self.device_mesh["tensor_parallel"]  # type: ignore[index]
            plan: dict[str, Any] = {
                "up": ColwiseParallel(input_layouts=Replicate()),
                "down": RowwiseParallel(),
            }
            parallelize_module(self, mesh, plan)
        if self.applies:
            wn.apply(self, "linears")

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        result: Tensor = (self.down(torch.tanh(self.up(batch[0]))) - batch[1]).square().mean()
        return result

    validation_step = training_step

    def train_dataloader(self) -> Any:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        groups = wn.parameter_groups(self, weight_decay=0.1)
        return torch.optim.AdamW(groups, lr=1e-2, foreach=False)


class Whole(Module):
    cut = False


class Leaves(Module):
    """Leaves weight norm to the callback, which has to wait for the cut."""

    applies = False


def lightning() -> Any:
    one = Whole()
    one.configure_model()
    optimizer = one.configure_optimizers()
    for _ in range(5):
        for batch in one.train_dataloader():
            optimizer.zero_grad()
            one.training_step(batch, 0).backward()
            optimizer.step()
    return [fitted(module, one) for module in (Module(), Leaves())]


def fitted(module: Module, one: Module) -> Any:
    callback = WeightNorm("linears", log_every_n_steps=1)
    trainer = lp.Trainer(
        strategy=lp.strategies.ModelParallelStrategy(1, 2),
        devices=2,
        accelerator="cpu",
        callbacks=[callback],
        max_epochs=5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    return {
        "cut": isinstance(module.up.parametrizations.weight.original1, DTensor),  # type: ignore[union-attr]
        "trained": difference(module, one),
        "steps": callback.history.steps,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=120))
    try:
        folder = Path(sys.argv[2])
        linears = {"types": "Linear"}
        results = {
            "llama": from_transformers("Llama", folder, [linears, {"types": "Embedding"}]),
            "mixtral": from_transformers("Mixtral", folder, [linears, EXPERTS]),
            "lightning": lightning(),
        }
        if dist.get_rank() == 0:
            torch.save(results, sys.argv[1])
    finally:
        dist.destroy_process_group()
    leave()
