"""What is measured: models, sizes, where weight norm goes, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from benchmarks import operators
from benchmarks.models import GAN, RNN, TCN, Small, WaveNet, gan_step
from benchmarks.peers import (  # fmt: skip
    BASE,
    FORWARD,
    MODES,
    NO_GRAD,
    PEERS,
    STEP,
    Alternative,
    Mode,
    Workload,
    alternatives,
)

__all__ = ["CASES", "Case", "Table", "vocoder"]

CONVOLUTIONS = {"types": ["Conv1d", "Conv2d", "ConvTranspose1d"]}
LINEARS = {"types": "torch.nn.Linear"}
MODELS = ("hifigan-1frame", "hifigan-step", "gan-step", "tcn", "wavenet",
          "wav2vec2", "llama-token", "llama-step", "rnn")  # fmt: skip


Opened: TypeAlias = Callable[[str | None], AbstractContextManager[list[Alternative]]]


@dataclass(frozen=True)
class Table:
    """One table of results: alternatives that do the same.

    Attributes:
        mode: what is timed.
        variant: which form of the case, if it has several.
        about: a line above the table.
        base: the alternative that the others are compared with.
        alternatives: makes the one of a name, or all for ``None``; what they hold is freed when the
            context ends.
        left_out: alternatives that are missing, and why.
        compiled: whether they are compiled.
    """

    mode: Mode
    variant: str
    about: str
    base: str
    alternatives: Opened
    left_out: dict[str, str]
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """What ``--only`` names.

    Attributes:
        name: for ``--only`` and the targets.
        summary: for ``--list``.
        tables: given (quick, compiled, device), the tables, each built when it is asked for.
        rounds: how many rounds a full run takes.
    """

    name: str
    summary: str
    tables: Callable[[bool, bool, str], Iterator[Table]]
    rounds: int = 30


Build = Callable[[bool, str], Workload]


def _models(*variants: tuple[str, Build, tuple[Mode, ...]]) -> Callable[..., Iterator[Table]]:
    def tables(quick: bool, compiled: bool, device: str) -> Iterator[Table]:
        for variant, build, modes in variants:
            torch.manual_seed(0)
            workload = build(quick, device)
            for mode in modes:
                for under in (False, True) if compiled else (False,):
                    yield Table(
                        mode, variant, workload.about, BASE,
                        _opened(workload, mode, under), _missing(mode), under,
                    )  # fmt: skip

    return tables


def _missing(mode: Mode) -> dict[str, str]:
    return {peer.name: why for peer in PEERS if mode in peer.modes and (why := peer.lacks())}


def _opened(workload: Workload, mode: Mode, compiled: bool) -> Opened:
    def opened(name: str | None) -> AbstractContextManager[list[Alternative]]:
        peers = tuple(peer for peer in PEERS if name in (None, peer.name))
        return alternatives(workload, mode, peers, compiled=compiled)

    return opened


def _operators(quick: bool, compiled: bool, device: str) -> Iterator[Table]:
    del compiled  # an operator is called as it is
    for name, shape, dim in operators.KINDS:
        for mode in (NO_GRAD, STEP):
            made = operators.Operator(shape if not quick else operators.small(shape), dim, device)
            about = f"{tuple(made.shape)}, dim {dim}: the operators themselves, without autograd"
            yield Table(
                mode, name, about, operators.COPY, _given(made.alternatives, mode), made.left_out()
            )


def _given(make: Callable[[Mode], list[Alternative]], mode: Mode) -> Opened:
    @contextmanager
    def given(_: str | None) -> Iterator[list[Alternative]]:
        yield make(mode)

    return given


def _middle(quick: bool, compiled: bool, device: str) -> Iterator[Table]:
    del compiled
    workload = operators.middle_dim((64, 64, 16) if quick else (512, 256, 16), device)
    yield Table(
        STEP, "", workload.about, operators.COPY,
        lambda _: operators.beside_copies(workload, STEP), _missing(STEP),
    )  # fmt: skip


def vocoder(channels: int) -> nn.Module:
    """HiFi-GAN V1 (arXiv:2010.05646, table 5), with torch's initialization.

    Args:
        channels: after the first convolution; 512 is V1.
    """
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=80,
        upsample_initial_channel=channels,
        upsample_rates=[8, 8, 2, 2],
        upsample_kernel_sizes=[16, 16, 4, 4],
        resblock_kernel_sizes=[3, 7, 11],
        resblock_dilation_sizes=[[1, 3, 5]] * 3,
    )
    vocoder: nn.Module = SpeechT5HifiGan(config)
    # Its own weights are so small that the signal is lost on the way, and its gradient too.
    for module in vocoder.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            module.reset_parameters()
    return vocoder


def _channels(quick: bool) -> int:
    return 128 if quick else 512


def _hifigan(frames: int) -> Build:
    def build(quick: bool, device: str) -> Workload:
        model = vocoder(_channels(quick)).to(device)
        mel = torch.randn(1, frames, 80, device=device)
        about = f"SpeechT5HifiGan, {_channels(quick)} channels, {frames} frame(s), {_size(model)}"
        return Workload(model, CONVOLUTIONS, lambda m: _tensor(m(mel)), about=about)

    return build


def _gan(quick: bool, device: str) -> Workload:
    frames, narrow = (2, 16) if quick else (4, 2)
    gan = GAN(vocoder(_channels(quick)), narrow).to(device)
    mel = torch.randn(1, frames, 80, device=device)
    real = torch.randn(1, 1, frames * 256, device=device)
    return Workload(
        gan,
        CONVOLUTIONS,
        lambda m: _tensor(m.generator(mel)),
        step=lambda m, block: gan_step(m, mel, real, block),
        roots=lambda m: [m.generator, m.periods, m.scales],
        about=f"{frames} frames, discriminators at 1/{narrow} of their width, {_size(gan)}",
    )


def _tcn(quick: bool, device: str) -> Workload:
    model = TCN().to(device)
    x = torch.randn(1, 1, 128 if quick else 256, device=device)
    return _plain(model, CONVOLUTIONS, x, f"batch 1, {x.shape[-1]} samples")


def _small(quick: bool, device: str) -> Workload:
    x = torch.randn(1, 24, 32 if quick else 64, device=device)
    return _plain(Small().to(device), CONVOLUTIONS, x, f"batch 1, {x.shape[-1]} samples")


def _wavenet(blocks: int) -> Build:
    def build(quick: bool, device: str) -> Workload:
        model = WaveNet(blocks=blocks).to(device)
        x = torch.randn(1, 1, 128 if quick else 256, device=device)
        return _plain(model, CONVOLUTIONS, x, f"batch 1, {x.shape[-1]} samples")

    return build


def _rnn(quick: bool, device: str) -> Workload:
    model = RNN().to(device)
    x = torch.randn(50 if quick else 200, 4, 128, device=device)
    workload = _plain(model, LINEARS, x, f"batch 4, {len(x)} steps")
    # Compiled as a whole the loop is unrolled, which takes minutes.
    return replace(workload, compiled=lambda m: [m.cell])


def _plain(model: nn.Module, rules: dict[str, Any], x: Tensor, about: str) -> Workload:
    about = f"{about}, {_size(model)}"
    return Workload(model, rules, lambda m: _tensor(m(x)), about=about)


def _wav2vec2(rules: dict[str, Any]) -> Build:
    def build(quick: bool, device: str) -> Workload:
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        import wn_surgery as wn

        config = Wav2Vec2Config(
            num_hidden_layers=2 if quick else 12,
            activation_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
            layerdrop=0.0, apply_spec_augment=False,
        )  # fmt: skip
        model = _on(device, Wav2Vec2Model(config))
        wn.remove(model)  # transformers has put its own on
        wave = torch.randn(1, 2000 if quick else 4000, device=device)
        about = f"{wave.shape[1]} samples, {config.num_hidden_layers} layers, {_size(model)}"
        return Workload(model, rules, lambda m: _tensor(m(wave).last_hidden_state), about=about)

    return build


def _llama(tokens: int) -> Build:
    def build(quick: bool, device: str) -> Workload:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=512 if quick else 1024,
            intermediate_size=1408 if quick else 2816,
            num_hidden_layers=2 if quick else 4,
            num_attention_heads=16,
            num_key_value_heads=16,
            use_cache=False,
        )
        model = _on(device, LlamaForCausalLM(config))
        ids = torch.randint(1000, (1, tokens), device=device)
        about = f"hidden {config.hidden_size}, {tokens} token(s), {_size(model)}"
        return Workload(model, LINEARS, lambda m: _tensor(m(ids).logits), about=about)

    return build


def _on(device: str, model: nn.Module) -> nn.Module:
    """Transformers types its own ``to`` as a decorator's result."""
    return model.to(device)


