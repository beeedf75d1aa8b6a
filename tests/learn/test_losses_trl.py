"""Our losses against TRL 1.16's own functions, value and gradient, where both say the same thing.

TRL's trainers are used without their constructors, which load models: their loss functions only read a few options.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from loss_cases import MASSES, V, gradient, logits, tokens_of
from torch import Tensor

from opd_cache.config import LossConfig
from opd_cache.learn.losses import TokenLogprobs, resolve_loss

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
N = 11


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """The parts of TRL with a loss in them. Its imports warn and take seconds."""
    pytest.importorskip("trl", exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.async_distillation import async_distillation_trainer
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
        from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
        from trl.experimental.sdpo import loss_utils
        from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer
        from trl.kernels import chunked_divergence
    return SimpleNamespace(
        gkd=GKDTrainer,
        iw_opd=IWOPDTrainer,
        server=ServerDistillationTrainer,
        asynchronous=async_distillation_trainer,
        sdpo=loss_utils,
        kernel=chunked_divergence.ChunkedDivergenceFunction,
    )


@pytest.fixture
def student() -> Tensor:
    return logits(1, N).requires_grad_()


@pytest.fixture
def teacher() -> Tensor:
    return logits(2, N)


def losses(name: str, tokens: TokenLogprobs, **options: object) -> Tensor:
    chosen = LossConfig(name=name, **options)
    return resolve_loss(chosen).compute(tokens, chosen).loss_N


def jsd(tokens: TokenLogprobs, beta: float, mass: str) -> Tensor:
    return losses("jsd_topk", tokens, jsd_beta=beta, topk_mass=mass)


def assert_same(ours: Tensor, theirs: Tensor, student: Tensor, error: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, atol=error, rtol=0)
    assert_same_gradient(ours, theirs, student, error)


def assert_same_gradient(ours: Tensor, theirs: Tensor, student: Tensor, error: float = 1e-9) -> None:
    torch.testing.assert_close(gradient(ours.sum(), student), gradient(theirs.sum(), student), atol=error, rtol=0)


def tokens_at(ids_NK: Tensor, listed_NK: Tensor, student: Tensor, teacher: Tensor) -> TokenLogprobs:
    """Our input with a support that TRL chose; entries that are not listed are padding, and the first is the sampled."""
    student_NV, teacher_NV = student.log_softmax(-1), teacher.log_softmax(-1)
    tokens = tokens_of(student_NV, teacher_NV, ids_NK[:, 0], 0)
    return TokenLogprobs(**{
        **vars(tokens),
        "topk_ids_NK": ids_NK,
        "topk_logprobs_NK": teacher_NV.gather(-1, ids_NK).masked_fill(~listed_NK, -torch.inf),
        "student_topk_logprobs_NK": student_NV.gather(-1, ids_NK),
    })  # fmt: skip


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mass", MASSES)
def test_jsd_over_the_full_vocabulary_is_gkd_s(
    trl: SimpleNamespace, student: Tensor, teacher: Tensor, beta: float, mass: str
) -> None:
    theirs = trl.gkd.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none")[0].sum(-1)
    tokens = tokens_of(student.log_softmax(-1), teacher.log_softmax(-1), torch.arange(N) % V, V)
    assert_same(jsd(tokens, beta, mass), theirs, student)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_over_the_full_vocabulary_is_that_of_the_distillation_trainer_s_kernel(
    trl: SimpleNamespace, beta: float
) -> None:
    """In float32, from hidden states; the head is the identity."""
    student, teacher, head = logits(1, N).float().requires_grad_(), logits(2, N).float(), torch.eye(V)
    theirs, _ = trl.kernel.apply(student, head, None, teacher, head, None, beta)
    tokens = tokens_of(student.log_softmax(-1), teacher.log_softmax(-1), torch.arange(N) % V, V)
    assert_same(jsd(tokens, beta, "tail_bucket"), theirs, student, error=2e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("mass", "add_tail"), [("tail_bucket", True), ("renormalised", False)])
def test_jsd_on_a_top_k_support_is_that_of_the_iw_opd_trainer(
    trl: SimpleNamespace, student: Tensor, teacher: Tensor, mass: str, add_tail: bool, beta: float, k: int
) -> None:
    """Its support is the teacher's top k at β = 0, the student's at β = 1, else both."""
    theirs = trl.iw_opd.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, reduction="none", top_k=k, add_tail=add_tail
    )[0].sum(-1)
    sides = [teacher] if beta == 0 else [student] if beta == 1 else [teacher, student]
    ids_NK = torch.cat([side.topk(k, -1).indices for side in sides], -1)
    is_first_NK = ~((ids_NK[:, :, None] == ids_NK[:, None]).tril(-1).any(-1))
    assert_same(jsd(tokens_at(ids_NK, is_first_NK, student, teacher), beta, mass), theirs, student)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("mass", "add_tail"), [("tail_bucket", True), ("renormalised", False)])
def test_jsd_on_a_top_k_support_is_that_of_the_self_distillation_loss(
    trl: SimpleNamespace, student: Tensor, teacher: Tensor, mass: str, add_tail: bool, beta: float, k: int
) -> None:
    theirs = trl.sdpo.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=k, distillation_alpha=beta, distillation_add_tail=add_tail
    )
    ids_NK = student.topk(k, -1).indices
    tokens = tokens_at(ids_NK, torch.ones_like(ids_NK, dtype=torch.bool), student, teacher)
    assert_same(jsd(tokens, beta, mass), theirs, student)


@pytest.mark.parametrize("beta", BETAS[1:])
@pytest.mark.parametrize(("mass", "add_tail"), [("tail_bucket", True), ("renormalised", False)])
def test_jsd_on_top_1_and_the_sampled_token_is_that_of_the_server_trainer(
    trl: SimpleNamespace, student: Tensor, teacher: Tensor, mass: str, add_tail: bool, beta: float
) -> None:
    """Its support is the teacher's first and the sampled token; at β = 1 the sampled token alone."""
    trainer = trl.server.__new__(trl.server)
    trainer.beta, trainer.loss_add_tail, trainer.reverse_kl_top_1_mode = beta, add_tail, "sampled"
    sampled = torch.arange(N) % V
    tokens = tokens_of(student.log_softmax(-1), teacher.log_softmax(-1), sampled, 1)
    theirs = trainer._compute_server_sparse_top_1_divergence_loss(
        {
            "actual_logprobs": tokens.teacher_logprobs_N[None],
            "topk_logprobs": tokens.topk_logprobs_NK[None],
            "topk_token_ids": tokens.topk_ids_NK[None],
        },
        student.log_softmax(-1)[None],
        sampled[None],
        sampled[None],
    )
    if beta == 1:
        tokens = tokens_of(student.log_softmax(-1), teacher.log_softmax(-1), sampled, 0)
    assert_same(jsd(tokens, beta, mass).mean(), theirs, student)


