"""The top-k divergences on inputs that break careless ones: −inf, certainty, padding, rounding, nothing at all."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DIVERGENCES, MASSES, V, gradient, logits, tokens_of
from torch import Tensor

from opd_cache.config import LossConfig
from opd_cache.learn.divergences import close_support, tail_logprob
from opd_cache.learn.losses import TokenLogprobs, resolve_loss

NEVER = -torch.inf


def losses(name: str, tokens: TokenLogprobs, **options: object) -> Tensor:
    chosen = LossConfig(name=name, **options)
    return resolve_loss(chosen).compute(tokens, chosen).loss_N


def finite_with_gradient(tokens_from: Callable[[Tensor], TokenLogprobs], name: str, mass: str, student: Tensor) -> None:
    found = losses(name, tokens_from(student.log_softmax(-1)), topk_mass=mass)
    assert torch.isfinite(found).all(), (name, mass, found)
    assert torch.isfinite(gradient(found.sum(), student)).all(), (name, mass)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_impossible_teacher_tokens_and_certain_ones_give_no_nan(name: str, mass: str) -> None:
    certain = torch.full((1, V), NEVER)
    certain[0, 3] = 0.0  # probability exactly 1: a log-prob of 0 is data, not padding
    for sampled in (3, 5):
        for k in (0, 1, V):
            finite_with_gradient(
                lambda student, k=k, sampled=sampled: tokens_of(student, certain, torch.tensor([sampled]), k),
                name, mass, logits(1).float().requires_grad_(),
            )  # fmt: skip


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_extreme_log_probs_give_finite_values_and_gradients(name: str, mass: str, data: st.DataObject) -> None:
    """Log-probs as a cache may hold them: rounded sums above 1, impossible tokens, padding, ids that the student lacks."""
    extreme = st.sampled_from([NEVER, -1e4, -200.0, -104.0, -88.0, -20.0, -1e-3, -1e-8, 0.0])
    k = data.draw(st.integers(0, 4))
    draw = st.lists(st.one_of(extreme, st.floats(-30, 0, width=32)), min_size=2 * k + 2, max_size=2 * k + 2)
    values = data.draw(st.lists(draw, min_size=1, max_size=3))
    table = torch.tensor(values)
    live = table[:, : k + 1].clone().requires_grad_()
    ids = torch.tensor(data.draw(st.lists(st.permutations(range(5)), min_size=len(values), max_size=len(values))))
    tokens = TokenLogprobs(
        target_ids_N=torch.zeros(len(values), dtype=torch.int64),
        student_logprobs_N=live[:, 0],
        sampling_logprobs_N=live[:, 0].detach(),
        teacher_logprobs_N=table[:, k + 1],
        topk_ids_NK=ids[:, :k],
        topk_logprobs_NK=table[:, k + 2 :],
        student_topk_logprobs_NK=live[:, 1:],
        row_N=torch.arange(len(values)),
        reward_advantages_N=torch.zeros(len(values)),
    )
    found = losses(name, tokens, topk_mass=mass)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient(found.sum(), live)).all()


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_empty_batch_and_no_top_k_are_fine(name: str, mass: str) -> None:
    none = logits(1, 0).requires_grad_()
    found = losses(
        name, tokens_of(none.log_softmax(-1), logits(2, 0), torch.zeros(0, dtype=torch.int64), 3), topk_mass=mass
    )
    assert found.shape == (0,)
    assert gradient(found.sum(), none).shape == (0, V)
    finite_with_gradient(
        lambda student: tokens_of(student, logits(2, 3).log_softmax(-1), torch.arange(3), 0),
        name, mass, logits(1, 3).requires_grad_(),
    )  # fmt: skip


def test_tail_of_a_sum_rounded_to_one_is_tiny_and_finite() -> None:
    assert tail_logprob(torch.tensor([[0.0]])).item() == pytest.approx(math.log(1e-7), abs=0.2)
    assert tail_logprob(torch.tensor([[1e-3]])).item() == pytest.approx(math.log(1e-7), abs=0.2)
    assert tail_logprob(torch.tensor([[math.log(0.25)] * 2])).item() == pytest.approx(math.log(0.5), abs=1e-6)
    assert tail_logprob(torch.tensor([[NEVER, NEVER]])).item() == 0
    assert close_support(torch.zeros(2, 0), "tail_bucket").tolist() == [[0], [0]]


@pytest.mark.parametrize("mass", MASSES)
def test_support_without_a_possible_entry_gives_no_nan(mass: str) -> None:
    none = torch.full((1, 2), NEVER, requires_grad=True)
    closed = close_support(none, mass)
    assert closed.tolist() == [[NEVER, NEVER, 0] if mass == "tail_bucket" else [NEVER, NEVER]]
    assert gradient(closed[closed > NEVER].sum(), none).tolist() == [[0, 0]]


def test_improbable_entries_are_renormalised_exactly() -> None:
    closed = close_support(torch.tensor([[-5000.0, -5001.0, NEVER]]), "renormalised")
    assert closed[0, :2].tolist() == pytest.approx([-math.log1p(math.exp(-1)), -1 - math.log1p(math.exp(-1))], abs=1e-3)
    assert closed[0, 2] == NEVER


@pytest.mark.parametrize(("name", "reverse"), [("reverse_kl_topk", True), ("forward_kl_topk", False)])
def test_teacher_tokens_that_the_student_lacks_join_the_tail(name: str, reverse: bool) -> None:
    """The teacher knows V tokens, the student the first V − 2; by hand, with those two in the teacher's tail."""
    teacher = logits(2, 3).log_softmax(-1)
    lacking = torch.full((3, 2), NEVER, dtype=torch.float64)
    student = torch.cat([logits(1, 3)[:, : V - 2].log_softmax(-1), lacking], -1).requires_grad_()
    found = losses(name, tokens_of(student, teacher, torch.tensor([0, 1, 2]), k=V))
    assert torch.isfinite(gradient(found.sum(), student)).all()
    for n in range(3):
        s, t = student[n].exp().tolist(), teacher[n].exp().tolist()
        buckets = [*zip(s[: V - 2], t[: V - 2], strict=True), (1e-7, t[V - 2] + t[V - 1])]
        pairs = buckets if reverse else [(q, p) for p, q in buckets]
        assert found[n].item() == pytest.approx(sum(p * math.log(p / q) for p, q in pairs), abs=1e-5)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "entropy_aware"])
