"""The policy gradients, by exact enumeration over a tiny vocabulary, against slow formulas and on extreme inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    IMPORTANCES,
    UNCLIPPED,
    V,
    gradient,
    logits,
    sampled_tokens,
    slow_weight,
    tokens_of,
)
from torch import Tensor

from opd_cache import registry
from opd_cache.config import LossConfig
from opd_cache.learn.losses import TokenLogprobs, TokenLoss, kl_penalty, resolve_loss, token_advantages


def compute(name: str, tokens: TokenLogprobs, **options: object) -> TokenLoss:
    chosen = LossConfig(name=name, **options)
    return resolve_loss(chosen).compute(tokens, chosen)


def reverse_kl_gradient(student: Tensor, teacher_V: Tensor) -> Tensor:
    logprobs = student.log_softmax(-1)[0]
    return gradient((logprobs.exp() * (logprobs - teacher_V)).sum(), student)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


# In expectation


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_policy_gradient_in_expectation_is_the_reverse_kl_gradient(importance: str) -> None:
    """On-policy, at ratio 1, with the default clips, caps and gates."""
    student, teacher = logits(1).requires_grad_(), logits(2).log_softmax(-1)
    tokens = tokens_of(student.log_softmax(-1).expand(V, V), teacher.expand(V, V), torch.arange(V), 1)
    loss = compute("reverse_kl_pg", tokens, importance=importance)
    expected_loss = (student.softmax(-1)[0].detach() * loss.loss_N).sum()
    assert_equal(gradient(expected_loss, student), reverse_kl_gradient(student, teacher[0]))
    assert not loss.clipped_N.any()
    assert not loss.clamped_N.any()


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_policy_gradient_from_another_sampler_is_corrected_by_the_ratio(importance: str) -> None:
    student, teacher, sampler = logits(1).requires_grad_(), logits(2).log_softmax(-1), logits(3).log_softmax(-1)
    student_NV = student.log_softmax(-1).expand(V, V)
    tokens = tokens_of(student_NV, teacher.expand(V, V), torch.arange(V), 1, sampler.expand(V, V))
    loss = compute("reverse_kl_pg", tokens, importance=importance, **UNCLIPPED)
    expected_loss = (sampler.exp()[0] * loss.loss_N).sum()
    assert_equal(gradient(expected_loss, student), reverse_kl_gradient(student, teacher[0]))
    assert not loss.clipped_N.any()


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_reward_policy_gradient_in_expectation_is_that_of_the_expected_reward(importance: str) -> None:
    student, sampler, rewards = logits(1).requires_grad_(), logits(3).log_softmax(-1), logits(4)[0]
    student_NV = student.log_softmax(-1).expand(V, V)
    tokens = tokens_of(student_NV, student_NV.detach(), torch.arange(V), 1, sampler.expand(V, V), rewards)
    loss = compute("reward_pg", tokens, importance=importance, **UNCLIPPED)
    expected_loss = (sampler.exp()[0] * loss.loss_N).sum()
    expected_reward = (student.softmax(-1)[0] * rewards).sum()
    assert_equal(gradient(expected_loss, student), -gradient(expected_reward, student))


def every_response_of_two_tokens() -> tuple[Tensor, Tensor, TokenLogprobs, Tensor]:
    """(student logits [1 + v, v]: first token, then the second after each first; rewards; all v² responses; the probability
    of each under the student, both its tokens)."""
    v = 3
    student, teacher = logits(5, 1 + v, v).requires_grad_(), logits(6, 1 + v, v).log_softmax(-1)
    first, second = torch.arange(v).repeat_interleave(v), torch.arange(v).repeat(v)
    contexts = torch.stack([torch.zeros_like(first), 1 + first], -1).reshape(-1)
    ids = torch.stack([first, second], -1).reshape(-1)
    rewards = logits(7, 1, v * v)[0]
    tokens = tokens_of(
        student.log_softmax(-1)[contexts], teacher[contexts], ids, 1,
        rewards_N=rewards.repeat_interleave(2), row_N=torch.arange(v * v).repeat_interleave(2),
    )  # fmt: skip
    return student, rewards, tokens, tokens.student_logprobs_N.reshape(-1, 2).sum(-1)


def test_with_discount_one_the_policy_gradient_is_that_of_the_kl_of_whole_responses() -> None:
    student, _, tokens, response_logprobs = every_response_of_two_tokens()
    teacher_logprobs = tokens.teacher_logprobs_N.reshape(-1, 2).sum(-1)
    exact = gradient((response_logprobs.exp() * (response_logprobs - teacher_logprobs)).sum(), student)
    weights = response_logprobs.exp().detach().repeat_interleave(2)
    found = {
        discount: gradient((weights * compute("reverse_kl_pg", tokens, discount=discount).loss_N).sum(), student)
        for discount in (1.0, 0.0)
    }
    assert_equal(found[1.0], exact)
    assert_equal(found[0.0][1:], exact[1:])  # the last token has nothing after it
    assert (found[0.0][0] - exact[0]).abs().max() > 0.01


def test_reward_of_a_response_reaches_all_its_tokens() -> None:
    student, rewards, tokens, response_logprobs = every_response_of_two_tokens()
    weights = response_logprobs.exp().detach().repeat_interleave(2)
    found = gradient((weights * compute("reward_pg", tokens).loss_N).sum(), student)
    assert_equal(found, -gradient((response_logprobs.exp() * rewards).sum(), student))


def test_gradients_of_the_kl_estimators() -> None:
    """In expectation over the student's samples: k1 gives zero, k2 the reverse-KL gradient, k3 the forward-KL one."""
    student, reference = logits(1).requires_grad_(), logits(2).log_softmax(-1)
    logprobs = student.log_softmax(-1)[0]
    weights = logprobs.exp().detach()
    found = {
        name: gradient((weights * kl_penalty(logprobs, reference[0], name)).sum(), student)
        for name in ("k1", "k2", "k3")
    }
    assert_equal(found["k1"], torch.zeros_like(student))
    assert_equal(found["k2"], reverse_kl_gradient(student, reference[0]))
    assert_equal(found["k3"], gradient((reference[0].exp() * (reference[0] - logprobs)).sum(), student))


