"""Each model against its twin: the same class, built while nobody puts weight norm on."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import type_before_parametrizations

import wn_surgery as wn

from .residue import residue
from .zoo import CODEC, CONVOLUTIONS, LEGACY, PARAMETRIZED, SPEECH, TRANSFORMERS, WAVE, Model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*jit.* is deprecated:DeprecationWarning"),  # snac
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_tcn"),
]
HOOKS = [
    f"_{when}_hooks"
    for when in (
        "forward",
        "forward_pre",
        "backward",
        "backward_pre",
        "state_dict",
        "state_dict_pre",
        "load_state_dict_pre",
        "load_state_dict_post",
    )
]


def _higgs() -> nn.Module:
    hf: Any = importlib.import_module("transformers")
    speech = hf.HubertConfig(**{**SPEECH, "conv_stride": (8, 4)})
    config = hf.HiggsAudioV2TokenizerConfig(
        target_bandwidths=[4.0],
        sample_rate=16000,  # the semantic model's: nothing is resampled
        codebook_size=16,
        codebook_dim=24,
        downsample_factor=16,
        acoustic_model_config=hf.DacConfig(**CODEC),
        semantic_model_config=speech,
    )
    model: nn.Module = _higgs_module().HiggsAudioV2TokenizerModel(config)
    return model


def _higgs_module() -> Any:
    """The modeling file imports torchaudio, and needs it for resampling alone."""
    family = "transformers.models.higgs_audio_v2_tokenizer"
    name = f"{family}.modeling_higgs_audio_v2_tokenizer"
    if name in sys.modules or importlib.util.find_spec("torchaudio") is not None:
        return importlib.import_module(name)
    # First whatever asks whether torchaudio is there: the answer is cached.
    importlib.import_module("transformers.models.xcodec.modeling_xcodec")
    stand_in = ModuleType("torchaudio")
    stand_in.__spec__ = ModuleSpec("torchaudio", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchaudio", stand_in)
        return importlib.import_module(name)


def _run_higgs(model: Any) -> Tensor:
    output: Tensor = model(WAVE[None, :, :320]).audio_values
    return output


HIGGS = Model(
    _higgs,
    _run_higgs,
    {**CONVOLUTIONS, "names": "acoustic_{encoder,decoder}.**"},
    "",
    own_remover=True,
)
ZOO = {**TRANSFORMERS, "higgs_audio_v2_tokenizer": HIGGS, **LEGACY, **PARAMETRIZED}
every_model = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


@contextmanager
def _nobody_puts_weight_norm_on() -> Iterator[None]:
    """Both of torch's functions do nothing, under every name they were imported by."""

    def nothing(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return module

    with pytest.MonkeyPatch.context() as patch:
        for module in list(sys.modules.values()):
            found = getattr(module, "__dict__", {}).get("weight_norm")
            if isinstance(found, FunctionType) and found.__module__.startswith("torch.nn.utils"):
                patch.setattr(module, "weight_norm", nothing)
        yield


def _twin(entry: Model) -> nn.Module:
    entry.build()  # so that all it needs is imported
    with _nobody_puts_weight_norm_on():
        torch.manual_seed(0)
        return entry.build().eval()


def _removed(entry: Model) -> nn.Module:
    model = entry.normed()
    wn.remove(model)
    return model


def _anatomy(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that weight norm could leave behind, module by module."""
    return [
        (
            name,
            type(module),
            list(module._parameters),
            list(module._buffers),
            {kind: len(getattr(module, kind)) for kind in HOOKS},
            set(vars(module)),
        )
        for name, module in model.named_modules()
    ]


def _carried(model: nn.Module) -> list[wn.Site]:
    return [site for site in wn.sites(model) if site.normed]


def _ulps(a: Tensor, b: Tensor) -> int:
    assert a.dtype == b.dtype == torch.float32 and (a > 0).all() and (b > 0).all()
    return int((a.view(torch.int32) - b.view(torch.int32)).abs().max())


@every_model
@torch.no_grad()
def test_what_remove_leaves_is_the_class_without_weight_norm(entry: Model) -> None:
    twin, model = _twin(entry), _removed(entry)
    assert _carried(twin) == []
    # Before any forward: transformers installs hooks of its own in some models' first one.
    assert _anatomy(model) == _anatomy(twin)
    assert list(model.state_dict()) == list(twin.state_dict())
    data = pickle.dumps(model)
    assert b"wn_surgery" not in data

    output = entry.run(entry.normed())
    twin.load_state_dict(model.state_dict(), strict=True)
    for other in (model, twin, pickle.loads(data)):
        assert torch.equal(entry.run(other), output)


@every_model
def test_types_are_those_before_weight_norm(entry: Model) -> None:
    model = entry.normed()
    before = [type_before_parametrizations(module) for module in _layers(model)]
    wn.remove(model)
    assert [type(module) for module in model.modules()] == before


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if "parametrizations" not in name.split(".")]


@every_model
def test_frozen_weights_stay_frozen_and_the_others_trainable(entry: Model) -> None:
    model = entry.normed()
    sites = _carried(model)
    for site in sites[::2]:
        assert site.held is not None and site.held.g is not None and site.held.v is not None
        site.held.g.requires_grad_(False)
        site.held.v.requires_grad_(False)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    expected |= {site.name: index % 2 == 1 for index, site in enumerate(sites)}
    wn.remove(model)
    left = dict(model.named_parameters())
    assert {name: p.requires_grad for name, p in left.items()} == {
        name: expected[name] for name in left
    }
    assert {type(left[site.name]) for site in sites} == {nn.Parameter}


@every_model
@torch.no_grad()
def test_apply_is_torchs_own_on_the_same_weights(entry: Model) -> None:
    """Also for the layers that get their weight norm in ``__init__``."""
    output, sites = entry.run(entry.normed()), _carried(entry.normed())
    ours = _removed(entry)
    theirs = copy.deepcopy(ours)
    rules: list[dict[str, Any]] = []
    for site in sites:
        layer, _, param = site.name.rpartition(".")
        assert site.dim is None or isinstance(site.dim, int)
        weight_norm(theirs.get_submodule(layer), param, -1 if site.dim is None else site.dim)
        rules.append({"names": layer, "params": param, "dim": site.dim})
    wn.apply(ours, rules)
    assert torch.equal(entry.run(ours), output)

    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key, value in other.items():
        assert mine[key].shape == value.shape, key
        if key.endswith("original0"):
            # Ours is the kernel's own norm; torch's function sums in another order.
            assert _ulps(mine[key], value) <= 2, key
        else:
            assert torch.equal(mine[key], value), key
    ours.load_state_dict(other, strict=True)
    assert torch.equal(entry.run(ours), entry.run(theirs))
    theirs.load_state_dict(mine, strict=True)
    assert torch.equal(entry.run(theirs), entry.run(ours))
    ours.load_state_dict(_twin(entry).state_dict(), strict=True)
    assert torch.equal(entry.run(ours), entry.run(_twin(entry)))


def test_higgs_own_apply_and_remover() -> None:
    """It removes the parametrizations, but torch's load hooks stay behind."""
    model = HIGGS.normed()
    from_init = ["semantic_model.encoder.pos_conv_embed.conv.weight"]
    by_rule = _twin(HIGGS)
    assert set(wn.apply(by_rule, HIGGS.rules).changed) == {
        site.name for site in _carried(model) if site.name not in from_init
    }
    model.remove_weight_norm()  # type: ignore[operator]
    assert [site.name for site in _carried(model)] == from_init
    assert residue(model.acoustic_encoder) != []  # type: ignore[arg-type]


def test_the_remover_of_vits_wavenets_raises() -> None:
    """As of transformers 5.23 it asks for an attribute that ``__init__`` does not set."""
    wavenets = [m for m in ZOO["vits"].build().modules() if type(m).__name__ == "VitsWaveNet"]
    assert wavenets
    for wavenet in wavenets:
        with pytest.raises(AttributeError, match="speaker_embedding_size"):
            wavenet.remove_weight_norm()  # type: ignore[operator]
        wn.remove(wavenet)
        assert residue(wavenet) == []
