"""How time and memory grow with the number of shards, for everything that looks at all of them.

    python tools/bench/scale.py [--shards 100 1000 10000] [--repeats 3] [--folder DIR] [--json FILE]

Made runs of 100,000 response tokens a shard, so that 10,000 shards hold 10^9: plans, prompts, notes and seals are real
and of that size, the Parquet files hold one row each (scale_run.py). Every question (scale_questions.py) is asked in a
process of its own, after one ask that warms up: its times are the best of the repeats, its memory what the process grew
by. Exponents are least-squares slopes of log(CPU time) over log(shards), both less those of a run of 10 shards, so that
fixed costs do not count; likewise of memory. 1 is linear. CPU time, since the machine's other work bends wall times.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from peaks import forget_peak, peak_bytes, resident_bytes
from scale_questions import QUESTIONS, Asked
from scale_run import make_run

T = TypeVar("T")
FORK = multiprocessing.get_context("fork")

FEW = 10  # shards
TARGET_EXPONENT = 1.05
NOISE_S, NOISE_BYTES = 0.003, 4 << 20  # growth below it has no exponent


def ask(question: str, run: Path, repeats: int) -> dict[str, float]:
    """Seconds of a question in this process, and the memory that it took on top."""
    with tempfile.TemporaryDirectory() as scratch:
        asked = QUESTIONS[question](Asked(run, Path(scratch)))
        before = resident_bytes()
        forget_peak()
        seconds = [_seconds(asked) for _ in range(repeats + 1)][1:]
        wall, cpu = (min(values) for values in zip(*seconds, strict=True))
        return {"seconds": wall, "cpu_s": cpu, "bytes": max(0, peak_bytes() - before)}


def _seconds(asked: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    asked()
    return time.perf_counter() - wall, time.process_time() - cpu


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """What it gives in a fork of this process, which has imported everything and done nothing."""
    receiver, sender = FORK.Pipe(duplex=False)

    def send() -> None:
        sender.send(work(*arguments))

    process = FORK.Process(target=send)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__}{arguments} failed, see above.") from None
    finally:
        process.join()


def made(folder: Path, shards: int) -> Path:
    """A made run and, beside it, what its stages' own code took; one that is there is used again."""
    run, note = folder / f"shards-{shards}", folder / f"shards-{shards}.json"
    if not note.exists():
        note.write_text(json.dumps(apart(make_run, run, shards)))
    return run


def sizes_of(run: Path) -> dict[str, int]:
    """Bytes of what grows with the run, and how many files there are."""
    episode = run / "episode=0"
    files = {
        "plan": episode / "plan.json",
        "seal of rollouts": episode / "rollouts/_SEALED.json",
        "seal of scores": episode / "scores/teacher=main/_SEALED.json",
        "prompts": run / "prompts.parquet",
    }
    found = {name: path.stat().st_size for name, path in files.items()}
    notes = [path.stat().st_size for path in run.glob("logs/*/*/*.json")]
    return {**found, "notes": sum(notes), "files": sum(1 for path in run.rglob("*") if path.is_file())}


def measure(folder: Path, shards: Sequence[int], questions: Sequence[str], repeats: int) -> dict[str, Any]:
    found: dict[str, dict[int, dict[str, float]]] = {question: {} for question in questions}
    sizes: dict[int, dict[str, int]] = {}
    stages: dict[str, dict[int, dict[str, float]]] = {"rollout": {}, "score": {}}
    for count in sorted({FEW, *shards}):
        run = made(folder, count)
        sizes[count] = sizes_of(run)
        for stage, (wall, cpu) in json.loads((folder / f"shards-{count}.json").read_text()).items():
            stages[stage][count] = {"seconds": wall, "cpu_s": cpu, "bytes": 0}
        for question in questions:
            found[question][count] = apart(ask, question, run, repeats)
        print(f"{count} shards done", file=sys.stderr)
    named = {f"publish and seal ({stage})": points for stage, points in stages.items()}
    return {"questions": {name: growth(points) for name, points in {**named, **found}.items()}, "sizes": sizes}


def growth(points: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Exponents of one question, and what a thousand shards add to it, by its largest run."""
    largest, fixed = max(points), points[FEW]
    each = (largest - FEW) / 1000
    return {
        "points": points,
        "exponent": exponent(points, "cpu_s", NOISE_S),
        "memory_exponent": exponent(points, "bytes", NOISE_BYTES),
        "cpu_s_per_1000_shards": (points[largest]["cpu_s"] - fixed["cpu_s"]) / each,
        "bytes_per_1000_shards": (points[largest]["bytes"] - fixed["bytes"]) / each,
    }


def exponent(points: dict[int, dict[str, float]], key: str, noise: float) -> float | None:
    """Least squares over the sizes at which there is more than noise; None with fewer than two of them."""
    few = points[FEW][key]
    grown = [(count - FEW, point[key] - few) for count, point in points.items() if point[key] - few > noise]
    if len(grown) < 2:
        return None
    x, y = np.log(np.array(grown)).T
    return float(np.polyfit(x, y, 1)[0])


def print_table(report: dict[str, Any]) -> None:
    counts = list(report["sizes"])
    head = ["question", *(f"{count:,}" for count in counts), "exponent", "MB at most", "memory exponent"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for question, row in report["questions"].items():
        points = [row["points"][count] for count in counts]
        seconds = [f"{point['seconds']:.4f} ({point['cpu_s']:.4f}) s" for point in points]
        memory = f"{points[-1]['bytes'] / 1e6:.1f}"
        exponents = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("exponent", "memory_exponent")]
        print(f"| {' | '.join([question, *seconds, exponents[0], memory, exponents[1]])} |")
    for count, sizes in report["sizes"].items():
        print(f"{count:,} shards: " + ", ".join(f"{name} {value:,}" for name, value in sizes.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the made runs lie, and stay; default: they are removed")
    parser.add_argument("--only", nargs="+", metavar="QUESTION", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        report = measure(folder, options.shards, options.only or list(QUESTIONS), options.repeats)
    report["target_exponent"] = TARGET_EXPONENT
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print_table(report)


if __name__ == "__main__":
    main()
