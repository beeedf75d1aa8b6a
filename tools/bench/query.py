"""How fast a run can be asked, and in how much memory: the questions that a person asks first.

    python tools/bench/query.py [RUN] [--tokens 20000000] [--threads 2] [--repeats 3] [--json]

Without RUN a made run of that many response tokens (tools/make_big_run.py) is asked, and opening one of 1,000 shards is
timed. Every question is asked on a new connection in a process of its own: the time is the best of the repeats after
the connection is open, the memory that process's peak.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import opd_cache
from opd_cache.queries import example_names, example_sql

MAKE = Path(__file__).parent.parent / "make_big_run.py"
QUESTIONS = {
    "counts and lengths by episode (rollouts)": "SELECT episode, count(*), avg(num_response_tokens) FROM rollouts GROUP BY 1",
    "counts and lengths by episode (samples)": "SELECT episode, count(*), avg(num_response_tokens) FROM samples GROUP BY 1",
    "mean reverse KL by position": example_sql("reverse-kl-by-position"),
    "worst 20 tokens": example_sql("worst-tokens"),
    "one sample by id": "SELECT * FROM samples WHERE rollout_id = '{id}'",
    "one sample's tokens by id": "SELECT * FROM tokens WHERE rollout_id = '{id}'",
    **{f"--example {name}": example_sql(name) for name in example_names()},
}
TARGETS_S = {
    "counts and lengths by episode (rollouts)": 0.1,
    "counts and lengths by episode (samples)": 0.1,
    "mean reverse KL by position": 2.0,
    "worst 20 tokens": 2.0,
    "one sample by id": 0.1,
    "opening 1,000 shards": 0.3,
}


def ask(run: str, sql: str, repeats: int) -> dict[str, float]:
    """Seconds and peak memory of one question in this process."""
    opd_cache.connect(run).close()  # loads DuckDB and pyarrow, 0.3 s
    start = time.perf_counter()
    connection = opd_cache.connect(run)
    opening = time.perf_counter() - start
    if sql:
        ids = connection.execute("SELECT rollout_id FROM rollouts WHERE episode = 1 LIMIT 1").fetchall()
        sql = sql.replace("{id}", ids[0][0])
    times = [_seconds(connection, sql) for _ in range(repeats)] if sql else [opening]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": min(times), "opening_s": opening, "peak_gb": peak}


def _seconds(connection: Any, sql: str) -> float:
    start = time.perf_counter()
    connection.execute(sql).fetchall()
    return time.perf_counter() - start


def ask_apart(run: Path, sql: str, threads: int, repeats: int) -> dict[str, float]:
    """The same in a process of its own, on so many cores."""
    command = ["taskset", "-c", f"0-{threads - 1}", sys.executable, __file__, str(run), "--ask", sql]
    done = subprocess.run([*command, "--repeats", str(repeats)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def make(folder: Path, *options: str) -> Path:
    subprocess.run([sys.executable, MAKE, folder, *options], check=True, capture_output=True)
    return folder


def measure(run: Path | None, tokens: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        asked = run or make(Path(name) / "big", "--tokens", str(tokens))
        rows = [
            {"question": question, **ask_apart(asked, sql, threads, repeats)} for question, sql in QUESTIONS.items()
        ]
        if run is None:
            many = make(Path(name) / "many", "--tokens", "500000", "--episodes", "10", "--shards", "50")
            rows.append({"question": "opening 1,000 shards", **ask_apart(many, "", threads, repeats)})
        return [{**row, "target_s": TARGETS_S.get(str(row["question"]))} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="default: one is made")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.ask is not None:
        print(json.dumps(ask(str(options.run), options.ask, options.repeats)))
        return
    rows = measure(options.run, options.tokens, options.threads, options.repeats)
    if options.json:
        print(json.dumps(rows))
        return
    print("| question | seconds | target | peak memory |\n|---|---|---|---|")
    for row in rows:
        target = "" if row["target_s"] is None else f"{row['target_s']:g}"
        print(f"| {row['question']} | {row['seconds']:.3f} | {target} | {row['peak_gb']:.2f} GB |")


if __name__ == "__main__":
    main()
