"""Where prompts come from, and what evaluations measure."""

from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING

from opd_cache import registry
from opd_cache.config.options import option

# OmegaConf reads the annotations: it wants Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class TaskConfig:
    """A task that opd-cache makes itself: small real models and prompts with verifiable answers."""

    name: Optional[str] = option(None, "Which task to make; null: the recipe brings its own.", table=registry.TASKS)
    dir: str = option("quickstart", "Where its models and prompts are written, once.")
    seed: int = option(0, "Seed of the problems and of the models.", min=0)


@dataclass
class PromptsConfig:
    """Where prompts come from and how they become token ids."""

    path: str = option(MISSING, ".jsonl, .json, .parquet, a saved dataset folder, or a Hugging Face dataset name.")
    subset: Optional[str] = option(None, "Configuration name of a Hugging Face dataset.")
    split: str = option("train", "Split of a Hugging Face dataset.")
    prompt_key: str = option("prompt", "Field with the prompt's text.")
    messages_key: str = option("messages", "Field with chat messages, used where prompt_key is absent.")
    answer_key: str = option("answer", "Field with the expected answer, where there is one.")
    id_key: str = option("id", "Field with an id of the prompt; without it the line number serves.")
    template: Optional[str] = option(None, "Text with {field} places, filled from the line: the prompt's text.")
    system_prompt: Optional[str] = option(None, "A system message put before the prompt (chat template only).")
    apply_chat_template: bool = option(False, "Wrap the prompt in the student tokenizer's chat template.")
    chat_template_kwargs: dict[str, Any] = option(dict, "Passed to the chat template, such as enable_thinking.")
    max_prompt_tokens: Optional[int] = option(None, "Longer prompts are bad prompts; null: no limit.", min=1)
    on_bad_prompt: str = option(
        "refuse",
        "refuse: stop at the first, naming its line; skip: leave it out and count it.",
        choices=("refuse", "skip"),
    )
    limit: Optional[int] = option(None, "Take only the first so many prompts.", min=1)


@dataclass
class EvalConfig:
    """Exact match on held-out prompts with answers."""

    path: Optional[str] = option(None, "Held-out prompts, read like prompts.path; null: no evaluation.")
    split: str = option("test", "Split of a Hugging Face dataset.")
    limit: Optional[int] = option(None, "Use only the first so many.", min=1)
    every_episodes: int = option(1, "Evaluate after every so many episodes, and after the last.", min=1)
    n_samples_per_prompt: int = option(1, "Sampled responses a prompt; pass@k for k up to this.", min=1)
    greedy: bool = option(True, "Also one greedy response a prompt.")
    teacher: bool = option(True, "Also evaluate the teacher, once. It samples here, so it needs its weights here.")
    prompts_per_shard: int = option(1024, "Prompts in one shard of an evaluation.", min=1)
    answer_pattern: Optional[str] = option(
        None,
        "Regular expression; the last match's group 1 (or all) in the response is its answer. null: the whole text.",
    )
    reference_pattern: Optional[str] = option(None, "The same for the expected answer.")
