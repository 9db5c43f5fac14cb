"""Weight-normed models as files and state dicts, without the model's class."""

from .convert import convert, fold, layout_of
from .files import convert_file
from .pairs import Pair

__all__ = ["Pair", "convert", "convert_file", "fold", "layout_of"]
