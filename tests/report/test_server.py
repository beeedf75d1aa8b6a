"""opd-cache serve over HTTP: who is answered, what is asked for, and that the answers are those of the views."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

import pytest
from helpers import edit_json, opd_cache_command, run_command

from opd_cache.errors import ConfigError
from opd_cache.limits import DEFAULT_LIMITS
from opd_cache.report import live
from opd_cache.report.answers import to_json
from opd_cache.report.pages import Runs
from opd_cache.report.serve import LONGEST_BODY, PageServer
from opd_cache.run_dir import SCHEMA_VERSION, SEAL
from opd_cache.store.query import query_rows

Serve = Callable[..., PageServer]


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


def ask(address: str, place: str = "", method: str = "GET", body: str | None = None, **headers: str) -> Reply:
    """One request below the address; headers are named as in Content_Type."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, parts.path + place, body, named)
    response = connection.getresponse()
    reply = Reply(response.status, dict(response.getheaders()), response.read().decode())
    connection.close()
    return reply


def get(address: str, name: str, **params: object) -> object:
    reply = ask(address, f"api/{name}?{urlencode(params)}")
    assert reply.status == 200, reply.body
    return json.loads(reply.body)


def error_of(reply: Reply) -> str:
    error = json.loads(reply.body)["error"]
    assert "\n" not in error
    return error


def post(address: str, sql: str, run: str = "tiny") -> Reply:
    return ask(address, "api/query", "POST", json.dumps({"run": run, "sql": sql}), Content_Type="application/json")


# Who is answered


def test_without_the_random_path_nothing_is_answered(address: str) -> None:
    root = address[: address.index("/", len("http://")) + 1]
    for place in ("", "wrong/", "wrong/api/overview", "api/overview", "%2e%2e/", "static/app.js"):
        reply = ask(root, place)
        assert reply.status == 401
        assert "opd-cache serve" in error_of(reply)
    assert ask(address).status == 200


def test_another_sites_name_or_page_is_refused(address: str) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "192.168.0.1"):
        assert ask(address, "api/overview", Host=host).status == 403
    for host in ("localhost", "localhost:9999", "127.0.0.1:80", "[::1]:80"):
        assert ask(address, "api/about", Host=host).status == 200  # such as through a tunnel
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert ask(address, "api/overview", Origin=origin).status == 403
    own = urlsplit(address).netloc
    assert ask(address, "api/about", Origin=f"http://{own}").status == 200


def test_every_answer_forbids_what_the_page_does_not_need(address: str) -> None:
    for place in ("", "static/app.js", "api/about", "api/none"):
        headers = ask(address, place).headers
        policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert "data:" not in policy["script-src"]
        assert policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "Python" not in headers["Server"]


def test_no_file_is_served_but_the_pages_own(address: str) -> None:
    for place in ("static/../../../run.json", "static/%2e%2e/page.html", "run.json", "static/", "api/", "../run.json"):
        assert ask(address, place).status in (401, 404)
    assert ask(address, "static/page.html").status == 404
    assert ask(address, "static/vendor/uplot/uPlot.esm.js").status == 200


def test_what_is_no_query_is_refused(address: str) -> None:
    json_type = {"Content_Type": "application/json"}
    assert ask(address, "api/query", "POST", "{}", Content_Type="text/plain").status == 415
    assert ask(address, "api/query", "POST", "{", **json_type).status == 400
    assert ask(address, "api/query", "POST", '{"sql": 3}', **json_type).status == 400
    assert ask(address, "api/query", "POST", "x", Content_Length=str(LONGEST_BODY + 1), **json_type).status == 413
    assert ask(address, "api/other", "POST", "{}", **json_type).status == 404
    assert ask(address, "api/overview", "DELETE").status == 501


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("COPY (SELECT 1) TO '/tmp/x.csv'", "the query is COPY; expected SELECT"),
        ("ATTACH '/tmp/x.db'", "the query is ATTACH; expected SELECT"),
        ("INSTALL httpfs", "expected SELECT"),
        ("SELECT * FROM read_text('/etc/passwd')", "the query failed: Permission Error"),
        ("SELECT 1; SELECT 2", "the query holds 2 statements"),
        ("SELEC", "the query failed: Parser Error"),
        ("SELECT * FROM sample_rows", "the query failed: Catalog Error"),
    ],
)
def test_the_sql_box_has_the_guards_of_query(address: str, sql: str, reason: str) -> None:
    reply = post(address, sql)
    assert reply.status == 400
    assert reason in error_of(reply)


