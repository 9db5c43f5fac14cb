"""What save_pretrained writes is found by from_pretrained, whoever put weight norm on or off."""

import copy
import dataclasses
import gc
import pickle
import warnings
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn.utils import parametrizations

import wn_surgery as wn
from tests.makers import normed, shaken
from wn_surgery.huggingface import unpatch_model

LOCAL = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
X = torch.linspace(-1, 1, 12).reshape(2, 6)


class Plain(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 6, out: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x))


class Ours(Plain):
    """The constructor calls this library."""

    def __init__(self, width: int = 6, out: int = 4) -> None:
        super().__init__(width, out)
        wn.apply(self, "linears")


class Torchs(Plain):
    def __init__(self, width: int = 6, out: int = 4) -> None:
        super().__init__(width, out)
        parametrizations.weight_norm(self.body[0])
        parametrizations.weight_norm(self.head)


class Legacy(Plain):
    def __init__(self, width: int = 6, out: int = 4) -> None:
        super().__init__(width, out)
        nn.utils.weight_norm(self.body[0])
        nn.utils.weight_norm(self.head)


class LooksAtItself(Ours):
    """No tensor on the meta device says what it is."""

    def __init__(self, width: int = 6, out: int = 4) -> None:
        super().__init__(width, out)
        self.scale = float(self.head.bias.detach().sum())


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("part", ["", "head"])
def test_a_class_without_weight_norm_gets_plain_weights(part: str, tmp_path: Path) -> None:
    model = Plain(out=3)
    wn.apply(model.get_submodule(part), "linears")  # whoever holds it is not known there
    shaken(model)
    keys = list(model.state_dict())
    with pytest.warns(
        UserWarning, match=r"Plain\(\) builds no weight norm on .*plain weig"
    ) as said:
        again = reloaded(model, tmp_path)
    assert len(said) == 1 and said[0].filename == __file__
    assert not normed(again)
    assert torch.equal(again(X), model(X))
    # Nobody else gets another state dict, and the model stays as it is.
    assert list(model.state_dict()) == keys and any("original0" in key for key in keys)


@LOCAL
@torch.no_grad()
@pytest.mark.parametrize("kind", [Ours, Torchs, Legacy, LooksAtItself])
def test_a_class_that_builds_weight_norm_gets_it_without_a_word(kind: Any, tmp_path: Path) -> None:
    model = shaken(kind(out=3))
    again = reloaded(model, tmp_path / "a")
    assert normed(again) == ["body.0.weight", "head.weight"]
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    # As this library stores it; the class may look for it under other names.
    wn.migrate(model)
    again = reloaded(model, tmp_path / "b")
    assert torch.equal(again(X), model(X))
    for site, other in zip(wn.sites(model), wn.sites(again), strict=True):
        assert site.held is None or torch.equal(site.held.g, other.held.g)  # type: ignore[union-attr,arg-type]


@LOCAL
@torch.no_grad()
@pytest.mark.parametrize("kind", [Ours, Torchs, Legacy])
@pytest.mark.parametrize("part", ["", "head"])
def test_what_was_taken_off_is_put_where_the_class_looks(
    kind: Any, part: str, tmp_path: Path
) -> None:
    model = shaken(kind(out=3))
    unpatch_model(model.get_submodule(part))
    for each in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(wn.migrate(model) and model)),
    ):
        assert "head.weight" in each.state_dict()
        again = reloaded(each, tmp_path)
        torch.testing.assert_close(again(X), model(X))
        assert normed(again) == ["body.0.weight", "head.weight"]