# Token by token


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", ["reverse_kl_pg", "reward_pg"])
def test_value_gradient_and_clipped_share_equal_a_slow_formula(name: str, importance: str, dtype: torch.dtype) -> None:
    """60 tokens of a stale sampler, with ratios on both sides of every bound; gradients by the logits."""
    rows = 60
    student = logits(1, rows).to(dtype).requires_grad_()
    teacher, sampler = logits(2, rows).to(dtype).log_softmax(-1), (logits(1, rows) + logits(3, rows) / 2).to(dtype)
    rewards = logits(4, rows)[:, 0].to(dtype)
    sampled = torch.arange(rows) % V
    tokens = tokens_of(student.log_softmax(-1), teacher, sampled, 1, sampler.log_softmax(-1), rewards)
    options = LossConfig(importance=importance, coef=0.7, importance_cap=1.5, gate_low=0.5, gate_high=1.4)
    loss = compute(name, tokens, importance=importance, coef=0.7, importance_cap=1.5, gate_low=0.5, gate_high=1.4)
    found_gradient = gradient(loss.loss_N.sum(), student)
    num_clipped = 0
    for n in range(rows):
        probs = student[n].double().softmax(-1).tolist()
        own, v = probs[sampled[n]], int(sampled[n])
        ratio = own / sampler[n].double().softmax(-1)[v].item()
        advantage = 0.7 * (teacher[n, v].item() - math.log(own)) if name == "reverse_kl_pg" else rewards[n].item()
        weight, live, clipped = slow_weight(options, ratio, advantage)
        assert loss.loss_N[n].item() == pytest.approx(-weight * advantage, abs=1e-5 if dtype == torch.float32 else 1e-6)
        expected = [-weight * advantage * live * ((i == v) - p) for i, p in enumerate(probs)]
        assert found_gradient[n].tolist() == pytest.approx(expected, abs=1e-5)
        assert loss.clipped_N[n].item() is clipped
        num_clipped += clipped
    assert 10 < num_clipped < 50


