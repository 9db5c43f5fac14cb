"""Apply, remove and migrate weight norm on any PyTorch module tree, by rules."""

from wn_surgery import checkpoints, export, moved
from wn_surgery.errors import (
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
from wn_surgery.fused import Fusion, fuse, unfuse
from wn_surgery.model import reloading as _reloading  # noqa: F401 - it is asked by what savers.py finds
from wn_surgery.model.contexts import folded, writable
from wn_surgery.model.sites import Site, sites
from wn_surgery.rules.sources import Rule
from wn_surgery.surgery.execution import (
    Report,
    apply,
    migrate,
    remove,
)
from wn_surgery.surgery.plan import Plan, Step
from wn_surgery.surgery.planning import UnmatchedRuleWarning, plan
from wn_surgery.training.initialization import Initialization, initialize_from_batch, initializing
from wn_surgery.training.parameter_groups import ParameterGroups, parameter_groups
from wn_surgery.training.statistics import SiteStatistics, Statistics, statistics

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

moved.register()
