"""Presets: what each matches, on modules with the structure of the originals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.torch_facts.versions import OLD
from wn_surgery.errors import RuleError
from wn_surgery.rules.presets import PRESETS, Preset, preset
from wn_surgery.rules.rule import matches_class, matches_module
from wn_surgery.rules.sources import Rule, as_rules


def matched(name: str, model: nn.Module) -> list[str]:
    (rule,) = preset(name)
    modules = model.named_modules(remove_duplicate=False)
    return [path for path, module in modules if matches_module(rule, path, type(module))]


class Block(nn.Module):
    """A module with the children it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def conv() -> nn.Conv1d:
    return nn.Conv1d(4, 4, 3)


def test_the_names() -> None:
    assert list(PRESETS) == [
        *("convolutions", "linears", "hifigan", "bigvgan", "vits", "encodec", "dac", "mimi"),
        *("waveglow", "wav2vec2", "dino-head", "tcn", "pixelcnn++", "deepsdf", "neus", "edm2"),
        "ngpt",
    ]
    for name, entry in PRESETS.items():
        assert isinstance(entry, Preset)
        assert entry.name == name
        assert entry.source
        assert entry.summary.endswith(".")
        assert preset(name) is entry.rules
        assert {rule.label for rule in entry.rules} == {f"preset {name}"}
        assert as_rules([rule.to_dict() for rule in entry.rules]) == entry.rules


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["tcn"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "near"), [("hifi-gan", "hifigan"), ("dino", "dino-head"), ("linear", "linears")]
)
def test_an_unknown_name(name: str, near: str) -> None:
    with pytest.raises(RuleError, match=rf"no preset is called '{name}'; did you mean '{near}'"):
        preset(name)
    with pytest.raises(RuleError, match="the presets are convolutions, linears"):
        preset("zzz")


def test_convolutions() -> None:
    kinds = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
    (rule,) = preset("convolutions")
    assert rule.dim == 0
    for kind in kinds:
        assert matches_class(rule, getattr(nn, kind))
    for other in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.LSTM, nn.Module):
        assert not matches_class(rule, other)


def test_linears() -> None:
    model = Block(fc=nn.Linear(2, 2), attention=nn.MultiheadAttention(4, 2), conv=conv())
    assert matched("linears", model) == ["fc", "attention.out_proj"]
    (rule,) = preset("linears")
    assert rule.dim == "out"
    assert not matches_class(rule, nn.Bilinear)


def test_linears_of_gpt2() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    (rule,) = preset("linears")
    assert matches_class(rule, pytorch_utils.Conv1D)


def test_hifigan() -> None:
    generator = Block(
        conv_pre=conv(),
        ups=nn.ModuleList([nn.ConvTranspose1d(4, 4, 4, 2)]),
        resblocks=nn.ModuleList([Block(convs1=nn.ModuleList([conv()]))]),
        conv_post=conv(),
    )
    assert matched("hifigan", generator) == [
        "conv_pre",
        "ups.0",
        "resblocks.0.convs1.0",
        "conv_post",
    ]
    assert preset("hifigan")[0].options() == Rule().options()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            Block(encoder=Block(pos_conv_embed=Block(conv=conv()), other=conv())),
            "encoder.pos_conv_embed.conv",
        ),
        (Block(pos_conv_embed=Block(conv=conv())), "pos_conv_embed.conv"),
        (Block(encoder=Block(pos_conv=nn.Sequential(conv(), nn.GELU()))), "encoder.pos_conv.0"),
    ],
)
def test_wav2vec2(model: nn.Module, expected: str) -> None:
    assert matched("wav2vec2", model) == [expected]
    assert preset("wav2vec2")[0].dim == 2


@pytest.mark.skipif(OLD, reason="transformers builds them on meta with a newer torch only")
@pytest.mark.parametrize(
    ("family", "task"),
    [
        *(("Wav2Vec2", "Model"), ("Hubert", "Model"), ("WavLM", "Model"), ("SEW", "Model")),
        *(("UniSpeech", "Model"), ("SpeechT5", "ForSpeechToText")),
    ],
)
def test_wav2vec2_of_transformers(family: str, task: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        encoder_layers=1,
        decoder_layers=1,
        num_attention_heads=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        intermediate_size=16,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}{task}")(config)
    found = matched("wav2vec2", model)
    normed = [name for name, module in model.named_modules() if hasattr(module, "parametrizations")]
    assert found == normed
    (path,) = found
    g = model.get_submodule(path).parametrizations.weight.original0
    assert [axis for axis, size in enumerate(g.shape) if size > 1] == [preset("wav2vec2")[0].dim]


def test_dino_head() -> None:
    head = Block(mlp=nn.Sequential(nn.Linear(2, 2)), last_layer=nn.Linear(2, 2, bias=False))
    assert matched("dino-head", Block(backbone=nn.Linear(2, 2), head=head)) == ["head.last_layer"]
    assert matched("dino-head", head) == ["last_layer"]
    (rule,) = preset("dino-head")
    assert rule == Rule(
        names=["**.last_layer", "**.classifier"],
        types="torch.nn.Linear",
        g_init=1.0,
        train_g=False,
    )


@pytest.mark.skipif(OLD, reason="transformers builds them on meta with a newer torch only")
def test_dino_head_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for family in ("ViT", "Dinov2"):
        config = getattr(transformers, f"{family}Config")(num_hidden_layers=1)
        with torch.device("meta"):
            model = getattr(transformers, f"{family}ForImageClassification")(config)
        assert matched("dino-head", model) == ["classifier"]


def test_tcn() -> None:
    first, second = conv(), conv()
    block = Block(
        conv1=first,
        conv2=second,
        net=nn.Sequential(first, nn.ReLU(), second),
        downsample=nn.Conv1d(4, 4, 1),
    )
    expected = ["conv1", "conv2", "net.0", "net.2"]
    assert matched("tcn", block) == expected
    model = Block(network=nn.Sequential(block), linear=nn.Linear(2, 2))
    assert matched("tcn", model) == [f"network.0.{name}" for name in expected]