@pytest.mark.parametrize(("importance", "ratio", "advantage", "loss", "clipped", "moves"), [
    ("ppo_clip", 1.5, 2.0, -2.4, True, False), ("ppo_clip", 0.5, 2.0, -1.0, False, True),
    ("ppo_clip", 1.5, -2.0, 3.0, False, True), ("ppo_clip", 0.5, -2.0, 1.6, True, False),
    ("ppo_clip", 1.1, 2.0, -2.2, False, True),
    ("ppo_clip", math.exp(25), -1.0, math.exp(20), True, True),
    ("truncated", 1.5, 2.0, -3.0, False, True), ("truncated", 9.0, 2.0, -4.0, True, True),
    ("truncated", 9.0, -2.0, 4.0, True, True), ("truncated", 0.01, -2.0, 0.02, False, True),
    ("gate", 5.0 - 1e-9, 2.0, -10.0, False, True), ("gate", 5.1, 2.0, 0.0, True, False),
    ("gate", 0.19, -2.0, 0.0, True, False), ("gate", 0.2 + 1e-9, -2.0, 0.4, False, True),
])  # fmt: skip
def test_default_bounds_of_the_importance_ratio_by_hand(
    importance: str, ratio: float, advantage: float, loss: float, clipped: bool, moves: bool
) -> None:
    student = torch.tensor([math.log(0.3)], dtype=torch.float64, requires_grad=True)
    sampling, teacher = student.detach() - math.log(ratio), student.detach() + advantage
    found = compute("reverse_kl_pg", sampled_tokens(student, teacher, sampling), importance=importance)
    assert found.loss_N.item() == pytest.approx(loss)
    assert found.clipped_N.item() is clipped
    assert (gradient(found.loss_N.sum(), student).item() != 0) is moves


def test_tokens_without_advantage_are_not_counted_as_clipped() -> None:
    student = torch.tensor([-1.0, -1.0])
    tokens = sampled_tokens(student, student, torch.tensor([-3.0, -0.1]), rewards_N=torch.zeros(2))
    assert not compute("reward_pg", tokens).clipped_N.any()


def test_advantage_options_are_off_by_default_and_do_what_they_say() -> None:
    student, teacher = logits(1, 3).log_softmax(-1), logits(2, 3).log_softmax(-1)
    tokens = tokens_of(student, teacher, torch.tensor([0, 1, 2]), 1)
    advantages = tokens.teacher_logprobs_N - tokens.student_logprobs_N
    torch.testing.assert_close(compute("reverse_kl_pg", tokens).loss_N, -advantages)
    clamp = advantages.abs().median().item() + 1e-6
    clamped = compute("reverse_kl_pg", tokens, advantage_clamp=clamp)
    torch.testing.assert_close(clamped.loss_N, -advantages.clamp(-clamp, clamp))
    assert clamped.clamped_N.tolist() == (advantages.abs() > clamp).tolist() == [a > clamp for a in advantages.abs()]
    assert clamped.clamped_N.sum() == 1
    whitened = TokenLogprobs(**{**vars(tokens), "advantage_mean": 0.5, "advantage_std": 2.0})
    torch.testing.assert_close(compute("reverse_kl_pg", whitened).loss_N, -advantages)
    found = compute("reverse_kl_pg", whitened, normalize_advantages=True, coef=3.0).loss_N
    torch.testing.assert_close(found, -3 * (advantages - 0.5) / 2)
    torch.testing.assert_close(compute("reverse_kl_pg", tokens, coef=0.25).loss_N, -advantages / 4)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=6),
    discount=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    clamp=st.sampled_from([None, 0.5]),
)
def test_discounted_advantages_are_the_sums_over_the_rest_of_each_response(
    lengths: list[int], discount: float, clamp: float | None
) -> None:
    total = sum(lengths)
    teacher, student = -logits(1, 1, total)[0].abs(), -logits(2, 1, total)[0].abs()
    row_N = torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64)
    options = LossConfig(discount=discount, advantage_clamp=clamp)
    found, clamped = token_advantages(teacher, student, row_N, options)
    expected, start = [], 0
    for length in lengths:
        own = (teacher - student)[start : start + length].tolist()
        own = [a if clamp is None else max(-clamp, min(clamp, a)) for a in own]
        expected += [sum(discount ** (s - t) * own[s] for s in range(t, length)) for t in range(length)]
        start += length
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert clamped.tolist() == [clamp is not None and abs(a) > clamp for a in (teacher - student).tolist()]


