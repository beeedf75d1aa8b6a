"""Recipes: what merges into what, what is refused and in which words, and that a printed recipe can be given back."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opd_cache.config import Recipe, TeacherConfig, describe_keys
from opd_cache.errors import ConfigError
from opd_cache.recipes import load_recipe, packaged_recipes, recipe_json, recipe_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "recipes").glob("*.yaml"))
MINIMAL = """
run_dir: runs/a
student: {model: s}
teachers: {main: {model: t}}
prompts: {path: p.jsonl}
"""
KEYS = "eval, health, keep_models, launcher, learn, num_episodes, num_workers, pipeline, prompts, rollout, run_dir, score, seed, stall_timeout_s, student, task, teachers, torch_threads"
ROLLOUT_KEYS = "batch_size, max_new_tokens, n_samples_per_prompt, prompts_per_episode, prompts_per_shard, python, reward, sampler, stop_token_ids, student_top_k, temperature, top_k, top_p, vllm"
LOSS_KEYS = "advantage_clamp, clip_ratio_high, clip_ratio_low, coef, discount, entropy_forward_coef, entropy_threshold, gate_high, gate_low, importance, importance_cap, jsd_beta, name, normalize_advantages, skew_alpha, teacher_only_ids, terms, topk_mass"
TEACHER_KEYS = "attn_implementation, device, dtype, model, prompt, revision, scorer, trust_remote_code, urls, vllm"
TEACHER_NAME = "a teacher's name has 1-64 letters, digits, '_', '-' or '.' and starts with a letter or digit, since it names a folder."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a minimal recipe in base.yaml; messages then name files without their folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(MINIMAL)
    return tmp_path


def refusal(*arguments: str) -> str:
    """The one line that refuses these arguments."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_fill_what_a_recipe_does_not_say(folder: Path) -> None:
    recipe = load_recipe(["base.yaml"])
    assert (recipe.run_dir, recipe.student.model, recipe.prompts.path) == ("runs/a", "s", "p.jsonl")
    assert recipe.teachers == {"main": TeacherConfig(model="t")}
    assert (recipe.seed, recipe.num_episodes, recipe.learn.loss.name) == (0, 10, "reverse_kl_pg")


def test_later_files_win_over_earlier_ones_and_key_value_over_all_files(folder: Path) -> None:
    (folder / "one.yaml").write_text("seed: 1\nnum_episodes: 1\nrollout: {top_p: 0.5, temperature: 0.5}\n")
    (folder / "two.yaml").write_text(
        "seed: 2\nnum_episodes: 2\nrollout: {top_p: 0.75}\nteachers: {main: {dtype: float16}}\n"
    )
    # key=value wins wherever it stands, and the later of two the earlier.
    recipe = load_recipe(["seed=3", "base.yaml", "one.yaml", "seed=4", "two.yaml"])
    assert (recipe.seed, recipe.num_episodes) == (4, 2)
    assert (recipe.rollout.top_p, recipe.rollout.temperature) == (0.75, 0.5)
    assert recipe.teachers == {"main": TeacherConfig(model="t", dtype="float16")}
    assert load_recipe(["base.yaml", "two.yaml", "one.yaml"]).seed == 1


def test_lists_are_replaced_not_joined(folder: Path) -> None:
    first, second = "rollout.stop_token_ids=[1, 2]", "rollout.stop_token_ids=[3]"
    assert load_recipe(["base.yaml", first, second]).rollout.stop_token_ids == [3]


def test_null_takes_an_optional_key_back(folder: Path) -> None:
    assert load_recipe(["base.yaml", "learn.max_grad_norm=null"]).learn.max_grad_norm is None


def test_a_key_can_refer_to_another(folder: Path) -> None:
    recipe = load_recipe(["base.yaml", "task.dir=elsewhere", "prompts.path=${task.dir}/train.jsonl"])
    assert recipe.prompts.path == "elsewhere/train.jsonl"


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(folder: Path) -> None:
    (folder / "seed=5").write_text("seed: 6\n")
    assert load_recipe(["base.yaml", "seed=5"]).seed == 6


def test_long_text_is_an_override_and_no_file(folder: Path) -> None:
    text = "Think step by step. " * 300 + "{question}"
    assert load_recipe(["base.yaml", f"prompts.template={text}"]).prompts.template == text


