"""`compat.installed()`: torch's names lead to our functions, and back."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm, weight_norm

import wn_surgery as wn
from wn_surgery import compat

FUNCTIONS: list[Any] = [
    weight_norm,
    remove_weight_norm,
    parametrizations.weight_norm,
    parametrize.remove_parametrizations,
]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = [(function.__code__, function.__doc__) for function in FUNCTIONS]
    assert not compat.is_installed()
    yield
    assert not compat.is_installed()
    assert [(function.__code__, function.__doc__) for function in FUNCTIONS] == before


def layer() -> nn.Linear:
    return nn.Linear(3, 4)


def is_ours() -> bool:
    """Whether torch's names lead to our functions now."""
    made = [site.ours for site in wn.sites(parametrizations.weight_norm(layer()))]
    try:
        remove_weight_norm(parametrizations.weight_norm(layer()))
    except ValueError:
        assert made == [False]
        return False
    assert made == [True]
    return True


def test_they_are_in_place_inside_and_only_there() -> None:
    assert not is_ours()
    before = parametrizations.weight_norm(layer())
    with compat.installed() as names:
        assert compat.is_installed() and is_ours()
        assert "Replaced by wn_surgery.compat" in str(weight_norm.__doc__)
        for name in names:
            home, _, function = name.rpartition(".")
            assert getattr(eval(home, {"torch": torch}), function) in FUNCTIONS
        remove_weight_norm(before)  # what torch's applied earlier
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            legacy = torch.nn.utils.weight_norm(layer(), dim=None)  # type: ignore[arg-type]
        assert list(legacy.state_dict()) == ["bias", "weight_g", "weight_v"]
        parametrize.remove_parametrizations(legacy, "weight")
        spectral = parametrizations.spectral_norm(layer())
        parametrize.remove_parametrizations(spectral, "weight")  # torch's own
    assert type(before) is type(legacy) is type(spectral) is nn.Linear
    assert not is_ours()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(layer())


def default(module: nn.Module, norm: Callable[..., Any] = parametrizations.weight_norm) -> Any:
    return norm(module)


class Block:
    norm = staticmethod(parametrizations.weight_norm)


def test_however_it_was_bound() -> None:
    """By an import at the top of a module, in a table, a default, a class, a partial, a closure."""
    table = {"weight_norm": parametrizations.weight_norm}
    bound = parametrizations.weight_norm

    def closure(module: nn.Module) -> Any:
        return bound(module)

    ways: list[Callable[[nn.Module], Any]] = [
        default,
        Block.norm,
        table["weight_norm"],
        functools.partial(parametrizations.weight_norm, name="weight", dim=0),
        closure,
    ]
    with compat.installed():
        assert all(wn.sites(way(layer()))[0].ours for way in ways)
        meanwhile = types.ModuleType("meanwhile")
        exec("from torch.nn.utils.parametrizations import weight_norm", vars(meanwhile))
    assert not any(wn.sites(way(layer()))[0].ours for way in ways)
    # What was imported inside is torch's again, too.
    assert not wn.sites(meanwhile.weight_norm(layer()))[0].ours


def test_an_exception_inside_gives_torchs_back() -> None:
    with pytest.raises(KeyboardInterrupt), compat.installed():
        raise KeyboardInterrupt
    with pytest.raises(wn.ModelError, match="no parameter 'wait'"), compat.installed():
        weight_norm(layer(), "wait")
    assert not is_ours()


def test_nesting_and_install_count() -> None:
    compat.install()
    with compat.installed(), compat.installed():
        assert is_ours()
    assert is_ours()
    compat.install()
    compat.uninstall()
    assert is_ours()
    compat.uninstall()
    assert not is_ours()
    with pytest.raises(wn.CompatError, match="is not installed"):
        compat.uninstall()

    @compat.installed()
    def decorated() -> bool:
        return is_ours()

    assert decorated() and decorated() and not is_ours()


def test_threads_may_overlap() -> None:
    """The first to come leaves first: the other still has our functions."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first() -> None:
        with compat.installed():
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second() -> None:
        assert first_in.wait(60)
        with compat.installed():
            second_in.set()
            assert first_out.wait(60)
            seen.append(is_ours())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [True] and not is_ours()


def test_somebody_elses_wrapper_keeps_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds torch's function, which is ours inside and torch's outside."""
    calls = []

    def wrapper(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return torchs(module, *args, **kwargs)

    torchs = parametrizations.weight_norm
    compat.install()
    monkeypatch.setattr(nn.utils, "weight_norm", wrapper)
    assert wn.sites(nn.utils.weight_norm(layer()))[0].ours
    compat.uninstall()
    assert nn.utils.weight_norm is wrapper
    assert not wn.sites(nn.utils.weight_norm(layer()))[0].ours and len(calls) == 2


def test_a_replaced_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_parametrizations(module: Any, *args: Any) -> Any:
        return module

    for other in (remove_parametrizations, functools.partial(print), lambda module: module):
        with monkeypatch.context() as patch:
            patch.setattr(parametrize, "remove_parametrizations", other)
            with pytest.raises(wn.CompatError, match="remove_parametrizations is not torch's"):
                compat.install()
            assert not is_ours()  # none of the four


def test_code_that_was_replaced_meanwhile_is_refused() -> None:
    compat.install()
    ours = remove_weight_norm.__code__
    remove_weight_norm.__code__ = (lambda module, name="weight": module).__code__
    with pytest.raises(wn.CompatError, match=r"somebody else .*utils\.weight_norm\.remove_"):
        compat.uninstall()
    assert compat.is_installed()
    assert wn.sites(parametrizations.weight_norm(layer()))[0].ours  # none is given back
    remove_weight_norm.__code__ = ours
    compat.uninstall()
    assert not is_ours()


@pytest.mark.processes
def test_an_import_replaces_nothing() -> None:
    script = """
import torch
names = [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm,
         torch.nn.utils.remove_weight_norm, torch.nn.utils.parametrize.remove_parametrizations]
codes = [each.__code__ for each in names]
import sys, wn_surgery
assert not any(name.startswith("wn_surgery.compat") for name in sys.modules)
from wn_surgery import compat
assert [each.__code__ for each in names] == codes and not compat.is_installed()
"""
    command = [sys.executable, "-W", "error", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
