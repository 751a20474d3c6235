"""A finished run's model, loaded to answer: what `chat` and `eval` talk to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from sft_lab import adapter as adapters
from sft_lab import config as configs
from sft_lab import evaluate
from sft_lab import model as models
from sft_lab.data.formats import Message
from sft_lab.data.prepare import evaluation_rows
from sft_lab.data.prepared import Prepared, asking
from sft_lab.data.spans import renderer
from sft_lab.data.template import Template
from sft_lab.data.tokenize import IGNORE
from sft_lab.errors import PreflightError, RunError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config
from sft_lab.trainer import Collator


@dataclass
class Finished:
    """Model with its adapter, tokenizer with its chat template, and the config that made them."""

    config: Config
    model: Any
    tokenizer: Any
    template: Template

    @classmethod
    def load(cls, run: RunDirectory) -> Finished:
        """
        Raises:
            RunError: the run has no adapter yet, or its base model cannot be had.
            ConfigError: its data is not there, with which the chat template was written down.
        """
        from peft import PeftModel
        from transformers import AutoTokenizer

        adapter, config = run.require_adapter(), configs.load(run.config)
        trust = config.model.trust_remote_code
        used = Prepared.load(run, trust).template
        tokenizer = AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=trust)
        if config.peft.method == "none":
            config.model.path = str(adapter)
            model = models.load_model(config)
        else:
            base = models.load_model(config)
            models.fit_embeddings(base, tokenizer)  # their trained rows lie beside the adapter's matrices
            model = PeftModel.from_pretrained(base, str(adapter))
            if config.quant.method != "none":
                adapters.round_as_trained(model)
        model.to(models.device()).eval()
        return cls(config, model, tokenizer, used)

    def evaluate(self, config: Config) -> dict[str, Any]:
        """Metrics over all held-out rows that `config.data` names, or all its rows where it holds none out.

        Raises:
            PreflightError: the rows cannot be read or used.
            RunError: the loss is not finite.
        """
        unknown = [name for name in config.data.metrics if name not in evaluate.METRICS]
        if unknown:
            raise PreflightError(f"data.metrics={unknown} : no such metric (allowed: {', '.join(evaluate.METRICS)})")
        rows = evaluation_rows(config, self.tokenizer, self.template)
        questions = asking(rows)
        settings = replace(config.evaluation, rows=len(questions) if config.data.metrics else 0)
        answers = evaluate.answer_rows(self.model, self.tokenizer, questions, self.template.ends, settings)
        loss = self._loss(rows, config.trainer.per_device_eval_batch_size)
        if not math.isfinite(loss):
            raise RunError(
                f"the loss of {len(rows)} rows is {loss}: the weights of the adapter or the base are damaged"
            )
        metrics = {"loss": loss, **evaluate.score(config.data.metrics, answers, questions["reference"])}
        return {"source": config.data.path or config.data.source, "rows": len(rows), "metrics": metrics}

    def answer(self, messages: list[Message], max_new_tokens: int) -> str:
        """The greedy answer to a conversation that ends with the user's turn."""
        prompt = renderer(self.tokenizer, self.template).prompt(messages)
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return evaluate.generate(self.model, self.tokenizer, [ids], self.template.ends, max_new_tokens, 1)[0]

    def _loss(self, rows: Any, batch_size: int) -> float:
        """Mean cross-entropy over every token that carries loss, in nats; in the precision that the run trained in."""
        import torch

        collate = Collator(self.tokenizer.pad_token_id)
        total, count = 0.0, 0
        with torch.inference_mode(), models.autocast(self.config):
            for start in range(0, len(rows), batch_size):
                batch = collate(rows.select(range(start, min(start + batch_size, len(rows)))).to_list())
                batch = {name: values.to(self.model.device) for name, values in batch.items()}
                labels = batch.pop("labels")[:, 1:]
                logits = self.model(**batch, use_cache=False).logits[:, :-1][labels != IGNORE].float()
                targets = labels[labels != IGNORE]
                total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
                count += len(targets)
        return total / count
