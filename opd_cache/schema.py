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
    Column(
        "sampling_logprobs",
        list_of(pa.float32()),
        "Student's log-prob of each response id as sampled, nats. Absent only of imported rollouts that came without.",
        True,
    ),
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
    Column(
        "loss_mask",
        list_of(pa.bool_()),
        "Of imported rollouts of several turns: which response ids the student sampled. The others are read, and learned from never.",
        True,
    ),
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
    Column(
        "ratio_mean",
        pa.float64(),
        "Mean of live student ÷ sampler probability; null where the sampler's is not known of any token.",
        nullable=True,
    ),
    Column("ratio_max", pa.float64(), "Its largest value.", nullable=True),
    Column(
        "ess",
        pa.float64(),
        "Effective sample size of the ratios ÷ tokens, (Σr)² / (n Σr²): 1 on-policy.",
        nullable=True,
    ),
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

SAMPLES = (
    Column("episode", pa.int32(), "Episode of the rollout."),
    Column("rollout_id", pa.string(), "The rollout."),
    Column("teacher", pa.string(), "Whose scores; a rollout has one row a teacher that scored it."),
    Column("prompt_index", pa.int32(), "Row of prompts."),
    Column("sample_index", pa.int32(), "Which sample of the prompt."),
    Column("policy_version", pa.int32(), "The student that sampled."),
    Column("num_prompt_tokens", pa.int32(), "Length of the prompt."),
    Column("num_response_tokens", pa.int32(), "Length of the response."),
    Column(
        "num_scored_tokens",
        pa.int32(),
        "How many of them are scored, from the first: all but for a horizon or error, and those that a loss_mask leaves out.",
    ),
    Column("finish_reason", pa.string(), "`stop` or `length`."),
    Column("reward", pa.float32(), "Task reward; null where there is none.", nullable=True),
    Column("error", pa.string(), "Why the teacher could not score it.", nullable=True),
    Column(
        "reverse_kl_sum",
        pa.float64(),
        "Sum over the scored tokens of student − teacher log-prob, nats; the student's at temperature 1 without cuts.",
        nullable=True,
    ),
    Column("reverse_kl_mean", pa.float64(), "The same a scored token.", nullable=True),
    Column("teacher_logprob_min", pa.float32(), "The teacher's log-prob of its least likely token.", nullable=True),
    Column("prompt_text", pa.string(), "Text of the prompt. Read only when asked for.", nullable=True),
    Column(
        "response_text",
        pa.string(),
        "The tokens' texts joined, made only when asked for; characters that several tokens share show as �.",
    ),
)

TOKENS = (
    Column("episode", pa.int32(), "Episode of the rollout."),
    Column("rollout_id", pa.string(), "The rollout."),
    Column("teacher", pa.string(), "Whose scores; a token has one row a teacher."),
    Column("prompt_index", pa.int32(), "Row of prompts."),
    Column("sample_index", pa.int32(), "Which sample of the prompt."),
    Column("policy_version", pa.int32(), "The student that sampled."),
    Column("num_response_tokens", pa.int32(), "Length of the response."),
    Column("finish_reason", pa.string(), "`stop`: the last token is an EOS. `length`: cut."),
    Column("position", pa.int32(), "Place in the response; 0 is the first."),
    Column("token_id", pa.int32(), "response_ids at that place."),
    Column("is_sampled", pa.bool_(), "False where a loss_mask says that the student did not sample it."),
    Column("text", pa.string(), "The token decoded on its own.", nullable=True),
    Column("sampling_logprob", pa.float32(), "Student's log-prob as sampled, nats.", nullable=True),
    Column(
        "student_logprob",
        pa.float32(),
        "The same at temperature 1 without cuts (raw_logprobs, where they differ).",
        nullable=True,
    ),
    Column("teacher_logprob", pa.float32(), "Teacher's log-prob; null where it is not scored.", nullable=True),
    Column(
        "advantage",
        pa.float32(),
        "teacher_logprob − student_logprob; null where the student did not sample.",
        nullable=True,
    ),
    Column("teacher_rank", pa.int32(), "1 is the teacher's likeliest token, 0 unknown.", nullable=True),
    Column(
        "teacher_entropy",
        pa.float64(),
        "Entropy of the listed ids and one bucket for all others, nats: a lower bound of the teacher's; null without top-k.",
        nullable=True,
    ),
    Column("is_in_topk", pa.bool_(), "Whether the token is one of the listed ids.", nullable=True),
    Column("topk_ids", list_of(pa.int32()), "The k listed ids of this place, as in scores.", nullable=True),
    Column("topk_logprobs", list_of(pa.float32()), "The teacher's log-probs of them.", nullable=True),
)

