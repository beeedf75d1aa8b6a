"""The parts that a recipe can swap, by name. A recipe may also give `my_package.module:Name` for a part of its own.

Literal tables, so that the names can be listed and checked without importing torch or vllm.
"""

import importlib
import sys
from typing import Any

from opd_cache.errors import ConfigError
from opd_cache.garbage import no_garbage_collection

SAMPLERS = {
    "hf": "opd_cache.rollout.samplers.hf:HFSampler",
    "vllm": "opd_cache.rollout.samplers.vllm:VllmSampler",
}
SCORERS = {
    "hf": "opd_cache.score.scorers.hf:HFScorer",
    "vllm": "opd_cache.score.scorers.vllm:VllmScorer",
    "http": "opd_cache.score.scorers.http:HTTPScorer",
}
LOSSES = {
    "reverse_kl_pg": "opd_cache.learn.losses:REVERSE_KL_PG",
    "reverse_kl_topk": "opd_cache.learn.losses:REVERSE_KL_TOPK",
    "forward_kl_topk": "opd_cache.learn.losses:FORWARD_KL_TOPK",
    "jsd_topk": "opd_cache.learn.losses:JSD_TOPK",
    "skew_kl_topk": "opd_cache.learn.losses:SKEW_KL_TOPK",
    "skew_reverse_kl_topk": "opd_cache.learn.losses:SKEW_REVERSE_KL_TOPK",
    "entropy_aware": "opd_cache.learn.losses:ENTROPY_AWARE",
    "reward_pg": "opd_cache.learn.losses:REWARD_PG",
    "mixed": "opd_cache.learn.losses:MIXED",
}
ENGINES = {
    "torch": "opd_cache.learn.engines.torch:TorchEngine",
    "deepspeed": "opd_cache.learn.engines.deepspeed:DeepSpeedEngine",
}
LOGGERS = {
    "tensorboard": "opd_cache.learn.loggers:TensorBoardLogger",
    "wandb": "opd_cache.learn.loggers:WandbLogger",
}
REWARDS = {"exact_match": "opd_cache.grade:exact_match"}
TASKS = {"sort_letters": "opd_cache.quickstart.sort_letters:make_task"}


def check_name(table: dict[str, str], name: str, key: str) -> None:
    """Refuse a name that is neither in the table nor of the form `module:Name`."""
    if name not in table and ":" not in name:
        known = ", ".join(sorted(table))
        raise ConfigError(f"{key} = {name!r} is unknown. Known: {known}, or your own as 'module:Name'.")


def load(table: dict[str, str], name: str, key: str) -> Any:
    """The object behind a name; ConfigError when its module or attribute does not exist."""
    check_name(table, name, key)
    module_name, _, attribute = table.get(name, name).partition(":")
    if name not in table and "" not in sys.path:
        sys.path.insert(0, "")  # modules in the working directory, as `python -m` finds them
    try:
        with no_garbage_collection():
            return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key} = {name!r} cannot be loaded: {error}.") from error
