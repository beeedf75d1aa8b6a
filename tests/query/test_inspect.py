"""opd-cache inspect: the same numbers as the views, in colour, in plain text and as JSON; and what cannot be shown."""

import io
import json
import shutil
from pathlib import Path

import pytest
from helpers import run_command
from rich.console import Console

from opd_cache.inspection.read import Alternative, Response, Token
from opd_cache.inspection.show import BANDS, show_logprobs, show_response, style_of
from opd_cache.run import Run
from opd_cache.store.query import query_rows


def inspected(*arguments: object) -> list:
    done = run_command("inspect", *map(str, arguments), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refused(*arguments: object) -> str:
    done = run_command("inspect", *map(str, arguments))
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def rollout_id(finished_run: Run) -> str:
    """A response of episode 0 with several tokens."""
    sql = "SELECT rollout_id FROM samples WHERE episode = 0 AND num_response_tokens > 5 ORDER BY 1 LIMIT 1"
    return query_rows(finished_run.dir.path, sql)[1][0][0]


def test_a_response_is_that_of_the_views(finished_run: Run, rollout_id: str) -> None:
    run = finished_run.dir.path
    (found,) = inspected(run, rollout_id)
    columns, (sample,) = query_rows(
        run, f"SELECT * EXCLUDE (response_text) FROM samples WHERE rollout_id = '{rollout_id}'"
    )
    sample = dict(zip(columns, sample, strict=True))
    assert {name: value for name, value in found.items() if name != "tokens"}.items() <= sample.items()
    columns, rows = query_rows(run, f"SELECT * FROM tokens WHERE rollout_id = '{rollout_id}' ORDER BY position")
    assert len(rows) == len(found["tokens"]) == sample["num_response_tokens"]
    for row, token in zip(rows, found["tokens"], strict=True):
        row = dict(zip(columns, row, strict=True))
        topk = token.pop("topk")
        assert token.items() <= row.items()
        assert [one["token_id"] for one in topk] == row["topk_ids"]
        assert [one["logprob"] for one in topk] == row["topk_logprobs"]


def test_without_a_name_the_farthest_response_of_the_last_episode_is_shown(finished_run: Run) -> None:
    (found,) = inspected(finished_run.dir.path)
    sql = "SELECT rollout_id FROM samples WHERE episode = 1 ORDER BY reverse_kl_sum DESC NULLS LAST LIMIT 1"
    assert query_rows(finished_run.dir.path, sql)[1] == [(found["rollout_id"],)]


def test_a_prompt_has_all_its_samples(finished_run: Run, rollout_id: str) -> None:
    prompt = rollout_id.split("/")[1]
    found = inspected(finished_run.dir.path, "--prompt", prompt)
    assert [response["rollout_id"] for response in found] == [f"0/{prompt}/0", f"0/{prompt}/1"]


def test_worst_tokens_are_those_of_the_views_in_their_context(finished_run: Run) -> None:
    run = finished_run.dir.path
    for options, where in (([], "true"), (["--episode", 1], "episode = 1")):
        found = inspected(run, "--worst", 7, *options)
        sql = f"SELECT rollout_id, position, advantage FROM tokens WHERE {where} ORDER BY advantage, rollout_id, position LIMIT 7"
        assert [(one["rollout_id"], one["position"], one["advantage"]) for one in found] == query_rows(run, sql)[1]
    for one in found:
        sql = f"SELECT response_text FROM samples WHERE rollout_id = '{one['rollout_id']}'"
        assert one["before"] + one["text"] + one["after"] in query_rows(run, sql)[1][0][0]


def test_a_prompt_in_two_episodes_lies_side_by_side(finished_run: Run, rollout_id: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished_run.dir.path, tmp_path / "copy"))
    shutil.copytree(path / "episode=0", path / "episode=2")
    prompt = rollout_id.split("/")[1]
    left, right = inspected(path, "--prompt", prompt, "--diff", 0, 2)
    assert [one["episode"] for one in (*left, *right)] == [0, 0, 2, 2]
    assert [one["tokens"] for one in left] == [one["tokens"] for one in right]
    assert inspected(path, rollout_id, "--diff", 0, 2) == [left, right]
    shown = run_command("inspect", path, "--prompt", prompt, "--diff", "0", "2").stdout
    assert "episode 0" in shown.splitlines()[3]
    assert "episode 2" in shown.splitlines()[3]
    assert refused(path, "--prompt", prompt, "--diff", 0, 1).startswith(
        f"ConfigError: --prompt {prompt}: not sampled in episode 1; the nearest is "
    )
    assert refused(path, "--diff", 0, 1) == "ConfigError: --diff compares one prompt; add ROLLOUT or --prompt."