def test_a_loss_that_does_not_need_responses_can_be_computed_in_slices() -> None:
    student, teacher, sampler = (logits(seed, 12).log_softmax(-1) for seed in (1, 2, 3))
    rows = torch.arange(4).repeat_interleave(3)
    tokens = tokens_of(student, teacher, torch.arange(12) % V, 3, sampler, logits(4, 12)[:, 0], rows)
    sliceable = [name for name in registry.LOSSES if name != "mixed"]
    for name in sliceable:
        assert not resolve_loss(LossConfig(name=name)).needs_responses
        whole = compute(name, tokens)
        pieces = [
            compute(name, TokenLogprobs(**{
                field: value[piece] if isinstance(value, Tensor) else value for field, value in vars(tokens).items()
            }))
            for piece in (slice(0, 5), slice(5, 6), slice(6, 12))
        ]  # fmt: skip
        for field in ("loss_N", "clipped_N", "clamped_N"):
            joined = torch.cat([getattr(piece, field) for piece in pieces])
            torch.testing.assert_close(joined, getattr(whole, field), atol=1e-14, rtol=0)


# Extremes


@pytest.mark.parametrize("importance", IMPORTANCES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_extreme_log_probs_give_finite_values_and_gradients(importance: str, data: st.DataObject) -> None:
    value = st.one_of(st.sampled_from([-math.inf, -1e30, -1e4, -104.0, -88.0, -1e-8, 0.0]), st.floats(-30, 0, width=32))
    num_tokens = data.draw(st.integers(0, 5))
    student, teacher, sampling = (
        torch.tensor(data.draw(st.lists(value, min_size=num_tokens, max_size=num_tokens))) for _ in range(3)
    )
    student.requires_grad_()
    rewards = torch.linspace(-3, 3, num_tokens)
    discount = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    for name in ("reverse_kl_pg", "reward_pg"):
        found = compute(
            name, sampled_tokens(student, teacher, sampling, rewards), importance=importance, discount=discount
        )
        assert torch.isfinite(found.loss_N).all()
        assert torch.isfinite(gradient(found.loss_N.sum(), student)).all()


def test_a_token_impossible_for_the_teacher_counts_as_the_smallest_float32_and_as_clamped() -> None:
    student, teacher = torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([-math.inf, -2.0])
    found = compute("reverse_kl_pg", sampled_tokens(student, teacher, student.detach()))
    assert found.loss_N.tolist() == pytest.approx([86.34, 1.0], abs=0.01)
    assert found.clamped_N.tolist() == [True, False]
    assert gradient(found.loss_N.sum(), student).tolist() == pytest.approx([86.34, 1.0], abs=0.01)


def test_a_teacher_log_prob_of_zero_is_data_not_padding() -> None:
    student = torch.tensor([-1.0], requires_grad=True)
    found = compute("reverse_kl_pg", sampled_tokens(student, torch.zeros(1), student.detach()))
    assert found.loss_N.item() == gradient(found.loss_N.sum(), student).item() == -1
