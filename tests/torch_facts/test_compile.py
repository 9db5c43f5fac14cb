"""torch.compile and torch.export: as many compilations as plain modules, and the same values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations

import wn_surgery as wn

# What inductor's decompositions import is written in TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")

BLOCKS = 12


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.conv(x)).relu()


def plain(block: nn.Module) -> nn.Module:
    return block


def ours(block: nn.Module) -> nn.Module:
    wn.apply(block, {"types": ["Conv1d", "Linear"]})
    return block


def options(block: nn.Module) -> nn.Module:
    wn.apply(block, {"types": "Conv1d", "dim": [0, 1], "eps": 1e-6})
    wn.apply(block, {"types": "Linear", "dim": 1, "norm_dtype": "float64"})
    return block


def unfused(block: nn.Module) -> nn.Module:
    """Axes for which torch has no fused kernel."""
    wn.apply(block, [{"types": "Conv1d", "dim": 1}, {"types": "Linear", "dim": None}])
    return block


def theirs(block: nn.Module) -> nn.Module:
    for name in ("conv", "fc"):
        parametrizations.weight_norm(block.get_submodule(name))
    return block


MAKERS: list[Callable[[nn.Module], nn.Module]] = [ours, options, unfused]


def frames(make: Callable[[nn.Module], nn.Module]) -> int:
    """How many frames are compiled for blocks that are compiled one by one."""
    torch._dynamo.reset()
    counter = CompileCounter()
    x = torch.randn(2, 4, 6)
    for _ in range(BLOCKS):
        block = make(Block())
        block.compile(backend=counter)
        block(x)
    return counter.frame_count


def test_equal_blocks_are_compiled_once() -> None:
    assert frames(plain) == 1
    assert frames(ours) == 1
    assert frames(options) == 1
    # A class for each module ends at the limit; the blocks after it run uncompiled.
    assert frames(theirs) == torch._dynamo.config.cache_size_limit < BLOCKS


def test_copies_and_unpickled_blocks_share_the_compiled_code() -> None:
    counter = CompileCounter()
    block = ours(Block())
    x = torch.randn(2, 4, 6)
    for each in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        each.compile(backend=counter)
        each(x)
    assert counter.frame_count == 1


def test_training_steps_do_not_recompile() -> None:
    counter = CompileCounter()
    block, x = ours(Block()), torch.randn(2, 4, 6)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
    assert counter.frame_count == 1
    assert torch.equal(compiled(x), block(x))  # with the weights as they are now


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", MAKERS)
def test_one_graph_with_the_same_values_and_gradients(
    make: Callable[[nn.Module], nn.Module], backend: str
) -> None:
    torch.manual_seed(0)
    block, x = make(Block()), torch.randn(2, 4, 6)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    expected = block(x)
    expected.square().sum().backward()
    gradients = [parameter.grad for parameter in block.parameters()]
    block.zero_grad()
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    for parameter, gradient in zip(block.parameters(), gradients, strict=True):
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("make", MAKERS)
def test_the_decompositions_that_inductor_takes(make: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    block, x = make(Block()), torch.randn(2, 4, 6)
    compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-2, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


# pytorch#191141: torch's decomposition of its operator takes the norm of the whole vector.
@pytest.mark.parametrize(("dim", "eps"), [(0, 0.0), (0, 1e-6), (None, 0.0), (None, 1e-6)])
@pytest.mark.parametrize("how", ["compile", "export"])
def test_a_vector(how: str, dim: int | None, eps: float) -> None:
    block, x = Scale(), torch.randn(3, 4)
    wn.apply(block, {"names": "", "params": "scale", "dim": dim, "eps": eps})
    if how == "compile":
        compiled: Any = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    else:
        compiled = torch.export.export(block, (x,)).run_decompositions().module()
    torch.testing.assert_close(compiled(x), block(x))


def test_surgery_on_a_compiled_model_takes_effect() -> None:
    block, x = Block(), torch.randn(2, 4, 6)
    expected = block(x)
    compiled = torch.compile(block, backend="eager")
    assert torch.equal(compiled(x), expected)
    wn.apply(block, {"types": "Linear"})
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        block.fc.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr, operator]
        changed = compiled(x)
    assert not torch.equal(changed, expected)
    wn.remove(block)
    assert torch.equal(compiled(x), changed)


def test_the_contexts_around_a_compiled_model() -> None:
    block, x = ours(Block()), torch.randn(2, 4, 6)
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        expected = compiled(x)
        with wn.folded(block):
            assert torch.equal(compiled(x), expected)
        with wn.writable(block):
            nn.init.constant_(block.fc.weight, 0.5)  # type: ignore[union-attr, arg-type]
        assert torch.equal(compiled(x), block(x)) and not torch.equal(compiled(x), expected)


@pytest.mark.parametrize("make", MAKERS)
def test_export(make: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    block = make(Block()).eval()
    x = torch.randn(2, 4, 6)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},))
    assert list(program.state_dict) == list(block.state_dict())
    other = torch.randn(5, 4, 6)
    torch.testing.assert_close(program.module()(other), block(other))
    decomposed = program.run_decompositions().module()
    torch.testing.assert_close(decomposed(other), block(other))


def test_an_exported_module_keeps_g_and_v_unless_it_is_stripped() -> None:
    block, x = ours(Block()).eval(), (torch.randn(2, 4, 6),)

    def operators() -> set[str]:
        graph = torch.export.export(block, x).graph
        return {str(node.target) for node in graph.nodes if node.op == "call_function"}

    assert "aten._weight_norm.default" in operators()
    with torch.no_grad(), wn.folded(block):
        pass  # leaves no trace
    assert "aten._weight_norm.default" in operators()
    wn.remove(block)
    assert not any("norm" in operator for operator in operators())
