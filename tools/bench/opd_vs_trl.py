"""opd-cache against TRL's trainers that distil on the student's own samples: time, memory, and what is learned.

    python tools/bench/opd_vs_trl.py [--task letters|vocabulary] [--repeats 3] [--json FILE]
    python tools/bench/opd_vs_trl.py --task vocabulary --device cuda --prompts 32 --batch 64 --gkd-micro-batch 8

Contestants, each a process of its own with the same models, prompts in the same order, batch, optimizer, schedule, clip,
lengths, temperature, dtype and threads:
  opd-cache         its stages in one process; an episode of several steps is sampled by one policy
  opd-cache-apart   every stage a process of its own (only when named)
  trl-distillation  DistillationTrainer, beta=1: samples afresh for every step; head and loss in chunks
  trl-gkd           GKDTrainer, lmbda=1, beta=1: samples afresh for every micro-batch; all logits at once
  replay            opd-cache again from the cache that it has just made, with another loss
TRL's reverse KL runs over the whole vocabulary; opd-cache's over the teacher's top 8, the sampled token and a tail.
Their order is rotated from repeat to repeat. Seconds count from the start of the process to the end of training, with
and without imports; saving the student at TRL's end is left out, opd-cache's policies and shards are in. Peak memory is
that of the largest process, on a GPU of what torch allocated there; there all compute in bfloat16. TRL has an environment of its own: see tools/install.sh, install_trl_into.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models import VOCABULARY, save_random_model, save_tokenizer, write_prompts
from quickstart_loop import accuracy
from transformers import AutoModelForCausalLM

from opd_cache.config import Recipe
from opd_cache.recipes import load_recipe
from opd_cache.rollout.plan import episode_prompts
from opd_cache.run import open_run

HERE = Path(__file__).parent
NAMES = ("opd-cache", "opd-cache-apart", "trl-distillation", "trl-gkd")
DEFAULT = ("opd-cache", "trl-distillation", "trl-gkd")
REPLAY = ["learn.loss.name=jsd_topk", "learn.learning_rate=1e-3"]
EPISODES = {"letters": 12, "vocabulary": 1}


def letters(folder: Path, options: argparse.Namespace) -> list[str]:
    """The quickstart's recipe on its task, which is made here."""
    arguments = ["quickstart", f"task.dir={options.task_dir or folder / 'task'}", f"num_episodes={options.episodes}"]
    open_run(load_recipe([*arguments, f"run_dir={folder}/warm"]))  # makes the task
    return [*arguments, "eval.path=null"]


