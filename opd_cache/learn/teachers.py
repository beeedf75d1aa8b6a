"""Several teachers as one: which of a row's scores it is learned from, and how they become a single Score.

Arrays in, arrays out. Where the scores lie and how they are joined is in inputs.py and stream.py.
"""

# R response tokens, K teacher top-k, W teachers of a mixture

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from opd_cache.config import LearnConfig, Recipe
from opd_cache.errors import ConfigError, MismatchError
from opd_cache.types import Float32Array, Rollout, Score

ANY_VALUE = "*"  # of learn.routes: the teacher of every value without one of its own


@dataclass(frozen=True)
class Teaching:
    """How the scores of a row become the one that it is learned from: the only one, its route's, or a mixture."""

    names: tuple[str, ...]  # the teachers, in the order of a row's scores
    weights: tuple[float, ...] = ()  # of a mixture, one a teacher, summing to 1
    mixing: str = "probability"
    routes: Mapping[int, int] = field(default_factory=dict)  # prompt_index → place in names
    keeps_topk: bool = True

    def needed(self, rollout: Rollout) -> list[int]:
        """Places of the scores that the row is learned from."""
        return [self.routes[rollout.prompt_index]] if self.routes else list(range(len(self.names)))

    def combine(self, rollout: Rollout, scores: Sequence[Score]) -> Score:
        """One score for the row; with the first error of those that it needs. Raises MismatchError where a mixture's
        top k cannot be mixed."""
        if len(self.names) == 1:
            return scores[0]
        chosen = [scores[place] for place in self.needed(rollout)]
        failed = next((score for score in chosen if score.error is not None), None)
        if failed is not None:
            return failed
        if not self.keeps_topk:
            chosen = [
                replace(one, topk_ids=one.topk_ids[:, :0], topk_logprobs=one.topk_logprobs[:, :0]) for one in chosen
            ]
        if not self.weights:
            return chosen[0]
        if fault := topk_fault(chosen):
            raise MismatchError(
                f"scores of {rollout.rollout_id}: the top k of the teachers {', '.join(self.names)} {fault}, so learn.teachers cannot mix them for a top-k loss. Use a loss on the sampled token, such as reverse_kl_pg, or learn.routes."
            )
        return mix_scores(chosen, self.weights, self.mixing)


def mix_scores(scores: Sequence[Score], weights: Sequence[float], mixing: str) -> Score:
    """The score of a mixture of W teachers, as long as the shortest; their top k must hold the same ids.

    Its teacher_rank is 0: a mixture ranks nothing.
    """
    num_tokens = min(len(score.teacher_logprobs) for score in scores)
    logprobs = mix_logprobs([score.teacher_logprobs[:num_tokens] for score in scores], weights, mixing)
    order = [np.argsort(score.topk_ids[:num_tokens], axis=1, kind="stable") for score in scores]
    listed = [
        np.take_along_axis(score.topk_logprobs[:num_tokens], places, axis=1)
        for score, places in zip(scores, order, strict=True)
    ]
    topk_ids = np.take_along_axis(scores[0].topk_ids[:num_tokens], order[0], axis=1)
    topk_logprobs = mix_logprobs(listed, weights, mixing)
    likeliest_first = np.argsort(-topk_logprobs, axis=1, kind="stable")
    return replace(
        scores[0],
        teacher_logprobs=logprobs,
        teacher_rank=np.zeros(num_tokens, np.int32),
        topk_ids=np.take_along_axis(topk_ids, likeliest_first, axis=1),
        topk_logprobs=np.take_along_axis(topk_logprobs, likeliest_first, axis=1),
    )


def mix_logprobs(logprobs: Sequence[Float32Array], weights: Sequence[float], mixing: str) -> Float32Array:
    """Log-probs of a mixture from those of its W teachers, arrays of one shape; weights sum to 1.

    probability: log Σ w·p, a distribution. log: Σ w·log p, a product of experts that is not normalised: it sums to at
    most 1 over the vocabulary, and to less the more the teachers differ.
    """
    stacked = np.stack(logprobs).astype(np.float64)
    shares = np.reshape(np.asarray(weights, np.float64), (-1, *[1] * (stacked.ndim - 1)))
    if mixing == "log":
        return (shares * stacked).sum(axis=0).astype(np.float32)
    mixed = np.logaddexp.reduce(np.log(shares) + stacked, axis=0)
    # Rounding may leave a sure token a bit above 0.
    return np.minimum(mixed, 0.0).astype(np.float32)


def topk_fault(scores: Sequence[Score]) -> str | None:
    """What keeps the top k of several scores from being mixed: lists of other lengths or, at a position, other ids."""
    num_tokens = min(len(score.teacher_logprobs) for score in scores)
    widths = [score.topk_ids.shape[1] for score in scores]
    if len(set(widths)) > 1:
        return f"hold {' and '.join(map(str, widths))} ids a token"
    ids = [np.sort(score.topk_ids[:num_tokens], axis=1) for score in scores]
    differs_R = np.any([(other != ids[0]).any(axis=1) for other in ids[1:]], axis=0) if len(ids) > 1 else np.zeros(0)
    return f"hold other ids at response token {int(differs_R.argmax())}" if differs_R.any() else None


def teaching_of(recipe: Recipe, fields: Mapping[int, tuple[str, dict[str, Any]]], keeps_topk: bool) -> Teaching:
    """What the recipe says, for these prompts: prompt_index → (prompt_id, fields); used for routes only.

    Raises ConfigError naming the first prompt whose value has no route.
    """
    config, names = recipe.learn, tuple(recipe.learning_teachers())
    total = sum((config.teachers or {}).values())
    weights = tuple(weight / total for weight in (config.teachers or {}).values())
    routes = {index: names.index(_route(config, index, *prompt)) for index, prompt in fields.items() if config.routes}
    return Teaching(names, weights, config.mixing, routes, keeps_topk)


def _route(config: LearnConfig, index: int, prompt_id: str, fields: dict[str, Any]) -> str:
    routes, name = config.routes or {}, config.route_by or ""
    found = route_value(fields[name]) if name in fields else None
    teacher = routes.get(ANY_VALUE) if found is None else routes.get(found, routes.get(ANY_VALUE))
    if teacher is None:
        has = f"has no field {name!r}" if found is None else f"has {name} = {found!r}"
        raise ConfigError(
            f"prompt {index} ({prompt_id!r}) {has}, which has no route. Known: {', '.join(routes)}. Add it to learn.routes, or a teacher for all others as '{ANY_VALUE}'."
        )
    return teacher


def route_value(value: str | float | bool) -> str:
    """A field's value as learn.routes spells it: texts as they are, 3 as '3', true as 'true'."""
    return value if isinstance(value, str) else str(value).lower()


def teaching_facts(recipe: Recipe) -> dict[str, Any]:
    """What learn/plan.json says of whom is learned from, and of what is left out."""
    config = recipe.learn
    facts: dict[str, Any] = {"teacher": recipe.learning_teachers()[0]}
    if config.teachers:
        facts = {"teachers": config.teachers, "mixing": config.mixing}
    elif config.routes:
        facts = {"routes": config.routes, "route_by": config.route_by}
    return facts if config.drop_where is None else {**facts, "drop_where": config.drop_where}
