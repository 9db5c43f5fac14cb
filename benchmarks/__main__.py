"""Measure what weight norm costs: ``python -m benchmarks`` (``--list`` says what there is)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import alone, gpu, plan, report
from benchmarks.cases import CASES, Case, Table
from benchmarks.measure import Comparison, Timer, clocked, compare, keep_memory
from benchmarks.peers import Alternative, DisagreementError, agree
from benchmarks.targets import COMPILED_TARGETS, GPU_TARGETS, TARGETS, Verdict, judge

PLAN = "plan"
RESULTS = Path(__file__).parent / "results"
QUICK_ROUNDS = 5
# What rounding may change, relative to the largest element: the orders of summing differ.
TOLERANCE = 1e-3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"python -m benchmarks {PLAN} --help: planning alone, with its own options",
    )
    made.add_argument("--quick", action="store_true", help="small sizes and few rounds: minutes")
    made.add_argument("--gpu", action="store_true", help="everything on a CUDA device")
    made.add_argument("--compiled", action="store_true", help="also under torch.compile (slow)")
    made.add_argument("--alone", action="store_true", help="each row in a process of its own")
    made.add_argument("--only", metavar="NAME,...", help="these cases, by the names of --list")
    made.add_argument("--rounds", type=int, metavar="N", help="how often each row is measured")
    made.add_argument("--out", type=Path, metavar="PATH", help="where the JSON goes")
    made.add_argument("--resume", action="store_true", help="keep what PATH has already")
    made.add_argument("--list", action="store_true", help="list the cases and do nothing")
    return made


def chosen(only: str | None, gpu_run: bool) -> list[str]:
    """The names to run, in order.

    Args:
        only: what ``--only`` got.
        gpu_run: planning is the same with and without a GPU, so it is left out there.

    Raises:
        ValueError: a name is unknown; the message lists those there are.
    """
    known = [case.name for case in CASES] + [PLAN]
    if only is None:
        return [name for name in known if not (gpu_run and name == PLAN)]
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"no case {', '.join(unknown) or only}; there are {', '.join(known)}")
    return [name for name in known if name in names]


def destination(args: argparse.Namespace) -> Path:
    """Where the results go: a partial run does not replace those of a whole one."""
    if args.out is not None:
        return Path(args.out)
    parts = ["gpu" if args.gpu else "cpu"]
    parts += [flag for flag in ("quick", "compiled", "alone") if getattr(args, flag)]
    if args.only is not None:
        parts += [name for name in chosen(args.only, args.gpu) if name != PLAN]
    return RESULTS / f"{'-'.join(parts)}.json"


def run_table(
    case: Case, place: int, table: Table, args: argparse.Namespace
) -> tuple[Any, list[Verdict]]:
    """Check that the alternatives of a case's table ``place`` agree, time them, and print it.

    Raises:
        DisagreementError: they do not agree; nothing was timed.
    """
    title = report.heading(case.name, table.variant, table.mode, table.compiled)
    print(f"\n## {title}\n\n{table.about}\n", flush=True)
    for name, why in table.left_out.items():
        print(f"left out: {name}: {why}")
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else case.rounds)
    with table.alternatives(None) as found:
        agree(found, TOLERANCE)
        names = [each.name for each in found]
        times = None if args.alone else _together(found, table.base, rounds, args.gpu)
        extra = {each.name: gpu.profiled(each.call) for each in found} if args.gpu else {}
    if times is None:
        with alone.processes(case.name, place, args.quick, names) as calls:
            times = compare(calls, base=table.base, rounds=rounds, timer=alone.timed)
    print(report.markdown(times, extra), flush=True)
    verdicts: list[Verdict] = []
    # The targets are about full sizes, and on a GPU about eager mode.
    if not args.quick and not (table.compiled and args.gpu):
        targets = GPU_TARGETS if args.gpu else COMPILED_TARGETS if table.compiled else TARGETS
        verdicts = judge(case.name, table.mode, times, targets)
    show(verdicts)
    data = {
        "case": case.name,
        "variant": table.variant,
        "mode": table.mode,
        "compiled": table.compiled,
        "about": table.about,
        "base": table.base,
        "rounds": rounds,
        "calls_a_round": times.repeats,
        "rows": report.as_data(times, extra),
        "left_out": table.left_out,
        "targets": report.verdicts_as_data(verdicts),
    }
    return data, verdicts


def _together(found: Sequence[Alternative], base: str, rounds: int, on_gpu: bool) -> Comparison:
    def settle() -> None:
        for each in found:
            each.settle()

    timer: Timer = gpu.timed if on_gpu else clocked()
    calls = {each.name: each.call for each in found}
    return compare(calls, base=base, rounds=rounds, timer=timer, settle=settle)


def show(verdicts: Sequence[Verdict]) -> None:
    """Print which targets are met."""
    if verdicts:
        print()
    for verdict in verdicts:
        print(verdict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for.

    Returns:
        0 if every target that was measured is met, 1 if one is missed, 2 if alternatives
        disagree or the arguments are wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [PLAN]:
        return plan.main(words[1:])
    made = parser()
    args = made.parse_args(words)
    if args.list:
        for case in CASES:
            print(f"{case.name:16}{case.summary}")
        print(f"{PLAN:16}{(plan.__doc__ or '').partition(chr(10))[0]}")
        return 0
    try:
        names = chosen(args.only, args.gpu)
        if args.rounds is not None and args.rounds < 1:
            raise ValueError(f"--rounds {args.rounds}: expected at least 1")
        if args.alone and (args.gpu or args.compiled):
            raise ValueError("--alone is for the CPU, and for models that are not compiled")
        if args.gpu and not torch.cuda.is_available():
            raise ValueError("--gpu: torch finds no CUDA device")
    except ValueError as error:
        made.error(str(error))
    torch.set_num_threads(1)
    failures, verdicts = run_cases(args, names)
    planning = 0
    if PLAN in names:
        print(f"\n## {PLAN}\n")
        planning = plan.main(_plan_arguments(args))
    missed = [verdict for verdict in verdicts if not verdict.met]
    print(f"\n{len(verdicts) - len(missed)} targets met, {len(missed)} missed")
    for failure in failures:
        print(f"FAILED  {failure}")
    return 2 if failures else int(bool(missed or planning))


def run_cases(args: argparse.Namespace, names: Sequence[str]) -> tuple[list[str], list[Verdict]]:
    """Run the tables of all cases, writing the results after each."""
    device = "cuda" if args.gpu else "cpu"
    out = destination(args)
    result: dict[str, Any] = {
        "benchmark": "weights",
        "environment": report.environment(device),
        "quick": args.quick,
        "clock": "CUDA events" if args.gpu else "process CPU time, one thread",
        "alone": args.alone,
        "tables": [],
        "parts": [],
        "failures": [],
    }
    if args.resume:
        result |= report.kept(out, result)
    verdicts = [
        Verdict(target["target"], target["value"], target["bound"], target["met"])
        for measured in (*result["tables"], *result["parts"])
        for target in measured["targets"]
    ]
    done = {report.title_of(table) for table in result["tables"]}
    cases = [case for case in CASES if case.name in names]
    for case in cases:
        for place, table in enumerate(case.tables(args.quick, args.compiled, device)):
            if report.heading(case.name, table.variant, table.mode, table.compiled) in done:
                continue
            if table.compiled:
                torch.compiler.reset()
            try:
                data, judged = run_table(case, place, table, args)
            except DisagreementError as error:
                title = report.heading(case.name, table.variant, table.mode, table.compiled)
                result["failures"].append(f"{title}: {error}")
                print(f"FAILED  {error}", flush=True)
            else:
                result["tables"].append(data)
                verdicts += judged
            report.write(out, result)
    if args.gpu and args.only is None:
        there = {measured["part"] for measured in result["parts"]}
        for measured, judged in gpu.run_parts(args.quick, there):
            result["parts"].append(measured)
            verdicts += judged
            report.write(out, result)
    if cases:
        print(f"\nwritten to {out}")
    return result["failures"], verdicts


def _plan_arguments(args: argparse.Namespace) -> list[str]:
    words = [] if args.rounds is None else ["--rounds", str(args.rounds)]
    if args.quick:
        # Smaller, and not in place of the whole result.
        words += ["--sizes", "1000", "10000", "--out", str(RESULTS / "plan-quick.json")]
    return words


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