def test_name_too_long_for_a_file_is_refused_in_one_line(folder: Path) -> None:
    assert refusal("x" * 300).startswith("recipe 'xxx")


def test_whole_numbers_are_taken_for_numbers(folder: Path) -> None:
    recipe = load_recipe(["base.yaml", "rollout.temperature=1", "learn.learning_rate=1e-6"])
    assert (recipe.rollout.temperature, recipe.learn.learning_rate) == (1.0, 1e-6)


def test_packaged_recipe_is_found_by_name_and_by_its_path_in_a_checkout(folder: Path) -> None:
    assert load_recipe(["quickstart"]) == load_recipe(["configs/recipes/quickstart.yaml"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_in_configs_loads(path: Path) -> None:
    assert load_recipe([str(path)]).run_dir
    if path.parent.name == "recipes":
        assert packaged_recipes()[path.stem] == path


# (key=value, the line that refuses it)
REFUSED = [
    # unknown keys, at every level
    ("nope=1", f"nope is unknown. Known: {KEYS}. (nope=1)"),
    ("rollout.nope=1", f"rollout.nope is unknown. Known: {ROLLOUT_KEYS}. (rollout.nope=1)"),
    ("learn.loss.nope=1", f"learn.loss.nope is unknown. Known: {LOSS_KEYS}. (learn.loss.nope=1)"),
    ("teachers.main.nope=1", f"teachers.main.nope is unknown. Known: {TEACHER_KEYS}. (teachers.main.nope=1)"),
    # wrong types: nothing is converted
    ("seed=abc", "seed = 'abc' must be a whole number. (seed=abc)"),
    ("seed=1.5", "seed = 1.5 must be a whole number. (seed=1.5)"),
    ("seed=true", "seed = true must be a whole number. (seed=true)"),
    ("seed='3'", "seed = '3' must be a whole number. (seed='3')"),
    ("seed=[1]", "seed = [1] must be a whole number. (seed=[1])"),
    ("seed={a: 1}", "seed = {'a': 1} must be a whole number. (seed={a: 1})"),
    ("prompts.limit=true", "prompts.limit = true must be a whole number, or null. (prompts.limit=true)"),
    ("rollout.temperature=abc", "rollout.temperature = 'abc' must be a number. (rollout.temperature=abc)"),
    ("rollout.temperature=nan", "rollout.temperature = 'nan' must be a number. (rollout.temperature=nan)"),
    ("rollout.temperature=true", "rollout.temperature = true must be a number. (rollout.temperature=true)"),
    ("rollout=3", "rollout = 3 must be a mapping of keys. (rollout=3)"),
    ("student=gpt2", "student = 'gpt2' must be a mapping of keys. (student=gpt2)"),
    ("learn.loss=kl", "learn.loss = 'kl' must be a mapping of keys. (learn.loss=kl)"),
    ("teachers=[a]", "teachers = ['a'] must be a mapping of keys. (teachers=[a])"),
    ("teachers.main=x", "teachers.main = 'x' must be a mapping of keys. (teachers.main=x)"),
    ("rollout.stop_token_ids=3", "rollout.stop_token_ids = 3 must be a list, or null. (rollout.stop_token_ids=3)"),
    ("rollout.stop_token_ids=[a]", "rollout.stop_token_ids[0] = 'a' must be a whole number. (rollout.stop_token_ids=[a])"),
    ("eval.greedy=3", "eval.greedy = 3 must be true or false. (eval.greedy=3)"),
    ("eval.greedy=maybe", "eval.greedy = 'maybe' must be true or false. (eval.greedy=maybe)"),
    ("run_dir=3", "run_dir = 3 must be text, in quotes. (run_dir=3)"),
    ("run_dir.x=1", "run_dir = {'x': 1} must be text. (run_dir.x=1)"),
    ("teachers={1: {model: a}}", "teachers.1: a name must be text, in quotes. (teachers={1: {model: a}})"),
    (
        "prompts.chat_template_kwargs.a={1: 2}",
        "prompts.chat_template_kwargs.a.1: a name must be text, in quotes. (prompts.chat_template_kwargs.a={1: 2})",
    ),
    # null where a value is needed
    ("seed=null", "seed = null must be a whole number. (seed=null)"),
    ("run_dir=", "run_dir = null must be text. (run_dir=)"),
    ("learn=null", "learn = null must be a mapping of keys. (learn=null)"),
    ("teachers.main=null", "teachers.main = null must be a mapping of keys. (teachers.main=null)"),
    ("rollout.stop_token_ids=[null]", "rollout.stop_token_ids[0] = null must be a whole number. (rollout.stop_token_ids=[null])"),
    # out of range
    ("seed=-1", "seed = -1 is too small; it must be at least 0."),
    ("seed=9223372036854775808", "seed = 9223372036854775808 is too large; it must be at most 9223372036854775807."),
    ("rollout.temperature=0", "rollout.temperature = 0.0 is too small; it must be above 0."),
    ("rollout.top_p=1.5", "rollout.top_p = 1.5 is too large; it must be at most 1."),
    ("rollout.top_k=0", "rollout.top_k = 0 is too small; it must be at least 1."),
    ("learn.adam_beta1=1", "learn.adam_beta1 = 1.0 is too large; it must be below 1."),
    ("rollout.stop_token_ids=[2, -1]", "rollout.stop_token_ids[1] = -1 is too small; it must be at least 0."),
    ("rollout.stop_token_ids=[]", "rollout.stop_token_ids = [] is empty; leave it out, or give at least one."),
    ("launcher=slurm9", "launcher = 'slurm9' is unknown. Known: inline, subprocess."),
    ("teachers.main.dtype=int4", "teachers.main.dtype = 'int4' is unknown. Known: auto, float32, bfloat16, float16."),
    ("rollout.temperature=.nan", "rollout.temperature = nan is not a finite number."),
    ("learn.learning_rate=.inf", "learn.learning_rate = inf is not a finite number."),
    ("learn.learning_rate=-.inf", "learn.learning_rate = -inf is not a finite number."),
    (
        "prompts.chat_template_kwargs.a=[1, .nan]",
        "prompts.chat_template_kwargs.a[1] = nan is not a finite number. (prompts.chat_template_kwargs.a=[1, .nan])",
    ),
    ("run_dir=''", "run_dir = '' is empty."),
    ('run_dir="a\\0b"', "run_dir = 'a\\x00b' holds what is no UTF-8 text."),
    ("run_dir=\udcff", "'run_dir=\\udcff' is not key=value: unacceptable character #xdcff: special characters are not allowed in \"<unicode string>\", position 0."),
    # what one key asks of another
    ("teachers.b.model=x", "learn.teacher must name one of the teachers: main, b."),
    ("score.teacher=x", "score.teacher = 'x' is unknown. Known: main."),
    ("learn.teacher=x", "learn.teacher = 'x' is unknown. Known: main."),
    ("teachers.b.dtype=auto", "the recipe does not say teachers.b.model. Add what is missing, or give teachers.b.model=... after the recipe."),
    ("eval.answer_pattern=(", "eval.answer_pattern = '(' is not a regular expression: missing ), unterminated subpattern at position 0."),
    ("eval.reference_pattern='*'", "eval.reference_pattern = '*' is not a regular expression: nothing to repeat at position 0."),
    (
        "prompts.chat_template_kwargs.truncation=true",
        "prompts.chat_template_kwargs.truncation is set by opd-cache itself; give only the template's own variables, such as enable_thinking.",
    ),
    # servers
    ("score.scorer=http", "teacher 'main' is scored over HTTP and has no server. Set score.http.urls=[http://HOST:PORT], or teachers.main.urls."),
    ("teachers.main.scorer=http", "teacher 'main' is scored over HTTP and has no server. Set score.http.urls=[http://HOST:PORT], or teachers.main.urls."),
    ("score.http.urls=[]", "score.http.urls = [] is empty; leave it out, or give at least one."),
    ("score.http.api=tgi", "score.http.api = 'tgi' is unknown. Known: auto, sglang, vllm_generate, vllm_completions."),
    ("score.http.urls=['node7:8000']", "score.http.urls[0] = 'node7:8000' is no URL of a server; expected http://HOST:PORT or https://HOST."),
    ("score.http.urls=['http://']", "score.http.urls[0] = 'http://' is no URL of a server; expected http://HOST:PORT or https://HOST."),
    ("score.http.urls=['http://a:port']", "score.http.urls[0] = 'http://a:port' is no URL of a server; expected http://HOST:PORT or https://HOST."),
    ("score.http.urls=['http://a:99999']", "score.http.urls[0] = 'http://a:99999' is no URL of a server; expected http://HOST:PORT or https://HOST."),
    ("score.http.urls=['ftp://a']", "score.http.urls[0] = 'ftp://a' is no URL of a server; expected http://HOST:PORT or https://HOST."),
    ("score.http.urls=['http://a b']", "score.http.urls[0] = 'http://a b' is no URL of a server; expected http://HOST:PORT or https://HOST."),
    ("score.http.urls=['http://a:8000/v1/']", "score.http.urls[0] = 'http://a:8000/v1/': give the server's root, without /v1; the paths below it are added."),
    ("score.http.concurrency=0", "score.http.concurrency = 0 is too small; it must be at least 1."),
    # no key=value
    ("=3", "'=3' is not key=value."),
    ("[=1", "'[=1' is not key=value."),
    ("rollout..top_p=1", "'rollout..top_p=1' is not key=value."),
    ("learn rate=1", "'learn rate=1' is not key=value."),
    ("seed=[", "'seed=[' is not key=value: while parsing a flow node, expected the node content, but found '<stream end>'."),
    # references
    ("seed=${nope}", "seed cannot be resolved: Interpolation key 'nope' not found."),
    ("run_dir=${run_dir}", "run_dir cannot be resolved: Recursive interpolation detected."),
    ("run_dir=${nope:1}", "run_dir cannot be resolved: Unsupported interpolation type nope."),
    ("run_dir=${", "'run_dir=${' is not key=value: no viable alternative at input '${'."),
]  # fmt: skip


@pytest.mark.parametrize(("override", "expected"), REFUSED, ids=[ascii(override) for override, _ in REFUSED])
def test_bad_override_is_refused_in_one_line(folder: Path, override: str, expected: str) -> None:
    assert refusal("base.yaml", override) == expected


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("rollout.sampler", "hf"),
        ("score.scorer", "hf"),
        ("teachers.main.scorer", "hf"),
        ("learn.engine", "torch"),
        ("learn.loss.name", "reverse_kl_pg"),
        ("task.name", "sort_letters"),
    ],
)
def test_unknown_part_is_refused_with_the_known_ones(folder: Path, key: str, known: str) -> None:
    message = refusal("base.yaml", f"{key}=nope")
    assert re.fullmatch(rf"{re.escape(key)} = 'nope' is unknown\. Known: (.*), or your own as 'module:Name'\.", message)
    assert known in message
    load_recipe(["base.yaml", f"{key}={known}"])
    load_recipe(["base.yaml", f"{key}=my_package.parts:Mine"])


