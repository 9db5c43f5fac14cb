"""What weight norm costs where people train and generate: ``python -m benchmarks.frameworks``.

Steps of a Lightning Trainer and of transformers' Trainer, as users write them, and ``generate``.
Each row is a model, and a Trainer, of its own; they run in alternated rounds. The clock runs from
the start of the first step to the end of the last, so that making loaders and optimizers is not in
it. What was predicted is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as lp
import lightning.pytorch.callbacks as lc
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import wn_surgery as wn
from benchmarks.alone import timed
from benchmarks.measure import compare, keep_memory
from benchmarks.models import TCN
from benchmarks.peers import PEERS, Workload
from benchmarks.report import as_data, environment, markdown, verdicts_as_data, write
from benchmarks.targets import Verdict
from wn_surgery.callbacks.lightning import WeightNorm
from wn_surgery.callbacks.transformers import WeightNormCallback
from wn_surgery.fused.native.building import why_not
from wn_surgery.huggingface import patch_model

__all__ = ["CASES", "main"]

RESULTS = Path(__file__).parent / "results" / "frameworks.json"
LINEARS, CONVOLUTIONS = {"types": "Linear"}, {"types": "Conv1d"}
ENCODER = {"types": "Linear", "names": "bert.encoder.**"}


class Row:
    """Something that is done again and again, and says how long it took."""

    result: Tensor
    """Of the last time: a loss, or tokens."""

    def __call__(self) -> None:
        self.spent(1)

    def spent(self, repeats: int) -> float:
        """Seconds of process CPU time."""
        raise NotImplementedError(type(self).__name__)


class _Module(lp.LightningModule):
    """A regression of a model's output, with the AdamW that most people write."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class _EpochClock(lc.Callback):
    """Around the batches of an epoch."""

    spent = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._start = time.process_time()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.spent = time.process_time() - self._start


class _Fit(Row):
    """An epoch of a Lightning Trainer, with gradient clipping."""

    def __init__(self, model: nn.Module, callbacks: list[Any], data: DataLoader[Any]) -> None:
        self._clock, self._data = _EpochClock(), data
        self._module = _Module(model)
        self._trainer = lp.Trainer(
            accelerator="cpu", devices=1, logger=False, max_epochs=0, gradient_clip_val=1.0,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            # Last, so that what the others do when an epoch begins is not in it, and what they do
            # for each batch is.
            callbacks=[*callbacks, self._clock],
        )  # fmt: skip

    def spent(self, repeats: int) -> float:
        seconds = 0.0
        for _ in range(repeats):
            self._trainer.fit_loop.max_epochs = (self._trainer.fit_loop.max_epochs or 0) + 1
            self._module.losses.clear()
            self._trainer.fit(self._module, self._data)
            self.result = torch.stack(self._module.losses)
            seconds += self._clock.spent
        return seconds


class _StepClock(transformers.TrainerCallback):
    """Around the steps of a training."""

    spent = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.spent = time.process_time() - self._start


class _Rows(Dataset[dict[str, Any]]):
    """Sentences of one length, of random tokens, in two classes."""

    def __init__(self, count: int, length: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(tokens, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index], "labels": index % 2}


class _Train(Row):
    """A training with transformers' Trainer, which clips by itself."""

    def __init__(self, model: Any, callbacks: list[Any], data: Dataset[Any], steps: int) -> None:
        self._clock = _StepClock()
        self._folder = tempfile.TemporaryDirectory()
        arguments = transformers.TrainingArguments(
            output_dir=self._folder.name, max_steps=steps, per_device_train_batch_size=8,
            save_strategy="no", logging_strategy="no", report_to=[], use_cpu=True, seed=0,
            disable_tqdm=True, log_level="error", dataloader_pin_memory=False, learning_rate=1e-5,
        )  # fmt: skip
        self._trainer = transformers.Trainer(
            model, arguments, train_dataset=data, callbacks=[*callbacks, self._clock]
        )
        self._trainer.remove_callback(transformers.PrinterCallback)

    def spent(self, repeats: int) -> float:
        seconds = 0.0
        for _ in range(repeats):
            self.result = torch.tensor(self._trainer.train().training_loss)
            seconds += self._clock.spent
        return seconds


class _Generate(Row):
    """So many tokens, of the greatest likelihood."""

    def __init__(self, model: Any, tokens: int) -> None:
        self._model, self._tokens = model.eval(), tokens

    def spent(self, repeats: int) -> float:
        ids = torch.tensor([[1, 2, 3]])
        start = time.process_time()
        for _ in range(repeats):
            self.result = self._model.generate(
                ids, max_new_tokens=self._tokens, min_new_tokens=self._tokens, do_sample=False
            )
        return time.process_time() - start


def _theirs(name: str, model: nn.Module, rules: Any) -> nn.Module:
    """A copy of the model with one of torch's kinds of weight norm, or none."""
    model = copy.deepcopy(model)
    (peer,) = (peer for peer in PEERS if peer.name == name)
    peer.prepare(Workload(model, rules, lambda m: m), model)
    return model


def _fits(model: nn.Module, rules: Any, data: DataLoader[Any]) -> dict[str, Row]:
    ours: dict[str, dict[str, Any]] = {
        "ours": {"fused": "off"},
        "ours fused": {},
        "ours once per step": {"once_per_step": True},
    }
    if not why_not():
        ours["ours native"] = {"fused": "native"}
    theirs = ("plain", "plain (A/A)", "legacy", "torch")
    return {
        **{name: _Fit(_theirs(name, model, rules), [], data) for name in theirs},
        **{
            name: _Fit(copy.deepcopy(model), [WeightNorm(rules, **options)], data)
            for name, options in ours.items()
        },
    }


