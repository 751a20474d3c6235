"""Attention paid per document: packed documents in one flattened row, each attended to alone, and a proof.

A batch of a packed run is one row (1, tokens) without padding. Its position_ids begin again at 0 with each document and
`cu_seq_lens_q` (documents + 1,), int32, holds where each begins and, last, the number of tokens: the keyword that
Transformers hands down to flash attention. Each document gets its own call of scaled_dot_product_attention, so none can
see another on any device, nothing of tokens x tokens is built, and the cost is the sum of the documents' squares.
Whatever else the model does (padded rows, generation with a cache) goes to Transformers' own sdpa mask and function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft_lab.errors import ConfigError

SDPA_PER_DOCUMENT = "sdpa_per_document"

Collate = Callable[[Sequence[dict[str, Any]]], Mapping[str, Any]]


def register() -> None:
    """Make `attn_implementation="sdpa_per_document"` known to Transformers, before a model is loaded with it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(SDPA_PER_DOCUMENT, _attend)
    AttentionMaskInterface.register(SDPA_PER_DOCUMENT, _mask)


def _mask(*, config: Any, batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Any:
    """Transformers' sdpa mask; for a flattened row instead a tensor of shape (0, window), window 0 where there is none.

    Transformers sets allow_is_causal_skip=False where position_ids begin again within a row. The shape tells `_attend`
    what it needs; and being empty, the tensor fails in any other code, where None would attend to everything.
    """
    import torch
    from transformers.masking_utils import sdpa_mask

    flattened = (
        batch_size == 1
        and q_length == kv_length
        and kwargs.get("attention_mask") is None
        and not kwargs.get("allow_is_causal_skip", True)
        and "allow_is_bidirectional_skip" not in kwargs  # given for encoders only
        and not kwargs.get("use_vmap", False)  # a pattern of the model's own
    )
    if not flattened:
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
    if getattr(config, "attention_chunk_size", None) is not None:
        raise _cannot("attention in chunks")
    return torch.empty(0, kwargs.get("local_size") or 0, dtype=torch.bool, device=kwargs["device"])


_NOT_IN_SDPA = {
    "softcap": "capped attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias by position",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


def _cannot(what: str) -> ConfigError:
    return ConfigError(
        f"model.attn_implementation={SDPA_PER_DOCUMENT} : this model needs {what}, which it cannot do "
        "(allowed: eager, flash_attention_2)"
    )


def _attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, cu_seq_lens_q: Any = None, **kwargs: Any
) -> tuple[Any, None]:
    """Attention as Transformers calls it: `query` (rows, heads, tokens, width), result (rows, tokens, heads, width).

    Raises:
        ConfigError: the model asks for what scaled_dot_product_attention would leave out, or a row of several documents
            comes in another form than the flattened one.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name, what in _NOT_IN_SDPA.items():
        if kwargs.get(name) is not None:
            raise _cannot(what)
    lengths = [] if cu_seq_lens_q is None else _lengths(cu_seq_lens_q)
    flattened = attention_mask is not None and attention_mask.numel() == 0
    if flattened != (len(lengths) > 1):
        raise ConfigError(
            f"model.attn_implementation={SDPA_PER_DOCUMENT} : a row of several documents came without cu_seq_lens_q, "
            "without position_ids, or with a mask or a cache (allowed: one flattened row and use_cache=False)"
        )
    if not flattened:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = attention_mask.shape[1]
    documents = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    parts = [sdpa_attention_forward(module, q, k, v, _band(q, window), **kwargs)[0] for q, k, v in documents]
    return torch.cat(parts, dim=1), None


@functools.lru_cache(maxsize=2)
def _lengths(cu_seq_lens: Any) -> list[int]:
    """Tokens of each document. A tensor hashes by identity: the device is asked once a batch, not in each layer."""
    return cu_seq_lens.diff().tolist()


def _band(query: Any, window: int) -> Any:
    """The mask (1, 1, tokens, tokens) of a document longer than its sliding window; else None, plainly causal."""
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    tokens = query.shape[2]
    if not window or tokens <= window:
        return None
    banded = sliding_window_causal_mask_function(window)
    return sdpa_mask(1, tokens, tokens, mask_function=banded, allow_is_causal_skip=False, device=query.device)


_FLOOR = 1e-5  # float32: 2^-24 an operation, sqrt(10^4) operations in a row; the weakest leak seen was 6e-4
_ROUNDING = 0.1  # bfloat16 or int8: 2^-8 an operation, sqrt(600) operations in a row; other positions make 0.5


def prove_isolation(model: Any, collate: Collate) -> None:
    """Run a document behind two others, packed by the run's own `collate`, and see that it answers alike.

    Computed as the model is (device, dtype, adapter, an autocast around the call) but without dropout or gradient; each
    module's mode and the random generators stay as they were. With isolation both runs are the same computation, number
    for number, unless the tokens of a batch share something harmless (int8's choice of columns, an expert's batch). How
    much that makes, a later document shows by what it does to an earlier one: four times that is allowed. Alone, the
    document has other shapes and rounds otherwise, so there only the median token is held to `_ROUNDING`.

    Args:
        collate: rows with input_ids, labels and seq_lengths (tokens of each document) to a batch, as in training.

    Raises:
        ConfigError: a document sees the one before it, or answers otherwise than it does alone, or the model does not
            take such a batch at all.
    """
    first, other = _tokens(model, step=5, start=0), _tokens(model, step=7, start=3)
    second, last = _tokens(model, step=3, start=1), _tokens(model, step=9, start=2)
    packed = _answers(model, collate, first, second)
    n = len(first)
    shared = float(_change(packed[:n], _answers(model, collate, first, last)[:n]).max())
    leak = float(_change(packed[n:], _answers(model, collate, other, second)[n:]).max())
    if not leak <= max(_FLOOR, min(4 * shared, _ROUNDING)):  # so NaN does not pass either
        raise _refused(
            model, f"a document sees the one before it, which changes its answers by {leak:.2g} of their size"
        )
    apart = float(_change(packed[n:], _answers(model, collate, second)).median())
    if not apart <= _ROUNDING:
        raise _refused(model, f"a document's answers are {apart:.2g} of their size away from those it gives unpacked")


def _tokens(model: Any, step: int, start: int) -> list[int]:
    """Twelve tokens from the middle of the vocabulary, where none is special."""
    half = model.config.get_text_config().vocab_size // 2
    return [half // 2 + (start + step * i) % half for i in range(12)]


def _answers(model: Any, collate: Collate, *documents: list[int]) -> Any:
    """Logits (tokens, vocabulary) of a row of `documents`, their mean taken out; the row is in the batch twice."""
    import torch

    tokens = [token for document in documents for token in document]
    row = {"input_ids": tokens, "labels": tokens, "seq_lengths": [len(document) for document in documents]}
    batch = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in collate([row, row]).items()
        if name != "labels"
    }
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, : len(tokens)].float()
    except (TypeError, ValueError) as error:  # an argument it has not, or a kernel that it would need
        raise _refused(model, f"the model does not take packed rows: {error}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return logits - logits.mean(-1, keepdim=True)


def _change(a: Any, b: Any) -> Any:
    """(tokens,): how far `b` is from `a`, as a share of `a`."""
    return (a - b).norm(dim=-1) / a.norm(dim=-1)


def _refused(model: Any, why: str) -> ConfigError:
    implementation = model.config.get_text_config()._attn_implementation
    others = [name for name in ("sdpa", "eager", SDPA_PER_DOCUMENT, "flash_attention_2") if name != implementation]
    return ConfigError(
        f"trainer.packing=true with model.attn_implementation={implementation} : {why} "
        f"(allowed: trainer.packing=false, or one of {', '.join(others)} that keeps this model's documents apart)"
    )