@pytest.mark.parametrize(("mass", "add_tail"), [("tail_bucket", True), ("renormalised", False)])
def test_forward_kl_on_top_k_and_the_sampled_token_is_that_of_the_async_trainer(
    trl: SimpleNamespace, mass: str, add_tail: bool
) -> None:
    student, teacher, sampled = logits(1, N).float().requires_grad_(), logits(2, N).float(), torch.arange(N) % V
    teacher_NV, k = teacher.log_softmax(-1), 3
    ids_NS = torch.cat([teacher_NV.topk(k, -1).indices, sampled[:, None]], -1)
    valid_NS = torch.ones_like(ids_NS, dtype=torch.bool)
    valid_NS[:, k] = (ids_NS[:, :k] != sampled[:, None]).all(-1)
    theirs = trl.asynchronous._jsd_loss_chunk(
        student, torch.eye(V), None, 1.0, None, ids_NS, teacher_NV.gather(-1, ids_NS), valid_NS, 0.0, 1.0, add_tail,
        None, 1,
    )[0]  # fmt: skip
    tokens = tokens_of(student.log_softmax(-1), teacher_NV, sampled, k)
    assert_same(losses("forward_kl_topk", tokens, topk_mass=mass).sum(), theirs, student, error=1e-5)


def test_policy_gradient_is_that_of_the_iw_opd_trainer_on_policy(
    trl: SimpleNamespace, student: Tensor, teacher: Tensor
) -> None:
    """Without its prefix weights (γ = 0). Its value is −A · log p, ours −A; the gradient is what counts."""
    trainer = trl.iw_opd.__new__(trl.iw_opd)
    trainer.temperature, trainer.iw_opd_gamma, trainer.iw_opd_epsilon = 1.0, 0.0, 1e-8
    trainer.model, trainer._metrics = SimpleNamespace(training=False), {"eval": _Lists()}
    sampled = torch.arange(N) % V
    tokens = tokens_of(student.log_softmax(-1), teacher.log_softmax(-1), sampled, 1)
    theirs = trainer._compute_iw_opd_loss(student[None], sampled[None], sampled[None], tokens.teacher_logprobs_N[None])
    assert_same_gradient(losses("reverse_kl_pg", tokens).mean(), theirs, student)


@pytest.mark.parametrize("cap", [1.0, 2.0, 1e9])
def test_truncated_importance_weights_are_those_of_the_self_distillation_loss(
    trl: SimpleNamespace, student: Tensor, teacher: Tensor, cap: float
) -> None:
    sampler, sampled = (logits(1, N) + logits(3, N) / 2).log_softmax(-1), torch.arange(N) % V
    tokens = tokens_of(student.log_softmax(-1), teacher.log_softmax(-1), sampled, 1, sampler)
    theirs = trl.sdpo.apply_importance_sampling_clipping(
        trl.sdpo.compute_sampled_token_self_distillation_loss(student, teacher, sampled, distillation_alpha=1.0),
        tokens.student_logprobs_N, tokens.sampling_logprobs_N, cap,
    )  # fmt: skip
    ours = losses("reverse_kl_pg", tokens, importance="truncated", importance_cap=cap)
    assert_same_gradient(ours, theirs, student)


class _Lists(dict):
    def __missing__(self, key: str) -> list:
        return self.setdefault(key, [])
