"""Optuna as the sweeper: it says what to try next, and a trial tells it what came of that.

Only Optuna's ask-and-tell interface is used. Its study outlives the process: a trial that was killed or failed is asked
for again, with its own values, and so goes on in its own directory; `n_trials` is what there shall be in the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override

from sft_lab.console import say
from sft_lab.errors import ConfigError, RunError
from sft_lab.logs import run_log
from sft_lab.runs import read_json
from sft_lab.sweep import conduct
from sft_lab.sweep import plan as plans
from sft_lab.sweep import study as studies
from sft_lab.sweep.ledger import Outcome, Trial
from sft_lab.sweep.sweepers import GridSweeper, values_of

if TYPE_CHECKING:
    import optuna

# user attributes of a trial
_RETRY_OF = "retry_of"  # the number of the trial that this one takes the place of
_DIRECTORY = "directory"  # of the sweep that asked for it: several machines can share a database
_TRIAL = "trial"  # its name there
_CANNOT_RUN = "cannot_run"
_COMBINED = 256  # combinations of choices and ends that are composed before the first trial


class OptunaSweeper(GridSweeper):
    """Trials that a sampler chooses one after another, or `n_jobs` at a time through a launcher."""

    def __init__(
        self,
        sampler: str,
        n_trials: int,
        n_jobs: int,
        seed: int,
        storage: str,
        pruner: str,
        warmup_steps: int,
        params: dict[str, str] | None = None,
    ):
        super().__init__(params)
        self.sampler, self.n_trials, self.n_jobs, self.seed = sampler, n_trials, n_jobs, seed
        self.storage, self.pruner, self.warmup_steps = storage, pruner, warmup_steps
        self.cannot_run = 0  # trials that contradict themselves, and that the plan could not foresee

    def carry_out(self, overrides: Sequence[Override]) -> None:
        studies.quieten()
        self.fixed = [o.input_line or "" for o in overrides if not o.is_sweep_override()]
        self.swept = [o for o in overrides if o.is_sweep_override()]
        values = {o.get_key_element(): studies.ends_of(o) or values_of(o) for o in self.swept}
        self.space = studies.distributions_of(self.swept, values)
        self._require_sense()
        sweep = self.directory
        with sweep.held():
            plan = conduct.drawn_up(self._corners(values), self, told=self._cost)
            self._require_evaluations(plan.trials)
            if self.settings.dry_run:
                return
            conduct.begin(sweep, self.settings, plan.left_out, self.sampler)
            self.prepared = plan.prepared
            with conduct.under_way():
                self._search()
            conduct.finish(self.watch.outcomes, plan.trials[0], self)
        if self.cannot_run and self.settings.on_bad_trial == "error":
            raise RunError(
                f"sweep {sweep.name}: {self.cannot_run} of the trials that were asked for cannot run "
                "(sweep.on_bad_trial=skip takes no offence)"
            )

    # ------------------------------------------------------------------------------------------------- before it

    def _require_sense(self) -> None:
        if not self.swept:
            raise ConfigError(
                "hydra/sweeper=optuna : nothing varies (allowed: KEY=interval(A,B), KEY=choice(A,B), ...)"
            )
        studies.require_known(self.sampler, self.pruner, self.space)
        for key, least in (("n_trials", 1), ("n_jobs", 1), ("seed", 0), ("warmup_steps", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"hydra.sweeper.{key}={value} : not allowed (allowed: {least}, {least + 1}, ...)")
        if self.n_jobs > 1 and self.in_this_process:
            raise ConfigError(
                f"hydra.sweeper.n_jobs={self.n_jobs} : trials would run one after another and know less of each other "
                "(allowed: 1, or a hydra/launcher such as joblib)"
            )
        if self.sampler == "grid":
            self.n_trials = min(self.n_trials, math.prod(len(studies.grid_values(d)) for d in self.space.values()))

    def _require_evaluations(self, trials: Sequence[Trial]) -> None:
        """
        Raises:
            ConfigError: there is no objective, or what a pruner goes by is not measured.
        """
        if self.settings.objective == "none":
            raise ConfigError("sweep.objective=none : a search needs one (allowed: eval_loss, or one of data.metrics)")
        if self.pruner == "none":
            return
        if self.settings.objective != "eval_loss":
            raise ConfigError(
                f"hydra.sweeper.pruner={self.pruner} : only eval_loss is measured during training, not "
                f"{self.settings.objective} (allowed: pruner=none, or sweep.objective=eval_loss)"
            )
        if any(not trial.config.trainer.eval_steps for trial in trials):
            raise ConfigError(
                f"hydra.sweeper.pruner={self.pruner} : with trainer.eval_steps=0 nothing is measured during training "
                "(allowed: trainer.eval_steps=N, or pruner=none)"
            )

    def _corners(self, values: dict[str, list[str]]) -> Iterator[plans.Candidate]:
        """Trials with each end of an interval and each choice beside the first of all others; and whatever else of
        their combinations contradicts itself.
        """
        first = {key: texts[0] for key, texts in values.items()}
        for key, texts in values.items():
            for text in texts if key == next(iter(values)) else texts[1:]:
                varied = list({**first, key: text}.values())
                yield self.compose([*self.fixed, *varied], varied)
        for combination in itertools.islice(itertools.product(*values.values()), _COMBINED):
            if sum(text != first[key] for key, text in zip(values, combination, strict=True)) > 1:
                candidate = self.compose([*self.fixed, *combination], combination)
                if candidate.config is None:
                    yield candidate

    def _cost(self, plan: plans.Plan) -> str:
        done = [t for t in self.directory.read()["trials"] if self.directory.outcome(t).done]
        return plans.cost_of_search(plan, self.directory, self.n_trials, max(self.n_trials - len(done), 0))

    # --------------------------------------------------------------------------------------------------- the search

    def _search(self) -> None:
        """Ask and tell until there are `n_trials`."""
        study = self._open()
        before = {name: self.directory.outcome(name) for name in self.directory.read()["trials"]}
        self.watch = conduct.Watch(before, self.n_trials)
        studies.require_same_choices(study, self.space)
        self._ask_again(study)
        while (left := self.n_trials - self._counted(study)) > 0:
            asked = [self._ask(study) for _ in range(min(left, self.n_jobs))]
            to_run = {trial.id: trial for _, trial in asked if trial and not trial.outcome.done}
            self.launch(list(to_run.values()), self.watch)
            for number, trial in asked:
                if trial is not None:
                    self._tell(study, number, self.watch.outcomes.setdefault(trial.id, trial.outcome))
            if any(self.directory.run(name).in_use for name in to_run):
                return  # the launcher gave up on jobs that train on: they count when the command is typed again

    def _open(self) -> optuna.Study:
        import optuna

        self.place = self.storage or str(self.directory.study)
        return optuna.create_study(
            storage=studies.storage_of(self.place),
            study_name=self.directory.name,
            direction=conduct.direction(self.settings),  # type: ignore[arg-type]
            pruner=studies.pruner_of(self.pruner, self.warmup_steps),
            load_if_exists=True,
        )

    def _ask_again(self, study: optuna.Study) -> None:
        """Put what was killed or failed in an earlier session of this sweep first in the queue."""
        from optuna.trial import TrialState

        replaced = {trial.user_attrs.get(_RETRY_OF) for trial in study.trials}
        for trial in study.trials:
            ended = trial.state == TrialState.FAIL and not trial.user_attrs.get(_CANNOT_RUN)
            dead = trial.state == TrialState.RUNNING and self._ours(trial) and not self._under_way(trial)
            if dead:
                study.tell(trial.number, state=TrialState.FAIL)
            if (dead or (ended and self._ours(trial))) and trial.number not in replaced:
                study.enqueue_trial(trial.params, user_attrs={_RETRY_OF: trial.number})

    def _ours(self, trial: Any) -> bool:
        """A journal is in this sweep's directory, wherever that is now; a database may be others' too."""
        return not self.storage or trial.user_attrs.get(_DIRECTORY) == str(self.directory.path)

    def _under_way(self, trial: Any) -> bool:
        """Whether a process trains it now, which an earlier session began."""
        name = trial.user_attrs.get(_TRIAL)
        return name is not None and self.directory.run(name).in_use

    def _counted(self, study: optuna.Study) -> int:
        """Trials that have ended, each retried one once, and those that are under way elsewhere."""
        replaced = {trial.user_attrs.get(_RETRY_OF) for trial in study.trials}
        ended = sum(trial.state.is_finished() and trial.number not in replaced for trial in study.trials)
        return ended + sum(not trial.state.is_finished() and self._under_way(trial) for trial in study.trials)

    def _ask(self, study: optuna.Study) -> tuple[int, Trial | None]:
        """The next trial, planned and frozen; None for one that cannot run, which the study is told."""
        study.sampler = studies.sampler_of(self.sampler, self.seed, len(study.trials), self.space)
        asked = study.ask(self.space)
        asked.set_user_attr(_DIRECTORY, str(self.directory.path))
        varied = [f"{key}={asked.params[key]}" for key in self.space]
        candidate = self.compose([*self.fixed, *varied], varied)
        with run_log():
            trial = plans.checked(candidate, self.directory, self.prepared, self.elsewhere)
        if trial is None:
            say(f"left out: {' '.join(varied)}: {'; '.join(candidate.problems)}")
            asked.set_user_attr(_CANNOT_RUN, True)
            self.cannot_run += 1
            self._tell(study, asked.number, Outcome("", "failed"))
            left_out = [*self.directory.read()["left_out"], plans.left_out(candidate)]
            self.directory.write(left_out=left_out)
            return asked.number, None
        asked.set_user_attr(_TRIAL, trial.id)
        self.directory.freeze([trial])
        self.directory.report_to(
            trial.id,
            {
                "storage": self.place,
                "study": study.study_name,
                "number": asked.number,
                "pruner": self.pruner,
                "warmup_steps": self.warmup_steps,
            },
        )
        return asked.number, trial

    def _tell(self, study: optuna.Study, number: int, outcome: Outcome) -> None:
        from optuna.samplers import RandomSampler
        from optuna.trial import TrialState

        if outcome.state in ("new", "running") and self.directory.run(outcome.trial).in_use:
            return
        study.sampler = RandomSampler()  # the grid's stops Optuna's own loop after its last trial
        if outcome.state == "pruned":
            study.tell(number, state=TrialState.PRUNED)
            return
        value = None
        if outcome.done:
            value = read_json(self.directory.run(outcome.trial).result)["metrics"].get(self.settings.objective)
        if value is None or not math.isfinite(value):
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, value)
