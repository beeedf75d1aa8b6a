"""Recipes: what a run is asked to do. Dataclasses say which keys exist, their types, defaults and ranges.

How recipe files are read and merged is in recipes.py, how their values are checked in recipe_checks.py. Run-time state
never enters a recipe.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from opd_cache import registry


def option(default: Any, doc: str, **limits: Any) -> Any:
    """A recipe key: its default, one line of documentation, and limits (min, above, max, below, choices, table)."""
    metadata = {"doc": doc, **limits}
    if isinstance(default, type) or callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# OmegaConf reads the annotations: it wants Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class ModelConfig:
    """A model and how it is loaded."""

    model: str = option(MISSING, "Folder or Hugging Face name of a causal language model.")
    revision: Optional[str] = option(None, "Branch, tag or commit of a Hugging Face model.")
    dtype: str = option(
        "auto",
        "Weights and compute. auto: bfloat16 on a GPU that has it, else float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    attn_implementation: Optional[str] = option(None, "sdpa, eager, flash_attention_2; null: transformers chooses.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model. Off unless you know it.")


@dataclass
class TeacherConfig(ModelConfig):
    """A teacher: a model that gives log-probs of the student's tokens."""

    scorer: Optional[str] = option(None, "Overrides score.scorer for this teacher.", table=registry.SCORERS)


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
class RolloutConfig:
    """The student samples."""

    sampler: str = option("hf", "Who samples.", table=registry.SAMPLERS)
    prompts_per_episode: int = option(
        256, "Prompts drawn for each episode, without replacement until all were used.", min=1
    )
    n_samples_per_prompt: int = option(4, "Responses sampled for each prompt.", min=1)
    prompts_per_shard: int = option(64, "Prompts in one shard: the unit of work, of restart and of commit.", min=1)
    temperature: float = option(1.0, "1 samples from the model itself; other values make ratios biased.", above=0)
    top_p: float = option(1.0, "Nucleus sampling; below 1 the ratios are biased.", above=0, max=1)
    top_k: Optional[int] = option(None, "Keep only the k likeliest tokens when sampling; null: all.", min=1)
    max_new_tokens: int = option(512, "A response that reaches it is marked finish_reason=length.", min=1)
    stop_token_ids: Optional[list[int]] = option(None, "Ids that end a response; null: the model's own EOS ids.", min=0)
    batch_size: int = option(128, "Sequences sampled side by side by the hf sampler. Bounds memory.", min=1)


@dataclass
class ScoreConfig:
    """Teachers give log-probs of the sampled tokens."""

    scorer: str = option("hf", "Who scores.", table=registry.SCORERS)
    teacher: Optional[str] = option(None, "Which teacher scores; null: all that the recipe names.")
    top_k: int = option(
        0,
        "Also cache the teacher's k likeliest tokens at every position. 8 bytes a token each, uncompressed.",
        min=0,
        max=1024,
    )
    max_tokens_per_batch: int = option(
        8192, "Padded tokens in one forward pass of the hf scorer. Bounds memory.", min=1
    )
    share_prompts: str = option(
        "auto",
        "Compute a prompt once for all its samples. auto: where it saves a quarter.",
        choices=("auto", "always", "never"),
    )


@dataclass
class LossConfig:
    """What the student minimises, per response token, in nats."""

    name: str = option("reverse_kl_pg", "Which loss.", table=registry.LOSSES)
    clip_ratio_low: float = option(0.2, "reverse_kl_pg: PPO clip, lower side. 1 turns it off.", min=0, max=1)
    clip_ratio_high: float = option(0.2, "reverse_kl_pg: PPO clip, upper side. A large number turns it off.", min=0)
    normalize_advantages: bool = option(
        False, "Whiten advantages over the global batch. Destroys the scale of the KL; off."
    )
    advantage_clamp: Optional[float] = option(
        None, "Clamp |advantage| to this. Removes gradient where the student is most wrong; off.", above=0
    )


