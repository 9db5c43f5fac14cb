"""Exports do not share what torch.compile has cached."""

from __future__ import annotations

import pytest
import torch

from tests.torch_facts.versions import OLD


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """An older torch.export stops at the eighth model whose forward is the same code."""
    if OLD:
        torch.compiler.reset()
