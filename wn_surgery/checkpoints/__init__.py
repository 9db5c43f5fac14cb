"""Weight-normed models as files and state dicts, without the model's class."""

from .comparison import Comparison, compare
from .contents import layout_of, pairs_of
from .convert import convert
from .files import Converted, convert_file
from .folding import fold
from .inspection import Finding, Inspection, NormedTensor, inspect
from .pairs import Options, Pair

__all__ = [
    "Comparison",
    "Converted",
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
