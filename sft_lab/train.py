"""The story of one run."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from sft_lab import adapter, checkpoints, console, distributed, held_out, outcome, ranks, tracking, unlogged
from sft_lab import config as configs
from sft_lab import model as models
from sft_lab import trainer as trainers
from sft_lab.callbacks import Metrics, Opening, Saving, Stop, TokenCounter
from sft_lab.data import inspection, references, view
from sft_lab.data.prepared import Prepared
from sft_lab.errors import Interrupted, PreflightError, Pruned
from sft_lab.failures import explained
from sft_lab.runs import RunDirectory, read_json, whole_directory
from sft_lab.schema import Config

log = logging.getLogger("sft_lab")

_ROWS_SHOWN = 4  # in the tracker, token by token


def run(config: Config, run: RunDirectory, data: Prepared, stop: Stop, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """As `_run`, with a sentence for what a want of disk or memory raises."""
    with explained(config, run):
        return _run(config, run, data, stop, callbacks)


def _run(config: Config, run: RunDirectory, data: Prepared, stop: Stop, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Train what the run directory holds, from its newest whole checkpoint where there is one; returns result.json.

    Raises:
        RunError: training diverged or what it made is not whole.
        Interrupted: a signal ended it; a checkpoint was saved if training had begun.
        Pruned: one of `callbacks` ended it.
    """
    checkpoint = ranks.from_leader(_rewind(run) if ranks.leads() else None)
    tracker = _open_tracker(config, run)
    exit_code = 1
    try:
        console.say(tracker.message)
        console.show_facts(_facts(config, run, data))
        _show_data(config, run, data, tracker)
        set_seed(config.seed)
        outcome.forget_peak_memory()
        progress = console.Progress()
        past = unlogged.at(checkpoint)
        metrics = Metrics(run, tracker, progress, past)
        before: dict[str, float] = {}

        def keep_unlogged(folder: Path) -> None:
            assert metrics.counter is not None
            events = len(run.read_metrics()) if ranks.leads() else 0
            unlogged.keep(folder, trainer, events, metrics.counter.total(), metrics.time_s)

        def open_training() -> None:
            trainer.state.compute_steps(trainer.args, trainer.state.max_steps)  # a checkpoint brings its own intervals
            console.say(distributed.prove(config, trainer))
            distributed.lay_out_buckets(config, trainer)
            trainers.prove_isolation(config, trainer)
            if checkpoint is None:
                _try_to_save(config, run, trainer, trained)
            before.update(held_out.before(config, run, data, trainer.model, metrics))
            set_seed(config.seed + ranks.index())  # from here on dropout draws, in each rank its own
            if trainer.state.global_step >= trainer.state.max_steps:
                raise _NothingLeft
            unlogged.restore(past, trainer)

        saving = Saving(run, config.trainer.save_minutes, config.trainer.save_total_limit, keep_unlogged)
        watching = [Opening(open_training), metrics, saving, stop, *callbacks, *tracker.callbacks]
        trainer = trainers.build(config, run, data, watching)
        trainer.args.save_total_limit = None  # `saving` takes the oldest checkpoints away
        trained = adapter.trained(trainer.model)
        metrics.counter = TokenCounter(trainer.model, data.tokenizer.pad_token_id, metrics.past_tokens)
        try:
            _train_on(trainer, checkpoint)
        finally:
            progress.stop()
        for callback in (stop, *callbacks):
            callback.raise_if_stopped()
        _save_adapter(run, trainer, trained)
        after = held_out.after(config, run, data, trainer, tracker)
        result = outcome.record(config, run, trainer, metrics, before | after)
        if ranks.leads():
            outcome.track(config, run, tracker, result, data)
            run.set_status("completed", step=trainer.state.global_step)
        exit_code = 0
        return result
    except Interrupted as error:
        exit_code = error.exit_code
        raise
    except Pruned:
        exit_code = 0
        raise
    finally:
        _finish(tracker, exit_code)


def _open_tracker(config: Config, run: RunDirectory) -> tracking.Tracker:
    if not ranks.leads():
        return tracking.Tracker("")  # W&B and the others know of one process
    return tracking.open_tracker(config.tracking, run, configs.to_dict(config))


def _finish(tracker: tracking.Tracker, exit_code: int) -> None:
    """What becomes of the tracker decides nothing about the run."""
    try:
        tracker.finish(exit_code)
    except Interrupted:
        raise
    except Exception as error:
        log.warning("the tracker could not be finished: %s", error)


