"""Train a weight-normed TCN with Lightning, strip it, export it to ONNX, and compare.

A temporal convolutional network (Bai, Kolter and Koltun, "An Empirical Evaluation of Generic
Convolutional and Recurrent Networks for Sequence Modeling", arXiv:1803.01271) reads
scikit-learn's handwritten digits one pixel at a time: 64 steps, one channel. The Lightning
callback applies weight norm by a rule file. After training, the script removes weight norm, exports
the model to ONNX, and checks that onnxruntime predicts what the trained model predicted and that no
normalization is left in the graph.

    python examples/digits_tcn.py          (or: make demo)
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from lightning.pytorch.callbacks import ProgressBar
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.callbacks.lightning import WeightNorm

HERE = Path(__file__).resolve().parent
RULES = HERE / "digits_tcn_rules.yaml"
BUILD = HERE.parent / "build"
# What a weight norm becomes in an ONNX graph: v * (g / ‖v‖).
NORM_OPS = {"ReduceL2", "ReduceSumSquare", "ReduceSum", "Sqrt", "Pow", "Div", "Mul"}

Logits = npt.NDArray[np.float32]


# --- The model --------------------------------------------------------------------------------


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions and a residual connection (the paper's figure 1b)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.past = (kernel - 1) * dilation
        self.conv1 = nn.Conv1d(c_in, c_out, kernel, dilation=dilation)
        self.conv2 = nn.Conv1d(c_out, c_out, kernel, dilation=dilation)
        self.dropout = nn.Dropout(dropout)
        self.downsample = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, c_in, time)`` to ``(batch, c_out, time)``; no step sees a later one."""
        y = x
        for conv in (self.conv1, self.conv2):
            y = self.dropout(F.relu(conv(F.pad(y, (self.past, 0)))))
        return F.relu(y + self.downsample(x))


class TCN(nn.Module):
    """Blocks of doubling dilation, and a head on the last step, which sees all the others."""

    def __init__(
        self, channels: int = 40, levels: int = 3, kernel: int = 6, dropout: float = 0.05
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                TemporalBlock(1 if level == 0 else channels, channels, kernel, 2**level, dropout)
                for level in range(levels)
            )
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 1, 64)`` pixels to ``(batch, 10)`` logits."""
        logits: Tensor = self.head(self.blocks(x)[:, :, -1])
        return logits


class Classifier(L.LightningModule):
    """The training recipe: cross entropy, AdamW and a one-cycle learning rate."""

    def __init__(self, model: nn.Module, lr: float = 4e-3) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, digits = batch
        return F.cross_entropy(self.model(pixels), digits)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pixels, digits = batch
        accuracy = (self.model(pixels).argmax(1) == digits).float().mean()
        self.log("accuracy", accuracy, batch_size=len(digits))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Progress(ProgressBar):
    """A bar that redraws itself on a terminal; elsewhere a line now and then."""

    WIDTH = 30
    LINES = 6

    def __init__(self) -> None:
        super().__init__()
        self.started = time.perf_counter()
        self.losses: list[Tensor] = []

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(outputs["loss"].detach())

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch, epochs = trainer.current_epoch + 1, int(trainer.max_epochs or 1)
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        live = sys.stdout.isatty()
        if live or epoch == 1 or epoch % max(1, epochs // self.LINES) == 0 or epoch == epochs:
            bar = "#" * (self.WIDTH * epoch // epochs)
            seconds = time.perf_counter() - self.started
            line = (
                f"  epoch {epoch:3}/{epochs} [{bar:<{self.WIDTH}}] loss {loss:.4f} {seconds:5.1f} s"
            )
            print(line, end="\r" if live and epoch < epochs else "\n", flush=True)


# --- The data, and the two ways to run a model ------------------------------------------------


def digits(samples: int | None) -> tuple[TensorDataset, TensorDataset]:
    """Three quarters of the digits to train on and the rest to test on, in a fixed shuffle."""
    images, digit = load_digits(return_X_y=True)
    order = torch.randperm(len(digit), generator=torch.Generator().manual_seed(0))[:samples]
    pixels = torch.from_numpy(images).float().div(16).sub(0.5).unsqueeze(1)[order]
    target = torch.from_numpy(digit).long()[order]
    cut = len(order) * 3 // 4
    return TensorDataset(pixels[:cut], target[:cut]), TensorDataset(pixels[cut:], target[cut:])


def run_torch(model: nn.Module, pixels: Tensor) -> Logits:
    """The logits that torch computes."""
    with torch.no_grad():
        logits: Logits = model.eval()(pixels).numpy()
    return logits


def run_onnx(path: Path, pixels: Tensor) -> Logits:
    """The logits that onnxruntime computes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixels": pixels.numpy()})
    return np.asarray(logits)


