"""The report: the page with its data in one file. A chosen set of responses stands for all, the ready queries for SQL."""

from collections.abc import Callable
from typing import Any

from opd_cache.errors import ConfigError
from opd_cache.queries import example_names, example_sql
from opd_cache.report.answers import answer_query, to_json
from opd_cache.report.live import LiveRun, RunState
from opd_cache.report.page import embedded, report_page
from opd_cache.report.pages import Runs
from opd_cache.report.responses import response_lists, response_of
from opd_cache.report.samples import sample_choices, with_texts

RESPONSE_BYTES = 3_000_000  # of JSON, for all runs together
MAX_EPISODES = 40  # of which responses are chosen, evenly over the run
MAX_TOKENS, MAX_TOPK = 4_000, 8
FOLLOWED = 6  # prompts shown in every episode that sampled them
ORDERS = {
    "worst": ("reverse_kl_mean DESC NULLS LAST", 3),
    "best": ("reverse_kl_mean ASC NULLS LAST", 2),
    "longest": ("num_response_tokens DESC", 2),
    "random": ("hash(rollout_id)", 3),
}
Advance = Callable[[str], None]


def write_report(runs: Runs, advance: Advance = lambda _: None) -> tuple[str, int]:
    """(the file's text, how many responses it shows). `advance` is told of every step; there are num_steps(runs)."""
    about, overview, health = runs.about(), runs.overview(), runs.health()
    advance("overview")
    shown: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    for run in runs.by_name.values():
        answers[run.name] = {name: _ready_answer(runs, run, name, advance) for name in example_names()}
        shown[run.name] = _shown_responses(run.state(), RESPONSE_BYTES // len(runs.by_name))
        advance(f"{run.name}: responses")
    data = {"about": about, "overview": overview, "health": health, "answers": answers, "shown": shown}
    count = sum(len(one["rows"]) for one in shown.values())
    return report_page(", ".join(runs.by_name), to_json(data)).html, count


def num_steps(runs: Runs) -> int:
    return 1 + len(runs.by_name) * (len(example_names()) + 1)


def _ready_answer(runs: Runs, run: LiveRun, name: str, advance: Advance) -> dict[str, Any]:
    """Its rows, or why there are none within the limits."""
    try:
        return answer_query(run.path, example_sql(name), runs.partial, runs.limits)
    except ConfigError as error:
        return {"error": str(error)}
    finally:
        advance(f"{run.name}: {name}")


def _shown_responses(state: RunState, budget: int) -> dict[str, Any]:
    """The chosen rows, those that fit into so many bytes, with their tokens and the texts of all token ids."""
    rows: list[dict[str, Any]] = []
    responses: dict[str, Any] = {}
    texts: dict[int, str] = {}
    for row in chosen_rows(state):
        response = response_of(state, row["episode"], row["rollout_id"], row["teacher"])
        lists = response_lists(response, MAX_TOKENS, MAX_TOPK)
        new = {key: text for key, text in lists.pop("texts").items() if key not in texts}
        size = len(embedded(to_json([lists, new])).encode())
        if size > budget:
            continue
        budget -= size
        texts |= new
        rows.append(row)
        responses[f"{row['episode']} {row['rollout_id']} {row['teacher']}"] = lists
    return {
        "rows": with_texts(state, rows),
        "choices": sample_choices(state),
        "total": state.rows(f"SELECT count(*) AS n FROM {state.keep('sample_rows')}")[0]["n"],
        "responses": responses,
        "texts": texts,
    }


def chosen_rows(state: RunState) -> list[dict[str, Any]]:
    """Rows of sample_rows with `chosen`: the extremes and random ones of every episode, and prompts followed through all.

    The most telling of each come first; `chosen` names all reasons.
    """
    table = state.keep("sample_rows")
    kinds = [
        f"SELECT *, '{kind}' AS chosen, row_number() OVER (PARTITION BY episode, teacher ORDER BY {order}, rollout_id) AS place FROM near QUALIFY place <= {count}"
        for kind, (order, count) in ORDERS.items()
    ]
    followed = f"""
        SELECT near.*, 'followed' AS chosen, 1 AS place FROM near WHERE sample_index = 0 AND prompt_index IN (
            SELECT prompt_index FROM near GROUP BY prompt_index HAVING count(DISTINCT episode) > 1
            ORDER BY count(DISTINCT episode) DESC, hash(prompt_index) LIMIT {FOLLOWED})"""
    return state.rows(f"""
        WITH numbered AS (SELECT *, dense_rank() OVER (ORDER BY episode) - 1 AS turn FROM {table}),
        counted AS (SELECT greatest(1, ceil((max(turn) + 1) / {MAX_EPISODES}))::INTEGER AS every, max(turn) AS last FROM numbered),
        near AS (SELECT numbered.* EXCLUDE (turn) FROM numbered, counted WHERE turn % every = 0 OR turn = last),
        chosen AS ({" UNION ALL ".join([*kinds, followed])})
        SELECT * EXCLUDE (chosen, place), string_agg(DISTINCT chosen, ', ' ORDER BY chosen) AS chosen, min(place) AS place
        FROM chosen GROUP BY ALL ORDER BY place, episode, chosen, rollout_id""")
