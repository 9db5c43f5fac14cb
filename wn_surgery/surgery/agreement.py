"""One outcome for all ranks that hold parts of the same parameters: a change on each, or on none.

Only models with DTensors communicate. What each rank would do is compared before anything is
computed together, and how it went before anything is final.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from torch import Tensor, nn

from wn_surgery.errors import ModelError
from wn_surgery.model.sites import walk
from wn_surgery.norm.cuts import is_dtensor
from wn_surgery.surgery.plan import Step

__all__ = ["Ranks"]


@dataclass
class Body:
    """What a body says of itself: the steps that have to be the same on all ranks, and its place.

    ``at`` is the name of the parameter that it works on.
    """

    steps: Sequence[Step] = ()
    at: str | None = None


class _Said(NamedTuple):
    """What one rank tells the others: a digest of what it would do, or its error."""

    digest: str = ""
    error: str = ""
    site: str | None = None


class Ranks:
    """The ranks that share parameters of a model with this one."""

    def __init__(self, model: object) -> None:
        # The same in the same order on every rank, whatever its rules are.
        found: dict[Any, None] = {}
        # Without that module nobody has made a DTensor.
        if isinstance(model, nn.Module) and "torch.distributed.tensor" in sys.modules:
            for tensor in _changeable(model):
                if is_dtensor(tensor):
                    mesh = tensor.device_mesh
                    found.update((mesh.get_group(number), None) for number in range(mesh.ndim))
        # The fake backend, for planning without machines, delivers nothing.
        self._groups = [group for group in found if dist.get_backend(group) != "fake"]

    @contextmanager
    def agree(self, verb: str) -> Generator[Body]:
        """Run the body on every rank; an error on one is an error on all."""
        body = Body()
        error: BaseException | None = None
        try:
            yield body
        except BaseException as raised:  # noqa: BLE001 - it is raised again, after all have heard
            error = raised
        if self._groups:
            self._compare(verb, body, error)
        if error is not None:
            raise error

    def _compare(self, verb: str, body: Body, error: BaseException | None) -> None:
        lines = [_line(step) for step in body.steps]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        mine = _Said(digest)
        if error is not None:
            site = getattr(error, "site", None) or body.at
            told = f"{type(error).__name__}: {error}"
            if site is not None and site not in told:
                told = f"{site}: {told}"
                error.add_note(f"wn_surgery cannot {verb} at {site}; no rank has changed")
            mine = _Said(error=told, site=site)
        try:
            said = self._gather(mine)
            if error is not None:
                return
            for rank, other in said.items():
                if other.error:
                    message = f"rank {rank} cannot {verb}: {other.error}\nNo rank has changed"
                    raise ModelError(message, kind="ranks", site=other.site)
            if len({other.digest for other in said.values()}) > 1:
                _refuse_different(verb, lines, self._gather(lines))
        except RuntimeError as lost:
            raise ModelError(
                f"the ranks that share this model lost each other: {lost}; this one has not "
                "changed. Restart them all",
                kind="ranks",
            ) from (error or lost)

    def _gather(self, mine: Any) -> dict[int, Any]:
        """What every rank says, by its number in the whole job."""
        known = {dist.get_rank(): mine}
        for group in self._groups:
            heard: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(heard, known, group=group)
            known = {rank: said for each in heard for rank, said in each.items()}
        return dict(sorted(known.items()))


def _changeable(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of which a change is not refused at once."""
    for node in walk(model):
        if node.wrapped is None:
            yield from (p for p in node.module._parameters.values() if p is not None)
            if (lists := node.module._modules.get("parametrizations")) is not None:
                yield from lists.parameters()


def _line(step: Step) -> str:
    rule = step.rule
    of_g = "" if rule is None or step.norm is None else f" {rule.g_init} {rule.train_g}"
    return f"{step.site.name}: {step.action} {step.after} {step.norm}{of_g} {step.site.shape}"


def _refuse_different(verb: str, mine: list[str], said: dict[int, list[str]]) -> NoReturn:
    here = dist.get_rank()
    rank, theirs = next((rank, lines) for rank, lines in said.items() if lines != mine)
    only_mine = [line for line in mine if line not in theirs]
    only_theirs = [line for line in theirs if line not in mine]
    told = (only_mine or ["nothing"])[0], (only_theirs or ["nothing"])[0]
    site = (only_mine or only_theirs or [""])[0].partition(":")[0] or None
    raise ModelError(
        f"the ranks would {verb} differently. Rank {here}: {told[0]}; rank {rank}: {told[1]}. Give "
        "every rank the same model and the same rules. No rank has changed",
        kind="ranks",
        site=site,
    )
