"""When the top-k lists of two engines are the same."""

import numpy as np

from opd_cache.score.scores import TokenScores
from opd_cache.types import Float32Array, Score


def assert_same_topk(found: Score | TokenScores, expected: Score | TokenScores, atol: float) -> Float32Array:
    """Log-probs within `atol`, and the same ids wherever that tells them apart; the absolute differences [R, K]."""
    np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=atol, rtol=0)
    is_tie = -np.diff(expected.topk_logprobs, axis=1) <= 2 * atol
    may_swap = np.pad(is_tie, ((0, 0), (1, 0))) | np.pad(is_tie, ((0, 0), (0, 1)))
    may_swap = may_swap[:, : expected.topk_ids.shape[1]]
    assert ((found.topk_ids == expected.topk_ids) | may_swap).all()
    return np.abs(found.topk_logprobs - expected.topk_logprobs)
