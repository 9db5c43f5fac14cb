"""What is measured of models that tensor parallelism cuts, as DTensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import wn_surgery as wn
from tests.distributed.cut_models import (
    ALL,
    DOWN,
    PLANS,
    USUAL,
    Net,
    Sent,
    cut,
    difference,
    error,
    state,
    tokens,
    train,
    weight_of,
    whole,
)
from wn_surgery.model import layouts
from wn_surgery.norm.math import magnitude
from wn_surgery.norm.operator import weight_norm


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


def one_cut(
    mesh: DeviceMesh, weight: Tensor, up: Tensor, placement: Placement, options: Any
) -> Any:
    v = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
    g = nn.Parameter(magnitude(v, *options) * 2)
    one_v = weight.clone().requires_grad_()
    one_g = (magnitude(weight, *options) * 2).requires_grad_()
    gradient = distribute_tensor(up, mesh, [placement])
    with Sent() as forward:
        w = weight_norm(v, g, *options)
    with Sent() as backward:
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
        "forward": len(forward.ops),
        "backward": len(backward.ops),
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
        with Sent() as plain:
            model(tokens()).square().mean().backward()
        wn.apply(model, rules)
        wn.apply(one, rules)
        with Sent() as normed:
            model(tokens()).square().mean().backward()
        model.zero_grad()
        before = difference(state(model), state(one))
        train(model)
        train(one)
        found[name] = {
            "before": before,
            "after": difference(state(model), state(one)),
            "sent": len(normed.ops) - len(plain.ops),
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
        float(
            (a.g_values - b.g_values).abs().max() + (a.v_norm_values - b.v_norm_values).abs().max()
        )
        for a, b in zip(mine.sites, theirs.sites, strict=True)
    )
    with torch.no_grad(), wn.folded(model):
        found["folded"] = float((model(tokens()) - one(tokens())).abs().max())
        with Sent() as sent:
            weights = [model.get_submodule("blocks.0.down").weight for _ in range(2)]
        found["read twice inside"] = len(sent.ops), weights[0] is weights[1]
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


SKIPS: list[Any] = [{"action": "skip", "names": "head"}]


def tensor(index: int) -> Tensor:
    return torch.tensor([index])


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
    refused("more rules", model, lambda: wn.apply(model, ALL + SKIPS[:rank]))
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
        up.weight.copy_(
            distribute_tensor(whole(up.weight).index_fill(0, tensor(7), 0.0), mesh, [Shard(0)])
        )
    refused("a zero row of one rank", model, lambda: wn.apply(model, ALL))
    found["planned by one rank"] = rank == 1 or wn.plan(model, ALL).changes != []
    with torch.no_grad():
        up.weight.copy_(
            distribute_tensor(
                whole(up.weight).index_copy(0, tensor(7), row[None]), mesh, [Shard(0)]
            )
        )
    with torch.no_grad():
        column = whole(down.weight).index_fill(0, tensor(2), 0.0)
        down.weight.copy_(distribute_tensor(column, mesh, [Shard(1)]))
    refused("a zero row in parts", model, lambda: wn.apply(model, ALL))

    partial = nn.Linear(4, 4)
    part = DTensor.from_local(partial.weight.detach(), mesh, [Partial()], run_check=False)
    partial.weight = nn.Parameter(part)
    found["a partial sum"] = error(lambda: wn.apply(partial, ALL))
    return found
