"""Prompt files that nobody would write: every prompt is taken as it is, or its line is named."""

import json
import re
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doors import contents, examples, refusal, touching_only
from fault_log import FaultLog, SilentError
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from opd_cache.config import PromptsConfig
from opd_cache.prompts.intake import take_in_prompts
from opd_cache.quickstart.sort_letters import byte_tokenizer
from opd_cache.store.shards import read_row_groups

ROW = "hostile prompt files"
NASTY = [
    "../x", "/etc/passwd", "a\0b", "x" * 300, "\u0430dmin", "\u202e", ".", "..", "", " ", "-rf", "a\r\nb", "'; DROP TABLE x; --",
    "$(id)", "\ud800", "\U0001f600", "<script>", "a/b", "\\", "NUL", "{prompt}", "{0}", "{{ 1/0 }}", "\x1b[31m", "e\u0301",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content + m.get('name', '') }}{% endfor %}"
    return tokenizer


def taken(
    faults: FaultLog, fault: str, tokenizer: PreTrainedTokenizerFast, path: Path, **options: object
) -> list[dict]:
    """The rows of prompts.parquet; none where the file was refused, which leaves nothing."""
    final = path.parent / "out" / "prompts.parquet"
    final.unlink(missing_ok=True)
    config = PromptsConfig(path=str(path), **options)
    with faults.trial(ROW, fault), touching_only(final.parent, path.parent), refusal() as said:
        take_in_prompts(config, tokenizer, 258, final)
    if said:
        assert not final.exists()
        assert contents(path.parent / "out") == {}
        return []
    rows = [row for table in read_row_groups(final) for row in table.to_pylist()]
    for row in rows:
        is_plain = not options.get("apply_chat_template")
        if is_plain and tokenizer(row["text"])["input_ids"] != row["prompt_ids"]:
            raise SilentError(f"{row} has other ids than its text")
        assert row["prompt_id"].isprintable()
        assert row["num_prompt_tokens"] == len(row["prompt_ids"]) > 0
        json.loads(row["fields"], parse_constant=lambda word: pytest.fail(word))
    assert len({row["prompt_id"] for row in rows}) == len(rows)
    return rows


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(NASTY)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=5
)
records = st.dictionaries(st.sampled_from(["id", "prompt", "answer", "messages", "x", "\0"]), values, max_size=5)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), values, max_size=4) | values, max_size=3
)
OPTIONS = [
    {},
    {"on_bad_prompt": "skip"},
    {"apply_chat_template": True, "on_bad_prompt": "skip"},
    {"template": "{prompt} {x}", "on_bad_prompt": "skip"},
]


@examples(60, 5000)
@given(
    rows=st.lists(records | st.fixed_dictionaries({"messages": messages}), max_size=4), options=st.sampled_from(OPTIONS)
)
def test_any_records_are_taken_as_they_are_or_named(
    faults: FaultLog, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows: list, options: dict
) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    taken(faults, "any records", tokenizer, path, **options)


