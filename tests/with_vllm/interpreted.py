"""Scores with vLLM's second model runner, the GPU's, on the CPU: its Triton kernels run in Triton's interpreter.

usage: interpreted.py TEACHER_FOLDER. Prints JSON: whether that runner was used, and every row's log-probs by key,
those of some rows with a support of three ids as well.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1", TORCH_COMPILE_DISABLE="1")

import triton.backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class InterpreterDriver(DriverBase):
    """What vLLM looks for before it believes that there is a Triton; the interpreter itself needs none."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_current_device(self) -> int:
        return 0


InterpreterDriver.__abstractmethods__ = frozenset()
triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=InterpreterDriver)
driver.set_active(InterpreterDriver())

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from conftest import SMALL  # noqa: E402
from test_vllm_scorer import by_key, config, requests, with_support  # noqa: E402

from opd_cache.config import ScoreConfig, VllmOptions  # noqa: E402
from opd_cache.score.scorers.vllm import VllmScorer  # noqa: E402

torch.set_num_threads(1)
scorer = VllmScorer(config(Path(sys.argv[1])), ScoreConfig(vllm=VllmOptions(**SMALL)))
found = by_key(scorer, requests(num_prompts=3), 0)
on_support = by_key(scorer, with_support(requests(num_prompts=1)), 3)
ranks = {int(rank) for scores in found.values() for rank in scores.rank}
print(
    json.dumps(
        {
            "uses_token_ids": scorer.loaded.uses_token_ids,
            "ranks": sorted(ranks),
            "on_support": {
                key: [scores.logprobs.tolist(), scores.topk_logprobs.tolist()] for key, scores in on_support.items()
            },
            "logprobs": {key: scores.logprobs.tolist() for key, scores in found.items()},
        }
    )
)
