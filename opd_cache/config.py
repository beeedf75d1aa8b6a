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
class TeacherPrompt:
    """A prompt of the teacher's own, such as one with a worked solution. The response ids stay the student's."""

    template: Optional[str] = option(
        None,
        "Text with {field} places, filled from the prompt's fields; {prompt} and {answer} are the student's prompt and the expected answer. null: the teacher sees the student's token ids.",
    )
    system_prompt: Optional[str] = option(None, "A system message put before it (chat template only).")
    apply_chat_template: bool = option(False, "Wrap it in the teacher tokenizer's chat template.")
    chat_template_kwargs: dict[str, Any] = option(dict, "Passed to the chat template, such as enable_thinking.")


@dataclass
class TeacherConfig(ModelConfig):
    """A teacher: a model that gives log-probs of the student's tokens."""

    model: str = option(
        MISSING,
        "Folder or Hugging Face name of a causal language model; or a policy of this run, loaded like the student: policy:current is the one that sampled the episode, policy:0 the initial student.",
    )

    scorer: Optional[str] = option(None, "Overrides score.scorer for this teacher.", table=registry.SCORERS)
    vllm: dict[str, Any] = option(dict, "Overrides keys of score.vllm for this teacher.")
    urls: Optional[list[str]] = option(None, "scorer=http: this teacher's own servers, instead of score.http.urls.")
    prompt: TeacherPrompt = option(TeacherPrompt, "What it sees in place of the student's prompt.")

    @property
    def policy(self) -> str | None:
        """`current` or a version, where the teacher is a policy of the run; else None."""
        kind, _, version = self.model.partition(":")
        return version if kind == "policy" else None


