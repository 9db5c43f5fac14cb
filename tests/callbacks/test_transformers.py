"""The Trainer of transformers with weight norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import Dataset

import wn_surgery as wn
from tests.makers import llama
from wn_surgery.callbacks.holding import refuse_unheld
from wn_surgery.callbacks.transformers import WeightNormCallback, WeightNormTrainer
from wn_surgery.fused import is_fused
from wn_surgery.huggingface import WeightNormConfig, patch_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

RULES = [{"names": "model.layers.*.self_attn.{q,k,v,o}_proj"}]


class Tokens(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 32, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def trainer(folder: Path, *callbacks: Any, kind: Any = hf.Trainer, **options: Any) -> Any:
    given = {
        key: options.pop(key) for key in ("model", "model_init", "optimizers") if key in options
    }
    if not given.keys() & {"model", "model_init"}:
        given["model"] = llama()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    return kind(
        args=hf.TrainingArguments(**{**settings, **options}),
        train_dataset=Tokens(),
        eval_dataset=Tokens(4),
        callbacks=list(callbacks),
        **given,
    )


def callback(**options: Any) -> WeightNormCallback:
    return WeightNormCallback(WeightNormConfig(RULES), **options)


def parts(model: Any) -> list[tuple[Tensor, Tensor]]:
    return [(s.held.g, s.held.v) for s in wn.sites(model) if s.held is not None]  # type: ignore[misc]


def test_g_and_v_are_trained(tmp_path: Path) -> None:
    made = trainer(tmp_path, callback())
    before = [(g.detach().clone(), v.detach().clone()) for g, v in parts(made.model)]
    assert len(before) == 8
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for (g, v), (old_g, old_v) in zip(parts(made.model), before, strict=True):
        assert not torch.equal(g, old_g) and not torch.equal(v, old_v)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_resuming_is_bit_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, **options}
    whole = trainer(tmp_path / "whole", callback(), **saving)
    whole.train()
    resumed = trainer(tmp_path / "parts", callback(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert list(whole.model.state_dict()) == list(resumed.model.state_dict())
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    states = [made.optimizer.state_dict()["state"] for made in (whole, resumed)]
    for number, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][number][key]), (number, key)


def test_once_per_step_changes_no_bit(tmp_path: Path) -> None:
    states = []
    for once in (True, False):
        made = trainer(tmp_path, callback(once_per_step=once), gradient_accumulation_steps=2)
        assert not is_fused(made.model)
        seen: list[bool] = []
        made.add_callback(Watch(seen))
        made.train()
        assert set(seen) == {once}
        assert not is_fused(made.model)
        states.append(made.model.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


class Watch(hf.TrainerCallback):
    """Notes whether the model is fused at the end of each step."""

    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(is_fused(kwargs["model"]))


def test_checkpoints_reload_by_themselves_and_the_best_one_is_loaded(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        callback(),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=4,
        eval_steps=4,
        learning_rate=0.3,
        load_best_model_at_end=True,
    )
    made.train()
    best = Path(made.state.best_model_checkpoint)
    loaded = hf.LlamaForCausalLM.from_pretrained(best)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, made.model.state_dict()[key]), key
    assert sum(site.normed for site in wn.sites(loaded)) == 8


def test_a_stripped_copy_is_exported(tmp_path: Path) -> None:
    made = trainer(tmp_path, callback(export_to=tmp_path / "plain"))
    made.train()
    exported = hf.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert not any(site.normed for site in wn.sites(exported))
    assert sum(site.normed for site in wn.sites(made.model)) == 8
    tokens = torch.arange(6)[None]
    made.model.eval()
    torch.testing.assert_close(exported(tokens).logits, made.model(tokens).logits)


def test_g_is_kept_out_of_weight_decay(tmp_path: Path) -> None:
    decays = {}
    for kind in (hf.Trainer, WeightNormTrainer):
        made = trainer(tmp_path, callback(), kind=kind)
        made.create_optimizer()
        groups = made.optimizer.param_groups
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        decays[kind] = [id(g) in decayed for g, _ in parts(made.model)]
        assert all(id(v) in decayed for _, v in parts(made.model))
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in made.model.parameters())
    assert all(decays[hf.Trainer])  # which is why the other exists
    assert not any(decays[WeightNormTrainer])


def test_runs_in_which_g_and_v_would_not_train_are_refused(tmp_path: Path) -> None:
    late = trainer(tmp_path)
    late.create_optimizer()
    late.add_callback(callback())
    with pytest.raises(wn.CallbackError, match=r"no weight norm.*callbacks=\[\.\.\.\]"):
        late.train()
    patched = trainer(tmp_path)
    patched.create_optimizer()
    patch_model(patched.model, WeightNormConfig(RULES))
    patched.add_callback(callback())
    with pytest.raises(
        wn.CallbackError, match=r"no optimizer holds g and v of model\.layers\.0.* 7 more"
    ):
        patched.train()
    again = trainer(tmp_path, callback(), model_init=lambda: llama().train())
    with pytest.raises(wn.CallbackError, match=r"model_init=.*call patch_model"):
        again.train()
    model = llama()
    stale = torch.optim.AdamW(model.parameters())
    given = trainer(tmp_path, callback(), model=model, optimizers=(stale, None))
    with pytest.raises(wn.CallbackError, match="before the model was patched"):
        given.train()


def test_weight_norm_of_torchs_is_not_the_callbacks_to_check() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wn.apply(model[0], nn.Linear)
    parametrizations.weight_norm(model[1])
    refuse_unheld(model, [torch.optim.SGD(model[0].parameters())], "")
    with pytest.raises(wn.CallbackError, match="no optimizer holds g and v of 0"):
        refuse_unheld(model, [torch.optim.SGD(model[1].parameters())], "")


def test_model_init_that_patches_and_a_model_that_is_patched(tmp_path: Path) -> None:
    def init() -> Any:
        model = llama()
        patch_model(model, WeightNormConfig(RULES))
        return model

    own = callback()
    trainer(tmp_path, own, model_init=init).train()
    assert own.report is None  # it was patched already
    model = init()
    optimizer = torch.optim.AdamW(wn.parameter_groups(model, weight_decay=0.1))
    trainer(tmp_path, callback(), model=model, optimizers=(optimizer, None)).train()


def test_rules_stand_for_a_config(tmp_path: Path) -> None:
    for rules, count in ((RULES, 8), (WeightNormConfig(RULES), 8), (None, 14)):
        own = WeightNormCallback(rules)
        trainer(tmp_path, own)
        assert own.report is not None and len(own.report.changed) == count
    with pytest.raises(wn.RuleError, match="'name'"):
        WeightNormCallback([{"name": "head"}])


@pytest.mark.parametrize("way", ["apply", "a part"])
def test_weight_norm_from_elsewhere_is_in_the_checkpoints(way: str, tmp_path: Path) -> None:
    """As the callback's: they reload by themselves, and the run goes on from them."""
    runs = []
    for name in ("whole", "parts"):
        model = llama()
        if way == "apply":
            wn.apply(model, RULES)
        else:
            patch_model(model.model, "linears")
        runs.append(trainer(tmp_path / name, model=model, save_strategy="steps", save_steps=4))
    whole, resumed = runs
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-4"
    resumed.train(resume_from_checkpoint=str(folder))
    assert list(whole.model.state_dict()) == list(resumed.model.state_dict())
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
