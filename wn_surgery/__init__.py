"""Apply, remove and migrate weight norm on any PyTorch module tree, by rules."""

from wn_surgery import checkpoints, export, moved
from wn_surgery.errors import (
    CallbackError,
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    CompatError,
    ExportError,
    ModelError,
    RuleError,
    UnmatchedRuleError,
    WeightNormError,
    ZeroNormError,
)

# The names of 0.1.0 for one kind of error each; `__all__` no longer lists them.
from wn_surgery.errors import ConflictingNamesError as ConflictingNamesError
from wn_surgery.errors import DimensionError as DimensionError
from wn_surgery.errors import ExistingSiteError as ExistingSiteError
from wn_surgery.errors import FoldedModelError as FoldedModelError
from wn_surgery.errors import FusionError as FusionError
from wn_surgery.errors import InferenceModeError as InferenceModeError
from wn_surgery.errors import InitializationError as InitializationError
from wn_surgery.errors import LazyParameterError as LazyParameterError
from wn_surgery.errors import MissingSiteError as MissingSiteError
from wn_surgery.errors import NonFloatingError as NonFloatingError
from wn_surgery.errors import QuantizedWeightError as QuantizedWeightError
from wn_surgery.errors import RanksError as RanksError
from wn_surgery.errors import RuleFileError as RuleFileError
from wn_surgery.errors import StackedParametrizationError as StackedParametrizationError
from wn_surgery.errors import TiedParameterError as TiedParameterError
from wn_surgery.errors import WrappedModuleError as WrappedModuleError
from wn_surgery.fused import Fusion, fuse, unfuse
from wn_surgery.model import reloading as _reloading  # noqa: F401 - it is asked by what savers.py finds
from wn_surgery.model.contexts import folded, writable
from wn_surgery.model.sites import Site, sites
from wn_surgery.reporting.page import report
from wn_surgery.rules.sources import Rule
from wn_surgery.surgery.execution import Report, apply, migrate, remove
from wn_surgery.surgery.plan import Plan, Step
from wn_surgery.surgery.planning import UnmatchedRuleWarning, plan
from wn_surgery.training.initialization import Initialization, initialize_from_batch, initializing
from wn_surgery.training.parameter_groups import ParameterGroups, parameter_groups
from wn_surgery.training.statistics import SiteStatistics, Statistics, statistics

__version__ = "0.1.0"

__all__ = [
    "CallbackError",
    "CheckpointError",
    "CheckpointFileError",
    "CheckpointMismatchError",
    "CompatError",
    "ExportError",
    "Fusion",
    "Initialization",
    "ModelError",
    "ParameterGroups",
    "Plan",
    "Report",
    "Rule",
    "RuleError",
    "Site",
    "SiteStatistics",
    "Statistics",
    "Step",
    "UnmatchedRuleError",
    "UnmatchedRuleWarning",
    "WeightNormError",
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
    "report",
    "sites",
    "statistics",
    "unfuse",
    "writable",
]

moved.register()
