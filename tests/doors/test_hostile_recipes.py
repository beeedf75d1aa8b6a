"""Recipes and overrides that nobody would write: they are followed, or refused in one line that says why."""

import json
from pathlib import Path

import pytest
import yaml
from doors import answered_or_refused, contents, examples, touching_only
from fault_log import FaultLog, is_full
from hypothesis import example, given
from hypothesis import strategies as st

from opd_cache.config import describe_keys

ROW = "hostile recipes"
KEYS = [key.replace("NAME", "main") for key, _, _ in describe_keys()]
NASTY = [
    "0b_", "0x_", "9" * 5000, "0x" + "f" * 5000, "1e999", ".nan", "-.inf", "-1", "0", "null", "~", "", "[]", "{}", "[" * 900,
    "{a: " * 40, "!!python/object/apply:os.system [touch pwned]", "!!python/name:os.system", "!!timestamp 2001-99-99",
    "!!binary x", "&a [*a]", "*a", "[&a [1,1,1,1], &b [*a,*a,*a,*a], &c [*b,*b,*b,*b]]", "<<: {a: 1}", "190:20:30",
    "2001-12-14t21:59:43.10-05:00", "${oc.env:HOME}", "${oc.decode:'[1,2]'}", "${oc.create:{a: 1}}", "${seed}", "${",
    "${${seed}}", "${oc.dict.keys:learn}", "$(touch pwned)", "`touch pwned`", "'\\0'", '"\\0"', '"\\ud800"', "\u202e",
    "a" * 200_000, "../../../x", "/etc/passwd", "-rf", "a:b", "module:Name", "os:system", "true", "yes", "0.1", "1_000",
    str(2**63), str(-(2**63)), "'\x1b[31m'", "\t", "? a", "- a", "|", ">", "%TAG", "---", "...", "???",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(task: Path) -> Path:
    return task / "recipe.yaml"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def resolved(faults: FaultLog, fault: str, *arguments: object) -> None:
    """What is printed of a recipe that is taken is JSON, with nothing in it that JSON has not."""
    with faults.trial(ROW, fault), touching_only():
        ended = answered_or_refused("config", "--json", *arguments)
        if ended.status == 0:
            json.loads(ended.out, parse_constant=lambda word: pytest.fail(word))
    assert contents(Path()) == {}


@pytest.mark.parametrize("value", NASTY, ids=lambda value: ascii(value)[:30])
def test_a_nasty_value_of_any_key_is_taken_or_one_line(base: Path, faults: FaultLog, value: str) -> None:
    keys = KEYS if is_full() else ["run_dir", "rollout.temperature", "prompts.chat_template_kwargs"]
    for key in keys:
        resolved(faults, f"{key}={value[:30]}", base, f"run_dir={Path()}/r", f"{key}={value}")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NASTY[:8]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@examples(40, 5000)
@given(key=st.sampled_from(KEYS) | st.text(max_size=12), value=values)
def test_any_value_of_any_key_is_taken_or_one_line(base: Path, faults: FaultLog, key: str, value: object) -> None:
    resolved(faults, "override of any value", base, f"{key}={json.dumps(value)}")


def test_bombs_are_refused_before_they_go_off(base: Path, faults: FaultLog) -> None:
    """Each would be gigabytes, or hours, once it is expanded."""
    levels = ", ".join(["&a0 [x,x]", *(f"&a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))])
    for name, text in {
        "aliases in an override": f"[{levels}]",
        "aliases in a mapping": f"{{a: [{levels}]}}",
        "nesting": "[" * 100_000,
        "nesting of mappings": "{a: " * 100_000,
        "many keys": "{" + ", ".join(f"k{n}: 1" for n in range(20_000)) + "}",
    }.items():
        resolved(faults, name, base, f"prompts.chat_template_kwargs={text}")
        Path("bomb.yaml").write_text(f"prompts: {{chat_template_kwargs: {text}}}\n")
        with faults.trial(ROW, f"{name}, in a file"):
            answered_or_refused("config", base, "bomb.yaml")
        Path("bomb.yaml").unlink()


FILES = {
    "python object": b"seed: !!python/object/apply:os.system ['touch pwned']\n",
    "python module": b"seed: !!python/module:os\n",
    "duplicate keys": b"seed: 1\nseed: 2\n",
    "CRLF": b"seed: 1\r\nnum_episodes: 2\r\n",
    "BOM": b"\xef\xbb\xbfseed: 1\n",
    "UTF-16": "seed: 1\n".encode("utf-16"),
    "NUL": b"seed: 1\n\0\n",
    "NUL in text": b'run_dir: "a\\0b"\n',
    "invalid UTF-8": b"run_dir: \xff\xfe\xfa\n",
    "one long line": b"run_dir: " + b"x" * 1_000_000 + b"\n",
    "a long key": b"x" * 1_000_000 + b": 1\n",
    "no number": b"seed: 0b_\n",
    "5000 digits": b"seed: " + b"9" * 5000 + b"\n",
    "5000 hex digits": b"seed: 0x" + b"f" * 5000 + b"\n",
    "5000 hex digits in a list": b"prompts: {chat_template_kwargs: {a: [0x" + b"f" * 5000 + b"]}}\n",
    "merge key": b"a: &a {seed: 1}\n<<: *a\n",
    "control characters": b'run_dir: "a\\e[31mb"\n',
    "directive": b"%YAML 9.9\n---\nseed: 1\n",
    "many documents": b"---\n" * 1000,
    "empty": b"",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe_is_one_line(base: Path, faults: FaultLog, tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(FILES[name])
    resolved(faults, name, base, path)


@examples(40, 4000)
@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from([*NASTY, "seed", ": ", "\n", "  ", "- "]), max_size=6).map("".join)
)
@example(text="seed: 0x_")
def test_any_text_as_a_recipe_is_taken_or_one_line(base: Path, faults: FaultLog, tmp_path: Path, text: str) -> None:
    (tmp_path / "any.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    resolved(faults, "any text as a file", base, tmp_path / "any.yaml")


@examples(30, 2000)
@given(data=st.data())
def test_a_real_recipe_with_one_place_changed_is_taken_or_one_line(
    base: Path, faults: FaultLog, tmp_path: Path, data: st.DataObject
) -> None:
    content = yaml.safe_load(base.read_text())
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(values)
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    resolved(faults, "one place changed", tmp_path / "changed.yaml")
