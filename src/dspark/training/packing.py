"""Whole pieces of text packed into rows of a token budget, other company every epoch, a function of the seed alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

Row = tuple[int, ...]
"""Numbers of the pieces that share a row, in order."""


def patterns(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Rows as lists of piece sizes: the longest piece first, each into the fullest row that still has room for it.

    Best-fit decreasing takes at most 11/9 of the fewest rows possible, in practice hardly more than the sum needs.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # tokens left → rows
    rooms: list[int] = []  # the keys of `with_room` that have rows, ascending
    for size in sorted(sizes, reverse=True):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, budget
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        rows[row].append(size)
        left = room - size
        if left > 0:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(row)
    return rows


class Packing:
    """Which pieces share a row. Rows have the same sizes in every epoch; which piece of a size goes where changes.

    So an epoch always has `len(packing)` rows, and any step's rows are found without walking the steps before it.
    """

    def __init__(self, sizes: Sequence[int], budget: int) -> None:
        """`budget` tokens a row, 0 for one piece a row. No piece is longer than the budget."""
        self.patterns = patterns(sizes, budget) if budget else [[size] for size in sizes]
        self.tokens, self.width = sum(sizes), budget or max(sizes)
        self.numbers: dict[int, list[int]] = defaultdict(list)
        for number, size in enumerate(sizes):
            self.numbers[size].append(number)
        self._epochs: dict[tuple[int, int], list[Row]] = {}

    def __len__(self) -> int:
        return len(self.patterns)

    @property
    def waste(self) -> float:
        """The share of an epoch's row tokens that is padding."""
        return 1 - self.tokens / (len(self) * self.width)

    def plain(self) -> list[Row]:
        """The rows without any shuffling."""
        return self.filled({size: list(numbers) for size, numbers in self.numbers.items()})

    def epoch(self, number: int, seed: int) -> list[Row]:
        """The rows of an epoch, shuffled; the last two epochs asked for are kept."""
        if (number, seed) not in self._epochs:
            rng = np.random.default_rng((seed, number))
            dealt = {size: rng.permutation(same).tolist() for size, same in sorted(self.numbers.items())}
            rows = self.filled(dealt)
            kept = list(self._epochs.items())[-1:]
            self._epochs = dict(kept) | {(number, seed): [rows[i] for i in rng.permutation(len(rows))]}
        return self._epochs[number, seed]

    def filled(self, dealt: dict[int, list[int]]) -> list[Row]:
        """Every place of the patterns with the next piece of its size."""
        hands = {size: iter(numbers) for size, numbers in dealt.items()}
        return [tuple(next(hands[size]) for size in pattern) for pattern in self.patterns]

    def rows(self, step: int, batch: int, seed: int) -> list[Row]:
        """The rows of a step: a function of (seed, step) alone."""
        places = range(step * batch, (step + 1) * batch)
        return [self.epoch(place // len(self), seed)[place % len(self)] for place in places]
