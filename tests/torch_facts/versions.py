"""Facts that hold of newer versions of torch only."""

from __future__ import annotations

import pytest
import torch

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""Older than the version that the facts were found in."""
OLD_TRITON = OLD
"""torch brings its triton, and the kernels need 3.7, which came with 2.13 (docs/versions.md)."""
newer_torch = pytest.mark.skipif(OLD, reason="a fact about torch 2.13 and newer")
