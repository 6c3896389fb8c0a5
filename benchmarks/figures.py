"""What was measured: one value for each round, of each contender and workload, and ratios within a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

MICROSECONDS: Final = "µs"
MILLISECONDS: Final = "ms"
PER_SECOND: Final = "1/s"
SELECTS: Final = "SELECTs"
STALE: Final = "stale reads"
FAILED: Final = "failed gets"
READS: Final = "reads"
SECONDS: Final = "s"
BYTES: Final = "bytes"

SUMMARIES: Final[Mapping[str, Callable[[Iterable[float]], float]]] = {SELECTS: max, STALE: sum, FAILED: sum, READS: sum}
"""Counts are not averaged: the worst round, or all of them together. Everything else is a median."""


@dataclass(frozen=True, slots=True)
class Figure:
    """The rounds of one contender in one workload, in this unit."""

    workload: str
    contender: str
    unit: str
    rounds: tuple[float, ...]

    @property
    def value(self) -> float:
        return SUMMARIES.get(self.unit, median)(self.rounds)


class Figures:
    """All that a run has measured. Absent is an empty sequence: what was not run can be asked for."""

    def __init__(self) -> None:
        self._rounds: dict[tuple[str, str, str], list[float]] = {}

    def __iter__(self) -> Iterator[Figure]:
        return (Figure(*key, tuple(rounds)) for key, rounds in self._rounds.items())

    def add(self, workload: str, contender: str, unit: str, value: float) -> None:
        """Add one round."""
        self._rounds.setdefault((workload, contender, unit), []).append(value)

    def rounds(self, workload: str, contender: str, unit: str) -> Sequence[float]:
        return self._rounds.get((workload, contender, unit), ())

    def contenders(self, workload: str, unit: str) -> list[str]:
        """Who was measured in it, in the order of their first round."""
        return [name for each, name, its_unit in self._rounds if each == workload and its_unit == unit]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round. What ran in fewer rounds, since it takes long, is compared in these."""
    return [a / b for a, b in zip(over, under, strict=False)]
