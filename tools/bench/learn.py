"""One optimizer step at a real vocabulary: opd-cache's learner against a plain one that holds all logits.

    python tools/bench/learn.py --repeats 3 --json
    python tools/bench/learn.py --samples 4 --micro-batch 1127 --only padded opd-cache
    python tools/bench/learn.py --device cuda --model large --sequences 24 --only plain opd-cache liger

Both take the same rows, model, loss, clip, optimizer and recomputation of the body's activations, each in processes of
its own, in turns; the plain one takes log-softmax over logits at every position of the same micro-batches. Peak memory
is the process's (resident set), on a GPU what torch allocated there. On a GPU both compute in bfloat16 on float32
weights; liger is opd-cache with Liger's head (learn.liger=always), opd-cache is without. padded is opd-cache with whole
sequences (learn.packing=never): with --samples above 1 it shows what it saves to compute a prompt once for all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import VOCABULARY, device_name, finish, save_random_model
from peaks import device_peak_bytes
from transformers import Qwen2ForCausalLM

from opd_cache.config import LearnConfig, ModelConfig, Recipe
from opd_cache.learn import head
from opd_cache.learn.batch import micro_batches
from opd_cache.learn.engines.torch import TorchEngine
from opd_cache.learn.ranks import ALONE
from opd_cache.learn.recompute import recompute_activations
from opd_cache.learn.step import Trainer
from opd_cache.models import tensors_on
from opd_cache.store.join import Joined
from opd_cache.types import Rollout, Score

# By default in one micro-batch, so that neither side splits the batch.
SEQUENCES, PROMPT, RESPONSE, MICRO_BATCH = 12, (150, 250), (200, 400), 8192
# Relative, and of the loss, whose terms cancel, in nats: float32; bfloat16.
TOLERANCE = {"cpu": (2e-4, 0.0), "cuda": (2e-2, 5e-3)}


def make_model(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Save a random model; its parameters in millions."""
    model = save_random_model(options.model, folder, device=options.device)
    body = sum(parameter.numel() for parameter in model.model.layers.parameters())
    return {"body": body / 1e6, "all": sum(parameter.numel() for parameter in model.parameters()) / 1e6}


def make_rows(sequences: int, samples: int) -> list[Joined]:
    rng = np.random.default_rng(0)
    rows: list[Joined] = []
    for sample in range(sequences):
        fresh, response = (
            rng.integers(0, VOCABULARY, rng.integers(*size)).astype(np.int32) for size in (PROMPT, RESPONSE)
        )
        prompt = fresh if sample % samples == 0 else rows[-1][0].prompt_ids
        sampling, teacher = (-rng.uniform(11, 13, len(response)).astype(np.float32) for _ in range(2))
        rollout = Rollout(f"0/0/{sample}", 0, sample, prompt, response, sampling, "stop", 0)
        topk = np.zeros((len(response), 0))
        ranks, none = np.ones(len(response), np.int32), topk.astype(np.float32)
        score = Score(rollout.rollout_id, rollout.ids_hash, teacher, ranks, topk.astype(np.int32), none)
        rows.append((rollout, score))
    return rows


def learn_config(options: argparse.Namespace) -> LearnConfig:
    """As shipped, but for a rate that leaves the figures of the steps comparable, and the micro-batch."""
    config = LearnConfig(
        learning_rate=1e-5,
        gradient_checkpointing=options.checkpointing,
        max_tokens_per_micro_batch=options.micro_batch,
        packing="never" if options.variant == "padded" else "auto",
        liger="always" if options.variant == "liger" else "never",
    )
    config.loss.clip_ratio_low, config.loss.clip_ratio_high = 1.0, 1e9
    return config


def opd_cache_steps(folder: Path, options: argparse.Namespace) -> list[tuple[float, float, float]]:
    student = ModelConfig(str(folder), device=options.device)
    recipe = Recipe(run_dir="", student=student, learn=learn_config(options))
    if options.rows:
        head.ROWS_PER_CHUNK[options.device] = options.rows
    engine = TorchEngine(recipe.learn, recipe.student, ALONE)
    engine.load(folder, with_optimizer=False)
    trainer, rows, figures = Trainer(recipe, engine, 0, ALONE), make_rows(options.sequences, options.samples), []
    for step in range(options.steps):
        start = time.perf_counter()
        metrics = trainer.step(rows, step, recipe.learn.learning_rate, read_s=0.0)
        finish(options.device)
        figures.append((time.perf_counter() - start, metrics["loss"], metrics["grad_norm"]))
    return figures


