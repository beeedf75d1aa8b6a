"""What is believed of an answer, on answers written by hand and on broken ones."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_shapes import PATHS, SHAPES, entries_of
from served_teacher import request

from opd_cache.score.scorers.http_shapes import DIALECTS, UnfitReplyError, parse
from opd_cache.score.scores import TokenScores

APIS = sorted(PATHS)


def sglang_answer(response: Sequence[int], own: Sequence[float], tops: Sequence[dict[int, float]]) -> dict:
    """After the prompt [3]."""
    tokens = [[None, 3, None], *([logprob, i, None] for logprob, i in zip(own, response, strict=True))]
    return {
        "meta_info": {
            "input_token_logprobs": tokens,
            "input_top_logprobs": [None, *([[lp, i, "x"] for i, lp in top.items()] for top in tops)],
        }
    }


def parsed(api: str, reply: object, response: Sequence[int], top_k: int) -> TokenScores:
    return parse(DIALECTS[api], reply, request(0, [3], response), top_k, frozenset({"teacher"}))


def test_top_k_are_k_ids_in_rank_order_with_ties_and_with_the_sampled_token_beside_them() -> None:
    # The sampled token 7 is beside the top 2; 11 and 12 tie, the server's ranks tell which comes first.
    entry = {
        "12": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
        "7": {"logprob": -4.0, "rank": 31, "decoded_token": None},
        "11": {"logprob": -1.0, "rank": 1},
    }
    found = parsed("vllm_generate", {"prompt_logprobs": [None, entry]}, [7], 2)
    assert (found.topk_ids.tolist(), found.topk_logprobs.tolist()) == ([[11, 12]], [[-1.0, -1.0]])
    assert (found.logprobs.tolist(), found.rank.tolist()) == ([-4.0], [31])
    # SGLang gives no ranks: of equal log-probs the smaller id comes first; the token's rank counts the likelier ones.
    answer = sglang_answer([12, 7], [-1.0, -4.0], [{12: -1.0, 11: -1.0}, {9: -0.5, 12: -2.0}])
    found = parsed("sglang", answer, [12, 7], 2)
    assert (found.topk_ids.tolist(), found.rank.tolist()) == ([[11, 12], [9, 12]], [1, 0])
    # k + 1 entries: the one beside the top k is left out.
    answer = sglang_answer([7], [-4.0], [{7: -4.0, 9: -0.5, 12: -2.0}])
    assert parsed("sglang", answer, [7], 2).topk_ids.tolist() == [[9, 12]]


def test_probability_one_is_a_log_prob_of_zero() -> None:
    found = parsed("vllm_generate", {"prompt_logprobs": [{}, {"7": {"logprob": 0, "rank": 1}}]}, [7], 0)
    assert found.logprobs.tolist() == [0.0]


def test_top_log_probs_of_another_position_are_refused() -> None:
    tops = [{7: -0.1, 9: -3.0}, {9: -0.2, 7: -5.0}]
    assert parsed("sglang", sglang_answer([7, 9], [-0.1, -0.2], tops), [7, 9], 2).rank.tolist() == [1, 1]
    with pytest.raises(UnfitReplyError, match=r"token 1 of 2: its log-prob is -0.1, but -5 among the top 2"):
        parsed("sglang", sglang_answer([7, 9], [-0.1, -0.2], tops[::-1]), [7, 9], 2)
    with pytest.raises(
        UnfitReplyError, match=r"token 1 of 2: likelier \(-0.1\) than the last of the top 2 that lacks it"
    ):
        parsed("sglang", sglang_answer([7, 9], [-0.1, -0.2], [{9: -0.2, 8: -5.0}, tops[1]]), [7, 9], 2)


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "1", 2**31])
def test_a_rank_that_is_none_is_refused(rank: object) -> None:
    with pytest.raises(UnfitReplyError, match=r"response token 1 of 1: .* is no rank of a token"):
        parsed("vllm_generate", {"prompt_logprobs": [None, {"7": {"logprob": -1.0, "rank": rank}}]}, [7], 0)
    assert parsed("vllm_generate", {"prompt_logprobs": [None, {"7": {"logprob": -1.0}}]}, [7], 0).rank.tolist() == [0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.just("7"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_json_makes_the_parser_fail_in_another_way_than_refusing(data: st.DataObject) -> None:
    """A valid answer with any JSON in any place of it is a score of the right shape, or refused."""
    api = data.draw(st.sampled_from(APIS))
    top_k = data.draw(st.sampled_from([0, 2]))
    row = request(0, [3, 4], [7, 9])
    table = np.log(np.full((4, 12), 1 / 12))
    body = DIALECTS[api].body(row, top_k, "teacher")
    valid = SHAPES[api](entries_of(table, [3, 4, 7, 9], top_k), body)
    root: dict = {"reply": json.loads(json.dumps(valid))}
    place, key = root, "reply"
    while place[key] and isinstance(place[key], dict | list) and data.draw(st.integers(0, 4)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(json_values)
    try:
        found = parse(DIALECTS[api], root["reply"], row, top_k, frozenset({"teacher"}))
    except UnfitReplyError:
        return
    assert found.logprobs.shape == (2,)
    assert found.topk_logprobs.shape == (2, top_k)
    assert (found.logprobs <= 0).all()
    assert np.isfinite(found.logprobs).all()
    assert (found.topk_ids >= 0).all()
