"""The core imports torch and bracex alone; everything else is imported where it is used."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import wn_surgery

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


def test_the_package_by_itself_imports_three_small_modules() -> None:
    """What torch's import takes is not made longer; the rest comes with the name that is used."""
    out = python(
        """
import importlib, typing, pathlib, sys
before = set(sys.modules)
import wn_surgery
new = set(sys.modules) - before
print(*(name for name in new if sys.modules[name].__spec__))  # an old path has none
"""
    )
    assert set(out.split()) == {"wn_surgery", "wn_surgery.errors", "wn_surgery.moved"}


def test_help_version_and_completion_need_no_torch() -> None:
    out = python(
        """
import os, sys
from wn_surgery.cli import main

def run(*words):
    sys.argv = ["wn-surgery", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code

run("--version")
run("--help")
for command in ("inspect", "doctor", "strip", "convert", "apply", "plan", "diff"):
    run(command, "--help")
os.environ |= {"_WN_SURGERY_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
os.environ["COMP_WORDS"] = "wn-surgery str"
run()
heavy = {"torch", "numpy", "yaml", "transformers", "wn_surgery.norm"} & set(sys.modules)
assert not heavy, heavy
"""
    )
    assert out.startswith("wn-surgery 0.") and out.count("Usage:") == 8
    assert out.splitlines()[-1] == "strip"


def test_each_public_name_is_there_and_where_type_checkers_see_it() -> None:
    tree = ast.parse((ROOT / "wn_surgery" / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: f"{node.module}.{alias.name}".removeprefix("wn_surgery.")
        for node in ast.walk(checked)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"{home}.{name}" for name, home in wn_surgery._HOME.items()}
    assert seen == homes | {room: room for room in ("checkpoints", "export")}
    found: dict[str, object] = {}
    exec("from wn_surgery import *", found)
    assert set(wn_surgery.__all__) <= set(found) & set(dir(wn_surgery))
    assert importlib.import_module("wn_surgery.plan").Plan is wn_surgery.Plan  # an old path
    assert found["plan"] is wn_surgery.plan
    for room in rooms().keys() - FACES - {"huggingface"}:
        assert getattr(wn_surgery, room) is importlib.import_module(f"wn_surgery.{room}")
    with pytest.raises(AttributeError, match="'wn_surgery' has no attribute 'aply'"):
        wn_surgery.aply  # noqa: B018


def test_what_a_model_needs_comes_with_its_pickle(tmp_path: Path) -> None:
    """Who unpickles a model has imported neither the package's names nor the room of savers."""
    (tmp_path / "theirs.py").write_text(
        "from huggingface_hub import PyTorchModelHubMixin\n"
        "from torch import nn\n\n\n"
        "class Theirs(nn.Module, PyTorchModelHubMixin):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(2, 2)\n"
    )
    start = f"import sys, torch, pickle; sys.path.insert(0, {str(tmp_path)!r}); "
    file = f"{str(tmp_path / 'model.pkl')!r}"
    python(
        f"""{start}
import theirs, wn_surgery as wn
model = theirs.Theirs()
wn.apply(model, "linears")
with open({file}, "wb") as opened:
    pickle.dump(model, opened)
"""
    )
    out = python(
        f"""{start}
import warnings
with open({file}, "rb") as opened:
    model = pickle.load(opened)
model.layer(torch.ones(1, 2)).sum().backward()
assert model.layer.parametrizations.weight.original0.grad is not None
assert "wn_surgery.model" not in sys.modules
before = model.layer.weight
model.layer.reset_parameters()
assert not torch.equal(model.layer.weight, before)
assert torch.equal(model.layer.weight, model.layer.parametrizations.weight.original1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.save_pretrained({str(tmp_path / "saved")!r})
assert "builds no weight norm on layer.weight" in str(caught[0].message)
from safetensors.torch import load_file
print(*sorted(load_file({str(tmp_path / "saved" / "model.safetensors")!r})))
"""
    )
    assert out.split() == ["layer.bias", "layer.weight"]


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


def test_an_older_transformers_is_refused() -> None:
    out = python(
        """
import transformers
transformers.__version__ = "5.22.1"
try:
    import wn_surgery.huggingface
except ImportError as error:
    print(error)
"""
    )
    assert "needs transformers 5.23 or newer, and 5.22.1 is installed" in out


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
