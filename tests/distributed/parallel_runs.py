"""Models cut over two processes, compared with one process: ``parallel_runs.py FILE``.

Each process also trains the whole model by itself, and rank 0 writes what the cases measured to
FILE. ``test_parallel.py`` says what has to hold.
"""

from __future__ import annotations

import copy
import datetime
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import wn_surgery as wn
from wn_surgery.model import layouts
from wn_surgery.norm.math import magnitude, weight_norm

DOWN = "blocks.0.down.weight"  # cut by columns, and normed by rows


class Block(nn.Module):
    """An MLP whose first layer is cut by rows and whose second by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.tanh(self.up(x)))
        return result


class Net(nn.Module):
    """Tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            # Not of the norm alone: to it the scale of an embedding, its g, means nothing.
            x = x + block(self.norm(x))
        result: Tensor = self.head(x)
        return result


def tokens(step: int = 0) -> Tensor:
    return torch.randint(0, 10, (3, 4), generator=torch.Generator().manual_seed(step))


USUAL: dict[str, Any] = {
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "blocks.0.up": ColwiseParallel(),
    "blocks.0.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
SEQUENCE: dict[str, Any] = {
    "embed": ColwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "blocks.0": PrepareModuleInput(
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
    ),
    "blocks.0.up": ColwiseParallel(),
    "blocks.0.down": RowwiseParallel(output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
ALL = [{"params": "weight", "types": ["Linear", "Embedding"]}]
PLANS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "usual": (USUAL, ALL),
    "sequence": (SEQUENCE, ALL),
    "columns": (USUAL, [{**ALL[0], "dim": 1}]),
    "one norm": (USUAL, [{**ALL[0], "dim": None}]),
    "options": (USUAL, [{**ALL[0], "eps": 1e-4, "norm_dtype": "float64", "g_init": 0.5}]),
}


def cut(plan: dict[str, Any], mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(Net(), mesh, dict(plan))


def train(model: nn.Module, steps: int = 20) -> None:
    groups = wn.parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens(step)).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: whole(value) for key, value in model.state_dict().items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


# Cases ----------------------------------------------------------------------------------


def math(mesh: DeviceMesh) -> Any:
    """The largest difference and the collectives of each kind of cut, with each kind of norm."""
    found = []
    torch.manual_seed(1)
    weight, up = torch.randn(5, 7), torch.randn(5, 7)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for dim in (0, 1, None, (0, 1)):
            for placement in (Shard(0), Shard(1), Replicate()):
                for eps, norm_dtype in ((0.0, None), (1e-3, torch.float32)):
                    options: Any = (dim, eps, norm_dtype)
                    found.append(one_cut(mesh, weight.to(dtype), up.to(dtype), placement, options))
    return found


def one_cut(mesh: DeviceMesh, weight: Tensor, up: Tensor, placement: Placement, options: Any) -> Any:
    v = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
    g = nn.Parameter(magnitude(v, *options) * 2)
    one_v = weight.clone().requires_grad_()
    one_g = (magnitude(weight, *options) * 2).requires_grad_()
    gradient = distribute_tensor(up, mesh, [placement])
    with CommDebugMode() as forward:
        w = weight_norm(v, g, *options)
    with CommDebugMode() as backward:
        w.backward(gradient)
    one = weight_norm(one_v, one_g, *options)
    one.backward(up)
    pairs = [(w, one), (v.grad, one_v.grad), (g.grad, one_g.grad)]
    dim = options[0]
    kept = () if dim is None else dim if isinstance(dim, tuple) else (dim,)
    return {
        "normed axis cut": isinstance(placement, Shard) and placement.dim not in kept,
        "difference": max(float((whole(a) - b.detach()).abs().max()) for a, b in pairs),  # type: ignore[arg-type,union-attr]
        "dtype": str(weight.dtype),
        "forward": forward.get_total_counts(),
        "backward": backward.get_total_counts(),
        "placed alike": w.placements == v.placements == v.grad.placements  # type: ignore[attr-defined,union-attr]
        and g.grad.placements == g.placements,  # type: ignore[attr-defined,union-attr]
    }


def second_derivatives(mesh: DeviceMesh) -> Any:
    torch.manual_seed(1)
    weight = torch.randn(5, 7, dtype=torch.float64)

    def of(v: Tensor) -> list[Tensor]:
        v, g = nn.Parameter(v), nn.Parameter(magnitude(v, 0) * 2)
        first = torch.autograd.grad((weight_norm(v, g) ** 3).sum(), (v, g), create_graph=True)
        sum(each.square().sum() for each in first).backward()  # type: ignore[union-attr]
        return [whole(v.grad), whole(g.grad)]  # type: ignore[arg-type]

    one = of(weight)
    return max(
        float(((a - b) / b).abs().max())
        for placement in (Shard(0), Shard(1))
        for a, b in zip(of(distribute_tensor(weight, mesh, [placement])), one, strict=True)
    )


def training(mesh: DeviceMesh) -> Any:
    """Twenty steps of each plan, and what is sent beyond what the plain model sends."""
    found = {}
    for name, (plan, rules) in PLANS.items():
        model, one = cut(plan, mesh), Net()
        with CommDebugMode() as plain:
            model(tokens()).square().mean().backward()
        wn.apply(model, rules)
        wn.apply(one, rules)
        with CommDebugMode() as normed:
            model(tokens()).square().mean().backward()
        model.zero_grad()
        before = difference(state(model), state(one))
        train(model)
        train(one)
        found[name] = {
            "before": before,
            "after": difference(state(model), state(one)),
            "sent": normed.get_total_counts() - plain.get_total_counts(),
            "all reduced": all(
                not isinstance(p.grad, DTensor) or p.grad.placements == p.placements  # type: ignore[attr-defined]
                for name, p in model.named_parameters()
                if "parametrizations" in name
            ),
        }
    return found


def verbs(mesh: DeviceMesh) -> Any:
    """Each verb on a cut model and on a whole one."""
    model, one = cut(USUAL, mesh), Net()
    found: dict[str, Any] = {}
    plain = state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = wn.apply(model, ALL, optimizers=[optimizer])
    wn.apply(one, ALL)
    found["changed"] = list(report.changed)
    found["kept bits"] = all(
        torch.equal(whole(weight_of(model, name)), weight) for name, weight in plain.items()
    )
    found["again"] = list(wn.apply(model, ALL).changed)
    found["in the optimizer"] = {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters()
    }

    def compare(name: str) -> None:
        found[name] = difference(state(model), state(one))

    for each in (model, one):
        wn.initialize_from_batch(each, tokens())
    compare("initialize_from_batch")
    for each in (model, one):
        with wn.writable(each):
            for key, value in plain.items():
                if "weight" in key and "norm" not in key:
                    target = weight_of(each, key)
                    new = value.flip(0) * 3
                    if isinstance(target, DTensor):
                        new = distribute_tensor(new, mesh, target.placements)
                    target.data.copy_(new)
    compare("writable")
    kept = state(model)
    with wn.writable(model):
        pass
    found["writable, nothing written"] = difference(kept, state(model))
    mine, theirs = wn.statistics(model, [optimizer]), wn.statistics(one)
    found["statistics"] = max(
        float((a.g_values - b.g_values).abs().max() + (a.v_norm_values - b.v_norm_values).abs().max())
        for a, b in zip(mine.sites, theirs.sites, strict=True)
    )
    with torch.no_grad(), wn.folded(model):
        found["folded"] = float((model(tokens()) - one(tokens())).abs().max())
        with CommDebugMode() as sent:
            weights = [model.get_submodule("blocks.0.down").weight for _ in range(2)]
        found["read twice inside"] = sent.get_total_counts(), weights[0] is weights[1]
    twin = copy.deepcopy(model)
    found["migrated"] = list(wn.migrate(twin).changed)
    found["migrate to legacy"] = error(lambda: wn.migrate(twin, to="legacy"))
    wn.apply(model, {**ALL[0], "dim": 1, "replace": True})
    wn.apply(one, {**ALL[0], "dim": 1, "replace": True})
    compare("replaced")
    weights_now = {name: whole(weight_of(model, name)) for name in report.changed}
    wn.remove(model, optimizers=[optimizer])
    wn.remove(one)
    found["removed bits"] = all(
        torch.equal(whole(model.get_parameter(name)), w) for name, w in weights_now.items()
    )
    found["still cut"] = isinstance(model.get_parameter(DOWN), DTensor)
    compare("removed")
    found["unwritable"] = writes_of_one_rank(mesh)
    return found


def weight_of(model: nn.Module, name: str) -> Tensor:
    path, _, param = name.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(path), param)
    return weight


def writes_of_one_rank(mesh: DeviceMesh) -> Any:
    """A write into one rank's part, and a row that only one rank makes zero."""
    model = cut(USUAL, mesh)
    wn.apply(model, ALL)
    up: Any = model.get_submodule("blocks.0.up")
    before = whole(up.weight)
    with wn.writable(model):
        if mesh.get_rank() == 1:
            up.weight.data.to_local()[0] *= 2
    ratio = whole(up.weight) / before
    kept = state(model)

    def zero() -> None:
        with wn.writable(model):
            if mesh.get_rank() == 1:
                up.weight.data.to_local()[0] = 0

    return ratio[:, 0].tolist(), error(zero), difference(kept, state(model))


def error(call: Callable[[], Any]) -> str:
    """The error of every rank, joined."""
    try:
        call()
        mine = "no error"
    except Exception as raised:  # noqa: BLE001 - the test compares it
        site = getattr(raised, "site", None)
        notes = "".join(f"\n{note}" for note in getattr(raised, "__notes__", ()))
        mine = f"{type(raised).__name__}[{site}]: {raised}{notes}"
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, mine)
    return "\n--\n".join(heard)


