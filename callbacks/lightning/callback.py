"""The Lightning callback: weight norm by rules, from the first step to the export."""

from __future__ import annotations

__all__ = ["WeightNorm"]

import weakref
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn
from typing_extensions import override

import wn_surgery as wn
from wn_surgery.callbacks.holding import refuse_unheld
from wn_surgery.callbacks.lightning import exporting, layouts, monitoring, neighbours, patching
from wn_surgery.callbacks.lightning.bases import Callback
from wn_surgery.callbacks.lightning.fusing import Folding, Fused, fuse
from wn_surgery.callbacks.lightning.layouts import LayoutIO, SaveLayout
from wn_surgery.callbacks.lightning.monitoring import Monitor, batches_that_stepped
from wn_surgery.callbacks.lightning.patching import Replaced, Rules
from wn_surgery.callbacks.renormalizing import AfterSteps, asks, renormalizing
from wn_surgery.model.records import KEY
from wn_surgery.reporting.page import check_path
from wn_surgery.rules.sources import as_rules
from wn_surgery.surgery.planning import OnUnmatched

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from wn_surgery.training.statistics import History


class WeightNorm(Callback):
    """Puts weight norm on a LightningModule before its optimizers are built.

    The layers are changed in ``setup``, once: the optimizer holds ``g`` and ``v``, checkpoints
    hold them too, and a resumed run continues bit for bit. ``validate``, ``test``, ``predict``,
    another ``fit`` or another Trainer change nothing more.

    Layers that the module builds in its own ``setup`` or ``configure_model``, which run after
    the callback's ``setup``, get their weight norm when that method returns; only then is a
    rule that matches nothing an error. The callback cannot reach layers that are built *and
    sharded* in ``configure_model``: call ``wn_surgery.apply(self, rules)`` there, before
    ``fully_shard``.

    Give one callback all the rules, and put it before callbacks that copy the model, such as
    weight averaging. What cannot work raises before the first step. See docs/lightning.md.

    Args:
        rules: A rule, a list of rules or dicts, a path to a YAML or JSON file, or the name of a
            preset. Names are relative to the LightningModule, so a layer of ``self.model`` has
            a name under ``model.**``. Invalid rules raise here, not when training starts.
        fused: Compute the weights in groups, once a forward, for the length of a run: ``"auto"``
            (on the CPU only, since the Triton kernels have not been run on a GPU), ``"triton"``,
            ``"cpu"`` (torch's operators), ``"native"`` (compiled for this CPU on first use) or
            ``"off"``; see :func:`wn_surgery.fuse`.
        once_per_step: Compute each weight once per optimizer step instead, for all micro-batches
            and whatever part of the module ``training_step`` calls; the optimizers must be torch's.
        fold_on_eval: Validation, testing and prediction compute each weight once, and run at the
            plain model's speed.
        save_layout: What checkpoints hold: ``"parametrized"`` (g and v under torch's names),
            ``"legacy"`` (``weight_g`` and ``weight_v``), or ``"plain"``: weights that load without
            this library, with g and v beside them, so that a run resumes exactly.
        strip_on_end: Leave the module plain after ``fit``.
        log_every_n_steps: Log :func:`wn_surgery.statistics` to the Trainer's loggers every so
            many optimizer steps, with histograms for TensorBoard.
        export_to: At the end of ``fit``, write the module without weight norm: weights
            (``.safetensors``, ``.pt``, ``.pth``, ``.ckpt``) or a program (``.onnx``, ``.pt2``),
            which needs ``example_input_array``.
        report_to: At the end of ``fit``, write the page of :func:`wn_surgery.report`, an ``.html``
            file; with what ``log_every_n_steps`` has recorded.
        init_from_batch: Initialize g and biases from the first batch of a new run; see
            :func:`wn_surgery.initializing`. A resumed run is not initialized again.
        renormalize_every_n_steps: Call :func:`wn_surgery.renormalize` after each optimizer step,
            or every so many batches that step; and once when a new run begins. It acts on the sites
            of rules with ``renormalize``; if no rule has it, each gets ``renormalize: true``. None
            is 1 where a rule has it, and otherwise never.
        on_unmatched: For a rule that matches nothing: ``"error"``, ``"warn"`` or ``"ignore"``.
        verbose: Print what was changed, on rank zero.

    Attributes:
        rules: The rules, as a tuple of :class:`wn_surgery.Rule`.
        report: What was changed last; None while nothing has been.
        initialization: What ``init_from_batch`` did; None while it has not.

    Raises:
        wn_surgery.RuleError: The rules are wrong.
        ValueError: Another argument is.

    Example:
        >>> from wn_surgery.callbacks.lightning import WeightNorm
        >>> callback = WeightNorm([{"types": "Conv1d"}, {"action": "skip", "names": "**.head"}])
        >>> [rule.action for rule in callback.rules]
        ['apply', 'skip']
    """

    # Of one run; not copied, not pickled.
    _module: weakref.ref[nn.Module] | None
    _replaced: Replaced
    _first_batch: ExitStack | None
    _loaded: dict[str, Any] | None

    def __init__(
        self,
        rules: Rules,
        *,
        fused: Fused = "auto",
        once_per_step: bool = False,
        fold_on_eval: bool = True,
        save_layout: SaveLayout = "parametrized",
        strip_on_end: bool = False,
        log_every_n_steps: int | None = None,
        export_to: str | Path | None = None,
        report_to: str | Path | None = None,
        init_from_batch: bool = False,
        renormalize_every_n_steps: int | None = None,
        on_unmatched: OnUnmatched = "error",
        verbose: bool = False,
    ) -> None:
        super().__init__()
        _one_of("fused", fused, Fused)
        _one_of("save_layout", save_layout, SaveLayout)
        _one_of("on_unmatched", on_unmatched, OnUnmatched)
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(f"log_every_n_steps={log_every_n_steps}; expected at least 1, or None")
        if export_to is not None and Path(export_to).suffix not in exporting.SUFFIXES:
            raise ValueError(
                f"export_to={str(export_to)!r}; expected a file ending in one of "
                f"{', '.join(exporting.SUFFIXES)}"
            )
        if once_per_step and fused == "off":
            raise ValueError("once_per_step=True is a way to fuse; leave out fused='off'")
        self.rules = renormalizing(as_rules(rules), renormalize_every_n_steps)
        self.renormalize_every_n_steps = renormalize_every_n_steps or 1
        self.on_unmatched: OnUnmatched = on_unmatched
        self.fused: Fused = fused
        self.once_per_step = once_per_step
        self.fold_on_eval = fold_on_eval
        self.save_layout: SaveLayout = save_layout
        self.strip_on_end = strip_on_end
        self.export_to = None if export_to is None else Path(export_to)
        self.report_to = None if report_to is None else check_path(report_to)
        self.init_from_batch = init_from_batch
        self.verbose = verbose
        self.report: wn.Report | None = None
        self.initialization: wn.Initialization | None = None
        self.initialized = False
        self._monitor = None if log_every_n_steps is None else Monitor(log_every_n_steps)
        self._forget_run()

    @property
    def history(self) -> History:
        """Return what ``log_every_n_steps`` has recorded; ``history.plot()`` draws it.

        Raises:
            ValueError: ``log_every_n_steps`` was not given.
        """
        if self._monitor is None:
            raise ValueError("nothing is recorded: WeightNorm(..., log_every_n_steps=100) does it")
        return self._monitor.history

    @property
    def module(self) -> nn.Module | None:
        """Return the module of the last run, while it is alive."""
        return self._module() if self._module is not None else None

    def patch(self, model: nn.Module) -> wn.Report:
        """Apply the rules outside a Trainer, for Fabric before ``fabric.setup``; return the report.

        Raises:
            wn_surgery.WeightNormError: as :func:`wn_surgery.apply` does.

        Example:
            >>> import torch
            >>> from wn_surgery.callbacks.lightning import WeightNorm
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
            >>> WeightNorm("linears").patch(model).changed
            ('0.weight',)
        """
        self.report = wn.apply(model, self.rules, on_unmatched=self.on_unmatched)
        return self.report

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget_run()
        self._module = weakref.ref(pl_module)
        neighbours.check(trainer, pl_module, self, self.save_layout)
        if self.export_to is not None:
            exporting.check(pl_module, self.export_to)
        hooks = patching.building_hooks(pl_module)
        # Tensor parallelism cuts plain parameters, so weight norm comes after it.
        late = neighbours.cuts_tensors(trainer) and "configure_model" in hooks
        if late:
            hooks = ["configure_model"]
        for hook in hooks:
            then = partial(self._apply, trainer, pl_module, last=hook == hooks[-1])
            patching.once_after(pl_module, hook, then)
        if not late:
            self._apply(trainer, pl_module, last=not hooks)
        if not neighbours.shards(trainer):
            # The last to see what is saved and the first to see what is read.
            inner = trainer.strategy.checkpoint_io
            while isinstance(inner, LayoutIO):
                inner = inner.inner
            trainer.strategy.checkpoint_io = LayoutIO(inner, self)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Also for strategies that write shards, which have no LayoutIO.
        checkpoint[KEY] = layouts.record(pl_module, self)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        info = checkpoint.get(KEY)
        if info is not None:
            if neighbours.shards(trainer):
                layouts.check(checkpoint, pl_module, "the checkpoint")
            self.initialized = info["initialized"]
        self._loaded = checkpoint

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The optimizers are built now, but not yet restored.
        patching.refuse_stale(trainer.optimizers, self._replaced)
        self._replaced.clear()
        if not neighbours.shards(trainer):  # which has parameters of its own
            refuse_unheld(
                pl_module,
                trainer.optimizers,
                "configure_optimizers() picks parameters by names that end in '.weight', say. Let "
                "it take wn_surgery.parameter_groups(self), or self.parameters(); weight norm "
                "that is not to be trained is frozen by requires_grad_(False)",
            )
        if self._loaded is not None:
            layouts.rename_states(self._loaded, trainer, pl_module)
            self._loaded = None
        self._fuse(trainer, pl_module)
        if asks(pl_module):
            _refuse_shards(trainer)
            self._after_steps.start(pl_module, trainer.optimizers, partial(self._is_due, trainer))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What is resumed was put back already, and goes on bit for bit.
        if trainer.global_step == 0 and asks(pl_module):
            wn.renormalize(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._monitor is not None:
            self._monitor.before_batch(trainer)
        if not self.init_from_batch or self.initialized or trainer.global_step > 0:
            return
        wn.unfuse(pl_module)
        self._first_batch = ExitStack()
        self.initialization = self._first_batch.enter_context(wn.initializing(pl_module))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._first_batch is not None:
            stack, self._first_batch = self._first_batch, None
            stack.close()
            self.initialized = True
            if self.verbose and trainer.is_global_zero:
                print(self.initialization)  # noqa: T201
            self._fuse(trainer, pl_module)
        if self._monitor is not None:
            self._monitor.after_batch(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.fold_on_eval:
            self._fuse(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    # At the first batch, and at the end of the epoch: weight averaging exchanges its weights when
    # the epoch starts, and exchanges them back after it.
    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self.fold_on_eval:
            self._folding.start(pl_module)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folding.stop()

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._folding.stop()
        if self._first_batch is not None:
            stack, self._first_batch = self._first_batch, None
            # As if it had been raised inside: g and biases are put back.
            stack.__exit__(type(exception), exception, exception.__traceback__)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finished = True
        if self.export_to is not None and trainer.is_global_zero:
            exporting.export(pl_module, self.export_to)
        if self.report_to is not None:
            monitoring.report(trainer, pl_module, self.report_to, self.rules, self._monitor)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folding.stop()
        self._after_steps.stop()
        wn.unfuse(pl_module)
        ended = self._finished or (stage != "fit" and self._applied)
        # A worker's weights go back to a process in which the module has no weight norm; Lightning
        # loads them there with strict=False, which would drop g and v.
        goes_back = self._applied and neighbours.in_worker_processes(trainer)
        if (self.strip_on_end and ended) or goes_back:
            wn.remove(pl_module, self.rules, optimizers=trainer.optimizers, on_unmatched="ignore")

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:  # noqa: ARG002
        """Raise for a module that Fabric has set up without weight norm: it is too late here."""
        model = getattr(module, "_forward_module", module)
        plan = wn.plan(model, self.rules, on_unmatched="ignore", check=False)
        if plan.changes:
            raise wn.CallbackError(
                f"fabric.setup() was given a {type(model).__name__} without weight norm; call "
                "callback.patch(model), or wn_surgery.apply(model, rules), before the optimizer is "
                "made and fabric.setup() is called"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a worker process, begins a run of its own.
        state = self.__dict__.copy()
        for name in ("_module", "_replaced", "_folding", "_first_batch", "_loaded", "_after_steps"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_run()

    def _forget_run(self) -> None:
        self._module = None
        self._replaced = []
        self._folding = Folding()
        self._after_steps = AfterSteps()
        self._first_batch = self._loaded = None
        self._applied = self._finished = False

    def _fuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.init_from_batch or self.initialized:
            trains = self.once_per_step and trainer.training
            fuse(pl_module, self.fused, trainer.optimizers if trains else ())

    def _is_due(self, trainer: Trainer) -> bool:
        step = batches_that_stepped(trainer, trainer.global_step)
        return step % self.renormalize_every_n_steps == 0

    def _apply(self, trainer: Trainer, pl_module: LightningModule, *, last: bool) -> None:
        # Whether a rule matches nothing is only known after the last hook that builds layers.
        on_unmatched = self.on_unmatched if last else "ignore"
        report, replaced = patching.apply_rules(pl_module, self.rules, on_unmatched)
        if report is None:
            return
        self.report = report
        self._applied = True
        self._replaced += replaced
        if self.verbose and trainer.is_global_zero:
            print(report)  # noqa: T201


def _refuse_shards(trainer: Trainer) -> None:
    if neighbours.shards(trainer):
        raise wn.CallbackError(
            f"a rule says renormalize, which needs whole slices of v, and "
            f"{type(trainer.strategy).__name__} splits them; leave it out of the rules, or "
            "train with DDP"
        )


def _one_of(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name}={value!r}; expected {', '.join(map(repr, get_args(allowed)))}")