@dataclass
class LearnConfig:
    """The student learns from the joined shards."""

    engine: str = option("torch", "Who runs the optimizer.", table=registry.ENGINES)
    teacher: Optional[str] = option(None, "Whose scores; null: the only teacher.")
    loss: LossConfig = option(LossConfig, "The loss.")
    kl_coef: float = option(0.0, "Weight of the KL penalty to the initial student.", min=0)
    kl_estimator: str = option(
        "k2", "Its estimator on sampled tokens: k1, k2 (reverse-KL gradient) or k3.", choices=("k1", "k2", "k3")
    )
    train_batch_size: int = option(128, "Rollouts in one optimizer step, over all ranks.", min=1)
    max_tokens_per_micro_batch: int = option(
        8192, "Padded tokens in one forward and backward. Bounds memory; changes nothing else.", min=1
    )
    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.", min=0)
    lr_schedule: str = option(
        "constant", "Shape after the warm-up, over the whole run.", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = option(0, "Linear warm-up, optimizer steps.", min=0)
    weight_decay: float = option(0.0, "AdamW weight decay on matrices; vectors (norms, biases) get none.", min=0)
    adam_beta1: float = option(0.9, "AdamW.", min=0, below=1)
    adam_beta2: float = option(0.95, "AdamW.", min=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW.", above=0)
    max_grad_norm: Optional[float] = option(1.0, "Clip the global gradient norm; null: no clipping.", above=0)
    precision: str = option(
        "auto",
        "auto: bfloat16 autocast where the hardware has it. Weights stay float32.",
        choices=("auto", "float32", "bfloat16"),
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward: less memory, a third more compute."
    )
    mask_truncated: bool = option(False, "Leave responses that hit max_new_tokens out of the loss.")
    checkpoint_every_steps: Optional[int] = option(
        None, "Also checkpoint inside an episode; null: only at its end.", min=1
    )


@dataclass
class EvalConfig:
    """Exact match on held-out prompts with answers."""

    path: Optional[str] = option(None, "Held-out prompts, read like prompts.path; null: no evaluation.")
    split: str = option("test", "Split of a Hugging Face dataset.")
    limit: Optional[int] = option(None, "Use only the first so many.", min=1)
    every_episodes: int = option(1, "Evaluate after every so many episodes, and after the last.", min=1)
    n_samples_per_prompt: int = option(1, "Sampled responses a prompt; pass@k for k up to this.", min=1)
    greedy: bool = option(True, "Also one greedy response a prompt.")
    teacher: bool = option(True, "Also evaluate the teacher, once.")
    prompts_per_shard: int = option(1024, "Prompts in one shard of an evaluation.", min=1)
    answer_pattern: Optional[str] = option(
        None,
        "Regular expression; the last match's group 1 (or all) in the response is its answer. null: the whole text.",
    )
    reference_pattern: Optional[str] = option(None, "The same for the expected answer.")


@dataclass
class Recipe:
    """A whole run."""

    run_dir: str = option(MISSING, "Everything that the run writes is in here.")
    seed: int = option(0, "Every random choice derives from it.", min=0, max=2**63 - 1)
    num_episodes: int = option(10, "Rounds of rollout, score and learn.", min=1)
    launcher: str = option(
        "inline",
        "run: stages in one process with warm models, or each its own command.",
        choices=("inline", "subprocess"),
    )
    num_workers: int = option(1, "launcher=subprocess: processes that share the shards of a stage.", min=1)
    torch_threads: Optional[int] = option(
        None,
        "CPU threads of torch in each process; null: torch chooses. Fix it to get the same bits on other machines.",
        min=1,
    )
    task: TaskConfig = option(TaskConfig, "A made task.")
    student: ModelConfig = option(ModelConfig, "The student before training.")
    teachers: dict[str, TeacherConfig] = option(dict, "Teachers by name; the name becomes scores/teacher=NAME.")
    prompts: PromptsConfig = option(PromptsConfig, "Training prompts.")
    rollout: RolloutConfig = option(RolloutConfig, "The rollout stage.")
    score: ScoreConfig = option(ScoreConfig, "The score stage.")
    learn: LearnConfig = option(LearnConfig, "The learn stage.")
    eval: EvalConfig = option(EvalConfig, "Evaluation.")

    def learning_teacher(self) -> str:
        """Whose scores the student learns from."""
        return self.learn.teacher or next(iter(self.teachers))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in run.json."""
        return dataclasses.asdict(self)


def field_types(config_type: type) -> dict[str, Any]:
    """The declared type of every key of a section."""
    hints = typing.get_type_hints(config_type)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_type)}


def describe_keys(config_type: type = Recipe, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(key, default, documentation) of every recipe key, in order."""
    rows: list[tuple[str, Any, str]] = []
    hints = field_types(config_type)
    for f in dataclasses.fields(config_type):
        kind, key = hints[f.name], f"{prefix}{f.name}"
        if f.name == "teachers":
            rows += describe_keys(TeacherConfig, f"{key}.NAME.")
        elif dataclasses.is_dataclass(kind):
            rows += describe_keys(typing.cast(type, kind), f"{key}.")
        else:
            default = f.default if f.default is not dataclasses.MISSING else typing.cast(Any, f.default_factory)()
            limits = f.metadata
            names = limits.get("choices") or limits.get("table")
            doc = limits["doc"] + (f" One of: {', '.join(names)}." if names else "")
            rows.append((key, "(required)" if default == MISSING else default, doc))
    return rows