@examples(40, 5000)
@given(
    lines=st.lists(st.binary(max_size=40) | records.map(lambda row: json.dumps(row).encode()), max_size=4),
    end=st.sampled_from([b"\n", b"\r\n", b"\r", b"\0"]),
)
def test_any_bytes_are_taken_or_named(
    faults: FaultLog, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, lines: list[bytes], end: bytes
) -> None:
    for suffix in (".jsonl", ".json", ".parquet"):
        path = tmp_path / f"any{suffix}"
        path.write_bytes(end.join(lines))
        taken(faults, f"any bytes in {suffix}", tokenizer, path, on_bad_prompt="skip")


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_an_id_never_becomes_a_path(
    faults: FaultLog, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_bytes(json.dumps({"id": name, "prompt": "sort ba:"}).encode())
    rows = taken(faults, f"id {name[:20]!a}", tokenizer, path)
    assert [row["prompt_id"] for row in rows] in ([name], [])
    assert {file.name for file in tmp_path.iterdir()} <= {"ids.jsonl", "out"}


def test_huge_and_deep_lines_are_taken_or_named(
    faults: FaultLog, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for name, line in {
        "1 MB prompt": json.dumps({"prompt": "x" * 1_000_000}),
        "1 MB key": json.dumps({"x" * 1_000_000: 1, "prompt": "a"}),
        "nested lists": '{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "nested just so": '{"prompt": "a", "messages": ' + "[" * 900 + "]" * 900 + "}",
        "5000 digits": '{"id": ' + "9" * 5000 + ', "prompt": "a"}',
        "100,000 fields": json.dumps({**{f"k{n}": n for n in range(100_000)}, "prompt": "a"}),
        "not finite": '{"prompt": "a", "answer": 1e999, "x": NaN, "y": -Infinity}',
    }.items():
        path = tmp_path / "huge.jsonl"
        path.write_text(line + "\n")
        taken(faults, name, tokenizer, path)


def parquet_of(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path, store_schema=False)
    return path


def test_parquet_values_that_python_has_not_are_one_line(
    faults: FaultLog, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = pa.array(["sort ba:"])
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    for name, columns in {
        "invalid UTF-8 prompt": {"prompt": invalid},
        "invalid UTF-8 beside": {"prompt": text, "x": invalid},
        "bytes": {"prompt": pa.array([b"\xff"])},
        "a date after 9999": {"prompt": text, "x": pa.array([2**60], pa.timestamp("ms"))},
        "a day after 9999": {"prompt": text, "x": pa.array([2**31 - 1], pa.date32())},
        "a time of nanoseconds": {"prompt": text, "x": pa.array([1], pa.timestamp("ns"))},
        "a real date": {"prompt": text, "id": pa.array([datetime(2024, 1, 1)])},
        "a map": {"prompt": text, "x": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))},
        "an unknown zone": {"prompt": text, "x": pa.array([1], pa.timestamp("us", "Nowhere/None"))},
        "decimal": {"prompt": text, "answer": pa.array([1], pa.decimal128(38, 10))},
        "nulls alone": {"prompt": pa.nulls(1)},
        "deep": {"prompt": text, "x": pa.array([[[[[[[[[[[[1]]]]]]]]]]]])},
    }.items():
        path = parquet_of(tmp_path / "p.parquet", **columns)
        taken(faults, f"Parquet: {name}", tokenizer, path)
        taken(faults, f"Parquet, skipped: {name}", tokenizer, path, on_bad_prompt="skip")
    pq.write_table(pa.Table.from_arrays([text, text], ["prompt", "prompt"]), tmp_path / "p.parquet")
    taken(faults, "Parquet: one name twice", tokenizer, tmp_path / "p.parquet")


TEMPLATES = [
    "{{ 1 / 0 }}", "{{ messages[99].content }}", "{{ messages.nope.nope }}", "{{ 'a' + 1 }}", "{{ none() }}", "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "{{ self.__init__.__globals__ }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ range(10**9) | list }}",
    "{% for i in range(10**12) %}x{% endfor %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% broken", "",
    "{{ raise_exception('no\nway') }}", "{{ messages | tojson }}", "{{ '%d' | format('x') }}", "{{ 'x' | int.bit_length }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_hostile_chat_template_reaches_nothing(faults: FaultLog, tmp_path: Path, template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "sort ba:"}\n')
    taken(faults, f"chat template {template[:40]}", tokenizer, path, apply_chat_template=True)
    assert not Path("pwned").exists()


@examples(60, 3000)
@given(
    template=st.text(max_size=30)
    | st.lists(
        st.sampled_from(
            [*NASTY, "{prompt}", "{x}", "{", "}", "{prompt.__class__}", "{prompt!r}", "{prompt:>9999999999}"]
        ),
        max_size=4,
    ).map("".join)
)
def test_a_template_of_text_only_fills_fields(
    faults: FaultLog, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str
) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "P", "x": "{prompt}"}\n')
    rows = taken(faults, "any text template", tokenizer, path, template=template)
    parts = re.split(r"(\{prompt\}|\{x\})", template)
    expected = "".join({"{prompt}": "P", "{x}": "{prompt}"}.get(part, part) for part in parts)
    assert [row["text"] for row in rows] in ([expected], [])
