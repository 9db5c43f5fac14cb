"""Write the table of docs/scaling.md: each engine against one process.

``python docs/make_engines_table.py`` makes it from docs/engines/results.json. With ``--run`` it
first trains on all engines, which takes some minutes, and writes that file. DeepSpeed's rows are
run where it is installed, and kept as they are elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "scaling.md", HERE / "engines" / "results.json"
BEGIN, END = "<!-- engines: begin -->\n", "<!-- engines: end -->\n"
DEEPSPEED = tuple(f"DeepSpeed, ZeRO-{stage}" for stage in (1, 2, 3))
ENGINES = {
    # Where weight norm is applied, and what was run.
    "DDP": ("before it", ""),
    "FSDP1, use_orig_params=True": ("before it", ""),
    "FSDP1, use_orig_params=False": ("before it", "one weight decay for all"),
    "FSDP2": ("before `fully_shard`", ""),
    "tensor parallelism": ("after `parallelize_module`", ""),
    "tensor parallelism, then FSDP2": ("between the two", "four processes"),
    "pipeline, GPipe": ("before the model is split", "by hand, and by torch's tracer"),
    "accelerate, DDP": ("before `prepare`", "`save_state` and `load_state`"),
    "accelerate, FSDP1": ("before `prepare`", "`save_state` and `load_state`"),
    "accelerate, FSDP2": ("before `prepare`", "`save_state` and `load_state`"),
    "Trainer, fsdp": ("by `WeightNormCallback`", "four steps, against DDP"),
    **dict.fromkeys(DEEPSPEED, ("before `deepspeed.initialize`", "")),
}


def updated(page: str) -> str:
    """The page with the table as the results are now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = [
        "| engine | apply weight norm | run | against one process | resumed |",
        "|" + "---|" * 5,
    ]
    for name, (where, what) in ENGINES.items():
        found = results["engines"][name]
        steps = what if "steps" in what else ", ".join(filter(None, ["20 steps", what]))
        cells = [name, where, steps, _told(found["difference"]), _told(found.get("resumed"))]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{before}{BEGIN}\n"
        + "\n".join([*lines, "", f"Run with {versions}."])
        + f"\n\n{END}{after}"
    )


def _told(difference: float | None) -> str:
    if difference is None:
        return "–"
    return f"{difference:.0e}" if difference else "the same bits"


def run() -> None:
    """Train on every engine that is there, and write what was found."""
    import torch

    sys.path.insert(0, str(HERE.parent))
    from tests.distributed.launching import launch

    found: dict[str, Any] = {}
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
    engines, versions = found.get("engines", {}), found.get("versions", {})
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    parts: list[tuple[int, tuple[str, ...]]] = [(2, ()), (4, ())]
    parts += [(2, DEEPSPEED)] if has_deepspeed else []
    with tempfile.TemporaryDirectory() as folder:
        for processes, names in parts:
            file = Path(folder, "found.pt")
            launch("engine_runs.py", file, folder, *names, processes=processes)
            for name, result in torch.load(file, weights_only=True).items():
                print(name, result["difference"])
                numbers = {key: value for key, value in result.items() if isinstance(value, float)}
                engines[name] = numbers
    versions["Python"] = platform.python_version()
    for package in (
        "torch",
        "accelerate",
        "transformers",
        *(["deepspeed"] if has_deepspeed else []),
    ):
        versions[package] = importlib.metadata.version(package)
    ordered = {name: engines[name] for name in ENGINES}
    text = json.dumps({"versions": versions, "engines": ordered}, indent=2) + "\n"
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if "--run" in sys.argv[1:]:
        run()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
