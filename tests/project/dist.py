"""Build the wheel and the sdist, check them, and install each where nothing else is: `make dist`.

The new environments get the declared dependencies as links to those that are here, so nothing is
downloaded: pip refuses a dependency that is missing, and an undeclared one cannot be imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"

USE = """
import importlib.util, sys
import torch, wn_surgery as wn
from wn_surgery import checkpoints, export, rules, training
assert wn.__file__.startswith(sys.prefix), wn.__file__
assert importlib.util.find_spec("callbacks") is None
assert importlib.util.find_spec("wn_surgery.callbacks.lightning") is not None
model = torch.nn.Sequential(torch.nn.Linear(4, 2))
before = model[0].weight.detach().clone()
assert wn.apply(model, "linears").changed == ("0.weight",)
assert wn.remove(model).changed == ("0.weight",)
assert torch.equal(model[0].weight, before)
print(wn.__version__)
"""

SAVE = """
import torch, wn_surgery as wn
model = torch.nn.Sequential(torch.nn.Linear(4, 2))
wn.apply(model, "linears")
torch.save(model.state_dict(), "model.pt")
"""


def run(*command: str | Path, cwd: Path = ROOT, code: int = 0) -> str:
    """What a command prints, its errors last; it ends with the code, or this ends."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode != code:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def needed(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that these requirements lead to, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(Requirement(line), "") for line in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        known = requirement.name in found
        found[requirement.name] = here = importlib.metadata.distribution(requirement.name)
        for each in [*requirement.extras] if known else ["", *requirement.extras]:
            waiting.extend((Requirement(line), each) for line in here.requires or [])
    return found


def environment(folder: Path, requirements: list[str]) -> Path:
    """A new environment that has these requirements and nothing else."""
    venv.create(folder, with_pip=True)
    # Python 3.11 puts an old one there.
    run(folder / "bin" / "python", "-m", "pip", "uninstall", "--yes", "setuptools")
    (site,) = folder.glob("lib/python*/site-packages")
    for name, distribution in needed(requirements).items():
        files = distribution.files
        assert files is not None, f"{name} does not say what its files are"
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin"


def check_wheel(wheel: Path) -> tuple[list[str], list[str]]:
    """What a wheel requires, and what its command line does; it holds nothing but the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert tops == {"wn_surgery", PurePosixPath(metadata).parts[0]}, tops
    assert "wn_surgery/py.typed" in names
    assert "wn_surgery/callbacks/lightning/callback.py" in names
    required = re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
    core = [line for line in required if "extra ==" not in line]
    extra = [line for line in required if re.search(r'extra == "(cli|yaml)"', line)]
    # The package itself, for another of its extras.
    extra = [line.split(";")[0].strip() for line in extra if not line.startswith("wn-surgery")]
    return core, extra


def check_command_line(wheel: Path, requirements: list[str]) -> None:
    """The commands, where the extra `cli` is all that is installed, print no warning."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        bin_ = environment(there / "venv", requirements)
        run(bin_ / "python", "-m", "pip", "install", "--no-index", wheel, cwd=there)
        said = run(bin_ / "python", "-c", SAVE, cwd=there)
        said += run(bin_ / "wn-surgery", "inspect", "model.pt", cwd=there)
        said += run(bin_ / "wn-surgery", "strip", "model.pt", "plain.pt", cwd=there)
        assert "warning" not in said.lower(), said
        print(f"{wheel.name}[cli]: inspects and strips a file without a warning")


def main() -> int:
    """Do all of it."""
    shutil.rmtree(DIST, ignore_errors=True)
    # The wheel is built from the unpacked sdist, so neither holds what an old build left behind.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    print(run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist).strip())
    required, extra = check_wheel(wheel)
    source = (ROOT / "wn_surgery" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE)
    with tarfile.open(sdist) as archive:
        assert f"wn_surgery-{version}/wn_surgery/py.typed" in archive.getnames()
    for built, also in ((wheel, []), (sdist, ["setuptools"])):
        with tempfile.TemporaryDirectory() as folder:
            there = Path(folder)
            bin_ = environment(there / "venv", [*required, *also])
            pip = (bin_ / "python", "-m", "pip")
            run(*pip, "install", "--no-index", "--no-build-isolation", built, cwd=there)
            run(*pip, "check", cwd=there)
            assert run(bin_ / "python", "-c", USE, cwd=there).splitlines()[0] == version
            said = run(bin_ / "wn-surgery", "--help", cwd=there, code=1)
            assert "pip install 'wn-surgery[cli]'" in said, said
            print(f"{built.name}: installed with {', '.join(required)} alone; {version} works")
    check_command_line(wheel, [*required, *extra])
    return 0


if __name__ == "__main__":
    sys.exit(main())