def test_a_weight_without_a_direction_is_refused_by_name(tmp_path: Path) -> None:
    model = Torchs()
    unpatch_model(model)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(wn.ZeroNormError, match=r"Torchs\(\) builds weight norm on head\.weight"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_other_weight_norm_than_the_class_builds_is_refused(tmp_path: Path) -> None:
    model = Ours()
    wn.apply(model, {"names": "head", "eps": 1e-3, "replace": True})
    with pytest.raises(wn.CheckpointMismatchError, match=r"on head.weight with dim=0, .*eps=0.001"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    wn.apply(model, {"names": "head", "replace": True})
    reloaded(model, tmp_path)


def files_of_its_own(kind: Any) -> Any:
    """As vocoders have it: the state dict of a part, in a file of their own, read strictly."""

    class Files(kind):  # type: ignore[misc]
        def _save_pretrained(self, save_directory: Path) -> None:
            torch.save({"generator": self.body.state_dict()}, save_directory / "body.pt")

        @classmethod
        def _from_pretrained(cls, *, model_id: str, out: int, **_: Any) -> Any:
            model = cls(out=out)
            saved = torch.load(Path(model_id) / "body.pt", weights_only=True)
            model.body.load_state_dict(saved["generator"])
            return model

    return Files


@LOCAL
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Files.. builds no weight norm")
@pytest.mark.parametrize("kind", [Plain, Ours, Torchs, Legacy])
@pytest.mark.parametrize(
    "way",
    [
        wn.migrate,
        lambda model: wn.apply(model, {"types": "Linear", "replace": True}),
        lambda model: unpatch_model(model.body),
    ],
    ids=["migrated", "applied", "unpatched"],
)
def test_a_class_that_saves_a_part_in_its_own_way(kind: Any, way: Any, tmp_path: Path) -> None:
    model = shaken(files_of_its_own(kind)(out=3))
    way(model)
    again = reloaded(model, tmp_path)
    torch.testing.assert_close(again.body(X), model.body(X))


class Needs(Plain):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.made = make()


@dataclasses.dataclass
class Options:
    width: int = 6
    out: int = 4


class ByDataclass(Plain):
    def __init__(self, config: Options) -> None:
        super().__init__(config.width, config.out)
        wn.apply(self.head, "linears")


class ByDict(Plain):
    def __init__(self, config: dict[str, int], **more: int) -> None:
        super().__init__(config["width"], more.get("out", 4))
        wn.apply(self.head, "linears")


def test_a_class_that_cannot_be_asked_is_warned_of(tmp_path: Path) -> None:
    model = Needs(nn.Identity)
    wn.apply(model, "linears")
    with pytest.warns(UserWarning, match=r"Needs cannot be built again .*TypeError.*convert_file"):
        model.save_pretrained(tmp_path)
    again = Needs.from_pretrained(tmp_path / "", make=nn.Identity)
    assert not normed(again)  # as the warning says


@pytest.mark.parametrize(
    "build", [lambda: ByDataclass(Options(out=3)), lambda: ByDict({"width": 6}, out=3)]
)
def test_arguments_are_those_that_from_pretrained_gives(build: Any, tmp_path: Path) -> None:
    model = shaken(build())
    again = reloaded(model, tmp_path)
    assert normed(again) == ["head.weight"] and torch.equal(again(X), model(X))


def test_the_generator_is_left_alone(tmp_path: Path) -> None:
    model = LooksAtItself()
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_state_dicts_that_nobody_saves_are_as_ever() -> None:
    class Saver(nn.Linear):  # of a library that is not known here
        def save_pretrained(self) -> Any:
            return self.state_dict()

    def save_pretrained(model: nn.Module) -> Any:  # no method
        return model.state_dict()

    layer = Saver(2, 3)
    wn.apply(layer, "linears")
    keys = list(layer.state_dict())
    assert list(layer.save_pretrained()) == list(save_pretrained(layer)) == keys
    assert list(layer.state_dict(destination={})) == keys  # type: ignore[type-var]


def test_a_state_dict_is_not_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    wn.apply(model, "linears")
    state = model.state_dict()
    assert isinstance(state, OrderedDict)
    seen = weakref.ref(state)
    del state
    gc.collect()
    assert seen() is None


# diffusers ------------------------------------------------------------------------------------


def oobleck(diffusers: Any) -> Any:
    """The VAE of Stable Audio: its constructor puts torch's older weight norm on."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        decoder_channels=8,
        decoder_input_channels=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        audio_channels=1,
    ).eval()


def imported() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


@LOCAL
@torch.no_grad()
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("way", ["untouched", "migrated", "whole", "part"])
def test_a_codec_of_diffusers(quick: bool, way: str, tmp_path: Path) -> None:
    model = oobleck(imported())
    sound = torch.linspace(-1, 1, 64).reshape(1, 1, 64)
    shaken(model)
    expected = model.encode(sound).latent_dist.mode()
    if way == "migrated":
        wn.migrate(model)
    elif way != "untouched":
        unpatch_model(model if way == "whole" else model.encoder)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=quick).eval()
    assert normed(again)
    torch.testing.assert_close(again.encode(sound).latent_dist.mode(), expected)


@torch.no_grad()
def test_a_class_of_diffusers_that_calls_this_library(tmp_path: Path) -> None:
    diffusers = imported()
    utils = pytest.importorskip("diffusers.configuration_utils")

    class Net(diffusers.ModelMixin, utils.ConfigMixin):  # type: ignore[misc]
        @utils.register_to_config
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 3)
            wn.apply(self, "linears")

    model = shaken(Net(width=6))
    for _ in range(2):
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        again = Net.from_pretrained(tmp_path)
        assert normed(again) == ["layer.weight"]
        torch.testing.assert_close(again.layer(X), model.layer(X))  # type: ignore[operator]
        unpatch_model(model)


@torch.no_grad()
@pytest.mark.parametrize("quick", [True, False])
def test_a_unet_of_diffusers(quick: bool, tmp_path: Path) -> None:
    diffusers = imported()
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    ).eval()
    wn.apply(model, "convolutions")
    with pytest.warns(UserWarning, match=r"UNet2DModel\(\) builds no weight norm on conv_in"):
        model.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=quick).eval()
    noise = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(again(noise, 1).sample, model(noise, 1).sample)
