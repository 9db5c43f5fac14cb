"""Random module trees and rule sets for hypothesis.

What is drawn is a :class:`Tree`: plain data, from which the same model can be built again, and
which hypothesis prints when a property fails.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

import wn_surgery as wn
from tests.layers import LAYERS, Block, noted
from tests.makers import Double
from wn_surgery.norm.limits import zero_slices

__all__ = ["Case", "Leaf", "Tree", "cases", "trees", "weights_of"]


_KINDS = list(LAYERS)
_DTYPES = (*[torch.float32] * 7, torch.float64, torch.bfloat16, torch.float16)
_MAKERS = (*["legacy", "torch", "ours"] * 3, "spectral", "spectral_hook", "pruned", "stacked")


# What is drawn ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """Weight norm (or what else computes a weight) on the ``which``-th weight of a layer."""

    maker: str
    which: int
    dim: int | None


@dataclass(frozen=True)
class Leaf:
    """One layer."""

    kind: str
    dtype: torch.dtype = torch.float32
    norms: tuple[Norm, ...] = ()
    zero: bool = False
    hooked: bool = False


@dataclass(frozen=True)
class Again:
    """A module that stands elsewhere in the tree too."""

    which: int


@dataclass(frozen=True)
class Branch:
    """A container."""

    kind: str
    children: tuple[Part, ...]


Part: TypeAlias = "Leaf | Again | Branch"


@dataclass(frozen=True)
class Tree:
    """A model, as data.

    ``ties`` are pairs of weights that become one, as a Parameter or as memory; ``frozen`` and
    ``toggled`` choose parameters and modules; ``graph`` leaves legacy weights with a graph, as
    torch does, and the model cannot be deep-copied then.
    """

    root: Part
    seed: int = 0
    ties: tuple[tuple[int, int, bool], ...] = ()
    frozen: tuple[int, ...] = ()
    toggled: tuple[int, ...] = ()
    graph: bool = False

    @property
    def leaves(self) -> list[Leaf]:
        """All layers, in order."""

        def under(part: Part) -> list[Leaf]:
            if isinstance(part, Branch):
                return [leaf for child in part.children for leaf in under(child)]
            return [part] if isinstance(part, Leaf) else []

        return under(self.root)

    def build(self, *, normed: bool = True) -> nn.Module:
        """The model; without weight norm (nor anything frozen) if ``normed`` is false."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            built: list[nn.Module] = []
            leaves: list[tuple[Leaf, nn.Module]] = []
            model = _build(self.root, built, leaves)
            for first, second, whole in self.ties:
                _tie(model, first, second, whole)
            if normed:
                for leaf, module in leaves:
                    for norm in leaf.norms:
                        _put(module, norm)
                _train(model, graph=self.graph)
        parameters = list(model.parameters())
        for index in self.frozen if normed and parameters else ():
            parameters[index % len(parameters)].requires_grad_(False)
        modules = [module for module in model.modules() if _may_toggle(module)]
        for index in self.toggled if normed and modules else ():
            module = modules[index % len(modules)]
            module.train(not module.training)
        return model


def _may_toggle(module: nn.Module) -> bool:
    inside = module.__class__ is nn.ModuleDict or type(module).__module__.startswith(
        ("torch.nn.utils", "wn_surgery")
    )
    return not inside


def _build(part: Part, built: list[nn.Module], leaves: list[tuple[Leaf, nn.Module]]) -> nn.Module:
    if isinstance(part, Again):
        return built[part.which % len(built)] if built else nn.Identity()
    if isinstance(part, Leaf):
        module = LAYERS[part.kind]()
        if part.kind != "complex":
            module.to(part.dtype)
        if part.zero:
            for owner, name in weights_of(module)[:1]:
                getattr(owner, name).detach()[0] = 0
        if part.hooked:
            module.register_forward_pre_hook(noted)
        leaves.append((part, module))
    else:
        children = [_build(child, built, leaves) for child in part.children]
        if part.kind == "sequential":
            module = nn.Sequential(*children)
        elif part.kind == "list":
            module = nn.ModuleList(children)
        elif part.kind == "dict":
            module = nn.ModuleDict(dict(zip(("enc", "dec", "0"), children, strict=False)))
        else:
            module = Block(children)
    built.append(module)
    return module


