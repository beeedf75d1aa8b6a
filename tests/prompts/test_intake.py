"""Taking prompts in: every source gives the same rows, token ids are the tokenizer's own, and no bad line passes."""

import json
import logging
import math
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import write_jsonl
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from opd_cache.config import PromptsConfig, Recipe
from opd_cache.errors import MismatchError, OpdCacheError, PromptError
from opd_cache.prompts.intake import ROWS_PER_GROUP, count_prompts, prompts_config_of, read_prompts, take_in_prompts
from opd_cache.quickstart.sort_letters import byte_tokenizer
from opd_cache.run import open_run

# Prints the roles, and what chat_template_kwargs brought.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if enable_thinking is defined %}[thinking={{ enable_thinking }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REMEDY = ". Mend it, or set prompts.on_bad_prompt=skip."


@pytest.fixture(autouse=True)
def quiet_datasets() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a <s> that it puts before every text by itself, and its chat template too."""
    backend = byte_tokenizer().backend_tokenizer
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    return tokenizer


NUM_EMBEDDINGS = 300


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; messages then name files without their folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def taken(config: PromptsConfig, tokenizer: Any) -> list[dict[str, Any]]:
    """The published rows."""
    final = Path("run") / f"prompts-{os.urandom(4).hex()}.parquet"
    take_in_prompts(config, tokenizer, NUM_EMBEDDINGS, final)
    return pq.read_table(final).to_pylist()


def decoded(rows: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row["prompt_ids"]) for row in rows]


def refusal(config: PromptsConfig, tokenizer: Any) -> str:
    """The one line that refuses these prompts, which leave nothing on disk but the folder."""
    before = {*Path().rglob("*"), Path("run")}
    with pytest.raises(PromptError) as caught:
        take_in_prompts(config, tokenizer, NUM_EMBEDDINGS, Path("run/prompts.parquet"))
    assert {*Path().rglob("*")} <= before
    message = str(caught.value)
    assert "\n" not in message
    return message


RECORDS = [
    {"id": "a", "prompt": "sort ba:", "answer": "ab"},
    {"id": "b", "prompt": "größe 😀", "answer": None},
    {"id": "c", "prompt": "  spaces stay  ", "answer": "x"},
]


def write_source(kind: str, records: list[dict[str, Any]]) -> str:
    """The records as one kind of source in the working directory; the value of prompts.path."""
    if kind == "jsonl":
        return str(write_jsonl(Path("source.jsonl"), records))
    if kind == "json":
        Path("source.json").write_text(json.dumps(records, indent=1))
        return "source.json"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), "source.parquet")
        return "source.parquet"
    dataset = datasets.Dataset.from_list(records)
    other = datasets.Dataset.from_list([{"id": "z", "prompt": "of another split", "answer": "z"}])
    saved = dataset if kind == "dataset" else datasets.DatasetDict(train=dataset, test=other)
    saved.save_to_disk("source")
    return "source"


SOURCES = ["jsonl", "json", "parquet", "dataset", "dataset_dict"]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_rows(folder: Path, tokenizer: Any, kind: str) -> None:
    rows = taken(PromptsConfig(path=write_source(kind, RECORDS)), tokenizer)
    expected = [tokenizer(record["prompt"])["input_ids"] for record in RECORDS]
    assert rows == [
        {
            "prompt_index": index,
            "prompt_id": record["id"],
            "text": record["prompt"],
            "num_prompt_tokens": len(expected[index]),
            "prompt_ids": expected[index],
            "answer": record["answer"],
            "fields": json.dumps(
                {name: value for name, value in record.items() if value is not None}, ensure_ascii=False
            ),
        }
        for index, record in enumerate(RECORDS)
    ]
    assert decoded(rows, tokenizer) == [record["prompt"] for record in RECORDS]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_can_hold_chat_messages(folder: Path, tokenizer: Any, kind: str) -> None:
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "2+2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    config = PromptsConfig(path=write_source(kind, [{"messages": messages}]), apply_chat_template=True)
    (row,) = taken(config, tokenizer)
    assert row["prompt_ids"] == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert decoded([row], tokenizer) == ["<user>1+1<assistant>2<user>2+2<assistant>"]
    assert json.loads(row["text"]) == messages
    assert (row["prompt_id"], row["answer"]) == ("line-1", None)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_can_fill_a_template(folder: Path, tokenizer: Any, kind: str) -> None:
    path = write_source(kind, [{"first": "3", "second": 4, "prompt": "not used"}])
    (row,) = taken(PromptsConfig(path=path, template="{first} + {second} + {first} = \\boxed{}?"), tokenizer)
    assert row["text"] == "3 + 4 + 3 = \\boxed{}?"
    assert decoded([row], tokenizer) == [row["text"]]


def test_fields_hold_the_texts_numbers_and_booleans_of_the_record(folder: Path, tokenizer: Any) -> None:
    plain = {"prompt": "sort ba:", "level": 3, "share": 0.25, "hard": True, "note": 'größe "😀" \n', "answer": "ab"}
    others = {"none": None, "list": [1], "nested": {"a": 1}, "blob": "x" * 100_000, "half": "\ud800", "nan": math.nan}
    (row,) = taken(PromptsConfig(path=write_source("jsonl", [plain | others])), tokenizer)
    assert json.loads(row["fields"]) == plain
    assert list(json.loads(row["fields"])) == list(plain)


def test_fields_leave_out_what_a_parquet_source_holds_beside_them(folder: Path, tokenizer: Any) -> None:
    record = {"prompt": "sort ba:", "when": datetime(2026, 1, 1), "image": b"\xff\xd8", "level": 3}
    (row,) = taken(PromptsConfig(path=write_source("parquet", [record])), tokenizer)
    assert json.loads(row["fields"]) == {"prompt": "sort ba:", "level": 3}


def test_split_of_a_saved_dataset_is_chosen(folder: Path, tokenizer: Any) -> None:
    rows = taken(PromptsConfig(path=write_source("dataset_dict", RECORDS), split="test"), tokenizer)
    assert [row["prompt_id"] for row in rows] == ["z"]


def test_fields_are_found_under_the_configured_names(folder: Path, tokenizer: Any) -> None:
    path = write_source("jsonl", [{"q": "1+1", "a": 2, "nr": 7}])
    (row,) = taken(PromptsConfig(path=path, prompt_key="q", answer_key="a", id_key="nr"), tokenizer)
    assert (row["text"], row["answer"], row["prompt_id"]) == ("1+1", "2", "7")


def test_lines_may_end_as_on_windows_and_begin_with_a_byte_order_mark(folder: Path, tokenizer: Any) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    Path("crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rows = taken(PromptsConfig(path="crlf.jsonl"), tokenizer)
    assert [row["text"] for row in rows] == [record["prompt"] for record in RECORDS]


def test_very_long_line_is_taken_whole(folder: Path, tokenizer: Any) -> None:
    path = write_source("jsonl", [{"prompt": "x" * 500_000}])
    (row,) = taken(PromptsConfig(path=path), tokenizer)
    assert row["num_prompt_tokens"] == len(row["prompt_ids"]) == 500_000


def test_the_settings_are_kept_in_the_file(folder: Path, tokenizer: Any) -> None:
    config = PromptsConfig(path=write_source("jsonl", RECORDS), limit=2, chat_template_kwargs={"a": [1]})
    take_in_prompts(config, tokenizer, NUM_EMBEDDINGS, Path("prompts.parquet"))
    assert PromptsConfig(**prompts_config_of(Path("prompts.parquet"))) == config


# Chat templates and BOS


def test_chat_template_is_applied_only_where_asked_for(folder: Path, tokenizer: Any) -> None:
    config = PromptsConfig(path=write_source("jsonl", [{"prompt": "hi"}]))
    assert decoded(taken(config, tokenizer), tokenizer) == ["hi"]
    templated = replace(config, apply_chat_template=True)
    assert decoded(taken(templated, tokenizer), tokenizer) == ["<user>hi<assistant>"]


def test_system_prompt_comes_first_unless_the_messages_have_one(folder: Path, tokenizer: Any) -> None:
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "own"}
    path = write_source("jsonl", [{"prompt": "hi"}, {"messages": [user]}, {"messages": [system, user]}])
    rows = taken(PromptsConfig(path=path, apply_chat_template=True, system_prompt="be brief"), tokenizer)
    brief = "<system>be brief<user>hi<assistant>"
    assert decoded(rows, tokenizer) == [brief, brief, "<system>own<user>hi<assistant>"]


def test_chat_template_kwargs_reach_the_template(folder: Path, tokenizer: Any) -> None:
    path = write_source("jsonl", [{"prompt": "hi"}])
    config = PromptsConfig(path=path, apply_chat_template=True, chat_template_kwargs={"enable_thinking": False})
    assert decoded(taken(config, tokenizer), tokenizer) == ["<user>hi[thinking=False]<assistant>"]


def test_bos_is_added_exactly_once(folder: Path, bos_tokenizer: Any) -> None:
    config = PromptsConfig(path=write_source("jsonl", [{"prompt": "hi"}, {"prompt": "longer one"}]))
    for rows in (taken(config, bos_tokenizer), taken(replace(config, apply_chat_template=True), bos_tokenizer)):
        for row in rows:
            assert row["prompt_ids"][0] == bos_tokenizer.bos_token_id
            assert row["prompt_ids"].count(bos_tokenizer.bos_token_id) == 1


def test_text_that_brings_a_second_bos_is_refused(folder: Path, bos_tokenizer: Any) -> None:
    path = write_source("jsonl", [{"prompt": "<s>hi"}])
    assert refusal(PromptsConfig(path=path), bos_tokenizer) == (
        f"source.jsonl:1: the prompt begins with '<s>' twice; leave it out where the tokenizer or the chat template adds it{REMEDY}"
    )


# Bad lines

GOOD = b'{"id": "good", "prompt": "sort ba:"}'
CHAT = {"apply_chat_template": True}
ROLE = "each of 'messages' needs a 'role' and a 'content', both texts"
BAD_ID = "'id' must be a text or number of 1-256 printable characters"
# (the bad line, its fault, how it is counted when skipped, settings)
BAD_LINES: list[tuple[bytes, str, str, dict[str, Any]]] = [
    (b"{prompt}", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))", "unreadable", {}),
    (b"", "the line is empty", "unreadable", {}),
    (b"  \t", "the line is empty", "unreadable", {}),
    (b'["a"]', "expected an object, found an array", "unreadable", {}),
    (b'"a"', "expected an object, found a string", "unreadable", {}),
    (b"null", "expected an object, found null", "unreadable", {}),
    (b"[" * 200_000, "not JSON (nested too deep)", "unreadable", {}),
    (b'{"prompt": "\xff"}', "not JSON ('utf-8' codec can't decode byte 0xff in position 12: invalid start byte)", "unreadable", {}),
    (b'{"prompt": "\xed\xa0\x80"}', "not JSON ('utf-8' codec can't decode byte 0xed in position 12: invalid continuation byte)", "unreadable", {}),
    (b"\0\0\0\0", "not JSON (Expecting value: line 1 column 1 (char 0))", "unreadable", {}),
    (b'{"prompt": "a\0b"}', "not JSON (Invalid control character at: line 1 column 14 (char 13))", "unreadable", {}),
    (b'{"text": "a", "x\\ny": 1}', "no 'prompt' and no 'messages'; found: 'text', 'x\\ny'", "without a prompt", {}),
    (b"{}", "no 'prompt' and no 'messages'; found: nothing", "without a prompt", {}),
    (
        json.dumps({f"k{i}": 0 for i in range(99)}).encode(),
        f"no 'prompt' and no 'messages'; found: {', '.join(repr(f'k{i}') for i in range(20))}, ...",
        "without a prompt",
        {},
    ),
    (b'{"prompt": 3}', "'prompt' must be a text", "without a prompt", {}),
    (b'{"prompt": null}', "'prompt' must be a text", "without a prompt", {}),
    (b'{"prompt": ["a"]}', "'prompt' must be a text", "without a prompt", {}),
    (b'{"prompt": ""}', "the prompt is empty", "without a prompt", {}),
    (b'{"prompt": " \\n"}', "the prompt is empty", "without a prompt", {}),
    (b'{"prompt": "\\ud83d"}', "the prompt holds half of a surrogate pair, which is no character", "without a prompt", {}),
    (b'{"prompt": "123456789"}', "the prompt has 9 tokens, more than prompts.max_prompt_tokens = 8", "too long", {"max_prompt_tokens": 8}),
    (b'{"prompt": "123"}', "the prompt has 20 tokens, more than prompts.max_prompt_tokens = 19", "too long", {"max_prompt_tokens": 19, "prompt_key": "prompt", **CHAT}),
    (b'{"prompt": "a", "id": "good"}', "id 'good' was used before, at bad.jsonl:1", "with a duplicate id", {}),
    (b'{"prompt": "a", "id": "a\\nb"}', BAD_ID, "with a bad id", {}),
    (b'{"prompt": "a", "id": ""}', BAD_ID, "with a bad id", {}),
    (b'{"prompt": "a", "id": "%s"}' % (b"x" * 300), BAD_ID, "with a bad id", {}),
    (b'{"prompt": "a", "id": ["x"]}', BAD_ID, "with a bad id", {}),
    (b'{"prompt": "a", "id": "\\udc00"}', BAD_ID, "with a bad id", {}),
    (b'{"prompt": "a", "answer": ["x"]}', "'answer' must be a text or a number", "with a bad answer", {}),
    (b'{"prompt": "a", "answer": true}', "'answer' must be a text or a number", "with a bad answer", {}),
    (b'{"prompt": "a", "answer": "\\udc00"}', "'answer' must be a text or a number", "with a bad answer", {}),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "chat messages need prompts.apply_chat_template=true", "without a prompt", {}),
    (b'{"messages": []}', "'messages' must be a list with at least one message", "without a prompt", CHAT),
    (b'{"messages": "hi"}', "'messages' must be a list with at least one message", "without a prompt", CHAT),
    (b'{"messages": ["hi"]}', ROLE, "without a prompt", CHAT),
    (b'{"messages": [{"role": "user"}]}', ROLE, "without a prompt", CHAT),
    (b'{"messages": [{"role": "user", "content": [{"text": "hi"}]}]}', ROLE, "without a prompt", CHAT),
    (b'{"messages": [{"role": 1, "content": "hi"}]}', ROLE, "without a prompt", CHAT),
    (
        b'{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}',
        "'messages' ends with the assistant's turn; the student has nothing to answer",
        "without a prompt",
        CHAT,
    ),
    (b'{"b": "x", "prompt": "y"}', "prompts.template needs the field 'id'; found: 'b', 'prompt'", "without a prompt", {"template": "{id} {prompt}"}),
    (b'{"id": null, "prompt": "y"}', "'id' must be a text or a number, since prompts.template uses it", "without a prompt", {"template": "{id} {prompt}"}),
    (b'{"id": "i", "prompt": {"a": 1}}', "'prompt' must be a text or a number, since prompts.template uses it", "without a prompt", {"template": "{id} {prompt}"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "fault", "counted", "settings"), BAD_LINES, ids=[f"{line[:24]!r}:{fault[:24]}" for line, fault, *_ in BAD_LINES]
)  # fmt: skip
def test_bad_line_is_refused_by_its_number_or_skipped_and_counted(
    folder: Path,
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
    line: bytes,
    fault: str,
    counted: str,
    settings: dict[str, Any],
) -> None:
    Path("bad.jsonl").write_bytes(b"\n".join([GOOD, line, GOOD.replace(b"good", b"last"), b""]))
    config = PromptsConfig(path="bad.jsonl", **settings)
    if "max_prompt_tokens" in settings:  # the good lines must be shorter than the bad one
        short = b'{"prompt": "1"}'
        Path("bad.jsonl").write_bytes(b"\n".join([short, line, short, b""]))
    assert refusal(config, tokenizer) == f"bad.jsonl:2: {fault}{REMEDY}"
    with caplog.at_level(logging.WARNING, "opd_cache"):
        rows = taken(replace(config, on_bad_prompt="skip"), tokenizer)
    assert [row["prompt_index"] for row in rows] == [0, 1]
    assert [record.getMessage() for record in caplog.records] == [f"prompts | bad.jsonl | skipped: 1 {counted}"]


def test_good_prompts_are_taken_in_without_a_warning(
    folder: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "opd_cache"):
        taken(PromptsConfig(path=write_source("jsonl", RECORDS)), tokenizer)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("kind", "place"),
    [("json", "source.json item 2"), ("parquet", "source.parquet row 2"), ("dataset", "source[train] row 2")],
)
def test_bad_record_of_any_source_is_named(folder: Path, tokenizer: Any, kind: str, place: str) -> None:
    path = write_source(kind, [{"prompt": "a"}, {"prompt": " "}])
    assert refusal(PromptsConfig(path=path), tokenizer) == f"{place}: the prompt is empty{REMEDY}"


def test_chat_template_that_refuses_a_conversation_names_the_line(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role\nnot supported.') }}"
    path = write_source("jsonl", [{"prompt": "a"}])
    assert refusal(PromptsConfig(path=path, apply_chat_template=True), tokenizer) == (
        f"source.jsonl:1: the chat template fails (System role not supported){REMEDY}"
    )


def test_chat_template_asked_for_but_absent_is_refused(folder: Path) -> None:
    path = write_source("jsonl", [{"prompt": "a"}])
    assert refusal(PromptsConfig(path=path, apply_chat_template=True), byte_tokenizer()) == (
        "prompts.apply_chat_template is true, but the student's tokenizer has no chat template."
    )


def test_source_without_a_usable_prompt_is_refused_with_the_counts(folder: Path, tokenizer: Any) -> None:
    Path("bad.jsonl").write_text('{"prompt": ""}\n3\n{"prompt": 1}\n')
    assert refusal(PromptsConfig(path="bad.jsonl", on_bad_prompt="skip"), tokenizer) == (
        "prompts.path = 'bad.jsonl': no usable prompt (1 unreadable, 2 without a prompt)."
    )
    Path("empty.jsonl").write_text("")
    assert refusal(PromptsConfig(path="empty.jsonl"), tokenizer) == (
        "prompts.path = 'empty.jsonl': no usable prompt (the source is empty)."
    )


UNREADABLE: list[tuple[str, bytes | None, str]] = [
    ("nope.jsonl", None, "prompts.path = 'nope.jsonl': no such file."),
    ("nope.parquet", None, "prompts.path = 'nope.parquet': no such file."),
    ("p.csv", b"prompt\na\n", "prompts.path = 'p.csv': expected a file that ends in .jsonl, .json, .parquet."),
    ("p.json", b'{"prompt": "a"}', "p.json: expected an array of objects, found an object."),
    ("p.json", b"[1,", "p.json: not JSON (Expecting value: line 1 column 4 (char 3))."),
    ("p.json", b"[" * 200_000, "p.json: not JSON (nested too deep)."),
    ("p.json", b'["\xff"]', "p.json: not JSON ('utf-8' codec can't decode byte 0xff in position 2: invalid start byte)."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), UNREADABLE, ids=[text for *_, text in UNREADABLE])
def test_unreadable_source_is_refused(
    folder: Path, tokenizer: Any, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    assert refusal(PromptsConfig(path=name), tokenizer) == expected


@pytest.mark.parametrize("content", [b"no Parquet", b"PAR1" + b"\0" * 64 + b"PAR1", b""])
def test_damaged_parquet_file_is_refused(folder: Path, tokenizer: Any, content: bytes) -> None:
    Path("p.parquet").write_bytes(content)
    message = refusal(PromptsConfig(path="p.parquet"), tokenizer)
    assert message.startswith("p.parquet: not a readable Parquet file (")
    assert message.endswith(").")


def test_unknown_split_is_refused_with_the_known_ones(folder: Path, tokenizer: Any) -> None:
    path = write_source("dataset_dict", RECORDS)
    assert refusal(PromptsConfig(path=path, split="dev"), tokenizer) == (
        "source: has no split 'dev'. Known: train, test."
    )


def test_folder_that_is_no_dataset_is_refused(folder: Path, tokenizer: Any) -> None:
    Path("empty").mkdir()
    assert refusal(PromptsConfig(path="empty"), tokenizer) == (
        "prompts.path = 'empty' (split 'train') is no file and cannot be loaded as a dataset: "
        "Directory empty is neither a `Dataset` directory nor a `DatasetDict` directory."
    )


# Size


def test_limit_takes_the_first_good_prompts_and_reads_no_further(folder: Path, tokenizer: Any) -> None:
    Path("p.jsonl").write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(3)) + "not read\n")
    rows = taken(PromptsConfig(path="p.jsonl", limit=3), tokenizer)
    assert [row["text"] for row in rows] == ["p0", "p1", "p2"]
    assert refusal(PromptsConfig(path="p.jsonl", limit=4), tokenizer).startswith("p.jsonl:4: not JSON")


def test_limit_counts_good_prompts_not_lines(folder: Path, tokenizer: Any) -> None:
    Path("p.jsonl").write_text("".join(f'{{"prompt": "{"p" * i}"}}\n' for i in range(6)))
    config = PromptsConfig(path="p.jsonl", limit=3, on_bad_prompt="skip", max_prompt_tokens=4)
    assert [row["text"] for row in taken(config, tokenizer)] == ["p", "pp", "ppp"]


def peak_memory(count: int, tokenizer: Any) -> int:
    """Most bytes of Python objects at once while taking in so many prompts."""
    with open("many.jsonl", "w") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"{number} " + "x" * 50, "answer": str(-number)}) + "\n")
    tracemalloc.start()
    try:
        take_in_prompts(PromptsConfig(path="many.jsonl"), tokenizer, NUM_EMBEDDINGS, Path(f"many-{count}.parquet"))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_hardly_grows_with_the_number_of_prompts_and_any_row_is_found(folder: Path, tokenizer: Any) -> None:
    # Two row groups are held at once: one being filled while the other is written.
    few, many = peak_memory(2 * ROWS_PER_GROUP, tokenizer), peak_memory(20_000, tokenizer)
    # What grows is the table of used ids and where they were: some 110 bytes a prompt; its token ids alone take 480.
    assert many - few < 400 * (20_000 - 2 * ROWS_PER_GROUP)
    path = Path("many-20000.parquet")
    assert count_prompts(path) == 20_000
    assert pq.ParquetFile(path).num_row_groups == 5
    # First and last of row groups, out of order, one asked for twice.
    wanted = [19_999, 0, 4_095, 4_096, 8_191, 8_192, 0]
    found = read_prompts(path, wanted)
    assert list(found) == sorted(set(wanted))
    for index, prompt in found.items():
        assert (prompt.prompt_index, prompt.prompt_id, prompt.answer) == (index, f"line-{index + 1}", str(-index))
        assert tokenizer.decode(prompt.prompt_ids) == f"{index} " + "x" * 50


# As part of opening a run


def test_refused_prompts_leave_no_run_directory(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": ""}])
    with pytest.raises(PromptError, match=r"bad\.jsonl:2: the prompt is empty"):
        open_run(make_recipe(tmp_path / "deep" / "run", f"prompts.path={bad}"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.jsonl"]


def test_prompts_left_by_a_start_that_was_cut_short_are_not_taken_for_others(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path / "run")
    run = open_run(recipe)
    whole = {path.name: path.read_bytes() for path in run.dir.path.iterdir()}
    run.dir.run_json.unlink()
    with pytest.raises(MismatchError) as caught:
        open_run(make_recipe(tmp_path / "run", "prompts.limit=20"))
    assert str(caught.value) == (
        f"{run.dir.prompts}: left with other prompts settings by a start that was cut short (there is no run.json). "
        f"Remove {run.dir.path}, or choose another run_dir."
    )
    assert isinstance(caught.value, OpdCacheError)
    open_run(recipe)
    assert {path.name: path.read_bytes() for path in run.dir.path.iterdir()} == whole


def test_a_token_without_an_embedding_is_refused(folder: Path, tokenizer: Any) -> None:
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "sort ba:"}])
    with pytest.raises(
        PromptError,
        match=r"^prompts.jsonl:1: the prompt has token id \d+ \('.'\), the student has 60 embeddings\. Mend it",
    ):
        take_in_prompts(PromptsConfig(path="prompts.jsonl"), tokenizer, 60, Path("run/prompts.parquet"))
