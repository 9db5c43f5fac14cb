"""Whole-model evaluation: the weights of a model computed in groups, once a forward.

In: a model.
Out: a :class:`Fusion`; weights, a group at a time.
Imports: errors, tables, norm, model, surgery.
"""

from wn_surgery.fused.choice import Mode
from wn_surgery.fused.fusion import Fusion, Member, fuse, is_fused, shared, unfuse

__all__ = ["Fusion", "Member", "Mode", "fuse", "is_fused", "shared", "unfuse"]
