"""Lightning's base classes, from either of its packages: each works with either Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch import Callback
else:
    try:
        from lightning.fabric.plugins import CheckpointIO
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:
            from lightning_fabric.plugins import CheckpointIO
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "wn_surgery.callbacks.lightning needs Lightning: "
                "pip install 'wn-surgery[lightning]'",
                name=error.name,
            ) from error

__all__ = ["Callback", "CheckpointIO"]
