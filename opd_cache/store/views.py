"""The SQL of the views over a run. What each holds is in schema.py; nothing here opens a file or loads DuckDB."""

from collections.abc import Sequence
from pathlib import Path

from opd_cache.run_dir import RESULTS
from opd_cache.schema import EVALS, PROMPTS, ROLLOUTS, SCORES, STEPS, TEACHER_PROMPTS, VOCAB, Column
from opd_cache.store.plans import SamplingPlan
from opd_cache.store.sealed import RunFiles, StageFiles

SQL_TYPES = {
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint64": "UBIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
    "string": "VARCHAR",
    "bool": "BOOLEAN",
}
# The smallest tail that float32 log-probs can tell from rounding, as in the learner's losses.
LARGEST_MASS = "exp(-1e-7)"


def view_statements(found: RunFiles, schema: str) -> list[str]:
    """CREATE VIEW statements for one run, in this schema; `shards` is no view but a table."""
    views = {**_file_views(found), "samples": _samples(found, schema), "tokens": _tokens(found, schema)}
    return [f"CREATE VIEW {schema}.{name} AS {sql}" for name, sql in views.items()]


def view_files(found: RunFiles) -> list[Path]:
    """Every file that the views read."""
    steps = [path for _, path in _steps(found)]
    files = [path for stage in (*found.rollouts, *found.scores) for path in stage.files]
    return [*_existing(found.dir.prompts), *_existing(found.dir.vocab), *found.teacher_prompts.values(), *files, *steps, *_results(found)]  # fmt: skip


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def sql_types(columns: Sequence[Column]) -> list[tuple[str, str]]:
    """(name, SQL type) of every column."""
    return [(column.name, _sql_type(str(column.type))) for column in columns]


def _file_views(found: RunFiles) -> dict[str, str]:
    """The views whose rows lie in files as they are."""
    run = found.dir
    episode, teacher = ("episode", "INTEGER"), ("teacher", "VARCHAR")
    return {
        "prompts": _union(sql_types(PROMPTS), [_select(_existing(run.prompts))]),
        "vocab": _union(sql_types(VOCAB), [_select(_existing(run.vocab))]),
        "teacher_prompts": _union(
            [teacher, *sql_types(TEACHER_PROMPTS)],
            [_select([path], teacher=quoted(name)) for name, path in found.teacher_prompts.items()],
        ),
        "rollouts": _union(
            [episode, *sql_types(ROLLOUTS)], [_select(s.files, episode=_int(s.episode)) for s in found.rollouts]
        ),
        "scores": _union(
            [episode, teacher, ("first_token", "INTEGER"), *sql_types(SCORES)],
            [_select(s.files, **_score_constants(s), first_token=_int(s.first_token)) for s in found.scores],
        ),
        "steps": _union(
            [episode, *sql_types(STEPS)], [_select([path], episode=_int(number)) for number, path in _steps(found)]
        ),
        "evals": _union(sql_types(EVALS), [_select(_results(found))]),
    }


def _texts(schema: str) -> str:
    """The vocabulary as one list beside every row. Unlike a join by token it costs nothing when no text is asked for; texts
    must be taken from it below any join, which would copy the list into every row."""
    return f"CROSS JOIN (SELECT list(text ORDER BY token_id) AS texts FROM {schema}.vocab)"


def _student(found: RunFiles, raw: str, sampling: str) -> str:
    """The student's log-prob at temperature 1 without cuts."""
    cuts = [SamplingPlan(**stage.facts["sampling"]).cuts_distribution for stage in found.rollouts]
    return f"coalesce({raw}, {sampling})" if any(cuts) else sampling


def _has_masks(found: RunFiles) -> bool:
    return any("loss_mask" in (stage.facts.get("imported") or {}).get("columns", ()) for stage in found.rollouts)


