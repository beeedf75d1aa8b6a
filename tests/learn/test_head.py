"""The LM head without its logits equals the plain formula, in values, gradients and whatever the chunk size."""

import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import tiny_qwen2
from torch import Tensor, nn

from opd_cache.errors import ModelError
from opd_cache.learn import head as head_module
from opd_cache.learn.head import Head
from opd_cache.models import LanguageModel

TOKENS, IDS, HIDDEN, VOCAB = 50, 4, 32, 258


class AnyLoss:
    """A loss of the log-probs, which keeps the entropies that it saw."""

    def __init__(self, function: Callable[[Tensor], Tensor], looks_across: bool = False) -> None:
        self.function, self.looks_across = function, looks_across
        self.entropies: dict[int, Tensor] = {}

    @property
    def entropy(self) -> Tensor:
        return torch.cat([self.entropies[start] for start in sorted(self.entropies)])

    def __call__(self, rows: slice, logprobs_NM: Tensor, entropy_N: Tensor) -> Tensor:
        self.entropies[rows.start] = entropy_N
        return self.function(logprobs_NM)


def per_token(logprobs: Tensor) -> Tensor:
    return (logprobs[:, 0].square() + logprobs[:, 1:].exp().sum(-1) * logprobs[:, 1]).sum() / TOKENS


def across_tokens(logprobs: Tensor) -> Tensor:
    return (logprobs[:, 0].cumsum(0) * logprobs[:, 1].flip(0)).sum() / TOKENS


def a_head(bias: bool, softcap: float | None, scale: float) -> Head:
    model = LanguageModel(tiny_qwen2(seed=1, tie_word_embeddings=False), "tiny")
    if bias:
        model.head.bias = nn.Parameter(torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)))
    model.softcap, model.logit_scale = softcap, scale
    return Head(model)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (TOKENS, IDS), generator=generator)
    ids[:5, 1] = ids[:5, 0]  # the sampled token is often among the teacher's top k
    return torch.randn(TOKENS, HIDDEN, generator=generator), ids


