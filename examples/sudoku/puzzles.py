"""6x6 sudoku: make puzzles with exactly one solution, write them as text, check answers.

A grid is 36 integers, row by row, 0 for a blank; boxes are 2 rows by 3 columns. As text a grid is six lines of
``123|456``, blanks as dots, so that a grid with its final line end is exactly 48 characters.

Knows nothing of models or tokenizers.
"""

import random
from collections.abc import Iterator, Sequence

SIZE = 6
CELLS = SIZE * SIZE
ALL_DIGITS = 0b1111110  # bit d is set when the digit d is still possible

Grid = tuple[int, ...]


def box_of(row: int, column: int) -> int:
    return (row // 2) * 2 + column // 3


def _units_of(cell: int) -> tuple[int, int, int]:
    row, column = divmod(cell, SIZE)
    return row, SIZE + column, 2 * SIZE + box_of(row, column)


UNITS = tuple(_units_of(cell) for cell in range(CELLS))


def solutions(grid: Sequence[int], limit: int = 2, rng: random.Random | None = None) -> Iterator[Grid]:
    """Yields up to ``limit`` completions of ``grid``; with ``rng`` they come in random order."""
    used = [0] * (3 * SIZE)
    cells = list(grid)
    for cell, digit in enumerate(cells):
        if digit:
            bit = 1 << digit
            if any(used[unit] & bit for unit in UNITS[cell]):
                return
            for unit in UNITS[cell]:
                used[unit] |= bit
    found = 0

    def search() -> Iterator[Grid]:
        nonlocal found
        best, best_options, best_count = -1, 0, SIZE + 1
        for cell, digit in enumerate(cells):
            if digit == 0:
                row, column, box = UNITS[cell]
                options = ALL_DIGITS & ~(used[row] | used[column] | used[box])
                count = options.bit_count()
                if count < best_count:
                    best, best_options, best_count = cell, options, count
                    if count <= 1:
                        break
        if best < 0:
            found += 1
            yield tuple(cells)
            return
        digits = [digit for digit in range(1, SIZE + 1) if best_options >> digit & 1]
        if rng:
            rng.shuffle(digits)
        for digit in digits:
            bit = 1 << digit
            cells[best] = digit
            for unit in UNITS[best]:
                used[unit] |= bit
            yield from search()
            cells[best] = 0
            for unit in UNITS[best]:
                used[unit] &= ~bit
            if found >= limit:
                return

    yield from search()


def make_puzzle(rng: random.Random, blanks: int) -> tuple[Grid, Grid]:
    """A puzzle with one solution and at most ``blanks`` blank cells, and that solution."""
    solution = next(solutions([0] * CELLS, limit=1, rng=rng))
    puzzle = list(solution)
    removed = 0
    for cell in rng.sample(range(CELLS), CELLS):
        if removed == blanks:
            break
        puzzle[cell] = 0
        if sum(1 for _ in solutions(puzzle)) == 1:
            removed += 1
        else:
            puzzle[cell] = solution[cell]
    return tuple(puzzle), solution


def to_text(grid: Sequence[int]) -> str:
    """Six lines of ``12.|4.6``, without a line end after the last."""
    cells = ["." if digit == 0 else str(digit) for digit in grid]
    rows = [cells[start : start + SIZE] for start in range(0, CELLS, SIZE)]
    return "\n".join("".join(row[:3]) + "|" + "".join(row[3:]) for row in rows)


def from_text(text: str) -> Grid | None:
    """The grid that ``text`` holds, or None when it is not six lines of six digits or dots."""
    cells = [character for character in text if character not in "|\n \r"]
    if len(cells) != CELLS or any(character not in "123456." for character in cells):
        return None
    return tuple(0 if character == "." else int(character) for character in cells)


def is_solution(answer: Sequence[int], puzzle: Sequence[int]) -> bool:
    """True when every row, column and box holds each digit once and every given digit is kept."""
    if len(answer) != CELLS or any(not 1 <= digit <= SIZE for digit in answer):
        return False
    if any(given and given != digit for given, digit in zip(puzzle, answer, strict=True)):
        return False
    seen: list[set[int]] = [set() for _ in range(3 * SIZE)]
    for cell, digit in enumerate(answer):
        for unit in UNITS[cell]:
            seen[unit].add(digit)
    return all(len(unit) == SIZE for unit in seen)
