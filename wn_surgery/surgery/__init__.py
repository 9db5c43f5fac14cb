"""Deciding what to change in a model, and changing it: all of a plan or nothing.

In: a model and rules.
Out: a :class:`Plan` of what would change, a :class:`Report` of what changed.
Imports: errors, tables, norm, rules, model.
"""

from wn_surgery.surgery.execution import Report
from wn_surgery.surgery.plan import Plan, Step

__all__ = ["Plan", "Report", "Step"]