def _samples(found: RunFiles, schema: str) -> str:
    student = _student(found, "r.raw_logprobs", "r.sampling_logprobs")
    mask, count = "r.loss_mask[:s.num_scored_tokens]", "s.num_scored_tokens"
    has_masks = _has_masks(found)

    def sampled(values: str) -> str:
        """Of these, one a scored token, those that the student sampled."""
        return (
            f"CASE WHEN r.loss_mask IS NULL THEN {values} ELSE list_where({values}, {mask}) END"
            if has_masks
            else values
        )

    if has_masks:
        count = f"CASE WHEN r.loss_mask IS NULL THEN {count} ELSE len(list_where({mask}, {mask}))::INTEGER END"
    scored = f"CASE WHEN len({student}) = s.num_scored_tokens THEN {student} ELSE {student}[:s.num_scored_tokens] END"
    return f"""
        SELECT r.episode, r.rollout_id, s.teacher, r.prompt_index, r.sample_index, r.policy_version,
            r.num_prompt_tokens, r.num_response_tokens, {count} AS num_scored_tokens, r.finish_reason, r.reward, s.error,
            list_sum({sampled(scored)}) - list_sum({sampled("s.teacher_logprobs")}) AS reverse_kl_sum,
            reverse_kl_sum / {count} AS reverse_kl_mean,
            list_min(s.teacher_logprobs) AS teacher_logprob_min,
            p.text AS prompt_text, r.response_text
        FROM (
            SELECT *, array_to_string([texts[id + 1] FOR id IN response_ids], '') AS response_text
            FROM {schema}.rollouts {_texts(schema)}
        ) r
        JOIN ({_whole_scores(found)}) s ON s.episode = r.episode AND s.rollout_id = r.rollout_id
        LEFT JOIN {schema}.prompts p ON p.prompt_index = r.prompt_index"""


def _tokens(found: RunFiles, schema: str) -> str:
    """The lists of one value a token are unnested side by side. Those of k values are carried along and looked into place
    by place, and are not read when nothing of them is asked for."""
    here = "[{0}[position * top_k + j] FOR j IN range(1, top_k + 1)]"
    is_listed = "top_k > 0 AND position < num_scored_tokens"
    mass = "list_sum([exp(x::DOUBLE) FOR x IN topk_logprobs])"
    tail = f"(1 - least({mass}, {LARGEST_MASS}))"
    listed = "list_sum([CASE WHEN isinf(x) THEN 0 ELSE exp(x::DOUBLE) * x END FOR x IN topk_logprobs])"
    is_sampled, advantage = "true", "teacher_logprob - student_logprob"
    if _has_masks(found):
        is_sampled = "unnest(coalesce(r.loss_mask, [true FOR id IN r.response_ids]))"
        advantage = f"CASE WHEN is_sampled THEN {advantage} END"
    return f"""
        WITH unnested AS (
            SELECT r.episode, r.rollout_id, s.teacher, r.prompt_index, r.sample_index, r.policy_version,
                r.num_response_tokens, r.finish_reason, s.num_scored_tokens, s.top_k,
                s.topk_ids AS listed_ids, s.topk_logprobs AS listed_logprobs,
                unnest(range(r.num_response_tokens)) AS position,
                unnest(r.response_ids) AS token_id,
                {is_sampled} AS is_sampled,
                unnest(r.sampling_logprobs) AS sampling_logprob,
                unnest({_student(found, "r.raw_logprobs", "r.sampling_logprobs")}) AS student_logprob,
                unnest(s.teacher_logprobs) AS teacher_logprob,
                unnest(s.teacher_rank) AS teacher_rank
            FROM {schema}.rollouts r
            JOIN ({_whole_scores(found)}) s ON s.episode = r.episode AND s.rollout_id = r.rollout_id
        ), measured AS (
            SELECT *, texts[token_id + 1] AS text,
                CASE WHEN {is_listed} THEN {here.format("listed_ids")} END AS topk_ids,
                CASE WHEN {is_listed} THEN {here.format("listed_logprobs")} END AS topk_logprobs
            FROM unnested {_texts(schema)}
        )
        SELECT episode, rollout_id, teacher, prompt_index, sample_index, policy_version, num_response_tokens,
            finish_reason, position::INTEGER AS position, token_id, is_sampled, text, sampling_logprob, student_logprob,
            teacher_logprob, {advantage} AS advantage, teacher_rank,
            -({listed} + {tail} * ln{tail}) AS teacher_entropy,
            list_contains(topk_ids, token_id) AS is_in_topk, topk_ids, topk_logprobs
        FROM measured"""


