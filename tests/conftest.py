"""What holds for every test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random numbers do not depend on which tests ran before."""
    torch.manual_seed(0)
