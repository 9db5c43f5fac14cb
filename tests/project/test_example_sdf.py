"""The example of a signed distance function, with few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "sdf.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sdf", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_exact_distance_and_the_points_of_the_surface(example: ModuleType) -> None:
    points, normals = example.surface(200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(example.exact(points), torch.zeros(200), rtol=0, atol=1e-6)
    # Along the normals, as far as the ring inside, the distance is how far you went.
    for way in (-0.2, -0.05, 0.1, 0.4):
        moved = points + way * normals
        outside = moved[:, :2].norm(dim=1) > 1e-2  # not beyond the axis
        inward = (moved[:, :2] * points[:, :2]).sum(1) > 0
        there = example.exact(moved)[outside & inward]
        assert len(there) > 100
        torch.testing.assert_close(there, torch.full_like(there, way), rtol=0, atol=1e-6)


def test_it_begins_as_a_sphere(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = example.SDF(width=256)
    away = torch.nn.functional.normalize(torch.randn(100, 3), dim=1)
    with torch.no_grad():
        at = [float(model(radius * away).mean()) for radius in (0.2, 0.5, 0.8)]
    assert at == pytest.approx([-0.3, 0.0, 0.3], abs=0.15)


def test_it_trains_draws_and_says_what_it_did(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "sdf.png"
    # It is 0 only if weight norm kept the initialization, and both came closer to the torus.
    assert example.main(["--steps", "20", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "the same function, bit for bit" in out and "after 20 steps" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
