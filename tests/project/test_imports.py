"""The core imports torch and bracex alone; everything else is imported where it is used."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]

OPTIONAL = [
    "accelerate",
    "hypothesis",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "peft",
    "pytest",
    "pytorch_lightning",
    "rich",
    "safetensors",
    "sklearn",
    "tensorboard",
    "transformers",
    "triton",
    "typer",
    "yaml",
]

# Each name is missing as it is where it is not installed: for find_spec as for import.
BLOCK = """
import importlib.abc, sys, warnings

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Missing())
# Without numpy torch itself warns, when it is imported and when it first looks for it.
warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
"""

WORK = """
import copy, pathlib, pickle, tempfile
import torch, wn_surgery as wn
from torch import nn
from wn_surgery.checkpoints.io import header

torch.manual_seed(0)
model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 1))
x = torch.randn(1, 2, 8)
expected = model(x)
print(wn.plan(model, "convolutions"))
assert len(wn.apply(model, {"names": "{0..2}", "types": "Conv1d"}).changed) == 2
assert torch.equal(model(x), expected)
model(x).sum().backward()
assert wn.sites(model)[0].held.g.grad is not None
assert {member.path for member in wn.fuse(model).members} == {"cpu"}
assert torch.equal(model(x), expected)
try:
    wn.fuse(model, "triton")
except wn.FusionError as error:
    assert "no CUDA device" in str(error) or "triton" in str(error), error
with wn.folded(model):
    model(x)
with wn.writable(model):
    nn.init.ones_(model[0].weight)
copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
assert torch.equal(copied(x), model(x))
out = model(x)
wn.migrate(model, to="legacy")
assert torch.equal(model(x), out)
assert len(wn.remove(model).changed) == 2
assert torch.equal(model(x), out)
wn.initialize_from_batch(wn.apply(model, "convolutions") and model, x)
print(wn.statistics(model))
assert torch.equal(wn.export.stripped_copy(model)(x), model(x))
with tempfile.TemporaryDirectory() as folder:
    old, new = f"{folder}/a.pt", f"{folder}/b.pt"
    torch.save({"net": model.state_dict()}, old)
    wn.checkpoints.convert_file(old, new)
    assert len(wn.checkpoints.inspect(old).tensors) == 2
    assert wn.checkpoints.compare(old, new).equal()
    lines = {"a.weight_g": ("F32", (1, 1), 4), "a.weight_v": ("F32", (1, 2), 8)}
    numbers = torch.tensor([10.0, 3.0, 4.0]).view(torch.uint8).tolist()
    old, new = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
    pathlib.Path(old).write_bytes(header.written(lines, None) + bytes(numbers))
    assert wn.checkpoints.convert_file(old, new).weights == ("a.weight",)
found = sorted({name.partition(".")[0] for name in sys.modules} & BLOCKED)
assert not found, found
"""


def python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_it_works_with_torch_and_bracex_alone() -> None:
    """All at once, which is as much as one by one: the traceback names what was missed."""
    python(f"BLOCKED = {set(OPTIONAL)!r}\n" + BLOCK + WORK)


def test_it_imports_nothing_that_torch_has_not() -> None:
    out = python(
        """
import sys, torch
before = set(sys.modules)
import wn_surgery
wn_surgery.remove(torch.nn.Linear(2, 2))
new = set(sys.modules) - before
assert not any(name.startswith("wn_surgery.callbacks") for name in new), new
print(*{name.partition(".")[0] for name in new} - set(sys.stdlib_module_names))
"""
    )
    assert set(out.split()) == {"bracex", "wn_surgery"}


def test_a_rule_file_without_yaml_names_the_extra(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text('rules: [{"types": "Linear"}]\n', encoding="utf-8")
    plain = tmp_path / "rules.json"
    plain.write_text('{"rules": [{"types": "Linear"}]}\n', encoding="utf-8")
    out = python(
        'BLOCKED = {"yaml"}\n'
        + BLOCK
        + f"""
