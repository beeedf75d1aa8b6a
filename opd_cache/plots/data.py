"""What a figure shows, asked from the views of a run. Rows of numbers; nothing of how they look."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_cache.errors import ConfigError, MissingInputError
from opd_cache.store.query import Connection, connect

MAX_BINS = 128  # of the positions of one line
MIN_SHARE = 0.02  # of a run's best filled bin: what fewer tokens say is noise
MAX_EPISODES = 8  # lines of one panel
MAX_TOKENS = 15


@dataclass(frozen=True)
class Chosen:
    """A run under its name in the figure, and what of it is asked for."""

    name: str
    path: str
    teacher: str | None = None
    episode: int | None = None


@dataclass(frozen=True)
class Curve:
    """A run by policy version: points (version, value), each list in order; empty where there is nothing."""

    sampled: list[tuple[int, float]]
    greedy: list[tuple[int, float]]
    teacher: float | None  # its sampled accuracy
    training_kl: list[tuple[int, float]]  # of an episode's responses under the policy that sampled them, nats a token
    heldout_kl: list[tuple[int, float]]


@dataclass(frozen=True)
class Positions:
    """Reverse KL by place in the response: episode → points (place, nats)."""

    lines: dict[int, list[tuple[float, float]]]


@dataclass(frozen=True)
class TokenShare:
    """A token of the vocabulary, its share of an episode's reverse KL, and its mean reverse KL in nats."""

    text: str
    share: float
    mean: float


def opened(chosen: Chosen) -> tuple[Connection, str]:
    """(a connection to the run, the teacher). Raises MissingInputError without scores, ConfigError on a teacher without."""
    connection = connect(chosen.path)
    names = [name for (name,) in connection.execute("SELECT DISTINCT teacher FROM scores ORDER BY 1").fetchall()]
    if not names:
        raise MissingInputError(f"{chosen.path}: no sealed scores to draw. See: opd-cache status {chosen.path}")
    if chosen.teacher is not None and chosen.teacher not in names:
        raise ConfigError(f"--teacher {chosen.teacher!r} scored nothing in {chosen.path}. Known: {', '.join(names)}.")
    return connection, chosen.teacher or names[0]


def curve(chosen: Chosen) -> Curve:
    connection, teacher = opened(chosen)
    accuracy = """SELECT policy_version, avg(correct::INTEGER) FROM evals
        WHERE mode = ? AND correct IS NOT NULL AND policy_version IS NOT NULL GROUP BY 1 ORDER BY 1"""
    training = """SELECT policy_version, sum(reverse_kl_sum) / sum(num_scored_tokens) AS kl FROM samples
        WHERE teacher = ? GROUP BY 1 HAVING kl IS NOT NULL ORDER BY 1"""
    heldout = """SELECT policy_version, sum(reverse_kl_sum) / sum(num_response_tokens) FROM evals
        WHERE reverse_kl_sum IS NOT NULL AND policy_version IS NOT NULL GROUP BY 1 ORDER BY 1"""
    known = "SELECT avg(correct::INTEGER) FROM evals WHERE subject = ? AND mode = 'sampled'"
    return Curve(
        _rows(connection, accuracy, "sampled"),
        _rows(connection, accuracy, "greedy"),
        _rows(connection, known, f"teacher={teacher}")[0][0],
        _rows(connection, training, teacher),
        _rows(connection, heldout),
    )


def positions(chosen: Chosen) -> Positions:
    connection, teacher = opened(chosen)
    scored = "SELECT DISTINCT episode FROM scores WHERE teacher = ? ORDER BY 1"
    episodes = spread([episode for (episode,) in _rows(connection, scored, teacher)], MAX_EPISODES)
    ((longest,),) = _rows(connection, "SELECT max(num_scored_tokens) FROM samples WHERE teacher = ?", teacher)
    width = max(1, -(-(longest or 1) // MAX_BINS))
    sql = """SELECT episode, (position // ?) AS bin, -avg(advantage), count(advantage) FROM tokens
        WHERE teacher = ? AND advantage IS NOT NULL AND list_contains(?, episode) GROUP BY 1, 2 ORDER BY 1, 2"""
    rows = _rows(connection, sql, width, teacher, episodes)
    if not rows:
        raise MissingInputError(
            f"{chosen.path}: its rollouts were imported without the student's log-probs, so that there is no reverse KL to draw."
        )
    enough = MIN_SHARE * max((count for *_, count in rows), default=0)
    lines: dict[int, list[tuple[float, float]]] = {}
    for episode, place, value, count in rows:
        if count >= enough:
            lines.setdefault(episode, []).append((place * width + (width - 1) / 2, value))
    return Positions(lines)


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, evenly, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def token_shares(chosen: Chosen) -> tuple[int, list[TokenShare]]:
    """(the episode, its tokens with the largest shares first). Shares are of the whole episode's reverse KL."""
    connection, teacher = opened(chosen)
    ((episode,),) = _rows(
        connection, "SELECT coalesce(?, max(episode)) FROM scores WHERE teacher = ?", chosen.episode, teacher
    )
    sql = """WITH by_token AS (
            SELECT token_id, sum(-advantage) AS kl, -avg(advantage) AS mean FROM tokens
            WHERE teacher = ? AND episode = ? AND advantage IS NOT NULL GROUP BY 1
        )
        SELECT coalesce(v.text, '#' || token_id), kl / sum(kl) OVER (), mean
        FROM by_token LEFT JOIN vocab v USING (token_id) ORDER BY kl DESC, token_id LIMIT ?"""
    rows = _rows(connection, sql, teacher, episode, MAX_TOKENS)
    if not rows:
        raise ConfigError(f"--episode {episode}: {teacher} has no sealed scores of it in {chosen.path}.")
    return episode, [TokenShare(*row) for row in rows]


def _rows(connection: Connection, sql: str, *parameters: Any) -> list[tuple]:
    return connection.execute(sql, parameters).fetchall()