def _tcn(steps: int) -> dict[str, Row]:
    x = torch.randn(8 * steps, 1, 64)
    data = TensorDataset(x, torch.randn(len(x), 32, 64))
    return _fits(TCN(32, levels=6), CONVOLUTIONS, DataLoader(data, batch_size=8))


def _mlp(width: int, depth: int) -> Callable[[int], dict[str, Row]]:
    def rows(steps: int) -> dict[str, Row]:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        data = TensorDataset(*torch.randn(2, 32 * steps, width))
        return _fits(nn.Sequential(*layers), LINEARS, DataLoader(data, batch_size=32))

    return rows


def _minilm(steps: int) -> dict[str, Row]:
    """The sizes of all-MiniLM-L6-v2, every Linear of the encoder."""
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    data = _Rows(8 * steps, 32, config.vocab_size)

    def fused(**options: Any) -> Any:
        mine = copy.deepcopy(model)
        patch_model(mine, ENCODER)
        wn.fuse(mine, **options)
        return mine

    def row(model: Any, *callbacks: Any) -> Row:
        return _Train(model, [*callbacks], data, steps)

    theirs = ("plain", "plain (A/A)", "legacy", "torch")
    native = {} if why_not() else {"ours native": row(fused(mode="native"))}
    return {
        **{name: row(_theirs(name, model, ENCODER)) for name in theirs},
        "ours": row(copy.deepcopy(model), WeightNormCallback(ENCODER)),
        "ours fused": row(fused()),
        "ours once per step": row(
            copy.deepcopy(model), WeightNormCallback(ENCODER, once_per_step=True)
        ),
        **native,
    }


def _generate(tokens: int) -> dict[str, Row]:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    ours = copy.deepcopy(model)
    patch_model(ours, LINEARS)
    theirs = ("plain", "plain (A/A)", "legacy", "torch")
    models = {**{name: _theirs(name, model, LINEARS) for name in theirs}, "ours": ours}
    return {name: _Generate(each, tokens) for name, each in models.items()}


class Case(NamedTuple):
    """A table: its rows, given the number of steps, and what is asked of one of them."""

    about: str
    rows: Callable[[int], dict[str, Row]]
    judged: tuple[str, ...]  # the first of these rows that is there
    ratio: float
    speed: float
    steps: int = 20  # of a training, in each round; of generate, tokens


TRAINED = ("ours native", "ours fused")
CASES = {
    "lightning-tcn": Case(
        "Lightning, a TCN of 13 convolutions of 32 channels", _tcn, TRAINED, 1.07, 1.05
    ),
    "lightning-mlp-8x64": Case(
        "Lightning, an MLP of 8 layers of 64", _mlp(64, 8), TRAINED, 1.25, 1.05
    ),
    "lightning-mlp-4x512": Case(
        "Lightning, an MLP of 4 layers of 512", _mlp(512, 4), TRAINED, 1.35, 1.05
    ),
    "trainer-minilm": Case(
        "transformers' Trainer, MiniLM, 8 sentences of 32 tokens",
        _minilm, TRAINED, 1.10, 1.05, 4,
    ),
    "generate-16": Case(
        "generate, a Llama of 4 layers of 256, 16 tokens", _generate, ("ours",), 1.02, 1.2, 16
    ),
    "generate-64": Case(
        "generate, a Llama of 4 layers of 256, 64 tokens", _generate, ("ours",), 1.02, 1.2, 64
    ),
}  # fmt: skip


def agree(rows: Mapping[str, Row]) -> None:
    """Raise where rows that have to train alike, or to say the same, do not."""
    for one, other in (("plain", "plain (A/A)"), *(("torch", name) for name in rows)):
        if one == "torch" and not other.startswith("ours"):
            continue
        if not torch.allclose(rows[other].result, rows[one].result, rtol=1e-3, atol=1e-5):
            raise RuntimeError(
                f"{one} and {other} do not give the same: {rows[one].result} and "
                f"{rows[other].result}"
            )


def main(argv: list[str] | None = None) -> int:
    """Print a table for each case; 0 if all targets are met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frameworks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, help="of a training, or tokens, in each round")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tables: list[dict[str, Any]] = []
    good = True
    for name in args.only:
        case = CASES[name]
        torch.manual_seed(0)
        steps = args.steps or case.steps
        rows = case.rows(steps)
        for row in rows.values():
            row()
        agree(rows)
        found = compare(
            rows, base="plain", rounds=args.rounds, timer=timed, least=0, settle=gc.collect
        )
        print(f"\n## {name}\n\n{case.about}\n\n{markdown(found)}\n", flush=True)
        judged = next(row for row in case.judged if row in rows)
        ratio, speed = found.ratio(judged), found.speed(judged, "torch")
        verdicts = [
            Verdict(f"{judged} at most {case.ratio}", ratio, case.ratio, ratio <= case.ratio),
            Verdict(
                f"{judged}, times torch's speed, at least {case.speed}",
                speed, case.speed, speed >= case.speed,
            ),
        ]  # fmt: skip
        good &= all(verdict.met for verdict in verdicts)
        print(*verdicts, sep="\n", flush=True)
        tables.append(
            {
                "case": name,
                "about": case.about,
                "steps": steps,
                "rows": as_data(found),
                "verdicts": verdicts_as_data(verdicts),
            }
        )
        write(
            args.out,
            {
                "benchmark": "frameworks",
                "environment": environment(),
                "clock": "process CPU time, one thread",
                "rounds": args.rounds,
                "tables": tables,
            },
        )
    return 0 if good else 1


if __name__ == "__main__":
    keep_memory()
    raise SystemExit(main())
