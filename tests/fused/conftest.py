"""The two paths that compute on the CPU."""

from __future__ import annotations

import pytest

from tests.fused.models import COMPILER
from wn_surgery.fused import fusion
from wn_surgery.fused.choice import Choice, Mode, choose
from wn_surgery.model.sites import NormedSite


# In one worker, so that one builds it.
@pytest.fixture(params=["cpu", pytest.param("native", marks=pytest.mark.xdist_group("native"))])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test twice; the second time ``auto`` takes the compiled path."""
    if request.param == "native":
        if COMPILER is None:
            pytest.skip("no C++ compiler")

        def compiled(site: NormedSite, mode: Mode) -> Choice:
            return choose(site, "native" if mode == "auto" else mode)

        monkeypatch.setattr(fusion, "choose", compiled)
    return str(request.param)
