"""Models cut over two processes, compared with one process: ``parallel_runs.py FILE``.

Each process also trains the whole model by itself, and rank 0 writes what the cases measured to
FILE. ``test_parallel.py`` says what has to hold.
"""

from __future__ import annotations

import copy
import datetime as dt
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import wn_surgery as wn
from tests.distributed.launching import leave
from wn_surgery.model import gathering, layouts
from wn_surgery.norm.math import magnitude, norm_except
from wn_surgery.norm.operator import weight_norm


class Sent(TorchDispatchMode):
    """Counts collectives. torch's CommDebugMode also follows modules, and trips over FSDP2's."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # which makes it compute with its parts
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in name:
            self.ops.append(name)
            if "wrap" not in name:
                tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                self.bytes += max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


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
    """Tokens to logits; blocks are checkpointed where ``around`` says so."""

    around = False

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
            y = self.norm(x)
            x = x + (checkpoint(block, y, use_reentrant=False) if self.around else block(y))
        result: Tensor = self.head(x)
        return result


def tokens(step: int = 0) -> Tensor:
    return torch.randint(0, 10, (4, 4), generator=torch.Generator().manual_seed(step))


USUAL: dict[str, Any] = {
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "blocks.0.up": ColwiseParallel(),
    "blocks.0.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
SEQUENCE: dict[str, Any] = {
    "embed": ColwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "blocks.0": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
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


def train(model: nn.Module, part: slice = slice(None), steps: int = 20) -> None:
    groups = wn.parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens(step)[part]).square().mean().backward()
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


SKIPS: list[Any] = [{"action": "skip", "names": "head"}]


def tensor(index: int) -> Tensor:
    return torch.tensor([index])


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for module in (*model.get_submodule("blocks").children(), model):
        fully_shard(module, mesh=mesh, **options)
    return model


NO_AXES = [{**ALL[0], "dim": []}]


def fsdp(mesh: DeviceMesh) -> Any:
    """Fold, and take off, what FSDP2 has cut."""
    model, one = Net(), Net()
    rules = [*ALL, {"types": "Linear", "dim": []}]
    for each in (model, one):
        wn.apply(each, rules)
    shard(model, mesh)
    part = slice(mesh.get_rank(), None, 2)
    found: dict[str, Any] = {}
    with torch.no_grad(), wn.folded(model):  # before any forward
        found["folded at first"] = float((model(tokens()) - one(tokens())).abs().max())
    train(model, part)
    train(one)
    found["after"] = difference(state(model), state(one))
    expected = one(tokens()).detach()

    def sent(call: Callable[[], Tensor]) -> tuple[int, float]:
        with Sent() as counted:
            result = call()
        return len(counted.ops), float((result - expected).detach().abs().max())

    with torch.no_grad():
        found["not folded"] = [sent(lambda: model(tokens())) for _ in range(3)]
        with ExitStack() as stack:
            with Sent() as entering:
                stack.enter_context(wn.folded(model))
            inside = [sent(lambda: model(tokens())) for _ in range(3)]
            with wn.folded(model):
                inside.append(sent(lambda: model(tokens())))
            inside.append(sent(lambda: model(tokens())))
        found["folded"] = inside
        found["entering"] = len(entering.ops)
        found["after it"] = sent(lambda: model(tokens()))
    # After a forward without backward the root is whole, and gives an optimizer what it will drop.
    model.reshard()  # type: ignore[operator]
    train(model, part, 3)
    train(one, steps=3)
    found["trained on"] = difference(state(model), state(one))
    for each in (model, one):
        with wn.writable(each):
            for name in ("head.weight", "embed.weight"):
                weight_of(each, name).data.mul_(-2.0)
    found["writable"] = difference(state(model), state(one))
    found["with grad"] = error(lambda: wn.folded(model).__enter__())
    gathering.free_bytes = lambda _: 10 if mesh.get_rank() else 1 << 40
    with torch.no_grad():
        found["without memory"] = error(lambda: wn.folded(model).__enter__())
    gathering.free_bytes = lambda _: None
    found["remove"] = error(lambda: wn.remove(model))
    found["remove from a part"] = error(lambda: wn.remove(model.get_submodule("head")))
    # What the message says.
    said = found["remove"].partition("\n--\n")[0].splitlines()
    names: dict[str, Any] = {"model": model, "wn_surgery": wn}
    exec("\n".join(line.strip() for line in said if line.startswith("    ")), names)
    wn.remove(one)
    found["plain"] = difference(names["plain"], state(one))
    scalar = Net()
    wn.apply(scalar, {**ALL[0], "dim": None})
    found["scalar"] = error(lambda: shard(scalar, mesh))
    return found


def kept_weights(mesh: DeviceMesh) -> Any:
    """The bytes of whole weights of a block that are alive between its forward and its backward."""

    def alive(normed: bool, checkpointed: bool) -> int:
        model = Net()
        if normed:
            wn.apply(model, ALL)
        shard(model, mesh)
        block = model.get_submodule("blocks.0")
        inner = block.forward
        if checkpointed:
            block.forward = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
        kept: list[Tensor] = []

        def keep(saved: Tensor) -> Tensor:
            kept.append(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            loss = model(tokens()).square().mean()
        weights = [each for each in kept if sorted(each.shape) == [6, 8]]
        size = sum(each.untyped_storage().size() for each in weights)
        loss.backward()
        return size

    return alive(False, False), alive(True, False), alive(True, True)


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def skewed(dim: Any, norm_dtype: str | None) -> tuple[nn.Linear, Any]:
    """A layer whose g is not the norm of v, and the list that holds them."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 64, bias=False)
    wn.apply(layer, {"types": "Linear", "dim": dim, "norm_dtype": norm_dtype})
    plist: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    with torch.no_grad():
        plist.original1.mul_(torch.rand(64, 256) + 0.5)
    return layer, plist


