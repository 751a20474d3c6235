"""A language-model head for CPUs that scores only the positions which carry loss.

Without Triton, SFTTrainer's fused head scores every position, masked or not, and computes entropies beside it: on two
cores a quarter of a step. On a GPU its own head is the right one and stays.
"""

from __future__ import annotations

import functools
import types
from typing import Any


def score_supervised_only(model: Any) -> None:
    """Replace what `model(..., fused_lm_head=True)` does, after SFTTrainer has installed its own.

    Same loss and gradients, same output class; `model` is the causal LM below any adapter. Models that scale or cap
    their logits (Gemma 2, Granite, Cohere and others) keep TRL's head, which knows how each does it.
    """
    text_config = model.config.get_text_config()
    if any(getattr(text_config, name, None) is not None for name in _LOGIT_TRANSFORMS):
        return
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)  # SFTTrainer divides by it
        return _scores(self, labels, self.base_model(*args, **kwargs).last_hidden_state)

    model.forward = types.MethodType(forward, model)


_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "num_local_experts",  # mixtures of experts add a loss of their own
    "num_experts",
)


def _scores(model: Any, labels: Any, hidden: Any) -> Any:
    """`hidden` (rows, tokens, width) and `labels` (rows, tokens) to the log-probability of each next token."""
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    hidden, labels = hidden[:, :-1], labels[:, 1:]
    mask = labels != -100
    logits = model.get_output_embeddings()(hidden[mask]).float()
    chosen = -torch.nn.functional.cross_entropy(logits, labels[mask], reduction="none")
    with torch.no_grad():
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        is_top1 = logits.argmax(-1) == labels[mask]

    def spread(values: Any) -> Any:  # to (rows, tokens - 1), zero where there is no loss
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    log_probs_2d = spread(chosen)
    return FusedCausalLMOutput(
        loss=-log_probs_2d.sum() / mask.sum().clamp(min=1),
        log_probs=log_probs_2d,
        entropy=spread(entropy),
        is_top1=spread(is_top1),
        label_mask=mask,
    )
