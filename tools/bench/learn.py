"""One optimizer step at a real vocabulary: opd-cache's learner against a plain one that holds all logits.

    python tools/bench/learn.py --repeats 3 --json

Both take the same rows, model, loss, clip, optimizer and recomputation of the body's activations, each in processes of
its own, in turns; the plain one pads the batch once and takes log-softmax over logits at every position. Peak memory is
the process's (resident set).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import VOCABULARY, save_random_model
from transformers import Qwen2ForCausalLM

from opd_cache.config import LearnConfig, ModelConfig, Recipe
from opd_cache.learn.batch import micro_batches
from opd_cache.learn.engines.torch import TorchEngine
from opd_cache.learn.ranks import ALONE
from opd_cache.learn.recompute import recompute_activations
from opd_cache.learn.step import Trainer
from opd_cache.store.join import Joined
from opd_cache.types import Rollout, Score

# In one micro-batch, so that neither side splits the batch.
SEQUENCES, PROMPT, RESPONSE, MICRO_BATCH = 12, (150, 250), (200, 400), 8192


def make_model(folder: Path) -> dict[str, float]:
    """Save a random model; its parameters in millions."""
    model = save_random_model("vocabulary", folder)
    body = sum(parameter.numel() for parameter in model.model.layers.parameters())
    return {"body": body / 1e6, "all": sum(parameter.numel() for parameter in model.parameters()) / 1e6}


def make_rows() -> list[Joined]:
    rng = np.random.default_rng(0)
    rows = []
    for sample in range(SEQUENCES):
        prompt, response = (
            rng.integers(0, VOCABULARY, rng.integers(*size)).astype(np.int32) for size in (PROMPT, RESPONSE)
        )
        sampling, teacher = (-rng.uniform(11, 13, len(response)).astype(np.float32) for _ in range(2))
        rollout = Rollout(f"0/0/{sample}", 0, sample, prompt, response, sampling, "stop", 0)
        topk = np.zeros((len(response), 0))
        ranks, none = np.ones(len(response), np.int32), topk.astype(np.float32)
        score = Score(rollout.rollout_id, rollout.ids_hash, teacher, ranks, topk.astype(np.int32), none)
        rows.append((rollout, score))
    return rows


def learn_config(checkpointing: str) -> LearnConfig:
    """As shipped, but for a rate that leaves the figures of the steps comparable, and the micro-batch."""
    config = LearnConfig(
        learning_rate=1e-5, gradient_checkpointing=checkpointing, max_tokens_per_micro_batch=MICRO_BATCH
    )
    config.loss.clip_ratio_low, config.loss.clip_ratio_high = 1.0, 1e9
    return config


def opd_cache_steps(folder: Path, count: int, checkpointing: str) -> list[tuple[float, float, float]]:
    recipe = Recipe(run_dir="", student=ModelConfig(str(folder), device="cpu"), learn=learn_config(checkpointing))
    engine = TorchEngine(recipe.learn, recipe.student, ALONE)
    engine.load(folder, with_optimizer=False)
    trainer, rows, figures = Trainer(recipe, engine, 0, ALONE), make_rows(), []
    for step in range(count):
        start = time.perf_counter()
        metrics = trainer.step(rows, step, recipe.learn.learning_rate, read_s=0.0)
        figures.append((time.perf_counter() - start, metrics["loss"], metrics["grad_norm"]))
    return figures


def plain_steps(folder: Path, count: int, checkpointing: str) -> list[tuple[float, float, float]]:
    config = learn_config(checkpointing)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if checkpointing != "none":
        recompute_activations(model, checkpointing)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=betas, weight_decay=0.0, fused=True
    )
    rows, figures = make_rows(), []
    (batch,) = micro_batches(rows, [0.0] * len(rows), 10**9)
    ids, predictor = batch.input_ids_BT, batch.predictor_N
    for _ in range(count):
        start = time.perf_counter()
        logits_BTV = model(input_ids=ids, attention_mask=batch.attention_mask_BT, use_cache=False).logits.float()
        logprobs_BT = logits_BTV[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        width = ids.shape[1]
        student_N = logprobs_BT[predictor // width, predictor % width]
        advantage_N = batch.teacher_logprobs_N - student_N.detach()
        loss = -((student_N - batch.sampling_logprobs_N).exp() * advantage_N).sum() / len(predictor)
        del logits_BTV
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        figures.append((time.perf_counter() - start, loss.item(), norm.item()))
    return figures


VARIANTS = {"plain": plain_steps, "opd-cache": opd_cache_steps}


def measure(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process: its steps after the first, and its peak memory."""
    command = [sys.executable, __file__, "--variant", variant, "--model", str(folder), "--steps", str(options.steps)]
    command += ["--threads", str(options.threads), "--checkpointing", options.checkpointing]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each variant, in turns")
    parser.add_argument("--steps", type=int, default=3, help="steps in each process; the first is not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="selective")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.variant:
        figures = VARIANTS[options.variant](options.model, options.steps, options.checkpointing)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"steps": figures, "peak_bytes": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = make_model(Path(folder))
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.repeats):
            for variant, found in runs.items():
                found.append(measure(variant, Path(folder), options))
    report(runs, sizes, options)


def report(runs: dict[str, list[dict[str, Any]]], sizes: dict[str, float], options: argparse.Namespace) -> None:
    """Fails when the variants did not compute the same."""
    for ours, theirs in zip(runs["opd-cache"][0]["steps"], runs["plain"][0]["steps"], strict=True):
        np.testing.assert_allclose(ours[1:], theirs[1:], rtol=2e-4)
    median = {
        variant: {
            "step_s": statistics.median(step[0] for run in found for step in run["steps"][1:]),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in found),
        }
        for variant, found in runs.items()
    }
    ratios = {
        "time_ratio": median["opd-cache"]["step_s"] / median["plain"]["step_s"],
        "memory_ratio": median["opd-cache"]["peak_bytes"] / median["plain"]["peak_bytes"],
    }
    tokens = [(len(rollout.prompt_ids), len(rollout.response_ids)) for rollout, _ in make_rows()]
    about = {
        "vocabulary": VOCABULARY, "million_parameters": sizes, "threads": options.threads, "repeats": options.repeats, "checkpointing": options.checkpointing,
        "sequences": len(tokens), "prompt_tokens": sum(p for p, _ in tokens), "response_tokens": sum(r for _, r in tokens),
    }  # fmt: skip
    if options.json:
        print(json.dumps({**about, **ratios, "median": median, "runs": runs}))
        return
    print(f"{about}\n\n| learner | s a step | peak GiB |\n|---|---|---|")
    for variant, figures in median.items():
        print(f"| {variant} | {figures['step_s']:.1f} | {figures['peak_bytes'] / 2**30:.2f} |")
    print(f"| ratio | {ratios['time_ratio']:.2f} | {ratios['memory_ratio']:.2f} |")


if __name__ == "__main__":
    main()
