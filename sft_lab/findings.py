"""What the preflight finds in the prepared rows: which train, what is odd of them, their tokens, their template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sft_lab import evaluate
from sft_lab.data.prepared import Prepared
from sft_lab.data.values import listed
from sft_lab.schema import Config

_LISTED = 100  # ids of rows that show a finding; where rows were left out or changed, all are listed
_PERCENTILES = (0, 5, 50, 95, 99, 100)
_NEVER_ALLOWED = ("data.metrics", "trainer.eval_steps", "vocabulary")  # a run would fail of them
_LITTLE = 0.01  # a share of tokens with loss below which the mask deserves a look


@dataclass
class Report:
    """Findings, and what preflight.json holds beside them."""

    allowed: list[str] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, level: str, message: str, rows: list[str] | None = None) -> None:
        """`level` is error, warning or fact; `rows` are ids of rows that show it. An allowed error is a warning."""
        if level == "error" and name in self.allowed and name not in _NEVER_ALLOWED:
            level, message = "warning", f"{message} (allowed by preflight.allow)"
        self.findings.append({"name": name, "level": level, "message": message, "rows": rows or []})

    @property
    def errors(self) -> list[str]:
        return [_told(finding) for finding in self.findings if finding["level"] == "error"]

    def as_dict(self) -> dict[str, Any]:
        return {"ok": not self.errors, "findings": self.findings, **self.numbers}


def _told(finding: dict[str, Any]) -> str:
    rows = finding["rows"]
    shown = f": {', '.join(rows[:5])}{', ...' if len(rows) > 5 else ''}" if rows else ""
    hint = "" if finding["name"] in _NEVER_ALLOWED else f" (preflight.allow=[{finding['name']}] lets it through)"
    return f"{finding['name']} : {finding['message']}{shown}{hint}"


def of_data(config: Config, data: Prepared, report: Report) -> None:
    """Add every finding that the rows, their tokens and the template show."""
    _rows(config, data, report)
    _peculiar_rows(data, report)
    _unread(data, report)
    _duplicates_and_leaks(config, data, report)
    _tokens(data, report)
    _template(data, report)
    _held_out(config, data, report)


# ------------------------------------------------------------------------------------------------------------- rows


def _rows(config: Config, data: Prepared, report: Report) -> None:
    """Which rows were read, kept, left out and why."""
    facts = data.facts
    rows = facts["rows"]
    report.numbers |= {
        "rows": rows,
        "eval_rows": len(data.eval),
        "data_fingerprint": facts["data_fingerprint"],
    }
    report.add("rows", "fact", f"{rows['read']} rows read, {rows['kept']} train, {len(data.eval)} are held out")
    if config.data.streaming:
        report.add("streaming", "warning", f"only the first {rows['read']} rows were looked at, the others stream by")
    if len(facts["mixed"]) > 1:
        shares = ", ".join(f"{name} {count} ({count / rows['kept']:.1%})" for name, count in facts["mixed"].items())
        report.add("mixture", "fact", shares)
    _empty_sources(config, facts["mixed"], report)
    for kind, dropped, bad in (
        ("", facts["dropped_rows"], facts["bad_rows"]),
        ("eval_", facts["dropped_eval_rows"], facts["bad_eval_rows"]),
    ):
        reasons = {(place, number): reason for place, number, reason in bad}
        for name, names in dropped.items():
            ids = [_with_reason(data.named(*row), reasons.get((row[0], row[1]))) for row in names]
            held_out = "held-out " if kind else ""
            report.add(f"dropped_{kind}{name}", "warning", f"{len(ids)} {held_out}rows left out ({name})", ids)
    for how, names in facts["shortened_rows"].items():
        ids = [data.named(*row) for row in names]
        which = (
            "that are not what the model is asked with"
            if how == "split_by_turn"
            else (f"of more than {config.trainer.max_length} tokens")
        )
        report.add(how, "warning", f"{len(ids)} rows {which}: {how}", ids)


def _empty_sources(config: Config, mixed: dict[str, int], report: Report) -> None:
    """Sources of a mixture that give nothing, which a small share of few rows does silently."""
    for name, source in config.data.sources.items():
        if not mixed[name]:
            given = [f"sample={source.sample:g}"] if source.sample < 1 else []
            given += [f"max_rows={source.max_rows}"] if source.max_rows >= 0 else []
            why = f" ({', '.join(given)})" if given else ""
            report.add(f"data.sources.{name}", "warning", f"no row of it trains{why}")


def _with_reason(row: str, reason: str | None) -> str:
    return f"{row}: {reason}" if reason else row


_NOTES = {
    "double_bos": ("error", "rows begin with more than one beginning-of-sequence token"),
    "no_bos": ("warning", "rows have no beginning-of-sequence token, which the tokenizer puts before text"),
    "extra_eos": ("error", "rows end a turn with its end token twice"),
    "untrained_turn_end": ("error", "rows learn words whose end of turn they do not learn"),
    "special_tokens_in_text": ("warning", "rows have special tokens written out in their text, which become real ones"),
    "same_role_twice": ("warning", "rows have two turns of one role after another"),
    "assistant_first": ("warning", "rows begin with the assistant"),
    "tool_without_call": ("warning", "rows have a tool's answer that no call asked for"),
    "ends_with_user": ("fact", "rows end with a turn that is not the assistant's"),
    "empty_question": ("warning", "rows have a question without words"),
    "empty_answer": ("warning", "rows have an empty answer"),
    "thought_left_out": ("warning", "rows have a thought (reasoning_content) that the chat template leaves out"),
    "thought_in_words": ("warning", "rows have a <think> in their words, where the chat template writes no thoughts"),
    "context_differs": (
        "warning",
        "rows have other words before a learned turn than the model is asked with, as of a chat template that leaves "
        "earlier thoughts out (data.on_context_mismatch=split trains such turns apart, each behind its own prompt)",
    ),
    "other_turn_end": (
        "warning",
        "rows end a learned turn with a token at which an answer does not stop, since another message follows "
        "(data.on_context_mismatch=split trains such turns apart, each with the end that it has as the last)",
    ),
    "template_kwargs_unread": ("warning", "rows have chat_template_kwargs that the chat template does not read"),
    "unknown_token": ("warning", "rows learn the unknown token, for characters that the tokenizer does not have"),
    "prompt_tokens_differ": ("warning", "rows have a prompt that is cut into other tokens than it is when alone"),
    "text": ("fact", "rows are plain text, all of it learned"),
    "asks_for_loss": (
        "warning",
        "rows ask for loss on a turn that is not the assistant's, which data.loss=all alone learns",
    ),
}


def _peculiar_rows(data: Prepared, report: Report) -> None:
    """What was noticed of single rows while they were made into tokens."""
    import pyarrow.compute as pc

    notes = data.train.data.column("notes")
    if data.order is not None:
        notes = notes.take(data.order)
    seen = {note for text in pc.unique(notes).to_pylist() for note in text.split()}
    for name in sorted(seen & _NOTES.keys()):
        level, message = _NOTES[name]
        which = pc.indices_nonzero(pc.match_substring_regex(notes, rf"\b{name}\b")).to_pylist()
        ids = [data.row_id(data.train[i]) for i in which[:_LISTED]]
        report.add(name, level, f"{len(which)} of {len(data.train)} {message}", ids)
    if "thought_left_out" in seen and "thought" not in seen:
        lost = "the chat template leaves out every thought of the data (allowed: a chat_template that writes them)"
        report.add("every_thought_left_out", "error", lost)
    silent = np.flatnonzero(data.column("supervised") == 0)
    if len(silent):
        ids = [data.row_id(data.train[int(i)]) for i in silent[:_LISTED]]
        report.add("no_supervised_token", "error", f"{len(silent)} rows carry no loss", ids)


def _unread(data: Prepared, report: Report) -> None:
    """What the rows hold and nothing reads."""
    for name, what in (("unread_columns", "columns"), ("unread_message_keys", "keys of messages")):
        counts: dict[str, int] = data.facts.get(name, {})
        if counts:
            most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            told = listed(f"{word} ({count} rows)" for word, count in most)
            report.add(name, "fact", f"{what} that nothing reads: {told}")
    if count := data.facts.get("null_arguments", 0):
        report.add(
            "null_arguments",
            "fact",
            f"{count} rows have calls with arguments that are null, taken as absent: Arrow writes null for each that "
            "another row's call has (a .jsonl file says which are meant)",
        )


def _duplicates_and_leaks(config: Config, data: Prepared, report: Report) -> None:
    for kind, pairs in data.facts["duplicates"].items():
        if pairs:
            alike = {"exact": "repeat another, capitals and white space aside", "near": "nearly repeat another"}[kind]
            gone = config.data.deduplicate in (kind, "near")
            what = "left out" if gone else f"kept, data.deduplicate={kind} leaves them out"
            ids = [f"{data.named(*row)} repeats {data.named(*other)}" for row, other in pairs[:_LISTED]]
            report.add(f"duplicates_{kind}", "warning", f"{len(pairs)} rows {alike} ({what})", ids)
    distinct, rows = data.facts["distinct_answers"], len(np.unique(data.column("digest")))
    if distinct < rows:
        report.add("answers", "fact", f"{rows} different rows have {distinct} different answers")
    leaks = data.facts["leaks"]
    if not leaks:
        return
    held_out = {leak[2] for leak in leaks}
    exact = sum(leak[3] == "exact" for leak in leaks)
    message = (
        f"{len(held_out)} of {len(data.eval)} held-out rows stand among the training rows ({exact} pairs alike, "
        f"{len(leaks) - exact} nearly)"
    )
    dropped = config.data.on_leak == "drop"
    hint = "; the training rows were left out" if dropped else "; data.on_leak=drop leaves the training rows out"
    ids = [f"{data.named(p, n)} gives away {data.row_id(data.eval[i])} ({kind})" for p, n, i, kind in leaks[:_LISTED]]
    report.add("leak", "warning" if dropped else "error", message + hint, ids)


# ------------------------------------------------------------------------------------------------- tokens, template


def _tokens(data: Prepared, report: Report) -> None:
    tokens, lengths = data.facts["tokens"], data.column("length")
    total, supervised = tokens["total"], tokens["supervised"]
    spread = {f"p{p}": int(np.percentile(lengths, p, method="nearest")) for p in _PERCENTILES}
    report.numbers["tokens"] = {"total": total, "supervised": supervised, "lengths": spread}
    report.add("tokens", "fact", f"{total} tokens, {supervised / total:.1%} of them carry loss")
    told = f"{spread['p0']} to {spread['p100']} tokens, median {spread['p50']}, 95 % up to {spread['p95']}"
    report.add("lengths", "fact", f"rows of {told}")
    if supervised / total < _LITTLE:
        report.add("little_supervision", "warning", f"only {supervised / total:.2%} of the tokens carry loss")


def _template(data: Prepared, report: Report) -> None:
    used, tokenizer = data.template, data.tokenizer
    calls = f", one that calls tools with {used.call_end.token}" if used.call_end else ""
    stops = {end.token for end in (used.turn_end, used.call_end) if end} | {tokenizer.eos_token}
    server = "" if len(stops) == 1 else f" (a server has to stop at each of {', '.join(sorted(filter(None, stops)))})"
    report.add("chat_template", "fact", f"{used.name}; a turn ends with {used.turn_end.token}{calls}{server}")
    if used.date:
        dated = f"it writes the date, {used.date} in every row of this run (chat_template.date)"
        report.add("chat_template_date", "fact", dated)
    if used.added_tokens:
        tokens = ", ".join(used.added_tokens)
        report.add("added_tokens", "fact", f"the tokenizer lacked {tokens}: added, and their embeddings are trained")
    if tokenizer.pad_token_id in (used.turn_end.id, tokenizer.eos_token_id):
        report.add("pad_ends_turns", "error", f"{tokenizer.pad_token} pads rows and ends turns or texts")
    counts = _special_counts(data)
    report.numbers["special_tokens"] = counts
    told = ", ".join(f"{name} {token} {least} to {most}" for name, (token, least, most) in counts.items())
    if told:
        report.add("special_tokens", "fact", f"in a row: {told}")


def _special_counts(data: Prepared) -> dict[str, tuple[str, int, int]]:
    """Of BOS, EOS and the end of turn: the token, and how often it stands in a row, least and most."""
    used, tokenizer = data.template, data.tokenizer
    wanted = {
        "bos": (tokenizer.bos_token, tokenizer.bos_token_id),
        "eos": (tokenizer.eos_token, tokenizer.eos_token_id),
        "turn_end": (used.turn_end.token, used.turn_end.id),
    }
    found = {}
    for name, (token, id_) in wanted.items():
        if id_ is not None:
            counts = _count_per_row(data, id_)
            found[name] = (str(token), int(counts.min()), int(counts.max()))
    return found


def _count_per_row(data: Prepared, id_: int) -> np.ndarray:
    """How often a token stands in each training row."""
    counts = []
    for chunk in data.train.data.column("input_ids").chunks:
        offsets = chunk.offsets.to_numpy()
        hits = np.concatenate([[0], np.cumsum(chunk.values.to_numpy() == id_)])
        counts.append(hits[offsets[1:]] - hits[offsets[:-1]])
    return data.in_order(np.concatenate(counts))


def _held_out(config: Config, data: Prepared, report: Report) -> None:
    unknown = [name for name in config.data.metrics if name not in evaluate.METRICS]
    if unknown:
        report.add("data.metrics", "error", f"no such metric: {unknown} (allowed: {', '.join(evaluate.METRICS)})")
    asked = {name: getattr(config.data, name) for name in ("eval_rows", "eval_fraction", "eval_path", "eval_split")}
    for name, value in asked.items():
        if value and value != -1 and not len(data.eval):
            report.add(f"data.{name}", "error", f"{value} given, and no row is held out")
    if config.trainer.eval_steps and not len(data.eval):
        report.add("trainer.eval_steps", "error", f"{config.trainer.eval_steps} given, and there are no held-out rows")
