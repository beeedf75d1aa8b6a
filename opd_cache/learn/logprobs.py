"""The student's live log-probs, in chunks: no [tokens, vocabulary] matrix outlives its chunk, not even for the backward."""

# N response tokens, M gathered ids a token, H hidden size, V vocabulary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_cache.models import LanguageModel, token_row_chunk


def gather_logprobs(
    model: LanguageModel, hidden_NH: Tensor, ids_NM: Tensor, rows_per_chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probs [N, M] of the given ids, with gradient; entropy [N] without), nats, float32.

    Chunks of rows pass the LM head one by one and are computed again in the backward; a single chunk is kept.
    """
    size = rows_per_chunk or token_row_chunk(model.vocab_size)
    if len(hidden_NH) <= size:
        return _gather(model, hidden_NH, ids_NM)
    pieces = [
        checkpoint(_gather, model, hidden, ids, use_reentrant=False)
        for hidden, ids in zip(hidden_NH.split(size), ids_NM.split(size), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in pieces]), torch.cat([entropy for _, entropy in pieces])


def _gather(model: LanguageModel, hidden_NH: Tensor, ids_NM: Tensor) -> tuple[Tensor, Tensor]:
    logprobs_NV = model.logits(hidden_NH).log_softmax(-1)
    with torch.no_grad():
        probs_NV = logprobs_NV.exp()
        # 0 · −inf is NaN: an impossible token adds nothing.
        entropy_N = -torch.where(probs_NV > 0, probs_NV * logprobs_NV, 0.0).sum(-1)
    return logprobs_NV.gather(-1, ids_NM), entropy_N
