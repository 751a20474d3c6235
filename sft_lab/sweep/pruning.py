"""The training side of a search: reports each evaluation, and stops a trial that the search has given up."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from sft_lab import ranks
from sft_lab.errors import Pruned
from sft_lab.sweep import study as studies

log = logging.getLogger("sft_lab")


class Reporter(TrainerCallback):
    """Reports `objective` at each evaluation during training, and asks whether going on is worth it."""

    def __init__(self, place: dict[str, Any], objective: str):
        self._trial, self._known = studies.open_trial(place)
        self._objective, self._pruner = objective, place["pruner"]
        self._training = False
        self._pruned: Pruned | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        step, value = state.global_step, metrics.get(self._objective)
        if not self._training or value is None or step >= state.max_steps:
            return
        if ranks.from_leader(ranks.leads() and self._heard(value, step) and self._trial.should_prune()):
            reason = f"{self._objective} {value:.4f} is behind other trials at this step ({self._pruner} pruner)"
            self._pruned = Pruned(step, reason)
            control.should_training_stop = control.should_save = True

    def _heard(self, value: float, step: int) -> bool:
        """Whether the search still listens: it may have given this trial up for dead while its process trained on."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            if step not in self._known:  # a resumed trial comes by its evaluations again
                self._trial.report(value, step)
        except UpdateFinishedTrialError as error:
            log.warning("the search no longer asks for this trial, which goes on: %s", error)
            return False
        return True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = False

    def raise_if_stopped(self) -> None:
        if self._pruned is not None:
            raise self._pruned
