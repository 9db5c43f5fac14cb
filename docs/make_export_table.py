"""Write the table of docs/export.md: each target, live and stripped, on real architectures.

Run ``python docs/make_export_table.py``. It takes some minutes, mostly in AOTInductor's compiler.
With ``--check`` it writes nothing, and its exit status is 1 if the page differs from what it finds.
``--targets`` and ``--models`` choose rows. torchao's rows need torchao, installed or in the folder
that the environment variable WN_TORCHAO names; AOTInductor's rows need g++.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import wn_surgery as wn
from wn_surgery.export import Target, check, stripped_copy, verify

PAGE = Path(__file__).with_name("export.md")
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
HEADER = (
    "| target | model | `check` says | works | nodes | 8-bit weights | file | max difference |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


# The models, weight-normed as their authors do it -------------------------------------------


class Logits(nn.Module):
    """A model of transformers with a tensor as its output, which every target takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The first output."""
        out: Tensor = self.model(x)[0]
        return out


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions and a residual connection (arXiv:1803.01271)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.past = 4 * dilation
        norm = torch.nn.utils.weight_norm  # the legacy hook, as in the paper's own code
        self.conv1 = norm(nn.Conv1d(channels, channels, 5, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(channels, channels, 5, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, time)``, and the same again."""
        y = torch.relu(self.conv1(nn.functional.pad(x, [self.past, 0])))
        y = torch.relu(self.conv2(nn.functional.pad(y, [self.past, 0])))
        return torch.relu(x + y)


def tcn() -> tuple[nn.Module, Tensor]:
    """A temporal convolutional network: the legacy hook."""
    blocks = [TemporalBlock(64, 2**level) for level in range(3)]
    return nn.Sequential(*blocks, nn.Conv1d(64, 10, 1)), torch.randn(1, 64, 50)


def vocoder() -> tuple[nn.Module, Tensor]:
    """SpeechT5's HiFi-GAN: torch's parametrization, put on by its own method."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        upsample_initial_channel=128,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
    )
    model: Any = SpeechT5HifiGan(config)
    model.apply_weight_norm()
    return model, torch.randn(20, config.model_in_dim)


def wav2vec2() -> tuple[nn.Module, Tensor]:
    """Wav2Vec2: torch's parametrization of the positional convolution, along its last axis."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=256,
        conv_dim=(32, 32),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4,
    )
    return Logits(Wav2Vec2Model(config)), torch.randn(1, 800)


def llama() -> tuple[nn.Module, Tensor]:
    """A Llama with this library's weight norm on every projection."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = Logits(LlamaForCausalLM(config))
    wn.apply(model, {"names": "model.model.layers.**.*_proj"})
    return model, torch.arange(8)[None]


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "TCN": tcn,
    "SpeechT5HifiGan": vocoder,
    "Wav2Vec2": wav2vec2,
    "Llama": llama,
}


# The targets ---------------------------------------------------------------------------------


@dataclass
class Made:
    """What an export gave: what can be run, and what there is to count."""

    exported: Any
    file: Path
    nodes: int | None = None
    eight_bit: int | None = None


def _program(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), strict=False)


def to_program(model: nn.Module, x: Tensor, folder: Path) -> Made:
    """An exported program, through its file."""
    program, path = _program(model, x), folder / "model.pt2"
    torch.export.save(program, path)
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    return Made(path, path, nodes)


def to_onnx(model: nn.Module, x: Tensor, folder: Path) -> Made:
    """An ONNX file, run by onnxruntime."""
    import onnx

    path = folder / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
    return Made(path, path, len(onnx.load(path).graph.node))


def to_quantized_onnx(model: nn.Module, x: Tensor, folder: Path) -> Made:
    """The same file after onnxruntime's dynamic quantization."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    source, path = to_onnx(model, x, folder).file, folder / "quantized.onnx"
    quantize_dynamic(source, path)
    graph = onnx.load(path).graph
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    weights = [each for each in graph.initializer if each.data_type in kinds and len(each.dims) > 1]
    return Made(path, path, len(graph.node), len(weights))


def to_trace(model: nn.Module, x: Tensor, folder: Path) -> Made:
    """A traced TorchScript file."""
    return _torchscript(torch.jit.trace(model, (x,)), folder)


def to_script(model: nn.Module, x: Tensor, folder: Path) -> Made:
    """A scripted TorchScript file."""
    del x
    return _torchscript(torch.jit.script(model), folder)


def _torchscript(module: Any, folder: Path) -> Made:
    path = folder / "model.pt"
    module.save(path)
    return Made(path, path, len(list(module.inlined_graph.nodes())))


def to_aotinductor(model: nn.Module, x: Tensor, folder: Path) -> Made:
    """A compiled package."""
    from torch._inductor import aoti_compile_and_package

    path = folder / "model.pt2"
    aoti_compile_and_package(_program(model, x), package_path=str(path))
    return Made(path, path)


def to_torch_quantized(model: nn.Module, x: Tensor, folder: Path) -> Made:
    """A module with dynamically quantized layers; the file is its state dict."""
    del x
    quantized = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    layers = [module for module in quantized.modules() if ".dynamic" in type(module).__module__]
    return Made(quantized, _saved(quantized, folder), eight_bit=len(layers))


