"""What a run will take, before it is begun: bytes on disk and in memory, from the recipe and the models' own files.

Nothing here looks at the machine or refuses anything; capacity.py does.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from opd_cache.config import LearnConfig, Recipe
from opd_cache.fingerprint import num_parameters, text_config
from opd_cache.run_dir import COMPLETE, SEAL, RunDir
from opd_cache.score.scores import LOGITS_BYTES
from opd_cache.store.publish import read_json

# Bytes on disk, measured (see encoding in store/shards.py): of a response token its id with one log-prob, a teacher's
# log-prob with its rank, and an entry of a top k; of a row what it costs beside its tokens, at responses of 16 tokens.
ROLLOUT_TOKEN, SCORE_TOKEN, TOPK_ENTRY, ROW = 4.4, 3.0, 3.3, 60
LEAST_ROW = 8  # its hash of ids, which does not compress
ADAM_BYTES, WEIGHT_BYTES = 8, 4  # of a parameter, in float32
# Float32 values a token, layer and hidden unit that the body keeps for the backward, measured at 8 layers of 768.
KEPT_ACTIVATIONS = {"none": 26, "selective": 13, "full": 2}
# Where the recipe leaves a micro-batch open: its tokens, and the memory that they may take however small the model is.
LEAST_TOKENS, MOST_TOKENS, LEAST_ACTIVATIONS = 1024, 8192, 1 << 29
# Rows of logits that the head's loop takes at once: of a chunk it holds one matrix in float32, two in bfloat16. The weight and
# its gradient are read for every chunk, so that much fewer rows are bound by memory; much more only fill it. A GPU multiplies
# faster than it reads: there 1,024 rows take 54 ms where 256 take 94 and 2,048 take 47.
ROWS_PER_CHUNK = {"cpu": 512, "cuda": 1024}
# Values of it that softmax and sums take at once: what a CPU's cache holds; a GPU takes a chunk whole.
VALUES_PER_PART = {"cpu": 1 << 22, "cuda": 1 << 30}
# Loading so many again for every stage takes part of a second; more are worth their memory to the stage that runs.
KEPT_PARAMETERS = 50e6


@dataclass(frozen=True)
class Part:
    """One kind of files of a run that are still to be written."""

    name: str
    least: int  # bytes that cannot be avoided
    expected: int
    how: str  # what they follow from


@dataclass(frozen=True)
class ModelSize:
    """A model by its files."""

    parameters: int
    layers: int
    hidden: int
    vocab: int
    kv_width: int  # values a token and layer of its keys, and of its values


def model_size(folder: Path) -> ModelSize | None:
    """None where its files do not say."""
    config, parameters = text_config(folder), num_parameters(folder)
    wanted = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    if parameters is None or not all(isinstance(config.get(key), int) for key in wanted):
        return None
    layers, hidden, vocab, heads = (int(config[key]) for key in wanted)
    head = config.get("head_dim") or hidden // heads
    return ModelSize(parameters, layers, hidden, vocab, head * (config.get("num_key_value_heads") or heads))


def keeps_models(recipe: Recipe) -> bool:
    """Whether a process that runs several stages keeps all their models in memory."""
    if recipe.keep_models is not None:
        return recipe.keep_models
    teachers = [one for one in recipe.teachers.values() if (one.scorer or recipe.score.scorer) != "http"]
    folders = {Path(config.model) for config in (recipe.student, *teachers) if not config.model.startswith("policy:")}
    # Of a model that is still on the hub nothing is known.
    counts = [num_parameters(folder) or math.inf for folder in folders]
    return sum(counts) < KEPT_PARAMETERS


def disk_parts(recipe: Recipe, run: RunDir, student: ModelSize | None) -> list[Part]:
    """What the recipe's episodes still write. Evaluations and logs are small beside it and not counted."""
    todo = [episode for episode in range(recipe.num_episodes) if not (run.policy_after(episode) / COMPLETE).exists()]
    rows = len(todo) * recipe.rollout.prompts_per_episode * recipe.rollout.n_samples_per_prompt
    tokens, basis = tokens_a_response(recipe, run)
    all_tokens, teachers = round(rows * tokens), recipe.teachers_to_score()
    per_rollout_token = ROLLOUT_TOKEN + TOPK_ENTRY * recipe.rollout.student_top_k
    per_score_token = SCORE_TOKEN + TOPK_ENTRY * recipe.score.top_k
    scored = rows * min(tokens, recipe.score.horizon or tokens)
    parts = [
        Part(
            "rollouts",
            rows * LEAST_ROW,
            round(rows * ROW + all_tokens * per_rollout_token),
            f"{rows:,} responses of {tokens:,.0f} tokens ({basis}), {per_rollout_token:.1f} bytes a token",
        ),
        Part(
            "scores",
            len(teachers) * rows * LEAST_ROW,
            round(len(teachers) * (rows * ROW + scored * per_score_token)),
            f"{len(teachers)} teachers, {per_score_token:.1f} bytes a token with top_k = {recipe.score.top_k}",
        ),
    ]
    return parts if student is None else [*parts, _policies(recipe, len(todo), student)]


