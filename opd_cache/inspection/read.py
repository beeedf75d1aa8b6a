"""Responses with the student's and a teacher's log-prob of every token, asked from the views of one run.

What the user names (ids, numbers, teachers) reaches SQL as parameters alone: it is compared and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd_cache.errors import ConfigError

if TYPE_CHECKING:
    from opd_cache.store.query import Connection

CONTEXT = 8  # tokens shown on either side of one of the worst


@dataclass(frozen=True)
class Alternative:
    """One of the ids that the teacher's log-prob is cached of."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """One response token; what the teacher says is None where it is not scored."""

    position: int
    token_id: int
    text: str
    student_logprob: float
    teacher_logprob: float | None
    advantage: float | None
    teacher_rank: int | None
    teacher_entropy: float | None
    topk: list[Alternative]


@dataclass(frozen=True)
class Response:
    """One response as one teacher sees it."""

    episode: int
    rollout_id: str
    teacher: str
    prompt_index: int
    sample_index: int
    policy_version: int
    num_response_tokens: int
    finish_reason: str
    reward: float | None
    error: str | None
    reverse_kl_sum: float | None
    reverse_kl_mean: float | None
    prompt_text: str
    tokens: list[Token]


@dataclass(frozen=True)
class Wanted:
    """Which responses; None is any."""

    rollout: str | None = None
    episode: int | None = None
    prompt: int | None = None
    teacher: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """A condition on samples or tokens, and its parameters."""
        given = {
            "rollout_id": self.rollout,
            "episode": self.episode,
            "prompt_index": self.prompt,
            "teacher": self.teacher,
        }
        kept = {name: value for name, value in given.items() if value is not None}
        return " AND ".join([f"{name} = ?" for name in kept]) or "true", list(kept.values())


def read_responses(connection: "Connection", wanted: Wanted) -> list[Response]:
    """The response of an id, or all samples of a prompt in one episode (the last that has it); of one teacher.

    Without either, the response of the last scored episode that is farthest from the teacher. Raises ConfigError.
    """
    where, values = wanted.where()
    order = "episode DESC, teacher, sample_index" if wanted.prompt is not None else "episode DESC, reverse_kl_sum DESC NULLS LAST, teacher"  # fmt: skip
    limit = "" if wanted.prompt is not None else "LIMIT 1"
    columns = [name for name in Response.__dataclass_fields__ if name != "tokens"]
    sql = f"SELECT {', '.join(columns)} FROM samples WHERE {where} ORDER BY {order} {limit}"
    rows = [dict(zip(columns, row, strict=True)) for row in connection.execute(sql, values).fetchall()]
    if not rows:
        raise _nothing_found(connection, wanted)
    kept = [row for row in rows if (row["episode"], row["teacher"]) == (rows[0]["episode"], rows[0]["teacher"])]
    return [Response(**row, tokens=_read_tokens(connection, row)) for row in kept]


def _read_tokens(connection: "Connection", row: dict[str, Any]) -> list[Token]:
    where, values = Wanted(row["rollout_id"], row["episode"], teacher=row["teacher"]).where()
    names = [name for name in Token.__dataclass_fields__ if name != "topk"]
    sql = f"SELECT {', '.join(names)}, topk_ids, topk_logprobs FROM tokens WHERE {where} ORDER BY position"
    found = connection.execute(sql, values).fetchall()
    texts = _texts(connection, [token_id for *_, ids, _ in found for token_id in ids or []])
    tokens = []
    for *scalars, ids, logprobs in found:
        listed = zip(ids or [], logprobs or [], strict=True)
        named = dict(zip(names, scalars, strict=True))
        alternatives = [Alternative(token_id, texts.get(token_id, ""), logprob) for token_id, logprob in listed]
        tokens.append(Token(**{**named, "text": named["text"] or ""}, topk=alternatives))
    return tokens


def _texts(connection: "Connection", ids: Sequence[int]) -> dict[int, str]:
    sql = "SELECT token_id, text FROM vocab WHERE token_id IN (SELECT unnest(?::INTEGER[]))"
    return dict(connection.execute(sql, [sorted(set(ids))]).fetchall())


def teachers_of(connection: "Connection", response: Response) -> list[str]:
    """Every teacher that scored it."""
    where, values = Wanted(response.rollout_id, response.episode).where()
    return [name for (name,) in connection.execute(f"SELECT teacher FROM samples WHERE {where} ORDER BY 1", values).fetchall()]  # fmt: skip


