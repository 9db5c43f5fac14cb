"""The exceptions of the library: one base, and one class for each thing that a program can handle.

Every message names the rule, module or file that is wrong, says what was expected, and suggests a
fix. Whatever raises one of these has changed nothing, with one exception: the Lightning callback
can look at the optimizers only after they are built (docs/errors.md).
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

__all__ = [
    "CallbackError",
    "CheckpointError",
    "CheckpointFileError",
    "CheckpointMismatchError",
    "CompatError",
    "ExportError",
    "ModelError",
    "RuleError",
    "UnmatchedRuleError",
    "WeightNormError",
    "ZeroNormError",
]


class WeightNormError(Exception):
    """Base of every exception that this library raises on purpose.

    Attributes:
        kind: what is wrong, in a word: see docs/errors.md.
        site: the name of the parameter (or ``rule 2``) that it is about, where there is one.

    Example:
        >>> import torch, wn_surgery as wn
        >>> try:
        ...     wn.apply(torch.nn.Linear(2, 3), {"types": "Linear", "dim": 2})
        ... except wn.WeightNormError as error:
        ...     print(type(error).__mro__[1].__name__, error.kind, error.site)
        ModelError dim weight
    """

    kind: str = ""
    site: str | None
    _by_kind: ClassVar[dict[str, type[WeightNormError]]] = {}

    def __init_subclass__(cls, kind: str = "") -> None:
        if kind:
            cls.kind = kind
            WeightNormError._by_kind[kind] = cls

    def __new__(cls, *args: Any, kind: str | None = None, **_: Any) -> Self:
        """Make the error; one of another ``kind`` is of the subclass that stands for it."""
        made = cls if kind is None else WeightNormError._by_kind[kind]
        return super().__new__(made, *args)  # type: ignore[return-value]  # a subclass of cls

    def __init__(
        self, message: str = "", *, kind: str | None = None, site: str | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind or type(self).kind
        self.site = site


class RuleError(WeightNormError, ValueError, kind="rule"):
    """A rule, or a file of rules (``kind="file"``), is not valid.

    Attributes:
        detail: the message without the text of the rule.
    """

    def __init__(self, message: str = "", *, detail: str | None = None, **which: Any) -> None:
        super().__init__(message, **which)
        self.detail = message if detail is None else detail


class UnmatchedRuleError(WeightNormError, LookupError, kind="unmatched"):
    """A rule matched nothing in the model."""


class ModelError(WeightNormError, kind="model"):
    """The model, or one of its parameters, cannot be changed as asked; ``kind`` says why."""


class ZeroNormError(WeightNormError, ValueError, kind="zero_norm"):
    """A slice of the weight has zero (or non-finite) norm, so v/‖v‖ is not a number."""


class CheckpointError(WeightNormError, ValueError, kind="checkpoint"):
    """A checkpoint file or state dict is damaged, ambiguous, unsafe, or holds what does not fit."""


class CheckpointFileError(CheckpointError, kind="checkpoint_file"):
    """A checkpoint file cannot be read or written: not there, not allowed, no space."""


class CheckpointMismatchError(WeightNormError, kind="mismatch"):
    """A checkpoint was written with other weight norm than the model now has."""


class ExportError(WeightNormError, kind="export"):
    """A model cannot be copied for export, or what was exported cannot be compared with it."""


class CallbackError(WeightNormError, kind="callback"):
    """A training framework's callbacks, strategy or optimizers leave no place for weight norm."""


class CompatError(WeightNormError, RuntimeError, kind="compat"):
    """torch's functions cannot be exchanged for those of ``wn_surgery.compat``, or given back."""


# The names of 0.1.0, one for each kind: for `except wn.TiedParameterError` and for pickles. The
# library raises them as `ModelError(..., kind="tied")`.


class RuleFileError(RuleError, kind="file"):
    """A rule file cannot be read, is not YAML or JSON, or does not hold a list of rules."""


class ConflictingNamesError(ModelError, kind="names"):
    """A module or parameter with several names is given different instructions by them."""


class ExistingSiteError(ModelError, RuntimeError, kind="existing"):
    """The parameter already carries weight norm with other options."""


class TiedParameterError(ModelError, kind="tied"):
    """The parameter is tied to another one and the rule does not say what to do about it."""


class LazyParameterError(ModelError, ValueError, kind="lazy"):
    """The parameter is uninitialised: its module is lazy and has seen no input yet."""


class MissingSiteError(ModelError, AttributeError, ValueError, kind="missing"):
    """The module has no such parameter, or the parameter no weight norm."""


class NonFloatingError(ModelError, TypeError, kind="dtype"):
    """The parameter is not a dense floating-point or complex Parameter."""


class QuantizedWeightError(ModelError, TypeError, kind="quantized"):
    """The weight is quantized; weight norm must be applied or removed before quantization."""


class WrappedModuleError(ModelError, kind="wrapped"):
    """The module is wrapped by DDP or FSDP, or its parameters are cut as no norm can be."""


class RanksError(ModelError, kind="ranks"):
    """The processes that share a model would change it differently, or one of them cannot."""


class InferenceModeError(ModelError, kind="inference"):
    """Surgery was asked for under ``torch.inference_mode``, or on inference tensors."""


class DimensionError(ModelError, IndexError, kind="dim"):
    """The rule's ``dim`` does not exist in the weight it matched."""


class StackedParametrizationError(ModelError, kind="stacked"):
    """Weight norm shares the parameter with another parametrization or hook."""


class FoldedModelError(ModelError, kind="folded"):
    """Surgery was asked for inside ``folded`` or ``writable``."""


class FusionError(ModelError, kind="fusion"):
    """Whole-model evaluation was asked of a model, or of a weight, that cannot have it."""


class InitializationError(ModelError, ValueError, kind="initialization"):
    """No layer can be initialized from a batch, or the batch does not allow it."""
