"""Figures of plots/data.py, as papers want them: small, in colours that everybody can tell apart, without a title."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator, PercentFormatter

from opd_cache.errors import visible
from opd_cache.plots.data import Chosen, Curve, curve, positions, token_shares

# Okabe and Ito's, without yellow, which is too light for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "opd-cache",
}
WIDTH = 5.5  # inches: a text column
KL_LABEL = "reverse KL (nats/token)"
DECADE = 10.0  # from this ratio of the largest to the smallest value on, the axis is logarithmic


def draw(kind: str, runs: Sequence[Chosen], title: str | None) -> Figure:
    """A figure of these runs. Raises what plots/data.py raises."""
    kinds: dict[str, Callable[[Sequence[Chosen]], Figure]] = {
        "curve": draw_curve,
        "position": draw_positions,
        "tokens": draw_tokens,
    }
    with rc_context(STYLE):
        figure = kinds[kind](runs)
        if title is not None:
            figure.suptitle(title, parse_math=False)
    return figure


def save(figure: Figure, file: BinaryIO, ending: str) -> None:
    """Write it; the same figure gives the same bytes."""
    with rc_context(STYLE), warnings.catch_warnings():
        # Tokens in scripts that the font does not have are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(ending)
        figure.savefig(file, format=ending[1:], dpi=200, metadata=metadata)


def draw_curve(runs: Sequence[Chosen]) -> Figure:
    """Accuracy above, reverse KL below, by policy version."""
    curves = {chosen.name: curve(chosen) for chosen in runs}
    has_accuracy = any(found.sampled or found.greedy for found in curves.values())
    figure = Figure(figsize=(WIDTH, 4.6 if has_accuracy else 2.6), layout="constrained")
    axes = list(figure.subplots(2 if has_accuracy else 1, 1, sharex=True, squeeze=False)[:, 0])
    if has_accuracy:
        _draw_accuracy(axes[0], curves)
    _draw_kl(axes[-1], curves)
    axes[-1].set_xlabel("policy version (episodes learned)")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_accuracy(axis: Axes, curves: dict[str, Curve]) -> None:
    for color, (name, found) in zip(_colors(curves), curves.items(), strict=True):
        prefix = _prefix(name, curves)
        axis.plot(*_xy(found.sampled), "o-", color=color, label=f"{prefix}sampled")
        if found.greedy:
            axis.plot(*_xy(found.greedy), "s--", color=color, alpha=0.55, label=f"{prefix}greedy")
        if found.teacher is not None:
            axis.axhline(found.teacher, color=color if len(curves) > 1 else "0.35", linestyle=":", label=f"{prefix}teacher, sampled")  # fmt: skip
    axis.set_ylabel("held-out accuracy")
    axis.set_ylim(0, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axis)


def _draw_kl(axis: Axes, curves: dict[str, Curve]) -> None:
    for color, (name, found) in zip(_colors(curves), curves.items(), strict=True):
        prefix = _prefix(name, curves)
        axis.plot(*_xy(found.training_kl), "-", color=color, label=f"{prefix}training prompts")
        if found.heldout_kl:
            axis.plot(
                *_xy(found.heldout_kl), "o", color=color, markerfacecolor="white", label=f"{prefix}held-out prompts"
            )
    _scale(axis, [value for found in curves.values() for _, value in (*found.training_kl, *found.heldout_kl)])
    axis.set_ylabel(KL_LABEL)
    _legend(axis)


def draw_positions(runs: Sequence[Chosen]) -> Figure:
    """A panel a run, a line an episode."""
    found = {chosen.name: positions(chosen).lines for chosen in runs}
    figure = Figure(figsize=(WIDTH if len(runs) == 1 else 3.2 * len(runs) + 0.8, 3.0), layout="constrained")
    axes = list(figure.subplots(1, len(runs), sharey=True, squeeze=False)[0])
    episodes = [episode for lines in found.values() for episode in lines]
    # The lightest fifth of the map cannot be seen on white.
    shade = Normalize(min(episodes), max(episodes) + max(1, (max(episodes) - min(episodes)) * 0.2))
    colormap = colormaps["viridis"]
    for axis, (name, lines) in zip(axes, found.items(), strict=True):
        for episode, points in lines.items():
            axis.plot(*_xy(points), color=colormap(shade(episode)), label=f"episode {episode}")
        axis.set_xlabel("place in the response (tokens)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(runs) > 1:
            axis.set_title(name, fontsize=9, parse_math=False)
    _scale(axes[0], [value for lines in found.values() for points in lines.values() for _, value in points])
    axes[0].set_ylabel(KL_LABEL)
    if len(set(episodes)) > 1:
        bar = figure.colorbar(ScalarMappable(shade, colormap), ax=axes, label="episode", pad=0.02)
        bar.ax.set_ylim(min(episodes), max(episodes))
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_tokens(runs: Sequence[Chosen]) -> Figure:
    """A panel of bars a run, the largest share on top."""
    found = {chosen.name: token_shares(chosen) for chosen in runs}
    rows = max(len(tokens) for _, tokens in found.values())
    figure = Figure(figsize=(WIDTH if len(runs) == 1 else 3.4 * len(runs), 0.75 + 0.23 * rows), layout="constrained")
    axes = list(figure.subplots(1, len(runs), squeeze=False)[0])
    for axis, color, (name, (episode, tokens)) in zip(axes, _colors(found), found.items(), strict=True):
        bars = axis.barh(range(len(tokens)), [token.share for token in tokens], color=color, height=0.72)
        axis.bar_label(bars, [f"{token.mean:.2f}" for token in tokens], padding=3, fontsize=7.5, color="0.3")
        axis.set_yticks(range(len(tokens)), [f"“{visible(token.text)}”" for token in tokens], parse_math=False)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.12)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if tokens[0].share > 0.05 else 1))
        prefix = "" if len(runs) == 1 else f"{name}, "
        axis.set_title(f"{prefix}episode {episode}", fontsize=9, parse_math=False)
        axis.set_xlabel("share of the reverse KL\n(numbers: mean, nats/token)")
    return figure


def _colors(runs: Sequence[Any] | dict[str, Any]) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(len(runs))]


def _prefix(name: str, runs: dict[str, Any]) -> str:
    return "" if len(runs) == 1 else f"{name}: "


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _scale(axis: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values are positive and span a decade; else from zero, or below where some are negative."""
    if values and min(values) > 0 and max(values) / min(values) >= DECADE:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    else:
        axis.set_ylim(bottom=min(0.0, *values) * 1.05 if values else 0.0)


def _legend(axis: Axes) -> None:
    _, labels = axis.get_legend_handles_labels()
    legend = axis.legend(ncols=1 if len(labels) <= 3 else 2)
    for text in legend.get_texts():
        text.set_parse_math(False)