def plain(
    head: Head, hidden: Tensor, ids: Tensor, function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, entropy, gradients of hidden, weight and bias) by the formula over all logits, in float64."""
    leaves = [hidden.double().requires_grad_(), head.weight.detach().double().requires_grad_()]
    if head.bias is not None:
        leaves.append(head.bias.detach().double().requires_grad_())
    logits = nn.functional.linear(*leaves) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logprobs = logits.log_softmax(-1)
    loss = function(logprobs.gather(-1, ids))
    loss.backward()
    return loss.detach(), -(logprobs.exp() * logprobs).sum(-1).detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("chunk", "part"), [(1, 1), (7, 1), (7, 3), (50, 16), (1000, 1000)])
@pytest.mark.parametrize(("function", "looks_across"), [(per_token, False), (per_token, True), (across_tokens, True)])
@pytest.mark.parametrize(("bias", "softcap", "scale"), [(False, None, 1.0), (True, 5.0, 0.7)])
def test_loss_and_gradients_equal_the_plain_formula(
    inputs: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    part: int,
    function: Callable[[Tensor], Tensor],
    looks_across: bool,
    bias: bool,
    softcap: float | None,
    scale: float,
) -> None:
    monkeypatch.setitem(head_module.ROWS_PER_CHUNK, "cpu", chunk)
    monkeypatch.setitem(head_module.VALUES_PER_PART, "cpu", part * VOCAB)
    monkeypatch.setattr(head_module, "VALUES_PER_CHUNK", 1)
    hidden, ids = inputs
    head = a_head(bias, softcap, scale)
    expected, entropy, gradients = plain(head, hidden, ids, function)
    leaf, loss = hidden.clone().requires_grad_(), AnyLoss(function, looks_across)
    found = head(leaf, ids, loss)
    (2.5 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(loss.entropy.double(), entropy, atol=1e-5, rtol=0)
    for tensor, gradient in zip([leaf, *head.parameters()], gradients, strict=True):
        largest = gradient.abs().max().item()
        torch.testing.assert_close(tensor.grad.double() / 2.5, gradient, atol=1e-5 * max(1, largest), rtol=1e-5)
    logprobs, entropies = head.logprobs(hidden, ids)
    logits = head.logits(nn.functional.linear(hidden, head.weight, head.bias)).double()
    torch.testing.assert_close(logprobs.double(), logits.log_softmax(-1).gather(-1, ids).detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies.double(), entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("function", "looks_across"), [(per_token, False), (across_tokens, True)])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_ligers_fused_head_gives_the_plain_formula_for_the_sampled_token(
    inputs: tuple[Tensor, Tensor], function: Callable[[Tensor], Tensor], looks_across: bool, scale: float
) -> None:
    hidden, ids = inputs

    def of_sampled(logprobs: Tensor) -> Tensor:
        return function(logprobs.expand(-1, 2))

    head = a_head(False, None, scale)
    head.liger = "always"
    expected, entropy, gradients = plain(head, hidden, ids[:, :1], of_sampled)
    leaf, loss = hidden.clone().requires_grad_(), AnyLoss(of_sampled, looks_across)
    found = head(leaf, ids[:, :1], loss)
    found.backward()
    assert head._fused is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(loss.entropy.double(), entropy, atol=1e-5, rtol=0)
    for tensor, gradient in zip([leaf, head.weight], gradients, strict=True):
        torch.testing.assert_close(tensor.grad.double(), gradient, atol=1e-5, rtol=1e-4)


def test_ligers_head_is_used_only_for_what_it_can_do(inputs: tuple[Tensor, Tensor]) -> None:
    hidden, ids = inputs
    for liger, columns in (("always", ids), ("auto", ids[:, :1])):  # top-k ids; no Hopper GPU here
        head = a_head(False, None, 1.0)
        head.liger = liger
        head(hidden.requires_grad_(), columns, AnyLoss(lambda logprobs: logprobs.sum()))
        assert head._fused is None
    for bias, softcap in ((True, None), (False, 5.0)):
        model = LanguageModel(tiny_qwen2(seed=1, tie_word_embeddings=False), "tiny")
        model.softcap, model.head.bias = softcap, nn.Parameter(torch.zeros(VOCAB)) if bias else None
        assert Head(model, "always").liger == "never"


def test_a_fused_head_that_gives_other_numbers_is_refused(
    inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, ids = inputs
    head = a_head(False, None, 1.0)
    head.liger = "always"

    def shifted(hidden: Tensor, weight: Tensor, ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return head._all_logits(hidden, weight, (ids + 1) % VOCAB, scale)

    monkeypatch.setattr(head_module, "fused_logprobs", lambda *_: shifted)
    with pytest.raises(ModelError, match=r"Liger's fused head differs from the plain one by .* of the log-probs"):
        head(hidden.requires_grad_(), ids[:, :1], AnyLoss(lambda logprobs: logprobs.sum()))


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_adds_to_its_own_gradients_sums_what_backward_would(
    inputs: tuple[Tensor, Tensor], bias: bool
) -> None:
    hidden, ids = inputs
    head = a_head(bias, None, 1.0)
    _, _, gradients = plain(head, hidden, ids, per_token)
    head.adds_to_grad = True
    leaf = hidden.clone().requires_grad_()
    for _ in range(3):
        head(leaf, ids, AnyLoss(per_token)).backward()
    for tensor, gradient in zip([leaf, *head.parameters()], gradients, strict=True):
        torch.testing.assert_close(tensor.grad.double(), 3 * gradient, atol=1e-4, rtol=1e-5)


def test_a_frozen_head_passes_the_gradient_on_and_keeps_none(inputs: tuple[Tensor, Tensor]) -> None:
    hidden, ids = inputs
    head = a_head(False, None, 1.0)
    _, _, (expected, _) = plain(head, hidden, ids, per_token)
    head.requires_grad_(False)
    leaf = hidden.clone().requires_grad_()
    head(leaf, ids, AnyLoss(per_token)).backward()
    torch.testing.assert_close(leaf.grad.double(), expected, atol=1e-5, rtol=1e-5)
    assert head.weight.grad is None


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(inputs: tuple[Tensor, Tensor]) -> None:
    hidden, ids = inputs
    head = a_head(False, None, 1.0)
    expected, _, gradients = plain(head, hidden, ids, per_token)
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(leaf, ids, AnyLoss(per_token))
    loss.backward()
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    for tensor, gradient in zip([leaf, head.weight], gradients, strict=True):
        assert tensor.grad.dtype is torch.float32
        similarity = nn.functional.cosine_similarity(tensor.grad.double().flatten(), gradient.flatten(), dim=0)
        assert similarity > 0.999


@pytest.mark.parametrize("looks_across", [False, True])
def test_one_matrix_of_a_chunk_and_the_vocabulary_is_all_that_ever_exists(
    monkeypatch: pytest.MonkeyPatch, looks_across: bool
) -> None:
    monkeypatch.setitem(head_module.VALUES_PER_PART, "cpu", 8 * VOCAB)
    rows = head_module.rows_per_chunk(VOCAB, "cpu")
    tokens, size, alive = 4 * rows, rows * VOCAB, []
    largest = most = 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest, most
            result = function(*args, **(kwargs or {}))
            found = [tensor for tensor in torch.utils._pytree.tree_leaves(result) if isinstance(tensor, Tensor)]
            alive.extend(weakref.ref(tensor) for tensor in found if tensor.numel() == size)
            largest = max(largest, *(tensor.numel() for tensor in found), 0)
            most = max(most, len({tensor.data_ptr() for link in alive if (tensor := link()) is not None}))
            return result

    head = a_head(False, None, 1.0)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    with Watched():
        head(hidden, torch.zeros(tokens, 2, dtype=torch.int64), AnyLoss(per_token, looks_across)).backward()
    assert largest == size
    assert most == 1


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = LanguageModel(tiny_qwen2(seed=1), "tiny")
    model.head = nn.Sequential(model.head)
    with pytest.raises(ModelError, match="tiny: its LM head is a Sequential"):
        Head(model)
