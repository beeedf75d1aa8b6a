"""The columns of every Parquet file, declared once. Arrow schemas, the README's table and the SQL views come from here."""

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column. An optional column is in a file only when the stage's plan asks for it."""

    name: str
    type: pa.DataType
    doc: str
    optional: bool = False
    nullable: bool = False


def list_of(kind: pa.DataType) -> pa.DataType:
    """A list without null entries."""
    return pa.list_(pa.field("element", kind, nullable=False))


PROMPTS = (
    Column("prompt_index", pa.int32(), "Row number; how all other files name the prompt."),
    Column("prompt_id", pa.string(), "The id in the source, else `line-N`."),
    Column("text", pa.string(), "The prompt as the source gave it, templates filled; chat messages as JSON."),
    Column("num_prompt_tokens", pa.int32(), "Length of prompt_ids."),
    Column("prompt_ids", list_of(pa.int32()), "Token ids, chat template applied. What the models see."),
    Column("answer", pa.string(), "Expected answer, where the source has one.", nullable=True),
    Column("fields", pa.string(), "The source record's texts, numbers and booleans as one JSON object."),
)

TEACHER_PROMPTS = (
    Column("prompt_index", pa.int32(), "Row of prompts.parquet."),
    Column("text", pa.string(), "teachers.NAME.prompt.template, filled."),
    Column("num_prompt_tokens", pa.int32(), "Length of prompt_ids."),
    Column("prompt_ids", list_of(pa.int32()), "What the teacher sees in place of the student's prompt_ids."),
)

VOCAB = (
    Column("token_id", pa.int32(), "Id in the student's tokenizer."),
    Column("token", pa.string(), "The tokenizer's own name of the token."),
    Column("text", pa.string(), "The token decoded on its own."),
)

ROLLOUTS = (
    Column("rollout_id", pa.string(), "`scope/prompt_index/sample_index`; scope is the episode."),
    Column("prompt_index", pa.int32(), "Row of prompts.parquet."),
    Column("sample_index", pa.int32(), "0 … n_samples_per_prompt − 1."),
    Column("num_prompt_tokens", pa.int32(), "Length of prompt_ids."),
    Column("num_response_tokens", pa.int32(), "Length of response_ids and of every per-token list."),
    Column("finish_reason", pa.string(), "`stop`: EOS was sampled, and is the last id. `length`: cut, no EOS."),
    Column("policy_version", pa.int32(), "The student that sampled: after that many episodes."),
    Column("ids_hash", pa.uint64(), "xxh3-64 of prompt_ids and response_ids; the score row repeats it."),
    Column("prompt_ids", list_of(pa.int32()), "Token ids of the prompt."),
    Column("response_ids", list_of(pa.int32()), "Token ids of the response."),
    Column("sampling_logprobs", list_of(pa.float32()), "Student's log-prob of each response id as sampled, nats."),
    Column(
        "raw_logprobs",
        list_of(pa.float32()),
        "The same at temperature 1 without top-p/top-k cuts, where that differs.",
        True,
    ),
    Column("reward", pa.float32(), "Task reward of the response; null where it has none.", True, nullable=True),
    Column(
        "student_topk_ids",
        list_of(pa.int32()),
        "Flat: rollout.student_top_k ids a response token, the student's likeliest first.",
        True,
    ),
    Column("student_topk_logprobs", list_of(pa.float32()), "Their log-probs at temperature 1 without cuts.", True),
)

SCORES = (
    Column("rollout_id", pa.string(), "Row i scores rollout row i of the shard with the same name."),
    Column(
        "num_response_tokens",
        pa.int32(),
        "Entries of the lists below: the response tokens within the horizon. 0 where error is set.",
    ),
    Column("ids_hash", pa.uint64(), "Copied from the rollout and compared at the join."),
    Column("error", pa.string(), "Why the row could not be scored; it then trains nothing.", nullable=True),
    Column("teacher_logprobs", list_of(pa.float32()), "Teacher's log-prob of each response id, nats."),
    Column(
        "teacher_rank",
        list_of(pa.int32()),
        "Rank of that id for the teacher; 1 is its likeliest token, 0 where the engine does not say.",
    ),
    Column(
        "topk_ids",
        list_of(pa.int32()),
        "Flat: k ids a response token, the teacher's likeliest first; the student's with score.support=student.",
        True,
    ),
    Column(
        "topk_logprobs", list_of(pa.float32()), "Their log-probs, not renormalised, so the tail mass is known.", True
    ),
)

