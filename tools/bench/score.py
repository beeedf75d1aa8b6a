"""Scored tokens a second, as ratios in one run: this scorer against its engine's pure prefill and against naive scoring.

    .venv-vllm/bin/python tools/bench/score.py [--model small|vocabulary] [--dtype float32] [--only hf naive] [--json]
    python tools/bench/score.py --device cuda --model large --dtype bfloat16 --only hf naive

Variants, each over the same prompts of some 200 and responses of some 300 tokens, 8 samples a prompt, in turns:
  prefill     vLLM reads the sequences, asks for no log-probs and shares nothing: the engine's own speed
  stock       vLLM's flat prompt_logprobs=0 through LLM.generate, shares nothing
  vllm, vllm_shared, vllm_k64     opd-cache's vLLM scorer: without and with shared prompts, and with the top 64
  naive       transformers on shuffled padded batches, log-softmax over the logits of all positions
  hf          opd-cache's transformers scorer
Models are made here, at random: a small vocabulary (4 layers of 512, 258 tokens, the quickstart's) and a real one (8 layers, 151,936).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import SHAPES, device_name, finish, save_random_model
from peaks import device_peak_bytes
from transformers import Qwen2ForCausalLM

from opd_cache.config import ScoreConfig, TeacherConfig, VllmOptions
from opd_cache.score.scorers.hf import HFScorer
from opd_cache.score.scores import ScoreRequest

PROMPTS = {"small": 6, "vocabulary": 2, "large": 32}
SAMPLES = 8
NAIVE_BATCH = 8


def make_requests(vocab_size: int, prompts: int) -> list[ScoreRequest]:
    rng = np.random.default_rng(0)
    rows: list[ScoreRequest] = []
    for group in range(prompts):
        prompt = rng.integers(3, vocab_size, rng.integers(180, 221)).astype(np.int32)
        for _ in range(SAMPLES):
            response = rng.integers(3, vocab_size, rng.integers(200, 401)).astype(np.int32)
            rows.append(ScoreRequest(len(rows), prompt, response, group))
    return rows


class Variants:
    """The ways to score, each a function of the rows; engines stay loaded."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.teacher = TeacherConfig(model=str(folder), dtype=dtype, device=device)

    @cached_property
    def naive_model(self) -> Any:
        model = Qwen2ForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, self.dtype))
        return model.to(self.device).eval()

    @cached_property
    def hf_scorer(self) -> HFScorer:
        return HFScorer(self.teacher, ScoreConfig())

    @cached_property
    def alone(self) -> Any:
        return self._vllm("never")

    @cached_property
    def shared(self) -> Any:
        return self._vllm("auto")

    def _vllm(self, share_prompts: str) -> Any:
        from opd_cache.score.scorers.vllm import VllmScorer

        options = VllmOptions(kv_cache_memory_bytes=1 << 29, block_size=32, max_num_seqs=64)
        scorer = VllmScorer(self.teacher, ScoreConfig(top_k=64, share_prompts=share_prompts, vllm=options))
        scorer.load()
        return scorer

    def prefill(self, rows: list[ScoreRequest]) -> None:
        from opd_cache.vllm_engine import parameters

        plain = parameters(max_tokens=1, temperature=0.0, ignore_eos=True)
        asked = ((row.key, [*row.prompt_ids.tolist(), *row.response_ids.tolist()], plain) for row in rows)
        assert len(list(self.alone.loaded.stream(asked))) == len(rows)

    def stock(self, rows: list[ScoreRequest]) -> None:
        from opd_cache.vllm_engine import parameters

        flat = parameters(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0, flat_logprobs=True)
        prompts = [{"prompt_token_ids": [*row.prompt_ids.tolist(), *row.response_ids.tolist()]} for row in rows]
        assert len(self.alone.loaded.llm.generate(prompts, flat, use_tqdm=False)) == len(rows)

    def vllm(self, rows: list[ScoreRequest]) -> None:
        assert len(list(self.alone.score(rows, 0))) == len(rows)

    def vllm_shared(self, rows: list[ScoreRequest]) -> None:
        assert len(list(self.shared.score(rows, 0))) == len(rows)

    def vllm_k64(self, rows: list[ScoreRequest]) -> None:
        assert len(list(self.alone.score(rows, 64))) == len(rows)

    def hf(self, rows: list[ScoreRequest]) -> None:
        assert len(list(self.hf_scorer.score(rows, 0))) == len(rows)

    @torch.inference_mode()
    def naive(self, rows: list[ScoreRequest]) -> None:
        order = np.random.default_rng(1).permutation(len(rows))
        for start in range(0, len(rows), NAIVE_BATCH):
            batch = [
                torch.from_numpy(np.concatenate([rows[i].prompt_ids, rows[i].response_ids])).long()
                for i in order[start : start + NAIVE_BATCH]
            ]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(self.device)
            ones = [torch.ones_like(row) for row in batch]
            mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True).to(self.device)
            logits = self.naive_model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).cpu()


