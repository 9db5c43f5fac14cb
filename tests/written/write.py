"""Write what the code of today writes: ``python tests/written/write.py 0.1.0`` makes that folder.

``test_written.py`` loads every folder that was ever written. Do not write an old folder again.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import wn_surgery as wn
from wn_surgery.callbacks.lightning import WeightNorm
from wn_surgery.huggingface import WeightNormConfig, patch_model


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)
    )


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.arange(32.0).reshape(4, 2, 4) / 32), batch_size=2)


def trainer(folder: Path, **options: object) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = WeightNorm(
        [{"names": "net.*"}], save_layout=options.pop("save_layout", "parametrized")
    )
    return L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        enable_checkpointing=False,
        **quiet,
        **options,
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def main(folder: Path) -> None:
    folder.mkdir()
    x = torch.linspace(-1, 1, 8).reshape(1, 2, 4)
    model = plain()
    report = wn.apply(model, [{"names": "*", "eps": 1e-12}, {"names": "4", "g_init": 2.0}])
    fused = copy.deepcopy(model)
    wn.fuse(fused)
    legacy = copy.deepcopy(plain())
    wn.apply(legacy, "convolutions")
    wn.migrate(legacy, to="legacy")
    outputs = {}
    for name, module in {"model": model, "fused": fused, "legacy": legacy}.items():
        outputs[name] = module(x).detach()
        torch.save(module, folder / f"{name}.pt")
    with (folder / "data.pickle").open("wb") as file:
        pickle.dump((report, wn.Rule(names="a.*"), wn.statistics(model)), file)
    save_file(model.state_dict(), folder / "model.safetensors")
    for layout in ("parametrized", "plain", "legacy"):
        run = trainer(folder, max_epochs=1, save_layout=layout)
        torch.manual_seed(0)
        net = Net()
        run.fit(net, data())
        run.save_checkpoint(folder / f"lightning-{layout}.pt")
        outputs[f"lightning-{layout}"] = net.net(x).detach()
    patched = llama().eval()
    patch_model(patched, WeightNormConfig(rules=[{"names": "model.layers.*.self_attn.*_proj"}]))
    patched.save_pretrained(folder / "llama")
    outputs["llama"] = patched(torch.arange(5)[None]).logits.detach()
    torch.save({"x": x, **outputs}, folder / "outputs.pt")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(Path(__file__).parent / sys.argv[1])
