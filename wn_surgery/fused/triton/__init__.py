"""Whole-model evaluation on CUDA: all weights of a group in one to four launches of Triton's.

Nothing here imports triton; :mod:`wn_surgery.fused.triton.evaluator` does when it is used.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from wn_surgery.fused.evaluator import Spec

__all__ = ["why_not"]

_CAPABILITY = {torch.float32: (7, 0), torch.float16: (7, 0), torch.bfloat16: (8, 0)}


def why_not(device: torch.device, dtype: torch.dtype, spec: Spec) -> str | None:
    """Why the Triton kernels cannot compute a weight.

    Args:
        device: where v and g are. On the CPU the kernels run in Triton's interpreter only
            (``TRITON_INTERPRET=1`` in the environment), which is for testing them.
        dtype: of v and g.
        spec: what the weight is.

    Returns:
        The reason; ``None`` if they can.

    Example:
        >>> import torch
        >>> from wn_surgery.fused.evaluator import Spec
        >>> from wn_surgery.fused.triton import why_not
        >>> why_not(torch.device("cpu"), torch.float64, Spec((4, 3)))
        'no Triton kernel for float64'
        >>> why_not(torch.device("cpu"), torch.float32, Spec((4, 3, 2), (0, 2)))
        'no Triton kernel for norms over separate axes, dim=(0, 2)'
    """
    return _why_not_spec(dtype, spec) or _why_not_here(device, dtype)


def _why_not_spec(dtype: torch.dtype, spec: Spec) -> str | None:
    if dtype not in _CAPABILITY:
        return f"no Triton kernel for {_name(dtype)}"
    if spec.norm_dtype not in (None, torch.float32):
        return f"the Triton kernels compute norms in float32, not {_name(spec.norm_dtype)}"
    axes = spec.axes
    if axes is None:
        return f"no Triton kernel for norms over separate axes, dim={spec.dim}"
    size = axes.before * axes.kept * axes.after
    if size == 0:
        return "it has no elements"
    if size > 2**31 - 1:
        return f"it has {size} elements; the Triton kernels count to 2147483647"
    return None


def _why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _is_installed("triton"):
        return "triton is not installed; pip install 'wn-surgery[triton]'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        return None if interpreted else "Triton has no kernels for the CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA's devices"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter works on the CPU only"
    if not torch.cuda.is_available():
        return "no CUDA device"
    has, needed = torch.cuda.get_device_capability(device), _CAPABILITY[dtype]
    if has < needed:
        return (
            f"{_name(dtype)} needs compute capability {needed[0]}.{needed[1]}; "
            f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}"
        )
    return None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a finder that blocks it; a module without a spec
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