def export(model: nn.Module, example: Tensor, path: Path) -> Counter[str]:
    """Write an ONNX file with a dynamic batch size; count the operators in its graph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # The exporter's own imports are full of deprecations.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (example,),
            path,
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    return Counter(node.op_type for node in onnx.load(path).graph.node)


# --- The steps --------------------------------------------------------------------------------


def quiet() -> None:
    """Silence what the frameworks print about other things."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")


def heading(text: str) -> None:
    """Print a title."""
    print(f"\n{text}\n{'-' * len(text)}")


def operators(counts: Counter[str]) -> str:
    """The operators of a graph, in one line."""
    return ", ".join(f"{op} {n}" for op, n in sorted(counts.items()))


def train(model: TCN, data: tuple[TensorDataset, TensorDataset], epochs: int) -> float:
    """Train with the callback; return the accuracy on the test set."""
    weight_norm = WeightNorm(RULES)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        deterministic=True,
        callbacks=[weight_norm, Progress()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    classifier = Classifier(model)
    trainer.fit(classifier, DataLoader(data[0], batch_size=64, shuffle=True, drop_last=True))
    (result,) = trainer.test(classifier, DataLoader(data[1], batch_size=512), verbose=False)
    return float(result["accuracy"])


def main(argv: list[str] | None = None) -> int:
    """Run every step; return 0 if the export is accurate, equal and free of weight norm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, help="use only so many of the 1797 digits")
    parser.add_argument("--threshold", type=float, default=0.95, help="least test accuracy")
    parser.add_argument("--build", type=Path, default=BUILD, help="where the ONNX files go")
    args = parser.parse_args(argv)

    started = time.perf_counter()
    quiet()
    L.seed_everything(0, workers=True, verbose=False)
    data = digits(args.samples)
    pixels = data[1].tensors[0]
    model = TCN()

    heading(f"1. The plan that {RULES.name} gives")
    print(wn.plan(model, os.path.relpath(RULES)))

    heading(f"2. Train {sum(p.numel() for p in model.parameters()):,} weights with Lightning")
    print(f"  {len(data[0])} digits to train on, {len(data[1])} to test on, 64 pixels each")
    accuracy = train(model, data, args.epochs)
    print(f"  test accuracy {accuracy:.2%}")

    heading("3. Strip the trained model")
    trained = run_torch(model, pixels)
    live_path, path = args.build / "digits_tcn_live.onnx", args.build / "digits_tcn.onnx"
    live = export(model, pixels[:2], live_path)  # before stripping, for comparison
    print(wn.remove(model))
    stripped = run_torch(model, pixels)
    same = np.array_equal(stripped, trained)
    print(f"  the logits are {'bit for bit the same' if same else 'not the same'} as before")

    heading("4. Export to ONNX")
    # The exporter's optimizer folds a weight norm by itself when the weight has at most 8,192
    # elements, as the first convolution's has.
    graph = export(model, pixels[:2], path)
    left = graph.keys() & NORM_OPS
    print(f"  not stripped, {live.total()} nodes: {operators(live)}")
    print(f"  stripped,     {graph.total()} nodes: {operators(graph)}")
    print(f"  normalization left in the stripped graph: {', '.join(sorted(left)) or 'none'}")

    heading(f"5. Run it in onnxruntime on all {len(pixels)} test digits")
    exported = run_onnx(path, pixels)
    agree = int((exported.argmax(1) == trained.argmax(1)).sum())
    difference = float(np.abs(exported - trained).max())
    print(f"  same prediction as the trained model: {agree} of {len(pixels)}")
    print(f"  largest difference of a logit:        {difference:.1e}")

    heading("In short")
    checks = {
        f"test accuracy {accuracy:.2%}, at least {args.threshold:.0%} asked": accuracy
        >= args.threshold,
        "stripping changed no logit": same,
        "onnxruntime predicts what the weight-normed model predicted": agree == len(pixels),
        "the exported graph holds no normalization": not left,
    }
    for text, good in checks.items():
        print(f"  {'ok  ' if good else 'FAIL'}  {text}")
    print(f"  {path}, {path.stat().st_size:,} bytes ({time.perf_counter() - started:.0f} s in all)")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
