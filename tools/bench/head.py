"""The LM head and its loss alone on a GPU, forward and backward: opd-cache's chunks, Liger's kernel, all logits at once.

    python tools/bench/head.py [--tokens 8192] [--hidden 2048] [--rows 256 512 1024 2048] [--only ours liger all] [--json]

Weights in float32 and autocast to bfloat16, as a learner has them; the loss of a token is a fixed advantage times its
log-prob. Each way adds to the weight's gradient, as a second micro-batch does. Errors are ‖found − expected‖ ÷ ‖expected‖
against float32 products (no tf32) of the same values rounded to bfloat16. Peak is what torch allocated beyond weight, its
gradient and hidden states; milliseconds are medians between CUDA events.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from models import EOS, VOCABULARY
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from opd_cache.learn import head as head_module
from opd_cache.learn.head import Head
from opd_cache.models import LanguageModel

Way = Callable[[Tensor], tuple[Tensor, Tensor]]  # hidden [N, H] → (loss, log-probs [N])


class FixedAdvantages:
    """The loss as the head asks for it."""

    looks_across = False

    def __init__(self, advantages_N: Tensor) -> None:
        self.advantages_N = advantages_N
        self.logprobs: list[Tensor] = []

    def __call__(self, rows: slice, logprobs_NM: Tensor, entropy_N: Tensor) -> Tensor:
        self.logprobs.append(logprobs_NM.detach()[:, 0])
        return -(self.advantages_N[rows] * logprobs_NM[:, 0]).sum()


class Setting:
    """A head, hidden states, targets and advantages; the same for every way."""

    def __init__(self, tokens: int, hidden: int) -> None:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=EOS,
        )  # fmt: skip
        with torch.device("cuda"):
            self.model = LanguageModel(Qwen2ForCausalLM(config), "random")
            # Sharp enough that the likeliest tokens have a probability worth the name.
            self.hidden_NH = torch.randn(tokens, hidden) * 4
            self.target_N = torch.randint(0, VOCABULARY, (tokens,))
            self.advantages_N = torch.randn(tokens) / tokens
        self.weight_VH = self.model.head.weight
        self.weight_VH.grad = torch.zeros_like(self.weight_VH)

    def ours(self, liger: str) -> Way:
        head = Head(self.model, liger)
        head.adds_to_grad = liger == "never"  # as the engine sets it; Liger's gradient is autograd's

        def way(hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
            losses = FixedAdvantages(self.advantages_N)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = head(hidden_NH, self.target_N[:, None], losses)
            return loss, torch.cat(losses.logprobs)

        return way

    def all_logits(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits_NV = torch.nn.functional.linear(hidden_NH, self.weight_VH).float()
        logprobs_N = logits_NV.log_softmax(-1).gather(-1, self.target_N[:, None]).squeeze(1)
        return -(self.advantages_N * logprobs_N).sum(), logprobs_N.detach()

    def expected(self) -> list[Tensor]:
        """Log-probs, gradient of the hidden states and of the weight."""
        hidden_NH = self.hidden_NH.bfloat16().float().requires_grad_()
        weight_VH = self.weight_VH.detach().bfloat16().float().requires_grad_()
        found = []
        for rows in torch.arange(len(hidden_NH)).split(1024):
            logits_NV = torch.nn.functional.linear(hidden_NH[rows], weight_VH)
            logprobs_N = logits_NV.log_softmax(-1).gather(-1, self.target_N[rows, None]).squeeze(1)
            (-(self.advantages_N[rows] * logprobs_N).sum()).backward()
            found.append(logprobs_N.detach())
        assert hidden_NH.grad is not None
        assert weight_VH.grad is not None
        return [torch.cat(found), hidden_NH.grad, weight_VH.grad]

    def run(self, way: Way) -> list[Tensor]:
        hidden_NH = self.hidden_NH.bfloat16().requires_grad_()
        loss, logprobs_N = way(hidden_NH)
        loss.backward()
        assert hidden_NH.grad is not None
        assert self.weight_VH.grad is not None
        return [logprobs_N, hidden_NH.grad, self.weight_VH.grad]


def measure(setting: Setting, way: Way, expected: list[Tensor], repeats: int) -> dict[str, Any]:
    assert setting.weight_VH.grad is not None
    start = time.perf_counter()
    setting.weight_VH.grad.zero_()
    errors = [
        ((found.float() - right).norm() / right.norm()).item()
        for found, right in zip(setting.run(way), expected, strict=True)
    ]
    first_s = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    before, milliseconds = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        setting.run(way)
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return {
        "ms": statistics.median(milliseconds), "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "first_s": first_s, "errors": dict(zip(("logprobs", "hidden", "weight"), errors, strict=True)),
    }  # fmt: skip


def product_tflops(size: int = 8192) -> float:
    """What the GPU gives for a large product in bfloat16."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        left @ right
    end.record()
    end.synchronize()
    return 10 * 2 * size**3 / (begin.elapsed_time(end) / 1e3) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024, 2048], help="ours: rows of a chunk")
    parser.add_argument("--only", nargs="+", choices=("ours", "liger", "all"), default=["ours", "liger", "all"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    setting, found = Setting(options.tokens, options.hidden), {}
    expected = setting.expected()
    for rows in options.rows if "ours" in options.only else ():
        head_module.ROWS_PER_CHUNK["cuda"] = rows
        found[f"ours, {rows} rows"] = measure(setting, setting.ours("never"), expected, options.repeats)
    if "liger" in options.only:
        found["liger"] = measure(setting, setting.ours("always"), expected, options.repeats)
    if "all" in options.only:
        found["all logits"] = measure(setting, setting.all_logits, expected, options.repeats)
    flops = 6 * options.tokens * options.hidden * VOCABULARY
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": options.tokens,
             "hidden": options.hidden, "vocabulary": VOCABULARY, "product_tflops": product_tflops()}  # fmt: skip
    if options.json:
        print(json.dumps({**about, "ways": found}))
        return
    print(f"{about}\n\n| way | ms | TFLOP/s | peak GiB | log-probs | hidden | weight | first call s |\n|{'---|' * 8}")
    for name, row in found.items():
        errors = " | ".join(f"{value:.1e}" for value in row["errors"].values())
        print(
            f"| {name} | {row['ms']:.1f} | {flops / row['ms'] / 1e9:.0f} | {row['peak_bytes'] / 2**30:.2f} | {errors} | {row['first_s']:.1f} |"
        )


if __name__ == "__main__":
    main()
