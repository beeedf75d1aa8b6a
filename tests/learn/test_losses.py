"""Losses against slow independent formulas in float64, and their gradients by exact enumeration over a tiny vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from opd_cache.config import LossConfig
from opd_cache.learn.losses import (
    TokenLogprobs,
    forward_kl_topk,
    kl_penalty,
    reverse_kl_pg,
    reverse_kl_topk,
    tail_logprob,
)

V = 7


def logits(seed: int, rows: int = 1) -> Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(
    student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, k: int, sampler_NV: Tensor | None = None
) -> TokenLogprobs:
    """The loss's input from whole distributions (log-probs over V)."""
    own = sampled_N[:, None]
    topk = teacher_NV.topk(k, -1)
    sampler_NV = student_NV.detach() if sampler_NV is None else sampler_NV
    return TokenLogprobs(
        target_ids_N=sampled_N,
        student_logprobs_N=student_NV.gather(-1, own)[:, 0],
        sampling_logprobs_N=sampler_NV.gather(-1, own)[:, 0],
        teacher_logprobs_N=teacher_NV.gather(-1, own)[:, 0],
        topk_ids_NK=topk.indices,
        topk_logprobs_NK=topk.values,
        student_topk_logprobs_NK=student_NV.gather(-1, topk.indices),
    )


def full_kl(p_logprobs: list[float], q_logprobs: list[float]) -> float:
    return sum(math.exp(p) * (p - q) for p, q in zip(p_logprobs, q_logprobs, strict=True))