def to_torchao(model: nn.Module, x: Tensor, folder: Path) -> Made:
    """A module with int8 weights; the file is its state dict."""
    del x
    import torchao.quantization as torchao

    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    eight = [p for p in model.parameters() if type(p).__module__.startswith("torchao")]
    return Made(model, _saved(model, folder), eight_bit=len(eight))


def _saved(module: nn.Module, folder: Path) -> Path:
    path = folder / "state.pt"
    torch.save(module.state_dict(), path)
    return path


TARGETS: dict[Target, Callable[[nn.Module, Tensor, Path], Made]] = {
    "torch.export": to_program,
    "onnx": to_onnx,
    "torchscript-trace": to_trace,
    "torchscript-script": to_script,
    "aotinductor": to_aotinductor,
    "ort-quantize": to_quantized_onnx,
    "torch-quantize": to_torch_quantized,
    "torchao": to_torchao,
}
assert sorted(TARGETS) == sorted(get_args(Target))


# The table -----------------------------------------------------------------------------------


def measure(target: Target, model: nn.Module, x: Tensor, expected: nn.Module) -> list[str]:
    """Whether it works, nodes, 8-bit weights, size and relative difference, as text."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = TARGETS[target](model, x, Path(folder))
            found = verify(expected, made.exported, x)
        except Exception as error:  # noqa: BLE001 - what it raises is what the table says
            return [type(error).__name__, "–", "–", "–", "–"]
        counts = ["–" if count is None else str(count) for count in (made.nodes, made.eight_bit)]
        size = f"{made.file.stat().st_size / 1e6:.2f} MB"
        relative = found.max_abs / max(each.largest for each in found.outputs)
        return ["yes", *counts, size, f"{relative:.0e}" if relative else "0"]


def row(target: Target, name: str) -> str:
    """One line of the table; where a cell has an arrow it leads from live to stripped."""
    build = MODELS[name]
    torch.manual_seed(0)
    model, x = build()
    model.eval()
    torch.manual_seed(0)
    live = build()[0].eval()  # what is exported may be changed by it
    effects = sorted({finding.effect for finding in check(live, target).findings})
    before = measure(target, live, x, model)
    after = measure(target, stripped_copy(model), x, model)
    cells = [a if a == b else f"{a} → {b}" for a, b in zip(before, after, strict=True)]
    return f"| {target} | {name} | {', '.join(effects) or 'ok'} | {' | '.join(cells)} |\n"


def rows(targets: list[Target], models: list[str]) -> dict[tuple[str, str], str]:
    """The lines of the table by target and model."""
    found = {}
    for target in targets:
        for name in models:
            found[target, name] = row(target, name)
            print(found[target, name], end="", flush=True)
    return found


def listed(page: str) -> dict[tuple[str, str], str]:
    """The lines of the page's table."""
    _, _, rest = page.partition(BEGIN)
    table, _, _ = rest.partition(END)
    split = [(_cells(line), line) for line in table.splitlines(keepends=True)]
    return {(cells[1], cells[2]): line for cells, line in split if set(cells) & TARGETS.keys()}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


def same(line: str, other: str) -> bool:
    """Whether two lines say the same: sizes within 5 %, differences of a like magnitude.

    TorchScript's files hold the paths of the source, and their sizes depend on the checkout's.
    """
    one, two = _cells(line), _cells(other)
    if one[:7] != two[:7]:
        return False
    for cell, tolerance in ((7, 1.05), (8, 100.0)):
        numbers = [
            [float(n) for n in re.findall(r"\d[\d.]*(?:e-?\d+)?", x[cell])] for x in (one, two)
        ]
        # One number stands for two that are alike once rounded.
        most = max(map(len, numbers))
        numbers = [each * most if len(each) == 1 else each for each in numbers]
        if len(numbers[0]) != len(numbers[1]):
            return False
        for a, b in zip(*numbers, strict=True):
            # Rounding to two places, or to nothing, is not a difference.
            if max(a, b) > tolerance * min(a, b) and abs(a - b) > (0.011 if cell == 7 else 1e-5):
                return False
    return True


def missing(target: Target) -> str:
    """Why a target cannot be tried here; empty if it can."""
    if target == "aotinductor" and shutil.which("g++") is None:
        return "there is no C++ compiler (g++)"
    if target == "torchao":
        try:
            import torchao  # noqa: F401
        except ImportError:
            return "torchao is not installed; see WN_TORCHAO above"
    return ""


def main(arguments: list[str]) -> int:
    """Write the page, or check it; the exit status is 1 if a line differs under --check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args(arguments)
    if folder := os.environ.get("WN_TORCHAO"):
        sys.path.append(folder)
    targets = []
    for target in args.targets:
        if reason := missing(target):
            print(f"{target}: left out, {reason}", file=sys.stderr)
        else:
            targets.append(target)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # exporters have much to say
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = rows(targets, args.models)
    finally:
        logging.disable(disabled)
    page = PAGE.read_text(encoding="utf-8")
    before = listed(page)
    if args.check:
        wrong = [key for key, line in found.items() if not same(line, before.get(key, ""))]
        for key in wrong:
            print(f"the page says: {before.get(key, 'nothing')}", file=sys.stderr)
        return int(bool(wrong))
    everything = {**before, **found}
    order = [(target, name) for target in TARGETS for name in MODELS]
    table = HEADER + "".join(everything[key] for key in order if key in everything)
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