@dataclass(frozen=True)
class WorstToken:
    """A token that the teacher would least have sampled, with the text around it."""

    episode: int
    rollout_id: str
    teacher: str
    position: int
    text: str
    student_logprob: float
    teacher_logprob: float
    advantage: float
    before: str
    after: str


def read_worst(connection: "Connection", wanted: Wanted, count: int) -> list[WorstToken]:
    """The tokens with the lowest teacher − student log-prob. Raises ConfigError where nothing is scored."""
    where, values = wanted.where()
    sql = f"""
        WITH worst AS (
            SELECT episode, rollout_id, teacher, position, text, student_logprob, teacher_logprob, advantage
            FROM tokens WHERE advantage IS NOT NULL AND {where} ORDER BY advantage, rollout_id, position LIMIT {count:d}
        )
        SELECT w.*, r.response_ids[greatest(w.position - {CONTEXT} + 1, 1):w.position],
            r.response_ids[w.position + 2:w.position + {CONTEXT} + 1]
        FROM worst w JOIN rollouts r ON r.episode = w.episode AND r.rollout_id = w.rollout_id
        ORDER BY advantage, w.rollout_id, position"""
    found = connection.execute(sql, values).fetchall()
    if not found:
        raise _nothing_found(connection, wanted)
    texts = _texts(connection, [token_id for *_, before, after in found for token_id in (*before, *after)])

    def text(ids: Sequence[int]) -> str:
        return "".join(texts.get(token_id, "") for token_id in ids)

    names = list(WorstToken.__dataclass_fields__)
    rows = ((*scalars, text(before), text(after)) for *scalars, before, after in found)
    return [WorstToken(**dict(zip(names, row, strict=True))) for row in rows]


def read_two_episodes(connection: "Connection", wanted: Wanted, first: int, second: int) -> list[list[Response]]:
    """The samples of one prompt in two episodes. Raises ConfigError where an episode does not have it."""
    prompt = wanted.prompt
    if prompt is None:
        if wanted.rollout is None:
            raise ConfigError("--diff compares one prompt; add ROLLOUT or --prompt.")
        prompt = read_responses(connection, Wanted(wanted.rollout, teacher=wanted.teacher))[0].prompt_index
    return [read_responses(connection, Wanted(None, episode, prompt, wanted.teacher)) for episode in (first, second)]


def _nothing_found(connection: "Connection", wanted: Wanted) -> ConfigError:
    """Says which of the things that were named the run does not have, with one that it has."""
    if not connection.execute("SELECT 1 FROM samples LIMIT 1").fetchall():
        return ConfigError("the run has no scored responses yet. Run: opd-cache score RECIPE --episode 0")
    if wanted.rollout is not None:
        nearest = _first(connection, "SELECT rollout_id FROM samples ORDER BY levenshtein(rollout_id, left(?, 64)), rollout_id", [wanted.rollout])  # fmt: skip
        if nearest != wanted.rollout:
            return ConfigError(f"rollout {wanted.rollout!r} is not scored in this run; the nearest is {nearest}.")
    for name, column, value in (("--teacher", "teacher", wanted.teacher), ("--episode", "episode", wanted.episode)):
        known = [one for (one,) in connection.execute(f"SELECT DISTINCT {column} FROM samples ORDER BY 1").fetchall()]
        if value is not None and value not in known:
            return ConfigError(f"{name} {value}: has no scores in this run; known: {', '.join(map(str, known))}.")
    if wanted.prompt is not None:
        within, values = Wanted(episode=wanted.episode, teacher=wanted.teacher).where()
        sql = f"SELECT prompt_index FROM samples WHERE {within} ORDER BY abs(prompt_index - ?), prompt_index"
        place = "" if wanted.episode is None else f" in episode {wanted.episode}"
        nearest = _first(connection, sql, [*values, wanted.prompt])
        return ConfigError(f"--prompt {wanted.prompt}: not sampled{place}; the nearest is {nearest}.")
    return ConfigError("no response is all of what was asked for; leave out --episode or --teacher.")


def _first(connection: "Connection", sql: str, values: list[Any]) -> Any:
    row = connection.execute(f"{sql} LIMIT 1", values).fetchone()
    return None if row is None else row[0]
