"""Scores random rollouts with vLLM, for others to see what that takes of memory.

usage: scoring.py TEACHER_FOLDER ROLLOUTS
"""

import os
import sys
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"

import numpy as np
import torch
from conftest import SMALL
from test_vllm_scorer import config

from opd_cache.config import ScoreConfig, VllmOptions
from opd_cache.score.scorers.vllm import VllmScorer
from opd_cache.score.scores import ScoreRequest

WINDOW, TOP_K = 500, 16

torch.set_num_threads(1)
# Keys and values are in RAM from their first use on: a cache so small is used whole by the first window.
options = VllmOptions(**{**SMALL, "kv_cache_memory_bytes": 8 << 20})
scorer = VllmScorer(config(Path(sys.argv[1])), ScoreConfig(top_k=TOP_K, vllm=options))
rng = np.random.default_rng(0)
for start in range(0, int(sys.argv[2]), WINDOW):
    rows = []
    for key in range(start, start + WINDOW):
        prompt_ids, response_ids = (rng.integers(3, 258, size).astype(np.int32) for size in (10, 40))
        rows.append(ScoreRequest(key, prompt_ids, response_ids, key))
    for scores in scorer.score(rows, TOP_K):
        assert scores.topk_logprobs.shape == (40, TOP_K), scores.error
