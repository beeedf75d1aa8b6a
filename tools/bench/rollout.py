"""The rollout stage against its engine alone: sampled tokens a second; and what each stage costs beside its engine.

    python tools/bench/rollout.py [--model small|vocabulary] [--prompts 4] [--tokens 200] [--repeats 3] [--json FILE]
    .venv-vllm/bin/python tools/bench/rollout.py --engine vllm
    python tools/bench/rollout.py --device cuda --dtype bfloat16 --model large --prompts 16 --only rates

Rate: `rollout_episode` with a warm model, from plan to seal, its weights taken anew as after every learning, against
`model.generate` (hf) or `LLM.generate` (vllm) over the same prompts, 8 samples of each, none ending before its length;
in turns. Fixed cost: time of `opd-cache rollout`, `score` and `learn` of two short responses, each a process, less that of
a process that imports the engine and loads the same model; wall and CPU, medians of the repeats, taken in turns.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import EOS, SHAPES, device_name, finish, save_random_model, save_tokenizer, write_prompts

from opd_cache.models import padded
from opd_cache.prompts.intake import read_prompt_ids
from opd_cache.recipes import load_recipe
from opd_cache.rollout.stage import new_sampler, rollout_episode
from opd_cache.run import open_run

STAGES = ("rollout", "score", "learn")
TARGET_FIXED_S = 1.0
VLLM = {"kv_cache_memory_bytes": 1 << 29, "block_size": 32, "max_num_seqs": 64, "max_model_len": 1024}


def make_recipe(folder: Path, shape: str, prompts: int, tokens: int, samples: int, options: argparse.Namespace) -> str:
    """A recipe, its model and its prompts of 180 to 220 tokens; no response ends before its length."""
    engine, device = options.engine, options.device
    save_tokenizer(SHAPES[shape]["vocab_size"], folder / "model")
    save_random_model(shape, folder / "model", endless=True, device=device)
    write_prompts(folder / "prompts.jsonl", prompts)
    model = {"model": f"{folder}/model", "device": device, "dtype": options.dtype}
    recipe = {
        "torch_threads": options.threads, "student": model, "teachers": {"main": model}, "prompts": {"path": f"{folder}/prompts.jsonl"},
        "rollout": {"sampler": engine, "vllm": VLLM, "prompts_per_episode": prompts, "n_samples_per_prompt": samples,
                    "prompts_per_shard": prompts, "max_new_tokens": tokens},
        "score": {"scorer": engine, "vllm": VLLM},
        "learn": {"train_batch_size": prompts * samples},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return str(folder / "recipe.yaml")


def stage_seconds(recipe: str, sampler: Any, run_dir: Path) -> float:
    run = open_run(load_recipe([recipe, f"run_dir={run_dir}"]))
    start = time.perf_counter()
    assert rollout_episode(run, 0, sampler)
    return time.perf_counter() - start


def generate_hf(sampler: Any, prompts: list[np.ndarray], tokens: int, samples: int) -> None:
    """What people call: one batch, left-padded."""
    rows = [prompt for prompt in prompts for _ in range(samples)]
    ids, mask = padded(rows, "left", sampler.model.device)
    with torch.inference_mode():
        found = sampler.model.module.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=tokens,
            eos_token_id=EOS, pad_token_id=0,
        )  # fmt: skip
    assert found.shape == (len(rows), ids.shape[1] + tokens)


def generate_vllm(sampler: Any, prompts: list[np.ndarray], tokens: int, samples: int) -> None:
    from vllm import SamplingParams

    sampler.loaded.forget_prefixes()
    wanted = SamplingParams(n=samples, max_tokens=tokens, temperature=1.0, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
    found = sampler.loaded.llm.generate(asked, wanted, use_tqdm=False)
    assert sum(len(one.token_ids) for output in found for one in output.outputs) == len(prompts) * samples * tokens


def rates(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the stage and of its engine alone, and the ratio of their rates."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_recipe(folder, options.model, options.prompts, options.tokens, options.samples, options)
        run = open_run(load_recipe([recipe, f"run_dir={folder}/first"]))
        torch.set_num_threads(options.threads)
        sampler = new_sampler(run, run.recipe.student)
        rollout_episode(run, 0, sampler)  # loads, and warms up
        prompts = list(read_prompt_ids(run.dir.prompts, range(options.prompts)).values())
        alone = {"hf": generate_hf, "vllm": generate_vllm}[options.engine]
        ways: dict[str, Callable[[int], float]] = {
            "stage": lambda repeat: stage_seconds(recipe, sampler, folder / f"run-{repeat}"),
            "alone": lambda _: _timed(lambda: alone(sampler, prompts, options.tokens, options.samples), options.device),
        }
        ways["alone"](0)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(options.repeats):
            for way in ways if repeat % 2 == 0 else reversed(ways):
                seconds[way].append(ways[way](repeat))
        sampler.close()
    median = {way: statistics.median(values) for way, values in seconds.items()}
    tokens = options.prompts * options.samples * options.tokens
    return {
        "engine": options.engine, "device": device_name(options.device), "dtype": options.dtype, "model": options.model, "tokens": tokens, "seconds": seconds,
        "tokens_per_s": {way: tokens / value for way, value in median.items()}, "ratio": median["alone"] / median["stage"],
    }  # fmt: skip


def _timed(work: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


# What no stage can avoid, in a process that imports nothing of this project. It ends at once, as a stage's does: Python
# takes more than a second to take torch and transformers apart.
AT_ONCE = "; import os; os._exit(0)"
LOADERS = {
    "hf": "import torch, transformers; torch.set_num_threads({threads}); transformers.AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.{dtype}).to({device!r})",
    "vllm": "import vllm; vllm.LLM({folder!r}, dtype='float32', skip_tokenizer_init=True, generation_config='vllm', **{settings})",
}


def fixed_costs(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage's command beside its engine's own."""
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in (*STAGES, *{"hf", options.engine})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_recipe(folder, "quickstart", 2, 4, 1, options)
        for repeat in range(options.repeats + 1):
            run_dir = f"run_dir={folder}/run-{repeat}"
            open_run(load_recipe([recipe, run_dir]))  # takes the prompts in, once a run
            for stage in STAGES:
                command = [sys.executable, "-m", "opd_cache", stage, recipe, run_dir, "--episode", "0"]
                seconds[stage].append(_command_seconds(command, {}))
            for engine in seconds.keys() - set(STAGES):
                loader = LOADERS[engine].format(
                    threads=options.threads,
                    folder=f"{folder}/model",
                    settings=VLLM,
                    device=options.device,
                    dtype=options.dtype,
                )
                seconds[engine].append(_command_seconds([sys.executable, "-c", loader + AT_ONCE], quiet))
    seconds = {
        name: pairs[1:] for name, pairs in seconds.items()
    }  # the first fills caches of files and of compiled code
    engines = {"rollout": options.engine, "score": options.engine, "learn": "hf"}
    found: dict[str, Any] = {"engine": options.engine, "wall_and_cpu_s": seconds, "target_s": TARGET_FIXED_S}
    for place, name in enumerate(("fixed_s", "fixed_cpu_s")):
        median = {name: statistics.median(pair[place] for pair in pairs) for name, pairs in seconds.items()}
        found[name] = {stage: median[stage] - median[engine] for stage, engine in engines.items()}
    return found


def _command_seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{command} ended with status {ended.returncode}:\n{ended.stderr[-4000:]}")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=LOADERS, default="hf")
    parser.add_argument("--model", choices=("quickstart", "small", "vocabulary", "large"), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", choices=("rates", "fixed"), help="default: both")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=200, help="of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    fixed = fixed_costs(options) if options.only != "rates" else {"fixed_s": {}}
    rate = rates(options) if options.only != "fixed" else {}
    if options.json:
        options.json.write_text(json.dumps({"rate": rate, "fixed": fixed}, indent=2) + "\n")
    if rate:
        print(f"{rate['tokens']} tokens by {options.engine}, {options.model}, {rate['device']}: " + ", ".join(f"{way} {value:.0f} tokens/s" for way, value in rate["tokens_per_s"].items()) + f", ratio {rate['ratio']:.2f}")  # fmt: skip
    for stage, value in fixed["fixed_s"].items():
        cpu = fixed["fixed_cpu_s"][stage]
        print(
            f"{stage}: {value:.2f} s ({cpu:.2f} s of CPU) beside its engine's imports and model (target {TARGET_FIXED_S:g})"
        )


if __name__ == "__main__":
    main()