EXPORTED = (
    Column("episode", pa.int32(), "Episode of the rollout."),
    Column("rollout_id", pa.string(), "The rollout."),
    Column("teacher", pa.string(), "Whose scores; null where it has none yet. One row a teacher.", nullable=True),
    Column("prompt_id", pa.string(), "The id of the prompt in its source."),
    Column("prompt_index", pa.int32(), "Row of the run's prompts."),
    Column("sample_index", pa.int32(), "Which sample of the prompt."),
    Column("policy_version", pa.int32(), "The student that sampled: after that many episodes."),
    Column("prompt", pa.string(), "Text of the prompt; chat messages as JSON."),
    Column("response", pa.string(), "The tokens' texts joined; characters that several tokens share show as �."),
    Column("answer", pa.string(), "Expected answer, where the source has one.", nullable=True),
    Column("finish_reason", pa.string(), "`stop`: the last token is an EOS. `length`: cut."),
    Column("reward", pa.float32(), "Task reward; null where there is none.", nullable=True),
    Column("error", pa.string(), "Why the teacher could not score it.", nullable=True),
    Column("prompt_ids", list_of(pa.int32()), "Token ids of the prompt, as the student saw it."),
    Column("response_ids", list_of(pa.int32()), "Token ids of the response."),
    Column("sampling_logprobs", list_of(pa.float32()), "Student's log-prob of each response id as sampled, nats."),
    Column("student_logprobs", list_of(pa.float32()), "The same at temperature 1 without cuts."),
    Column("loss_mask", list_of(pa.bool_()), "Which response ids the student sampled; empty where it sampled all."),
    Column("teacher_logprobs", list_of(pa.float32()), "Teacher's log-prob of each scored response id, nats."),
    Column("teacher_rank", list_of(pa.int32()), "1 is the teacher's likeliest token, 0 unknown."),
    Column("top_k", pa.int32(), "Listed ids a scored token; 0 for none."),
    Column("topk_ids", list_of(pa.int32()), "Flat: top_k ids a scored token."),
    Column("topk_logprobs", list_of(pa.float32()), "Their log-probs by the teacher."),
)

SHARDS = (
    Column("stage", pa.string(), "`rollout` or `score`."),
    Column("scope", pa.string(), "The episode, or `SUBJECT-MODE` of an evaluation."),
    Column("episode", pa.int32(), "Null for an evaluation.", nullable=True),
    Column("teacher", pa.string(), "Null for rollouts.", nullable=True),
    Column("first_token", pa.int32(), "First response token that the shard scores."),
    Column("shard", pa.int32(), "Number in its folder."),
    Column("file", pa.string(), "Path inside the run directory."),
    Column("is_sealed", pa.bool_(), "Whether its stage is; without a seal, rows to sha256 are null."),
    Column("rows", pa.int64(), "Responses.", nullable=True),
    Column("tokens", pa.int64(), "Response tokens.", nullable=True),
    Column("bytes", pa.int64(), "Size of the file.", nullable=True),
    Column("sha256", pa.string(), "Digest of the file.", nullable=True),
    Column("plan", pa.string(), "Digest of the plan that it was made by.", nullable=True),
    Column("inputs", pa.string(), "Scores: digest of the rollouts' seal.", nullable=True),
    Column("seconds", pa.float64(), "What making it took; null where no log says so.", nullable=True),
    Column("host", pa.string(), "Where it was made.", nullable=True),
    Column("engine", pa.string(), "By what.", nullable=True),
)

TABLES = {
    "prompts": PROMPTS,
    "teacher_prompts": TEACHER_PROMPTS,
    "vocab": VOCAB,
    "rollouts": ROLLOUTS,
    "scores": SCORES,
    "steps": STEPS,
    "evals": EVALS,
    "samples": SAMPLES,
    "tokens": TOKENS,
    "shards": SHARDS,
}

# What one row of each SQL view is.
VIEWS = {
    "prompts": "a prompt",
    "teacher_prompts": "a prompt as a teacher with prompts of its own sees it; with `teacher`",
    "vocab": "a token of the vocabulary",
    "rollouts": "a response, with its lists; with `episode`",
    "scores": "a response as one teacher scored it, with its lists; with `episode`, `teacher`, `first_token`",
    "samples": "a response and one teacher that scored it, in scalars",
    "tokens": "a response token and one teacher",
    "steps": "an optimizer step; with `episode`",
    "evals": "a graded response of an evaluation",
    "shards": "a shard, those of evaluations included: what its seal and its log say",
}


def arrow_schema(columns: tuple[Column, ...], optional: frozenset[str] = frozenset()) -> pa.Schema:
    """Arrow schema with all required columns and the named optional ones."""
    return pa.schema(
        [pa.field(c.name, c.type, nullable=c.nullable) for c in columns if not c.optional or c.name in optional]
    )


def markdown_views() -> str:
    """The README's table of SQL views."""
    return "\n".join(["| view | one row is |", "|---|---|", *(f"| `{name}` | {row} |" for name, row in VIEWS.items())])


def markdown_table(columns: tuple[Column, ...]) -> str:
    """The README's table of one file."""
    rows = ["| column | type | what it holds |", "|---|---|---|"]
    for column in columns:
        kind = f"list<{column.type.value_type}>" if pa.types.is_list(column.type) else str(column.type)
        rows.append(f"| `{column.name}` | {kind}{' (optional)' if column.optional else ''} | {column.doc} |")
    return "\n".join(rows)
