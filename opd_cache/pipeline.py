"""The order of a whole run: baseline evaluation, then rollout → score → learn for every episode, and its evaluation.

What is there already is skipped; the files decide, so the same command continues a run that was killed anywhere.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from opd_cache.estimate import keeps_models
from opd_cache.garbage import no_garbage_collection
from opd_cache.health.stage import check_stage
from opd_cache.retention import remove_policies
from opd_cache.run import Run
from opd_cache.run_dir import PLAN
from opd_cache.status import unfinished_stages

# Runs one stage of one episode to its end. For "eval" the number is the policy version.
Execute = Callable[[str, int], None]


def run_episodes(run: Run, execute: Execute) -> None:
    """All stages of all episodes of the recipe."""
    if run.recipe.eval.path is not None:
        execute("eval", 0)
    for episode in range(run.recipe.num_episodes):
        for stage in _stages_to_run(run, episode):
            execute(stage, episode)
        if run.recipe.eval_is_due(episode + 1):
            execute("eval", episode + 1)


def _stages_to_run(run: Run, episode: int) -> list[str]:
    """All that an episode needs; of a learned one, what `repair` has taken out of it."""
    if not run.is_learned(episode):
        return ["rollout", "score", "learn"]
    has_plan = (run.dir.learn(episode) / PLAN).exists()
    return unfinished_stages(run.dir.episode(episode)) + ([] if has_plan else ["learn"])


class InlineStages:
    """Runs stages in this process. Small models stay warm from one stage to the next; large ones, or where the recipe says
    so, leave their memory to the stage that runs.

    Each part is made when a stage first needs it: learning needs neither the sampler's nor the scorer's packages.
    """

    def __init__(self, run: Run, ranks: Any = None) -> None:
        with no_garbage_collection():
            from opd_cache.learn.ranks import ALONE
            from opd_cache.models import set_torch_threads

        set_torch_threads(run.recipe.torch_threads)
        self.run = run
        self.ranks = ranks or ALONE
        self.keeps_models = keeps_models(run.recipe)
        self.scorers: dict[str, Any] = {}
        self.scorer_configs: dict[str, Any] = {}  # what they were made for

    def __call__(self, stage: str, number: int) -> None:
        getattr(self, stage)(number)

    @cached_property
    def sampler(self) -> Any:
        from opd_cache.rollout.stage import new_sampler

        return new_sampler(self.run, self.run.recipe.student)

    @cached_property
    def engine(self) -> Any:
        from opd_cache.learn.stage import new_engine

        return new_engine(self.run, self.ranks)

    def scorer(self, teacher: str, version: int) -> Any:
        """The warm scorer of a teacher, for what policy `version` sampled; a teacher that moves along with the policy
        gets a new one."""
        from opd_cache.score.stage import new_scorer

        config = self.run.teacher_config(teacher, version)
        if self.scorer_configs.setdefault(teacher, config) != config:
            self._let_go(teacher)  # first, so that two models are never in memory
        if teacher not in self.scorers:
            self.scorers[teacher] = new_scorer(self.run, config)
            self.scorer_configs[teacher] = config
        return self.scorers[teacher]

    def _let_go(self, teacher: str) -> None:
        if (scorer := self.scorers.pop(teacher, None)) is not None:
            scorer.close()

    def make_room(self, *needed: str) -> None:
        """Let go of all models but those of the `needed` parts (sampler, scorers, engine)."""
        held = {part for part in ("sampler", "engine") if part in self.__dict__} | (
            {"scorers"} if self.scorers else set()
        )
        leaving = held - set(needed)
        if self.keeps_models or not leaving:
            return
        from opd_cache.models import give_back_memory

        for teacher in list(self.scorers) if "scorers" in leaving else ():
            self._let_go(teacher)
        if "sampler" in leaving:
            self.sampler.close()
            del self.sampler
        if "engine" in leaving:
            del self.engine
        give_back_memory()

    def rollout(self, episode: int, **share: Any) -> bool:
        with no_garbage_collection():
            from opd_cache.rollout.stage import rollout_episode

        self.make_room("sampler")
        if (version := self.run.recipe.sampling_version(episode)) > 0:
            self._check("learn", version - 1)
        return self._checked(rollout_episode(self.run, episode, self.sampler, **share), "rollout", episode)

    def score(self, episode: int, **share: Any) -> bool:
        with no_garbage_collection():
            from opd_cache.score.stage import score_episode

        self.make_room("scorers")
        self._check("rollout", episode)
        names, sealed = self.run.recipe.teachers_to_score(), []
        version = self.run.recipe.sampling_version(episode)
        for name in names:
            is_sealed = score_episode(self.run, episode, name, self.scorer(name, version), **share)
            sealed.append(self._checked(is_sealed, "score", episode, name))
            if len(names) > 1:
                self._let_go(name)  # one teacher at a time is in memory
        return all(sealed)

    def learn(self, episode: int) -> bool:
        with no_garbage_collection():
            from opd_cache.learn.stage import learn_episode

        self.make_room("engine")
        for name in self.run.recipe.learning_teachers():
            self._check("score", episode, name)
        if episode > 0:
            self._check("learn", episode - 1)
        is_learned = self._checked(learn_episode(self.run, episode, self.engine, self.ranks), "learn", episode)
        self._retire()
        return is_learned

    def _checked(self, is_complete: bool, stage: str, episode: int, teacher: str | None = None) -> bool:
        """is_complete, with a look at the stage's health where it is."""
        if is_complete:
            self._check(stage, episode, teacher)
        return is_complete

    def _check(self, stage: str, episode: int, teacher: str | None = None) -> None:
        """On the first rank; the others end with it. Raises UnhealthyError."""
        self.ranks.from_first(lambda: check_stage(self.run.dir, self.run.recipe, stage, episode, teacher))

    def _retire(self) -> None:
        """Remove the policies that the recipe's rule gives up."""
        if self.ranks.is_first:
            remove_policies(self.run.dir, self.run.recipe)

    def eval(self, version: int) -> None:
        with no_garbage_collection():
            from opd_cache.evals.stage import check_evaluated, evaluate_policy, evaluate_teacher
            from opd_cache.rollout.stage import new_sampler

        if self.run.is_removed(version):
            check_evaluated(self.run, version)
            return
        self.make_room("sampler", "scorers")
        teachers = self.run.recipe.learning_teachers()
        for name in teachers if self.run.recipe.eval.teacher else ():
            # A policy of the run is evaluated under its own version.
            if (config := self.run.recipe.teachers[name]).policy is None:
                sampler = new_sampler(self.run, config)
                evaluate_teacher(self.run, name, sampler)
                sampler.close()
        evaluate_policy(self.run, version, self.sampler, {name: self.scorer(name, version) for name in teachers})
        self._retire()
