"""From responses to right or wrong: extracted answers compared, as evaluations and the reward exact_match do; and pass@k."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_cache.types import Int32Array, Prompt, Rollout

# A leading $ or \$, thousands commas, and a trailing %, \% or full stop are how a plain number may be dressed.
DRESSED_NUMBER = re.compile(r"(?:\\?\$)?(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?:\\?%)?\.?")


@dataclass(frozen=True)
class Response:
    """What a grader or a task reward sees of a sampled response and of its prompt."""

    text: str  # decoded, without special tokens
    answer: str | None  # the expected one, as the source of the prompt has it
    prompt_id: str
    response_ids: Int32Array  # [R]
    finish_reason: str
    answer_pattern: str | None  # finds the answer in the text
    reference_pattern: str | None  # finds it in the expected answer


def response_of(
    rollout: Rollout, prompt: Prompt, tokenizer: Any, answer_pattern: str | None, reference_pattern: str | None
) -> Response:
    """A rollout, made ready to be graded."""
    return Response(
        text=tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
        answer=prompt.answer,
        prompt_id=prompt.prompt_id,
        response_ids=rollout.response_ids,
        finish_reason=rollout.finish_reason,
        answer_pattern=answer_pattern,
        reference_pattern=reference_pattern,
    )


def grade(response: Response) -> tuple[bool | None, str | None]:
    """(whether it is right, the answer extracted from it); neither right nor wrong, None, where no answer is expected."""
    found = extract(response.text, response.answer_pattern)
    expected = None if response.answer is None else extract(response.answer, response.reference_pattern)
    return (None if expected is None else is_same_answer(found, expected)), found


def exact_match(response: Response) -> float | None:
    """The task reward 1 for a right answer, 0 for a wrong one; None where no answer is expected."""
    is_correct, _ = grade(response)
    return None if is_correct is None else float(is_correct)


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
