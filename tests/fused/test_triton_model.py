"""Whole models on the Triton path, in Triton's interpreter: a process that chose it first."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.torch_facts.versions import OLD_TRITON

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]

MODEL = """
import copy, sys
import torch
sys.path.insert(0, ".")
from tests.fused.models import X, fused, gradients, nodes, normed

import wn_surgery as wn

def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

for recompute in ("", "not reentrant"):
    model, other = fused(recompute, mode="triton"), normed(recompute)
    fusion = wn.fuse(model, "triton")
    assert {member.path for member in fusion.members} == {"triton"}, str(fusion)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, other)]
    for _ in range(2):
        losses = []
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss = each(X).square().mean()
            loss.backward()
            losses.append(loss)
        same(*losses)
        same(gradients(model), gradients(other))
        for optimizer in optimizers:
            optimizer.step()
assert len(nodes(model)) == 1

# Parameters that move, are replaced, or go.
with torch.no_grad():
    for each in (model, other):
        each.front.parametrizations.weight.original1.data = torch.ones(6, 2, 3)
        each.head.parametrizations.weight.original0 = torch.nn.Parameter(torch.ones(3, 1))
        each.load_state_dict({k: v.clone() for k, v in each.state_dict().items()}, assign=True)
        wn.remove(each.middle)
    same(model(X), other(X))
    twin = copy.deepcopy(model)
    same(twin(X), other(X))
    wn.fuse(model.eval(), "triton")
    same((model(X), model(X)), (other(X), other(X)))

# Second order takes the formula.
for each in (model, other):
    each.zero_grad()
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(each(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
same(gradients(model), gradients(other))

# The wide dtype is not for these kernels; auto leaves the CPU's path to the CPU.
try:
    wn.fuse(model.double(), "triton")
except wn.FusionError as error:
    assert "no Triton kernel for float64" in str(error), error
assert {member.path for member in wn.fuse(model.float()).members} == {"cpu"}
print("done")
"""


@pytest.mark.skipif(find_spec("triton") is None or OLD_TRITON, reason="no triton 3.7")
def test_a_model_on_the_triton_path() -> None:
    run = subprocess.run(
        [sys.executable, "-c", MODEL],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr[-3000:]
