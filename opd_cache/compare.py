"""What two runs made of the same episodes: their metrics side by side, and whether their weights are the same bits."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from opd_cache.fingerprint import WEIGHTS
from opd_cache.run_dir import COMPLETE, RunDir
from opd_cache.store.publish import read_json
from opd_cache.store.shards import read_row_groups


def compare_episodes(original: RunDir, replay: RunDir, episodes: Sequence[int]) -> list[dict[str, Any]]:
    """One entry an episode. A side that has not learned it is None; so is `same_weights` then."""
    return [
        {
            "episode": episode,
            "original": episode_figures(original, episode),
            "replay": episode_figures(replay, episode),
            "same_weights": have_same_weights(original, replay, episode),
        }
        for episode in episodes
    ]


def episode_figures(run: RunDir, episode: int) -> dict[str, Any] | None:
    """An episode's steps in a few numbers: the loss as token mean, others as means over its steps."""
    path = run.steps(episode)
    rows = [row for table in read_row_groups(path) for row in table.to_pylist()] if path.exists() else []
    if not rows:
        return None
    tokens = sum(row["tokens"] for row in rows)
    return {
        "steps": len(rows),
        "tokens": tokens,
        "loss": sum(row["loss"] * row["tokens"] for row in rows) / max(tokens, 1),
        "reverse_kl_first": rows[0]["reverse_kl"],
        "reverse_kl_last": rows[-1]["reverse_kl"],
        "ess": _mean(rows, "ess"),
        "grad_norm": _mean(rows, "grad_norm"),
    }


def _mean(rows: Sequence[dict[str, Any]], column: str) -> float | None:
    """None where the steps are older than the column."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return sum(values) / len(values) if values else None


def have_same_weights(original: RunDir, replay: RunDir, episode: int) -> bool | None:
    """Whether the policies after an episode are equal bit for bit, by their manifests; None when one is not there."""
    digests = [_weight_digests(run, episode) for run in (original, replay)]
    return None if None in digests else digests[0] == digests[1]


def _weight_digests(run: RunDir, episode: int) -> dict[str, str] | None:
    path = run.policy_after(episode) / COMPLETE
    if not path.exists():
        return None
    manifest = read_json(path)
    files = {name: digest for name, digest in manifest["files"].items() if _is_weights(PurePath(name))}
    return {"fingerprint": manifest["fingerprint"], **files}


def _is_weights(path: PurePath) -> bool:
    """Whether a file of a policy holds its weights; the optimizer's state lies in a folder below."""
    return path.suffix in WEIGHTS and len(path.parts) == 1


def comparison_table(comparison: dict[str, Any]) -> Any:
    """The comparison of a replay for people: a rich renderable."""
    from rich.table import Table

    changed = ", ".join(f"{key}={value}" for key, value in comparison["overrides"].items()) or "nothing changed"
    # Without padding, its nine columns fit into 80 characters.
    table = Table(title=f"{comparison['run']} replayed into {comparison['into']}: {changed}", padding=0)
    for column in ("episode", "", "steps", "tokens", "loss", "reverse KL", "ESS", "grad norm", "weights"):
        table.add_column(column, justify="right" if column else "left")
    words = {None: "-", True: "same bits", False: "differ"}
    for entry in comparison["episodes"]:
        table.add_row(str(entry["episode"]), "original", *_cells(entry["original"]), "")
        table.add_row("", "replay", *_cells(entry["replay"]), words[entry["same_weights"]])
    return table


def _cells(figures: dict[str, Any] | None) -> list[str]:
    if figures is None:
        return ["-"] * 6
    return [
        str(figures["steps"]),
        f"{figures['tokens']:,}",
        f"{figures['loss']:.4f}",
        f"{figures['reverse_kl_first']:.3f} → {figures['reverse_kl_last']:.3f}",
        *("-" if figures[name] is None else f"{figures[name]:.3f}" for name in ("ess", "grad_norm")),
    ]