def test_queries_beyond_two_at_once_are_sent_away(serve: Serve, run_path: Path) -> None:
    server = serve(tiny=run_path)
    assert server.queries.acquire()
    assert server.queries.acquire()
    assert post(server.url, "SELECT 1").status == 503
    server.queries.release()
    assert post(server.url, "SELECT 1").status == 200


# What is answered


def test_a_query_gives_the_rows_of_the_views(address: str, run_path: Path) -> None:
    sql = "SELECT rollout_id, reverse_kl_sum, reward FROM samples ORDER BY 1"
    answer = json.loads(post(address, sql).body)
    columns, rows = query_rows(run_path, sql)
    assert (answer["columns"], answer["rows"], answer["more"]) == (columns, [list(row) for row in rows], False)
    many = json.loads(post(address, "SELECT * FROM range(5000)").body)
    assert (len(many["rows"]), many["more"]) == (1000, True)


def test_json_keeps_what_javascript_would_round() -> None:
    assert to_json([2**53, 2**53 + 1, float("inf"), float("nan"), {1: None}, True]) == (
        '[9007199254740992,"9007199254740993","inf","nan",{"1":null},true]'
    )


FILTERS = [
    ({}, "true"),
    ({"episode": 1}, "episode = 1"),
    ({"prompt": 3}, "prompt_index = 3"),
    ({"finish": "length"}, "finish_reason = 'length'"),
    ({"kl_min": 0.5, "kl_max": 2.5}, "reverse_kl_mean BETWEEN 0.5 AND 2.5"),
    ({"text": "ONERROR"}, "prompt_text ILIKE '%onerror%' OR response_text ILIKE '%onerror%'"),
    ({"text": "%", "episode": 0}, "episode = 0 AND (contains(prompt_text, '%') OR contains(response_text, '%'))"),
    ({"teacher": "nobody"}, "false"),
]


@pytest.mark.parametrize(("filters", "where"), FILTERS)
def test_filtered_samples_are_those_of_the_views(
    address: str, run_path: Path, filters: dict[str, object], where: str
) -> None:
    sql = f"SELECT rollout_id, reverse_kl_mean, num_response_tokens FROM samples WHERE {where}"
    for sort, order in (("reverse_kl_mean", "reverse_kl_mean"), ("num_response_tokens", "num_response_tokens")):
        for desc in ("0", "1"):
            page = get(address, "samples", run="tiny", sort=sort, desc=desc, **filters)
            way = "DESC" if desc == "1" else "ASC"
            rows = query_rows(run_path, f"{sql} ORDER BY {order} {way} NULLS LAST, episode, rollout_id")[1]
            found = [(row["rollout_id"], row["reverse_kl_mean"], row["num_response_tokens"]) for row in page["rows"]]
            assert (page["total"], found) == (len(rows), rows[:25])


def test_pages_follow_each_other_without_gap_or_overlap(address: str, run_path: Path) -> None:
    pages = [get(address, "samples", run="tiny", sort="rollout_id", desc="0", page=number) for number in (0, 1, 2)]
    found = [row["rollout_id"] for page in pages for row in page["rows"]]
    assert found == [one for (one,) in query_rows(run_path, "SELECT rollout_id FROM samples ORDER BY rollout_id")[1]]
    assert [len(page["rows"]) for page in pages] == [25, 3, 0]


