"""Weight norm as a Lightning callback: a thin face over :func:`wn_surgery.apply`.

Works with ``lightning.pytorch`` and with ``pytorch_lightning``, whichever the Trainer is from.
"""

from __future__ import annotations

__all__ = ["WeightNorm"]

import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from torch import nn
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.fused import is_fused
from wn_surgery.planning import OnUnmatched
from wn_surgery.rules import RulesLike, as_rules

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch import Tensor
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        # The two packages have a Callback class each; either base works with either Trainer.
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "wn_surgery.callbacks.lightning needs Lightning: "
                "pip install 'wn-surgery[lightning]'",
                name=error.name,
            ) from error

Fused: TypeAlias = Literal["auto", "off", "triton", "cpu"]

_STATE_VERSION = 1
# The module's hooks that may build layers, in the order in which they run: all of them after
# the callback's own `setup`.
_BUILDING_HOOKS = ("setup", "configure_model")
_LIGHTNING_CORE = ("lightning.pytorch.core.", "pytorch_lightning.core.")


class WeightNorm(Callback):
    """Put weight norm on the model before its optimizers are built.

    The layers are changed in ``setup``, once: the optimizer holds ``g`` and ``v``, checkpoints
    hold them too, and a resumed run continues bit for bit. What the Trainer does later
    (``validate``, ``test``, ``predict``, another ``fit``, another Trainer) changes nothing more.

    Layers that the module builds in its own ``setup`` or ``configure_model``, which run after
    the callback's ``setup``, get their weight norm when that method returns; only then is a
    rule that matches nothing an error. Layers that are built *and sharded* in
    ``configure_model`` are out of reach: call ``wn_surgery.apply`` there, before
    ``fully_shard``.

    Lightning runs callbacks in the order given: put this one before any that copies the model,
    such as weight averaging. Only one is needed, with all the rules.

    Args:
        rules: A rule, a list of rules or dicts, a path to a YAML or JSON file, or the name of a
            preset. Names are relative to the LightningModule, so a layer of ``self.model`` has
            a name under ``model.**``. Invalid rules raise here, not when training starts.
        on_unmatched: What to do about a rule that matches nothing: ``"error"``, ``"warn"`` or
            ``"ignore"``.
        fused: Compute the weights of the model in groups, once a forward: ``"auto"`` (Triton
            on CUDA, torch's operators on the CPU), ``"triton"``, ``"cpu"`` or ``"off"``; see
            :func:`wn_surgery.fuse`. It lasts from the start of a run to its end. Off unless
            asked for, as long as the Triton kernels have not been run on a GPU.
        verbose: Print what was changed, on rank zero.

    Attributes:
        rules: The rules, as a tuple of :class:`wn_surgery.Rule`.
        report: What was changed last; None while nothing has been.

    Example:
        >>> from wn_surgery.callbacks.lightning import WeightNorm
        >>> callback = WeightNorm([{"types": "Conv1d"}, {"action": "skip", "names": "**.head"}])
        >>> [rule.action for rule in callback.rules]
        ['apply', 'skip']
    """

    def __init__(
        self,
        rules: RulesLike,
        *,
        on_unmatched: OnUnmatched = "error",
        fused: Fused = "off",
        verbose: bool = False,
    ) -> None:
        super().__init__()
        if fused not in get_args(Fused):
            raise ValueError(f"fused={fused!r}; expected 'auto', 'off', 'triton' or 'cpu'")
        if on_unmatched not in get_args(OnUnmatched):
            raise ValueError(f"on_unmatched={on_unmatched!r}; expected 'error', 'warn' or 'ignore'")
        self.rules = as_rules(rules)
        self.on_unmatched = on_unmatched
        self.fused: Fused = fused
        self.verbose = verbose
        self.report: wn.Report | None = None
        self._replaced: list[tuple[str, weakref.ref[Tensor]]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Apply the rules to the layers there are, and again after each hook that builds more."""
        hooks = [hook for hook in _BUILDING_HOOKS if _overrides(pl_module, hook)]
        # Whether a rule matches nothing is only known after the last of them.
        early: OnUnmatched = "ignore"
        passes = [*[early] * len(hooks), self.on_unmatched]
        for hook, on_unmatched in zip(hooks, passes[1:], strict=True):
            _once_after(pl_module, hook, self, on_unmatched)
        self._apply(pl_module, passes[0])

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers that hold replaced weights: they would train nothing, in silence."""
        held = {
            id(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        stale = [name for name, weight in self._replaced if id(weight()) in held]
        self._replaced.clear()
        if stale:
            raise wn.WeightNormError(
                f"an optimizer holds {_listed(stale)}, which weight norm has replaced by g and v: "
                "it was built before the callback ran and would train neither; build it in "
                "configure_optimizers(), from self.parameters()"
            )

        self._fuse(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fuse, where validation is a run of its own."""
        self._fuse(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fuse."""
        self._fuse(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fuse."""
        self._fuse(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was before the run, but for its weight norm."""
        wn.unfuse(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The rules, as plain data that ``torch.load(weights_only=True)`` accepts."""
        return {"version": _STATE_VERSION, "rules": [_plain(rule) for rule in self.rules]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's rules with those given here, which are the ones in force."""
        if state_dict["version"] > _STATE_VERSION:
            raise wn.WeightNormError(
                f"the checkpoint's WeightNorm callback has state version {state_dict['version']}, "
                f"this release of wn-surgery reads up to {_STATE_VERSION}; install a newer one"
            )
        here = self.state_dict()["rules"]
        if state_dict["rules"] != here:
            warnings.warn(
                "the checkpoint was written with other weight-norm rules; its g and v are loaded, "
                f"but options such as eps are now those of {here}, not of {state_dict['rules']}",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, and a copy holds no weight of this process.
        return {**self.__dict__, "_replaced": []}

    def _fuse(self, pl_module: LightningModule) -> None:
        if self.fused == "off":
            return
        for root in _roots(pl_module):
            if not is_fused(root):
                wn.fuse(root, self.fused)

    def _apply(self, pl_module: LightningModule, on_unmatched: OnUnmatched) -> None:
        try:
            plan = wn.plan(pl_module, self.rules, on_unmatched=on_unmatched)
            if not plan.changes:
                return
            _refuse_worker_processes(pl_module.trainer)
            replaced = [
                (step.site.name, weakref.ref(step.site.tensor))
                for step in plan.changes
                if step.site.tensor is not None
            ]
            # The plan has told, or warned of, what is unmatched.
            report = wn.apply(pl_module, self.rules, on_unmatched="ignore")
        except wn.UnmatchedRuleError as error:
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise wn.UnmatchedRuleError(
                f"{error}\nNames are relative to the LightningModule, {type(pl_module).__name__} "
                f"(its children: {children}). Layers are found if __init__, setup or "
                "configure_model builds them, not later."
            ) from error
        except wn.WrappedModuleError as error:
            raise wn.WrappedModuleError(
                f"{error}\nLayers that configure_model() builds and shards are out of the "
                "callback's reach: build them in __init__, or call wn_surgery.apply(self, rules) "
                "in configure_model() before sharding them."
            ) from error
        self.report = report
        self._replaced += replaced
        if self.verbose and pl_module.trainer.is_global_zero:
            print(report)  # noqa: T201


def _roots(pl_module: LightningModule) -> list[nn.Module]:
    """The modules to fuse: those that ``training_step`` calls, as far as can be told.

    Usually they are children, such as a generator and a discriminator, and the module itself
    is not called. Where a weight-normed layer is a child itself, the module is.
    """
    roots: list[nn.Module] = []
    waiting: list[nn.Module] = list(pl_module.children())
    while waiting:
        child = waiting.pop(0)
        normed = [site for site in wn.sites(child) if site.normed]
        if any(site.module is child for site in normed):
            return [pl_module]
        if type(child).forward is nn.Module.forward:  # a list or dict of modules
            waiting[:0] = child.children()
        elif normed:
            roots.append(child)
    return roots


def _overrides(pl_module: LightningModule, hook: str) -> bool:
    """Whether the module, or the user's class, has a hook of its own."""
    owner = next(cls for cls in type(pl_module).__mro__ if hook in vars(cls))
    return hook in vars(pl_module) or not owner.__module__.startswith(_LIGHTNING_CORE)


def _once_after(
    pl_module: LightningModule, hook: str, callback: WeightNorm, on_unmatched: OnUnmatched
) -> None:
    """Have the callback apply its rules when the module's hook has run, the next time it does."""
    own = vars(pl_module).get(hook)
    if isinstance(own, partial) and own.func is _run_then_apply:
        # Left by a run that ended before it came to the hook.
        own = own.args[2]
    # A partial, not a closure: a deep copy of the module then acts on the copy. And not
    # functools.wraps: Lightning looks through it for whether the class overrides the hook.
    wrapper = partial(_run_then_apply, pl_module, hook, own, callback, on_unmatched)
    setattr(pl_module, hook, wrapper)


def _run_then_apply(
    pl_module: LightningModule,
    hook: str,
    own: Any,
    callback: WeightNorm,
    on_unmatched: OnUnmatched,
    *args: Any,
    **kwargs: Any,
) -> None:
    delattr(pl_module, hook)
    if own is not None:
        setattr(pl_module, hook, own)
    getattr(pl_module, hook)(*args, **kwargs)
    callback._apply(pl_module, on_unmatched)


def _refuse_worker_processes(trainer: Trainer) -> None:
    """Raise where the trained weights come back to a process whose model is unchanged.

    Lightning loads them there with ``strict=False``: all that weight norm renamed is dropped.
    """
    launcher = trainer.strategy.launcher
    if any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(launcher).__mro__):
        raise wn.WeightNormError(
            "the strategy trains in processes of its own (spawn or fork), and their weights would "
            "be lost on the way back to this one; call wn_surgery.apply(model, rules) before the "
            'Trainer runs, or use strategy="ddp"'
        )


def _plain(rule: wn.Rule) -> dict[str, Any]:
    # A predicate cannot be written down, and a checkpoint must not fail for it.
    return rule.to_dict() if rule.where is None else {"python": rule.describe()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
