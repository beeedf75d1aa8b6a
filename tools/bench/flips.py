"""Single flipped bits in shards: what our readers make of them, and what pyarrow without page checksums does.

usage: python tools/bench/flips.py [--small-stride 1] [--large 1500]
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS / name) for name in ("faults", "store")]

from damaged_shard import HARMLESS, MISREAD, REFUSED, DamagedShard, raw_outcomes  # noqa: E402

# (stage, rollouts, mean response tokens): a shard of some 4 KB, and one of 2.5 MB
SMALL, LARGE = (("rollout", 8, 12), ("score", 8, 12)), (("rollout", 2500, 250), ("score", 500, 250))


def figures(shard: DamagedShard, bits: Sequence[int]) -> dict[str, object]:
    """Counts by outcome, of plain pyarrow (before) and of our readers (after)."""
    counts = {"before": raw_outcomes(shard.path, bits), "after": Counter(map(shard.outcome, bits))}
    told = {
        when: {name: found[name] for name in (REFUSED, HARMLESS, MISREAD)} for when, found in counts.items()
    }  # fmt: skip
    return {"shard": shard.stage, "bytes": len(shard.whole), "flips": len(bits), **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small-stride", type=int, default=1)
    parser.add_argument("--large", type=int, default=1500)
    options = parser.parse_args()
    for stage, rows, length in (*SMALL, *LARGE):
        with tempfile.TemporaryDirectory() as folder:
            shard = DamagedShard(Path(folder), stage, rows, length)
            is_small = len(shard.whole) < 100_000
            bits = (
                range(0, 8 * len(shard.whole), options.small_stride)
                if is_small
                else shard.drawn(options.large, seed=11)
            )
            print(json.dumps(figures(shard, list(bits))), flush=True)


if __name__ == "__main__":
    main()