def _tensor(output: Tensor) -> Tensor:
    """What transformers returns is typed as anything."""
    return output


def _size(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.3g} M parameters"


CASES: tuple[Case, ...] = (
    Case(
        "hifigan-1frame", "HiFi-GAN V1, one mel frame, forward",
        _models(("", _hifigan(1), (FORWARD, NO_GRAD))),
    ),
    Case(
        "hifigan-step", "HiFi-GAN V1, 4 mel frames, forward and backward",
        _models(("", _hifigan(4), (STEP,))),
    ),
    Case(
        "gan-step", "generator, period and scale discriminators: both halves of a training step",
        _models(("", _gan, (STEP,))), 15,
    ),
    Case("tcn", "17 small convolutions", _models(("", _tcn, MODES))),
    Case("small", "92 convolutions of 24 channels", _models(("", _small, MODES))),
    Case("wavenet", "93 small convolutions in gated residual blocks",
         _models(("", _wavenet(30), MODES))),
    Case("wavenet-8", "8 of its blocks, of which --compiled takes minutes",
         _models(("", _wavenet(8), (FORWARD, STEP)))),
    Case(
        "wav2vec2", "wav2vec 2.0 base: its positional convolution, or every Linear",
        _models(
            ("positional", _wav2vec2({"names": "**.pos_conv_embed.conv", "types": "Conv1d",
                                      "dim": 2}), (NO_GRAD, STEP)),
            ("linears", _wav2vec2(LINEARS), (NO_GRAD, STEP)),
        ), 10,
    ),
    Case("llama-token", "a Llama, every Linear, one token",
         _models(("", _llama(1), (FORWARD, NO_GRAD)))),
    Case("llama-step", "a Llama, every Linear, 32 tokens, forward and backward",
         _models(("", _llama(32), (STEP,))), 15),
    Case("rnn", "a loop over a cell of two Linears", _models(("", _rnn, MODES))),
    Case("middle-dim", "a transposed convolution's weight over its output channels", _middle),
    Case("operator", "torch's operators and ours, over the first, last and a middle axis",
         _operators),
)  # fmt: skip
"""Every case, in the order in which they run."""