def test_bad_filters_are_one_line(address: str) -> None:
    for params, reason in (
        ({"run": "other"}, "run 'other' is not shown here; known: tiny."),
        ({"run": "tiny", "sort": "1; DROP TABLE sample_rows"}, "sort = '1; DROP TABLE sample_rows' is unknown."),
        ({"run": "tiny", "episode": "x"}, "episode = 'x': expected a whole number from 0."),
        ({"run": "tiny", "kl_min": "low"}, "kl_min = 'low': expected a number."),
    ):
        reply = ask(address, f"api/samples?{urlencode(params)}")
        assert reply.status == 400
        assert error_of(reply).startswith(reason)
    for rollout in ("../../etc/passwd", "' OR 1 = 1 --", "0/0/99"):
        reply = ask(address, f"api/response?{urlencode({'run': 'tiny', 'episode': 0, 'rollout': rollout})}")
        assert reply.status == 400
        assert "is not scored in this run; the nearest is" in error_of(reply)


def test_a_response_has_the_numbers_of_the_views(address: str, run_path: Path) -> None:
    found = get(address, "response", run="tiny", episode=1, rollout="1/0/1")
    sql = "SELECT token_id, text, student_logprob, teacher_logprob, teacher_rank, topk_ids, topk_logprobs FROM tokens WHERE rollout_id = '1/0/1' ORDER BY position"
    rows = query_rows(run_path, sql)[1]
    tokens = found["tokens"]
    assert len(rows) == found["num_response_tokens"] == len(tokens["id"])
    for place, (token_id, text, student, teacher, rank, topk_ids, topk_logprobs) in enumerate(rows):
        assert (tokens["id"][place], tokens["rank"][place], tokens["topk_ids"][place]) == (token_id, rank, topk_ids)
        assert found["texts"][str(token_id)] == text
        assert tokens["student"][place] == pytest.approx(student, abs=1e-5)
        assert tokens["teacher"][place] == pytest.approx(teacher, abs=1e-5)
        assert tokens["topk_logprobs"][place] == pytest.approx(topk_logprobs, abs=1e-5)
    siblings = [(one["episode"], one["rollout_id"]) for one in found["siblings"]]
    assert siblings == [(0, "0/0/0"), (0, "0/0/1"), (1, "1/0/0"), (1, "1/0/1")]


def test_the_overview_has_the_figures_of_the_ready_queries(address: str, run_path: Path) -> None:
    (run,) = get(address, "overview")
    sql = "SELECT episode, sum(reverse_kl_sum) / sum(num_scored_tokens) FROM samples GROUP BY 1 ORDER BY 1"
    assert list(zip(run["scored"]["episode"], run["scored"]["reverse_kl"], strict=True)) == [
        (episode, pytest.approx(value)) for episode, value in query_rows(run_path, sql)[1]
    ]
    sql = "SELECT avg(correct::INT) FROM evals WHERE subject = 'policy=2' AND mode = 'sampled'"
    place = list(zip(run["evals"]["subject"], run["evals"]["mode"], strict=True)).index(("policy=2", "sampled"))
    assert run["evals"]["accuracy"][place] == pytest.approx(query_rows(run_path, sql)[1][0][0])
    assert run["steps"]["entropy"] == [
        one for (one,) in query_rows(run_path, "SELECT entropy FROM steps ORDER BY step")[1]
    ]
    assert (run["episodes_done"], run["num_episodes"]) == (2, 2)
    assert set(run["speed"]["stage"]) == {"rollout", "score", "learn"}
    assert len(run["teacher_entropy"]["entropy"]) == 2


