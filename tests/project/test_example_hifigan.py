"""The HiFi-GAN example: its parts, and all of it in six steps."""

from __future__ import annotations

import csv
import importlib
import math
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import wn_surgery as wn
from wn_surgery.callbacks.lightning import WeightNorm

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    # A resumed run writes into the folder of the checkpoint that it comes from.
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        threads, deterministic = torch.get_num_threads(), torch.get_deterministic_debug_mode()
        yield importlib.import_module("hifigan")
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(deterministic)


@pytest.fixture(scope="module")
def parts(demo: Any) -> Any:
    return importlib.import_module("hifigan_gan")


@pytest.fixture(scope="module")
def sound(demo: Any) -> Any:
    return importlib.import_module("hifigan_speech")


def test_there_is_a_frame_for_each_hop_and_a_tone_is_in_its_filter(sound: Any) -> None:
    time = torch.arange(20 * sound.HOP) / sound.RATE
    tones = torch.stack([torch.sin(2 * torch.pi * hertz * time) for hertz in (440, 3000)])
    mel = sound.LogMel()(tones)
    assert mel.shape == (2, 20, sound.MELS)
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (80, 7600))
    for hertz, found in zip((440, 3000), mel[:, 10].argmax(1), strict=True):
        place = (2595 * math.log10(1 + hertz / 700) - low) / (high - low) * (sound.MELS + 1)
        assert abs(int(found) + 1 - place) <= 1


def test_the_gradient_is_finite_in_silence(sound: Any) -> None:
    silence = torch.zeros(1, 4096, requires_grad=True)
    (gradient,) = torch.autograd.grad(sound.LogMel()(silence).sum(), silence)
    assert torch.isfinite(gradient).all()


