"""What names and shapes tell of weight norm, and what they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn
from wn_surgery.checkpoints import Options
from wn_surgery.checkpoints.pairs import examine, find_pairs
from wn_surgery.checkpoints.spectral import find_spectral

Shapes = dict[str, tuple[int, ...]]


@pytest.mark.parametrize(
    ("shapes", "kind", "message"),
    [
        ({"weight_g": (3, 1), "weight_v": (4, 2)}, "shape", "not a magnitude"),
        ({"weight_g": (4,), "weight_v": (4, 4)}, "ambiguous", "fits several axes"),
        ({"weight_g": (4, 1), "weight_v": (4, 2), "weight": (4, 2)}, "twice", "stale"),
        ({"a.weight_g": (4, 1)}, "orphan", r"'a\.weight_g' is there without 'a\.weight_v'"),
        ({"a.weight_v": (4, 1)}, "orphan", r"'a\.weight_v' is there without 'a\.weight_g'"),
        (
            {"a.parametrizations.weight.original0": (4, 1)},
            "orphan",
            r"without 'a\.parametrizations\.weight\.original1'",
        ),
        (
            {
                "parametrizations.weight.original0": (4, 1),
                "parametrizations.weight.original1": (4, 2),
                "parametrizations.weight.1._u": (4,),
            },
            "stacked",
            "another parametrization",
        ),
        (
            {
                "parametrizations.weight.original0": (4, 1),
                "parametrizations.weight.original1": (4, 2),
                "weight_g": (4, 1),
                "weight_v": (4, 2),
            },
            "twice",
            "both layouts",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(shapes: Shapes, kind: str, message: str) -> None:
    with pytest.raises(wn.CheckpointError, match=message):
        find_pairs(shapes)
    fine = {"fine.weight_g": (), "fine.weight_v": (2, 5)}
    pairs, problems = examine({**shapes, **fine})
    assert kind in {problem.kind for problem in problems}
    assert "fine.weight" in {pair.weight for pair in pairs}


def test_orphans_are_kept_on_request() -> None:
    shapes: Shapes = {"a.weight_g": (4, 1), "b.weight_g": (2, 1), "b.weight_v": (2, 5)}
    assert [pair.weight for pair in find_pairs(shapes, orphans="keep")] == ["b.weight"]


@pytest.mark.parametrize(
    "shapes",
    [
        {"pos_bias_u": (4, 2), "pos_bias_v": (4, 2)},  # Transformer-XL
        {"gate_g": (4,), "gate_v": (3,)},
        {"gate_g": (4,), "gate_v": (4,)},
        {"lora.weight_u": (8, 2), "lora.weight_v": (2, 8)},  # low-rank factors
    ],
)
def test_other_names_that_end_alike(shapes: Shapes) -> None:
    assert examine(shapes) == ([], [])


def test_parameters_of_other_names() -> None:
    shapes: Shapes = {
        "rnn.weight_hh_l0_g": (8, 1),
        "rnn.weight_hh_l0_v": (8, 2),
        "attn.parametrizations.in_proj_weight.original0": (6, 1),
        "attn.parametrizations.in_proj_weight.original1": (6, 2),
        "kernel_g": (6, 1),
        "kernel_v": (6, 2),
    }
    assert [pair.weight for pair in find_pairs(shapes)] == [
        "rnn.weight_hh_l0",
        "attn.in_proj_weight",
        "kernel",
    ]


def test_ambiguity_is_settled_by_siblings_or_asked_for() -> None:
    shapes: Shapes = {"a.weight_g": (4,), "a.weight_v": (4, 4)}
    assert find_pairs(shapes, dim=1)[0].dim == 1
    siblings = {**shapes, "b.weight_g": (1, 5), "b.weight_v": (4, 5)}
    assert [pair.dim for pair in find_pairs(siblings)] == [1, 1]
    quarrel = {**siblings, "c.weight_g": (4, 1), "c.weight_v": (4, 5)}
    with pytest.raises(wn.CheckpointError, match="fits several axes"):
        find_pairs(quarrel)
    known = {"a.weight": Options(dim=1)}
    assert find_pairs(shapes, known=known)[0].dim == 1
    assert find_pairs(quarrel, known=known)[0].dim == 1


def test_axes_of_size_one_need_no_answer() -> None:
    # (1, 1, 1) for a convolution with one output channel: any reading is one weight.
    assert find_pairs({"weight_g": (1, 1, 1), "weight_v": (1, 8, 7)})[0].dim == 0
    assert find_pairs({"weight_g": (1, 1), "weight_v": (3, 8)})[0].dim is None
    assert find_pairs({"weight_g": (), "weight_v": (3, 8)})[0].dim is None


@pytest.mark.parametrize("dim", [0, 1, 2, None, (0, 1), (0, 2)])
@pytest.mark.parametrize("shape", [(4, 3, 2), (1, 3, 2), (4, 1, 1)])
def test_every_shape_that_the_library_writes_is_read(shape: tuple[int, ...], dim: Any) -> None:
    layer = nn.Conv1d(shape[1], shape[0], shape[2])
    wn.apply(nn.Sequential(layer), {"types": "Conv1d", "dim": dim})
    state = layer.state_dict()
    expected = layer.weight.detach()
    torch.testing.assert_close(wn.checkpoints.convert(state)["weight"], expected)


# Spectral norm ------------------------------------------------------------------------------


def trained(form: str, layer: nn.Module, steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    if form == "legacy":
        nn.utils.spectral_norm(layer)
    else:
        nn.utils.parametrizations.spectral_norm(layer)
    for _ in range(steps):
        layer(torch.randn(2, 8, *([9] * (layer.weight.ndim - 2))))
    return layer.eval()


LAYERS = [
    lambda: nn.Linear(8, 5),
    lambda: nn.Linear(8, 8),
    lambda: nn.Conv1d(8, 8, 3),
    lambda: nn.ConvTranspose1d(8, 8, 3),
    lambda: nn.Conv2d(8, 4, 3),
]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("form", ["legacy", "parametrized"])
def test_spectral_norm_is_recognised_and_stripped(form: str, make: Any) -> None:
    layer = trained(form, make())
    x = torch.randn(1, 8, *([9] * (layer.weight.ndim - 2)))
    layer(x)  # the legacy hook computes the weight then
    state = {f"d.{key}": value for key, value in layer.state_dict().items()}
    assert not wn.checkpoints.pairs_of(state)
    (found,) = find_spectral({key: tuple(value.shape) for key, value in state.items()})
    assert (found.weight, found.layout) == ("d.weight", form)
    assert wn.checkpoints.convert(state).keys() == state.keys()  # unless asked for
    plain = wn.checkpoints.convert(state, also="spectral_norm")
    assert plain.keys() == {"d.weight", "d.bias"}
    assert torch.equal(plain["d.weight"], layer.weight)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
def test_spectral_norm_that_never_ran_has_to_be_told_its_axis() -> None:
    layer = trained("legacy", nn.Conv1d(8, 8, 3), steps=0)
    state = layer.state_dict()
    with pytest.raises(wn.CheckpointError, match="fit its axes 0 and 1"):
        wn.checkpoints.convert(state, also="spectral_norm")
    plain = wn.checkpoints.convert(state, also="spectral_norm", dim=0)
    layer(torch.randn(1, 8, 9))
    assert torch.equal(plain["weight"], layer.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_u": torch.ones(7)}, "no singular vectors"),
        ({"weight": torch.ones(5, 8)}, "stale"),
        ({"weight_u": torch.zeros(5)}, r"spectral norm 0\.0"),
        ({"weight_orig": torch.full((5, 8), float("nan"))}, "spectral norm nan"),
    ],
)
def test_spectral_norm_that_is_damaged(change: dict[str, Any], message: str) -> None:
    state = {"weight_orig": torch.ones(5, 8), "weight_u": torch.ones(5), "weight_v": torch.ones(8)}
    with pytest.raises(wn.CheckpointError, match=message):
        wn.checkpoints.convert({**state, **change}, also=("spectral_norm",))


def test_both_norms_in_one_discriminator() -> None:
    norm = nn.utils.parametrizations
    model = nn.ModuleList([norm.spectral_norm(nn.Linear(3, 4)), norm.weight_norm(nn.Linear(4, 2))])
    state = model.eval().state_dict()
    plain = wn.checkpoints.convert(state, also="spectral_norm")
    assert list(plain) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert torch.equal(plain["0.weight"], model[0].weight)
    assert torch.equal(plain["1.weight"], model[1].weight)