def plain_steps(folder: Path, options: argparse.Namespace) -> list[tuple[float, float, float]]:
    config, device = learn_config(options), torch.device(options.device)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    if options.checkpointing != "none":
        recompute_activations(model, options.checkpointing)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=betas, weight_decay=0.0, fused=True
    )
    rows, figures = make_rows(options.sequences, options.samples), []
    num_tokens = sum(rollout.num_loss_tokens for rollout, _ in rows)
    for _ in range(options.steps):
        start, total = time.perf_counter(), 0.0
        for micro in micro_batches(rows, [0.0] * len(rows), options.micro_batch):
            batch = tensors_on(device, micro)
            ids, predictor_N = batch.input_ids_BT, batch.predictor_N
            next_BT = torch.zeros_like(ids)
            next_BT.flatten()[predictor_N] = batch.target_ids_N
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                logits_BTV = model(
                    input_ids=ids, attention_mask=batch.attention_mask_BT, use_cache=False
                ).logits.float()
            logprobs_BT1 = logits_BTV.log_softmax(-1).gather(-1, next_BT[:, :, None])
            del logits_BTV
            student_N = logprobs_BT1.flatten()[predictor_N]
            advantage_N = batch.teacher_logprobs_N - student_N.detach()
            loss = -((student_N - batch.sampling_logprobs_N).exp() * advantage_N).sum() / num_tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finish(options.device)
        figures.append((time.perf_counter() - start, total, norm.item()))
    return figures


VARIANTS = {"plain": plain_steps, "opd-cache": opd_cache_steps, "padded": opd_cache_steps, "liger": opd_cache_steps}


def measure(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process: its steps after the first, and its peak memory."""
    command = [sys.executable, __file__, "--variant", variant, "--folder", str(folder), "--steps", str(options.steps)]
    command += ["--threads", str(options.threads), "--checkpointing", options.checkpointing]
    command += ["--device", options.device, "--sequences", str(options.sequences)]
    command += ["--samples", str(options.samples), "--micro-batch", str(options.micro_batch)]
    command += ["--rows", str(options.rows)] if options.rows else []
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each variant, in turns")
    parser.add_argument("--steps", type=int, default=3, help="steps in each process; the first is not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="selective")
    parser.add_argument("--device", choices=TOLERANCE, default="cpu")
    parser.add_argument("--model", choices=("vocabulary", "large"), default="vocabulary")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="in a step")
    parser.add_argument("--samples", type=int, default=1, help="sequences with the same prompt")
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH, help="tokens")
    parser.add_argument("--rows", type=int, help="of a chunk of opd-cache's head; default: as shipped")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=["plain", "opd-cache"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.variant:
        figures = VARIANTS[options.variant](options.folder, options)
        print(json.dumps({"steps": figures, "peak_bytes": device_peak_bytes(options.device)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = make_model(Path(folder), options)
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in options.only}
        for _ in range(options.repeats):
            for variant, found in runs.items():
                found.append(measure(variant, Path(folder), options))
    report(runs, sizes, options)


def report(runs: dict[str, list[dict[str, Any]]], sizes: dict[str, float], options: argparse.Namespace) -> None:
    """Fails when the variants did not compute the same."""
    first = runs[options.only[0]][0]["steps"]
    for found in runs.values():
        for ours, theirs in zip(found[0]["steps"], first, strict=True):
            relative, nats = TOLERANCE[options.device]
            np.testing.assert_allclose(ours[1:], theirs[1:], rtol=relative, atol=nats)
    median = {
        variant: {
            "step_s": statistics.median(step[0] for run in found for step in run["steps"][1:]),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in found),
        }
        for variant, found in runs.items()
    }
    ours, other = median.get("opd-cache", median[options.only[-1]]), median[options.only[0]]
    ratios = {
        "time_ratio": ours["step_s"] / other["step_s"],
        "memory_ratio": ours["peak_bytes"] / other["peak_bytes"],
    }
    tokens = [
        (len(rollout.prompt_ids), len(rollout.response_ids))
        for rollout, _ in make_rows(options.sequences, options.samples)
    ]
    about = {
        "vocabulary": VOCABULARY, "million_parameters": sizes, "threads": options.threads, "device": device_name(options.device), "repeats": options.repeats, "checkpointing": options.checkpointing,
        "sequences": len(tokens), "samples": options.samples, "micro_batch": options.micro_batch, "prompt_tokens": sum(p for p, _ in tokens), "response_tokens": sum(r for _, r in tokens),
    }  # fmt: skip
    if options.json:
        print(json.dumps({**about, **ratios, "median": median, "runs": runs}))
        return
    print(f"{about}\n\n| learner | s a step | tokens/s | peak GiB |\n|---|---|---|---|")
    for variant, figures in median.items():
        rate = sum(map(sum, tokens)) / figures["step_s"]
        print(f"| {variant} | {figures['step_s']:.3g} | {rate:,.0f} | {figures['peak_bytes'] / 2**30:.2f} |")
    print(f"| ratio | {ratios['time_ratio']:.2f} | | {ratios['memory_ratio']:.2f} |")


if __name__ == "__main__":
    main()
