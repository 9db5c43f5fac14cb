"""A complete command-line program: LightningCLI with weight norm from its YAML.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --print_config
    python examples/lightning_cli.py fit --help

The rules are checked with the rest of the configuration, before anything is built.
"""

from __future__ import annotations

import lightning.pytorch as lp
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import wn_surgery as wn


class Digits(lp.LightningDataModule):
    """Handwritten digits of 8x8 pixels, which scikit-learn ships.

    Args:
        batch_size: images in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
        data = TensorDataset(x, torch.from_numpy(labels))
        self.train, self.val = random_split(
            data, [1437, 360], generator=torch.Generator().manual_seed(0)
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=256)


class Classifier(lp.LightningModule):
    """Two convolutions and a linear head.

    Args:
        channels: of the convolutions.
        lr: learning rate.
        weight_decay: of v and of plain weights; not of g, and not of biases.
    """

    def __init__(self, channels: int = 16, lr: float = 3e-3, weight_decay: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(16 * channels, 10)
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decay = self.hparams["weight_decay"]
        return torch.optim.AdamW(
            wn.parameter_groups(self, weight_decay=decay), lr=self.hparams["lr"]
        )


def main(args: list[str] | None = None) -> LightningCLI:
    """Run the program with these arguments, or with those of the command line."""
    return LightningCLI(
        Classifier,
        Digits,
        args=args,
        seed_everything_default=0,
        # The configuration that is saved next to the checkpoints holds the rules too.
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()
