"""Whatever was exported, as a function of the model's inputs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from wn_surgery.errors import ExportError

__all__ = ["Exported", "Inputs", "Session", "copied", "runner"]


class Session(Protocol):
    """An onnxruntime ``InferenceSession``, as far as it is used here."""

    def get_inputs(self) -> list[Any]:
        """The graph's inputs, each with a ``name``."""
        ...

    def run(self, output_names: None, input_feed: dict[str, Any], /) -> list[Any]:
        """The outputs, as arrays."""
        ...


Exported: TypeAlias = (
    str | PathLike[str] | torch.export.ExportedProgram | Session | Callable[..., Any]
)
"""What can be run: a file, an exported program, an onnxruntime session, a callable."""

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor, positional arguments, or keyword arguments."""


def runner(exported: Exported) -> Callable[..., Any]:
    """What ``exported`` is, as a callable.

    Raises:
        ExportError: it is of an unknown kind, or no such file.
        ModuleNotFoundError: onnxruntime is needed and is not installed.
    """
    if isinstance(exported, str | PathLike):
        return _from_file(Path(exported))
    if isinstance(exported, torch.export.ExportedProgram):
        return cast("Callable[..., Any]", exported.module())
    if hasattr(exported, "get_inputs") and hasattr(exported, "run"):
        return _Session(cast(Session, exported))
    if callable(exported):
        return exported
    raise ExportError(
        f"cannot run a {type(exported).__name__}; expected a file, an ExportedProgram, an "
        "onnxruntime session, or a callable"
    )


def _from_file(path: Path) -> Callable[..., Any]:
    if not path.is_file():
        raise ExportError(f"{path} is no file; expected what was exported")
    if path.suffix == ".onnx":
        return _Session(_open(path))
    if path.suffix == ".pt2":
        if _is_compiled(path):
            from torch._inductor import aoti_load_package

            return cast("Callable[..., Any]", aoti_load_package(str(path)))
        return cast("Callable[..., Any]", torch.export.load(path).module())
    if path.suffix in (".pt", ".ts"):
        return cast("Callable[..., Any]", torch.jit.load(path))  # type: ignore[no-untyped-call]
    raise ExportError(
        f"{path.name}: expected .onnx, .pt2, or for TorchScript .pt or .ts; load it and give "
        "verify() a callable instead"
    )


def _is_compiled(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        raise ExportError(
            f"{path} is no .pt2 archive; expected one that torch.export or AOTInductor wrote"
        )
    with zipfile.ZipFile(path) as archive:
        return any("/aotinductor/" in name for name in archive.namelist())


def _open(path: Path) -> Session:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"running {path.name} needs onnxruntime; pip install 'wn-surgery[export]'"
        ) from error
    return cast(Session, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))


class _Session:
    """An onnxruntime session that is called as the model is."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._names = [each.name for each in session.get_inputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The outputs, as arrays."""
        feed = dict(zip(self._names, _flat(args), strict=False))
        given = len(list(_flat(args))) + len(kwargs)
        feed.update({name: value for name, value in kwargs.items() if isinstance(value, Tensor)})
        if set(feed) != set(self._names) or given > len(self._names):
            names = f", named {list(kwargs)}" if kwargs else ""
            raise ExportError(
                f"the ONNX graph takes {len(self._names)} inputs ({', '.join(self._names)}); got "
                f"{given}{names}; give it what the model takes"
            )
        return self._session.run(None, {name: _array(name, feed[name]) for name in feed})


def _array(name: str, tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise ExportError(
            f"input {name} is bfloat16, which numpy and so onnxruntime's run() does not know; "
            "export with inputs in float32 or float16"
        )
    return tensor.detach().cpu().numpy()


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)


def copied(value: Any) -> Any:
    """The value with its tensors cloned: what runs may write into its inputs."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return value
