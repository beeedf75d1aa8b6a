"""The LM head without its logits: log-probs of chosen ids, and the loss on them, chunk by chunk of response tokens.

A [tokens, vocabulary] matrix in float32 is what fills a learner's memory. Here a chunk of it is all that ever exists: the
product W h, whose place its probabilities take, and theirs the gradient (in bfloat16, or with a soft cap, a second matrix
stands beside it). The loss of a token depends on its own log-probs, so its gradient is known as soon as its chunk's
logits are: both passes over a chunk happen while it is at hand, and nothing is computed twice. Only a loss that looks
across the tokens of a response needs all log-probs first; its chunks are then computed again.
"""

# N response tokens, M gathered ids a token, H hidden size, V vocabulary; a chunk's tensors carry the same suffixes,
# those of a part of a chunk P for N

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opd_cache.errors import ModelError
from opd_cache.estimate import ROWS_PER_CHUNK, VALUES_PER_PART
from opd_cache.learn.fused import FusedLogprobs, check_fused, fused_logprobs
from opd_cache.models import LanguageModel

VALUES_PER_CHUNK = 1 << 20  # a small vocabulary takes more rows than these: a chunk's own work is then what costs


class TokenLosses(Protocol):
    """What the head asks of a loss."""

    looks_across: bool  # whether a token's loss depends on other tokens' log-probs

    def __call__(self, rows: slice, logprobs_NM: Tensor, entropy_N: Tensor) -> Tensor:
        """Sum of the losses of these tokens, given their log-probs (with gradient) and entropies (without)."""


