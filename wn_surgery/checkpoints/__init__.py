"""Weight-normed models as files and state dicts, without the model's class."""

from .convert import convert, fold, layout_of
from .pairs import Pair

__all__ = ["Pair", "convert", "fold", "layout_of"]
