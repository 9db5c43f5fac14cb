"""One training that is disturbed at random moments, and the same training left alone.

What changes the training (which layers have weight norm) happens to both, at the same steps. The
rest happens to one: it must change no bit of any loss, and leave nothing behind.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import random
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wn_surgery as wn

from .operations import MODES

MOMENTS = 5
"""How often memory is looked at."""

RULES: dict[str, dict[str, Any]] = {
    "conv": {"names": "conv"},
    "up": {"names": "up"},
    "rnn": {"names": "rnn", "params": "weight_*"},
    "head": {"names": "head", "dim": 1},
}


class Net(nn.Module):
    """Layers of each kind, whose steps have the same bits however their weights are stored.

    They are normed along axes for which torch has a kernel: along others legacy weight norm rounds
    its gradients differently. Each weight has a multiple of 16 elements, so that in a group it
    begins where it would by itself, at a multiple of 64 bytes: matrix products round by that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 4, 3, padding=1)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(torch.tanh(self.conv(x))))
        h, _ = self.rnn(h.transpose(1, 2))
        out: Tensor = self.head(h)
        return out


class Run:
    """A network, its optimizer, and its own random numbers."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(0)
        self.net = Net()
        self.normed: set[str] = set()
        self.optimizer = self.optimizer_for(list(self.net.parameters()))
        for name in RULES:
            self.toggle(name)

    @staticmethod
    def optimizer_for(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, foreach=False)

    def toggle(self, name: str) -> None:
        """Put weight norm on a layer, or take it off."""
        if name in self.normed:
            wn.remove(self.net, RULES[name], optimizers=self.optimizer)
        else:
            wn.apply(self.net, RULES[name], optimizers=self.optimizer)
        self.normed ^= {name}

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.net(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def replace(self, net: Net) -> None:
        """Go on with a copy, as a program does that has read a checkpoint."""
        old = dict(self.net.named_parameters())
        new = dict(net.named_parameters())
        named = {id(parameter): name for name, parameter in old.items()}
        held = self.optimizer.param_groups[0]["params"]
        optimizer = self.optimizer_for([new[named[id(parameter)]] for parameter in held])
        stored = io.BytesIO()
        torch.save(self.optimizer.state_dict(), stored)
        stored.seek(0)
        optimizer.load_state_dict(torch.load(stored))
        self.net, self.optimizer = net, optimizer


# What must change nothing -----------------------------------------------------------------------


def folded(run: Run, x: Tensor) -> None:
    with torch.no_grad(), wn.folded(run.net):
        run.net(x)
    with wn.folded(run.net):
        run.net(x).sum()


def fuse(run: Run, x: Tensor) -> None:
    layouts = {site.layout for site in wn.sites(run.net)}
    if "parametrized" in layouts:
        wn.fuse(run.net, "auto" if "legacy" in layouts else run.rng.choice(MODES))


def unfuse(run: Run, x: Tensor) -> None:
    wn.unfuse(run.net)


def to_legacy(run: Run, x: Tensor) -> None:
    wn.migrate(run.net, to="legacy")


def to_parametrized(run: Run, x: Tensor) -> None:
    wn.migrate(run.net)


def copied(run: Run, x: Tensor) -> None:
    wn.migrate(run.net)  # torch's hook leaves a tensor that cannot be copied
    run.replace(copy.deepcopy(run.net))


def pickled(run: Run, x: Tensor) -> None:
    wn.migrate(run.net)
    run.replace(pickle.loads(pickle.dumps(run.net)))


def reloaded(run: Run, x: Tensor) -> None:
    wn.migrate(run.net)
    stored = io.BytesIO()
    torch.save(run.net.state_dict(), stored)
    stored.seek(0)
    net = Net()
    if run.normed:
        wn.apply(net, [RULES[name] for name in sorted(run.normed)])
    net.load_state_dict(torch.load(stored))
    run.replace(net)


def through_another_layout(run: Run, x: Tensor) -> None:
    state = wn.checkpoints.convert(run.net.state_dict(), to="legacy")
    if any(site.layout == "legacy" for site in wn.sites(run.net)):
        run.net.load_state_dict(state)
    else:
        run.net.load_state_dict(wn.checkpoints.convert(state, to="parametrized"))


def stripped(run: Run, x: Tensor) -> None:
    # With grad: torch's GRU rounds in another way where its weights do not require it.
    expected = run.net(x)
    plain = wn.export.stripped_copy(run.net)
    assert torch.equal(plain(x), expected)
    other = copy.deepcopy(plain)
    wn.apply(other, list(RULES.values()))
    wn.remove(other)
    assert torch.equal(other(x), expected)


def looked_at(run: Run, x: Tensor) -> None:
    str(wn.statistics(run.net, run.optimizer))
    str(wn.plan(run.net, "convolutions"))
    wn.parameter_groups(run.net, weight_decay=0.1)


def refused(run: Run, x: Tensor) -> None:
    bad: list[Callable[[], object]] = [
        lambda: wn.apply(run.net, {"types": "Conv9"}),
        lambda: wn.apply(run.net, {"names": "conv", "dim": 7, "replace": True}),
        lambda: wn.remove(run.net, {"names": "nowhere"}),
    ]
    try:
        run.rng.choice(bad)()
    except wn.WeightNormError:
        return
    raise AssertionError("bad input was taken")


def interrupted(run: Run, x: Tensor) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = run.net.rnn.register_forward_hook(stop)
    try:
        run.net(x)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("not interrupted")
    finally:
        handle.remove()
    # Until then, or until unfuse, a fused network is held by the frame that was interrupted.
    run.net(x)


NEUTRAL = [
    folded,
    fuse,
    fuse,
    unfuse,
    to_legacy,
    to_parametrized,
    copied,
    pickled,
    reloaded,
    through_another_layout,
    stripped,
    looked_at,
    refused,
    interrupted,
]


# What must not grow -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What is alive in this process."""

    resident: int
    objects: int
    classes: int
    tensors: int
    modules: int
    files: int

    @classmethod
    def now(cls) -> Size:
        gc.collect()
        kinds = Counter(map(type, gc.get_objects()))
        files = Path("/proc/self/fd")

        def count(base: type) -> int:
            return sum(number for kind, number in kinds.items() if issubclass(kind, base))

        return cls(
            resident=_resident(),
            objects=kinds.total(),
            classes=count(type),
            tensors=count(Tensor),
            modules=count(nn.Module),
            files=sum(1 for _ in files.iterdir()) if files.exists() else 0,
        )

    def beyond(self, before: Size) -> dict[str, int]:
        """What there is more of than chance explains; each leak of ours would be in thousands."""
        allowed = Size(16 << 20, 300, 0, 0, 0, 0)
        return {
            name: value - asdict(before)[name]
            for name, value in asdict(self).items()
            if value - asdict(before)[name] > asdict(allowed)[name]
        }


