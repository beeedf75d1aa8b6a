"""How long a reader of `opd-cache serve` waits: whole answers over HTTP, measured from outside.

    python tools/bench/serve.py [RUN] [--tokens 20000000] [--threads 2] [--repeats 5] [--json]

Without RUN a made run of that many response tokens (tools/make_big_run.py) is served. The server is a process of its own
on so many cores. The first page is asked for at once when the address is printed, with nothing made ready; of the other
questions the median and the longest of the repeats count, each repeat asking for something else.
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode, urlsplit

from peaks import peak_bytes

from opd_cache.report.page import static_files

MAKE = Path(__file__).parent.parent / "make_big_run.py"
FILTERS: list[dict[str, Any]] = [
    {"kl_min": 0.2, "kl_max": 0.4}, {"episode": 3, "finish": "length"}, {"prompt": 17, "sort": "num_response_tokens"},
    {"sort": "reverse_kl_sum", "page": 40}, {"sort": "teacher_logprob_min", "desc": 0, "finish": "stop"},
]  # fmt: skip
TEXTS = ("t4711 t", "T15 t2", "Problem 77", "nowhere at all", "t99999")
TARGETS_S = {"first page, nothing ready": 1.0, "first page": 1.0, "filtered table page": 1.0, "table page by text": 1.0, "token view": 0.5}  # fmt: skip


class Client:
    """One browser's connection to a server."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.root = parts.path
        self.connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=120)

    def get(self, place: str) -> bytes:
        self.connection.request("GET", self.root + place)
        response = self.connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"{place}: {response.status} {body[:200]!r}")
        return body

    def ask(self, name: str, **params: Any) -> Any:
        return json.loads(self.get(f"api/{name}?{urlencode(params)}"))

    def first_page(self) -> None:
        """All that a browser loads until the overview is drawn."""
        for place in ("", *(f"static/{name}" for name in static_files()), "api/about", "api/overview"):
            self.get(place)


@contextmanager
def served(run: Path, threads: int) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server on this run."""
    command = ["taskset", "-c", f"0-{threads - 1}", sys.executable, "-m", "opd_cache", "serve", str(run), "--port", "0", "--json"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], process.pid
        process.terminate()


def timed(action: Any, *arguments: Any, **named: Any) -> float:
    start = time.perf_counter()
    action(*arguments, **named)
    return time.perf_counter() - start


def measure(run: Path, threads: int, repeats: int) -> list[dict[str, Any]]:
    start = time.perf_counter()
    with served(run, threads) as (url, pid):
        client, rows = Client(url), [row("start until the address is printed", [time.perf_counter() - start])]
        rows.append(row("first page, nothing ready", [timed(client.first_page)]))
        rows.append(row("first search, nothing ready", [timed(client.ask, "samples", run=run.name, text="t1")]))
        rows.append(row("first page", [timed(client.first_page) for _ in range(repeats)]))
        asked = [FILTERS[number % len(FILTERS)] for number in range(repeats)]
        rows.append(row("filtered table page", [timed(client.ask, "samples", run=run.name, **one) for one in asked]))
        texts = [TEXTS[number % len(TEXTS)] for number in range(repeats)]
        rows.append(
            row("table page by text", [timed(client.ask, "samples", run=run.name, text=text) for text in texts])
        )
        rows.append(row("token view", list(token_views(client, run.name, repeats))))
        rows.append(row("health", [timed(client.ask, "health") for _ in range(repeats)]))
        return [*rows, {"question": "peak memory of the server", "gb": peak_bytes(pid) / 1e9}]


def token_views(client: Client, run: str, repeats: int) -> Iterator[float]:
    """Of the longest responses of all episodes, which take longest."""
    found = client.ask("samples", run=run, sort="num_response_tokens")["rows"]
    for number in range(repeats):
        one = found[number % len(found)]
        yield timed(client.ask, "response", run=run, episode=one["episode"], rollout=one["rollout_id"])


def row(question: str, seconds: list[float]) -> dict[str, Any]:
    return {"question": question, "median_s": median(seconds), "longest_s": max(seconds), "target_s": TARGETS_S.get(question)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="default: one is made")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or Path(folder) / "big"
        if options.run is None:
            subprocess.run(
                [sys.executable, MAKE, run, "--tokens", str(options.tokens)], check=True, capture_output=True
            )
        rows = measure(run, options.threads, options.repeats)
    if options.json:
        print(json.dumps(rows))
        return
    print("| question | median s | longest s | target |\n|---|---|---|---|")
    for one in rows:
        if "gb" in one:
            print(f"| {one['question']} | {one['gb']:.2f} GB | | |")
        else:
            target = "" if one["target_s"] is None else f"{one['target_s']:g}"
            print(f"| {one['question']} | {one['median_s']:.3f} | {one['longest_s']:.3f} | {target} |")


if __name__ == "__main__":
    main()