def vocabulary(folder: Path, options: argparse.Namespace) -> list[str]:
    """Random models with a vocabulary of 151,936; steps of 8 rollouts, 4 of a prompt, two steps an episode."""
    for seed, name in enumerate(("student", "teacher")):
        save_tokenizer(VOCABULARY, folder / name)
        save_random_model("vocabulary", folder / name, seed=seed, endless=True, device=options.device)
    write_prompts(folder / "prompts.jsonl", options.prompts * options.episodes)
    model = {"device": options.device, "dtype": "float32" if options.device == "cpu" else "bfloat16"}
    recipe = {
        "num_episodes": options.episodes, "torch_threads": options.threads,
        "student": {"model": f"{folder}/student", **model},
        "teachers": {"main": {"model": f"{folder}/teacher", **model}},
        "prompts": {"path": f"{folder}/prompts.jsonl"},
        "rollout": {"prompts_per_episode": options.prompts, "n_samples_per_prompt": 4, "prompts_per_shard": options.prompts,
                    "max_new_tokens": options.tokens},
        "score": {"top_k": 8},
        "learn": {"loss": {"name": "reverse_kl_topk"}, "train_batch_size": options.batch, "learning_rate": 1e-5, "lr_schedule": "linear"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return [str(folder / "recipe.yaml")]


def planned_prompts(recipe: Recipe, path: Path) -> int:
    """Write every prompt as often as it is sampled, in opd-cache's order; how many."""
    records = [json.loads(line) for line in Path(recipe.prompts.path).read_text().splitlines()]
    options, rows = recipe.rollout, []
    for episode in range(recipe.num_episodes):
        for index in episode_prompts(recipe.seed, episode, len(records), options.prompts_per_episode):
            record = records[index]
            rows += [{"prompt": record["prompt"], "answer": record.get("answer", "")}] * options.n_samples_per_prompt
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def shared_spec(folder: Path, arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe([*arguments, f"run_dir={folder}/unused"])
    learn, batch = recipe.learn, recipe.learn.train_batch_size
    rollouts = planned_prompts(recipe, folder / "planned.jsonl")
    return {
        "student": recipe.student.model, "teacher": recipe.teachers["main"].model, "prompts": f"{folder}/planned.jsonl",
        "steps": rollouts // batch, "batch": batch, "gkd_micro_batch": min(batch, options.gkd_micro_batch or batch),
        "max_new_tokens": recipe.rollout.max_new_tokens,
        "learning_rate": learn.learning_rate, "warmup_steps": learn.warmup_steps, "max_grad_norm": learn.max_grad_norm,
        "betas": [learn.adam_beta1, learn.adam_beta2], "seed": recipe.seed, "threads": options.threads, "replay": REPLAY,
        "device": options.device,
    }  # fmt: skip


def run_contestant(name: str, out: Path, spec: dict[str, Any], python: Path) -> dict[str, Any]:
    """One process: its seconds, its peak memory, what it sampled."""
    out.mkdir(exist_ok=True)
    (out / "spec.json").write_text(json.dumps({**spec, "out": str(out)}))
    with open(out / "log", "w") as log:
        start = time.time()
        command = [python, HERE / "contestants.py", name, out / "spec.json"]
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise SystemExit(f"{name} ended with status {ended.returncode}:\n{(out / 'log').read_text()[-4000:]}")
    found = json.loads((out / "result.json").read_text())
    return {
        "seconds": found["trained"] - start, "without_imports_s": found["trained"] - found["imported"],
        "rollouts": found["rollouts"], "tokens": found["tokens"], "peak_bytes": found["peak_bytes"],
    }  # fmt: skip


def held_out(student: Path, options: argparse.Namespace, arguments: list[str]) -> dict[str, float]:
    if options.task != "letters":
        return {}
    task = Path(load_recipe([*arguments, "run_dir=unused"]).prompts.path).parent
    recipe = load_recipe([*arguments, "run_dir=unused", f"eval.path={task}/heldout.jsonl"])
    model = AutoModelForCausalLM.from_pretrained(student)
    torch.manual_seed(0)
    return {mode: accuracy(model, recipe, sampled=mode == "sampled") for mode in ("greedy", "sampled")}


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = {"letters": letters, "vocabulary": vocabulary}[options.task](folder, options)
        spec = shared_spec(folder, arguments, options)
        for repeat in range(options.repeats):
            turn = repeat % len(options.only)
            for contestant in [*options.only[turn:], *options.only[:turn]]:
                python = options.trl_python if contestant.startswith("trl-") else Path(sys.executable)
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    mine = {**spec, "recipe": [*arguments, f"run_dir={out}/run"]}
                    names = [contestant, *(["replay"] if contestant == "opd-cache" else [])]
                    for each in names:
                        row = run_contestant(each, Path(out), mine, python)
                        row.update(held_out(Path(out) / "student", options, arguments))
                        found.setdefault(each, []).append(row)
                        print(f"repeat {repeat + 1}: {each} {row['seconds']:.1f} s", file=sys.stderr)
    return found


def summary(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, and the ratios of what opd-cache took to what the others took."""
    median = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    ratios = {}
    for name in median:
        if name.startswith("trl-") and "opd-cache" in median:
            for key in ("seconds", "without_imports_s", "peak_bytes"):
                ratios[f"opd-cache / {name}: {key}"] = median["opd-cache"][key] / median[name][key]
    if "replay" in median:
        ratios["replay / opd-cache: seconds"] = median["replay"]["seconds"] / median["opd-cache"]["seconds"]
    settings = {
        "task": options.task,
        "episodes": options.episodes,
        "repeats": options.repeats,
        "threads": options.threads,
    }
    return {**settings, "median": median, "ratios": ratios, "runs": found}  # fmt: skip


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['task']}, {report['episodes']} episodes, medians of {report['repeats']}\n")
    print("| contestant | s | s without imports | rollouts | tokens | peak GiB | greedy | sampled |\n|" + "---|" * 8)
    for name, row in report["median"].items():
        scores = [f"{row[mode]:.1%}" if mode in row else "-" for mode in ("greedy", "sampled")]
        cells = [name, f"{row['seconds']:.1f}", f"{row['without_imports_s']:.1f}", f"{row['rollouts']:.0f}", f"{row['tokens']:.0f}", f"{row['peak_bytes'] / 2**30:.2f}", *scores]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    for name, value in report["ratios"].items():
        print(f"{name}: {value:.2f}")


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=EPISODES, default="letters")
    parser.add_argument("--task-dir", type=Path, help="letters: a task that is there, else it is made")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=DEFAULT)
    parser.add_argument("--episodes", type=int, help="default: letters 12 of 10 steps, vocabulary 1 of 2 steps")
    parser.add_argument("--tokens", type=int, default=300, help="vocabulary: of a response")
    parser.add_argument("--prompts", type=int, default=4, help="vocabulary: of an episode, 4 samples of each")
    parser.add_argument("--batch", type=int, default=8, help="vocabulary: rollouts of a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="vocabulary")
    parser.add_argument("--gkd-micro-batch", type=int, help="rollouts; default: letters the batch, vocabulary 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-python", type=Path, default=HERE.parents[1] / ".venv-trl/bin/python")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.only = list(options.only)
    options.episodes = options.episodes or EPISODES[options.task]
    if options.gkd_micro_batch is None and options.task == "vocabulary":
        options.gkd_micro_batch = 2  # 3.6 GB of logits and what is made of them for each rollout
    if any(name.startswith("trl-") for name in options.only) and not options.trl_python.exists():
        parser.error(f"{options.trl_python}: not there. Make it: source tools/install.sh; install_trl_into .venv-trl")
    return options


def main() -> None:
    options = options_of()
    report = summary(measure(options), options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print_table(report)


if __name__ == "__main__":
    main()
