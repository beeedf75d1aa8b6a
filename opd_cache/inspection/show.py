"""Responses on a terminal: each token coloured by teacher − student, tables of log-probs, two episodes side by side."""

from collections.abc import Iterable, Sequence
from math import exp

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from opd_cache.errors import visible
from opd_cache.inspection.read import Response, Token, WorstToken

# (teacher − student below this, style, words of the legend); in nats.
BANDS = (
    (-5.0, "bold white on red", "below −5"),
    (-2.0, "red", "−5 to −2"),
    (-0.5, "yellow", "−2 to −0.5"),
    (0.5, "", "−0.5 to 0.5"),
    (float("inf"), "green", "above 0.5"),
)
UNSCORED = "dim"
PLAIN_WIDTH = 160  # of two columns in plain text
MARKED_BELOW = -2.0  # in plain text, where there are no colours


def show_response(
    console: Console, response: Response, other_teachers: Sequence[str], policy_removed: bool = False
) -> None:
    """Who, how far from the teacher, the prompt and the coloured response."""
    heading = _heading(response, other_teachers, policy_removed)
    _print(console, *heading, legend(console), "", _prompt(response), _body(console, response))


def show_logprobs(console: Console, response: Response, with_topk: bool) -> None:
    """A table with one row a token."""
    table = Table()
    numbers = ("place", "id", "student", "teacher", "T − S", "rank")
    for name in ("place", "token", "id", "student", "teacher", "T − S", "rank"):
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    if with_topk:
        table.add_column("the teacher's likeliest, and the rest", overflow="fold")
    for token in response.tokens:
        cells = [str(token.position), visible(token.text), str(token.token_id), _number(token.student_logprob)]
        cells += [_number(token.teacher_logprob), _number(token.advantage), _rank(token)]
        style = style_of(token.advantage)
        table.add_row(*(Text(cell, style) for cell in cells), *([_alternatives(token)] if with_topk else []))
    _print(console, table)


def show_worst(console: Console, worst: Iterable[WorstToken]) -> None:
    """The worst tokens, each in its context."""
    table = Table()
    for name in ("rollout", "scored by", "place", "T − S", "student", "teacher"):
        table.add_column(name, justify="left" if name in ("rollout", "scored by") else "right", no_wrap=True)
    table.add_column("context", overflow="fold")
    for token in worst:
        context = Text.assemble(
            (visible(token.before), UNSCORED), (f"⟦{visible(token.text)}⟧", style_of(token.advantage)), (visible(token.after), UNSCORED)
        )  # fmt: skip
        numbers = (_number(token.advantage), _number(token.student_logprob), _number(token.teacher_logprob))
        table.add_row(token.rollout_id, token.teacher, str(token.position), *numbers, context)
    _print(console, table)


def show_two_episodes(console: Console, both: Sequence[Sequence[Response]]) -> None:
    """The samples of one prompt in two episodes, one column each."""
    width = min(console.width, PLAIN_WIDTH) if not console.is_terminal else None
    titles = (f"episode {responses[0].episode}" for responses in both)
    table = Table(*titles, show_lines=True, expand=True, width=width)
    for column in table.columns:
        column.overflow, column.ratio = "fold", 1
    for index in range(max(map(len, both))):
        pair = [responses[index] if index < len(responses) else None for responses in both]
        table.add_row(*("" if one is None else Group(*_heading(one, ()), _body(console, one)) for one in pair))
    _print(console, _prompt(both[0][0]), legend(console), table)


def style_of(advantage: float | None) -> str:
    if advantage is None:
        return UNSCORED
    return next(style for limit, style, _ in BANDS if advantage < limit or limit == float("inf"))


def legend(console: Console) -> Text:
    """What the colours mean, or the marks where there are none."""
    if not has_colours(console):
        return Text(f"tokens with teacher − student below {_number(MARKED_BELOW)} nats are marked ⟦token T−S⟧")
    text = Text("teacher − student, nats: ")
    for _, style, words in BANDS:
        text.append(f" {words} ", style)
        text.append(" ")
    return text.append(" not scored ", UNSCORED)


def has_colours(console: Console) -> bool:
    return console.is_terminal and not console.no_color and console.color_system is not None


def _heading(response: Response, other_teachers: Sequence[str], policy_removed: bool = False) -> list[Text]:
    removed = ", removed by the retention rule" if policy_removed else ""
    who = f"rollout {response.rollout_id} · episode {response.episode} · prompt {response.prompt_index}, sample {response.sample_index} · policy {response.policy_version}{removed} · teacher {response.teacher}"
    if other_teachers:
        who += f" (also: {', '.join(other_teachers)})"
    parts = [f"{response.num_response_tokens} tokens", response.finish_reason]
    if response.reverse_kl_mean is not None:
        parts.insert(0, f"reverse KL {response.reverse_kl_mean:.3f} nats a token, {response.reverse_kl_sum:.2f} in all")
    if response.reward is not None:
        parts.append(f"reward {response.reward:g}")
    if response.error is not None:
        parts.append(f"not scored: {visible(response.error)}")
    return [Text(who, "bold"), Text(" · ".join(parts))]


def _prompt(response: Response) -> Text:
    return Text.assemble(("prompt: ", "bold"), _lines(response.prompt_text or ""))


def _body(console: Console, response: Response) -> Text:
    text, coloured = Text.assemble(("response: ", "bold")), has_colours(console)
    for token in response.tokens:
        shown = _lines(token.text)
        is_marked = not coloured and token.advantage is not None and token.advantage < MARKED_BELOW
        text.append(f"⟦{visible(token.text)} {_number(token.advantage)}⟧" if is_marked else shown, style_of(token.advantage))  # fmt: skip
    return text


def _lines(text: str) -> str:
    """Line breaks stay, visibly; everything else that a terminal would act on is escaped."""
    return "\n".join("\\n" * bool(index) + visible(line) for index, line in enumerate(text.split("\n")))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}".replace("-", "−")


def _rank(token: Token) -> str:
    return "-" if not token.teacher_rank else str(token.teacher_rank)


def _alternatives(token: Token) -> Text:
    if not token.topk:
        return Text("-")
    text = Text()
    for one in token.topk:
        text.append(f"{visible(one.text)!r} ", "bold" if one.token_id == token.token_id else "")
        text.append(f"{_number(one.logprob)}  ")
    rest = max(0.0, 1 - sum(exp(one.logprob) for one in token.topk))
    return text.append(f"rest {rest:.1%}", UNSCORED)


def _print(console: Console, *parts: RenderableType) -> None:
    for part in parts:
        console.print(part, highlight=False)
