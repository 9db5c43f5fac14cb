"""Builds the compiled path, once, with the compiler that is there; and loads it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from wn_surgery.errors import ModelError
from wn_surgery.fused.evaluator import Lasting, stale
from wn_surgery.fused.sharing import STEP
from wn_surgery.norm.math import gradients, values
from wn_surgery.norm.nodes import check_unwritten, differentiable_gradients

__all__ = ["load", "why_not"]

_SOURCE = Path(__file__).with_name("slots.cpp")


@functools.cache
def load() -> Any:
    """The compiled module: from the folder of torch's extensions, or built now, in half a minute.

    Its ``lanes`` are the floats in a vector of torch's kernels, whose bits its own loops then give;
    0 where they do not, and torch's kernels compute all weights. ``knows_middle`` says whether it
    gives the bits of torch's norms over a middle axis; if not, torch computes them.

    Raises:
        ModelError: it cannot be built here (``kind="fusion"``).
    """
    name = _name()
    place = _folder() / name / f"{name}{EXTENSION_SUFFIXES[0]}"
    native = _kept(name, place) or _built(name, place)
    frames = sys._getframe(), _ended()
    native.lanes, native.knows_middle = native.setup(
        values, gradients, differentiable_gradients, check_unwritten, _raise_stale, STEP, *frames
    )
    return native


@functools.cache
def why_not() -> str:
    """Why there is no compiled module here; empty where there is."""
    try:
        load()
    except ModelError as error:
        return str(error)
    return ""


def _ended() -> FrameType:
    return sys._getframe()


def _raise_stale(lasting: Lasting, member: int) -> None:
    raise stale(lasting.names[member])


def _name() -> str:
    # What is built for one torch or Python does not fit another, and may crash it.
    built_for = torch.__version__, sys.implementation.cache_tag, platform.machine(), _flags()
    digest = hashlib.sha256(repr(built_for).encode())
    for source in sorted([_SOURCE, *_SOURCE.parent.glob("*.h")]):
        digest.update(source.read_bytes())
    return f"wn_surgery_native_{digest.hexdigest()[:16]}"


def _flags() -> list[str]:
    if sys.platform == "win32":
        return []
    # The instructions that torch itself uses here. A product that is added must be rounded first,
    # as torch does it.
    vectors = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mfma"]}
    return ["-O3", "-ffp-contract=off", *vectors.get(torch.backends.cpu.get_cpu_capability(), [])]


def _folder() -> Path:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def _kept(name: str, place: Path) -> Any:
    """What is in the folder; ``None`` where nothing is, or what another machine has built."""
    if not place.exists():
        return None
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None
    assert spec.loader is not None
    try:
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    except ImportError:
        return None
    return made


def _built(name: str, place: Path) -> Any:
    # In a folder of its own: in a common one torch waits for the lock of a process that has died.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            extension = importlib.import_module("torch.utils.cpp_extension")
            with _ninja_on_the_path():
                made = extension.load(
                    name, [str(_SOURCE)], build_directory=folder, extra_cflags=_flags()
                )
        except (ImportError, OSError, RuntimeError) as error:
            raise ModelError(
                "mode='native' is compiled on first use, which failed here: it needs a C++ "
                "compiler that torch supports, and pip install 'wn-surgery[native]'; "
                f"mode='auto' needs neither. {error}",
                kind="fusion",
            ) from error
        _keep(Path(made.__file__), place)
    return made


@contextmanager
def _ninja_on_the_path() -> Generator[None]:
    """Let torch find the ninja beside this Python, also where its environment is not active."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _keep(made: Path, place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, whatever other processes do.
        with tempfile.TemporaryDirectory(dir=place.parent) as beside:
            Path(shutil.copy(made, beside)).replace(place)
    except OSError as error:
        warnings.warn(
            f"the compiled path could not be kept ({error}), so that each process builds it again; "
            "let TORCH_EXTENSIONS_DIR name a folder that can be written to",
            stacklevel=2,
        )
