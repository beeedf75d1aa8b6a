"""The answers of SGLang and of vLLM's two ways, and broken ones, written out from their documents apart from the code
under test."""

from collections.abc import Sequence
from typing import Any

import numpy as np

PATHS = {"sglang": "/generate", "vllm_generate": "/inference/v1/generate", "vllm_completions": "/v1/completions"}

# One entry a token, None for the first: {"id", "logprob", "rank", "top": [(id, logprob, rank), ...]}.
Entries = list[dict[str, Any] | None]


def top_k_of(body: dict[str, Any]) -> int:
    settings = {**body, **body.get("sampling_params", {})}
    return settings.get("top_logprobs_num", settings.get("prompt_logprobs", 0))


def entries_of(logprobs_TV: np.ndarray, ids: Sequence[int], top_k: int) -> Entries:
    entries: Entries = [None]
    for row, token_id in zip(logprobs_TV[:-1], ids[1:], strict=True):
        best = np.argsort(-row, kind="stable")[:top_k] if top_k else []
        top = [(int(i), float(row[i]), place + 1) for place, i in enumerate(best)]
        own = float(row[token_id])
        entries.append({"id": token_id, "logprob": own, "rank": int((row > own).sum()) + 1, "top": top})
    return entries


def spoiled(entries: Entries, fault: str | None) -> Entries:
    """What a broken server would say; the last entry is always one of the response's."""
    last = dict(entries[-1] or {})
    values = {
        "NaN": np.nan,
        "inf": np.inf,
        "-inf": -np.inf,
        "-9999": -9999.0,
        "positive": 0.25,
        "no number": None,
        "text": "-1.5",
        "true": True,
    }
    if fault in values:
        last["logprob"] = values[fault]
    elif fault == "wrong id":
        last["id"] = (last["id"] + 1) % 258
        last["top"] = [(i, lp, r) for i, lp, r in last["top"] if i != entries[-1]["id"]]  # type: ignore[index]
    elif fault == "bad top":
        last["top"] = [(i, np.nan, r) for i, _, r in last["top"]]
    elif fault == "few":
        last["top"] = last["top"][:-2]
    elif fault == "more than all probability":
        last["top"] = [(i, -0.01, r) for i, _, r in last["top"]]
    elif fault == "short":
        return entries[:-1]
    elif fault == "long":
        return [*entries, last]
    elif fault == "shifted":
        return [*entries[1:], None]
    return [*entries[:-1], last]


def sglang_reply(entries: Entries, body: dict[str, Any]) -> dict[str, Any]:
    start = body["logprob_start_len"]
    ids = body["input_ids"]
    kept = [None, *entries[start + 1 :]]
    meta: dict[str, Any] = {
        "id": "a",
        "finish_reason": {"type": "length", "length": 0},
        "input_token_logprobs": [[e["logprob"], e["id"], None] if e else [None, ids[start], None] for e in kept],
    }
    if body["top_logprobs_num"]:
        meta["input_top_logprobs"] = [[[lp, i, None] for i, lp, _ in e["top"]] if e else None for e in kept]
    return {"text": "", "meta_info": meta}


def vllm_entry(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    values = {str(entry["id"]): (entry["logprob"], entry["rank"])}
    values.update({str(i): (lp, r) for i, lp, r in entry["top"] if str(i) not in values})
    return {name: {"logprob": lp, "rank": r, "decoded_token": None} for name, (lp, r) in values.items()}


def vllm_generate_reply(entries: Entries, body: dict[str, Any]) -> dict[str, Any]:
    found = [vllm_entry(entry) for entry in entries]
    choice = {"index": 0, "token_ids": [7], "finish_reason": "length"}
    return {"request_id": "a", "choices": [choice], "prompt_logprobs": found, "kv_transfer_params": None}


def vllm_completions_reply(entries: Entries, body: dict[str, Any]) -> dict[str, Any]:
    found = [vllm_entry(entry) for entry in entries]
    choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": found}
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}


SHAPES = {
    "sglang": sglang_reply,
    "vllm_generate": vllm_generate_reply,
    "vllm_completions": vllm_completions_reply,
}
