"""The story of one run."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from sft_lab import adapter, console, distributed, evaluate, ranks, tracking
from sft_lab import config as configs
from sft_lab import model as models
from sft_lab import trainer as trainers
from sft_lab.callbacks import Metrics, Opening, Saving, Stop, TokenCounter
from sft_lab.data import inspection, references, view
from sft_lab.data.prepared import Prepared
from sft_lab.errors import Interrupted, PreflightError, Pruned
from sft_lab.failures import explained
from sft_lab.runs import RunDirectory, read_json, whole_directory, write_json, write_text
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
        _forget_peak_memory()
        progress = console.Progress()
        metrics = Metrics(run, tracker, progress, run.read_metrics())
        saving = Saving(run, config.trainer.save_minutes)
        before: dict[str, float] = {}

        def open_training() -> None:
            console.say(distributed.prove(config, trainer))
            trainers.prove_isolation(config, trainer)
            if checkpoint is None:
                _try_to_save(config, run, trainer)
            before.update(_evaluate_before(config, run, data, trainer.model, metrics))
            set_seed(config.seed + ranks.index())  # from here on dropout draws, in each rank its own
            if trainer.state.global_step >= trainer.state.max_steps:
                raise _NothingLeft

        watching = [Opening(open_training), metrics, saving, stop, *callbacks, *tracker.callbacks]
        trainer = trainers.build(config, run, data, watching)
        metrics.counter = TokenCounter(trainer.model, data.tokenizer.pad_token_id, metrics.past_tokens)
        try:
            _train_on(trainer, checkpoint)
        finally:
            progress.stop()
        for callback in (stop, *callbacks):
            callback.raise_if_stopped()
        _save_adapter(run, trainer)
        after = _evaluate_after(config, run, data, trainer, tracker)
        result = _record(config, run, trainer, metrics, before | after)
        if ranks.leads():
            _track(config, run, tracker, result, data)
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
    checkpoint, passed_over = run.newest_checkpoint()
    for reason in passed_over:
        log.warning("passed over %s", reason)
    run.drop_checkpoints_after(checkpoint)
    step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    run.rewind_metrics(step)
    if checkpoint:
        console.say(f"going on from step {step}")
    return checkpoint


class _NothingLeft(Exception):
    """A checkpoint of the last step was loaded; Trainer would make one more."""


def _train_on(trainer: Any, checkpoint: Path | None) -> None:
    with contextlib.suppress(_NothingLeft):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _try_to_save(config: Config, run: RunDirectory, trainer: Any) -> None:
    """Save and take away a checkpoint before the first step, so that a run which could not save never begins.

    Raises:
        RunError: what was saved is not all that is trained.
        OSError: it cannot be written there.
    """
    trainer._save_checkpoint(trainer.model, trial=None)
    if trainer.is_fsdp_enabled:  # to have a state to save, torch made a step without gradients, which Adam counts
        trainer.optimizer.state.clear()
    folder = run.checkpoints / "checkpoint-0"
    if config.distributed.state_dict_type == "SHARDED_STATE_DICT":
        adapter.save(trainer, folder)
    ranks.wait()
    adapter.require_whole(trainer, folder)
    ranks.wait()
    if ranks.leads():
        run.drop_checkpoint(0)


def _facts(config: Config, run: RunDirectory, data: Prepared) -> dict[str, str]:
    report, t = read_json(run.preflight), config.trainer
    precision = models.resolve_precision(config)
    rows, tokens, parameters = report["rows"], report["tokens"], report["parameters"]
    processes = f" x {config.distributed.num_processes} processes" if config.distributed.num_processes > 1 else ""
    dropped = f", {sum(rows['dropped'].values())} left out" if rows["dropped"] else ""
    return {
        "run": str(run.path),
        "model": f"{config.model.path}, base in {precision.dtype}"
        + (f", quantised ({config.quant.method})" if config.quant.method != "none" else ""),
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


def _evaluate_before(
    config: Config, run: RunDirectory, data: Prepared, model: Any, metrics: Metrics
) -> dict[str, float]:
    """Metrics of the model as it came; a resumed run reads what its first session measured."""
    if not config.evaluation.before or not len(data.questions):
        return {}
    if not ranks.from_leader(run.answers_before.exists()):
        answers = evaluate.answer_rows(model, data.tokenizer, data.questions, data.turn_end_id, config.evaluation)
        if ranks.leads():
            write_json(run.answers_before, answers)
    if not ranks.leads():
        return {}
    scores = evaluate.score(config.data.metrics, read_json(run.answers_before), data.questions["reference"])
    if scores and not any(event["step"] == 0 for event in run.read_metrics()):
        metrics.record({"step": 0, "split": "eval", **scores})
    _say_scores("before training", scores, config, data)
    return {f"{name}_before": value for name, value in scores.items()}


def _evaluate_after(config: Config, run: RunDirectory, data: Prepared, trainer: Any, tracker: Any) -> dict[str, float]:
    """Loss and metrics on the held-out rows, and samples.jsonl."""
    if not len(data.eval):
        if ranks.leads():
            write_text(run.samples, "")
        return {}
    loss = {"eval_loss": trainer.evaluate()["eval_loss"]}
    answers = evaluate.answer_rows(trainer.model, data.tokenizer, data.questions, data.turn_end_id, config.evaluation)
    if not ranks.leads():
        return loss
    scores = evaluate.score(config.data.metrics, answers, data.questions["reference"])
    _say_scores("after training", scores, config, data)
    if scores:
        event = {"step": trainer.state.global_step, "split": "eval", **scores}
        run.append_metrics(event)
        tracker.log(tracking.flatten_event(event), event["step"])
    _write_samples(config, run, data, answers)
    return loss | scores


def _say_scores(when: str, scores: dict[str, float], config: Config, data: Prepared) -> None:
    rows = min(config.evaluation.rows, len(data.questions))
    for name, value in scores.items():
        console.say(f"{name.replace('_', ' ')} {when}: {value:.1%} of {rows} held-out rows")


def _write_samples(config: Config, run: RunDirectory, data: Prepared, answers: list[str]) -> None:
    before = read_json(run.answers_before) if run.answers_before.exists() else []
    samples = []
    for i, answer in enumerate(answers[: config.evaluation.samples]):
        row = data.questions[i]
        samples.append(
            {
                "id": data.row_id(row),
                "prompt": data.tokenizer.decode(row["prompt_ids"]),
                "reference": row["reference"],
                "answer_before": before[i] if before else None,
                "answer": answer,
            }
        )
    write_text(run.samples, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


def _save_adapter(run: RunDirectory, trainer: Any) -> None:
    """adapter/ with weights, configuration, tokenizer and chat template; or an error and no adapter/ at all.

    Raises:
        RunError: what was written is not all that was trained, or not finite.
    """
    with whole_directory(run.adapter) if ranks.leads() else contextlib.nullcontext() as place:
        folder: Any = ranks.from_leader(place)
        adapter.save(trainer, folder)
        ranks.wait()
        if ranks.leads():
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of what config.yaml says
            adapter.require_finite(folder)
        adapter.require_whole(trainer, folder)
    ranks.wait()


def _record(
    config: Config, run: RunDirectory, trainer: Any, metrics: Metrics, evaluated: dict[str, float]
) -> dict[str, Any]:
    tokens, peak = metrics.counter.total() if metrics.counter else 0, max(ranks.gathered(_peak_memory_bytes()))
    if not ranks.leads():
        return {}
    last = [event for event in run.read_metrics() if event["split"] == "train"][-1]
    train_s = metrics.trained_s
    result = {
        "metrics": {"train_loss": last["loss"], **evaluated},
        "train_s": round(train_s, 3),
        "tokens_per_s": round(tokens / train_s, 1),
        "peak_memory_bytes": peak,  # of the rank that held most
        "predicted_peak_memory_bytes": read_json(run.preflight)["memory"],
        "steps": trainer.state.global_step,
        "adapter_bytes": sum(f.stat().st_size for f in run.adapter.glob("*.safetensors")),
    }
    write_json(run.result, result)
    console.say(
        f"trained {result['steps']} steps in {train_s:.0f} s, {result['tokens_per_s']:.0f} tokens/s; "
        f"adapter of {result['adapter_bytes'] / 1e6:.1f} MB in {run.adapter}"
    )
    return result


def _forget_peak_memory() -> None:
    """Begin a run's peak anew: a sweep's trials are of one process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not on Linux, or /proc is closed: the peak is then that of all trials so far
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_bytes() -> int:
    """The most the run held: of GPU memory where there is one, else of the process's resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _track(
    config: Config, run: RunDirectory, tracker: tracking.Tracker, result: dict[str, Any], data: Prepared
) -> None:
    """The run's summary, samples and adapter, beside the team's other runs."""
    report = read_json(run.preflight)
    facts = {f"preflight/{name}": report[name] for name in ("steps", "tokens_per_step", "eval_rows", "disk_bytes")}
    for group in ("tokens", "parameters", "rows"):
        facts |= {f"preflight/{group}/{name}": n for name, n in report[group].items() if isinstance(n, (int, float))}
    tracker.summary({**facts, **{name: v for name, v in result.items() if name != "metrics"}, **result["metrics"]})
    columns = ["id", "prompt", "reference", "answer_before", "answer"]
    if run.samples.exists():
        samples = [json.loads(line) for line in run.samples.read_text(encoding="utf-8").splitlines()]
        tracker.table("samples", columns, [[sample[c] for c in columns] for sample in samples], result["steps"])
    metadata = {
        "base_model": config.model.path,
        "data_fingerprint": data.facts["data_fingerprint"],
        "config": configs.to_dict(config),
        "metrics": result["metrics"],
    }
    tracker.log_adapter(run.adapter, f"{run.path.name}-adapter", metadata)
