"""Apply, remove and migrate weight norm on any PyTorch module tree, by rules."""

from . import checkpoints, export
from . import reloading as _reloading  # noqa: F401 - it is asked by what savers.py finds
from .contexts import folded, writable
from .errors import (
    CallbackError,
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    ConflictingNamesError,
    DimensionError,
    ExistingSiteError,
    ExportError,
    FoldedModelError,
    FusionError,
    InferenceModeError,
    InitializationError,
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
from .initialization import Initialization, initialize_from_batch, initializing
from .parameter_groups import ParameterGroups, parameter_groups
from .plan import Plan, Step
from .planning import UnmatchedRuleWarning, plan
from .rules import Rule
from .sites import Site, sites
from .statistics import SiteStatistics, Statistics, statistics
from .surgery import Report, apply, migrate, remove

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
    "Fusion",
    "FusionError",
    "InferenceModeError",
    "Initialization",
    "InitializationError",
    "LazyParameterError",
    "NonFloatingError",
    "ParameterGroups",
    "Plan",
    "QuantizedWeightError",
    "Report",
    "Rule",
    "RuleError",
    "RuleFileError",
    "Site",
    "SiteStatistics",
    "StackedParametrizationError",
    "Statistics",
    "Step",
    "TiedParameterError",
    "UnmatchedRuleError",
    "UnmatchedRuleWarning",
    "WeightNormError",
    "WrappedModuleError",
    "ZeroNormError",
    "apply",
    "checkpoints",
    "export",
    "folded",
    "fuse",
    "initialize_from_batch",
    "initializing",
    "migrate",
    "parameter_groups",
    "plan",
    "remove",
    "sites",
    "statistics",
    "unfuse",
    "writable",
]