# (what the file holds, the line that refuses it)
REFUSED_FILES = [
    ("a: [\n", "x.yaml:2: not YAML: while parsing a flow node, expected the node content, but found '<stream end>'."),
    ("\tseed: 1\n", "x.yaml:1: not YAML: while scanning for the next token, found character '\\t' that cannot start any token."),
    ("seed: 1\nrollout:\n  top_p: 1\n  top_p: 1\n", "x.yaml:4: not YAML: while constructing a mapping, found duplicate key top_p."),
    ("---\nseed: 1\n---\nseed: 2\n", "x.yaml:3: not YAML: expected a single document in the stream, but found another document."),
    ("- seed: 1\n", "x.yaml: expected keys with values, found a list."),
    ("seed\n", "seed = null must be a whole number. (x.yaml)"),
    ("1: 2\n", f"1 is unknown. Known: {KEYS}. (x.yaml)"),
    ("null: 2\n", "x.yaml: Incompatible key type 'NoneType'."),
    ('"a\\nb": 2\n', f"'a\\nb' is unknown. Known: {KEYS}. (x.yaml)"),
    ("rollout:\n", "rollout = null must be a mapping of keys. (x.yaml)"),
    ("rollout.top_p: 1\n", f"rollout.top_p is unknown. Known: {KEYS}. (x.yaml)"),
    ("a: &a [1]\nb: [*a, *a]\n", "x.yaml:2: YAML aliases (*a) are not read; refer to a key as ${section.key}."),
    (
        "run_dir: !!python/object/apply:os.system ['touch executed']\n",
        "x.yaml:1: YAML tags (tag:yaml.org,2002:python/object/apply:os.system) are not read; write a plain value.",
    ),
    ("run_dir: !!binary aGVsbG8=\n", "x.yaml:1: YAML tags (tag:yaml.org,2002:binary) are not read; write a plain value."),
    ("[" * 100_000, "x.yaml:1: nested more than 32 levels deep."),
    ("a: " + "{a: " * 5_000, "x.yaml:1: nested more than 32 levels deep."),
    (b"seed: \xff\n", "x.yaml: cannot be read: 'utf-8' codec can't decode byte 0xff in position 6: invalid start byte."),
    (b"seed: \0\n", 'x.yaml: not YAML: unacceptable character #x0000: special characters are not allowed in "<unicode string>", position 6.'),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), REFUSED_FILES, ids=[ascii(c)[:40] for c, _ in REFUSED_FILES])
