"""Export: a stripped copy, what would break with a target, and whether the result is the model.

Example:
    >>> import torch, wn_surgery as wn
    >>> from wn_surgery import export
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8)).eval()
    >>> _ = wn.apply(model, "linears")
    >>> x = torch.ones(1, 4)
    >>> program = torch.export.export(export.stripped_copy(model), (x,))
    >>> export.verify(model, program, x).exact
    True

In: a model, and what was exported from it.
Out: stripped copies, what would break with a target, how an export differs from the model.
Imports: errors, tables, differences, norm, model, surgery.
"""

from wn_surgery.export.copies import stripped_copy
from wn_surgery.export.preflight import Effect, Finding, Preflight, Target, check
from wn_surgery.export.verification import Difference, Verification, verify

__all__ = [
    "Difference",
    "Effect",
    "Finding",
    "Preflight",
    "Target",
    "Verification",
    "check",
    "stripped_copy",
    "verify",
]