def mixed_precision(mesh: DeviceMesh) -> Any:
    """How far the weights of a bfloat16 forward, and norms, are from those of float32 originals."""
    found: dict[str, Any] = {}

    def off(got: Tensor, exact: Tensor) -> tuple[float, float]:
        norms = (got.norm(dim=1) / exact.norm(dim=1) - 1).abs().max()
        return float((got - exact).norm() / exact.norm()), float(norms)

    for way in ("usual", "norm_dtype", "exact_norms", "float32 gathered"):
        layer, plist = skewed(0, None if way == "usual" else "float32")
        exact = plist().detach()
        if way == "float32 gathered":
            fully_shard(
                plist, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16)
            )
        fully_shard(layer, mesh=mesh, mp_policy=HALF)
        if way == "exact_norms":
            wn.exact_norms(layer)
        with torch.no_grad():
            found[way] = off(layer(torch.eye(256)).T.float(), exact)
    found["the best bfloat16"] = off(exact.bfloat16().float(), exact)
    return found


def exact_norms(mesh: DeviceMesh) -> Any:
    """The weights of each kind of norm, in forwards, in ``folded``, and after steps."""
    found: dict[str, Any] = {}
    for dim in (0, 1, []):
        layer, _ = skewed(dim, "float32")
        one = copy.deepcopy(layer)
        fully_shard(layer, mesh=mesh, mp_policy=HALF)
        before = [id(p) for p in layer.parameters()]
        names = [wn.exact_norms(layer) for _ in range(2)]
        optimizers = [torch.optim.SGD(each.parameters(), lr=30.0) for each in (layer, one)]
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))

        def off(layer: nn.Module = layer, one: Any = one) -> float:
            """Beyond the rounding of v and of the weight."""
            plist = one.parametrizations.weight
            g, v = plist.original0, plist.original1
            with torch.no_grad():
                near = (v.bfloat16().float() * (g / norm_except(v, plist[0].dim))).bfloat16()
                return float((layer(torch.eye(256)).T - near).abs().max())

        offs = [off()]
        with Sent() as sent, torch.no_grad():
            layer(x)
        with torch.no_grad(), wn.folded(layer):
            offs.append(off())
        for optimizer in optimizers:
            optimizer.zero_grad()
        layer.reshard()  # type: ignore[attr-defined]
        layer(x).float().square().mean().backward()
        one(x).square().mean().backward()
        gradients = [
            float((whole(a.grad) - b.grad).norm() / b.grad.norm())  # type: ignore[arg-type,operator,union-attr]
            for a, b in zip(layer.parameters(), one.parameters(), strict=True)
        ]
        for a, b in zip(layer.parameters(), one.parameters(), strict=True):
            b.grad = whole(a.grad)  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()
        offs += [off(), off()]
        layer.unshard()  # type: ignore[attr-defined]
        offs.append(off())
        found[str(dim)] = {
            "names": names,
            "kept": before == [id(p) for p in optimizers[0].param_groups[0]["params"]],
            "off": offs,
            "gradients": gradients,
            "sent": sent.ops,
        }
    return found