def _rewind(run: RunDirectory) -> Path | None:
    """The checkpoint to go on from, with everything after it taken back."""
    checkpoint, passed_over = checkpoints.newest(run)
    for reason in passed_over:
        log.warning("passed over %s", reason)
    checkpoints.drop_torn(run)  # the Trainer would count them, where it takes the oldest away
    run.rewind_metrics(unlogged.at(checkpoint).events)
    if checkpoint:
        console.say(f"going on from step {checkpoints.step_of(checkpoint)}")
    return checkpoint


class _NothingLeft(Exception):
    """A checkpoint of the last step was loaded; Trainer would make one more."""


def _train_on(trainer: Any, checkpoint: Path | None) -> None:
    with contextlib.suppress(_NothingLeft):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _try_to_save(config: Config, run: RunDirectory, trainer: Any, trained: dict[str, tuple[int, ...]]) -> None:
    """Save and take away a checkpoint before the first step, so that a run which could not save never begins.

    Raises:
        RunError: what was saved is not all that is trained.
        OSError: it cannot be written there.
    """
    trainer._save_checkpoint(trainer.model, trial=None)
    if trainer.is_fsdp_enabled:  # to have a state to save, torch made a step without gradients, which Adam counts
        trainer.optimizer.state.clear()
    folder = checkpoints.at(run, 0)
    if config.distributed.state_dict_type == "SHARDED_STATE_DICT":
        adapter.save(trainer, folder)
    ranks.wait()
    if ranks.leads():
        adapter.require_whole(trained, folder)
        shutil.rmtree(folder)


def _facts(config: Config, run: RunDirectory, data: Prepared) -> dict[str, str]:
    report, t = read_json(run.preflight), config.trainer
    precision = models.resolve_precision(config)
    rows, tokens, parameters = report["rows"], report["tokens"], report["parameters"]
    processes = f" x {config.distributed.num_processes} processes" if config.distributed.num_processes > 1 else ""
    share = report.get("quantised_share", 1)
    quantised = f", {share:.0%} quantised ({config.quant.method})" if config.quant.method != "none" else ""
    dropped = f", {sum(rows['dropped'].values())} left out" if rows["dropped"] else ""
    return {
        "run": str(run.path),
        "model": f"{config.model.path}, base in {precision.dtype}{quantised}",
        "template": f"{data.template.name}, a turn ends with {data.template.turn_end.token}",
        "attention": trainers.attention_of(config),
        "data": data.facts["cache"],
        "rows": f"{rows['kept']} to train on{dropped}, {report['eval_rows']} held out",
        "tokens": f"{tokens['total']}, {tokens['supervised'] / tokens['total']:.0%} with loss, "
        f"{tokens['padding_share']:.1%} padding beside them",
        "steps": f"{report['steps']} of {t.global_batch_size} rows ({t.per_device_train_batch_size} x "
        f"{t.gradient_accumulation_steps} accumulated{processes}), about {report['tokens_per_step']} tokens each",
        "trained": f"{parameters['trainable']:,} of {parameters['total']:,} parameters "
        f"({parameters['trainable'] / parameters['total']:.2%})",
        "precision": f"{precision.training} on {models.device()} ({precision.why})",
    }


def _show_data(config: Config, run: RunDirectory, data: Prepared, tracker: tracking.Tracker) -> None:
    """Where the rows come from, and some of them as they train, token by token, in the tracker."""
    if config.tracking.method != "wandb" or not ranks.leads():
        return  # the others take neither pages nor data sets
    rows = inspection.views(config, data, inspection.choose(data, _ROWS_SHOWN))
    tracker.html("rows_as_trained", view.as_html(rows, "Rows as they train"), 0)
    fingerprint, read = data.facts["data_fingerprint"], read_json(run.preflight)["rows"]["read"]
    try:
        uris = references.uris(config.data)
    except PreflightError as error:
        log.warning("the tracker is not told where the data is: %s", error)
        return
    tracker.use_data(references.name_of(fingerprint), uris, references.described(config.data, fingerprint, read))


def _save_adapter(run: RunDirectory, trainer: Any, trained: dict[str, tuple[int, ...]]) -> None:
    """adapter/ with weights, configuration, tokenizer and chat template; or an error and no adapter/ at all.

    Raises:
        RunError: what was written is not all that was trained, or not finite.
    """
    with whole_directory(run.adapter, *adapter.FILES) if ranks.leads() else contextlib.nullcontext() as place:
        folder: Any = ranks.from_leader(place)
        adapter.save(trainer, folder)
        ranks.wait()
        if ranks.leads():
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of what config.yaml says
            adapter.require_finite(folder)
            adapter.require_whole(trained, folder)
    ranks.wait()