def test_several_runs_are_asked_by_name_and_side_by_side(serve: Serve, run_path: Path, copied_run: Path) -> None:
    server = serve(tiny=run_path, other=copied_run)
    assert [run["name"] for run in get(server.url, "overview")] == ["tiny", "other"]
    sql = "SELECT (SELECT count(*) FROM tiny.samples), (SELECT count(*) FROM other.samples)"
    assert json.loads(post(server.url, sql, "").body)["rows"] == [[28, 28]]
    assert get(server.url, "samples", run="other")["total"] == 28


# A run that goes on


def test_a_sealed_episode_appears_and_what_was_there_stays(
    serve: Serve, copied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "RECHECK_S", 0.0)
    shutil.move(copied_run / "episode=1", tmp_path / "later")
    server = serve(copy=copied_run)
    before = get(server.url, "samples", run="copy")
    key = get(server.url, "keys")
    assert {row["episode"] for row in before["rows"]} == {0}
    assert get(server.url, "keys") == key
    shutil.move(tmp_path / "later", copied_run / "episode=1")
    assert get(server.url, "keys") != key
    after = get(server.url, "samples", run="copy", text="sort")
    sql = "SELECT rollout_id, reverse_kl_mean FROM samples WHERE contains(prompt_text, 'sort') ORDER BY 2 DESC, 1"
    assert [(row["rollout_id"], row["reverse_kl_mean"]) for row in after["rows"]] == query_rows(copied_run, sql)[1]
    assert {row["episode"] for row in after["rows"]} == {0, 1}


def test_unsealed_stages_are_left_out_unless_partial(serve: Serve, copied_run: Path) -> None:
    (copied_run / f"episode=1/scores/teacher=main/{SEAL}").unlink()
    sealed, partial = serve(copy=copied_run), serve(partial=True, copy=copied_run)
    assert get(sealed.url, "samples", run="copy")["total"] == 14
    assert get(partial.url, "samples", run="copy")["total"] == 28
    (health,) = get(sealed.url, "health")
    assert health["left_out"] == [
        "episode 1: scores of main not sealed (2 of 2 shards published), left out; --partial includes the published shards"
    ]


def test_a_run_without_scores_has_an_overview_and_no_samples(serve: Serve, copied_run: Path) -> None:
    for episode in (0, 1):
        shutil.rmtree(copied_run / f"episode={episode}/scores")
    server = serve(copy=copied_run)
    (run,) = get(server.url, "overview")
    assert run["episodes"]["responses"] == [14, 14]
    assert run["scored"] == {}
    assert get(server.url, "samples", run="copy")["rows"] == []


def test_health_finds_gaps_failures_slow_shards_and_what_was_moved_aside(serve: Serve, copied_run: Path) -> None:
    episode = copied_run / "episode=1"
    (health,) = get(serve(copy=copied_run).url, "health")
    assert (health["gaps"], health["failed"], health["moved_aside"], health["left_out"]) == ([], [], [], [])
    shutil.copytree(episode / "scores/teacher=main", episode / "scores/teacher=main.old")
    (copied_run / "quarantine").mkdir()
    (copied_run / "quarantine/shard-00000-of-00002.parquet").write_text("bad")
    (episode / "scores/teacher=main/shard-00001-of-00002.parquet").unlink()
    (episode / f"rollouts/{SEAL}").rename(episode / "rollouts/was")
    (episode / "rollouts/shard-00000-of-00002.parquet").unlink()
    failed = {"file": "episode=1/rollouts/shard-00000-of-00002.parquet", "stage": "rollout", "error": "ValueError", "message": "no", "time": "t", "host": "h", "pid": 1}  # fmt: skip
    (copied_run / "logs/rollout/episode=1/rollouts-shard-00000.failed.json").write_text(json.dumps(failed))
    note = copied_run / "logs/rollout/episode=0/rollouts-shard-00001.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "seconds": 1000.0}))
    (health,) = get(serve(copy=copied_run).url, "health")
    assert [(gap["stage"], gap["is_sealed"], gap["missing"]) for gap in health["gaps"]] == [
        ("rollout", False, [0]),
        ("score", True, [1]),
    ]
    assert "No files found" in health["fault"]
    shutil.copy(episode / "scores/teacher=main.old/shard-00001-of-00002.parquet", episode / "scores/teacher=main")
    (health,) = get(serve(copy=copied_run).url, "health")
    assert health["failed"] == [failed]
    assert health["moved_aside"] == ["episode=1/scores/teacher=main.old", "quarantine/shard-00000-of-00002.parquet"]
    assert "episode=0/rollouts/shard-00001-of-00002.parquet" in [shard["file"] for shard in health["slow"]]


