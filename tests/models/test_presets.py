"""Presets next to the models that they are of: their own code, or its structure and names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

import wn_surgery as wn
from tests.makers import llama
from wn_surgery.huggingface import rules_for
from wn_surgery.rules.presets import preset

from .zoo import LEGACY, PARAMETRIZED, TRANSFORMERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*jit.* is deprecated:DeprecationWarning"),  # snac
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_tcn"),
]

PACKAGES = {**LEGACY, **PARAMETRIZED}


def there(model: nn.Module) -> dict[str, Any]:
    """Each weight-normed site with its axes."""
    return {site.name: site.dim for site in wn.sites(model) if site.normed}


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("encodec", TRANSFORMERS["encodec"]),
        ("dac", TRANSFORMERS["dac"]),
        ("vits", TRANSFORMERS["vits"]),
        ("wav2vec2", TRANSFORMERS["wav2vec2"]),
        ("hifigan", TRANSFORMERS["speecht5_hifigan"]),
        ("dac", PACKAGES["snac"]),
        ("tcn", PACKAGES["pytorch_tcn"]),
    ],
)
def test_the_models_own_weight_norm_comes_back(name: str, entry: Any) -> None:
    model = entry.normed()
    own = there(model)
    assert own
    wn.remove(model)
    wn.apply(model, name)
    assert there(model) == own


def test_the_convolutions_of_mimis_seanet() -> None:
    model = TRANSFORMERS["mimi"].normed()
    own = [name for name in there(model) if name.startswith(("encoder.", "decoder."))]
    wn.remove(model)
    assert wn.apply(model, rules_for(model)).changed == tuple(own) != ()
    assert rules_for(model) == preset("mimi")


# Of models that no package here ships: their structure, with their names -------------------------


class Named(nn.Module):
    """A module with the children that it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def conv(c_in: int = 4, c_out: int = 4, kernel: int = 3) -> nn.Conv1d:
    return nn.Conv1d(c_in, c_out, kernel)


def listed(count: int, make: Any) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(count))


def test_bigvgan() -> None:
    generator = Named(
        conv_pre=conv(),
        ups=listed(2, lambda: nn.ModuleList([nn.ConvTranspose1d(4, 4, 4, 2)])),
        resblocks=listed(1, lambda: Named(convs1=listed(1, conv), convs2=listed(1, conv))),
        conv_post=conv(),
    )
    assert len(wn.apply(generator, "bigvgan").changed) == 6


def test_waveglow() -> None:
    def coupling() -> nn.Module:
        end = conv(4, 4, 1)
        nn.init.zeros_(end.weight)  # as there: the flow begins as the identity
        return Named(
            start=conv(2, 4, 1),
            end=end,
            cond_layer=conv(4, 8, 1),
            in_layers=listed(2, conv),
            res_skip_layers=listed(2, lambda: conv(4, 8, 1)),
        )

    model = Named(
        upsample=nn.ConvTranspose1d(4, 4, 4),
        WN=listed(2, coupling),
        convinv=listed(2, lambda: Named(conv=conv(2, 2, 1))),
    )
    changed = wn.apply(model, "waveglow").changed
    parts = ["start", "cond_layer", "in_layers.0", "in_layers.1"]
    parts += ["res_skip_layers.0", "res_skip_layers.1"]
    assert sorted(changed) == sorted(f"WN.{i}.{part}.weight" for i in (0, 1) for part in parts)


def test_deepsdf() -> None:
    decoder = Named(**{f"lin{i}": nn.Linear(4, 1 if i == 8 else 4) for i in range(9)})
    assert wn.apply(decoder, "deepsdf").changed == tuple(f"lin{i}.weight" for i in range(8))


