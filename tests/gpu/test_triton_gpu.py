"""The Triton path on CUDA: the cases of triton_cases.py, and graphs, streams, memory, devices."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import wn_surgery as wn
from tests.fused.models import spec_of
from wn_surgery.errors import FusionError
from wn_surgery.fused.evaluator import evaluate
from wn_surgery.fused.triton.evaluator import TritonEvaluator

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

pytest.register_assert_rewrite("triton_tools", "triton_cases")
from tests.fused.triton_cases import *  # noqa: E402, F403
from tests.fused.triton_tools import MIXED, check, close, pairs, truth, upstream  # noqa: E402

Step = tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def step(
    evaluator: TritonEvaluator,
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> Step:
    with torch.no_grad():
        weights, norms = evaluator.forward(v, g)
        found = evaluator.backward(v, g, norms, grads)
    return weights, found.v, found.g


def compare(
    v: Sequence[Tensor], g: Sequence[Tensor], grads: Sequence[Tensor | None], found: Step
) -> None:
    for i, spec in enumerate(MIXED):
        for result, wanted in zip(found, truth(spec, v[i], g[i], grads[i]), strict=True):
            close(result[i], wanted, spec)


def test_a_graph_is_replayed_with_other_values(device: torch.device) -> None:
    v, g = pairs(MIXED, device)
    grads = upstream(MIXED, device)
    evaluator = TritonEvaluator(MIXED, torch.float32, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(evaluator, v, g, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(evaluator, v, g, grads)
    for seed in (5, 6, 7):
        new_v, new_g = pairs(MIXED, device, seed=seed)
        for old, new in zip((*v, *g), (*new_v, *new_g), strict=True):
            old.copy_(new)
        # Eager calls in between must not disturb what the graph reads.
        other_v, other_g = pairs(MIXED, device, seed=seed + 10)
        check(MIXED, other_v, other_g, grads, evaluator)
        graph.replay()
        torch.cuda.synchronize()
        compare(v, g, grads, found)


def test_a_graph_of_copies_of_what_is_not_contiguous(device: torch.device) -> None:
    specs = [spec_of((40, 6), 1), spec_of((6, 40), 0)]
    v, g = pairs(specs, device)
    v = [x.t().contiguous().t() for x in v]
    grads = upstream(specs, device)
    evaluator = TritonEvaluator(specs, torch.float32, device)
    step(evaluator, v, g, grads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, *_ = step(evaluator, v, g, grads)
    for x in v:
        x.mul_(-2).add_(1)
    graph.replay()
    torch.cuda.synchronize()
    for spec, x, m, w in zip(specs, v, g, weights, strict=True):
        close(w, truth(spec, x, m, None)[0], spec)


def test_a_capture_of_what_has_moved_is_refused(device: torch.device) -> None:
    v, g = pairs(MIXED, device)
    evaluator = TritonEvaluator(MIXED, torch.float32, device)
    step(evaluator, v, g, upstream(MIXED, device))
    v[0] = v[0].clone()
    torch.cuda.synchronize()
    with (
        pytest.raises(FusionError, match="a parameter has moved"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        evaluator.forward(v, g)
    with (
        pytest.raises(FusionError, match="tables have to be made"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        TritonEvaluator(MIXED, torch.float32, device)
    check(MIXED, v, g, upstream(MIXED, device), evaluator)


def test_calls_on_several_streams(device: torch.device) -> None:
    evaluator = TritonEvaluator(MIXED, torch.float32, device)
    streams = [torch.cuda.Stream() for _ in range(3)]
    grads = upstream(MIXED, device)
    results = []
    torch.cuda.synchronize()
    for i in range(9):
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(1_000_000)  # what is queued outlives the Python objects below
            v, g = pairs(MIXED, device, seed=i)
            results.append((v, g, step(evaluator, v, g, grads)))
    torch.cuda.synchronize()
    for v, g, found in results:
        compare(v, g, grads, found)


def test_no_memory_is_gained_over_a_thousand_steps(device: torch.device) -> None:
    v, g = ([t.requires_grad_() for t in ts] for ts in pairs(MIXED, device))
    evaluator = TritonEvaluator(MIXED, torch.float32, device)

    def train() -> None:
        weights = evaluate(evaluator, v, g)
        sum(w.square().sum() for w in weights).backward()  # type: ignore[union-attr]
        for tensor in (*v, *g):
            tensor.grad = None

    for _ in range(10):
        train()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        train()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert len(evaluator._tables._captured) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_device_that_is_not_current() -> None:
    device = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    check(MIXED, *pairs(MIXED, device), upstream(MIXED, device))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_fused_model_trains_as_the_plain_one(device: torch.device, autocast: bool) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv1d(8, 16, 3), nn.ReLU(), nn.ConvTranspose1d(16, 8, 4), nn.Linear(19, 5)
        )
        wn.apply(layers, {"types": ["Conv1d", "ConvTranspose1d", "Linear"]})
        return layers.to(device)

    plain, fused = model(), model()
    fusion = wn.fuse(fused, "triton")
    assert all(member.path == "triton" for member in fusion.members)
    x = torch.randn(4, 8, 18, device=device)
    losses: list[list[float]] = []
    for each in (plain, fused):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        losses.append([])
        for _ in range(5):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
                loss = each(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    tolerance = 2e-2 if autocast else 2e-3  # TF32 convolutions differ from run to run
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    assert losses[1][-1] < losses[1][0]


def test_the_peak_of_memory_is_at_most_that_of_the_legacy_hook(device: torch.device) -> None:
    def peak(fused: bool) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(32)]).to(device)
        wn.apply(model, {"types": "Linear"})
        if fused:
            wn.fuse(model, "triton")
        else:
            wn.migrate(model, to="legacy")
        x = torch.randn(64, 1024, device=device)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            model.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    assert peak(fused=True) <= peak(fused=False)
