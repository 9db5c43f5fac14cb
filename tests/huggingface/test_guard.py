"""A patched model where this library has not been imported: an error, and no random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.makers import llama
from wn_surgery.huggingface import (
    WeightNormConfig,
    patch_model,
    save_pretrained,
    unpatch_model,
)
from wn_surgery.huggingface.config import METHOD

pytestmark = pytest.mark.processes

TOKENS = torch.arange(8)[None]


def patched(model: Any | None = None) -> Any:
    made = llama(num_hidden_layers=1).eval() if model is None else model
    patch_model(made, WeightNormConfig())
    return made


# What happens to folders where nothing has imported this library. One process for all of it, since
# it takes seconds to import transformers.
ELSEWHERE = """
import json, sys
import transformers as hf

patched, plain, unguarded = sys.argv[1:]

def tried(load, *args, **options):
    try:
        return load(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

said = {
    name: str(tried(getattr(hf, name).from_pretrained, patched))
    for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel")
}
config = hf.AutoConfig.from_pretrained(patched)
said["built"] = type(tried(hf.AutoModelForCausalLM.from_config, config)).__name__
for name, folder in (("plain", plain), ("unguarded", unguarded)):
    _, info = hf.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    said[name] = sum(map(len, info.values()))
assert "wn_surgery" not in sys.modules
print(json.dumps(said))
"""


def unguarded(folder: Path) -> Path:
    """A checkpoint from before there was a guard."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["fusion_config"]
    path.write_text(json.dumps(content))
    return folder


def test_without_the_import(tmp_path: Path) -> None:
    model = patched()
    folders = [tmp_path / name for name in ("patched", "plain", "unguarded")]
    for folder in folders:
        layout: Any = "plain" if folder.name == "plain" else "parametrized"
        save_pretrained(model, folder, layout=layout)
    unguarded(tmp_path / "unguarded")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *folders],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    refusal = f"ValueError: Unknown fusion type: {METHOD}"
    # What lacks the guard shows why there is one: 7 weights lacking, and 14 not expected.
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "AutoModelForCausalLM": refusal,
        "LlamaForCausalLM": refusal,
        "AutoModel": refusal,
        "built": "LlamaForCausalLM",
        "plain": 0,
        "unguarded": 21,
    }
    assert f"Unknown quantization type, got {METHOD}" in done.stderr
    assert "pip install wn-surgery, and import wn_surgery.huggingface before" in METHOD
    assert METHOD not in (tmp_path / "plain" / "config.json").read_text()
    assert model.config.fusion_config == {METHOD: False}  # the live model stays as it is


def test_a_second_generation_does_not_either(tmp_path: Path) -> None:
    """Loaded and saved again, from patched and from plain weights."""
    model = llama(num_hidden_layers=1).eval()
    model.save_pretrained(tmp_path / "plain")
    loaded = hf.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=WeightNormConfig()
    )
    loaded.save_pretrained(tmp_path / "a")
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "a", fusion_config={})
    again.save_pretrained(tmp_path / "b")
    for name in ("a", "b"):
        assert json.loads((tmp_path / name / "config.json").read_text())["fusion_config"] == {
            METHOD: False
        }
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("own", [None, {"patch_embeddings": False}])
def test_the_config_is_itself_again_when_unpatched(own: Any, tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1).eval()
    if own is not None:
        model.config.fusion_config = own
    before = model.config.to_dict()
    patched(model)
    assert model.config.fusion_config == {**(own or {}), METHOD: False}
    assert own in (None, {"patch_embeddings": False})  # the caller's dict is not written into
    model.save_pretrained(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    unpatch_model(loaded)
    unpatch_model(model)
    assert model.config.to_dict() == before | {
        "dtype": "float32",
        "architectures": ["LlamaForCausalLM"],
    }
    assert getattr(loaded.config, "fusion_config", None) == own


def test_a_checkpoint_from_before_there_was_a_guard(tmp_path: Path) -> None:
    model = patched()
    model.save_pretrained(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(unguarded(tmp_path))
    assert loaded.config.fusion_config == {METHOD: False}
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_it_is_where_transformers_looks() -> None:
    from transformers import fusion_mapping

    assert METHOD in fusion_mapping._FUSION_REGISTRY