def _resident() -> int:
    """The resident memory in bytes; 0 where the system has no /proc."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return 0
    return int(path.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(
    steps: int, seed: int = 0, operations: list[Callable[[Run, Tensor], None]] = NEUTRAL
) -> list[Size]:
    """Train for so many steps; the sizes at MOMENTS at which no layer has weight norm."""
    disturbed, alone = Run(seed), Run(seed)
    both = random.Random(seed + 1)
    x, y = torch.randn(2, 2, 4), torch.randn(2, 4, 4)
    dropped: list[tuple[str, weakref.ref[Net]]] = []
    done: list[str] = []
    sizes = []

    def toggle(name: str) -> None:
        for run in (disturbed, alone):
            run.toggle(name)

    for step in range(steps):
        if both.random() < 0.02:
            toggle(both.choice(list(RULES)))
        while disturbed.rng.random() < 0.25:
            operation = disturbed.rng.choice(operations)
            before = weakref.ref(disturbed.net)
            operation(disturbed, x)
            done = [*done[-9:], operation.__name__]
            if before() is not disturbed.net:
                dropped.append((operation.__name__, before))
        losses = disturbed.step(x, y), alone.step(x, y)
        assert torch.equal(*losses), f"seed {seed}, step {step}: {losses} after {done}"
        if (step + 1) % (steps // MOMENTS) == 0:
            for name in sorted(disturbed.normed):
                toggle(name)
            wn.unfuse(disturbed.net)
            for run in (disturbed, alone):
                run.optimizer.zero_grad()
                run.optimizer.state.clear()  # which a layer has or not, as it was plain or not
            del losses
            alive = [name for name, net in dropped if net() is not None]
            dropped.clear()
            assert not alive, f"seed {seed}, step {step}: {alive} left a network"
            sizes.append(Size.now())
            for name in RULES:
                toggle(name)
    return sizes