def exact_in_checkpoints(mesh: DeviceMesh) -> Any:
    """Gradients of checkpointed blocks are those of the same blocks without checkpoints."""

    def gradients(where: str) -> list[Tensor]:
        model = Net()
        wn.apply(model, [{**ALL[0], "norm_dtype": "float32"}])
        shard(model, mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        wn.exact_norms(model)
        block = model.get_submodule("blocks.0")
        inner = block.forward
        if where == "inside":
            block.forward = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
        model.around = where == "around"
        model(tokens()).float().square().mean().backward()
        return [whole(p.grad) for p in model.parameters()]  # type: ignore[arg-type]

    usual = gradients("nowhere")
    return [
        all(torch.equal(a, b) for a, b in zip(gradients(where), usual, strict=True))
        for where in ("inside", "around")
    ]


def exact_refusals(mesh: DeviceMesh) -> Any:
    found = {}
    for case in ("no norm_dtype", "not sharded", "whole"):
        layer, _ = skewed(0, None if case == "no norm_dtype" else "float32")
        if case != "not sharded":
            fully_shard(layer, mesh=mesh, mp_policy=HALF)
        if case == "whole":
            layer.unshard()  # type: ignore[operator]
        found[case] = error(lambda layer=layer: wn.exact_norms(layer))  # type: ignore[misc]
    return found


def two_dimensions(mesh: DeviceMesh) -> Any:
    """Cut by tensor parallelism, normed, and cut again by FSDP2; on four processes."""
    found = {}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for name, rules in (("rows", ALL), ("columns", [{**ALL[0], "dim": 1}]), ("whole", NO_AXES)):
        model, one = cut(USUAL, square["tp"]), Net()
        for each in (model, one):
            wn.apply(each, {**rules[0], "norm_dtype": "float32"})
        shard(model, square["dp"])
        train(model, slice(square.get_local_rank("dp"), None, 2))
        train(one)
        mine, theirs = wn.statistics(model), wn.statistics(one)
        with torch.no_grad(), wn.folded(model), Sent() as sent:
            result = model(tokens())
        found[name] = {
            "after": difference(state(model), state(one)),
            "statistics": max(
                float((a.v_norm_values - b.v_norm_values).abs().max())
                for a, b in zip(mine.sites, theirs.sites, strict=True)
            ),
            "folded": float((result - one(tokens())).detach().abs().max()),
            "gathers when folded": sum("gather" in op for op in sent.ops),
            "exact norms": error(lambda model=model: wn.exact_norms(model)),  # type: ignore[misc]
        }
    return found


def spent(mesh: DeviceMesh) -> Any:
    """What a step keeps and sends under each engine, plain and normed: state, weights, bytes."""
    shapes = [[8, 6], [6, 8], [4, 6]]
    found: dict[str, Any] = {}
    for engine in ("ddp", "fsdp", "tp"):
        for normed in (False, True):
            model: Any = Net()
            if engine == "tp":
                plan = {"blocks.0.up": ColwiseParallel(), "blocks.0.down": RowwiseParallel()}
                model = parallelize_module(model, mesh, plan)
                shapes = [[4, 6], [6, 4], [4, 6]]
            if normed:
                wn.apply(model, {"types": "Linear"})
            averaged = 0
            if engine == "fsdp":
                shard(model, mesh)
            elif engine == "ddp":
                model = nn.parallel.DistributedDataParallel(model)

                def average(bucket: Any) -> Any:
                    nonlocal averaged
                    averaged += bucket.buffer().nbytes
                    work = dist.all_reduce(bucket.buffer(), async_op=True)
                    return work.get_future().then(lambda done: done.value()[0])

                # Without annotations, which DDP compares with classes.
                model.register_comm_hook(None, lambda _, bucket: average(bucket))
            own = {whole_storage(p) for p in model.parameters()}
            kept: list[Tensor] = []

            def keep(saved: Tensor) -> Tensor:
                kept.append(saved)  # noqa: B023
                return saved

            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            with Sent() as sent:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
                    loss = model(tokens()).square().mean()
                own |= {whole_storage(p) for p in model.parameters()}  # FSDP2's root is whole
                parts = {whole_storage(t): t for t in map(local, kept) if t.ndim == 2}
                weights = sum(
                    place[1]
                    for place, t in parts.items()
                    if place not in own and sorted(t.shape) in map(sorted, shapes)
                )
                loss.backward()
            optimizer.step()
            state = 0
            for p in model.parameters():
                moments = [optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq")]
                state += sum(local(each).nbytes for each in (p, p.grad, *moments))
            found[f"{engine} {'normed' if normed else 'plain'}"] = (
                state, weights, sent.bytes if engine != "ddp" else averaged
            )  # fmt: skip
    return found


def local(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def whole_storage(tensor: Any) -> tuple[int, int]:
    storage = local(tensor).untyped_storage()
    return storage.data_ptr(), storage.size()


CASES: dict[str, Callable[[DeviceMesh], Any]] = {
    "math": math,
    "second derivatives": second_derivatives,
    "training": training,
    "verbs": verbs,
    "refusals": refusals,
    "fsdp": fsdp,
    "kept weights": kept_weights,
    "mixed precision": mixed_precision,
    "exact norms": exact_norms,
    "exact in checkpoints": exact_in_checkpoints,
    "exact refusals": exact_refusals,
    "spent": spent,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=120))
    try:
        cases = CASES if dist.get_world_size() == 2 else {"two dimensions": two_dimensions}
        every = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
        results = {name: cases[name](every) for name in sys.argv[2:] or cases}
        if dist.get_rank() == 0:
            torch.save(results, sys.argv[1])
    finally:
        dist.destroy_process_group()
    leave()
