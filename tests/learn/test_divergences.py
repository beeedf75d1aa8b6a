"""The top-k divergences against slow formulas and at their limits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DIVERGENCES, MASSES, V, gradient, logits, slow_divergence, slow_gradient, softmax, tokens_of
from torch import Tensor

from opd_cache.config import LossConfig
from opd_cache.learn.losses import TokenLogprobs, resolve_loss

NEVER = -torch.inf


def losses(name: str, tokens: TokenLogprobs, **options: object) -> Tensor:
    chosen = LossConfig(name=name, **options)
    return resolve_loss(chosen).compute(tokens, chosen).loss_N


def full_vocabulary_loss(name: str, options: LossConfig, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """The textbook formulas over all of the vocabulary."""
    s, t, beta, alpha = student_NV.exp(), teacher_NV.exp(), options.jsd_beta, options.skew_alpha

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(-1)

    m = (1 - beta) * s + beta * t
    unsure = -(t * teacher_NV).sum(-1) > options.entropy_threshold
    return {
        "reverse_kl_topk": kl(s, t),
        "forward_kl_topk": kl(t, s),
        "jsd_topk": beta * kl(t, m) + (1 - beta) * kl(s, m),
        "skew_kl_topk": kl(t, alpha * t + (1 - alpha) * s),
        "skew_reverse_kl_topk": kl(s, alpha * s + (1 - alpha) * t),
        "entropy_aware": kl(s, t) + unsure * options.entropy_forward_coef * kl(t, s),
    }[name]


@pytest.mark.parametrize(("dtype", "value_error", "gradient_error"), [
    (torch.float64, 1e-6, 1e-5), (torch.float32, 1e-5, 1e-5),
])  # fmt: skip
@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_equal_a_slow_formula(
    name: str, mass: str, k: int, dtype: torch.dtype, value_error: float, gradient_error: float
) -> None:
    options = {"topk_mass": mass, "jsd_beta": 0.3, "skew_alpha": 0.2, "entropy_threshold": 0.7}
    student, teacher = logits(1, V).to(dtype).requires_grad_(), logits(2, V).to(dtype)
    sampled = torch.arange(V)
    found = losses(
        name,
        tokens_of(student.log_softmax(-1), teacher.log_softmax(-1), sampled, k),
        entropy_forward_coef=0.5,
        **options,
    )
    found_gradient = gradient(found.sum(), student)
    assert found.dtype is found_gradient.dtype is dtype
    chosen = LossConfig(name=name, entropy_forward_coef=0.5, **options)
    for n in range(V):

        def slow(values: list[float], n: int = n) -> float:
            return slow_divergence(name, chosen, softmax(values), softmax(teacher[n].tolist()), n, k)

        assert found[n].item() == pytest.approx(slow(student[n].tolist()), abs=value_error)
        assert found_gradient[n].tolist() == pytest.approx(slow_gradient(slow, student[n].tolist()), abs=gradient_error)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_form_reaches_the_full_divergence_at_k_equal_vocabulary(name: str, mass: str) -> None:
    options = {"topk_mass": mass, "jsd_beta": 0.7, "entropy_threshold": 1.0}
    student, teacher = logits(3, 20).requires_grad_(), logits(4, 20).log_softmax(-1)
    student_NV = student.log_softmax(-1)
    found = losses(name, tokens_of(student_NV, teacher, torch.arange(20) % V, V), **options)
    exact = full_vocabulary_loss(name, LossConfig(**options), student_NV, teacher)
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(found.sum(), student), gradient(exact.sum(), student), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "entropy_aware"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), sampled=st.integers(0, V - 1), beta=st.floats(0, 1), alpha=st.floats(0, 0.99))
def test_tail_bucket_is_a_lower_bound_that_grows_with_k(
    name: str, seed: int, sampled: int, beta: float, alpha: float
) -> None:
    student, teacher = logits(seed).log_softmax(-1), logits(seed + 1).log_softmax(-1)
    values = [
        losses(name, tokens_of(student, teacher, torch.tensor([sampled]), k), jsd_beta=beta, skew_alpha=alpha).item()
        for k in range(1, V + 1)
    ]
    assert values[0] >= -1e-12
    assert all(less <= more + 1e-7 for less, more in itertools.pairwise(values))


def with_mass_outside(outside: float) -> Tensor:
    """Log-probs of four listed tokens in fixed proportions, and two others that share `outside`."""
    listed = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64) * (1 - outside)
    return torch.cat([listed, torch.full((2,), outside / 2, dtype=torch.float64)]).log()[None]


def test_renormalising_on_both_sides_leaves_mass_outside_free() -> None:
    """A student with 90 % of its mass on tokens that the teacher hardly ever takes."""
    teacher, sampled = with_mass_outside(0.001), torch.tensor([0])
    student = with_mass_outside(0.9).requires_grad_()
    tokens = tokens_of(student.log_softmax(-1), teacher, sampled, 4)
    for name in DIVERGENCES:
        free = losses(name, tokens, topk_mass="renormalised")
        assert free.item() == pytest.approx(0, abs=1e-12)
        assert gradient(free.sum(), student).abs().max() < 1e-12
        charged = losses(name, tokens, topk_mass="tail_bucket")
        assert charged.item() > 0.3
        assert gradient(charged.sum(), student)[0, 4:].min() > 0  # descent takes the mass back


def test_unnormalised_reverse_kl_drains_mass_out_of_the_list_even_where_student_is_teacher() -> None:
    teacher, sampled = with_mass_outside(0.1), torch.tensor([0])
    student = teacher.clone().requires_grad_()
    tokens = tokens_of(student.log_softmax(-1), teacher, sampled, 4)
    drained = gradient(losses("reverse_kl_topk", tokens, topk_mass="unnormalised").sum(), student)
    assert drained[0, :4].min() > 0 > drained[0, 4:].max()
    for mass in ("tail_bucket", "renormalised"):
        still = losses("reverse_kl_topk", tokens, topk_mass=mass)
        assert gradient(still.sum(), student).abs().max() < 1e-9
    moved = tokens_of(with_mass_outside(0.5), teacher, sampled, 4)
    assert losses("reverse_kl_topk", moved, topk_mass="unnormalised").item() < 0


@pytest.mark.parametrize("mass", MASSES)
def test_jsd_is_symmetric_at_one_half_and_a_kl_at_both_ends(mass: str) -> None:
    student, teacher, sampled = logits(5, 9).log_softmax(-1), logits(6, 9).log_softmax(-1), torch.arange(9) % V
    tokens, swapped = tokens_of(student, teacher, sampled, V), tokens_of(teacher, student, sampled, V)
    half = losses("jsd_topk", tokens, topk_mass=mass, jsd_beta=0.5)
    torch.testing.assert_close(half, losses("jsd_topk", swapped, topk_mass=mass, jsd_beta=0.5), atol=1e-12, rtol=0)
    assert (half > 0).all()
    assert (half < math.log(2)).all()
    for beta, name in ((0.0, "forward_kl_topk"), (1.0, "reverse_kl_topk")):
        end = losses("jsd_topk", tokens_of(student, teacher, sampled, 3), topk_mass=mass, jsd_beta=beta)
        assert torch.equal(end, losses(name, tokens_of(student, teacher, sampled, 3), topk_mass=mass))


def test_directions_and_shares_by_hand() -> None:
    """T = (1/2, 1/2), S = (9/10, 1/10): which side of a divergence each option mixes into which."""
    teacher, student = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.9, 0.1]]).double().log()
    tokens = tokens_of(student, teacher, torch.tensor([0]), 2)
    kl_st = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    kl_ts = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    skew_ts = 0.5 * math.log(0.5 / 0.86) + 0.5 * math.log(0.5 / 0.14)  # M = 0.1 T + 0.9 S
    skew_st = 0.9 * math.log(0.9 / 0.54) + 0.1 * math.log(0.1 / 0.46)  # M = 0.1 S + 0.9 T
    m = (0.6, 0.4)  # 0.25 S + 0.75 T
    to_m = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    from_m = 0.9 * math.log(0.9 / m[0]) + 0.1 * math.log(0.1 / m[1])
    expected = {
        "reverse_kl_topk": kl_st,
        "forward_kl_topk": kl_ts,
        "skew_kl_topk": skew_ts,
        "skew_reverse_kl_topk": skew_st,
        "jsd_topk": 0.75 * to_m + 0.25 * from_m,
        "entropy_aware": kl_st,  # log 2 is below the threshold of 0.8
    }
    for name, value in expected.items():
        assert losses(name, tokens, skew_alpha=0.1, jsd_beta=0.75).item() == pytest.approx(value, abs=1e-6), name


def test_skewing_by_alpha_bounds_the_divergence_by_minus_log_alpha() -> None:
    certain_a = torch.tensor([[0.0, -90.0, -95.0]], dtype=torch.float64).log_softmax(-1)
    certain_b = torch.tensor([[-90.0, 0.0, -95.0]], dtype=torch.float64).log_softmax(-1)
    tokens = tokens_of(certain_a, certain_b, torch.tensor([0]), 2)
    assert losses("forward_kl_topk", tokens).item() == pytest.approx(90, abs=1e-3)
    for name in ("skew_kl_topk", "skew_reverse_kl_topk"):
        assert losses(name, tokens, skew_alpha=0.1).item() == pytest.approx(-math.log(0.1), abs=1e-3)
        assert losses(name, tokens, skew_alpha=0.0).item() == pytest.approx(90, abs=1e-3)


def test_forward_kl_is_added_strictly_above_the_entropy_threshold() -> None:
    """Teacher (1/2, 1/4, 1/8, 1/8), its top 2 and a tail of 1/4: an entropy of 1.5 log 2, whatever was sampled."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).double().log().expand(4, 4)
    student = logits(7, 4, 4).log_softmax(-1)
    tokens = tokens_of(student, teacher, torch.arange(4), 2)
    for mass in MASSES:
        reverse = losses("reverse_kl_topk", tokens, topk_mass=mass)
        forward = losses("forward_kl_topk", tokens, topk_mass=mass)
        for threshold, coef in ((1.5 * math.log(2) + 1e-9, 0.0), (1.5 * math.log(2) - 1e-9, 0.3)):
            found = losses(
                "entropy_aware", tokens, topk_mass=mass, entropy_threshold=threshold, entropy_forward_coef=0.3
            )
            torch.testing.assert_close(found, reverse + coef * forward, atol=1e-12, rtol=0)
    certain = tokens_of(
        logits(7, 1, 4).log_softmax(-1), torch.tensor([[0.0, NEVER, NEVER, NEVER]]).double(), torch.tensor([0]), 0
    )
    at_zero = losses("entropy_aware", certain, entropy_threshold=0.0)
    assert torch.equal(at_zero, losses("reverse_kl_topk", certain))
