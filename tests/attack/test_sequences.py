"""Random sequences of operations, on a network and on a twin that shares no code with the library.

``WN_SURGERY_ATTACK=100000`` asks for more of them (``make attack``).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from wn_surgery.fused.sharing import Slot
from wn_surgery.norm import parametrization

from .operations import OPERATIONS, Pair
from .twin import Layer

SEQUENCES = int(os.environ.get("WN_SURGERY_ATTACK", "2000"))
CHUNKS = 20
LENGTH = 10

Operation = Callable[[Pair], None]


def program(seed: int) -> list[Operation]:
    return random.Random(seed).choices(OPERATIONS, k=LENGTH)


def failure(seed: int, operations: Sequence[Operation]) -> Exception | None:
    """What goes wrong when these are done, one after another."""
    pair = Pair(seed)
    try:
        for operation in operations:
            operation(pair)
            pair.compare()
    except Exception as error:  # noqa: BLE001 - reported with the sequence
        return error
    return None


def shrunk(seed: int, operations: list[Operation]) -> list[Operation]:
    """The operations without those that the failure does not need."""
    place = 0
    while place < len(operations):
        fewer = operations[:place] + operations[place + 1 :]
        if failure(seed, fewer) is not None:
            operations = fewer
        else:
            place += 1
    return operations


def attack(seeds: Sequence[int]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in seeds:
            operations = program(seed)
            if failure(seed, operations) is not None:
                operations = shrunk(seed, operations)
                names = ", ".join(operation.__name__ for operation in operations)
                raise AssertionError(f"seed {seed}: {names}") from failure(seed, operations)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_sequences(chunk: int) -> None:
    attack(range(chunk, SEQUENCES, CHUNKS))


def test_the_twin_by_hand() -> None:
    layer = Layer({"w": torch.tensor([[3.0, 4.0], [0.0, 2.0]])}, {"w": True})
    layer.put_on("parametrized", 0, 0.0, True)
    assert layer.values["g"].flatten().tolist() == [5.0, 2.0]
    layer.values["g"] = layer.values["g"] * 2
    assert layer.weight(layer.values).tolist() == [[6.0, 8.0], [0.0, 4.0]]
    layer.dim = 1
    layer.values["g"] = torch.tensor([[6.0, 1.0]])
    torch.testing.assert_close(
        layer.weight(layer.values),
        torch.tensor([[6.0, 4 / 20**0.5], [0.0, 2 / 20**0.5]]),
    )
    layer.take_off()
    assert list(layer.values) == ["w"] and layer.trains == {"w": True}


# It finds what is wrong -------------------------------------------------------------------------


def off_by_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    right = parametrization.weight_norm

    def wrong(*args: object) -> torch.Tensor:
        return right(*args) * 1.01  # type: ignore[arg-type]

    monkeypatch.setattr(parametrization, "weight_norm", wrong)


def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "state", lambda self: (0,) * 11)
    monkeypatch.setattr(Slot, "tensors", lambda self, *_: tuple(self._parameters.values()))


def shared_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wn_surgery.fused.sharing.Scope.here", lambda self: 1)
    monkeypatch.setattr("wn_surgery.fused.sharing.Scope.forget", lambda self: None)


def half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wn_surgery.model.layouts.put_plain", lambda *_: None)


@pytest.mark.parametrize("spoil", [off_by_a_thousandth, stale, shared_too_long, half_done])
def test_a_library_that_is_wrong_is_noticed(
    spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match="seed "):
        attack(range(300))