def _whole_scores(found: RunFiles) -> str:
    """One row a rollout and teacher, the parts of a teacher whose horizon has grown put together."""
    parts: dict[tuple[int | None, str | None], list[StageFiles]] = {}
    for stage in found.scores:
        parts.setdefault((stage.episode, stage.teacher), []).append(stage)
    columns = [
        ("episode", "INTEGER"), ("teacher", "VARCHAR"), ("top_k", "INTEGER"), ("rollout_id", "VARCHAR"),
        ("num_scored_tokens", "INTEGER"), ("error", "VARCHAR"), ("teacher_logprobs", "FLOAT[]"),
        ("teacher_rank", "INTEGER[]"), ("topk_ids", "INTEGER[]"), ("topk_logprobs", "FLOAT[]"),
    ]  # fmt: skip
    return _union(columns, [_whole(stages) for stages in parts.values()])


def _whole(stages: list[StageFiles]) -> str:
    first, *rest = stages
    top_k = first.facts["top_k"]
    lists = ["teacher_logprobs", "teacher_rank", *(["topk_ids", "topk_logprobs"] if top_k else [])]
    constants = {**_score_constants(first), "top_k": _int(top_k)}
    if not rest:
        return _select(first.files, "rollout_id, num_response_tokens AS num_scored_tokens, error", *lists, **constants)
    names = [f"p{index}" for index in range(len(stages))]
    error = f"coalesce({', '.join(f'{name}.error' for name in names)})"
    count = " + ".join(f"coalesce({name}.num_response_tokens, 0)" for name in names)
    sources = [f"({_select(stage.files)}) {name}" for name, stage in zip(names, stages, strict=True)]
    joined = "".join(f" LEFT JOIN {source} USING (rollout_id)" for source in sources[1:])
    whole = [
        f"CASE WHEN {error} IS NULL THEN list_concat({', '.join(f'{name}.{column}' for name in names)}) ELSE [] END AS {column}"
        for column in lists
    ]
    return f"""SELECT {_constants(constants)}, rollout_id, {error} AS error,
        (CASE WHEN {error} IS NULL THEN {count} ELSE 0 END)::INTEGER AS num_scored_tokens, {", ".join(whole)}
        FROM {sources[0]}{joined}"""


def _score_constants(stage: StageFiles) -> dict[str, str]:
    return {"episode": _int(stage.episode), "teacher": quoted(stage.teacher or "")}


def _steps(found: RunFiles) -> list[tuple[int, Path]]:
    numbers = ((number, found.dir.steps(number)) for number in found.dir.episodes())
    return [(number, path) for number, path in numbers if path.exists()]


def _results(found: RunFiles) -> list[Path]:
    return [found.dir.evaluation(subject) / RESULTS for subject in found.subjects]


def _existing(path: Path) -> list[Path]:
    return [path] if path.exists() else []


def _select(files: Sequence[Path], *columns: str, **constants: str) -> str:
    """A SELECT over a list of files; empty text without files."""
    if not files:
        return ""
    wanted = ", ".join([*([_constants(constants)] if constants else []), *(columns or ("*",))])
    listed = ", ".join(quoted(str(path)) for path in files)
    return f"SELECT {wanted} FROM read_parquet([{listed}], hive_partitioning = false)"


def _constants(values: dict[str, str]) -> str:
    return ", ".join(f"{value} AS {name}" for name, value in values.items())


def _int(value: int | None) -> str:
    return "NULL::INTEGER" if value is None else f"{value:d}::INTEGER"


def _union(columns: Sequence[tuple[str, str]], selects: list[str]) -> str:
    """All rows of the SELECTs, with all columns even where no SELECT has them."""
    empty = f"SELECT {', '.join(f'NULL::{kind} AS {name}' for name, kind in columns)} WHERE false"
    return " UNION ALL BY NAME ".join([empty, *filter(None, selects)])


def _sql_type(arrow_type: str) -> str:
    if arrow_type.startswith("list<"):
        return SQL_TYPES[arrow_type.split(": ")[1].split(" ")[0].rstrip(">")] + "[]"
    return SQL_TYPES[arrow_type]