def refusals(mesh: DeviceMesh) -> Any:
    """What one rank cannot do, or would do in another way, no rank does."""
    rank = mesh.get_rank()
    found: dict[str, Any] = {}

    def refused(name: str, model: nn.Module, call: Callable[[], Any]) -> None:
        before = {key: (id(value), whole(value).clone()) for key, value in model.named_parameters()}
        kinds = [type(module) for module in model.modules()]
        told = error(call)
        now = {key: (id(value), whole(value)) for key, value in model.named_parameters()}
        same = before.keys() == now.keys() and all(
            before[key][0] == now[key][0] and torch.equal(before[key][1], now[key][1])
            for key in before
        )
        found[name] = told, same and kinds == [type(module) for module in model.modules()]

    model = cut(USUAL, mesh)
    dims: list[Any] = [{**ALL[0], "dim": 0}, {**ALL[0], "dim": 1}]
    refused("other rules", model, lambda: wn.apply(model, dims[rank]))
    refused("more rules", model, lambda: wn.apply(model, ALL + dims[:rank] + SKIPS[:rank]))
    refused("no rule", model, lambda: wn.apply(model, [{"types": "Linea"}] if rank else ALL))
    refused("not a rule", model, lambda: wn.apply(model, [{"typos": "Linear"}] if rank else ALL))

    down: Any = model.get_submodule("blocks.0.down")
    put = layouts.put_parametrized

    def put_fails(module: nn.Module, *args: Any) -> None:
        if module is down and rank == 1:
            raise MemoryError("no memory for this one")
        put(module, *args)

    layouts.put_parametrized = put_fails
    refused("fails in the middle", model, lambda: wn.apply(model, ALL))
    layouts.put_parametrized = put
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    wrong: Any = [optimizer, "not an optimizer"][: rank + 1]
    refused("an optimizer", model, lambda: wn.apply(model, ALL, optimizers=wrong))
    found["optimizer as before"] = held == [id(p) for p in optimizer.param_groups[0]["params"]]

    up: Any = model.get_submodule("blocks.0.up")
    row = whole(up.weight)[-1].clone()
    with torch.no_grad():  # the last row, which is rank 1's
        up.weight.copy_(distribute_tensor(whole(up.weight).index_fill(0, tensor(7), 0.0), mesh, [Shard(0)]))
    refused("a zero row of one rank", model, lambda: wn.apply(model, ALL))
    found["planned by one rank"] = rank == 1 or wn.plan(model, ALL).changes != []
    with torch.no_grad():
        up.weight.copy_(distribute_tensor(whole(up.weight).index_copy(0, tensor(7), row[None]), mesh, [Shard(0)]))
    with torch.no_grad():
        column = whole(down.weight).index_fill(0, tensor(2), 0.0)
        down.weight.copy_(distribute_tensor(column, mesh, [Shard(1)]))
    refused("a zero row in parts", model, lambda: wn.apply(model, ALL))

    partial = nn.Linear(4, 4)
    part = DTensor.from_local(partial.weight.detach(), mesh, [Partial()], run_check=False)
    partial.weight = nn.Parameter(part)
    found["a partial sum"] = error(lambda: wn.apply(partial, ALL))
    return found


SKIPS: list[Any] = [{"action": "skip", "names": "head"}]


def tensor(index: int) -> Tensor:
    return torch.tensor([index])


CASES: dict[str, Callable[[DeviceMesh], Any]] = {
    "math": math,
    "second derivatives": second_derivatives,
    "training": training,
    "verbs": verbs,
    "refusals": refusals,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    try:
        chosen = sys.argv[2:] or list(CASES)
        two = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        results = {name: CASES[name](two) for name in chosen}
        if dist.get_rank() == 0:
            torch.save(results, sys.argv[1])
    finally:
        dist.destroy_process_group()
