"""Checks of whole columns of a row group at a time; where one fails, a look at the rows says which and why."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from opd_cache.store.rows import RowGroup, row_group
from opd_cache.store.shards import ShardSet, read_row_group


def row_groups(
    shards: ShardSet, shard: int, start_row: int, data: bytes | None = None
) -> Iterator[tuple[int, RowGroup]]:
    """(number of its first row, row group) of each row group with rows from `start_row` on."""
    with shards.open(shard, data) as file:
        first = 0
        for index in range(file.num_row_groups):
            num_rows = file.metadata.row_group(index).num_rows
            if first + num_rows > start_row:
                yield first, row_group(read_row_group(file, shards.path(shard), index))
            first += num_rows


def fits(group: RowGroup, ids: str, logprobs: Sequence[str], numbers: Sequence[str] = ()) -> bool:
    """Whether all log-probs of a row group are at most 0, in lists as long as those of `ids`, and all numbers finite.
    Whole columns at a time; where one does not fit, its rows say which and why."""
    for column in (group.lists[name] for name in logprobs if name in group.lists):
        # NaN fails every comparison.
        if (column.values.size and not column.values.max() <= 0) or not np.array_equal(
            column.offsets, group.lists[ids].offsets
        ):
            return False
    table = group.table
    present = (table[name].drop_null().to_numpy() for name in numbers if name in table.column_names)
    return all(bool(np.isfinite(values).all()) for values in present)


def is_even(group: RowGroup, per_token: str, widths: Mapping[str, int]) -> bool:
    """Whether every list of these columns holds its width of values for each one of the per-token column."""
    tokens = group.lists[per_token].offsets
    return all(
        np.array_equal(group.lists[name].offsets, tokens * width)
        for name, width in widths.items()
        if name in group.lists
    )
