"""The exceptions of the library: one base, one class for each thing that can be wrong.

Every message names the offending rule, module or file, says what was expected, and
suggests a fix. Whatever raises one of these has changed nothing, with one exception: the
Lightning callback can look at the optimizers only after they are built (docs/errors.md).
"""

from __future__ import annotations

__all__ = [
    "CallbackError",
    "CheckpointError",
    "CheckpointFileError",
    "CheckpointMismatchError",
    "ConflictingNamesError",
    "DimensionError",
    "ExistingSiteError",
    "ExportError",
    "FoldedModelError",
    "FusionError",
    "InferenceModeError",
    "InitializationError",
    "LazyParameterError",
    "NonFloatingError",
    "QuantizedWeightError",
    "RuleError",
    "RuleFileError",
    "StackedParametrizationError",
    "TiedParameterError",
    "UnmatchedRuleError",
    "WeightNormError",
    "WrappedModuleError",
    "ZeroNormError",
]


class WeightNormError(Exception):
    """Base of every exception that this library raises on purpose.

    Example:
        >>> import wn_surgery as wn
        >>> try:
        ...     wn.Rule(action="aply")
        ... except wn.WeightNormError as error:
        ...     print(type(error).__name__)
        RuleError
    """


class RuleError(WeightNormError, ValueError):
    """A rule has an unknown field, a value of the wrong type, or a pattern that is invalid."""


class RuleFileError(RuleError):
    """A rule file cannot be read, is not YAML or JSON, or does not hold a list of rules."""


class UnmatchedRuleError(WeightNormError, LookupError):
    """A rule matched nothing in the model."""


class ConflictingNamesError(WeightNormError):
    """A module or parameter with several names is given different instructions by them."""


class ExistingSiteError(WeightNormError):
    """The parameter already carries weight norm with other options."""


class TiedParameterError(WeightNormError):
    """The parameter is tied to another one and the rule does not say what to do about it."""


class ZeroNormError(WeightNormError, ValueError):
    """A slice of the weight has zero (or non-finite) norm, so v/‖v‖ is not a number."""


class LazyParameterError(WeightNormError):
    """The parameter is uninitialised: its module is lazy and has seen no input yet."""


class NonFloatingError(WeightNormError, TypeError):
    """The parameter is neither floating-point nor complex."""


class QuantizedWeightError(WeightNormError, TypeError):
    """The weight is quantized; weight norm must be applied or removed before quantization."""


class WrappedModuleError(WeightNormError):
    """The module is wrapped by DDP or FSDP, or its parameters are sharded."""


class InferenceModeError(WeightNormError):
    """Surgery was asked for under ``torch.inference_mode``, or on inference tensors."""


class DimensionError(WeightNormError, IndexError):
    """The rule's ``dim`` does not exist in the weight it matched."""


class StackedParametrizationError(WeightNormError):
    """Weight norm shares the parameter with another parametrization or hook."""


class FoldedModelError(WeightNormError):
    """Surgery was asked for inside ``folded`` or ``writable``."""


class CheckpointError(WeightNormError, ValueError):
    """A checkpoint file or state dict is damaged, ambiguous, unsafe, or holds what does not fit."""


class CheckpointFileError(CheckpointError):
    """A checkpoint file cannot be read or written: not there, not allowed, no space."""


class FusionError(WeightNormError):
    """Whole-model evaluation was asked of a model, or of a weight, that cannot have it."""


class InitializationError(WeightNormError, ValueError):
    """No layer can be initialized from a batch, or the batch does not allow it."""


class CheckpointMismatchError(WeightNormError):
    """A checkpoint was written with other weight norm than the model now has."""


class ExportError(WeightNormError):
    """A model cannot be copied for export, or what was exported cannot be compared with it."""


class CallbackError(WeightNormError):
    """A training framework's callbacks, strategy or optimizers leave weight norm no place."""
