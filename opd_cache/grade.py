"""From responses to right or wrong: extracted answers compared, and pass@k."""

import math
import re
from collections.abc import Sequence

# A leading $ or \$, thousands commas, and a trailing %, \% or full stop are how a plain number may be dressed.
DRESSED_NUMBER = re.compile(r"(?:\\?\$)?(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?:\\?%)?\.?")


def extract(text: str, pattern: str | None) -> str | None:
    """The answer in a text: the last match's first group (or all of it); the whole text without a pattern; None when
    the pattern is not there, or matches without that group."""
    if pattern is None:
        return text.strip()
    match = None
    for match in re.finditer(pattern, text):  # noqa: B007
        pass
    if match is None:
        return None
    answer: str | None = match.group(1 if match.re.groups else 0)
    return None if answer is None else answer.strip()


def is_same_answer(found: str | None, expected: str) -> bool:
    """Whether two answers are the same text.

    Where both are plain numbers, they are compared without a leading $ or \\$, thousands commas, and a trailing %, \\% or
    full stop: `57,500` is `57500`, `\\$18` is `18`. Nothing else is worked out: `18.00` is not `18`, `1/2` is not `0.5`.
    """
    if found is None or found == expected:
        return found is not None
    ours, theirs = DRESSED_NUMBER.fullmatch(found), DRESSED_NUMBER.fullmatch(expected)
    return ours is not None and theirs is not None and _undressed(ours) == _undressed(theirs)


def _undressed(number: re.Match[str]) -> str:
    return number.group(1).replace(",", "")


def pass_at_k(correct: Sequence[int], num_samples: int, k: int) -> float:
    """Mean probability that at least one of k samples is right, from `correct` right ones among `num_samples` a prompt.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2021: 1 − C(n − c, k) / C(n, k).
    """
    total = math.comb(num_samples, k)
    return sum(1 - math.comb(num_samples - c, k) / total for c in correct) / len(correct)