def test_padding_of_a_top_k_changes_nothing_even_with_the_sampled_token_s_id(name: str, mass: str) -> None:
    student, teacher, sampled = logits(1, 4).log_softmax(-1), logits(2, 4).log_softmax(-1), torch.full((4,), 6)
    tokens = tokens_of(student, teacher, sampled, 2)
    padded = TokenLogprobs(**{
        **vars(tokens),
        "topk_ids_NK": torch.cat([tokens.topk_ids_NK, sampled[:, None]], -1),
        "topk_logprobs_NK": torch.cat([tokens.topk_logprobs_NK, torch.full((4, 1), NEVER)], -1),
        "student_topk_logprobs_NK": torch.cat([tokens.student_topk_logprobs_NK, student[:, 6:]], -1),
    })  # fmt: skip
    torch.testing.assert_close(
        losses(name, padded, topk_mass=mass), losses(name, tokens, topk_mass=mass), atol=1e-12, rtol=0
    )


def test_order_of_the_top_k_does_not_matter() -> None:
    tokens = tokens_of(logits(1, 6).log_softmax(-1), logits(2, 6).log_softmax(-1), torch.arange(6), 4)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = TokenLogprobs(**{
        **vars(tokens),
        **{name: getattr(tokens, name)[:, order] for name in ("topk_ids_NK", "topk_logprobs_NK", "student_topk_logprobs_NK")},
    })  # fmt: skip
    for name in DIVERGENCES:
        torch.testing.assert_close(losses(name, shuffled), losses(name, tokens), atol=1e-12, rtol=0)