def test_bad_recipe_file_is_refused_in_one_line(folder: Path, content: str | bytes, expected: str) -> None:
    (folder / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal("base.yaml", "x.yaml") == expected
    assert sorted(path.name for path in folder.iterdir()) == ["base.yaml", "x.yaml"]


def test_alias_bomb_is_refused_before_it_is_expanded(folder: Path) -> None:
    levels = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    (folder / "bomb.yaml").write_text("\n".join(["a0: &a0 [x, x]", *levels]))
    assert refusal("bomb.yaml") == "bomb.yaml:2: YAML aliases (*a0) are not read; refer to a key as ${section.key}."


def test_unreadable_recipe_file_is_named(folder: Path) -> None:
    packaged = ", ".join(packaged_recipes())
    assert refusal("nope.yaml") == (
        f"recipe 'nope.yaml' is neither a file nor a packaged recipe. Packaged: {packaged}."
    )
    assert refusal(str(folder)) == (
        f"recipe {str(folder)!r} is neither a file nor a packaged recipe. Packaged: {packaged}."
    )
    assert "quickstart" in packaged


@pytest.mark.parametrize("arguments", [(), ("seed=1",)])
def test_no_recipe_at_all_lists_the_packaged_ones(arguments: tuple[str, ...]) -> None:
    packaged = ", ".join(packaged_recipes())
    assert refusal(*arguments) == f"no recipe was given. Packaged: {packaged}; or the path of a YAML file."


def test_all_missing_keys_are_named_at_once(folder: Path) -> None:
    (folder / "empty.yaml").write_text("")
    assert refusal("empty.yaml") == (
        "the recipe does not say prompts.path, run_dir, student.model. Add what is missing, or give prompts.path=... after the recipe."
    )


def test_selective_recomputation_under_zero_3_is_refused(folder: Path) -> None:
    (folder / "a.yaml").write_text(MINIMAL)
    settings = ["learn.gradient_checkpointing=selective", "learn.engine=deepspeed", "learn.deepspeed.zero_stage=3"]
    with pytest.raises(ConfigError, match=r"'selective' gives wrong gradients under learn\.deepspeed\.zero_stage = 3"):
        load_recipe([str(folder / "a.yaml"), *settings])
    assert load_recipe([str(folder / "a.yaml"), *settings[:2]]).learn.gradient_checkpointing == "selective"


@pytest.mark.parametrize(
    "secret",
    [
        "score.http.urls=['http://me:hunter2@node7:8000']",
        "score.http.urls=['http://a', 'https://hunter2@node7']",
        "teachers.main.urls=['http://node7:8000/?key=hunter2']",
        "score.http.api_key_env=sk-hunter2",
        "score.http.api_key_env=hunter2",
    ],
)
def test_secrets_in_a_recipe_are_refused_and_not_repeated(folder: Path, secret: str) -> None:
    message = refusal("base.yaml", secret)
    assert message.startswith(secret.partition("=")[0])
    assert "hunter2" not in message
    assert "the variable" in message or "an environment variable" in message


def test_a_teachers_own_servers_are_enough(folder: Path) -> None:
    recipe = load_recipe(
        ["base.yaml", "score.scorer=http", "teachers.main.urls=['http://node7:8000', 'https://[::1]:8443/t/']"]
    )
    assert recipe.teachers["main"].urls == ["http://node7:8000", "https://[::1]:8443/t/"]
    assert (
        load_recipe(["base.yaml", "score.http.api_key_env=TEACHER_API_KEY"]).score.http.api_key_env == "TEACHER_API_KEY"
    )


def test_recipe_without_a_teacher_is_refused(folder: Path) -> None:
    (folder / "none.yaml").write_text("run_dir: a\nstudent: {model: s}\nprompts: {path: p}\n")
    assert refusal("none.yaml") == "the recipe names no teacher. Add teachers.main.model=FOLDER_OR_NAME."


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../x", "../x"),
        ("a/b", "a/b"),
        ("", "''"),
        (".hidden", ".hidden"),
        ("-rf", "-rf"),
        ("..", ".."),
        ("a b", "a b"),
        ("ä", "ä"),
        ("a\nb", "'a\\nb'"),
        ("a\0", "'a\\x00'"),
        ("a" * 300, "'" + "a" * 76 + "..."),
    ],
)
def test_teacher_name_that_is_no_safe_folder_name_is_refused(folder: Path, name: str, shown: str) -> None:
    escaped = name.replace("\n", "\\n").replace("\0", "\\0")
    (folder / "named.yaml").write_text(MINIMAL.replace("main:", f'"{escaped}":'))
    assert refusal("named.yaml") == f"teachers.{shown}: {TEACHER_NAME}"