# The command


def refused(*arguments: object) -> str:
    done = run_command(*map(str, arguments))
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    return line


def test_what_cannot_be_served_is_one_line(run_path: Path, copied_run: Path, tmp_path: Path) -> None:
    assert refused("serve", tmp_path / "none") == (
        f"MissingInputError: {tmp_path}/none: no run.json; this is no run directory. Start one: opd-cache run RECIPE run_dir={tmp_path}/none"
    )
    assert refused("serve", run_path, "--run", "x").startswith("ConfigError: --run 'x': expected NAME=PATH")
    assert "'a-b' cannot name a run" in refused("serve", run_path, "--run", f"a-b={run_path}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused("serve", run_path, "--port", port) == (
            f"ConfigError: --host 127.0.0.1 --port {port}: Address already in use. Give another port, or --port 0 for any that is free."
        )
    assert "--host no.such.host.invalid" in refused("serve", run_path, "--host", "no.such.host.invalid")
    edit_json(copied_run / "run.json", schema_version=SCHEMA_VERSION + 1)
    for command in ("serve", "report"):
        assert f"schema version {SCHEMA_VERSION + 1}, this opd-cache reads" in refused(command, copied_run)


def test_other_machines_reach_it_only_when_asked_for(serve: Serve, run_path: Path) -> None:
    assert serve(tiny=run_path).is_local
    assert serve(tiny=run_path, host="localhost").is_local
    everywhere = serve(tiny=run_path, host="0.0.0.0")
    assert not everywhere.is_local
    assert socket.gethostname() in everywhere.url
    local = everywhere.url.replace(socket.gethostname(), "127.0.0.1")
    for host, status in (("10.1.2.3", 200), (socket.gethostname(), 200), ("evil.example", 403)):
        assert ask(local, "api/about", Host=host).status == status


def test_a_wide_open_host_is_warned_of_and_ctrl_c_ends_it(run_path: Path) -> None:
    command = opd_cache_command("serve", str(run_path), "--host", "0.0.0.0", "--port", "0")

    def as_from_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would the server

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_from_a_terminal
    ) as process:
        assert process.stdout.readline().startswith(f"open http://{socket.gethostname()}:")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors.splitlines() == [
        "--host 0.0.0.0: whoever reaches this machine and learns the address can read the run; it is not encrypted.",
        "ended.",
    ]


def test_a_damaged_shard_is_one_line_and_the_server_goes_on(serve: Serve, copied_run: Path) -> None:
    server = serve(copy=copied_run)
    shard = copied_run / "episode=1/scores/teacher=main/shard-00000-of-00002.parquet"
    time.sleep(0.1)  # the first look at the run is done
    shard.write_bytes(shard.read_bytes()[:-100])
    fresh = serve(copy=copied_run)
    assert ask(fresh.url, "api/overview").status == 400
    assert ask(fresh.url, "api/about").status == 200
    assert ask(server.url, "api/about").status == 200


def test_runs_are_looked_at_before_anything_is_served(tmp_path: Path, run_path: Path) -> None:
    runs = Runs({"tiny": run_path, "none": tmp_path / "none"}, False, DEFAULT_LIMITS)
    with pytest.raises(FileNotFoundError, match="no run directory"):
        runs.check()
    with pytest.raises(ConfigError, match="run 'x' is not shown here; known: tiny, none"):
        runs.named("x")