STEPS = (
    Column("step", pa.int32(), "Optimizer step, counted over the whole run from 1."),
    Column("policy_version", pa.int32(), "The student that the episode's learning started from."),
    Column(
        "staleness",
        pa.float64(),
        "Mean episodes since the batch's rollouts were sampled; 0 without replay and lookahead.",
    ),
    Column("loss", pa.float64(), "Token mean over the global batch, nats, KL penalty included."),
    Column("reverse_kl", pa.float64(), "Mean of student − teacher log-prob of the sampled tokens, nats."),
    Column("reverse_kl_p50", pa.float64(), "Median over tokens."),
    Column("reverse_kl_p99", pa.float64(), "99th percentile over tokens."),
    Column("ratio_mean", pa.float64(), "Mean of live student ÷ sampler probability."),
    Column("ratio_max", pa.float64(), "Its largest value."),
    Column("ess", pa.float64(), "Effective sample size of the ratios ÷ tokens, (Σr)² / (n Σr²): 1 on-policy."),
    Column(
        "clipped_share", pa.float64(), "Share of tokens whose gradient a ratio clip, cap or gate removed or capped."
    ),
    Column("clamped_share", pa.float64(), "Share of tokens whose advantage the clamp changed."),
    Column("entropy", pa.float64(), "Mean entropy of the student's next-token distribution, nats."),
    Column("kl_penalty", pa.float64(), "Mean KL estimate to the reference policy, before kl_coef; 0 when off."),
    Column("reward", pa.float64(), "Mean task reward of the batch's rollouts; null without rewards.", nullable=True),
    Column("response_length", pa.float64(), "Mean response tokens of the batch's rollouts."),
    Column("truncated_share", pa.float64(), "Share of rollouts with finish_reason = length."),
    Column("error_share", pa.float64(), "Share of rollouts that the teacher could not score."),
    Column("dropped_share", pa.float64(), "Share of rollouts that learn.drop_where left out."),
    Column("grad_norm", pa.float64(), "Global gradient norm before clipping."),
    Column("learning_rate", pa.float64(), "As used in this step."),
    Column("rollouts", pa.int32(), "Rollouts in the step."),
    Column("tokens", pa.int64(), "Response tokens in the loss: the normaliser."),
    Column("read_s", pa.float64(), "Seconds waiting for joined rows."),
    Column("compute_s", pa.float64(), "Seconds in forward, backward and optimizer."),
    Column("tokens_per_s", pa.float64(), "tokens ÷ (read_s + compute_s)."),
)

EVALS = (
    Column("subject", pa.string(), "`policy=N` or `teacher=NAME`."),
    Column("policy_version", pa.int32(), "The student that was evaluated; null for a teacher.", nullable=True),
    Column("mode", pa.string(), "`greedy` or `sampled`."),
    Column("prompt_index", pa.int32(), "Row of eval_prompts.parquet."),
    Column("sample_index", pa.int32(), "0 … n_samples_per_prompt − 1."),
    Column(
        "correct",
        pa.bool_(),
        "Extracted answer equals the expected one (plain numbers by value: 1,000 is 1000); null where none is known.",
        nullable=True,
    ),
    Column("response_answer", pa.string(), "What was extracted from the response.", nullable=True),
    Column("num_response_tokens", pa.int32(), "Length of the response."),
    Column("finish_reason", pa.string(), "`stop` or `length`."),
    Column("reverse_kl_sum", pa.float64(), "Sum of student − teacher log-prob; null where not scored.", nullable=True),
)

TABLES = {
    "prompts": PROMPTS,
    "teacher_prompts": TEACHER_PROMPTS,
    "vocab": VOCAB,
    "rollouts": ROLLOUTS,
    "scores": SCORES,
    "steps": STEPS,
    "evals": EVALS,
}


def arrow_schema(columns: tuple[Column, ...], optional: frozenset[str] = frozenset()) -> pa.Schema:
    """Arrow schema with all required columns and the named optional ones."""
    return pa.schema(
        [pa.field(c.name, c.type, nullable=c.nullable) for c in columns if not c.optional or c.name in optional]
    )


def markdown_table(columns: tuple[Column, ...]) -> str:
    """The README's table of one file."""
    rows = ["| column | type | what it holds |", "|---|---|---|"]
    for column in columns:
        kind = f"list<{column.type.value_type}>" if pa.types.is_list(column.type) else str(column.type)
        rows.append(f"| `{column.name}` | {kind}{' (optional)' if column.optional else ''} | {column.doc} |")
    return "\n".join(rows)