def weights_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The plain floating parameters of two or more dimensions, with their owners."""
    return [
        (module, name)
        for module in model.modules()
        if not isinstance(module, nn.utils.parametrize.ParametrizationList)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 2 and parameter.is_floating_point()
        if not name.endswith(("_g", "_v", "_orig"))
    ]


def _tie(model: nn.Module, first: int, second: int, whole: bool) -> None:
    """Tie two weights of one shape, if the model has such."""
    shapes: dict[Any, list[tuple[nn.Module, str]]] = {}
    for module, name in weights_of(model):
        weight = getattr(module, name)
        shapes.setdefault((weight.shape, weight.dtype, weight.stride()), []).append((module, name))
    groups = [group for group in shapes.values() if len(group) > 1]
    if not groups:
        return
    group = groups[first % len(groups)]
    source, target = group[0], group[1 + second % (len(group) - 1)]
    weight = getattr(*source)
    setattr(*target, weight if whole else nn.Parameter(weight.detach()))


def _put(module: nn.Module, norm: Norm) -> None:
    targets = weights_of(module)
    if not targets:
        return
    owner, name = targets[norm.which % len(targets)]
    weight = getattr(owner, name)
    dim: Any = None if norm.dim is None else norm.dim % weight.ndim
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if norm.maker == "legacy":
            nn.utils.weight_norm(owner, name, dim)
        elif norm.maker == "torch":
            parametrizations.weight_norm(owner, name, dim)
        elif norm.maker == "ours":
            eps = 1e-4 if norm.which % 2 or zero_slices(weight, dim) else 0.0
            rule = wn.Rule(names="", params=name, dim=dim, eps=eps, tied="together")
            with suppress(wn.TiedParameterError):  # it lies in the memory of a legacy v
                wn.apply(owner, rule)
        elif norm.maker == "stacked":
            parametrizations.weight_norm(owner, name, dim)
            nn.utils.parametrize.register_parametrization(owner, name, Double())
        elif norm.maker == "pruned":
            prune.custom_from_mask(owner, name, (weight.abs() > weight.abs().mean()).to(weight))
        elif weight.element_size() < 4:
            pass  # the power iteration is not there in half precision
        elif norm.maker == "spectral":
            parametrizations.spectral_norm(owner, name)
        else:
            nn.utils.spectral_norm(owner, name)


def _train(model: nn.Module, *, graph: bool) -> None:
    """Make g and v what training makes of them: g is no longer the norm of v."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_g", "original0")) and parameter.is_floating_point():
                parameter.mul_(1.375)
    with torch.set_grad_enabled(graph):
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, LegacyHook):
                    hook(module, ())


# Strategies ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and the rules for it."""

    tree: Tree
    rules: tuple[wn.Rule, ...] = ()


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Module trees of one to a few layers."""

    def number(highest: int) -> int:
        return draw(st.integers(0, highest))

    kinds: list[str] = []

    def part(depth: int) -> Part:
        choice = number(9)
        if kinds and choice == 9:
            return Again(number(5))
        if depth == 3 or choice < (1, 6, 7)[depth]:
            return leaf()
        kind = ("sequential", "list", "dict", "block")[number(3)]
        return Branch(kind, tuple(part(depth + 1) for _ in range(1 + number(2))))

    def leaf() -> Leaf:
        # Often of a kind that is there already, so that there is something to tie.
        old = bool(kinds) and number(3) == 0
        kind = kinds[number(len(kinds) - 1)] if old else _KINDS[number(len(_KINDS) - 1)]
        kinds.append(kind)
        dtype = _DTYPES[number(len(_DTYPES) - 1)]
        norms = tuple(
            Norm(_MAKERS[number(len(_MAKERS) - 1)], number(7), (0, 0, 1, 2, None)[number(4)])
            for _ in range((0, 0, 0, 1, 2)[number(4)])
        )
        return Leaf(kind, dtype, norms, zero=number(11) == 11, hooked=number(5) == 5)

    root = part(0)
    ties = tuple((number(3), number(3), number(2) < 2) for _ in range((0, 1, 1, 2)[number(3)]))
    frozen = tuple(number(9) for _ in range((0, 0, 1, 3)[number(3)]))
    toggled = tuple(number(9) for _ in range((0, 0, 1, 2)[number(3)]))
    return Tree(root, number(999), ties, frozen, toggled, graph=number(3) == 3)


@st.composite
def cases(draw: st.DrawFn, *, only_apply: bool = False) -> Case:
    """A tree, and one to three rules that mostly match something in it.

    Args:
        only_apply: no rule removes or replaces weight norm that is there.
    """
    tree = draw(trees())
    named = [(path, type(module)) for path, module in tree.build(normed=False).named_modules()]
    rules = [
        draw(rules_for(named, only_apply)) for _ in range((1, 1, 2, 3)[draw(st.integers(0, 3))])
    ]
    return Case(tree, tuple(rules))


@st.composite
def rules_for(draw: st.DrawFn, named: list[tuple[str, type]], only_apply: bool) -> wn.Rule:
    """One rule, its patterns made from the paths and the types of a model."""

    def pick(*options: Any) -> Any:
        return options[draw(st.integers(0, len(options) - 1))]

    def pattern() -> str:
        path, _ = pick(*named)
        if not path:
            return str(pick("**", "", "*"))
        last = path.rpartition(".")[2]
        return str(pick(f"**.{last}", path, f"{{{path},fc}}", f"re:.*{last}", f"{path}.**", "?"))

    def kind() -> Any:
        _, cls = pick(*named)
        return pick(cls, cls.__name__, f"{cls.__module__}.{cls.__qualname__}", "Linear", "Module")

    # The first option is what hypothesis shrinks to.
    actions = (
        ("apply", "apply", "apply", "skip") if only_apply else ("apply", "apply", "remove", "skip")
    )
    values: dict[str, Any] = {"action": pick(*actions)}
    if pick(False, False, False, True):
        values["names"] = pattern()
    if pick(False, False, False, True):
        values["types"] = kind()
    values["params"] = pick("*weight*", "weight", "*", ("weight", "bias"), "re:.*weight.*")
    if pick(False, False, False, True):
        values["exclude_names"] = pattern()
    if pick(False, False, False, True):
        values["exclude_types"] = kind()
    if values["action"] == "apply":
        values |= {
            "dim": pick(0, 0, 0, 1, None, "out", (0, 1), 2),
            "eps": pick(0.0, 1e-4, 0.5),
            "norm_dtype": pick(None, None, None, torch.float32, torch.float64),
            "g_init": pick(None, None, None, None, 0.5),
            "train_g": pick(True, True, False),
            "replace": not only_apply and pick(False, True),
        }
    if values["action"] != "skip":
        values["tied"] = pick("together", "error", "skip", "untie")
    return wn.Rule(**values)
