"""Train a HiFi-GAN on speech with Lightning: two networks, two rule sets, one callback.

The generator is transformers' SpeechT5HifiGan, small and randomly initialized; a multi-period
discriminator (arXiv:2010.05646) judges it. One WeightNorm callback applies weight norm to both,
before the two optimizers are created. The run stops in the middle and resumes from its checkpoint.
It keeps an average of the weights (EMA), checkpoints that load without this library, and a record
of g and ‖v‖. Then the script removes weight norm, exports the generator to ONNX, and passes a
recording that was held out through all of it, for you to listen to and to look at.

    python examples/hifigan.py          (or: make hifigan)
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from hifigan_checks import NORM_OPS, compare, export, run_onnx, same
from hifigan_gan import Gan, MultiPeriodDiscriminator, small_generator
from hifigan_speech import (
    HOP,
    RATE,
    SOUNDS,
    LogMel,
    Pieces,
    Waves,
    draw,
    made_up,
    recordings,
    write_wav,
)
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.callbacks.lightning import WeightNorm
from wn_surgery.training.statistics import History

OUT = Path(__file__).resolve().parents[1] / "build" / "hifigan"
# As in the paper's code: every convolution of both networks. Names count from the Gan module.
RULES = [
    {"names": "generator.**", "types": ["Conv1d", "ConvTranspose1d"]},
    {"names": "discriminator.**", "types": "Conv2d"},
]
# Where the checkpoints of each run are. A resumed run writes into its own folder.
FOLDERS = {"stopped": "checkpoints", "resumed": "checkpoints", "uninterrupted": "uninterrupted"}
WEIGHTS, ONNX = "generator-and-all.safetensors", "generator.onnx"
EPOCHS = 6
BATCH, PIECE = 4, 16 * HOP


@dataclass(frozen=True)
class Speech:
    """The training data, and one recording that is held out."""

    train: Waves
    held_out: Tensor
    text: str


@dataclass(frozen=True)
class Run:
    """A run that has ended, with the average weights in the module."""

    gan: Gan
    weight_norm: WeightNorm
    checkpoint: Path


class Progress(L.Callback):
    """A line for each epoch."""

    WIDTH = 18

    def __init__(self) -> None:
        self.started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        print(
            f"  epoch {epoch}/{EPOCHS} [{'#' * (self.WIDTH * epoch // EPOCHS):<{self.WIDTH}}] "
            f"mel L1 {values['loss/mel_l1_epoch']:.3f}, held out {values['val/mel_l1']:.3f} (EMA); "
            f"discriminator {values['loss/discriminator_epoch']:.3f} "
            f"{time.perf_counter() - self.started:5.1f} s",
            flush=True,
        )


# --- The parts --------------------------------------------------------------------------------


def speech(folder: Path) -> Speech:
    """The recordings in a folder; synthetic sounds if there are none."""
    found = {name: wave for name, wave in recordings(folder).items() if len(wave) >= PIECE}
    if len(found) > 1:
        text = f"{len(found)} recordings of speech from {folder}"
    else:
        found = made_up()
        text = (
            f"no speech in {folder} (on Debian, apt-get install alsa-utils): "
            f"{len(found)} tones and chirps instead"
        )
    # "Rear right": other recordings hold each of its words. Without it, one from the middle.
    name = "Rear_Right" if "Rear_Right" in found else list(found)[len(found) // 2]
    held_out = found.pop(name)
    train = list(found.values())
    seconds = sum(map(len, train)) / RATE
    text += f"\n  {seconds:.1f} s to train on; {name} is held out"
    return Speech(Waves(train, PIECE), held_out, text)


def new_gan(data: Speech) -> Gan:
    """The networks that every run starts with, without weight norm."""
    torch.manual_seed(0)
    generator = small_generator()
    gan = Gan(generator, MultiPeriodDiscriminator())
    # The generator standardizes its input itself, by buffers that are saved with it.
    frames = torch.cat([gan.log_mel(wave[None])[0] for wave in data.train.waves])
    generator.mean.copy_(frames.mean(0))
    generator.scale.copy_(frames.std(0))
    return gan


def run(
    data: Speech,
    out: Path,
    name: str,
    steps: int,
    *,
    until: int = EPOCHS,
    resume: Path | None = None,
    export_to: Path | None = None,
) -> Run:
    """Train from new networks, or from a checkpoint, until an epoch has ended."""
    # Without init_from_batch: a unit variance in front of the last tanh is louder than speech.
    weight_norm = WeightNorm(
        RULES, save_layout="plain", log_every_n_steps=max(1, steps // 40), export_to=export_to
    )
    checkpoints = ModelCheckpoint(out / FOLDERS[name], "{epoch}", save_on_train_epoch_end=True)
    loggers: list[Logger] = [CSVLogger(out, "logs", name)]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(out, "logs", name))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=until,
        deterministic=True,
        callbacks=[
            weight_norm,
            # After WeightNorm, since it copies the model. Not with update_every_n_steps=2: what it
            # divides is global_step - 1, which two optimizers make odd after every batch.
            EMAWeightAveraging(decay=0.98, use_buffers=False),
            Progress(),
            checkpoints,
        ],
        logger=loggers,
        log_every_n_steps=max(1, steps // 40),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    gan = new_gan(data)
    pieces = Pieces(data.train, BATCH * steps // EPOCHS)
    trainer.fit(
        gan,
        DataLoader(data.train, batch_size=BATCH, sampler=pieces),
        DataLoader(Waves([data.held_out])),
        ckpt_path=resume,
    )
    return Run(gan, weight_norm, Path(checkpoints.best_model_path))


def both(one: History, other: History) -> History:
    """The record of a run and of its continuation, as one."""
    whole = History()
    whole.steps = one.steps + other.steps
    whole.records = one.records + other.records
    return whole


def changes(history: History) -> str:
    """The means of g and ‖v‖ of three layers, at the first and at the last record."""
    first, last = history.records[0], history.records[-1]
    shown = [name for name in first if name.endswith(("conv_pre.weight", "conv_post.weight"))]
    when = f"from step {history.steps[0]} to {history.steps[-1]}"
    lines = [f"  {when:42}g                   ‖v‖"]
    for name in shown[:3]:
        pairs = [f"{first[name][part]:.4f} -> {last[name][part]:.4f}" for part in ("g", "v_norm")]
        lines.append(f"  {name:42}{'    '.join(pairs)}")
    return "\n".join(lines)


def vocode(gan: Gan, samples: Tensor) -> Tensor:
    """The spectrogram of a ``(time,)`` waveform, and what the generator makes of it."""
    with torch.no_grad():
        made: Tensor = gan.generator.eval()(gan.log_mel(samples[None]))
    return made[0]


def mean_l1(gan: Gan, waves: Sequence[Tensor]) -> float:
    """The mel L1 of whole recordings, on average."""
    losses = [gan.mel_l1(vocode(gan, wave)[None], gan.log_mel(wave[None])) for wave in waves]
    return float(torch.stack(losses).mean())


# --- The steps --------------------------------------------------------------------------------


def quiet() -> None:
    """Silence what the frameworks print about other things."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        "does not have many workers",
        "LeafSpec.* is deprecated",
        "Checkpoint directory",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")


