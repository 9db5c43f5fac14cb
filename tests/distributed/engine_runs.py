"""Training on the engines that people use, each against one process: ``engine_runs.py FILE``.

``FILE FOLDER [CASE...]``, on two processes over gloo, or on four. Rank 0 writes what was found to
FILE, which ``test_engines.py`` checks, and docs/make_engines_table.py puts into docs/scaling.md.
DeepSpeed's cases are run by name only, since it may not be installed.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import wn_surgery as wn
from tests.distributed.cut_models import (
    ALL,
    USUAL,
    Block,
    Net,
    cut,
    difference,
    error,
    shard,
    state,
    tokens,
    train,
    weight_of,
    whole,
)
from tests.distributed.fsdp_cases import two_dimensions
from tests.distributed.launching import leave

warnings.filterwarnings("ignore")

STEPS = 20


def normed(rules: Any = ALL) -> nn.Module:
    model = Net()
    wn.apply(model, rules)
    return model


def mine() -> slice:
    """This rank's rows of a batch."""
    return slice(dist.get_rank(), None, dist.get_world_size())


def steps(
    model: nn.Module,
    optimizer: Any,
    part: slice,
    numbers: range = range(STEPS),
    backward: Any = None,
) -> None:
    for number in numbers:
        optimizer.zero_grad()
        loss = model(tokens(number)[part]).square().mean()
        loss.backward() if backward is None else backward(loss)
        optimizer.step()


def adamw(groups: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=1e-2, foreach=False)


def groups_of(model: nn.Module) -> Any:
    return wn.parameter_groups(model, weight_decay=0.1)


def one(rules: Any = ALL) -> nn.Module:
    """The model, trained by this process alone."""
    model = normed(rules)
    train(model)
    return model


def gathered(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True)
    )
    return state


def apart(one: wn.Statistics, other: wn.Statistics) -> float:
    assert len(one.sites) == len(other.sites) == len(USUAL)
    return max(
        float(
            (a.g_values - b.g_values).abs().max() + (a.v_norm_values - b.v_norm_values).abs().max()
        )
        for a, b in zip(one.sites, other.sites, strict=True)
    )


# torch's own ----------------------------------------------------------------------------


def ddp(mesh: DeviceMesh) -> Any:
    model = normed()
    train(nn.parallel.DistributedDataParallel(model), mine())
    return {"difference": difference(state(model), state(one()))}


def fsdp1(mesh: DeviceMesh, *, use_orig_params: bool) -> Any:
    """Before the wrap; what is refused after it; and the lines that the errors give."""
    wrap = partial(
        FullyShardedDataParallel,
        use_orig_params=use_orig_params,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.device("cpu"),
    )
    model, alone = normed(), normed()
    groups = groups_of(model) if use_orig_params else None
    wrapped: Any = wrap(model)
    # Without the Parameters there is one group for all.
    steps(wrapped, adamw(wrapped.parameters() if groups is None else groups), mine())
    steps(alone, adamw(alone.parameters() if groups is None else groups_of(alone)), slice(None))
    found: dict[str, Any] = {"difference": difference(gathered(wrapped), state(alone))}
    for name, call in {
        "apply": lambda: wn.apply(wrapped, {**ALL[0], "dim": 1, "replace": True}),
        "remove": lambda: wn.remove(wrapped),
        "remove from a part": lambda: wn.remove(wrapped.module.head),
        "statistics": lambda: wn.statistics(wrapped),
        "folded": lambda: wn.folded(wrapped).__enter__(),
        "writable": lambda: wn.writable(wrapped).__enter__(),
        "initialize_from_batch": lambda: wn.initialize_from_batch(wrapped, tokens()),
        "parameter_groups": lambda: groups_of(wrapped),
        "late": lambda: wn.apply(wrap(Net()), ALL),
    }.items():
        found[name] = error(call)
    for rules in ({**ALL[0], "dim": None}, {**ALL[0], "dim": []}):
        found[f"dim={rules['dim']}"] = error(lambda rules=rules: wrap(normed(rules))(tokens()))  # type: ignore[misc]
    # What the messages say.
    said = found["remove"].partition("\n--\n")[0].splitlines()
    names: dict[str, Any] = {"model": wrapped, "wn_surgery": wn}
    exec("\n".join(line[4:] for line in said if line.startswith("    ")), names)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        found["statistics inside"] = apart(wn.statistics(wrapped), wn.statistics(alone))
        for each in (wrapped, alone):
            with wn.writable(each):
                weight_of(getattr(each, "module", each), "head.weight").data.mul_(-2.0)
    found["writable inside"] = difference(gathered(wrapped), state(alone))
    with wn.writable(alone):
        weight_of(alone, "head.weight").data.mul_(-0.5)
    wn.remove(alone)
    found["plain"] = difference(names["plain"], state(alone))
    return found


