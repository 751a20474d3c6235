"""How good the answers are: greedy generation on held-out rows, and the metrics of a data set."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sft_lab import config as configs
from sft_lab import ranks
from sft_lab.data.tokenize import decoded
from sft_lab.errors import ConfigError
from sft_lab.schema import EvaluationConfig


def final_words(answer: str) -> str:
    """An answer without the thought before it, and without white space at its ends.

    A thought may be opened by the prompt, and an empty one written by the chat template; one that is never closed has
    no words behind it.
    """
    if "</think>" in answer:
        return answer.rpartition("</think>")[2].strip()
    return "" if answer.lstrip().startswith("<think>") else answer.strip()


def exact_match(answer: str, reference: str) -> float:
    """1 where the final words of the answer are those of the reference."""
    return float(final_words(answer) == final_words(reference))


def composes(answer: str, reference: str = "") -> float:
    """1 where the final words are an sft_lab command line whose config composes and contradicts itself nowhere."""
    try:
        words = shlex.split(final_words(answer))
    except ValueError:  # an unclosed quotation
        return 0.0
    if words[:3] != ["python", "-m", "sft_lab"]:
        return 0.0
    try:
        configs.compose(words[3:])
    except ConfigError:
        return 0.0
    return 1.0


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "composes": composes}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    in_step: bool = False,
) -> list[str]:
    """Greedy answers to tokenised prompts, in their order, without the tokens that end them.

    The model is put back into the mode it was in, and no random state is used.

    Args:
        ends: tokens at which an answer is over, besides the tokenizer's own end.
        in_step: for a model that is sharded over ranks: each runs as many forward passes as the slowest.
    """
    import torch

    was_training = model.training
    model.eval()
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that little is padding
    settings = _greedy(tokenizer, ends, max_new_tokens)
    # Not inference_mode: what FSDP gathers in it could not be trained with afterwards.
    with torch.no_grad(), _gathered(model), _without_router_loss(model):
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, synced_gpus=in_step)
            for i, tokens in zip(batch, out[:, ids.shape[1] :], strict=True):
                answers[i] = decoded(tokenizer, _until_end(tokens.tolist(), settings))
    model.train(was_training)
    return answers


def _gathered(model: Any) -> contextlib.AbstractContextManager[None]:
    """FSDP1 puts weights together in its own forward alone, and `generate` is not that."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model, writeback=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _without_router_loss(model: Any) -> Iterator[None]:
    """A mixture of experts that trains its routers would compute their loss for each new token, and fail."""
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", None)
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def _greedy(tokenizer: Any, ends: Sequence[int], max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    stops = sorted({*ends, tokenizer.eos_token_id} - {None})
    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )


def _until_end(tokens: list[int], settings: Any) -> list[int]:
    """An answer's tokens without the one that ends it and the padding behind."""
    stops = {*settings.eos_token_id}
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def _left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: Any) -> tuple[Any, Any]:
    """Token ids and attention mask, each (prompts, longest prompt)."""
    import torch

    longest = max(map(len, prompts))
    ids = [[pad_token_id] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def answer_rows(model: Any, tokenizer: Any, rows: Any, ends: Sequence[int], settings: EvaluationConfig) -> list[str]:
    """Answers to the first `evaluation.rows` held-out rows; of several ranks each gives its share, and has all."""
    count = min(settings.rows, len(rows))
    if not count:
        return []
    prompts = rows.select(range(count))["prompt_ids"]
    shares = [range(count)[i :: ranks.size()] for i in range(ranks.size())]
    mine = shares[ranks.index()] or range(1)  # where there are fewer rows than ranks; a sharded model needs them all
    short = len(shares[0]) - len(mine)
    mine_as_long = [*mine, *[mine[-1]] * short]
    answers = generate(
        model,
        tokenizer,
        [prompts[i] for i in mine_as_long],
        ends,
        settings.max_new_tokens,
        settings.batch_size,
        in_step=ranks.together(),
    )
    parts = ranks.gathered(answers)
    return [parts[i % ranks.size()][i // ranks.size()] for i in range(count)]


def score(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean of each named metric over the answers; empty where there are none."""
    if not answers:
        return {}
    pairs = list(zip(answers, references, strict=False))
    return {name: sum(METRICS[name](a, r) for a, r in pairs) / len(pairs) for name in names}
