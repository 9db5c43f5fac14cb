"""The functions of this room in place of torch's, for code that cannot be edited.

torch's functions stay the objects that they are, and get other code. So whoever holds one gets the
new behaviour, and the old one afterwards: a module that imported it long ago, a table, a default
argument.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from wn_surgery.errors import CompatError

__all__ = ["install", "installed", "is_installed", "uninstall"]


# They run with the globals of torch's modules.
def _legacy(module: Any, name: str = "weight", dim: Any = 0) -> Any:
    from wn_surgery.compat.functions import weight_norm

    return weight_norm(module, name, dim)


def _remove(module: Any, name: str = "weight") -> Any:
    from wn_surgery.compat.functions import remove_weight_norm

    return remove_weight_norm(module, name)


def _parametrized(module: Any, name: str = "weight", dim: Any = 0) -> Any:
    from wn_surgery.compat.functions import parametrized_weight_norm

    return parametrized_weight_norm(module, name, dim)


def _remove_parametrizations(module: Any, tensor_name: str, leave_parametrized: bool = True) -> Any:
    from wn_surgery.compat.functions import remove_parametrizations

    return remove_parametrizations(module, tensor_name, leave_parametrized)


# By the module that defines it: `torch.nn.utils.weight_norm` is the function and a module.
_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch.nn.utils.weight_norm", "weight_norm"): _legacy,
    ("torch.nn.utils.weight_norm", "remove_weight_norm"): _remove,
    ("torch.nn.utils.parametrizations", "weight_norm"): _parametrized,
    ("torch.nn.utils.parametrize", "remove_parametrizations"): _remove_parametrizations,
}


class _Exchanged(NamedTuple):
    function: FunctionType
    ours: CodeType
    torchs: CodeType
    doc: str | None


class _State:
    lock = threading.Lock()
    count = 0
    exchanged: tuple[_Exchanged, ...] = ()


def is_installed() -> bool:
    """Whether torch's functions are replaced now.

    Example:
        >>> from wn_surgery import compat
        >>> compat.is_installed()
        False
    """
    return _State.count > 0


def install() -> tuple[str, ...]:
    """Put the functions of ``wn_surgery.compat`` in place of torch's, and return torch's names.

    They are replaced for the whole process, in each thread, and under every name that anybody has
    bound to them before; a process that is spawned has torch's. ``help`` and tracebacks show it.
    A second call counts: torch's come back when :func:`uninstall` has been called as often.

    Raises:
        CompatError: somebody else has replaced one of the functions, or torch has changed its
            arguments. Nothing is replaced.

    Example:
        >>> import torch
        >>> from wn_surgery import compat
        >>> compat.install()[:2]
        ('torch.nn.utils.weight_norm', 'torch.nn.utils.remove_weight_norm')
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 8))
        >>> layer = torch.nn.utils.remove_weight_norm(layer)  # torch's raises
        >>> compat.uninstall()
    """
    with _State.lock:
        if not _State.count:
            _State.exchanged = tuple(_found())
            for function, ours, _, doc in _State.exchanged:
                function.__code__ = ours
                function.__doc__ = f"Replaced by wn_surgery.compat.install().\n\n{doc}"
        _State.count += 1
    return tuple(f"{home.removesuffix('.weight_norm')}.{name}" for home, name in _STAND_INS)


def uninstall() -> None:
    """Give torch's functions back, if this is the last call that :func:`install` waits for.

    Raises:
        CompatError: they are not installed, or somebody else has replaced the code of one
            meanwhile. Nothing is given back.
    """
    with _State.lock:
        if not _State.count:
            raise CompatError("wn_surgery.compat is not installed; call install() first")
        if _State.count == 1:
            for function, ours, *_ in _State.exchanged:
                if function.__code__ is not ours:
                    raise CompatError(
                        f"somebody else has replaced the code of {_dotted(function)} since "
                        f"install(): it is {_place(function)} now; undo that first"
                    )
            for function, _, torchs, doc in _State.exchanged:
                function.__code__, function.__doc__ = torchs, doc
            _State.exchanged = ()
        _State.count -= 1


@contextmanager
def installed() -> Generator[tuple[str, ...]]:
    """Inside, the functions of ``wn_surgery.compat`` are in place of torch's; see :func:`install`.

    Contexts may be nested, and overlap in several threads: torch's functions come back when the
    last one ends, also by an exception.

    Raises:
        CompatError: see :func:`install` and :func:`uninstall`.

    Example:
        >>> from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
        >>> from wn_surgery import compat
        >>> vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=32))
        >>> vocoder.apply_weight_norm()
        >>> with compat.installed():
        ...     vocoder.remove_weight_norm()  # it raises without
    """
    names = install()
    try:
        yield names
    finally:
        uninstall()


def _found() -> Generator[_Exchanged]:
    for (home, name), stand_in in _STAND_INS.items():
        function, ours = getattr(import_module(home), name), stand_in.__code__
        if (
            not isinstance(function, FunctionType)
            or function.__module__ != home
            or function.__code__.co_freevars
            or _arguments(function.__code__) != _arguments(ours)
        ):
            raise CompatError(
                f"{home}.{name} is not torch's function, or has other arguments than it had: it is "
                f"{_place(function)}; call install() before it is replaced, or import from "
                "wn_surgery.compat instead"
            )
        yield _Exchanged(function, ours, function.__code__, function.__doc__)


def _arguments(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _dotted(function: FunctionType) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _place(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return repr(function) if code is None else f"{code.co_filename}, line {code.co_firstlineno}"