class Head(nn.Module):
    """What turns hidden states into logits: scale · (W h + b), then the soft cap of the models that have one.

    Owns the weight a second time, beside the model, so that ZeRO-3 gathers it when this module is called.
    """

    def __init__(self, model: LanguageModel, liger: str = "never") -> None:
        super().__init__()
        if type(model.head) is not nn.Linear:
            raise ModelError(
                f"{model.source}: its LM head is a {type(model.head).__name__}; opd-cache trains models whose head is one linear layer."
            )
        self.weight, self.bias = model.head.weight, model.head.bias
        self.scale, self.softcap = model.logit_scale, model.softcap
        # Neither a bias nor a soft cap is in Liger's kernel.
        self.liger = liger if self.bias is None and self.softcap is None else "never"
        # Whether the weight's gradient is summed where it stays, the weight's own .grad: one tensor of that size less, and
        # three passes over it. For an engine that calls backward on the loss itself and hooks nothing to gradients.
        self.adds_to_grad = False
        self._fused: FusedLogprobs | None = None

    def forward(self, hidden_NH: Tensor, ids_NM: Tensor, losses: TokenLosses | None) -> Tensor:
        """Sum of all tokens' losses, a scalar whose backward reaches the hidden states and the weight.

        Without losses: the log-probs [N, M] of the ids, without gradient.
        """
        if losses is None:
            return self.logprobs(hidden_NH, ids_NM)[0]
        with _plain_precision(self.weight) as dtype:
            if ids_NM.shape[1] == 1 and (fused := self._fused_logprobs(hidden_NH, dtype)):
                hidden, weight = hidden_NH.to(dtype), self.weight.to(dtype)
                logprobs_N, entropy_N = fused(hidden, weight, ids_NM.squeeze(1), self.scale)
                return losses(slice(0, len(ids_NM)), logprobs_N[:, None], entropy_N)
        return _HeadLoss.apply(hidden_NH, self.weight, self.bias, self, ids_NM, losses)

    def _fused_logprobs(self, hidden_NH: Tensor, dtype: torch.dtype) -> FusedLogprobs | None:
        """Liger's way, where it is wanted and gives the same; found out at the first call."""
        if self.liger != "never" and self._fused is None:
            self._fused = fused_logprobs(self.liger, hidden_NH.device, dtype)
            if self._fused is None:
                self.liger = "never"
            else:
                check_fused(self._fused, self._all_logits, hidden_NH.to(dtype), self.weight.to(dtype))
        return self._fused

    def _all_logits(self, hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The plain formula, for a few rows."""
        logprobs_NV = (nn.functional.linear(hidden_NH, weight_VH).float() * scale).log_softmax(-1)
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        return logprobs_NV.gather(-1, ids_N[:, None]).squeeze(1), entropy_N.detach()

    @torch.no_grad()
    def logprobs(self, hidden_NH: Tensor, ids_NM: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probs [N, M] of the given ids, entropy [N]), nats, float32, without gradient."""
        with _plain_precision(self.weight) as dtype:
            bias = None if self.bias is None else self.bias.to(dtype)
            return _gather_all(hidden_NH.to(dtype), self.weight.to(dtype), bias, self, ids_NM)

    def logits(self, product_NV: Tensor) -> Tensor:
        """[N, V] in float32, from W h + b. Where nothing is to be done the product itself."""
        logits_NV = product_NV.float()
        if self.scale != 1:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = (logits_NV / self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def grad_of_product(self, grad_NV: Tensor, product_NV: Tensor) -> Tensor:
        """Gradient of W h + b from that of the logits, in place. Without a soft cap the product itself is not read."""
        if self.softcap is not None:
            for rows in _parts(product_NV):
                grad_NV[rows].mul_(1 - (self.logits(product_NV[rows]) / self.softcap).square_())
        if self.scale != 1:
            grad_NV.mul_(self.scale)
        return grad_NV


class _HeadLoss(torch.autograd.Function):
    """Gradients are computed in the forward, where the logits are; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        ids_NM: Tensor,
        losses: TokenLosses,
    ) -> Tensor:
        with _plain_precision(weight_VH) as dtype:
            hidden, weight = hidden_NH.to(dtype), weight_VH.to(dtype)
            bias = None if bias_V is None else bias_V.to(dtype)
            total = torch.zeros((), device=hidden.device)
            grad_hidden = torch.empty_like(hidden)
            grad_weight, grad_bias = (_new_gradient(parameter, head.adds_to_grad) for parameter in (weight_VH, bias_V))
            known_NM: Tensor | None = None
            if losses.looks_across:
                total, known_NM = _loss_and_grad(
                    losses, slice(0, len(ids_NM)), *_gather_all(hidden, weight, bias, head, ids_NM)
                )
            for rows, product_NV in _products(hidden, weight, bias):
                probs_NV, logprobs_NM, entropy_N = _gather(head, product_NV, ids_NM[rows])
                if known_NM is None:
                    loss, grad_NM = _loss_and_grad(losses, rows, logprobs_NM, entropy_N)
                    total = total + loss
                else:
                    grad_NM = known_NM[rows]
                # d log p[m] / d logits = onehot(m) − p
                grad_NV = probs_NV.mul_(-grad_NM.sum(-1, keepdim=True)).scatter_add_(-1, ids_NM[rows], grad_NM)
                grad_NV = head.grad_of_product(grad_NV, product_NV).to(dtype)
                torch.mm(grad_NV, weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    _add_product(grad_weight, grad_NV.t(), hidden[rows])
                if grad_bias is not None:
                    grad_bias += grad_NV.sum(0)
                del probs_NV, grad_NV  # else the next chunk's stand beside them
        left = (None, None) if head.adds_to_grad else (grad_weight, grad_bias)
        ctx.grads = [
            None if grad is None or parameter is None else grad.to(parameter.dtype)
            for grad, parameter in zip((grad_hidden, *left), (hidden_NH, weight_VH, bias_V), strict=True)
        ]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the weight's gradient is the largest tensor of all.
        grads = [None if grad is None else grad.mul_(outer[0]) for grad in ctx.grads]
        del ctx.grads
        return (*grads, None, None, None)


def _new_gradient(parameter: Tensor | None, is_own: bool) -> Tensor | None:
    """Where to sum a parameter's gradient over chunks: in float32, whatever the weights are; None where it is frozen."""
    if parameter is None or not parameter.requires_grad:
        return None
    if not is_own:
        return torch.zeros_like(parameter, dtype=torch.float32)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@contextlib.contextmanager
def _plain_precision(weight: Tensor) -> Iterator[torch.dtype]:
    """The dtype to compute in, with autocast off: the head casts by itself what it needs, once."""
    device = weight.device.type
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        yield wanted


def _loss_and_grad(losses: TokenLosses, rows: slice, logprobs_NM: Tensor, entropy_N: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = logprobs_NM.requires_grad_()
        loss = losses(rows, leaf, entropy_N)
        (grad_NM,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad_NM


def _gather_all(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head, ids_NM: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs_NM = torch.empty(ids_NM.shape, device=hidden_NH.device)
    entropy_N = torch.empty(len(hidden_NH), device=hidden_NH.device)
    for rows, product_NV in _products(hidden_NH, weight_VH, bias_V):
        logprobs_NM[rows], entropy_N[rows] = _gather(head, product_NV, ids_NM[rows])[1:]
    return logprobs_NM, entropy_N


def _products(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their W h + b) chunk by chunk, each in the place of the last: on a CPU new memory is cleared first."""
    num_rows, most = len(hidden_NH), rows_per_chunk(len(weight_VH), weight_VH.device.type)
    size = -(-num_rows // -(-num_rows // most)) if num_rows else 1  # as many chunks as there must be, of one size
    place_NV = hidden_NH.new_empty(size, len(weight_VH))
    for rows in _slices(num_rows, size):
        product_NV = place_NV[: rows.stop - rows.start]
        if bias_V is None:
            torch.mm(hidden_NH[rows], weight_VH.t(), out=product_NV)
        else:
            torch.addmm(bias_V, hidden_NH[rows], weight_VH.t(), out=product_NV)
        yield rows, product_NV


def _gather(head: Head, product_NV: Tensor, ids_NM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities, log-probs of the ids, entropy) of one chunk, part by part; the first in the product's place if they can be."""
    in_place = head.softcap is None and product_NV.dtype == torch.float32
    probs_NV = product_NV if in_place else torch.empty_like(product_NV, dtype=torch.float32)
    logprobs_NM = torch.empty(ids_NM.shape, device=ids_NM.device)
    entropy_N = torch.empty(len(ids_NM), device=ids_NM.device)
    for rows in _parts(product_NV):
        logits_PV = head.logits(product_NV[rows])
        probs_PV = torch.softmax(logits_PV, -1, out=None if in_place else probs_NV[rows])
        # log Σ exp, from the likeliest token: its probability is at least 1/V, so that its logarithm is exact enough.
        total_P1 = logits_PV.amax(-1, keepdim=True) - probs_PV.amax(-1, keepdim=True).log()
        # A product of matrices, since a sum of products would need a third buffer.
        mean_logit_P = torch.bmm(probs_PV[:, None, :], logits_PV[:, :, None]).flatten()
        entropy_N[rows] = total_P1.squeeze(-1) - mean_logit_P
        logprobs_NM[rows] = logits_PV.gather(-1, ids_NM[rows]) - total_P1
        if in_place:
            product_NV[rows] = probs_PV
    return probs_NV, logprobs_NM, entropy_N


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed over chunks in total's own precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def rows_per_chunk(vocab_size: int, device: str) -> int:
    """Response tokens of a chunk on a type of device."""
    return max(ROWS_PER_CHUNK.get(device, ROWS_PER_CHUNK["cpu"]), VALUES_PER_CHUNK // vocab_size)


def _parts(product_NV: Tensor) -> Iterator[slice]:
    """Rows of a chunk that are worked on together."""
    device = product_NV.device.type
    return _slices(len(product_NV), max(1, VALUES_PER_PART.get(device, VALUES_PER_PART["cpu"]) // product_NV.shape[1]))


def _slices(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
