"""The README's table of targets, from the figures that tools/bench/run.sh keeps.

python tools/bench/render.py [RESULTS]      prints it; tools/render_readme.py puts it into the README
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEAD = ("what", "target", "measured", "measured ÷ target", "met", "command")


@dataclass(frozen=True)
class Row:
    """One target, and where in a benchmark's figures its measure stands."""

    name: str  # of the JSON file
    what: str
    target: float
    measure: Callable[[Any], float | None]  # None: too small to have one
    unit: str = "×"  # or s, %
    at_least: bool = False


def ratio(key: str) -> Callable[[Any], float | None]:
    return lambda found: found["ratios"].get(key)


def of_model(model: str, key: str) -> Callable[[Any], float | None]:
    """Of a benchmark that reports a list of models."""
    return lambda found: next((row["ratios"].get(key) for row in found if row["model"] == model), None)


def asked(question: str, key: str) -> Callable[[Any], float | None]:
    return lambda found: next((row[key] for row in found if row["question"] == question), None)


def largest_exponent(key: str) -> Callable[[Any], float | None]:
    def largest(found: Any) -> float | None:
        return max((row[key] for row in found["questions"].values() if row[key] is not None), default=None)

    return largest


def trl_rows() -> Iterator[Row]:
    tasks = {
        "letters": ("the quickstart's task, 120 steps", 1.0, None),
        "vocabulary": ("151,936 tokens, 180 M parameters", 0.7, 0.5),
    }
    for task, (said, time_target, memory_target) in tasks.items():
        for trainer, name in (("trl-distillation", "TRL's DistillationTrainer"), ("trl-gkd", "TRL's GKDTrainer")):
            yield Row(task, f"whole run ÷ {name}, {said}: time", time_target, ratio(f"opd-cache / {trainer}: seconds"))
            if memory_target is not None:
                yield Row(task, "the same: peak memory of a process", memory_target, ratio(f"opd-cache / {trainer}: peak_bytes"))  # fmt: skip
        yield Row(task, f"learning again from the cache with another loss ÷ the first run, {said}", 0.5, ratio("replay / opd-cache: seconds"))  # fmt: skip


def stage_rows() -> Iterator[Row]:
    for name, engine in (("rollout", "model.generate"), ("rollout_vllm", "LLM.generate")):
        yield Row(name, f"sampled tokens a second ÷ {engine} alone", 0.9, lambda found: found["rate"]["ratio"], at_least=True)  # fmt: skip
        for stage in ("rollout", "score", "learn"):
            yield Row(
                name,
                f"{stage}: a command beside its engine's imports and model ({engine})",
                1.0,
                lambda found, stage=stage: found["fixed"]["fixed_s"][stage],
                "s",
            )


ROWS = (
    *trl_rows(),
    Row("quickstart_loop", "quickstart ÷ the same loop written by hand in memory: time", 1.15, lambda found: found["time_ratio"]),
    *stage_rows(),
    Row("score_small", "scored tokens a second ÷ the engine's pure prefill, vocabulary of 258", 0.93, of_model("small", "vllm / prefill"), at_least=True),
    Row("score_small", "the same with the teacher's top 64", 0.85, of_model("small", "vllm_k64 / prefill"), at_least=True),
    Row("score_vocabulary", "vLLM scorer with shared prompts ÷ stock `prompt_logprobs=0`, 151,936 tokens", 1.3, of_model("vocabulary", "vllm_shared / stock"), at_least=True),
    Row("score_vocabulary", "transformers scorer ÷ one that keeps all logits, 151,936 tokens", 2.5, of_model("vocabulary", "hf / naive"), at_least=True),
    Row("learn", "a learner step ÷ one with all logits, 151,936 tokens: time", 1.0, lambda found: found["time_ratio"]),
    Row("learn", "the same: peak memory", 0.5, lambda found: found["memory_ratio"]),
    Row("cache", "a step fed from shards beside one fed from memory", 0.03, lambda found: max(row["overhead"] for row in found), "%"),
    Row("cache", "the learner's time without data", 0.01, lambda found: max(row["waiting"] for row in found), "%"),
    Row("join", "checked and joined response tokens a CPU-second, in millions", 10.0, lambda found: found["join_tokens_per_cpu_s"] / 1e6, "M", at_least=True),
    *(Row(name, f"`opd-cache verify` ÷ `sha256sum` of the same files, {said}: rate", 0.8, lambda found: found[-1]["of_sha256sum"], at_least=True) for name, said in (("verify", "20 M response tokens"), ("verify_large", "80 M"))),
    *(Row("bytes", f"bytes a response token in the quickstart's cache with top 16: {part}", target, lambda found, part=part: found[-1]["parts"][part], "B") for part, target in (("ids + sampling log-prob", 4.5), ("teacher log-prob", 3.1), ("top k", 51.0))),
    Row("health", "health checks ÷ the stage, 3 M tokens a second", 0.05, lambda found: max(row["share"] for row in found), "%"),
    Row("query", "20 M tokens in SQL: worst 20 tokens", 2.0, asked("worst 20 tokens", "seconds"), "s"),
    Row("query", "20 M tokens in SQL: mean reverse KL by position", 2.0, asked("mean reverse KL by position", "seconds"), "s"),
    Row("query", "opening 1,000 shards", 0.3, asked("opening 1,000 shards", "seconds"), "s"),
    Row("serve", "20 M tokens in the browser: first page, nothing ready", 1.0, asked("first page, nothing ready", "median_s"), "s"),
    Row("scale", "whatever looks at all shards, up to 10⁹ tokens in 10,000: largest exponent of time", 1.05, largest_exponent("exponent"), ""),
    Row("scale", "the same: of memory", 1.05, largest_exponent("memory_exponent"), ""),
)  # fmt: skip


def rows_of(results: Path, row: Row) -> list[str]:
    """The cells of a row; none where it was not measured."""
    path = results / f"{row.name}.json"
    if not path.exists():
        return []
    value = row.measure(json.loads(path.read_text()))
    if value is None:
        return []
    is_met = value >= row.target if row.at_least else value <= row.target
    sign = "≥" if row.at_least else "≤"
    cells = [row.what, f"{sign} {shown(row.target, row.unit)}", shown(value, row.unit), f"{value / row.target:.2f}"]
    return [*cells, "yes" if is_met else "**no**", f"`tools/bench/run.sh {row.name}`"]


def shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:.2f} {unit}".rstrip()


def markdown(results: Path = RESULTS) -> str:
    """The table, or a line that says how to make it."""
    lines = [cells for row in ROWS if (cells := rows_of(results, row))]
    if not lines:
        return "`bash tools/bench/run.sh` measures, `python tools/render_readme.py` writes the table here."
    table = [HEAD, ["---"] * len(HEAD), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def main() -> None:
    print(markdown(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))


if __name__ == "__main__":
    main()