NAMES = ("prefill", "stock", "vllm", "vllm_shared", "vllm_k64", "hf", "naive")
# Tokens a second of the first ÷ of the second.
RATIOS = (
    *((name, "prefill") for name in NAMES[1:]), ("vllm_shared", "stock"), ("hf", "naive"), ("vllm_shared", "naive"),
)  # fmt: skip


def measure(model: str, dtype: str, device: str, names: Sequence[str], repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        save_random_model(model, Path(name), device=device)
        variants = Variants(Path(name), dtype, device)
        rows = make_requests(SHAPES[model]["vocab_size"], PROMPTS[model])
        seconds: dict[str, list[float]] = {name: [] for name in names}
        peaks = dict.fromkeys(names, 0)
        for turn in range(repeats + 1):
            for variant in names:
                run: Callable[[list[ScoreRequest]], None] = getattr(variants, variant)
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                # The first warms up: on a GPU, whose libraries tune by size, with all.
                run(rows if turn or device == "cuda" else rows[:2])
                finish(device)
                peaks[variant] = max(peaks[variant], device_peak_bytes(device))
                if turn:
                    seconds[variant].append(time.perf_counter() - start)
    median = {variant: statistics.median(values) for variant, values in seconds.items()}
    ratios = {
        f"{one} / {other}": median[other] / median[one] for one, other in RATIOS if one in median and other in median
    }
    return {
        "model": model,
        "dtype": dtype,
        "device": device_name(device),
        "tflops": {name: flops(model, rows, name) / 1e12 / value for name, value in median.items()},
        "peak_bytes": peaks if device == "cuda" else {},
        "tokens": sum(row.num_tokens for row in rows),
        "response_tokens": sum(len(row.response_ids) for row in rows),
        "seconds": median,
        "ratios": ratios,
    }


def flops(model: str, rows: list[ScoreRequest], variant: str) -> float:
    """Of the matrix products that scoring these rows takes, attention's left out: naive every position through body and
    head, hf and shared prompts once a prompt and the head at the response's positions."""
    shape = SHAPES[model]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    body = shape["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    response, every = sum(len(row.response_ids) for row in rows), sum(row.num_tokens for row in rows)
    prompts = sum(len(rows[i].prompt_ids) for i in range(0, len(rows), SAMPLES))
    through_body = response + prompts if variant in ("hf", "vllm_shared") else every
    through_head = response if variant in ("hf", "vllm_shared") else every
    return 2.0 * (body * through_body + shape["vocab_size"] * hidden * through_head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PROMPTS, help="default: small and vocabulary in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="VARIANT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = [
        measure(model, options.dtype, options.device, options.only, options.repeats)
        for model in ([options.model] if options.model else ("small", "vocabulary"))
    ]
    if options.json:
        print(json.dumps(found))
        return
    for row in found:
        print(f"\n{row['model']}, {row['dtype']}: {row['tokens']} tokens, {row['response_tokens']} of them scored")
        print(", ".join(f"{name} {value:.2f} s" for name, value in row["seconds"].items()))
        print(f"TFLOP/s ({row['device']}):", ", ".join(f"{name} {value:.3g}" for name, value in row["tflops"].items()))
        print("peak GiB:", ", ".join(f"{name} {size / 2**30:.2f}" for name, size in row["peak_bytes"].items()))
        print("tokens/s:", ", ".join(f"{name} {value:.2f}" for name, value in row["ratios"].items()))


if __name__ == "__main__":
    main()