def gradient(loss: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


def reverse_kl_gradient(student: Tensor, teacher_V: Tensor) -> Tensor:
    logprobs = student.log_softmax(-1)[0]
    return gradient((logprobs.exp() * (logprobs - teacher_V)).sum(), student)


def test_policy_gradient_in_expectation_is_the_reverse_kl_gradient() -> None:
    student, teacher = logits(1).requires_grad_(), logits(2).log_softmax(-1)
    logprobs = student.log_softmax(-1).expand(V, V)
    loss = reverse_kl_pg(tokens_of(logprobs, teacher.expand(V, V), torch.arange(V), k=1), LossConfig())
    expected_loss = (student.softmax(-1)[0].detach() * loss.loss_N).sum()
    torch.testing.assert_close(
        gradient(expected_loss, student), reverse_kl_gradient(student, teacher[0]), atol=1e-12, rtol=0
    )
    assert not loss.clipped_N.any()


def test_policy_gradient_from_another_sampler_is_corrected_by_the_ratio() -> None:
    student, teacher, sampler = logits(1).requires_grad_(), logits(2).log_softmax(-1), logits(3).log_softmax(-1)
    tokens = tokens_of(
        student.log_softmax(-1).expand(V, V), teacher.expand(V, V), torch.arange(V), 1, sampler.expand(V, V)
    )
    loss = reverse_kl_pg(tokens, LossConfig(clip_ratio_low=1.0, clip_ratio_high=1e9))
    expected_loss = (sampler.exp()[0] * loss.loss_N).sum()
    torch.testing.assert_close(
        gradient(expected_loss, student), reverse_kl_gradient(student, teacher[0]), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(("ratio", "advantage", "loss", "clipped"), [
    (1.5, 2.0, -2.4, True), (0.5, 2.0, -1.0, False), (1.5, -2.0, 3.0, False), (0.5, -2.0, 1.6, True), (1.1, 2.0, -2.2, False),
])  # fmt: skip
def test_the_clip_removes_gradient_only_where_the_step_would_go_further(
    ratio: float, advantage: float, loss: float, clipped: bool
) -> None:
    student = torch.tensor([math.log(0.3)], dtype=torch.float64, requires_grad=True)
    tokens = TokenLogprobs(
        target_ids_N=torch.tensor([0]),
        student_logprobs_N=student,
        sampling_logprobs_N=student.detach() - math.log(ratio),
        teacher_logprobs_N=student.detach() + advantage,
        topk_ids_NK=torch.zeros(1, 0, dtype=torch.int64),
        topk_logprobs_NK=torch.zeros(1, 0),
        student_topk_logprobs_NK=torch.zeros(1, 0),
    )
    found = reverse_kl_pg(tokens, LossConfig(clip_ratio_low=0.2, clip_ratio_high=0.2))
    assert found.loss_N.item() == pytest.approx(loss)
    assert found.clipped_N.item() is clipped
    assert (gradient(found.loss_N.sum(), student).item() == 0) is clipped


@pytest.mark.parametrize(("loss", "reverse"), [(reverse_kl_topk, True), (forward_kl_topk, False)])
def test_top_k_divergence_reaches_the_full_one_at_k_equal_vocabulary(loss, reverse: bool) -> None:
    student, teacher = logits(1, 5).requires_grad_(), logits(2, 5).log_softmax(-1)
    student_NV = student.log_softmax(-1)
    found = loss(tokens_of(student_NV, teacher, torch.arange(5), k=V), LossConfig()).loss_N
    for n in range(5):
        p, q = student_NV[n].tolist(), teacher[n].tolist()
        assert found[n].item() == pytest.approx(full_kl(p, q) if reverse else full_kl(q, p), abs=1e-6)
    p_NV, q_NV = (student_NV, teacher) if reverse else (teacher, student_NV)
    exact = (p_NV.exp() * (p_NV - q_NV)).sum()
    torch.testing.assert_close(gradient(found.sum(), student), gradient(exact, student), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("loss", "reverse"), [(reverse_kl_topk, True), (forward_kl_topk, False)])
def test_top_k_divergence_is_the_kl_of_the_bucketed_distributions(loss, reverse: bool, k: int) -> None:
    student, teacher = logits(1, V).log_softmax(-1), logits(2, V).log_softmax(-1)
    found = loss(tokens_of(student, teacher, torch.arange(V), k), LossConfig()).loss_N
    for n in range(V):
        listed = set(sorted(range(V), key=lambda v: -teacher[n, v].item())[:k]) | {n}
        s, t = student[n].exp().tolist(), teacher[n].exp().tolist()
        buckets = [[s[v], t[v]] for v in listed] + [
            [sum(s[v] for v in range(V) if v not in listed), sum(t[v] for v in range(V) if v not in listed)]
        ]
        pairs = buckets if reverse else [[q, p] for p, q in buckets]
        assert found[n].item() == pytest.approx(sum(p * math.log(p / q) for p, q in pairs), abs=1e-6)


def test_top_k_divergence_grows_with_k_up_to_the_full_one() -> None:
    student, teacher = logits(4).log_softmax(-1), logits(5).log_softmax(-1)
    values = [
        reverse_kl_topk(tokens_of(student, teacher, torch.tensor([2]), k), LossConfig()).loss_N.item()
        for k in range(1, V + 1)
    ]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(full_kl(student[0].tolist(), teacher[0].tolist()), abs=1e-6)


@pytest.mark.parametrize("loss", [reverse_kl_topk, forward_kl_topk])
def test_impossible_teacher_tokens_and_certain_ones_give_no_nan(loss) -> None:
    student = logits(1).float().requires_grad_()
    teacher = torch.full((1, V), -torch.inf)
    teacher[0, 3] = 0.0
    found = loss(tokens_of(student.log_softmax(-1), teacher, torch.tensor([3]), k=1), LossConfig()).loss_N
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient(found.sum(), student)).all()


def test_tail_of_a_sum_rounded_to_one_is_tiny_and_finite() -> None:
    assert tail_logprob(torch.tensor([[0.0]])).item() == pytest.approx(math.log(1e-7), abs=0.2)
    assert tail_logprob(torch.tensor([[math.log(0.25), math.log(0.25)]])).item() == pytest.approx(
        math.log(0.5), abs=1e-6
    )


def test_gradients_of_the_kl_estimators() -> None:
    """In expectation over the student's samples: k1 gives zero, k2 the reverse-KL gradient, k3 the forward-KL one."""
    student, reference = logits(1).requires_grad_(), logits(2).log_softmax(-1)
    logprobs = student.log_softmax(-1)[0]
    weights = logprobs.exp().detach()
    found = {
        name: gradient((weights * kl_penalty(logprobs, reference[0], name)).sum(), student)
        for name in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(found["k1"], torch.zeros_like(student), atol=1e-12, rtol=0)
    torch.testing.assert_close(found["k2"], reverse_kl_gradient(student, reference[0]), atol=1e-12, rtol=0)
    forward = gradient((reference[0].exp() * (reference[0] - logprobs)).sum(), student)
    torch.testing.assert_close(found["k3"], forward, atol=1e-12, rtol=0)


def test_advantage_options_are_off_by_default_and_do_what_they_say() -> None:
    student, teacher = logits(1, 3).log_softmax(-1), logits(2, 3).log_softmax(-1)
    tokens = tokens_of(student, teacher, torch.tensor([0, 1, 2]), 1)
    advantages = tokens.teacher_logprobs_N - tokens.student_logprobs_N
    torch.testing.assert_close(reverse_kl_pg(tokens, LossConfig()).loss_N, -advantages)
    clamped = reverse_kl_pg(tokens, LossConfig(advantage_clamp=0.1)).loss_N
    torch.testing.assert_close(clamped, -advantages.clamp(-0.1, 0.1))


@pytest.mark.parametrize(("loss", "reverse"), [(reverse_kl_topk, True), (forward_kl_topk, False)])
def test_teacher_tokens_that_the_student_lacks_join_the_tail(loss, reverse: bool) -> None:
    """The teacher knows V tokens, the student the first V − 2; by hand, with those two in the teacher's tail."""
    teacher = logits(2, 3).log_softmax(-1)
    student = torch.cat(
        [logits(1, 3)[:, : V - 2].log_softmax(-1), torch.full((3, 2), -torch.inf, dtype=torch.float64)], -1
    )
    student.requires_grad_()
    found = loss(tokens_of(student, teacher, torch.tensor([0, 1, 2]), k=V), LossConfig()).loss_N
    assert torch.isfinite(gradient(found.sum(), student)).all()
    for n in range(3):
        s, t = student[n].exp().tolist(), teacher[n].exp().tolist()
        buckets = [*zip(s[: V - 2], t[: V - 2], strict=True), (1e-7, t[V - 2] + t[V - 1])]
        pairs = buckets if reverse else [(q, p) for p, q in buckets]
        assert found[n].item() == pytest.approx(sum(p * math.log(p / q) for p, q in pairs), abs=1e-5)