def tokens_a_response(recipe: Recipe, run: RunDir) -> tuple[float, str]:
    """How long a response is expected to be, and why."""
    seals = [run.episode(episode).rollouts / SEAL for episode in run.episodes()]
    found = [read_json(path) for path in seals if path.exists()]
    if rows := sum(seal["rows"] for seal in found):
        return sum(seal["tokens"] for seal in found) / rows, "the mean of this run so far"
    return recipe.rollout.max_new_tokens / 2, "half of rollout.max_new_tokens"


def _policies(recipe: Recipe, episodes: int, student: ModelSize) -> Part:
    """Policies with their optimizers, as many as learn.keep_policies leaves, and checkpoints inside episodes."""
    learn, size = recipe.learn, policy_bytes(recipe.learn, student)
    rule = learn.keep_policies
    kept = episodes
    if rule.last is not None:
        kept = min(episodes, rule.last + (episodes // rule.every if rule.every else 0))
    inside = learn.keep_last if learn.checkpoint_every_steps else 0
    if learn.keep_every:
        inside += episodes * (_steps(recipe) // learn.keep_every)
    extra = 1 if rule.last is not None and rule.best and kept < episodes else 0
    how = f"{kept + extra} of {size / 1e6:,.1f} MB: float32 weights and AdamW's two moments of {student.parameters:,} parameters"
    return Part("policies", kept * size, (kept + extra + inside) * size, how)


def policy_bytes(learn: LearnConfig, student: ModelSize) -> int:
    """Of one policy or checkpoint. Adapters are small, and so is their optimizer."""
    if learn.lora.rank is None:
        return student.parameters * (WEIGHT_BYTES + ADAM_BYTES)
    return student.parameters * 2 if learn.lora.merge else 0


def _steps(recipe: Recipe) -> int:
    learn, rows = recipe.learn, recipe.rollout.prompts_per_episode * recipe.rollout.n_samples_per_prompt
    return learn.updates_per_episode or math.ceil(rows * learn.epochs_per_episode / learn.train_batch_size)


def micro_batch_tokens(learn: LearnConfig, student: ModelSize | None, ranks: int = 1, gpu_bytes: int = 0) -> int:
    """The recipe's tokens of a micro-batch; where it leaves them open, as many as learn.max_tokens_per_micro_batch says.

    gpu_bytes: all memory of the GPU, 0 without one.
    """
    if learn.max_tokens_per_micro_batch is not None:
        return learn.max_tokens_per_micro_batch
    if student is None:
        return LEAST_TOKENS
    budget = max(_training_bytes(learn, student) // ranks // 3, gpu_bytes // 8, LEAST_ACTIVATIONS)
    tokens = budget // _activation_bytes(learn, student)
    return max(LEAST_TOKENS, min(MOST_TOKENS, tokens))


def learning_bytes(learn: LearnConfig, student: ModelSize, gpu_bytes: int) -> int:
    """Memory of one micro-batch's forward and backward, with weights, gradients and AdamW."""
    tokens = micro_batch_tokens(learn, student, gpu_bytes=gpu_bytes)
    kept = tokens * _activation_bytes(learn, student)
    device = "cuda" if gpu_bytes else "cpu"
    chunk = ROWS_PER_CHUNK[device] * student.vocab
    return _training_bytes(learn, student) + kept + 4 * (chunk + min(chunk, 2 * VALUES_PER_PART[device]))


def _training_bytes(learn: LearnConfig, student: ModelSize) -> int:
    """Weights and, of what is trained, gradients and AdamW's two moments; an adapter's are small."""
    return student.parameters * (2 * WEIGHT_BYTES + ADAM_BYTES if learn.lora.rank is None else WEIGHT_BYTES)


def _activation_bytes(learn: LearnConfig, student: ModelSize) -> int:
    """Of a token."""
    return 4 * student.layers * student.hidden * KEPT_ACTIVATIONS[learn.gradient_checkpointing]


def sampling_bytes(recipe: Recipe, student: ModelSize, longest_prompt: int, bytes_a_value: int) -> int:
    """Memory of the hf sampler: weights, and the keys and values of a batch at full length."""
    values = 2 * student.layers * student.kv_width * (longest_prompt + recipe.rollout.max_new_tokens)
    return bytes_a_value * (student.parameters + recipe.rollout.batch_size * values)


def scoring_bytes(teacher: ModelSize, bytes_a_value: int, tokens: int) -> int:
    """Memory of the hf scorer: weights, and the logits of a batch of so many tokens within their budget."""
    return bytes_a_value * teacher.parameters + min(LOGITS_BYTES, 4 * tokens * teacher.vocab)
