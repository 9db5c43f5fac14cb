"""Weight norm in Lightning: a callback for the Trainer, and a mixin for the module.

Works with ``lightning.pytorch`` and with ``pytorch_lightning``, whichever the Trainer is from.
"""

from wn_surgery.callbacks.lightning.callback import WeightNorm
from wn_surgery.callbacks.lightning.fusing import Fused
from wn_surgery.callbacks.lightning.layouts import SaveLayout, WeightNormMixin

__all__ = ["Fused", "SaveLayout", "WeightNorm", "WeightNormMixin"]
