"""Weight-normed models as files and state dicts, without the model's class.

In: state dicts, files and folders.
Out: the same in another layout; what is in them, and how two differ.
Imports: errors, tables, differences, norm, rules, model.
"""

from wn_surgery.checkpoints.comparison import Comparison, compare
from wn_surgery.checkpoints.containers import layout_of, pairs_of
from wn_surgery.checkpoints.convert import convert
from wn_surgery.checkpoints.files import Converted, convert_file
from wn_surgery.checkpoints.folding import fold
from wn_surgery.checkpoints.inspection import Finding, Inspection, NormedTensor, inspect
from wn_surgery.checkpoints.pairs import Pair
from wn_surgery.checkpoints.streaming import Cost
from wn_surgery.norm.options import NormOptions as Options

__all__ = [
    "Comparison",
    "Converted",
    "Cost",
    "Finding",
    "Inspection",
    "NormedTensor",
    "Options",
    "Pair",
    "compare",
    "convert",
    "convert_file",
    "fold",
    "inspect",
    "layout_of",
    "pairs_of",
]
