"""From the text of a prompt, or its chat messages, to checked token ids: the student's prompts and a teacher's own."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from opd_cache.errors import PromptError

PROMPTS_PER_BATCH = 1024
MAX_NAMED_FIELDS = 20
PLACE = re.compile(r"\{(\w+)\}")
# JSON can spell half of a surrogate pair, which is no character: no tokenizer and no Parquet file takes it.
SURROGATE = re.compile("[\ud800-\udfff]")

Messages = list[dict[str, Any]]


class Fault(NamedTuple):
    """Why a prompt cannot be used, and how it is counted where such prompts are skipped."""

    said: str
    kind: str


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with all that decides which ids a prompt becomes."""

    tokenizer: Any
    num_embeddings: int  # every id must be below it
    model: str  # whose prompt it is, for messages: "the student"
    section: str  # of the recipe, for messages: "prompts"
    apply_chat_template: bool
    chat_template_kwargs: dict[str, Any]

    def encode(self, prompts: Sequence[tuple[str, Messages | None]]) -> Iterator[list[int] | Fault]:
        """Token ids of each (text, messages), or what is wrong with it. Raises PromptError without a chat template."""
        for ids in self._ids(prompts):
            yield ids if isinstance(ids, Fault) else self._fault(ids) or ids

    def _ids(self, prompts: Sequence[tuple[str, Messages | None]]) -> Iterator[list[int] | Fault]:
        if not self.apply_chat_template:
            yield from self.tokenizer([text for text, _ in prompts])["input_ids"]
            return
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise PromptError(
                f"{self.section}.apply_chat_template is true, but {self.model}'s tokenizer has no chat template."
            )
        for _, messages in prompts:
            yield self._templated(messages or [])

    def _templated(self, messages: Messages) -> list[int] | Fault:
        from jinja2 import TemplateError

        # A template computes with what the messages hold, and so may fail as any program does.
        errors = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self.chat_template_kwargs
            )
        except errors as error:
            reason = " ".join(str(error).split()).rstrip(".")
            return Fault(f"the chat template fails ({reason})", "refused by the chat template")

    def _fault(self, ids: list[int]) -> Fault | None:
        if not ids:
            return Fault("the prompt has no tokens", "empty")
        if (largest := max(ids)) >= self.num_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            return Fault(
                f"the prompt has token id {largest} ({token!r}), {self.model} has {self.num_embeddings} embeddings",
                "with an unknown token",
            )
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:
            return Fault(
                f"the prompt begins with {self.tokenizer.bos_token!r} twice; leave it out where the tokenizer or the chat template adds it",
                "with a second BOS",
            )
        return None


def fill_template(template: str, record: dict[str, Any], key: str) -> tuple[str | None, str]:
    """(fault or None, the template with every {field} filled from the record). `key` names the template."""
    for name in PLACE.findall(template):
        if name not in record:
            return f"{key} needs the field {name!r}; found: {named_fields(record)}", ""
        if record[name] is None or is_no_text(record[name]):
            return f"{name!r} must be a text or a number, since {key} uses it", ""
    return None, PLACE.sub(lambda match: str(record[match.group(1)]), template)


def user_turn(text: str, system_prompt: str | None) -> Messages:
    """A text as chat messages."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    return [*system, {"role": "user", "content": text}]


def is_no_text(value: Any) -> bool:
    """Whether its text would be Python's and not the source's: true → True, a list → its repr."""
    return isinstance(value, bool | bytes | list | dict) or (isinstance(value, str) and bool(SURROGATE.search(value)))


def named_fields(record: dict[str, Any]) -> str:
    names = [repr(name) for name in islice(record, MAX_NAMED_FIELDS)]
    return ", ".join(names + ["..."] * (len(record) > MAX_NAMED_FIELDS)) or "nothing"
