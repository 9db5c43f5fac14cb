"""The benchmarks' alternatives agree, their cases are what they say, and the command line works.

How long anything takes is never a test.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wn_surgery.fused.native.building import why_not

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import __main__ as cli
    from benchmarks import alone, gpu, models, operators, plan, scale
    from benchmarks.cases import CASES, MODELS
    from benchmarks.measure import compare
    from benchmarks.peers import (
        BASE,
        FORWARD,
        MODES,
        NO_GRAD,
        PEERS,
        STEP,
        DisagreementError,
        Mode,
        Peer,
        Workload,
        agree,
        alternatives,
        check,
    )
    from benchmarks.targets import GPU_TARGETS, SCALE_TARGETS, TARGETS
finally:
    sys.path.remove(str(ROOT))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small() -> Workload:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    rules = {"types": "torch.nn.Linear"}
    return Workload(model, rules, lambda m: m(x))


@pytest.mark.parametrize("mode", MODES)
def test_all_peers_agree_and_leave_the_model_as_it_is(mode: Mode) -> None:
    workload = small()
    before = {key: value.clone() for key, value in workload.model.state_dict().items()}
    with alternatives(workload, mode) as found:
        agree(found, 1e-5)
        assert [each.name for each in found] == [
            peer.name for peer in PEERS if mode in peer.modes and peer.lacks() is None
        ]
        outcome = found[0].outcome()
        assert ("the gradient of 0.weight" in outcome) == (mode == STEP)
        assert ("the gradient of 2.bias" in outcome) == (mode == STEP)
        calls: list[Any] = [each.call() for each in found for _ in range(2)]
        assert {call.requires_grad for call in calls} == {mode == FORWARD}
    assert workload.model.state_dict().keys() == before.keys()
    for key, value in workload.model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("mode", [NO_GRAD, STEP])
@pytest.mark.parametrize("what", ["0.weight", "2.bias"])
def test_an_alternative_that_computes_something_else_is_found(mode: Mode, what: str) -> None:
    def wrong(workload: Workload, model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter(what).mul_(1.01).add_(0.01)

    peers = (PEERS[0], Peer("wrong", wrong))
    with (
        alternatives(small(), mode, peers) as found,
        pytest.raises(DisagreementError, match="wrong: the output is off by"),
    ):
        agree(found, 1e-3)


def test_the_check_of_one_tensor_and_of_which_there_are() -> None:
    right = {"x": torch.tensor([1.0, 100.0]), "y": torch.zeros(2)}
    check({"a": right, "b": {**right, "x": torch.tensor([1.05, 100.0])}}, "a", 1e-3)
    for wrong, message in [
        ({**right, "x": torch.tensor([1.2, 100.0])}, "b: x is off by 0.002"),
        ({**right, "x": torch.tensor([1.0, torch.nan])}, "b: x is off by nan"),
        ({**right, "x": torch.ones(3)}, r"b: x is \(3,\)"),
        ({"x": right["x"]}, "the same tensors: y"),
    ]:
        with pytest.raises(DisagreementError, match=message):
            check({"a": right, "b": wrong}, "a", 1e-3)


def test_a_missing_verb_leaves_its_rows_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import wn_surgery

    # The package fetches a name from its home when it is first used.
    monkeypatch.delattr(wn_surgery, "fuse", raising=False)
    monkeypatch.delitem(wn_surgery._HOME, "fuse")
    with alternatives(small(), NO_GRAD) as found:
        assert not {"ours fused", "ours native"} & {each.name for each in found}
    (table, *_) = next(case for case in CASES if case.name == "rnn").tables(True, False, "cpu")
    assert "no fuse()" in table.left_out["ours fused"]


def test_the_sizes_that_the_cases_promise() -> None:
    def convolutions(model: nn.Module) -> int:
        return sum(isinstance(m, nn.Conv1d | nn.Conv2d) for m in model.modules())

    assert convolutions(models.TCN()) == 17
    assert convolutions(models.WaveNet()) == 93
    gan = models.GAN(nn.Identity())
    # As published: five convolutions and a last one in each of 5, seven and one in each of 3.
    assert convolutions(gan.periods) == 5 * 6 and convolutions(gan.scales) == 3 * 8
    assert sum(p.numel() for p in gan.periods.parameters()) == 5 * 8_218_433
    assert sum(p.numel() for p in gan.scales.parameters()) == 3 * 9_870_209
    assert {name for target in TARGETS + GPU_TARGETS for name in target.cases} <= {
        case.name for case in CASES
    }
    assert {row for target in TARGETS + GPU_TARGETS for row in target.rows} <= {
        peer.name for peer in PEERS
    }
    assert set(MODELS) <= {case.name for case in CASES}


def test_a_gan_step_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(80, 256), nn.Flatten())
    gan = models.GAN(generator, narrow=32)
    mel, real = torch.randn(1, 2, 80), torch.randn(1, 1, 512)
    entered = []

    class Block:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    losses = models.gan_step(gan, mel, real, Block)
    assert losses.shape == (2,) and not losses.requires_grad and losses.isfinite().all()
    assert entered == ["in", "out"] * 2
    assert all(p.grad is not None and p.grad.any() for p in gan.parameters())


@pytest.mark.parametrize("mode", [NO_GRAD, STEP])
@pytest.mark.parametrize(("name", "shape", "dim"), operators.KINDS)
def test_the_operators_agree(mode: Mode, name: str, shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    made = operators.Operator((6, 5, 4), dim % 3, "cpu")
    found = made.alternatives(mode)
    assert [each.name for each in found] == ["copy", "copy (A/A)", "torch", "ours"]
    agree(found, 1e-5)
    assert len(found[2].outcome()) == (3 if mode == STEP else 1)
    assert operators.small(shape)[2:] == shape[2:]
    with operators.beside_copies(operators.middle_dim((4, 6, 3), "cpu"), mode) as rows:
        agree(rows, 1e-5)
        assert {each.name for each in rows} >= {"copy", "copy (A/A)", "legacy", "torch", "ours"}


def test_the_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [*(case.name for case in CASES), "plan"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "tcn,tnc"], "no case tnc; there are hifigan-1frame"),
        (["--only", ","], "no case ,; there are hifigan-1frame"),
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--alone", "--compiled"], "--alone is for the CPU"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--gpu", "--only", "tcn"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_a_partial_run_does_not_replace_a_whole_one() -> None:
    def name(*words: str) -> str:
        return cli.destination(cli.parser().parse_args(words)).name

    assert name() == "cpu.json" and name("--gpu") == "gpu.json"
    assert name("--quick", "--only", "wavenet,plan,tcn") == "cpu-quick-tcn-wavenet.json"
    assert name("--out", "x.json") == "x.json"


def test_one_case_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    out = tmp_path / "rnn.json"
    assert cli.main(["--quick", "--rounds", "2", "--only", "rnn", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "## rnn, forward+backward" in printed and "| plain (A/A)" in printed
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [table["mode"] for table in result["tables"]] == list(MODES)
    for table in result["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert rows[BASE]["ratio"] == 1.0 and table["rounds"] == 2
        assert all(row["minimum_s"] > 0 for row in rows.values())
        assert rows.keys() | table["left_out"].keys() >= {"legacy", "torch", "ours", "ours fused"}
        assert ("ours folded" in rows) == (table["mode"] == NO_GRAD)
    assert result["failures"] == [] and result["quick"] is True


@pytest.mark.processes
def test_alternatives_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names = [BASE, "torch"]
    with alone.processes("small", 1, True, names) as calls:
        found = compare(calls, base=BASE, rounds=2, timer=alone.timed, least=0.0)
        ended = calls["torch"]
        ended.end()
        with pytest.raises((RuntimeError, OSError)):
            ended()
    assert list(found.timings) == names and found.repeats == 1
    assert all(second > 0 for timing in found.timings.values() for second in timing.rounds)


def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    out = tmp_path / "rnn.json"
    words = ["--quick", "--rounds", "1", "--only", "rnn", "--out", str(out), "--resume"]
    assert cli.main(words) == 0
    whole = json.loads(out.read_text(encoding="utf-8"))
    lost = whole["tables"].pop(1)
    out.write_text(json.dumps(whole), encoding="utf-8")
    capsys.readouterr()
    assert cli.main(words) == 0
    again = json.loads(out.read_text(encoding="utf-8"))["tables"]
    assert again[:2] == whole["tables"] and again[2]["mode"] == lost["mode"]
    assert capsys.readouterr().out.count("## rnn") == 1
    # Not with what another version has measured.
    whole["environment"]["torch"] = "1.0"
    out.write_text(json.dumps(whole), encoding="utf-8")
    assert cli.main(words) == 0
    assert "beginning anew" in capsys.readouterr().out


def test_alternatives_that_disagree_fail_loudly(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    threads: None,
) -> None:
    def wrong(workload: Workload, model: nn.Module) -> None:
        model.get_parameter("cell.input.bias").data.add_(1.0)

    monkeypatch.setattr("benchmarks.cases.alternatives", lambda workload, mode, *_, **__: (
        alternatives(workload, mode, (PEERS[0], Peer("wrong", wrong)))
    ))  # fmt: skip
    out = tmp_path / "rnn.json"
    assert cli.main(["--quick", "--rounds", "1", "--only", "rnn", "--out", str(out)]) == 2
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["tables"] == [] and len(result["failures"]) == 3
    assert "FAILED  rnn, forward+backward: wrong: the output is off" in capsys.readouterr().out


def test_planning_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    out = tmp_path / "plan.json"
    code = plan.main(["--sizes", "700", "--rounds", "1", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    (size,) = result["sizes"]
    assert size["modules"] == 703 and size["matched"] == 560
    assert result["growth_per_module"] == 1.0
    assert code == 0 and "modules in" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_scale_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "scale.json"
    assert scale.main(["--rounds", "1", "--cases", "llama tiny", "--out", str(out)]) == 0
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert case["weights"] == 8 and case["parameters"] == 8 * 8 * 9 + 3 * 8
    assert case["seconds"] == case["plan_s"] + case["apply_s"] + case["remove_s"] > 0
    assert "llama tiny: 0.0 billion parameters, 8 weights" in capsys.readouterr().out
    assert {part for target in SCALE_TARGETS for part in target.parts} <= scale.CASES.keys()


def test_a_part_reads_nothing_but_weights() -> None:
    layers: list[nn.Module] = [nn.Linear(3, 4), nn.Linear(4, 2)]
    part = gpu.Part("p", layers, {"types": "torch.nn.Linear"})
    assert part.elements == 20
    for mode in (NO_GRAD, STEP):
        with alternatives(part.workload(), mode) as rows:
            agree(rows, 1e-5)
            assert "legacy" in {row.name for row in rows}
    with alternatives(gpu.Part("p", layers, part.rules, torch.bfloat16).workload(), STEP) as rows:
        agree(rows, 2e-2)
        assert rows[0].outcome()["the output"].dtype == torch.bfloat16


def test_training_and_generating_as_users_do(
    threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frameworks = importlib.import_module("benchmarks.frameworks")
    out = tmp_path / "frameworks.json"
    cases = ["lightning-mlp-8x64", "generate-16"]
    code = frameworks.main(["--rounds", "1", "--steps", "1", "--out", str(out), "--only", *cases])
    assert code in (0, 1)  # a target says how long something takes
    tables = json.loads(out.read_text())["tables"]
    assert [table["case"] for table in tables] == cases
    names = [[row["name"] for row in table["rows"]] for table in tables]
    theirs = ["plain", "plain (A/A)", "legacy", "torch"]
    native = [] if why_not() else ["ours native"]
    assert names == [
        [*theirs, "ours", "ours fused", "ours once per step", *native],
        [*theirs, "ours"],
    ]
    assert capsys.readouterr().out.count("at least") == 2


def test_a_step_and_its_parts(
    threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = importlib.import_module("benchmarks.steps")
    out = tmp_path / "steps.json"
    asked = ["--models", "tcn", "--optimizers", "fused", "--micro-batches", "2"]
    assert steps.main([*asked, "--rounds", "1", "--out", str(out)]) == 0
    (table,) = json.loads(out.read_text())["tables"]
    for row in table["rows"]:
        parts = [row[f"{part}, ms"] for part in steps.PARTS]
        assert min(parts) >= 0 and max(parts) > 0
    assert "| clipping, ms |" in capsys.readouterr().out


def test_rows_that_do_not_train_alike_are_found() -> None:
    frameworks = importlib.import_module("benchmarks.frameworks")
    rows = {name: frameworks.Row() for name in ("plain", "plain (A/A)", "torch", "ours")}
    for name, row in rows.items():
        row.result = torch.tensor([1.0, 1.1 if name == "ours" else 1.2])
    with pytest.raises(RuntimeError, match="torch and ours do not give the same"):
        frameworks.agree(rows)
    rows["ours"].result = torch.tensor([1.0, 1.2])
    frameworks.agree(rows)
