"""Weight-normed models as files and state dicts, without the model's class."""

from .contents import layout_of, pairs_of
from .convert import convert
from .files import Converted, convert_file
from .folding import fold
from .pairs import Options, Pair

__all__ = [
    "Converted",
    "Options",
    "Pair",
    "convert",
    "convert_file",
    "fold",
    "layout_of",
    "pairs_of",
]
