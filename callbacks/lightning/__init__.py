"""Weight norm in Lightning: a callback for the Trainer, and a mixin for the module.

Works with ``lightning.pytorch`` and with ``pytorch_lightning``, whichever the Trainer is from.
"""

from .callback import WeightNorm
from .fusing import Fused
from .layouts import SaveLayout
from .mixin import WeightNormMixin

__all__ = ["Fused", "SaveLayout", "WeightNorm", "WeightNormMixin"]
