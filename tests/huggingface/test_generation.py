"""``generate`` of a patched model: its tokens, and how often it computes a weight."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.makers import llama
from wn_surgery.huggingface import generation, patch_model, unpatch_model
from wn_surgery.norm import parametrization
from wn_surgery.norm.module_class import FOLDED

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[1, 2, 3]])
TOKENS = 5
RULES = [{"names": "**.{q,k,v,o}_proj"}]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Each v of which a weight is computed."""
    seen: list[Tensor] = []
    right = parametrization.weight_norm

    def counting(v: Tensor, *args: Any) -> Tensor:
        seen.append(v)
        return right(v, *args)

    monkeypatch.setattr(parametrization, "weight_norm", counting)
    return seen


def patched() -> Any:
    model = llama().eval()
    patch_model(model, RULES)
    return model


def generated(model: Any, **options: Any) -> Tensor:
    found: Tensor = model.generate(
        IDS, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, **options
    )
    return found


def count(model: nn.Module) -> int:
    return sum(site.normed for site in wn.sites(model))


def test_each_weight_is_computed_once(computed: list[Tensor], tmp_path: Path) -> None:
    wanted = generated(llama().eval())
    model = patched()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        computed.clear()
        assert torch.equal(generated(each), wanted)
        assert len(computed) == count(each)
        assert not any(module in FOLDED for module in each.modules())


def test_training_mode_and_a_wrapped_call(computed: list[Tensor]) -> None:
    model = patched().train()
    for _ in range(2):
        computed.clear()
        generated(model)
        assert len(computed) == count(model)


def test_two_threads_fold_for_themselves(computed: list[Tensor]) -> None:
    model = patched()
    wanted = generated(model)
    computed.clear()
    meet = threading.Barrier(2)

    def together(_: int) -> Tensor:
        class Meet(transformers.StoppingCriteria):  # type: ignore[misc, name-defined]
            met = False

            def __call__(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
                if not self.met:
                    meet.wait(60)
                self.met = True
                return torch.zeros(len(ids), dtype=torch.bool)

        return generated(model, stopping_criteria=transformers.StoppingCriteriaList([Meet()]))

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(together, range(2)):
            assert torch.equal(found, wanted)
    assert len(computed) == 2 * count(model)


def test_what_is_written_between_two_calls_counts() -> None:
    model = patched()
    before = generated(model)
    with torch.no_grad():
        for site in wn.sites(model):
            if site.normed:
                site.held.g.data.mul_(40)  # type: ignore[union-attr]
    plain = copy.deepcopy(model)
    unpatch_model(plain)
    after = generated(model)
    assert torch.equal(after, generated(plain))
    assert not torch.equal(after, before)


def test_an_error_inside_ends_the_fold(computed: list[Tensor]) -> None:
    class Full(transformers.StoppingCriteria):  # type: ignore[misc, name-defined]
        def __call__(self, *_: Any, **__: Any) -> Any:
            raise OSError("no space")

    model = patched()
    with pytest.raises(OSError, match="no space"):
        generated(model, stopping_criteria=transformers.StoppingCriteriaList([Full()]))
    assert not any(module in FOLDED for module in model.modules())
    computed.clear()
    with torch.no_grad():
        model(IDS)
        model(IDS)
    assert len(computed) == 2 * count(model)


def test_other_models_of_the_class_are_left_alone(computed: list[Tensor]) -> None:
    model = patched()
    unpatch_model(model)
    wn.apply(model, RULES)  # without a note in the config
    wanted = generated(llama().eval())
    computed.clear()
    assert torch.equal(generated(model), wanted)
    assert len(computed) == TOKENS * count(model)


def test_where_a_fold_would_be_in_the_way(computed: list[Tensor]) -> None:
    wanted = generated(llama().eval())
    inside = patched()
    with wn.writable(inside):
        assert torch.equal(generated(inside), wanted)
    inside = patched()
    with torch.no_grad(), wn.folded(inside):
        computed.clear()
        assert torch.equal(generated(inside), wanted)
        assert not computed
    legacy = patched()
    wn.migrate(legacy, to="legacy")
    assert torch.equal(generated(legacy), wanted)


def test_without_memory_it_warns_and_generates(
    computed: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: nn.Module) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = patched()
    wanted = generated(model)
    monkeypatch.setattr(generation, "folded", full)
    computed.clear()
    with pytest.warns(UserWarning, match=r"computed for each token.*unpatch_model") as warned:
        assert torch.equal(generated(model), wanted)
    assert len(computed) == TOKENS * count(model)
    assert warned[0].filename == __file__


def test_gradients_through_what_no_grad_wraps() -> None:
    model = patched()
    found = inspect.unwrap(type(model).generate)(
        model, IDS, max_new_tokens=2, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    found.logits[-1].sum().backward()
    assert all(site.held.g.grad is not None for site in wn.sites(model) if site.normed)  # type: ignore[union-attr]


def test_a_class_with_a_generate_of_its_own() -> None:
    calls: list[str] = []

    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """Its own."""
            calls.append("own")
            return super().generate(*args, **kwargs)

    model = Own(llama().config)
    patch_model(model, RULES)
    patch_model(Own(llama().config), RULES)
    generated(model)
    assert calls == ["own"]
    assert model.generate.__doc__ == "Its own."


def test_the_model_is_freed_at_once() -> None:
    model = patched()
    generated(model)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="compiled, transformers asks for it"
)
def test_compiled_it_is_compiled_once() -> None:
    torch._dynamo.reset()
    model = patched()
    wanted = generated(model)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    assert torch.equal(generated(model), wanted)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(generated(model), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
