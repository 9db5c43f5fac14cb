"""Models of timm and of torchaudio are modules like any others.

PyPI has torchaudio, and torchvision, which timm imports, for CUDA only. Beside a torch for CPUs
their compiled parts do not load, so they are left out here. No model below calls one.

They are not among the packages that `make install` installs: other packages import them where they
are there, and then raise. These tests run where somebody has installed timm and torchaudio.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import wn_surgery as wn
from wn_surgery.model.sites import normed

# Kept, since the operators go with it.
_OPERATORS: list[torch.library.Library] = []


def imported(package: str) -> Any:
    """The package, without its compiled part where that does not load."""
    try:
        return pytest.importorskip(package, exc_type=ModuleNotFoundError)
    except (OSError, RuntimeError):
        pass
    for name in [
        name for name in sys.modules if name.partition(".")[0] in (package, "torchvision")
    ]:
        del sys.modules[name]
    if package == "torchaudio":
        with mock.patch("pathlib.Path.glob", return_value=[]):
            return importlib.import_module(package)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):  # torchvision says what shapes they give
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _OPERATORS.append(library)
    return importlib.import_module(package)


def resnet() -> tuple[Any, torch.Tensor]:
    return imported("timm").create_model("resnet10t"), torch.randn(1, 3, 32, 32)


def separator() -> tuple[Any, torch.Tensor]:
    sizes = {"enc_num_feats": 8, "msk_num_feats": 8, "msk_num_hidden_feats": 8}
    make = imported("torchaudio").models.ConvTasNet
    return make(**sizes, msk_num_layers=1, msk_num_stacks=1), torch.randn(1, 1, 64)


@pytest.mark.parametrize("make", [resnet, separator])
@torch.no_grad()
def test_apply_and_remove(make: Callable[[], tuple[Any, torch.Tensor]]) -> None:
    model, x = make()
    model.eval()
    expected, keys = model(x), list(model.state_dict())
    changed = wn.apply(model, "convolutions").changed
    assert len(changed) == len(normed(model)) >= 7
    torch.testing.assert_close(model(x), expected)
    wn.remove(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
