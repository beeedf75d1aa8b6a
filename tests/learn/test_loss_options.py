"""Which loss a recipe gets: its names, what they need, mixed and user losses, and the options that are refused."""

import sys
from pathlib import Path

import pytest
import torch
from loss_cases import DIVERGENCES, V, gradient, logits, tokens_of
from torch import Tensor

from opd_cache import registry
from opd_cache.config import LossConfig, describe_keys
from opd_cache.errors import ConfigError
from opd_cache.learn.losses import TokenLogprobs, TokenLoss, resolve_loss
from opd_cache.recipes import load_recipe, recipe_json, recipe_yaml


def compute(name: str, tokens: TokenLogprobs, **options: object) -> TokenLoss:
    chosen = LossConfig(name=name, **options)
    return resolve_loss(chosen).compute(tokens, chosen)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_mixed_is_the_weighted_sum_of_its_terms() -> None:
    student, teacher, sampler = logits(1, 9).requires_grad_(), logits(2, 9).log_softmax(-1), logits(3, 9)
    tokens = tokens_of(
        student.log_softmax(-1), teacher, torch.arange(9) % V, 2, sampler.log_softmax(-1), logits(4, 9)[:, 0]
    )
    shared = {"jsd_beta": 0.2, "importance": "truncated", "importance_cap": 1.1, "advantage_clamp": 0.5}
    terms = {"reverse_kl_pg": -0.5, "reward_pg": 2.0, "jsd_topk": 1.0, "forward_kl_topk": 0.0}
    found = compute("mixed", tokens, terms=terms, **shared)
    parts = {name: compute(name, tokens, **shared) for name in terms}
    expected = parts["jsd_topk"].loss_N - 0.5 * parts["reverse_kl_pg"].loss_N + 2 * parts["reward_pg"].loss_N
    assert_equal(found.loss_N, expected)
    assert_equal(gradient(found.loss_N.sum(), student), gradient(expected.sum(), student))
    assert torch.equal(found.clipped_N, parts["reward_pg"].clipped_N | parts["reverse_kl_pg"].clipped_N)
    assert torch.equal(found.clamped_N, parts["reverse_kl_pg"].clamped_N)
    assert found.clipped_N.any()
    assert found.clamped_N.any()


@pytest.mark.parametrize(("options", "needs"), [
    ({"name": "reverse_kl_pg"}, set()),
    ({"name": "reverse_kl_pg", "discount": 0.5}, {"responses"}),
    ({"name": "reward_pg", "discount": 0.5}, {"reward"}),
    ({"name": "jsd_topk", "discount": 0.5}, {"topk"}),
    ({"name": "mixed", "terms": {"reverse_kl_topk": 1.0, "reward_pg": 0.5}}, {"topk", "reward"}),
    ({"name": "mixed", "terms": {"reverse_kl_pg": 1.0, "reward_pg": 0.5}, "discount": 1.0}, {"reward", "responses"}),
    ({"name": "mixed", "terms": {"reverse_kl_pg": 1.0, "reward_pg": 0.0}}, set()),
])  # fmt: skip
def test_a_loss_says_what_it_needs_of_the_cache(options: dict, needs: set[str]) -> None:
    loss = resolve_loss(LossConfig(**options))
    assert {name for name in ("topk", "reward", "responses") if getattr(loss, f"needs_{name}")} == needs


def test_every_registered_loss_resolves_and_the_divergences_need_top_k() -> None:
    assert {name for name in registry.LOSSES if resolve_loss(LossConfig(name=name)).needs_topk} == set(DIVERGENCES)
    assert {name for name in registry.LOSSES if resolve_loss(LossConfig(name=name)).needs_reward} == {"reward_pg"}


USER_LOSSES = """
from opd_cache.learn.losses import Loss, TokenLoss, TokenLogprobs


def squared(tokens: TokenLogprobs, options) -> TokenLoss:
    difference = tokens.student_logprobs_N - tokens.teacher_logprobs_N
    return TokenLoss(difference.square() / 2, (difference > 1))


SQUARED = Loss(squared, needs_topk=False)
BARE = Loss(lambda tokens, options: TokenLoss(tokens.student_logprobs_N), needs_topk=True, needs_responses=True)
"""


