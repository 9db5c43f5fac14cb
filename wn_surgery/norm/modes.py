"""What torch is doing while a weight is read: tracing, transforming, recording a graph."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["builds_graph", "jit_traced", "traced", "transformed"]


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit is recording what is called."""
    # In this order: torch.compile stops at the second question.
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def jit_traced() -> bool:
    """Whether torch.jit is recording what is called."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def transformed() -> bool:
    """Whether forward-mode AD or a ``torch.func`` transform is under way."""
    # torch has no public question for either; its own autograd.Function asks the same.
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def builds_graph() -> bool:
    """Whether autograd records: grad mode is on, and that is not undone by inference mode."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