@dataclass
class VllmOptions:
    """vLLM's engine arguments. null: what vLLM chooses."""

    tensor_parallel_size: int = option(1, "GPUs that hold the model together.", min=1)
    gpu_memory_utilization: Optional[float] = option(
        None, "Share of the GPU's memory that vLLM takes. Lower it where something else is on the GPU.", above=0, max=1
    )
    kv_cache_memory_bytes: Optional[int] = option(
        None, "Memory for keys and values instead. Without a GPU, set it: some 10 MB serve a tiny model.", min=1
    )
    max_model_len: Optional[int] = option(
        None, "Longest sequence in tokens; null: the model's. A smaller one needs less memory.", min=2
    )
    max_num_batched_tokens: Optional[int] = option(
        None,
        "Tokens in one forward. null: 2,048 for scoring, since prompt log-probs take 6 bytes × vocabulary a token outside what vLLM accounts for.",
        min=1,
    )
    max_num_seqs: Optional[int] = option(None, "Sequences in one forward.", min=1)
    block_size: Optional[int] = option(
        None, "Tokens in one block of the cache: prompts are shared in whole blocks.", min=1
    )
    quantization: Optional[str] = option(None, "Such as fp8, awq; null: as the model's config says.")
    seed: int = option(0, "Of the engine. Samples have seeds of their own.", min=0)
    enforce_eager: bool = option(False, "No compilation and no CUDA graphs: starts sooner, runs slower.")
    engine_args: dict[str, Any] = option(dict, "Any other of vLLM's engine arguments, by its name there.")


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
        8192, "Padded tokens in one forward pass of the hf scorer. Bounds memory.", min=1
    )
    share_prompts: str = option(
        "auto",
        "Compute a prompt once for all its samples. auto: where it saves a quarter.",
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


@dataclass
class LossConfig:
    """What the student minimises, per response token, in nats."""

    name: str = option("reverse_kl_pg", "Which loss.", table=registry.LOSSES)
    terms: dict[str, float] = option(
        dict, "mixed: its losses and their weights, such as {reverse_kl_topk: 1.0, reward_pg: 0.5}."
    )
    coef: float = option(1.0, "reverse_kl_pg: multiplies its advantages.", min=0)
    importance: str = option(
        "ppo_clip",
        "reverse_kl_pg, reward_pg: how the ratio (probability under the student / under the sampler) weighs a token. ppo_clip: in full, until a step has gone beyond the clip; truncated: up to importance_cap; gate: in full between gate_low and gate_high, else the token does not count.",
        choices=("ppo_clip", "truncated", "gate"),
    )
    clip_ratio_low: float = option(0.2, "importance=ppo_clip: clip below 1 − this. 1 turns it off.", min=0, max=1)
    clip_ratio_high: float = option(
        0.2, "importance=ppo_clip: clip above 1 + this. A large number turns it off.", min=0
    )
    importance_cap: float = option(2.0, "importance=truncated: the largest weight.", min=1)
    gate_low: float = option(0.2, "importance=gate: tokens with a smaller ratio do not count.", min=0, max=1)
    gate_high: float = option(5.0, "importance=gate: tokens with a larger ratio do not count.", min=1)
    discount: float = option(
        0.0,
        "reverse_kl_pg: a token answers for the later tokens of its response too, discount^distance. 0: for itself; 1: for all, the KL of whole responses, with the noise of whole responses.",
        min=0,
        max=1,
    )
    normalize_advantages: bool = option(
        False, "reverse_kl_pg: whiten advantages over the global batch. Destroys the scale of the KL; off."
    )
    advantage_clamp: Optional[float] = option(
        None,
        "reverse_kl_pg: clamp |advantage| to this. Weakens gradient where the student is most wrong; null: off.",
        above=0,
    )
    topk_mass: str = option(
        "tail_bucket",
        "*_topk, entropy_aware: the mass outside the teacher's top k and the sampled token. tail_bucket: one more entry; renormalised: none, the student may hide mass there; unnormalised: left out of the sum.",
        choices=("tail_bucket", "renormalised", "unnormalised"),
    )
    teacher_only_ids: str = option(
        "refuse",
        "*_topk, entropy_aware: ids of the teacher's top k that the student has no embedding for. refuse: stop; tail: their mass joins the tail (in the other forms of topk_mass it is left out).",
        choices=("refuse", "tail"),
    )
    jsd_beta: float = option(
        0.5,
        "jsd_topk: the teacher's share in M, JSD = β·KL(T‖M) + (1−β)·KL(S‖M). 0 is KL(T‖S), 1 is KL(S‖T).",
        min=0,
        max=1,
    )
    skew_alpha: float = option(
        0.1,
        "skew_kl_topk, skew_reverse_kl_topk: share of the left side mixed into the right: KL(T‖α·T + (1−α)·S), KL(S‖α·S + (1−α)·T).",
        min=0,
        below=1,
    )
    entropy_threshold: float = option(
        0.8, "entropy_aware: adds forward KL where the teacher's entropy is above this, in nats.", min=0
    )
    entropy_forward_coef: float = option(1.0, "entropy_aware: weight of that forward KL.", min=0)


@dataclass
class LoraOptions:
    """Training low-rank adapters instead of all weights. Needs the `lora` extra."""

    rank: Optional[int] = option(None, "Rank of the adapters; null: train all weights.", min=1)
    alpha: float = option(32.0, "The adapters count alpha / rank.", above=0)
    target_modules: Optional[list[str]] = option(
        None, "Names of the linear layers that get one, such as q_proj; null: all but the LM head."
    )
    merge: bool = option(
        True, "true: a policy is a plain model, adapters merged. false: only the adapters, loaded onto the student."
    )
    seed: int = option(0, "Seed of the adapters' first values.", min=0)


@dataclass
class DeepSpeedOptions:
    """learn.engine=deepspeed. Needs the `deepspeed` extra."""

    zero_stage: int = option(
        2, "What the ranks share out: 1 optimizer states, 2 gradients too, 3 weights too; 0 nothing.", min=0, max=3
    )
    offload_optimizer: bool = option(False, "Keep optimizer states, and step, in the CPU's memory (stages 1 to 3).")
    zero_options: dict[str, Any] = option(dict, "More keys of DeepSpeed's own zero_optimization section.")


@dataclass
class LearnConfig:
    """The student learns from the joined shards."""

    engine: str = option("torch", "Who runs the optimizer.", table=registry.ENGINES)
    python: Optional[str] = option(None, "Another environment's Python for this stage; null: this one.")
    num_ranks: int = option(
        1, "Processes that learn together on this machine. torchrun and srun say it themselves.", min=1
    )
    deepspeed: DeepSpeedOptions = option(DeepSpeedOptions, "For learn.engine=deepspeed.")
    lora: LoraOptions = option(LoraOptions, "Low-rank adapters.")
    teacher: Optional[str] = option(None, "Whose scores; null: the only teacher.")
    teachers: Optional[dict[str, float]] = option(
        None, "Instead of one: a mixture of several by weight, such as {a: 2, b: 1}; weights are normalised.", above=0
    )
    mixing: str = option(
        "probability",
        "teachers: what is mixed, token by token. probability: log of the weighted mean of the probabilities; log: weighted mean of the log-probs, a product of experts that is not normalised.",
        choices=("probability", "log"),
    )
    routes: Optional[dict[str, str]] = option(
        None,
        "Instead of one: each prompt's own teacher by the value of route_by, such as {math: a, '*': b}; * is any other.",
    )
    route_by: Optional[str] = option(None, "routes: the field of the prompt's source record that is looked up.")
    drop_where: Optional[str] = option(
        None,
        "Rows without loss: an SQL condition over the columns of r (rollouts), s (scores of the teachers learned from; any of them) and p (prompts), such as list_avg(s.teacher_logprobs) < -4.",
    )
    loss: LossConfig = option(LossConfig, "The loss.")
    kl_coef: float = option(0.0, "Weight of the KL penalty to the reference policy.", min=0)
    reference: Optional[str] = option(None, "The reference policy, folder or name; null: the initial student.")
    kl_estimator: str = option(
        "k2", "Its estimator on sampled tokens: k1, k2 (reverse-KL gradient) or k3.", choices=("k1", "k2", "k3")
    )
    train_batch_size: int = option(128, "Rollouts in one optimizer step, over all ranks.", min=1)
    epochs_per_episode: int = option(
        1, "Passes over an episode's rollouts. From the second on they are off-policy.", min=1
    )
    updates_per_episode: Optional[int] = option(
        None, "Optimizer steps an episode, all epochs together; sets the batch size instead of train_batch_size.", min=1
    )
    replay_episodes: int = option(
        0, "Learn also from so many episodes before this one: how stale a rollout may be.", min=0
    )
    max_tokens_per_micro_batch: int = option(
        8192, "Tokens in one forward and backward, padding included. Bounds memory; changes nothing else.", min=1
    )
    packing: str = option(
        "auto",
        "Sequences behind each other without padding. auto: with flash attention, which skips what they must not see; always: with any attention that keeps them apart.",
        choices=("auto", "always", "never"),
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
    liger: str = option(
        "auto",
        "Liger's fused LM head, for losses on the sampled token alone (entropies are then rounded to bfloat16). auto: in bfloat16 on a Hopper GPU, where it is installed (the `liger` extra); always: or stop.",
        choices=("auto", "never", "always"),
    )
    gradient_checkpointing: str = option(
        "none",
        "Activations computed again in the backward. selective: all but matrix products and attention, half the memory for a few percent of time; full: whole blocks, least memory, a third more compute.",
        choices=("none", "selective", "full"),
    )
    mask_truncated: bool = option(False, "Leave responses that hit max_new_tokens out of the loss.")
    checkpoint_every_steps: Optional[int] = option(
        None, "Also checkpoint inside an episode; null: only at its end, and when stopped by a signal.", min=1
    )
    keep_last: int = option(1, "Checkpoints inside an episode that are kept until it ends.", min=1)
    keep_every: Optional[int] = option(
        None, "Checkpoints at multiples of so many steps are kept for good; null: none.", min=1
    )
    loggers: Optional[list[str]] = option(
        None, "Where metrics go beside steps.parquet, such as [tensorboard, wandb].", table=registry.LOGGERS
    )
    collective_timeout_s: float = option(1800.0, "A rank that waits longer for the others gives up.", above=0)


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

    def learning_teachers(self) -> list[str]:
        """Whose scores the student learns from."""
        learn = self.learn
        if learn.routes:
            return list(dict.fromkeys(learn.routes.values()))
        return list(learn.teachers or [learn.teacher or next(iter(self.teachers))])

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
        if key == "teachers":
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
