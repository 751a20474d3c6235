"""What watches a training run: metrics, the terminal, checkpoints' seals, and the signals that end it."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft_lab import adapter, checkpoints, ranks
from sft_lab.console import Progress
from sft_lab.errors import Interrupted, RunError
from sft_lab.runs import RunDirectory
from sft_lab.tracking import Tracker, flatten_event
from sft_lab.unlogged import Unlogged


class TokenCounter:
    """Counts the tokens that training passes through the model, padding left out.

    SFTTrainer's own num_tokens counts one row of a batch when there is no attention mask.
    """

    def __init__(self, model: Any, pad_token_id: int, start: int = 0):
        self._pad, self._start = pad_token_id, start
        self._seen: Any = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training and "input_ids" in kwargs:
            self._seen = self._seen + (kwargs["input_ids"] != self._pad).sum()  # stays on the device until asked for

    def total(self) -> int:
        """Over all ranks, which must ask together."""
        return self._start + ranks.total(int(self._seen))


class Metrics(TrainerCallback):
    """Writes each logging event to metrics.jsonl, the tracker and the terminal, and stops a run that diverged."""

    def __init__(self, run: RunDirectory, tracker: Tracker, progress: Progress, past: Unlogged):
        self.run, self.tracker, self.progress = run, tracker, progress
        self.counter: TokenCounter | None = None  # set once the model is there
        self._before_s, self.past_tokens = past.time_s, past.tokens
        self._last = (0.0, self.past_tokens)
        self._began = time.perf_counter()
        self.trained_s = self._before_s  # time_s as training ended

    @property
    def time_s(self) -> float:
        """Seconds spent training, over all sessions of the run, without evaluation."""
        return self._before_s + time.perf_counter() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()
        self._last = (self.time_s, self.past_tokens)
        self.progress.start(state.max_steps, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trained_s = self.time_s
        self.progress.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.step(state.global_step)
        if state.global_step == state.max_steps:  # where logging_steps does not divide
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if not math.isfinite(logs.get("eval_loss", 0.0)):  # before anyone is told of it
            raise _diverged(f"eval loss is {logs['eval_loss']}", args, state)
        if "loss" not in logs:  # an evaluation, or the summary at the end of training
            return
        assert self.counter is not None
        now, tokens = self.time_s, self.counter.total()
        event: dict[str, Any] = {
            "step": state.global_step,
            "split": "train",
            "time_s": round(now, 3),
            **{key: logs[key] for key in _TRAIN_KEYS if key in logs},
            "tokens": tokens,
            "tokens_per_s": round((tokens - self._last[1]) / max(now - self._last[0], 1e-9), 1),
        }  # fmt: skip
        self._last = (now, tokens)
        # In fp16 the loss scaler finds its scale by overflowing: such a step has no finite gradient and is skipped.
        for key in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if not math.isfinite(event.get(key, 0.0)):
                raise _diverged(f"{key} is {event[key]}", args, state)
        self.record(event)
        self.progress.report(event)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        kept = {key.removeprefix("eval_"): value for key, value in metrics.items() if key in _EVAL_KEYS}
        event = {"step": state.global_step, "split": "eval", "time_s": round(self.time_s, 3), **kept}
        self.record(event)
        self._began += metrics.get("eval_runtime", 0.0)
        self.progress.report(event)

    def record(self, event: dict[str, Any]) -> None:
        if ranks.leads():
            self.run.append_metrics(event)
            self.tracker.log(flatten_event(event), event["step"])


_TRAIN_KEYS = ("loss", "grad_norm", "learning_rate", "epoch", "entropy", "mean_token_accuracy")
_EVAL_KEYS = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy", "eval_runtime")


def _diverged(what: str, args: Any, state: Any) -> RunError:
    decay = f", or trainer.weight_decay={args.weight_decay:g}" if args.weight_decay else ""
    return RunError(
        f"{what} at step {state.global_step}: training has diverged "
        f"(trainer.learning_rate={args.learning_rate:g}{decay} may be too high)"
    )


class Opening(TrainerCallback):
    """What is to be done once the model is wrapped, sharded and, where a run goes on, loaded."""

    def __init__(self, work: Callable[[], None]):
        self._work = work

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._work()


class Saving(TrainerCallback):
    """Says when a checkpoint is due by the clock, and marks one as whole once every rank has written its last file.

    Args:
        limit: how many to keep; the Trainer would count whatever is named like one, and delete it.
        add: what puts more into a checkpoint than the Trainer does.
    """

    def __init__(self, run: RunDirectory, every_minutes: float, limit: int, add: Callable[[Path], None]):
        self.run, self._every_s, self._limit, self._add = run, 60 * every_minutes, limit, add
        self._saved_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._every_s:
            return
        due = ranks.leads() and time.monotonic() - self._saved_at >= self._every_s
        if any(ranks.agreed(due)):  # every clock goes its own way
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """
        Raises:
            RunError: what is trained is no longer finite, which the loss may tell some steps later; no seal then.
        """
        (broken,) = ranks.agreed(not adapter.is_finite(model))
        if broken:
            raise _diverged("weights are not finite", args, state)
        self._saved_at = time.monotonic()
        checkpoint = checkpoints.at(self.run, state.global_step)
        self._add(checkpoint)
        if ranks.leads():
            checkpoints.seal(checkpoint)
            checkpoints.keep(self.run, self._limit)
            self.run.set_status("running", step=state.global_step)


class Stop(TrainerCallback):
    """SIGINT, SIGTERM, and SIGUSR1 or SIGUSR2, by which a cluster warns of the end: in training, save at the end of the
    step and leave; elsewhere, or the second time, at once.

    What comes again within a second is the same one: a terminal and a launcher may both have passed it on. Of several
    ranks each may hear it in another step, or some alone: they agree at the end of each step. A second signal is
    nothing to them, since who started them passes on what they have heard already.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._training = False
        self._is_echo = echoes()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {s: signal.signal(s, self._on_signal) for s in STOPPING}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self._is_echo():
            return
        if not self._training or (self.signum and not ranks.together()):
            raise Interrupted(signum)
        self.signum = self.signum or signum

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (heard,) = ranks.agreed(self.signum)
        if heard:
            self.signum = heard
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = False

    def raise_if_stopped(self) -> None:
        (heard,) = ranks.agreed(self.signum)
        if heard:
            raise Interrupted(heard)


def echoes() -> Callable[[], bool]:
    """A function to be called at each signal, which says whether it is one that was heard less than a second ago."""
    heard_at = -math.inf

    def is_echo() -> bool:
        nonlocal heard_at
        if time.monotonic() - heard_at < 1:
            return True
        heard_at = time.monotonic()
        return False

    return is_echo


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
