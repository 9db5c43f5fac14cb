"""The command line: what it prints, its exit codes, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wn_surgery as wn
from tests.checkpoints.makers import listing, same, shards, tensors
from wn_surgery.checkpoints.io import header
from wn_surgery.cli import commands, main
from wn_surgery.norm import naming
from wn_surgery.rules.presets import PRESETS
from wn_surgery.rules.sources import as_rules

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def ran(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["wn-surgery", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ran(int(ended.value.code or 0), *capfd.readouterr())

    return ran


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    return path


def test_inspect(run: Run, file: Path) -> None:
    ran = run("inspect", file)
    assert ran.code == 0 and ran.err == ""
    assert "a.weight  legacy  8×4×3  float32  0 " in ran.out
    assert ran.out.endswith("2 weight-normed, 4 others\n")
    told = run("inspect", file, "--json").json
    assert told["tensors"][0]["layout"] == "legacy" and told["plain"] == 4


def test_doctor(run: Run, file: Path) -> None:
    assert run("doctor", file) == Ran(0, "2 normed tensors, 0 errors, 0 warnings\n", "")
    state = tensors()
    state["a.weight_v"][0] = float("nan")
    del state["b.weight_v"]
    torch.save(state, "bad.pt")
    ran = run("doctor", "bad.pt")
    assert ran.code == 1 and ran.out.count("error: ") == 2
    assert run("inspect", "bad.pt").out.endswith("2 findings: see wn-surgery doctor bad.pt\n")
    ran = run("doctor", "bad.pt", "--json")
    assert ran.code == 1 and not ran.json["sound"]
    assert {each["kind"] for each in ran.json["findings"]} == {"orphan", "non-finite"}
    told = run("inspect", "bad.pt", "--json").json["tensors"][0]
    assert told["g"][0] == pytest.approx(float(state["a.weight_g"].min()))


def test_strip_convert_diff_and_apply(run: Run, file: Path) -> None:
    assert run("strip", file, "b.safetensors") == Ran(0, "2 weights → plain: b.safetensors\n", "")
    assert same(load_file("b.safetensors"), wn.checkpoints.convert(tensors()))
    ran = run("convert", file, "c.safetensors", "--to", "parametrized", "--json")
    assert ran.json["files"] == ["c.safetensors"]
    assert ran.json["weights"] == ["a.weight", "b.weight"]
    assert run("diff", "b.safetensors", "c.safetensors").out == "6 the same, 0 differing\n"
    rules = '{"names": "a", "dim": 1}'
    assert run("apply", "b.safetensors", "d.safetensors", rules, "--to", "legacy").code == 0
    assert load_file("d.safetensors")["a.weight_g"].shape == (1, 4, 1)
    ran = run("diff", "b.safetensors", "d.safetensors", "--json")
    assert ran.code == int(not ran.json["equal"])
    assert run("diff", "b.safetensors", "d.safetensors", "--atol", "1e-5").code == 0
    assert run("strip", "b.safetensors", "e.safetensors").out.endswith("the tensors are the same\n")
    assert run("strip", file, file, "--in-place").code == 0
    assert same(load_file(file), load_file("b.safetensors"))


@pytest.mark.usefixtures("file")
def test_the_page_shows_what_is_printed(run: Run) -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    session = page.partition("```console\n")[2].partition("```")[0]
    _, *commands = session.split("$ wn-surgery ")
    assert len(commands) == 5
    for text in commands:
        line, _, expected = text.partition("\n")
        assert run(*line.split()) == Ran(0, expected, "")


def test_diff_tells_by_its_code(run: Run, file: Path) -> None:
    save_file({**tensors(), "steps": torch.tensor([4])}, "b.safetensors")
    ran = run("diff", file, "b.safetensors")
    assert ran.code == 1 and "steps" in ran.out and ran.err == ""
    assert run("diff", file, "b.safetensors", "--json").json["equal"] is False


def test_spectral_norm_and_axes(run: Run) -> None:
    norm = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    torch.save(
        {**norm.state_dict(), "a.weight_g": torch.ones(4), "a.weight_v": torch.ones(4, 4)}, "a.pt"
    )
    ran = run("strip", "a.pt", "b.pt")
    assert ran.code == 3 and "--dim 0 or 1" in ran.err
    assert run("strip", "a.pt", "b.pt", "--dim", "one").code == 2
    ran = run("strip", "a.pt", "b.pt", "--dim", 1)
    assert ran.code == 0 and "--also spectral_norm strips them" in ran.out
    ran = run("strip", "a.pt", "b.pt", "--dim", 1, "--also", "spectral_norm")
    assert "1 spectral-normed weights → plain" in ran.out
    assert torch.load("b.pt").keys() == {"weight", "bias", "a.weight"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["strip", "a.safetensors", "a.safetensors"], 3, "--in-place"),
        (["strip", "gone.pt", "b.pt"], 4, "neither a file nor a folder"),
        (["strip", "a.safetensors", "gone/b.safetensors"], 4, "No such file"),
        (["strip", "damaged.safetensors", "b.safetensors"], 3, "not a sound safetensors file"),
        (["inspect", "damaged.pt"], 3, "is damaged, or holds more"),
        (["apply", "a.safetensors", "b.safetensors", '{"types": "Conv1d"}'], 3, "needs modules"),
        (["apply", "a.safetensors", "b.safetensors", "{"], 3, "is not JSON"),
        (["plan", "folder", "linears"], 3, "no config that transformers reads"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(
    run: Run, tmp_path: Path, file: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"\x01")
    (tmp_path / "damaged.pt").write_bytes(b"\x01")
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    ran = run(*arguments)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and message in ran.err
    assert listing(tmp_path) == before
    ran = run(*arguments, "--json")
    assert ran.code == code and message in ran.json["error"]["message"]


def test_errors_name_flags_where_the_library_names_arguments(run: Run) -> None:
    torch.save({"a.weight_g": torch.ones(4, 1)}, "a.pt")
    ran = run("strip", "a.pt", "b.pt")
    assert ran.code == 3 and "--keep-orphans" in ran.err and "orphans='keep'" not in ran.err
    assert run("strip", "a.pt", "b.pt", "--keep-orphans").code == 0
    torch.save(
        {"a.weight_g": torch.full((4, 1), torch.nan), "a.weight_v": torch.ones(4, 2)}, "a.pt"
    )
    ran = run("strip", "a.pt", "c.pt")
    assert ran.code == 3 and "--keep-non-finite" in ran.err and "='keep'" not in ran.err
    ran = run("strip", "a.pt", "a.pt", "--keep-non-finite")
    assert ran.code == 3 and "--in-place" in ran.err and "in_place" not in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["strip", "a"],
        ["frob"],
        ["convert", "a", "b", "--to", "x"],
        ["diff", "a", "b", "--at"],
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 2 and "Usage: wn-surgery" in ran.err


@pytest.mark.parametrize(
    "command", ["inspect", "doctor", "strip", "convert", "apply", "plan", "diff"]
)
def test_help_has_examples(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0 and f"wn-surgery {command} " in ran.out.partition("Examples:")[2]
    assert command in run("--help").out


def test_the_layouts_are_those_of_the_library() -> None:
    assert (commands.Layout, commands.NormedLayout) == (naming.Layout, naming.NormedLayout)


def test_version_and_completion(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--version").out == f"wn-surgery {wn.__version__}\n"
    monkeypatch.setenv("_WN_SURGERY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "wn-surgery str")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run().out.split() == ["strip"]


def test_a_bug_has_a_code_of_its_own(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wn.checkpoints, "inspect", lambda *_, **__: 1 / 0)
    ran = run("inspect", file)
    assert ran.code == 70 and "ZeroDivisionError" in ran.err


def test_colours_and_bars_only_on_a_terminal(file: Path) -> None:
    command = [sys.executable, "-m", "wn_surgery.cli", "strip", str(file), f"{file}.safetensors"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    mine, its = pty.openpty()
    subprocess.run(command, check=True, env=environment, stdout=its, stderr=its)
    os.close(its)
    shown = os.read(mine, 100_000)
    os.close(mine)
    assert b"plain:" in shown and b"\x1b[" in shown
    piped = subprocess.run(command, check=True, env=environment, capture_output=True)
    assert b"\x1b[" not in piped.stdout + piped.stderr and piped.stderr == b""


def test_an_interrupt_has_its_code_and_leaves_nothing(tmp_path: Path) -> None:
    state = {
        f"{i}.weight_{p}": torch.ones(1024, 1024 if p == "v" else 1)
        for i in range(30)
        for p in "gv"
    }
    save_file(state, tmp_path / "a.safetensors")
    # The signal comes when a part of the output is written, however fast the machine is.
    code = (
        "import os, signal\n"
        # A shell starts what runs in the background with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from wn_surgery.checkpoints.io import atomic\n"
        "from wn_surgery.cli import main\n"
        "write = atomic.Output.write\n"
        "def interrupted(output, data):\n"
        "    written = write(output, data)\n"
        "    if output.tell() > 1_000_000: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return written\n"
        "atomic.Output.write = interrupted\n"
        "main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "strip", "a.safetensors", "b.safetensors"],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert ran.returncode == 128 + signal.SIGINT and ran.stdout == b""
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# Folders of transformers ----------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        max_position_embeddings=8,
    )
    folder = tmp_path / "bert"
    BertModel(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_plan_reads_no_weight(run: Run, bert: Path) -> None:
    (bert / "model.safetensors").write_bytes(b"not read")
    before = listing(bert)
    ran = run("plan", bert, '{"types": "Linear"}')
    assert ran.code == 0 and "encoder.layer.0.attention.self.query.weight" in ran.out
    told = run("plan", bert, '{"types": "Linear"}', "--json").json
    assert len(told["steps"]) == 7
    ran = run("plan", bert, '{"types": "Conv1d"}')
    assert ran.code == 3 and "decides nothing" in ran.err
    assert listing(bert) == before


def test_apply_and_strip_a_folder(run: Run, bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    assert run("apply", bert, "normed", '{"types": "Linear"}').code == 0
    config = json.loads((tmp_path / "normed" / "config.json").read_text())
    assert "weight_norm" in config["quantization_config"]["quant_method"]
    assert (tmp_path / "normed" / "tokenizer_config.json").is_file()
    assert run("diff", bert, "normed").code == 0
    assert len(run("inspect", "normed", "--json").json["tensors"]) == 7
    assert run("strip", "normed", "plain").code == 0
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"quantization_config", "fusion_config"} & plain.keys()
    before, after = AutoModel.from_pretrained(bert), AutoModel.from_pretrained("plain")
    assert same(before.state_dict(), after.state_dict())
    assert run("apply", bert, "other", '{"types": "Linear"}', "--rank", 2).code == 2
    ran = run("apply", "normed", "twice", '{"types": "Linear"}')
    assert ran.code == 3 and "already" in ran.err and not (tmp_path / "twice").exists()


def test_a_class_that_norms_itself_keeps_its_g_and_v(run: Run, tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    small = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    model = Wav2Vec2Model(small)
    model.save_pretrained(tmp_path / "a")
    ran = run("strip", "a", "b")
    assert ran.code == 0 and "1 kept, since the model's class looks for their g and v" in ran.out
    again = Wav2Vec2Model.from_pretrained(tmp_path / "b")
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    with pytest.raises(wn.CheckpointError, match=r"keep=wn_surgery\.huggingface\.built_in_keys"):
        wn.checkpoints.convert_file(tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert run("strip", "a", "c", "--all").out.startswith("1 weights → plain")


def test_a_dry_run_reads_headers_alone(run: Run, tmp_path: Path) -> None:
    """Of two files with a terabyte each, which nothing could read."""
    rows, columns = 1 << 18, 1 << 20
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "0.safetensors": {"a.weight_v": (rows, columns), "b.weight_g": (1, columns)},
        "1.safetensors": {"a.weight_g": (rows, 1), "b.weight_v": (rows, columns)},
    }
    folder = tmp_path / "a"
    folder.mkdir()
    for name, inside in shapes.items():
        lines = {key: ("F32", shape, 4 * math.prod(shape)) for key, shape in inside.items()}
        head = header.written(lines, None)
        (folder / name).write_bytes(head)
        os.truncate(folder / name, len(head) + sum(size for *_, size in lines.values()))  # sparse
    places = {key: name for name, inside in shapes.items() for key in inside}
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)
    ran = run("strip", folder, "b", "--dry-run")
    assert ran == Ran(
        0,
        "nothing is written: it would read 2.2 TB, write 2.2 TB, and hold at most 2.2 TB of "
        "tensors in memory\n2 weights → plain: b\n",
        "",
    )
    cost = run("strip", folder, "b", "--dry-run", "--json").json["dry_run"]
    v = 4 * rows * columns
    g = 4 * (rows + columns)
    # b has its norms along the other axis than the rows, so both v and w are in memory.
    assert cost == {"read": 2 * v + g, "written": 2 * v, "memory": 2 * v + 4 * columns}
    words = "convert", folder, "b", "--to", "parametrized", "--dry-run", "--json"
    cost = run(*words).json["dry_run"]
    assert cost == {"read": 2 * v + g, "written": 2 * v + g, "memory": 1 << 24}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_dry_run_foresees_what_is_written(run: Run, file: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": tensors()}, tmp_path / "a.pt")
    shards(tmp_path / "folder")
    for source, target in [(file, "b.safetensors"), ("a.pt", "b.pt"), ("folder", "folder-b")]:
        told = run("strip", source, target, "--dry-run", "--json").json
        assert not Path(target).exists()
        done = run("strip", source, target, "--json").json
        cost = told.pop("dry_run")
        assert told == done
        if target == "b.pt":
            made = torch.load(target)["state_dict"]
        else:
            files = [Path(target)] if target.endswith("s") else Path(target).glob("*.safetensors")
            made = {key: tensor for each in files for key, tensor in load_file(each).items()}
        assert cost["written"] == sum(tensor.nbytes for tensor in made.values())
        assert cost["read"] == sum(tensor.nbytes for tensor in tensors().values())


def test_shards_on_the_command_line(run: Run, tmp_path: Path) -> None:
    shards(tmp_path / "a")
    assert run("strip", "a", "b").code == 0
    assert run("diff", "a", "b").code == 0


# Where the output goes ----------------------------------------------------------------------------


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    program = f"{sys.executable} -W ignore -m wn_surgery.cli"
    return subprocess.run(
        ["bash", "-c", line.replace("wn-surgery", program)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        check=False,
        timeout=900,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", ["inspect", "inspect --json", "doctor", "--help"])
def test_a_full_standard_output(file: Path, arguments: str) -> None:
    command, _, option = arguments.partition(" ")
    name = "" if command == "--help" else file.name
    ran = shell(f"wn-surgery {command} {name} {option} > /dev/full", file.parent)
    assert ran.returncode == 4 and b"Traceback" not in ran.stderr
    assert ran.stderr.startswith(b"error: cannot write to standard output: ")


def test_a_closed_standard_output(file: Path) -> None:
    ran = shell(f"wn-surgery inspect {file.name} >&-", file.parent)
    assert ran.returncode == 4 and b"it is closed" in ran.stderr and b"Traceback" not in ran.stderr


def test_a_pipe_that_nobody_reads(file: Path) -> None:
    state = {
        f"layer{i}.weight_{part}": t
        for i in range(20_000)
        for part, t in (("g", torch.ones(2, 1)), ("v", torch.ones(2, 2)))
    }
    save_file(state, file)
    ran = shell(
        f"set -o pipefail; wn-surgery inspect {file.name} | head -1; echo ${{PIPESTATUS[0]}}",
        file.parent,
    )
    assert ran.stdout.splitlines()[-1] == b"141" and ran.stderr == b""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_terminal_without_unicode(file: Path, environment: dict[str, str]) -> None:
    ran = shell(f"wn-surgery inspect {file.name}", file.parent, **environment)
    assert ran.returncode == 0 and rb"8\xd74\xd73" in ran.stdout and not ran.stderr
    os.rename(file, os.fsencode(file.parent) + b"/bad\xff.safetensors")  # noqa: PTH104
    ran = shell(
        "wn-surgery strip bad*.safetensors 'o\u2192.safetensors' --json", file.parent, **environment
    )
    assert ran.returncode == 0 and json.loads(ran.stdout)["weights"] == ["a.weight", "b.weight"]


def test_names_that_are_no_text(run: Run, tmp_path: Path) -> None:
    name = b"bad\xff.safetensors".decode("utf-8", "surrogateescape")
    save_file({**tensors(), "layer:x:0\x1b[31m.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    ran = run("strip", "a.safetensors", name, "--json")
    assert ran.code == 0 and ran.json["files"] == [name]
    state = {
        "layer:x:0\x1b[31m.weight_g": torch.ones(2, 1),
        "layer:x:0\x1b[31m.weight_v": torch.ones(2, 2),
    }
    save_file(state, tmp_path / "a.safetensors")
    assert r"layer:x:0\x1b[31m.weight" in run("inspect", "a.safetensors").out


def test_what_is_also_stripped_is_what_was_named(run: Run, file: Path) -> None:
    assert run("strip", file, "b.safetensors", "--also", "spectral_norm", "--verify").code == 0
    assert run("strip", file, "c.safetensors", "--also", "batch_norm").code == 2


def test_report(run: Run, file: Path) -> None:
    ran = run("report", file, "-o", "a.html")
    assert ran == Ran(0, "2 normed tensors, 0 findings: a.html\n", "")
    text = Path("a.html").read_text(encoding="utf-8")
    assert text.count("<tr id=") == 2 and "<h1>a.safetensors</h1>" in text
    told = run("report", file, "--output", "a.html", "--json").json
    assert told == {"files": ["a.html"], "weights": ["a.weight", "b.weight"]}
    before = file.read_bytes()
    ran = run("report", file, "-o", file)
    assert ran.code == 3 and "another ending than .html" in ran.err
    assert file.read_bytes() == before
    assert run("report", file, "-o", "missing/a.html").code == 4
    assert run("report", file).code == 2


def test_presets_are_listed_with_their_papers(run: Run) -> None:
    ran = run("presets")
    assert ran.code == 0 and "edm2\n    apply types=" in ran.out
    assert "arXiv:2312.02696" in ran.out and "arXiv:2410.01131" in ran.out
    found = run("presets", "--json").json
    assert list(found) == list(PRESETS)
    for name, entry in found.items():
        assert as_rules(entry["rules"]) == PRESETS[name].rules
        assert entry["source"] == PRESETS[name].source