@pytest.fixture
def user_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own, importable by this name."""
    (tmp_path / "user_losses_of_a_test.py").write_text(USER_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_losses_of_a_test", raising=False)
    return "user_losses_of_a_test"


def test_user_losses_work_alone_and_as_terms(user_losses: str) -> None:
    tokens = tokens_of(logits(1, 3).log_softmax(-1), logits(2, 3).log_softmax(-1), torch.tensor([0, 1, 2]), 1)
    difference = tokens.student_logprobs_N - tokens.teacher_logprobs_N
    found = compute(f"{user_losses}:SQUARED", tokens)
    assert_equal(found.loss_N, difference.square() / 2)
    assert found.clipped_N.tolist() == (difference > 1).tolist()
    assert found.clamped_N.tolist() == [False] * 3
    terms = {f"{user_losses}:SQUARED": 2.0, f"{user_losses}:BARE": 1.0}
    assert_equal(compute("mixed", tokens, terms=terms).loss_N, difference.square() + tokens.student_logprobs_N)
    needs = resolve_loss(LossConfig(name="mixed", terms=terms))
    assert (needs.needs_topk, needs.needs_reward, needs.needs_responses) == (True, False, True)


def test_a_user_s_function_that_is_no_loss_is_refused(user_losses: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_loss(LossConfig(name=f"{user_losses}:squared"))
    assert str(caught.value) == (
        f"learn.loss.name = '{user_losses}:squared' is a function, expected a Loss: MY_LOSS = Loss(my_function)."
    )


def test_a_token_loss_says_of_no_token_that_it_was_clipped_unless_told() -> None:
    loss = TokenLoss(torch.zeros(4, dtype=torch.float64))
    assert loss.clipped_N.dtype is loss.clamped_N.dtype is torch.bool
    assert loss.clipped_N.tolist() == loss.clamped_N.tolist() == [False] * 4


@pytest.fixture
def recipe_path(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text("run_dir: runs/a\nstudent: {model: s}\nteachers: {main: {model: t}}\nprompts: {path: p.jsonl}\n")
    return str(path)


KNOWN = ", ".join(sorted(registry.LOSSES))
MIXED = "learn.loss.name=mixed"


@pytest.mark.parametrize(("overrides", "expected"), [
    ([MIXED], "learn.loss.name = 'mixed' needs learn.loss.terms, such as {reverse_kl_topk: 1.0, reward_pg: 0.5}."),
    (
        [MIXED, "learn.loss.terms={reward_pg: 0}"],
        "learn.loss.name = 'mixed' needs learn.loss.terms, such as {reverse_kl_topk: 1.0, reward_pg: 0.5}.",
    ),
    (
        ["learn.loss.terms={reward_pg: 1}"],
        "learn.loss.terms is set, but learn.loss.name = 'reverse_kl_pg' has no terms. Set learn.loss.name=mixed, or leave the terms out.",
    ),
    (
        [MIXED, "learn.loss.terms={nope: 1}"],
        f"learn.loss.terms = 'nope' is unknown. Known: {KNOWN}, or your own as 'module:Name'.",
    ),
    (
        [MIXED, "learn.loss.terms={mixed: 1, reward_pg: 1}"],
        "learn.loss.terms.mixed: a mixed loss cannot be a term of itself.",
    ),
    ([MIXED, "learn.loss.terms={reward_pg: .inf}"], "learn.loss.terms.reward_pg = inf is not a finite number."),
    ([MIXED, "learn.loss.terms={reward_pg: .nan}"], "learn.loss.terms.reward_pg = nan is not a finite number."),
    (
        [MIXED, "learn.loss.terms={reward_pg: much}"],
        "learn.loss.terms.reward_pg = 'much' must be a number. (learn.loss.terms={reward_pg: much})",
    ),
    (
        [MIXED, "learn.loss.terms={reward_pg: true}"],
        "learn.loss.terms.reward_pg = true must be a number. (learn.loss.terms={reward_pg: true})",
    ),
    (
        [MIXED, "learn.loss.terms=[reward_pg]"],
        "learn.loss.terms = ['reward_pg'] must be a mapping of keys. (learn.loss.terms=[reward_pg])",
    ),
    # An on-policy token has ratio 1: no gate may shut it out, no cap may shrink it.
    (["learn.loss.gate_low=6"], "learn.loss.gate_low = 6.0 is too large; it must be at most 1."),
    (["learn.loss.gate_high=0.1"], "learn.loss.gate_high = 0.1 is too small; it must be at least 1."),
    (["learn.loss.importance_cap=0.5"], "learn.loss.importance_cap = 0.5 is too small; it must be at least 1."),
    (["learn.loss.importance=none"], "learn.loss.importance = 'none' is unknown. Known: ppo_clip, truncated, gate."),
    (
        ["learn.loss.topk_mass=tail"],
        "learn.loss.topk_mass = 'tail' is unknown. Known: tail_bucket, renormalised, unnormalised.",
    ),
    (["learn.loss.teacher_only_ids=drop"], "learn.loss.teacher_only_ids = 'drop' is unknown. Known: refuse, tail."),
    (["learn.loss.discount=1.5"], "learn.loss.discount = 1.5 is too large; it must be at most 1."),
    (["learn.loss.jsd_beta=-0.1"], "learn.loss.jsd_beta = -0.1 is too small; it must be at least 0."),
    (["learn.loss.skew_alpha=1"], "learn.loss.skew_alpha = 1.0 is too large; it must be below 1."),
    (["learn.loss.entropy_threshold=.nan"], "learn.loss.entropy_threshold = nan is not a finite number."),
])  # fmt: skip
def test_bad_loss_options_are_refused_in_one_line(recipe_path: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe([recipe_path, *overrides])
    assert str(caught.value) == expected


def test_terms_of_a_mixed_loss_survive_printing_and_add_up_over_recipe_files(recipe_path: str, tmp_path: Path) -> None:
    terms = "learn.loss.terms={reverse_kl_topk: 1, 'my_losses:SQUARED': 0.5}"
    recipe = load_recipe([recipe_path, MIXED, terms, "learn.loss.terms.reverse_kl_topk=0"])
    assert recipe.learn.loss.terms == {"reverse_kl_topk": 0.0, "my_losses:SQUARED": 0.5}
    for name, text in (("again.yaml", recipe_yaml(recipe)), ("again.json", recipe_json(recipe))):
        (tmp_path / name).write_text(text)
        assert load_recipe([str(tmp_path / name)]) == recipe


def test_every_loss_option_says_which_loss_uses_it() -> None:
    users = (*registry.LOSSES, "*_topk", "importance=")
    rows = [(key, doc) for key, _, doc in describe_keys(LossConfig) if key != "name"]
    assert [key for key, doc in rows if not any(user in doc.split(": ")[0] for user in users)] == []