def heading(text: str) -> None:
    """Print a title."""
    print(f"\n{text}\n{'-' * len(text)}")


def show_plan(gan: Gan) -> None:
    """What the rules will do, shortened."""
    table = str(wn.plan(gan, RULES)).splitlines()
    print("\n".join([*table[:5], "...", *table[-3:]]))


def train(data: Speech, out: Path, steps: int) -> tuple[Run, Run]:
    """Train half of the way, stop, and resume: both runs."""
    stopped = run(data, out, "stopped", steps, until=EPOCHS // 2)
    print(f"  stopped; {stopped.checkpoint} is resumed")
    path = out / WEIGHTS
    return stopped, run(data, out, "resumed", steps, resume=stopped.checkpoint, export_to=path)


def check_resume(data: Speech, out: Path, steps: int, resumed: Run) -> bool:
    """Whether a run without the stop ends with the same checkpoint, bit for bit."""
    print("  once more without the stop:")
    straight = run(data, out, "uninterrupted", steps)
    count, unlike = compare(*(torch.load(r.checkpoint) for r in (resumed, straight)))
    print(f"  {count} tensors and numbers in each of the final checkpoints, {len(unlike)} differ")
    for name in unlike[:5]:
        print(f"    {name}")
    return not unlike


def show_losses(data: Speech, before: Gan, after: Gan) -> bool:
    """Print the mel L1 before and after; return whether the held-out recording improved."""
    trained_on = [mean_l1(gan, data.train.waves) for gan in (before, after)]
    held_out = [mean_l1(gan, [data.held_out]) for gan in (before, after)]
    print("  mel L1 of whole recordings      before  after (with the average weights)")
    print("    those that were trained on     {:.3f}  {:.3f}".format(*trained_on))
    print("    the one that was held out      {:.3f}  {:.3f}".format(*held_out))
    mel = after.log_mel(data.held_out[None])
    steady = float((mel - mel.mean(1, keepdim=True)).abs().mean())
    print(f"    its average spectrum all along        {steady:.3f}")
    factor = math.exp(held_out[1])
    print(f"  {held_out[1]:.3f}: a mel band is off by a factor of {factor:.1f}, on average")
    return held_out[1] < held_out[0]


def strip(data: Speech, whole: Run, weights: Path) -> dict[str, bool]:
    """Remove weight norm; return what holds afterwards."""
    gan = whole.gan
    normed = vocode(gan, data.held_out)
    print(f"  {str(wn.remove(gan)).splitlines()[-1]}")
    never_normed = new_gan(data)
    never_normed.load_state_dict(torch.load(whole.checkpoint)["state_dict"])
    state = gan.state_dict()
    return {
        "stripping changed no sample": torch.equal(vocode(gan, data.held_out), normed),
        f"{weights.name} holds the stripped weights": same(load_file(weights), state),
        "the checkpoint loads into networks without weight norm": same(
            never_normed.state_dict(), state
        ),
    }


def export_generator(data: Speech, gan: Gan, path: Path) -> tuple[Tensor, dict[str, bool]]:
    """Write ONNX and run it; return the samples, and what holds for them."""
    mel = gan.log_mel(data.held_out[None])
    graph = export(gan.generator, mel, path)
    exported = run_onnx(path, mel)
    difference = float((exported - vocode(gan, data.held_out)).abs().max())
    left = graph.keys() & NORM_OPS
    print(f"  {graph.total()} nodes: {', '.join(f'{op} {n}' for op, n in sorted(graph.items()))}")
    print(f"  norms left in the graph: {', '.join(sorted(left)) or 'none'}")
    print(f"  largest difference of a sample: {difference:.1e}")
    return exported, {
        "the exported graph computes no norm": not left,
        "onnxruntime makes the same samples, to 1e-4": difference < 1e-4,
    }


def write(data: Speech, out: Path, made: dict[str, Tensor], history: History) -> None:
    """Write files to listen to and to look at."""
    names = ["input.wav", "output.wav"]
    sounds = {"input: the recording that was held out": data.held_out, **made}
    for name, samples in zip(names, (data.held_out, list(made.values())[-1]), strict=True):
        write_wav(out / name, samples)
    if importlib.util.find_spec("matplotlib"):
        log_mel = LogMel()
        draw(out / "spectrograms.png", {k: log_mel(v[None])[0] for k, v in sounds.items()})
        history.plot().savefig(out / "history.png", dpi=100)
        names += ["spectrograms.png", "history.png"]
    else:
        print("  no pictures: matplotlib is not installed")
    for name in [*names, WEIGHTS, ONNX, "logs"]:
        print(f"  {out / name}")


def main(argv: list[str] | None = None) -> int:
    """Run every step; return 0 if every check passes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240, help=f"a multiple of {EPOCHS}")
    parser.add_argument("--sounds", type=Path, default=SOUNDS, help="a folder of 16-bit .wav files")
    parser.add_argument("--out", type=Path, default=OUT, help="where everything goes")
    # Layers this small gain little from a second thread, and lose much when it has to wait.
    parser.add_argument("--threads", type=int, default=1, help="how many torch computes with")
    parser.add_argument(
        "--check-resume",
        action="store_true",
        help="train once more without the stop, and compare the checkpoints bit by bit",
    )
    args = parser.parse_args(argv)
    if args.steps < EPOCHS or args.steps % EPOCHS:
        parser.error(f"--steps {args.steps}: expected a multiple of {EPOCHS}, for as many epochs")
    started = time.perf_counter()
    quiet()
    torch.set_num_threads(args.threads)
    out: Path = args.out
    for part in (*FOLDERS.values(), "logs"):
        shutil.rmtree(out / part, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    checks: dict[str, bool] = {}

    heading("1. The data, the networks and the rules")
    data = speech(args.sounds)
    print(f"  {data.text}\n")
    untrained = new_gan(data)
    show_plan(untrained)

    heading(f"2. Train for {args.steps} steps of both optimizers; stop half-way and resume")
    stopped, whole = train(data, out, args.steps)
    gan = whole.gan
    checks["the mel L1 of the held-out recording went down"] = show_losses(data, untrained, gan)
    if args.check_resume:
        checks["the resumed run is bit for bit the uninterrupted one"] = check_resume(
            data, out, args.steps, whole
        )

    heading("3. What g and ‖v‖ did")
    history = both(stopped.weight_norm.history, whole.weight_norm.history)
    print(changes(history))

    heading("4. Strip the trained networks")
    checks |= strip(data, whole, out / WEIGHTS)

    heading("5. Export the generator to ONNX, and run it in onnxruntime")
    exported, true = export_generator(data, gan, out / ONNX)
    checks |= true

    heading("6. To listen to and to look at")
    print("  So few steps learn how loud each band is when, and hardly the pitch; the paper takes")
    print("  2.5 million, and --steps 1200 shows the difference.")
    before = vocode(untrained, data.held_out)
    made = {"output before training": before, f"output after {args.steps} steps": exported}
    write(data, out, made, history)

    heading("In short")
    for text, good in checks.items():
        print(f"  {'ok  ' if good else 'FAIL'}  {text}")
    print(f"  {time.perf_counter() - started:.0f} s in all")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
