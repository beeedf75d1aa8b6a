"""The order of the stages, the rollout and the score stage."""

from dataclasses import dataclass
from typing import Optional

from opd_cache import registry
from opd_cache.config.models import VllmOptions
from opd_cache.config.options import option

# OmegaConf reads the annotations: it wants Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class PipelineConfig:
    """How far the stages of different episodes may overlap."""

    lookahead: int = option(
        0,
        "0: an episode is sampled by the policy that its learning starts from. 1: by the one before, so that it can be sampled while the episode before still learns. reverse_kl_pg and reward_pg weigh by the ratio to the policy that sampled; the other losses have no ratio and take their mean over the older policy's tokens.",
        min=0,
        max=1,
    )


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
    student_top_k: int = option(
        0,
        "Also cache the student's k likeliest tokens at every position, at temperature 1: 8 bytes a token each, uncompressed. score.support=student asks the teacher for them.",
        min=0,
        max=1024,
    )
    reward: Optional[str] = option(
        None, "Task reward of each response, for reward_pg and metrics; null: none.", table=registry.REWARDS
    )
    vllm: VllmOptions = option(VllmOptions, "For rollout.sampler=vllm.")
    python: Optional[str] = option(
        None,
        "Another environment's Python for this stage and for evaluation, such as .venv-vllm/bin/python; null: this one.",
    )


@dataclass
class HttpOptions:
    """score.scorer=http: a teacher behind servers. `teachers.NAME.model` is then only its tokenizer and config.json."""

    urls: Optional[list[str]] = option(
        None,
        "Roots of servers of one teacher, such as http://node7:8000; null: every teacher names its own. They share the requests, and one that is down is gone around.",
    )
    api: str = option(
        "auto",
        "What the servers speak. sglang: POST /generate; vllm_generate: POST /inference/v1/generate; vllm_completions: POST /v1/completions; auto: ask them. Wrong: the stage stops at its first answer.",
        choices=("auto", "sglang", "vllm_generate", "vllm_completions"),
    )
    model: Optional[str] = option(
        None, "Name under which the servers must serve the teacher; null: the only one that they report."
    )
    concurrency: int = option(
        64,
        "Requests in flight over all servers. Too few leave them idle; too many wait there beyond timeout_s.",
        min=1,
        max=4096,
    )
    timeout_s: float = option(
        600.0,
        "Seconds that one request may take, its wait in the server's queue included. Too short: answers that were about to come are asked for again.",
        above=0,
    )
    max_retries: int = option(
        8,
        "Further tries after a lost connection, a timeout, status 429 or 5xx; then exit status 75. 8 last three minutes at the default delay; 0 gives up at the first hiccup.",
        min=0,
    )
    retry_base_delay_s: float = option(
        1.0,
        "Seconds before the first retry, doubled each time up to 60, and half to one and a half of that at random. Near 0 floods a server that is starting.",
        min=0,
    )
    api_key_env: Optional[str] = option(
        None,
        "Environment variable that holds the API key (its name, such as TEACHER_API_KEY, never the key); null: none.",
    )


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
    support: str = option(
        "teacher",
        "Whose k likeliest tokens. student: the first top_k of rollout.student_top_k, so that a top-k reverse KL runs over what the student would say.",
        choices=("teacher", "student"),
    )
    horizon: Optional[int] = option(
        None,
        "Score only the first so many tokens of a response; the others carry no loss. null: all. A larger one later scores only the rest.",
        min=1,
    )
    max_tokens_per_batch: int = option(
        8192, "Tokens in one forward pass of the hf scorer, padding included. Bounds memory.", min=1
    )
    share_prompts: str = option(
        "auto",
        "Compute a prompt once for all its samples. auto: where it saves a tenth of all tokens.",
        choices=("auto", "always", "never"),
    )
    max_gap: Optional[float] = option(
        8.0,
        "Stop when a shard's mean student − teacher log-prob is beyond this many nats: another tokenizer or chat template, or a shift. null: do not look.",
        above=0,
    )
    vllm: VllmOptions = option(VllmOptions, "For score.scorer=vllm.")
    http: HttpOptions = option(HttpOptions, "For score.scorer=http.")
    python: Optional[str] = option(None, "Another environment's Python for this stage; null: this one.")
