"""Apply, remove and migrate weight norm on any PyTorch module tree, by rules.

What needs torch is imported when it is first asked for, so the command line prints its help
without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wn_surgery import moved
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

if TYPE_CHECKING:
    from wn_surgery import checkpoints, export
    from wn_surgery.fused import Fusion, fuse, unfuse
    from wn_surgery.model.exact import exact_norms
    from wn_surgery.model.folding import folded
    from wn_surgery.model.sites import Site, sites
    from wn_surgery.model.writing import writable
    from wn_surgery.reporting.page import report
    from wn_surgery.rules.sources import Rule
    from wn_surgery.surgery.execution import Report, apply, migrate, remove
    from wn_surgery.surgery.plan import Plan, Step
    from wn_surgery.surgery.planning import UnmatchedRuleWarning, plan
    from wn_surgery.training.clipping import clip_gradients
    from wn_surgery.training.initialization import (
        Initialization,
        initialize_from_batch,
        initializing,
    )
    from wn_surgery.training.parameter_groups import ParameterGroups, parameter_groups
    from wn_surgery.training.renormalization import renormalize
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
    "clip_gradients",
    "exact_norms",
    "export",
    "folded",
    "fuse",
    "initialize_from_batch",
    "initializing",
    "migrate",
    "parameter_groups",
    "plan",
    "remove",
    "renormalize",
    "report",
    "sites",
    "statistics",
    "unfuse",
    "writable",
]

# Where each name is, as the imports above say it to type checkers.
_HOMES = {
    "fused": "Fusion fuse unfuse",
    "model.exact": "exact_norms",
    "model.folding": "folded",
    "model.writing": "writable",
    "model.sites": "Site sites",
    "reporting.page": "report",
    "rules.sources": "Rule",
    "surgery.execution": "Report apply migrate remove",
    "surgery.plan": "Plan Step",
    "surgery.planning": "UnmatchedRuleWarning plan",
    "training.clipping": "clip_gradients",
    "training.initialization": "Initialization initialize_from_batch initializing",
    "training.parameter_groups": "ParameterGroups parameter_groups",
    "training.renormalization": "renormalize",
    "training.statistics": "SiteStatistics Statistics statistics",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
_ROOMS = {"checkpoints", "compat", "export", *(home.partition(".")[0] for home in _HOMES), "norm"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"wn_surgery.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'wn_surgery' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"wn_surgery.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})


moved.register()