class SDF(nn.Module):
    """An MLP with the geometric initialization of Atzmon & Lipman 2020, theorem 1."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.count = layers
        for i in range(layers):
            last = i == layers - 1
            layer = nn.Linear(3 if i == 0 else width, 1 if last else width)
            if last:
                nn.init.normal_(layer.weight, math.sqrt(math.pi) / math.sqrt(width), 1e-4)
                nn.init.constant_(layer.bias, -0.5)
            else:
                nn.init.normal_(layer.weight, 0.0, math.sqrt(2) / math.sqrt(width))
                nn.init.zeros_(layer.bias)
            self.add_module(f"lin{i}", layer)

    @override
    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = getattr(self, f"lin{i}")(x)
            x = F.softplus(x, beta=100) if i < self.count - 1 else x
        return x


def test_neus_keeps_the_geometric_initialization() -> None:
    model, points = SDF(), F.normalize(torch.randn(64, 3), dim=1)
    before = model(points).detach()
    assert (before - 0.5).abs().mean() < 0.1  # about the distance to a sphere of radius 0.5
    assert wn.apply(model, "neus").changed == tuple(f"lin{i}.weight" for i in range(4))
    assert torch.equal(model(points).detach(), before)
    # An eikonal loss differentiates twice through the norm.
    x = points.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (slope.norm(dim=1) - 1).square().mean().backward()
    held = model.lin0.parametrizations.weight  # type: ignore[union-attr]
    for part in held.parameters():  # type: ignore[union-attr]
        assert part.grad is not None and bool(part.grad.isfinite().all())


def test_pixelcnn() -> None:
    """With the initialization of its paper: every layer's output has unit variance."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ELU(), nn.ConvTranspose2d(8, 6, 3), nn.Flatten(), nn.Linear(864, 4)
    )
    assert wn.apply(model, "pixelcnn++").changed == ("0.weight", "2.weight", "4.weight")
    assert [site.dim for site in wn.sites(model)] == [0, 1, 0]
    x = torch.randn(16, 3, 12, 12)
    assert len(wn.initialize_from_batch(model, x).initialized) == 3
    out = model[:3](x)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(6))


# Renormalized recipes ---------------------------------------------------------------------------


def test_edm2_preserves_magnitudes() -> None:
    """Outputs are as large as inputs, whatever the fan-in (Karras et al. 2024, section 2.3)."""
    for layer in (nn.Linear(2000, 64, bias=False), nn.Conv2d(200, 64, 3, bias=False)):
        model = nn.Sequential(layer)
        wn.apply(model, "edm2")
        assert wn.renormalize(model) == ("0.weight",)
        v = layer.parametrizations.weight.original1  # type: ignore[union-attr]
        g = layer.parametrizations.weight.original0  # type: ignore[union-attr]
        mean_squares = v.detach().square().flatten(1).mean(1)  # type: ignore[operator,union-attr]
        torch.testing.assert_close(mean_squares, torch.ones(64))
        assert bool((g == 1).all()) and not g.requires_grad  # type: ignore[union-attr,operator]
        x = torch.randn(64, *((2000,) if layer.weight.ndim == 2 else (200, 5, 5)))
        assert float(model(x).detach().square().mean()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_ngpt_normalizes_along_the_embedding(tied: bool) -> None:
    """Sections 2.1 to 2.6: what reads the residual stream by rows, what writes to it by columns."""
    model = llama(tie_word_embeddings=tied)
    wn.apply(model, "ngpt")
    wn.renormalize(model)
    assert {name for name, _ in model.named_parameters() if name.endswith(".weight")} == {
        name for name, _ in model.named_parameters() if "norm" in name
    }  # every matrix has weight norm
    for site in wn.sites(model):
        writes = site.name.endswith(("o_proj.weight", "down_proj.weight"))
        assert site.dim == (1 if writes else 0)
        v = site.held.v.detach()  # type: ignore[union-attr]
        assert v.shape[0 if writes else 1] == model.config.hidden_size
        weight = getattr(site.module, site.param).detach()
        for each in (v, weight):
            lengths = each.norm(dim=0 if writes else 1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))
