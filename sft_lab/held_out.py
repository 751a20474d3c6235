"""A run's evaluation on its held-out rows: the model as it came, and as it was trained."""

from __future__ import annotations

import json
from typing import Any

from sft_lab import console, evaluate, ranks, tracking
from sft_lab.callbacks import Metrics
from sft_lab.data.prepared import Prepared
from sft_lab.runs import RunDirectory, read_json, write_json, write_text
from sft_lab.schema import Config


def before(config: Config, run: RunDirectory, data: Prepared, model: Any, metrics: Metrics) -> dict[str, float]:
    """Metrics of the model as it came; a resumed run reads what its first session measured."""
    if not config.evaluation.before or not len(data.questions):
        return {}
    if not ranks.from_leader(run.answers_before.exists()):
        answers = evaluate.answer_rows(model, data.tokenizer, data.questions, data.template.ends, config.evaluation)
        if ranks.leads():
            write_json(run.answers_before, answers)
    if not ranks.leads():
        return {}
    scores = evaluate.score(config.data.metrics, read_json(run.answers_before), data.questions["reference"])
    if scores and not any(event["step"] == 0 for event in run.read_metrics()):
        metrics.record({"step": 0, "split": "eval", **scores})
    _say_scores("before training", scores, config, data)
    return {f"{name}_before": value for name, value in scores.items()}


def after(config: Config, run: RunDirectory, data: Prepared, trainer: Any, tracker: Any) -> dict[str, float]:
    """Loss and metrics on the held-out rows, and samples.jsonl."""
    if not len(data.eval):
        if ranks.leads():
            write_text(run.samples, "")
        return {}
    loss = {"eval_loss": _last_loss(trainer)}
    answers = evaluate.answer_rows(trainer.model, data.tokenizer, data.questions, data.template.ends, config.evaluation)
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


def _last_loss(trainer: Any) -> float:
    """The loss of the trained model; the evaluation at the last step, where trainer.eval_steps has it, is the same."""
    for event in reversed(trainer.state.log_history):
        if "eval_loss" in event and event["step"] == trainer.state.global_step:
            return float(event["eval_loss"])
    return float(trainer.evaluate()["eval_loss"])


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