def test_a_recording_is_resampled_levelled_and_written_again(sound: Any, tmp_path: Path) -> None:
    rate, hertz = 48_000, 1000
    left = (8000 * torch.sin(2 * torch.pi * hertz * torch.arange(rate) / rate)).to(torch.int16)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, 2, rate, 0, "NONE", ""))
        file.writeframes(torch.stack([left, torch.zeros_like(left)], 1).numpy().tobytes())
    (tmp_path / "Noise.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    (name,), (read,) = zip(*sound.recordings(tmp_path).items(), strict=True)
    assert name == "a"
    assert len(read) == sound.RATE // sound.HOP * sound.HOP
    expected = 0.95 * torch.sin(2 * torch.pi * hertz * torch.arange(len(read)) / sound.RATE)
    torch.testing.assert_close(read, expected, atol=2e-3, rtol=0)
    sound.write_wav(tmp_path / "b.wav", read)
    torch.testing.assert_close(sound.read_wav(tmp_path / "b.wav"), read, atol=1e-4, rtol=0)


def test_a_recording_of_other_samples_is_refused(sound: Any, tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 1, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(100))
    with pytest.raises(ValueError, match=r"a\.wav has 8-bit samples; expected 16-bit"):
        sound.recordings(tmp_path)


def test_without_speech_it_makes_sounds_and_says_so(demo: Any, tmp_path: Path) -> None:
    data = demo.speech(tmp_path)
    assert data.text.startswith(f"no speech in {tmp_path}")
    assert "8 tones and chirps instead" in data.text
    sounds = [*data.train.waves, data.held_out]
    assert len(sounds) == 8
    for number, samples in enumerate(sounds):
        assert len(samples) == 88 * demo.HOP
        assert float(samples.abs().max()) == pytest.approx(0.95)
        assert not any(torch.equal(samples, other) for other in sounds[:number])


def test_an_epoch_has_its_own_pieces(sound: Any) -> None:
    waves = sound.Waves([torch.arange(10.0), torch.arange(100.0, 104.0)], 4)
    pieces = sound.Pieces(waves, 200)
    first = list(pieces)
    assert len(first) == len(pieces) == 200
    assert list(pieces) == first
    pieces.set_epoch(1)
    assert list(pieces) != first
    assert {which for which, _ in first} == {0, 1}
    assert {start for which, start in first if which == 0} == set(range(7))
    assert all(len(waves[piece]) == 4 for piece in first)
    assert waves[0, 3].tolist() == [3, 4, 5, 6]


def test_a_period_discriminator_sees_each_column_by_itself(parts: Any) -> None:
    torch.manual_seed(0)
    judge = parts.PeriodDiscriminator(3, (2, 4, 4))
    samples = torch.randn(2, 100, requires_grad=True)  # not a multiple of the period
    scores, features = judge(samples)
    assert len(features) == 4
    assert scores.shape[0] == 2
    column = features[-1][0, 0, :, 1].sum()
    (seen,) = torch.autograd.grad(column, samples)
    reached = seen[0].nonzero().flatten()
    # The padding reflects the last samples, in other columns, to the end.
    assert set((reached[reached < 95] % 3).tolist()) == {1}
    assert not seen[1].any()


def small(demo: Any, parts: Any) -> Any:
    torch.manual_seed(0)
    judge = parts.MultiPeriodDiscriminator(periods=(2, 3), channels=(4, 8))
    return parts.Gan(parts.small_generator(), judge)


def fit(demo: Any, parts: Any, fused: str) -> tuple[Any, list[dict[str, float]]]:
    seen: list[dict[str, float]] = []

    class Keep(lp.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            seen.append({name: float(value) for name, value in outputs.items()})

    gan = small(demo, parts)
    data = demo.Waves(list(0.1 * torch.randn(6, 8 * demo.HOP, generator=torch.Generator())))
    trainer = lp.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[WeightNorm(demo.RULES, fused=fused), Keep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(gan, DataLoader(data, batch_size=2))
    return gan, seen


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_fused_training_of_both_networks_is_the_same(demo: Any, parts: Any) -> None:
    gan, losses = fit(demo, parts, "cpu")
    other, expected = fit(demo, parts, "off")
    assert losses == [pytest.approx(step, rel=1e-4) for step in expected]
    assert len(losses) == 6
    assert losses[-1]["loss/mel_l1"] < losses[0]["loss/mel_l1"]
    start = small(demo, parts)
    wn.apply(start, demo.RULES)
    for name, before in start.named_parameters():
        assert not torch.equal(gan.get_parameter(name), before), name
        torch.testing.assert_close(
            gan.get_parameter(name), other.get_parameter(name), atol=1e-3, rtol=1e-3
        )
    groups = [group for optimizer in gan.trainer.optimizers for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.01, 0.0]
    assert [len(group["params"]) for group in groups] == [29, 58, 6, 12]


def test_compare_finds_a_bit(demo: Any) -> None:
    checks = importlib.import_module("hifigan_checks")
    one = {"a": [torch.zeros(2), 1], "callbacks": {"ModelCheckpoint{}": "here"}}
    two = {"a": [torch.zeros(2), 1], "callbacks": {"ModelCheckpoint{}": "there"}}
    assert checks.compare(one, two) == (2, [])
    two["a"] = [torch.tensor([0.0, 1e-45]), 1, "more"]
    assert checks.compare(one, two) == (2, ["/a/0", "/a/2"])


def test_steps_that_do_not_fill_the_epochs_are_refused(
    demo: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--steps", "7"])
    assert "--steps 7: expected a multiple of 6" in capsys.readouterr().err


def test_without_matplotlib_there_are_no_pictures(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = demo.speech(tmp_path)
    demo.write(data, tmp_path, {"output": data.held_out}, demo.History())
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.wav", "output.wav"]


def test_a_short_run(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = demo.main(["--steps", "6", "--check-resume", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    print(printed)  # for the reader of a failure
    assert code == 0
    assert "FAIL" not in printed
    speech = (demo.SOUNDS / "Front_Left.wav").exists()
    assert ("8 recordings of speech from" in printed) == speech
    assert ("tones and chirps instead" in printed) != speech
    assert "59 of 59 matched parameters change; 441,806 parameters -> 443,668" in printed
    assert "59 of 59 matched parameters changed; 443,668 parameters -> 441,806" in printed
    assert printed.count("epoch 6/6") == 2
    assert ", 0 differ" in printed
    assert "norms left in the graph: none" in printed

    graph = onnx.load(tmp_path / demo.ONNX).graph
    assert not demo.NORM_OPS & {node.op_type for node in graph.node}
    # What a stranger loads, who has neither the callback nor this library.
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=5.ckpt", weights_only=True)
    plain = demo.new_gan(demo.speech(demo.SOUNDS))
    plain.load_state_dict(checkpoint["state_dict"])
    weights = load_file(tmp_path / demo.WEIGHTS)
    assert demo.same(weights, plain.state_dict())
    # The average is not what goes on being trained.
    key = "generator.conv_pre.weight"
    assert not torch.equal(checkpoint["current_model_state"][key], weights[key])
    for name in ("input.wav", "output.wav"):
        with wave.open(str(tmp_path / name)) as file:
            assert file.getframerate() == demo.RATE
            assert file.getnframes() > demo.RATE
    for name in ("spectrograms.png", "history.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    steps: list[int] = []
    for part in ("stopped", "resumed"):
        with (tmp_path / "logs" / part / "metrics.csv").open(encoding="utf-8") as rows:
            steps += [
                int(row["step"])
                for row in csv.DictReader(rows)
                if row["weight_norm/generator.conv_pre.weight/g"]
            ]
        assert list((tmp_path / "logs" / part).glob("events.out.tfevents.*"))
    assert steps == list(range(6))
