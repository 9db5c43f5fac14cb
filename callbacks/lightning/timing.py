"""When to apply: after each of the module's own hooks that may build layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["building_hooks", "once_after"]

# They run in this order, all of them after the callback's own `setup`.
_BUILDING_HOOKS = ("setup", "configure_model")
_LIGHTNING_CORE = ("lightning.pytorch.core.", "pytorch_lightning.core.")


def building_hooks(pl_module: LightningModule) -> list[str]:
    """The hooks that the module, or the user's class, has of its own and that may build layers."""
    return [hook for hook in _BUILDING_HOOKS if _overrides(pl_module, hook)]


def once_after(pl_module: LightningModule, hook: str, then: Callable[[], None]) -> None:
    """Call ``then`` when the module's hook has run, the next time it does."""
    own = vars(pl_module).get(hook)
    if isinstance(own, partial) and own.func is _run_then:
        # Left by a run that ended before it came to the hook.
        own = own.args[2]
    # A partial, not a closure: it can be told from a hook of the user's. And not
    # functools.wraps: Lightning looks through it for whether the class overrides the hook.
    setattr(pl_module, hook, partial(_run_then, pl_module, hook, own, then))


def _overrides(pl_module: LightningModule, hook: str) -> bool:
    owner = next(cls for cls in type(pl_module).__mro__ if hook in vars(cls))
    return hook in vars(pl_module) or not owner.__module__.startswith(_LIGHTNING_CORE)


def _run_then(
    pl_module: LightningModule,
    hook: str,
    own: Any,
    then: Callable[[], None],
    *args: Any,
    **kwargs: Any,
) -> None:
    delattr(pl_module, hook)
    if own is not None:
        setattr(pl_module, hook, own)
    getattr(pl_module, hook)(*args, **kwargs)
    then()
