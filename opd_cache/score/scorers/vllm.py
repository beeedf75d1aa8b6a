"""Scoring with vLLM's offline engine: token ids in, log-probs of the response out, in one of two forms.

Where the engine can score chosen ids of chosen rows (its second model runner) and no top-k is asked for, its LM head runs
on the response alone and gives one array. Elsewhere it gives the log-probs of all prompt positions, flat. Either way a
request generates one token, which nobody reads: none is refused.
"""

# P prompt tokens, R response tokens, K teacher top-k

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opd_cache.config import ScoreConfig, TeacherConfig
from opd_cache.errors import ConfigError
from opd_cache.fingerprint import fingerprint_model, model_folder
from opd_cache.models import dtype_name
from opd_cache.score.scores import UNKNOWN_RANK, ScoreRequest, TokenScores, beyond_vocabulary, no_scores
from opd_cache.types import Int32Array
from opd_cache.vllm_engine import VERSION, VllmEngine, flat_form, prompt_logprobs_of, scoring_parameters, with_overrides

# The first model runner holds rows × vocabulary × 6 bytes of one forward's rows, beyond what the engine accounts for.
MAX_BATCHED_TOKENS = 2048


class VllmScorer:
    """A teacher in vLLM."""

    engine = VERSION
    window = 2048

    def __init__(self, teacher: TeacherConfig, options: ScoreConfig) -> None:
        self.teacher, self.options = teacher, options
        self.dtype = dtype_name(teacher)
        self._engine: VllmEngine | None = None

    def fingerprint(self) -> str:
        return fingerprint_model(model_folder(self.teacher))

    def load(self) -> None:
        if self._engine is not None:
            return
        options = with_overrides(self.options.vllm, self.teacher.vllm)
        # Prefixes are cached only to share a prompt among its own samples.
        settings: dict[str, Any] = {"enable_prefix_caching": self.options.share_prompts != "never"}
        if "max_logprobs" not in options.engine_args:
            settings["max_logprobs"] = max(20, self.options.top_k)
        if options.max_num_batched_tokens is None:
            settings["max_num_batched_tokens"] = MAX_BATCHED_TOKENS
        engine = VllmEngine(self.teacher, options, "score.vllm", **settings)
        limit = min(engine.max_logprobs, engine.vocab_size)
        if self.options.top_k > limit:
            engine.close()
            raise ConfigError(
                f"score.top_k = {self.options.top_k}, but the engine gives at most {limit} (max_logprobs {engine.max_logprobs}, {engine.vocab_size} tokens in {self.teacher.model!r})."
            )
        if self.options.support == "student" and not engine.uses_token_ids:
            engine.close()
            raise ConfigError(
                f"score.support = 'student' needs vLLM's second model runner, the default on GPUs; here {self.teacher.model!r} runs on the first, which scores only the teacher's own top k. Use score.scorer=hf."
            )
        self._engine = engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def loaded(self) -> VllmEngine:
        self.load()
        assert self._engine is not None
        return self._engine

    def score(self, requests: Sequence[ScoreRequest], top_k: int) -> Iterator[TokenScores]:
        """One TokenScores a request, in the order in which the engine finishes them. A request beyond the teacher's
        context gets an error, never a truncation."""
        engine = self.loaded
        engine.forget_prefixes()
        scorable: dict[int, ScoreRequest] = {}
        for request in requests:
            if len(request.response_ids) == 0:
                yield no_scores(request.key, top_k)
            elif error := self._unscorable(request):
                yield no_scores(request.key, top_k, error)
            else:
                scorable[request.key] = request
        shares = self.options.share_prompts != "never"
        again = []
        for output in engine.stream(self._asked(request, top_k, shares) for request in scorable.values()):
            request = scorable[int(output.request_id)]
            if (scores := self._scores(output, request, top_k)) is not None:
                yield scores
            else:
                again.append(request)
        # Samples that begin alike share more than their prompt: their first rows were read from the cache, not computed.
        for output in engine.stream(self._asked(request, top_k, shares=False) for request in again):
            scores = self._scores(output, scorable[int(output.request_id)], top_k)
            assert scores is not None, "a request that reads no cache computes all its rows"
            yield scores

    def _unscorable(self, request: ScoreRequest) -> str | None:
        engine = self.loaded
        # One token is generated behind the response.
        if request.num_tokens + 1 > engine.context_length:
            return f"{request.num_tokens} tokens and one more, the teacher's context is {engine.context_length}"
        return beyond_vocabulary(request, engine.vocab_size)

    def _asked(self, request: ScoreRequest, top_k: int, shares: bool) -> tuple[int, list[int], Any]:
        ids = [*request.prompt_ids.tolist(), *request.response_ids.tolist()]
        wanted: dict[str, Any]
        if self._gives_arrays(request, top_k):
            rows = _asked_ids(request)
            wanted = {"prompt_logprob_token_ids": rows, "prompt_logprob_start": len(request.prompt_ids) - 1}
        else:
            wanted = flat_form(top_k)
        return request.key, ids, scoring_parameters(shares_prefixes=shares, **wanted)

    def _gives_arrays(self, request: ScoreRequest, top_k: int) -> bool:
        return self.loaded.uses_token_ids and (top_k == 0 or request.support_ids is not None)

    def _scores(self, output: Any, request: ScoreRequest, top_k: int) -> TokenScores | None:
        """None where rows that count were read from the prefix cache and so never computed."""
        first_row, size = len(request.prompt_ids) - 1, len(request.response_ids)
        if (output.num_cached_tokens or 0) > first_row:
            return None
        if self._gives_arrays(request, top_k):
            if output.prompt_token_id_logprobs is None:
                return None
            ids = _asked_ids(request)
            logprobs = np.asarray(output.prompt_token_id_logprobs, np.float32).reshape(ids.shape)
            return TokenScores(
                request.key, logprobs[:, 0], np.full(size, UNKNOWN_RANK, np.int32), ids[:, 1:], logprobs[:, 1:]
            )
        return TokenScores(request.key, *prompt_logprobs_of(output, request.response_ids, top_k))


def _asked_ids(request: ScoreRequest) -> Int32Array:
    """[R, 1 + K]: each response token's own id, then those of its support."""
    own = request.response_ids[:, None]
    return np.ascontiguousarray(own if request.support_ids is None else np.hstack([own, request.support_ids]))
