"""What every command of a forked child would import, imported once."""

import pandas  # noqa: F401 (pyarrow wants it late, when another user may not be allowed to read it)
import torch
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401

torch.set_num_threads(1)  # a forked child must find no thread pool that it cannot use

from opd_cache import cli, replay  # noqa: E402, F401
from opd_cache.evals import stage as _evals  # noqa: E402, F401
from opd_cache.learn import stage as _learn  # noqa: E402, F401
from opd_cache.learn.engines import torch as _engine  # noqa: E402, F401
from opd_cache.rollout.samplers import hf as _sampler  # noqa: E402, F401
from opd_cache.score.scorers import hf as _scorer  # noqa: E402, F401
from opd_cache.store import query as _query  # noqa: E402, F401
from opd_cache.verify import run as _verify  # noqa: E402, F401
