"""The table of samples: filters, order and pages, answered from what live.py keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_cache.errors import ConfigError
from opd_cache.report.live import SCALARS, RunState

PAGE_SIZE = 25
SNIPPET_CHARS = 240
ORDERS = [
    "episode", "rollout_id", "prompt_index", "num_prompt_tokens", "num_response_tokens", "finish_reason", "reward",
    "reverse_kl_mean", "reverse_kl_sum", "teacher_logprob_min",
]  # fmt: skip
EXACT = {"episode": "episode", "prompt": "prompt_index", "teacher": "teacher", "finish": "finish_reason"}
BOUNDS = {"kl_min": "reverse_kl_mean >= ?", "kl_max": "reverse_kl_mean <= ?"}
IN_PROMPT = "prompt_index IN (SELECT prompt_index FROM prompts WHERE contains(lower(text), lower(?)))"
IN_RESPONSE = "(episode, rollout_id, teacher) IN (SELECT (episode, rollout_id, teacher) FROM {texts} WHERE {where} contains(lower(response_text), lower(?)))"


@dataclass(frozen=True)
class SampleQuery:
    """Conditions that all hold, an order and a page, from 0."""

    conditions: tuple[tuple[str, Any], ...]
    text: str
    order: str
    descending: bool
    page: int

    def where(self, texts: str) -> tuple[str, list[Any]]:
        """A condition on sample_rows and its parameters; response texts are looked up in the relation `texts`."""
        exact = [condition for condition, _ in self.conditions]
        values = [value for _, value in self.conditions]
        if not self.text:
            return " AND ".join(exact) or "true", values
        # What can be said of the texts' own columns is said there, too, so that fewer texts are made.
        among = [
            (condition, value) for condition, value in self.conditions if condition.startswith(("episode", "teacher"))
        ]
        narrowed = "".join(f"{condition} AND " for condition, _ in among)
        found = f"({IN_PROMPT} OR {IN_RESPONSE.format(texts=texts, where=narrowed)})"
        inner = [value for _, value in among]
        return " AND ".join([*exact, found]), [*values, self.text, *inner, self.text]


def parse_query(given: Mapping[str, str]) -> SampleQuery:
    """What a page asks for: episode, prompt, teacher, finish, kl_min, kl_max, text, sort, desc, page. Raises ConfigError."""
    conditions = [(f"{column} = ?", _value(key, given[key])) for key, column in EXACT.items() if given.get(key)]
    conditions += [(bound, _number(key, given[key])) for key, bound in BOUNDS.items() if given.get(key)]
    order = given.get("sort") or "reverse_kl_mean"
    if order not in ORDERS:
        raise ConfigError(f"sort = {order!r} is unknown. Known: {', '.join(ORDERS)}.")
    return SampleQuery(
        tuple(conditions), given.get("text", ""), order, given.get("desc", "1") == "1", _whole("page", given.get("page") or "0")
    )  # fmt: skip


def _value(key: str, text: str) -> Any:
    return _whole(key, text) if key in ("episode", "prompt") else text


def _whole(key: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise ConfigError(f"{key} = {text[:40]!r}: expected a whole number from 0.")
    return int(text)


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{key} = {text[:40]!r}: expected a number.") from error


def sample_page(state: RunState, query: SampleQuery) -> dict[str, Any]:
    """One page of rows with the beginnings of their texts, and how many rows there are in all."""
    rows, texts = state.keep("sample_rows"), "samples"
    if state.keeps_texts and query.text:
        texts = state.keep("sample_texts")
    where, values = query.where(texts)
    direction = "DESC" if query.descending else "ASC"
    found = state.rows(
        f"SELECT {', '.join(SCALARS)}, count(*) OVER () AS total FROM {rows} WHERE {where} ORDER BY {query.order} {direction} NULLS LAST, episode, rollout_id, teacher LIMIT {PAGE_SIZE} OFFSET {query.page * PAGE_SIZE}",
        values,
    )
    totals = [row.pop("total") for row in found]
    if not totals and query.page > 0:
        totals = [state.rows(f"SELECT count(*) AS n FROM {rows} WHERE {where}", values)[0]["n"]]
    return {
        "total": totals[0] if totals else 0,
        "page": query.page,
        "page_size": PAGE_SIZE,
        "rows": with_texts(state, found),
    }


def with_texts(state: RunState, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the beginnings of their prompt's and response's texts."""
    if not rows:
        return []
    table = "sample_texts" if "sample_texts" in state.kept else "samples"
    episodes = ", ".join(str(episode) for episode in sorted({row["episode"] for row in rows}))
    responses = state.rows(
        f"SELECT episode, rollout_id, left(response_text, {SNIPPET_CHARS}) AS text FROM {table} WHERE episode IN ({episodes}) AND rollout_id IN (SELECT unnest(?::VARCHAR[]))",
        [[row["rollout_id"] for row in rows]],
    )
    prompts = state.rows(
        f"SELECT prompt_index, left(text, {SNIPPET_CHARS}) AS text FROM prompts WHERE prompt_index IN (SELECT unnest(?::INTEGER[]))",
        [[row["prompt_index"] for row in rows]],
    )
    response_texts = {(one["episode"], one["rollout_id"]): one["text"] for one in responses}
    prompt_texts = {one["prompt_index"]: one["text"] for one in prompts}
    return [
        {
            **row,
            "prompt_text": prompt_texts.get(row["prompt_index"], ""),
            "response_text": response_texts.get((row["episode"], row["rollout_id"]), ""),
        }
        for row in rows
    ]


def sample_choices(state: RunState) -> dict[str, Any]:
    """What the filters can be set to."""
    table = state.keep("sample_rows")
    distinct = {
        key: [row["x"] for row in state.rows(f"SELECT DISTINCT {column} AS x FROM {table} ORDER BY 1")]
        for key, column in EXACT.items()
        if key != "prompt"
    }
    return {**distinct, "has_rewards": bool(state.rows(f"SELECT 1 FROM {table} WHERE reward IS NOT NULL LIMIT 1"))}
