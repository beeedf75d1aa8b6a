"""Which rank learns which rows of a global batch, and in which micro-batches.

Every rank sees the whole global batch and comes to the same division, so that nothing has to be agreed upon.
"""

import heapq
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple

# padded: a rectangle of whole sequences. packed: sequences behind each other. shared: each prompt once, before all its
# responses (shared_prompts.py).
Layout = Literal["padded", "packed", "shared"]
SHARING_PAYS = 0.1  # share of the padded positions that it must save: attention in rectangles costs something, too
PIECES_PER_RANK = 4  # of shared prompts: more compute a prompt more often, fewer leave ranks waiting


class RowSize(NamedTuple):
    """A row in tokens."""

    prompt: int
    response: int
    prompt_number: int = 0  # the same for neighbours with the same prompt

    @property
    def tokens(self) -> int:
        return self.prompt + self.response


class Piece(NamedTuple):
    """Rows that stay together, and the tokens that they take of a micro-batch."""

    rows: list[int]
    tokens: int


def divide(sizes: Sequence[RowSize], world: int, max_tokens: int, layout: Layout) -> list[list[list[int]]]:
    """Micro-batches of row indices for every rank, of at most `max_tokens` tokens each (or one longer row).

    Longest first, each piece to the rank with the least tokens so far. A padded micro-batch costs its longest row times
    its rows, so neighbours by length share one; others cost the sum.
    """
    ranks: list[list[Piece]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for piece in sorted(_pieces(sizes, world, max_tokens, layout), key=lambda piece: (-piece.tokens, piece.rows)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(piece)
        heapq.heappush(loads, (load + piece.tokens, rank))
    split = _runs_of_neighbours if layout == "padded" else _packs
    return [split(pieces, max_tokens) for pieces in ranks]


def divide_worthwhile(
    sizes: Sequence[RowSize], world: int, max_tokens: int, layout: Layout
) -> tuple[Layout, list[list[list[int]]]]:
    """The layout and its division; padded rows where shared prompts would save next to nothing."""
    found = divide(sizes, world, max_tokens, layout)
    if layout != "shared":
        return layout, found
    padded = divide(sizes, world, max_tokens, "padded")
    before = sum(positions(micro, sizes, "padded") for rank in padded for micro in rank)
    after = sum(positions(micro, sizes, "shared") for rank in found for micro in rank)
    return ("shared", found) if after <= (1 - SHARING_PAYS) * before else ("padded", padded)


def positions(micro: Sequence[int], sizes: Sequence[RowSize], layout: Layout) -> int:
    """What the body computes for a micro-batch."""
    tokens = [sizes[row].tokens for row in micro]
    if layout == "padded":
        return len(micro) * max(tokens)
    if layout == "packed":
        return sum(tokens)
    prompts = {sizes[row].prompt_number: sizes[row].prompt for row in micro}
    return sum(prompts.values()) + sum(sizes[row].response for row in micro)


def _pieces(sizes: Sequence[RowSize], world: int, max_tokens: int, layout: Layout) -> list[Piece]:
    """Single rows; of shared prompts as many responses of one as a micro-batch takes, or as an even division allows."""
    rows = range(len(sizes))
    if layout != "shared":
        return [Piece([row], sizes[row].tokens) for row in rows]
    groups = [list(group) for _, group in groupby(rows, key=lambda row: sizes[row].prompt_number)]
    total = sum(size.response for size in sizes) + sum(sizes[group[0]].prompt for group in groups)
    limit = max_tokens if world == 1 else min(max_tokens, -(-total // (PIECES_PER_RANK * world)))
    return [piece for group in groups for piece in _pieces_of_group(group, sizes, limit)]


def _pieces_of_group(group: list[int], sizes: Sequence[RowSize], limit: int) -> list[Piece]:
    responses = [Piece([row], sizes[row].response) for row in group]
    prompt = sizes[group[0]].prompt
    packs = _packs(sorted(responses, key=lambda piece: -piece.tokens), limit - prompt)
    return [Piece(sorted(pack), prompt + sum(sizes[row].response for row in pack)) for pack in packs]


def _runs_of_neighbours(pieces: Sequence[Piece], max_tokens: int) -> list[list[int]]:
    runs, start = [], 0
    while start < len(pieces):
        count = max(1, max_tokens // pieces[start].tokens)
        runs.append([row for piece in pieces[start : start + count] for row in piece.rows])
        start += count
    return runs


def _packs(pieces: Sequence[Piece], max_tokens: int) -> list[list[int]]:
    """First fit, in the order given."""
    packs: list[list[int]] = []
    room: list[int] = []
    for piece in pieces:
        place = next((index for index, free in enumerate(room) if free >= piece.tokens), None)
        if place is None:
            packs.append([*piece.rows])
            room.append(max_tokens - piece.tokens)
        else:
            packs[place] += piece.rows
            room[place] -= piece.tokens
    return packs
