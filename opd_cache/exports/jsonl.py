"""Responses as lines of JSON."""

import json
from typing import BinaryIO

from opd_cache.exports.rows import Responses, piece_batches
from opd_cache.logs import StageProgress


def write_lines(responses: Responses, file: BinaryIO) -> None:
    """One JSON object a row, into an open file. Infinities are texts."""
    from opd_cache.commands.output import plain

    with StageProgress("export", file.name, responses.num_rows, "rows") as progress:
        for piece in responses.pieces:
            for batch in piece_batches(responses, piece):
                for row in batch.to_pylist():
                    file.write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False).encode() + b"\n")
                progress.advance(batch.num_rows, len(batch["response_ids"].flatten()))
