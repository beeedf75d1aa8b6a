"""What a server serves and how it is spoken to, from what it says of itself."""

import json
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from opd_cache.errors import ConfigError
from opd_cache.score.scorers.http_servers import Server, Servers
from opd_cache.score.scorers.http_shapes import DIALECTS, UnfitReplyError, decoded, reader, shown
from opd_cache.score.scores import ScoreRequest

ABSENT = (403, 404, 405, 501)  # how servers say that they do not have a path
MODELS = "/v1/models"
SGLANG_INFO = ("/get_model_info", "/model_info")  # the older path first: newer servers still know it


@dataclass(frozen=True)
class Served:
    """A served teacher. Servers of one teacher say the same."""

    api: str
    name: str
    root: str  # folder or hub name that the server has loaded
    version: str | None  # of the weights, where the server counts them
    context_length: int | None
    names: frozenset[str]  # all names of the same model: an answer may bear any of them

    def __str__(self) -> str:
        version = f", version {self.version}" if self.version else ""
        return f"{self.name} ({self.root}{version}) | api {self.api} | context {self.context_length or 'not told'}"


async def describe(servers: Servers, client: httpx.AsyncClient, server: Server, api: str, wanted: str | None) -> Served:
    """Ask a server what it serves; `api` may be auto, `wanted` is the recipe's name for it, if it has one.

    Raises FailedTryError, or ConfigError when the server is not what the recipe says.
    """
    cards = _cards(await _get(servers, client, server, MODELS, (404, 405)))
    info = await _sglang_info(servers, client, server) if api in ("auto", "sglang") else {}
    if not cards and "model_path" in info:
        name = str(info.get("served_model_name") or info["model_path"])
        cards = [{"id": name, "max_model_len": info.get("context_length")}]
    card = _chosen(cards, wanted, server.url)
    names = frozenset(other["id"] for other in cards if _is_same(other, card))
    if api == "auto":
        api = "sglang" if "model_path" in info else await _probed(servers, client, server, card["id"], names)
    version = info.get("weight_version")
    return Served(
        api=api,
        name=card["id"],
        root=str(info.get("model_path") or card.get("root") or card["id"]),
        version=None if version is None else str(version),
        context_length=_context_length(card, cards),
        names=names,
    )


def _is_same(other: dict[str, Any], card: dict[str, Any]) -> bool:
    """Whether two names are of one model, which a server may answer under either of."""
    return other["id"] == card["id"] or (other.get("root") is not None and other.get("root") == card.get("root"))


def _context_length(card: dict[str, Any], cards: list[dict[str, Any]]) -> int | None:
    """As the card says; that of an adapter says nothing, but its base model's does."""
    lengths = (one.get("max_model_len") for one in (card, *cards) if one["id"] in (card["id"], card.get("parent")))
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


async def _get(
    servers: Servers, client: httpx.AsyncClient, server: Server, path: str, absent: tuple[int, ...]
) -> dict[str, Any]:
    """A JSON object; empty where the server has none there."""
    try:
        content = await servers.send(client, server, "GET", path, absent=absent)
        found = {} if content is None else servers.read(content, decoded)
    except UnfitReplyError as error:
        raise ConfigError(
            f"{server.url}{path}: {error}; expected JSON. Is this the root of a teacher's server?"
        ) from error
    return found if isinstance(found, dict) else {}


async def _sglang_info(servers: Servers, client: httpx.AsyncClient, server: Server) -> dict[str, Any]:
    for path in SGLANG_INFO:
        info = await _get(servers, client, server, path, ABSENT)
        if "model_path" in info:
            return info
    return {}


def _cards(models: dict[str, Any]) -> list[dict[str, Any]]:
    data = models.get("data")
    found = data if isinstance(data, list) else []
    return [card for card in found if isinstance(card, dict) and isinstance(card.get("id"), str)]


def _chosen(cards: list[dict[str, Any]], wanted: str | None, url: str) -> dict[str, Any]:
    """The card of the model that the recipe names, or of the only one. Raises ConfigError naming both."""
    served = ", ".join(shown(card["id"]) for card in cards)
    if not cards:
        raise ConfigError(f"{url}{MODELS} names no model. Is this the root of a teacher's server?")
    if wanted is None and len(cards) > 1:
        raise ConfigError(f"{url} serves several models: {served}. Choose one with score.http.model.")
    card = cards[0] if wanted is None else next((card for card in cards if card["id"] == wanted), None)
    if card is None:
        raise ConfigError(f"{url} serves {served}, but score.http.model = {shown(wanted)}. Set one of them right.")
    return card


async def _probed(servers: Servers, client: httpx.AsyncClient, server: Server, name: str, names: frozenset[str]) -> str:
    """Which of vLLM's two ways the server has, found by scoring one token. Raises ConfigError when neither."""
    request = ScoreRequest(0, np.zeros(1, np.int32), np.zeros(1, np.int32), 0)
    said = []
    for api in ("vllm_generate", "vllm_completions"):
        dialect = DIALECTS[api]
        content = json.dumps(dialect.body(request, 0, name)).encode()
        try:
            answer = await servers.send(client, server, "POST", dialect.path, content, ABSENT)
            if answer is not None:
                servers.read(answer, reader(dialect, request, 0, names))
                return api
            said.append(f"{dialect.path} is not there")
        except UnfitReplyError as error:
            said.append(f"{dialect.path}: {error}")
    raise ConfigError(
        f"{server.url} is no SGLang server, and gives no log-probs of a prompt as vLLM does ({'; '.join(said)})."
    )
