"""TRL's SFTTrainer with an evaluation loss that is the same whatever training minimises.

It is the mean cross-entropy, in nats, of the supervised tokens of all held-out rows: without label smoothing, DFT's
weights or the routers' auxiliary loss, independent of the batch size and of the number of processes. The verb `eval`
reports the same.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

_OF_EACH_ROW = ("loss", "tokens", "entropy", "mean_token_accuracy")  # sums over its supervised tokens


class EvaluatingTrainer(SFTTrainer):
    """SFTTrainer whose `evaluate` sums over tokens."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._rows: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        tokens = outputs.label_mask.sum(-1)
        sums = (-outputs.log_probs.sum(-1), tokens, outputs.entropy.sum(-1), outputs.is_top1.sum(-1))
        rows = torch.stack([values.detach().float() for values in sums], dim=-1)
        self._rows.append(self._gathered(rows).double().cpu())
        return sums[0].sum() / tokens.sum().clamp(min=1)

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes; of the last batch without those that were repeated to fill it up."""
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and parallelism.cp_size > 1:  # each has a part of the tokens of the same rows
            return self.accelerator.gather(rows)
        return self.accelerator.gather_for_metrics(rows)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._rows = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        sums = dict(zip(_OF_EACH_ROW, torch.cat(self._rows).sum(0).tolist(), strict=True))
        means = {name: sums[name] / sums["tokens"] for name in _OF_EACH_ROW if name != "tokens"}
        output.metrics[f"{prefix}_loss"] = means.pop("loss")
        self._metrics["eval"].update({name: [value] for name, value in means.items()})  # `log` averages and adds them
        return output
