"""What is measured of models that FSDP2 cuts, alone and after tensor parallelism."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import wn_surgery as wn
from tests.distributed.cut_models import (
    ALL,
    USUAL,
    Net,
    Sent,
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
from wn_surgery.model import gathering
from wn_surgery.norm.math import norm_except

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