def test_plain_text_holds_no_escape_sequence_and_marks_what_the_teacher_minds(finished_run: Run) -> None:
    done = run_command("inspect", finished_run.dir.path, "--logprobs", "--top-k")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "are marked ⟦token T−S⟧" in done.stdout
    assert "rest " in done.stdout
    (found,) = inspected(finished_run.dir.path)
    body = next(line for line in done.stdout.splitlines() if line.startswith("response: "))
    assert body.count("⟦") == sum(token["advantage"] < -2 for token in found["tokens"])


def response_of(*tokens: Token) -> Response:
    return Response(
        0, "0/1/0", "main", 1, 0, 0, len(tokens), "stop", None, None, 1.0, 0.5, "a\x1b[2Jb\nc", list(tokens)
    )


def token(text: str, advantage: float | None) -> Token:
    teacher = None if advantage is None else -1.0 + advantage
    return Token(0, 7, text, -1.0, teacher, advantage, 1, None, [Alternative(7, text, -0.5)])


def test_a_terminal_gets_colours_and_never_the_escapes_of_a_model() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=200, markup=False, _environ={})
    response = response_of(token("bad\x1b[31m", -7.0), token("meh", -1.0), token("[b]good[/b]", 1.0), token("?", None))
    show_response(console, response, ["other"])
    show_logprobs(console, response, with_topk=True)
    shown = file.getvalue()
    assert "\x1b[1;37;41mbad\\x1b[31m" in shown
    assert "\x1b[33mmeh" in shown
    assert "\x1b[32m[b]good[/b]" in shown
    assert "\x1b[2m?" in shown
    assert "a\\x1b[2Jb" in shown
    assert "(also: other)" in shown
    assert "⟦" not in shown
    for _, _, words in BANDS:
        assert words in shown


@pytest.mark.parametrize(
    ("advantage", "band"), [(-9, 0), (-5, 1), (-2.1, 1), (-2, 2), (-0.5, 3), (0.4, 3), (0.5, 4), (9, 4)]
)
def test_the_colour_of_a_token_follows_the_legend(advantage: float, band: int) -> None:
    assert style_of(advantage) == BANDS[band][1]


def test_unknown_names_are_one_line_with_the_nearest_that_exists(finished_run: Run, rollout_id: str) -> None:
    run = finished_run.dir.path
    known = [one for (one,) in query_rows(run, "SELECT rollout_id FROM samples")[1]]
    for unknown in (f"{rollout_id}9", "../../../etc/passwd", "'; DROP VIEW samples; --", "x" * 5000, "%"):
        line = refused(run, unknown)
        assert line.startswith(f"ConfigError: rollout {unknown!r} is not scored in this run; the nearest is ")
        assert line.removesuffix(".").split()[-1] in known
    assert refused(run, f"{rollout_id}9").endswith(f"the nearest is {rollout_id}.")
    assert refused(run, "--episode", 7) == "ConfigError: --episode 7: has no scores in this run; known: 0, 1."
    assert refused(run, "--teacher", "x") == "ConfigError: --teacher x: has no scores in this run; known: main."
    assert refused(run, "--prompt", 99) == "ConfigError: --prompt 99: not sampled; the nearest is 23."
    assert refused(run, "--worst", 3, "--diff", 0, 1).startswith(
        "ConfigError: --worst and --diff show different things"
    )
    assert refused(run, rollout_id, "--episode", 1) == (
        "ConfigError: no response is all of what was asked for; leave out --episode or --teacher."
    )


def test_a_run_without_scores_says_what_to_do(finished_run: Run, tmp_path: Path) -> None:
    path = Path(
        shutil.copytree(finished_run.dir.path, tmp_path / "copy", ignore=shutil.ignore_patterns("scores", "evals"))
    )
    done = run_command("inspect", path)
    assert done.returncode == 2
    *left_out, line = done.stderr.splitlines()
    assert left_out == [f"episode {n}: no scores yet, so no samples and no tokens" for n in (0, 1)]
    assert line == "ConfigError: the run has no scored responses yet. Run: opd-cache score RECIPE --episode 0"
