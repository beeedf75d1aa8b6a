"""opd-cache inspect."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opd_cache.errors import ConfigError

if TYPE_CHECKING:
    from opd_cache.inspection.read import Response


@click.command(
    epilog="Without ROLLOUT: what --prompt or --worst names, else the last episode's farthest from the teacher."
)
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("rollout", required=False, metavar="[ROLLOUT]")
@click.option("--episode", type=click.IntRange(min=0), help="Only of this episode.")
@click.option("--prompt", type=click.IntRange(min=0), help="All samples of the prompt with this index.")
@click.option("--teacher", help="As this teacher sees it; without it, the first by name.")
@click.option("--logprobs", is_flag=True, help="A table with one row a token.")
@click.option("--top-k", "with_topk", is_flag=True, help="The same with the cached alternatives.")
@click.option("--worst", type=click.IntRange(min=1), metavar="N", help="The N worst tokens in context.")
@click.option("--diff", type=(click.IntRange(min=0), click.IntRange(min=0)), metavar="E1 E2", help="The prompt in two episodes.")  # fmt: skip
@click.option("--partial", is_flag=True, help="Read published shards of stages that are not sealed, too.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(
    run_dir: Path,
    rollout: str | None,
    episode: int | None,
    prompt: int | None,
    teacher: str | None,
    logprobs: bool,
    with_topk: bool,
    worst: int | None,
    diff: tuple[int, int] | None,
    partial: bool,
    as_json: bool,
) -> None:
    """Show responses token by token, coloured by teacher − student log-prob.

    Example: opd-cache inspect runs/quickstart --worst 20
    """
    from opd_cache.inspection.read import Wanted, read_responses, read_two_episodes, read_worst, teachers_of
    from opd_cache.store.query import connect

    if worst is not None and diff is not None:
        raise ConfigError("--worst and --diff show different things; give one of them.")
    connection, wanted = connect(run_dir, partial=partial), Wanted(rollout, episode, prompt, teacher)
    if worst is not None:
        tokens = read_worst(connection, wanted, worst)
        if as_json:
            _print_json([asdict(token) for token in tokens])
            return
        from opd_cache.inspection.show import show_worst

        show_worst(_console(), tokens)
        return
    both = [read_responses(connection, wanted)] if diff is None else read_two_episodes(connection, wanted, *diff)
    if as_json:
        found = [[asdict(response) for response in responses] for responses in both]
        _print_json(found[0] if diff is None else found)
        return
    from opd_cache.inspection.show import show_logprobs, show_response, show_two_episodes
    from opd_cache.run_dir import REMOVED, RunDir

    console = _console()
    if diff is not None:
        show_two_episodes(console, both)
        return
    for response in both[0]:
        _check_topk(response, with_topk)
    for response in both[0]:
        others = [name for name in teachers_of(connection, response) if name != response.teacher]
        removed = RunDir(run_dir).policy_after(response.policy_version - 1) / REMOVED
        show_response(console, response, others, removed.exists())
        if logprobs or with_topk:
            show_logprobs(console, response, with_topk)


def _check_topk(response: "Response", with_topk: bool) -> None:
    if with_topk and response.tokens and not any(token.topk for token in response.tokens):
        raise ConfigError(
            f"--top-k: teacher {response.teacher} scored episode {response.episode} with score.top_k=0; no alternatives are cached."
        )


def _print_json(found: Any) -> None:
    from opd_cache.commands.output import plain

    click.echo(json.dumps(plain(found), ensure_ascii=False, allow_nan=False))


def _console() -> Any:
    from opd_cache.commands.output import text_console

    return text_console(sys.stdout)