def fsdp2(mesh: DeviceMesh) -> Any:
    model = shard(normed(), mesh)
    train(model, mine())
    return {"difference": difference(gathered(model), state(one()))}


def tensor_parallel(mesh: DeviceMesh) -> Any:
    model = cut(USUAL, mesh)
    wn.apply(model, ALL)
    train(model)
    return {"difference": difference(state(model), state(one()))}


def pipeline(mesh: DeviceMesh) -> Any:
    """Stages that are cut by hand, and by torch's tracer."""
    from torch.distributed.pipelining import (
        PipelineStage,
        ScheduleGPipe,
        SplitPoint,
        pipeline,
    )

    def layers() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)
        )
        wn.apply(model, "linears")
        return model

    def batch(number: int) -> Tensor:
        return torch.randn(4, 6, generator=torch.Generator().manual_seed(number))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    alone = layers()
    optimizer = adamw(groups_of(alone))
    for number in range(STEPS):
        optimizer.zero_grad()
        loss(alone(batch(number)), batch(number)[:, :4]).backward()
        optimizer.step()
    expected = state(alone)
    rank, cpu = dist.get_rank(), torch.device("cpu")
    by_hand = layers()[[slice(0, 2), slice(2, None)][rank]]
    split = pipeline(layers(), (batch(0)[:2],), split_spec={"2": SplitPoint.BEGINNING})
    found: dict[str, float] = {}
    for how, stage, part in (
        ("by hand", PipelineStage(by_hand, rank, 2, cpu), by_hand),
        ("traced", split.build_stage(rank, cpu), split.get_stage_module(rank)),
    ):
        schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss)
        optimizer = adamw(groups_of(part))
        for number in range(STEPS):
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(batch(number))
            else:
                schedule.step(target=batch(number)[:, :4])
            optimizer.step()
        # Both keep the names of the whole.
        kept = {key: value for key, value in expected.items() if (int(key[0]) >= 2) == bool(rank)}
        found[how] = difference(state(part), kept)
    worst: list[Any] = [None, None]
    dist.all_gather_object(worst, found)
    both = {how: max(each[how] for each in worst) for how in found}
    return {"difference": max(both.values()), **both}


# accelerate and transformers -------------------------------------------------------------


