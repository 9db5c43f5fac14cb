"""Apply, remove and migrate weight norm on any PyTorch module tree, by rules."""

from .contexts import folded, writable
from .errors import (
    ConflictingNamesError,
    DimensionError,
    ExistingSiteError,
    FoldedModelError,
    FusionError,
    InferenceModeError,
    LazyParameterError,
    NonFloatingError,
    QuantizedWeightError,
    RuleError,
    RuleFileError,
    StackedParametrizationError,
    TiedParameterError,
    UnmatchedRuleError,
    WeightNormError,
    WrappedModuleError,
    ZeroNormError,
)
from .fused import Fusion, fuse, unfuse
from .plan import Plan, Step
from .planning import UnmatchedRuleWarning, plan
from .rules import Rule
from .sites import Site, sites
from .surgery import Report, apply, migrate, remove

__all__ = [
    "ConflictingNamesError",
    "DimensionError",
    "ExistingSiteError",
    "FoldedModelError",
    "Fusion",
    "FusionError",
    "InferenceModeError",
    "LazyParameterError",
    "NonFloatingError",
    "Plan",
    "QuantizedWeightError",
    "Report",
    "Rule",
    "RuleError",
    "RuleFileError",
    "Site",
    "StackedParametrizationError",
    "Step",
    "TiedParameterError",
    "UnmatchedRuleError",
    "UnmatchedRuleWarning",
    "WeightNormError",
    "WrappedModuleError",
    "ZeroNormError",
    "apply",
    "folded",
    "fuse",
    "migrate",
    "plan",
    "remove",
    "sites",
    "unfuse",
    "writable",
]
