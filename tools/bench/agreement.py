"""How far log-probs of the hf scorer and sampler on a device are from a plain float32 log-softmax on the CPU.

    python tools/bench/agreement.py [--device cuda] [--model vocabulary] [--json]

Scoring: float32, the same with tf32 products, bfloat16; sampled tokens and the top 8. Sampling: the log-probs that were
stored against the same model that reads the whole sequences (the hf scorer, same dtype), and against float32: this is
what a learner sees as ratios away from 1. Nats a token.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import EOS, SHAPES, device_name, save_random_model
from score import make_requests
from transformers import Qwen2ForCausalLM

from opd_cache.config import RolloutConfig, ScoreConfig, TeacherConfig
from opd_cache.rollout.samplers.hf import HFSampler
from opd_cache.rollout.samples import SampleRequest
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest
from opd_cache.store.plans import SamplingPlan

TOP_K = 8
SHARPNESS = 3.0  # random weights times this: log-probs that differ from uniform


def plain_logprobs(model: Any, rows: list[ScoreRequest]) -> list[torch.Tensor]:
    """[R, V] of each row, one sequence at a time."""
    found = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids])).long()[None]
            found.append(model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1))
    return found


def scored(folder: Path, dtype: str, device: str, rows: list[ScoreRequest], top_k: int = 0) -> list[Any]:
    scorer = HFScorer(TeacherConfig(model=str(folder), dtype=dtype, device=device), ScoreConfig(top_k=top_k))
    found = {scores.key: scores for scores in scorer.score(rows, top_k)}
    return [found[row.key] for row in rows]


def apart(found: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, float]:
    difference = np.concatenate([(a - b).ravel() for a, b in zip(found, expected, strict=True)]).astype(np.float64)
    return {"max": np.abs(difference).max(), "mean": np.abs(difference).mean(), "bias": difference.mean()}


def scoring(folder: Path, options: argparse.Namespace, rows: list[ScoreRequest]) -> dict[str, dict[str, float]]:
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = plain_logprobs(model, rows)
    sampled = [
        logprobs[torch.arange(len(row.response_ids)), torch.from_numpy(row.response_ids).long()].numpy()
        for logprobs, row in zip(plain, rows, strict=True)
    ]
    found = {}
    for name, dtype, tf32 in (
        ("float32", "float32", False),
        ("tf32", "float32", True),
        ("bfloat16", "bfloat16", False),
    ):
        if tf32 and options.device == "cpu":
            continue
        torch.backends.cuda.matmul.allow_tf32 = tf32
        scores = scored(folder, dtype, options.device, rows, TOP_K)
        torch.backends.cuda.matmul.allow_tf32 = False
        found[f"score {name}"] = apart([one.logprobs for one in scores], sampled)
        listed = [
            logprobs.gather(-1, torch.from_numpy(one.topk_ids).long()).numpy()
            for logprobs, one in zip(plain, scores, strict=True)
        ]
        found[f"score {name}, top {TOP_K}"] = apart([one.topk_logprobs for one in scores], listed)
    return found


def sampling(folder: Path, options: argparse.Namespace, rows: list[ScoreRequest]) -> dict[str, dict[str, float]]:
    plan = SamplingPlan(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=options.tokens, stop_token_ids=[EOS])
    found = {}
    for dtype in ("float32", "bfloat16"):
        student = TeacherConfig(model=str(folder), dtype=dtype, device=options.device)
        sampler = HFSampler(student, RolloutConfig(batch_size=len(rows)))
        sampler.load_policy(student)
        samples = {one.key: one for one in sampler.sample([SampleRequest(row.key, row.prompt_ids, row.key) for row in rows], plan)}  # fmt: skip
        whole = [replace(row, response_ids=samples[row.key].response_ids) for row in rows]
        stored = [samples[row.key].sampling_logprobs for row in rows]
        for name, other, device in (
            ("rescored alike", dtype, options.device),
            ("rescored in float32", "float32", options.device),
        ):
            again = [one.logprobs for one in scored(folder, other, device, whole)]
            found[f"sample {dtype}, {name}"] = apart(stored, again)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", choices=SHAPES, default="vocabulary")
    parser.add_argument("--tokens", type=int, default=200, help="of a sampled response")
    parser.add_argument("--prompts", type=int, default=1, help="8 responses of each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_random_model(options.model, folder)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(SHARPNESS)
        model.save_pretrained(folder)
        rows = make_requests(SHAPES[options.model]["vocab_size"], options.prompts)
        found = {**scoring(folder, options, rows), **sampling(folder, options, rows)}
    about = {
        "device": device_name(options.device),
        "torch": torch.__version__,
        "model": options.model,
        "responses": len(rows),
    }
    if options.json:
        print(json.dumps({**about, "apart": found}))
        return
    print(f"{about}\n\n| what | max | mean | mean with sign |\n|---|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row['max']:.1e} | {row['mean']:.1e} | {row['bias']:.0e} |")


if __name__ == "__main__":
    main()