@contextmanager
def accelerated(version: int | None) -> Iterator[Any]:
    """Make an Accelerator for DDP, or for FSDP as accelerate has it on accelerators.

    accelerate takes DDP on the CPU whatever its FSDP plugin says: ``AcceleratorState`` looks for it
    on some kinds of device only, and the CPU is none. The rest of accelerate looks at what that
    state holds, so it is set here.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    initialize = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            # The device is not cpu:0, which FSDP1 refuses.
            both = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
            self.__dict__.update(both)
            PartialState._shared_state.update(both)

    def make() -> Any:
        plugin = None
        if version is not None:
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=version,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
                state_dict_type="SHARDED_STATE_DICT",
                use_orig_params=True if version == 1 else None,
                cpu_ram_efficient_loading=False,
            )
        return Accelerator(cpu=True, fsdp_plugin=plugin)

    AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]
    kept = dict(os.environ)
    try:
        yield make
    finally:
        AcceleratorState.__init__ = initialize  # type: ignore[method-assign]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(kept)


def accelerate(mesh: DeviceMesh, folder: Path, *, version: int | None) -> Any:
    """``prepare``, ten steps, ``save_state``, ten more; then ``load_state`` and these ten again."""
    half = STEPS // 2

    def run(accelerator: Any, rules: Any) -> Any:
        def prepared() -> Any:
            model = normed(rules) if rules else Net()
            groups = groups_of(model)
            if version == 1:  # the order that accelerate asks for
                model = accelerator.prepare(model)
                return model, accelerator.prepare(adamw(groups))
            return accelerator.prepare(model, adamw(groups))

        def results() -> dict[str, Tensor]:
            return {key.removeprefix("module."): t for key, t in gathered(model).items()}

        where = str(folder / f"accelerate-{version}-{bool(rules)}")
        go = partial(steps, part=mine(), backward=accelerator.backward)
        model, optimizer = prepared()
        go(model, optimizer, numbers=range(half))
        accelerator.save_state(where)
        go(model, optimizer, numbers=range(half, STEPS))
        straight = results()
        accelerator._models.clear()
        accelerator._optimizers.clear()
        model, optimizer = prepared()
        accelerator.load_state(where)
        go(model, optimizer, numbers=range(half, STEPS))
        return straight, difference(results(), straight), type(model).__name__

    with accelerated(version) as make:
        straight, resumed, kind = run(make(), ALL)
    found = {"difference": difference(straight, state(one())), "resumed": resumed, "kind": kind}
    if version == 1:
        with accelerated(version) as make:
            found["resumed, plain"] = run(make(), None)[1]
    return found


def trainer(mesh: DeviceMesh, folder: Path) -> Any:
    """The Trainer of transformers with its ``fsdp``, against itself under DDP."""
    import transformers as hf

    from tests.distributed.trainer_run import run
    from tests.makers import llama
    from wn_surgery.callbacks.transformers import WeightNormCallback, WeightNormTrainer

    count = dist.get_world_size()
    with accelerated(2):
        sharded = {key: whole(value) for key, value in run(folder, count, False, fsdp=True).items()}

        def made(dim: int | None, patched: bool = False, export_to: Any = None) -> Any:
            rules = [{"names": "**.q_proj", "dim": dim}]
            model = llama(num_hidden_layers=1)
            if patched:
                wn.apply(model, rules)
            args = hf.TrainingArguments(
                str(folder / "refused"), use_cpu=True, ddp_backend="gloo", report_to=[], fsdp=True
            )
            callback = WeightNormCallback(rules, export_to)
            return WeightNormTrainer(model, args, callbacks=[callback])

        refused = {
            "a scalar": error(lambda: made(None)),
            "a scalar, patched": error(lambda: made(None, patched=True)),
            "export_to": error(lambda: made(0, export_to=folder / "plain")),
        }
    with accelerated(None):
        expected = run(folder, count, False)
    return {"difference": difference(sharded, expected), **refused}


# DeepSpeed ------------------------------------------------------------------------------


def copy_of(parameter: Tensor, everything: list[Any], ds: Any) -> Tensor:
    with ds.zero.GatheredParameters([parameter] if everything else []):
        return parameter.detach().clone()


def deepspeed(mesh: DeviceMesh, *, stage: int) -> Any:
    """Before ``initialize``, and what is refused after it."""
    import deepspeed as ds

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = normed()
    engine, *_ = ds.initialize(model=model, optimizer=adamw(groups_of(model)), config=settings)
    for number in range(STEPS):
        engine.backward(engine(tokens(number)[mine()]).square().mean())
        engine.step()
    everything = list(model.parameters()) if stage == 3 else []
    alone = one()
    with ds.zero.GatheredParameters(everything):
        found: dict[str, Any] = {
            "difference": difference({k: v.clone() for k, v in state(model).items()}, state(alone)),
            "statistics inside": apart(wn.statistics(model), wn.statistics(alone)),
        }
    for name, call in {
        "apply": lambda: wn.apply(model, {**ALL[0], "dim": 1, "replace": True}),
        "remove": lambda: wn.remove(model),
        "remove by the engine": lambda: wn.remove(engine),
        "writable": lambda: wn.writable(model).__enter__(),
        "initialize_from_batch": lambda: wn.initialize_from_batch(model, tokens()),
        **({"statistics": lambda: wn.statistics(model)} if stage == 3 else {}),
        **({"folded": lambda: wn.folded(model).__enter__()} if stage == 3 else {}),
    }.items():
        found[name] = error(call)
    said = found["remove"].partition("\n--\n")[0].splitlines()
    names: dict[str, Any] = {"model": model, "wn_surgery": wn, "deepspeed": ds}
    exec("\n".join(line[4:] for line in said if line.startswith("    ")), names)
    wn.remove(alone)
    found["plain"] = difference(names["plain"], state(alone))
    # The fact that the messages rely on: what is written into a parameter is lost.
    bias: Any = model.get_submodule("head").bias
    kept = copy_of(bias, everything, ds)
    with ds.zero.GatheredParameters([bias] if everything else [], modifier_rank=0):
        bias.data.add_(100.0)
    engine.backward(engine(tokens()[mine()]).square().mean() * 0.0)
    engine.step()
    found["a write survives"] = float((copy_of(bias, everything, ds) - kept).abs().max())
    if stage == 3:
        with ds.zero.Init(config_dict_or_path=settings):
            empty = Net()
        found["apply under zero.Init"] = error(lambda: wn.apply(empty, ALL))
        found["plan under zero.Init"] = error(lambda: wn.plan(empty, ALL))
    engine.destroy()
    return found


# All of them ----------------------------------------------------------------------------


def both(mesh: DeviceMesh) -> Any:
    return {"difference": max(each["after"] for each in two_dimensions(mesh).values())}


def cases(folder: Path) -> dict[str, Callable[[DeviceMesh], Any]]:
    if dist.get_world_size() == 4:
        return {"tensor parallelism, then FSDP2": both}
    found: dict[str, Callable[[DeviceMesh], Any]] = {
        "DDP": ddp,
        "FSDP1, use_orig_params=True": partial(fsdp1, use_orig_params=True),
        "FSDP1, use_orig_params=False": partial(fsdp1, use_orig_params=False),
        "FSDP2": fsdp2,
        "tensor parallelism": tensor_parallel,
        "pipeline, GPipe": pipeline,
        "accelerate, DDP": partial(accelerate, folder=folder, version=None),
        "accelerate, FSDP1": partial(accelerate, folder=folder, version=1),
        "accelerate, FSDP2": partial(accelerate, folder=folder, version=2),
        "Trainer, fsdp": partial(trainer, folder=folder),
    }
    return found


def deepspeed_cases() -> dict[str, Callable[[DeviceMesh], Any]]:
    return {f"DeepSpeed, ZeRO-{stage}": partial(deepspeed, stage=stage) for stage in (1, 2, 3)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    limit = dt.timedelta(seconds=120)
    wanted = sys.argv[3:]
    with_deepspeed = any(name.startswith("DeepSpeed") for name in wanted)
    if with_deepspeed:
        import deepspeed as ds

        # Its kernel for shared memory would be compiled now; gloo does without.
        ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ds.init_distributed("gloo", timeout=limit, verbose=False)
    else:
        dist.init_process_group("gloo", timeout=limit)
    try:
        every = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
        known = deepspeed_cases() if with_deepspeed else cases(Path(sys.argv[2]))
        results = {}
        for name in wanted or known:
            print(name, flush=True)
            results[name] = known[name](every)
        if dist.get_rank() == 0:
            torch.save(results, sys.argv[1])
    finally:
        dist.destroy_process_group()
    leave()
