"""The learn stage and its losses."""

from dataclasses import dataclass
from typing import Any, Optional

from opd_cache import registry
from opd_cache.config.options import option

# OmegaConf reads the annotations: it wants Optional[X], not X | None.
# ruff: noqa: UP045


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
class KeepPolicies:
    """Which policies stay. What is still needed stays besides: by a stage, an evaluation, a teacher or a reference."""

    last: Optional[int] = option(
        None,
        "The newest so many stay, and `opd-cache gc`, learn and eval remove older ones; null: all stay. Of removed ones the record remains; sampling and scoring their episodes again, and a replay from there, need them.",
        min=1,
    )
    every: Optional[int] = option(None, "Versions at multiples of this stay, too; null: none.", min=1)
    best: bool = option(True, "The best evaluated one stays, too: by sampled accuracy, without answers by reverse KL.")


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
    max_tokens_per_micro_batch: Optional[int] = option(
        None,
        "Tokens in one forward and backward, padding included. Bounds memory; changes nothing else. null: 1024 to 8192, so that what they leave for the backward takes at most a third of what weights, gradients and optimizer take on a rank, an eighth of a GPU, or half a GB.",
        min=1,
    )
    packing: str = option(
        "auto",
        "Sequences behind each other without padding. auto: with sdpa attention, each prompt once before all its responses, which the body then computes once for them (in models that remember keys and values alone); with flash attention, whole sequences; always: with any attention that keeps them apart; never: whole sequences, padded.",
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
        "never",
        "Liger's fused LM head, for losses on the sampled token alone (entropies are then rounded to bfloat16). It compiles for seconds, for every size of micro-batch anew: for thousands of steps in one process. auto: in bfloat16 on a Hopper GPU, where it is installed (the `liger` extra); always: or stop.",
        choices=("auto", "never", "always"),
    )
    gradient_checkpointing: str = option(
        "none",
        "Activations computed again in the backward. selective: all but matrix products and attention, half the memory, for a few percent of time on a CPU and some 60 % on a GPU; full: whole blocks, least memory, a third more compute.",
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
    keep_policies: KeepPolicies = option(KeepPolicies, "Old policies.")
    loggers: Optional[list[str]] = option(
        None, "Where metrics go beside steps.parquet, such as [tensorboard, wandb].", table=registry.LOGGERS
    )
    collective_timeout_s: float = option(1800.0, "A rank that waits longer for the others gives up.", above=0)