@pytest.mark.parametrize("name", ["main", "7b", "Qwen2.5-7B_instruct", "a" * 64])
def test_plain_teacher_names_are_taken(folder: Path, name: str) -> None:
    (folder / "named.yaml").write_text(MINIMAL.replace("main:", f'"{name}":'))
    assert list(load_recipe(["named.yaml"]).teachers) == [name]


def test_two_teachers_are_fine_when_the_learning_one_is_named(folder: Path) -> None:
    recipe = load_recipe(["base.yaml", "teachers.b.model=x", "learn.teacher=b"])
    assert list(recipe.teachers) == ["main", "b"]


def given_back(recipe: Recipe, folder: Path) -> list[Recipe]:
    """The recipe printed as YAML and as JSON, and read again."""
    (folder / "resolved.yaml").write_text(recipe_yaml(recipe))
    (folder / "resolved.json").write_text(recipe_json(recipe))
    return [load_recipe([str(folder / name)]) for name in ("resolved.yaml", "resolved.json")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_printed_recipe_can_be_given_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe([str(path), "teachers.b.model=x", "learn.teacher=b", "rollout.stop_token_ids=[1, 2]"])
    assert given_back(recipe, tmp_path) == [recipe, recipe]


@settings(max_examples=30, deadline=None)
@given(
    text=st.text(st.sampled_from("${}\\a: #'\"\n\tß😀-1e?*&!%@`|>"), max_size=12),
    rate=st.floats(0, 1e30),
)
@example(text="${seed}", rate=1e-6)
@example(text="\\${seed} \\\\${seed}\\", rate=5e-324)
@example(text="1e-6", rate=1e22)
@example(text="null", rate=0.1)
def test_any_text_and_number_survives_printing(
    text: str, rate: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = Recipe(run_dir="r", teachers={"main": TeacherConfig(model="t")})
    recipe.student.model, recipe.prompts.path = "s", "p"
    if text != "???":  # means a missing value
        recipe.prompts.system_prompt, recipe.prompts.chat_template_kwargs = text, {"a": [text], "b": {"c": text}}
    recipe.learn.learning_rate = rate
    assert given_back(recipe, tmp_path_factory.mktemp("printed")) == [recipe, recipe]


def test_every_recipe_key_is_documented() -> None:
    rows = describe_keys()
    assert len({key for key, _, _ in rows}) == len(rows) > 80
    assert {"run_dir", "teachers.NAME.model", "learn.loss.name", "eval.answer_pattern"} <= {key for key, _, _ in rows}
    assert [key for key, _, doc in rows if len(doc) < 5 or "\n" in doc] == []
    assert [key for key, default, _ in rows if default == "(required)"] == [
        "run_dir",
        "student.model",
        "teachers.NAME.model",
        "prompts.path",
    ]
