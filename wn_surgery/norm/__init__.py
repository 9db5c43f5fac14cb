"""What weight norm is: the arithmetic, and the module class that computes a weight when it is read.

In: a direction v, a magnitude g, and the options of a norm (dim, eps, norm_dtype).
Out: weights, gradients, and modules whose parameter is computed.
Imports: errors.
"""

from wn_surgery.norm.math import g_shape, magnitude, norm_except
from wn_surgery.norm.operator import weight_norm
from wn_surgery.norm.options import Dim, NormOptions

__all__ = ["Dim", "NormOptions", "g_shape", "magnitude", "norm_except", "weight_norm"]