import torch, wn_surgery as wn
layer = torch.nn.Linear(2, 2)
try:
    wn.apply(layer, {str(rules)!r})
except Exception as error:
    print(type(error).__name__, error)
print(wn.apply(layer, {str(plain)!r}).changed)
"""
    )
    error, changed = out.splitlines()[0], out.splitlines()[-1]
    assert "yaml" in error.lower() and "pip install" in error
    assert changed == "('weight',)"


def test_the_callback_without_lightning_names_the_extra() -> None:
    out = python(
        'BLOCKED = {"lightning", "pytorch_lightning"}\n'
        + BLOCK
        + """
try:
    import wn_surgery.callbacks.lightning
except ModuleNotFoundError as error:
    print(error)
"""
    )
    assert "pip install 'wn-surgery[lightning]'" in out


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_line_names_its_extra(missing: str) -> None:
    out = python(
        f"BLOCKED = {{{missing!r}}}\n"
        + BLOCK
        + """
from wn_surgery.cli import main
try:
    main()
except SystemExit as error:
    print(error.code)
"""
    )
    assert out == f"the command line needs {missing}: pip install 'wn-surgery[cli]'\n"


def test_plans_without_transformers_name_the_extra() -> None:
    out = python(
        'BLOCKED = {"transformers"}\n'
        + BLOCK
        + """
from wn_surgery.cli import main
sys.argv = ["wn-surgery", "plan", ".", "linears", "--json"]
try:
    main()
except SystemExit as error:
    assert error.code == 3
"""
    )
    assert "pip install 'wn-surgery[transformers]'" in out


# Rooms ------------------------------------------------------------------------------------------

GROUND = {"differences", "errors", "moved", "tables"}
FACES = {"callbacks", "cli"}


@cache
def imports() -> dict[str, set[str]]:
    """The modules of this library that each module imports when it is imported, by dotted name."""
    files = {
        ".".join(["wn_surgery", *path.relative_to(ROOT / "wn_surgery").with_suffix("").parts]): path
        for path in (ROOT / "wn_surgery").rglob("*.py")
        if "callbacks" not in path.parts
    } | {
        ".".join(["wn_surgery", *path.relative_to(ROOT).with_suffix("").parts]): path
        for path in (ROOT / "callbacks").rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: imports are absolute"
                for alias in node.names:
                    named = f"{node.module}.{alias.name}"
                    used = named if named in modules else str(node.module)
                    if used in modules:
                        found[module].add(used)
    return found


def room(module: str) -> str:
    return f"{module}.".split(".")[1]


def rooms() -> dict[str, set[str]]:
    """What each room may import, as its ``__init__`` says."""
    said = {}
    for path in [*(ROOT / "wn_surgery").glob("*/__init__.py"), ROOT / "callbacks" / "__init__.py"]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines = re.search(r"^In: .+^Out: .+^Imports: (.+)\.$", text, re.MULTILINE | re.DOTALL)
        assert lines, f"{path} says In:, Out: and Imports:"
        said[path.parent.name] = set(lines[1].split(", "))
    return said


def test_a_room_imports_what_it_says_and_no_more() -> None:
    used: dict[str, set[str]] = {}
    for module, imported in imports().items():
        if room(module) not in GROUND | {""}:
            others = {room(each) for each in imported} - {room(module), ""}
            used.setdefault(room(module), set()).update(others)
    assert used == rooms()


def test_rooms_stand_on_each_other_and_nothing_imports_a_face() -> None:
    said = rooms()
    order = list(graphlib.TopologicalSorter(said).static_order())  # raises where there is a circle
    assert order.index("norm") < order.index("rules") or "norm" not in said["rules"]
    for name, used in said.items():
        assert not used & FACES, f"{name} imports a face"
    for module, imported in imports().items():
        if room(module) in GROUND:
            assert {room(each) for each in imported} <= GROUND | {""}, module


def test_files_import_in_no_circle() -> None:
    graph = {
        module: {each for each in used if each != "wn_surgery"}
        for module, used in imports().items()
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())
