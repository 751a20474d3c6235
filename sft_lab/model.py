"""The base model and its tokenizer, and the precision that this machine computes in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_lab import attention, base_weights, distributed, embedded, quant, shared
from sft_lab.errors import ConfigError, RunError
from sft_lab.schema import Config, ModelConfig

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}  # what training in them computes in


@dataclass(frozen=True)
class Precision:
    """How a run computes: `training` is fp32, bf16 or fp16 (autocast), `dtype` what the base is held in."""

    training: str
    dtype: str
    why: str


def require_machine(config: Config) -> None:
    """
    Raises:
        ConfigError: this machine cannot compute in what was asked for, or has not the attention.
    """
    import torch

    asked, gpu = config.trainer.precision, torch.cuda.is_available()
    if asked == "fp16" and not gpu:
        raise ConfigError(
            "trainer.precision=fp16 : needs a GPU, its loss scaling has none to run on (allowed: auto, fp32, bf16)"
        )
    if asked == "bf16" and gpu and not torch.cuda.is_bf16_supported():
        device = torch.cuda.get_device_name(0)
        raise ConfigError(f"trainer.precision=bf16 : {device} has no bfloat16 (allowed: auto, fp32, fp16)")
    _require_flash_attention(config.model.attn_implementation)


def resolve_precision(config: Config) -> Precision:
    """What `trainer.precision` and `model.dtype` come to on this machine, and why."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if gpu else "the CPU"
    bf16 = gpu and torch.cuda.is_bf16_supported()
    training, why = config.trainer.precision, "asked for"
    if training == "auto":
        training, why = (
            ("bf16", f"{device} computes in bfloat16") if bf16 else ("fp32", f"{device} is fastest in float32")
        )
    dtype = config.model.dtype
    if dtype == "auto":
        # Without an adapter the weights themselves are trained, and AdamW's small steps vanish in 16 bits.
        full = training == "fp32" or config.peft.method == "none"
        dtype = "float32" if full else _AUTOCAST[training]
    return Precision(training, dtype, why)


def autocast(config: Config) -> contextlib.AbstractContextManager[Any]:
    """What a run computes in: the loss of an evaluation depends on it."""
    import torch

    training = resolve_precision(config).training
    if training not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device(), dtype=getattr(torch, _AUTOCAST[training]))


def resolve_attention(config: Config) -> str:
    """What `model.attn_implementation=auto` comes to: for packed rows, the one that pays for each document alone."""
    asked = config.model.attn_implementation
    if asked != "auto":
        return asked
    if not _has_sdpa(config.model.path, config.model.revision, config.model.trust_remote_code):
        return "eager"
    return attention.SDPA_PER_DOCUMENT if config.trainer.packing else "sdpa"


def _require_flash_attention(asked: str) -> None:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    available = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if asked in available and not available[asked](kernels_fallback_ok=True):
        package = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}[asked]
        raise ConfigError(
            f"model.attn_implementation={asked} : needs a GPU and the package {package} or kernels "
            "(allowed here: auto, sdpa, sdpa_per_document, eager)"
        )


@functools.cache
def _has_sdpa(path: str, revision: str, trust_remote_code: bool) -> bool:
    """Whether the architecture can attend by PyTorch's own function, which has no soft-capping and no sinks."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    architecture = load_config(ModelConfig(path=path, revision=revision, trust_remote_code=trust_remote_code))
    if type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # code of the model's own, which Transformers asks
        return True
    return bool(MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)]._supports_sdpa)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def own_device() -> str:
    """Of this rank, where each has a GPU of its own."""
    return f"cuda:{distributed.local_rank()}" if device() == "cuda" else "cpu"


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of `model.path`.

    Raises:
        RunError: it cannot be had, from the hub or from disk.
    """
    from transformers import AutoTokenizer

    path = embedded.resolve(model.path)
    with told(model):
        return AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def load_config(model: ModelConfig) -> Any:
    """The architecture's `PretrainedConfig`; raises RunError as `load_tokenizer` does."""
    from transformers import AutoConfig

    path = embedded.resolve(model.path)
    with told(model):
        return AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def fetch(model: ModelConfig) -> None:
    """Have the weights on this machine, where ranks find them; nothing for a directory or an embedded model.

    Raises:
        RunError: they cannot be had from the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if Path(embedded.resolve(model.path)).is_dir():
        return
    ask = functools.partial(snapshot_download, model.path, revision=model.revision)
    with told(model):
        try:
            kinds = ["*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja"]
            kinds += [file for file in [model.extra.get("gguf_file")] if file]
            others = ["original/*", "consolidated*"]  # the same weights, for other programs
            folder = Path(ask(allow_patterns=kinds, ignore_patterns=others))
            if not any(folder.glob("*.safetensors")):  # an old one
                ask(allow_patterns=["*.bin"])
        except HfHubHTTPError as error:
            raise OSError(str(error)) from error


def load_model(config: Config) -> Any:
    """The base model on its device, quantised if asked for, without an adapter; of one load where trials share it.

    Raises:
        ConfigError: this machine cannot do what is asked for, or the model's weights are not those of its files.
        RunError: it cannot be had, from the hub or from disk.
    """
    from transformers import AutoModelForCausalLM

    require_machine(config)
    attention.register()
    model, precision = config.model, resolve_precision(config)
    arguments: dict[str, Any] = {
        "revision": model.revision,
        "dtype": precision.dtype,
        "attn_implementation": resolve_attention(config),
        "trust_remote_code": model.trust_remote_code,
        **model.extra,
    }
    storage = _AUTOCAST.get(precision.training, precision.dtype) if config.distributed.shards_weights else ""
    quantisation = quant.build(config.quant, precision.dtype, storage)
    if quantisation is not None:
        arguments["quantization_config"] = quantisation
        if config.distributed.method != "deepspeed_zero3":  # which places the weights itself
            arguments["device_map"] = {"": own_device()}
    path = embedded.resolve(model.path)

    def load() -> Any:
        with told(model):
            loaded, loading = AutoModelForCausalLM.from_pretrained(
                path, **{"ignore_mismatched_sizes": True, **arguments}, output_loading_info=True
            )
        problems = base_weights.refused(loading, loaded, config.preflight.allow)
        # Of ranks that share the weights each reads a part of them; the preflight has looked at all.
        if problems and not config.distributed.shards_weights:
            raise ConfigError([f"model.path={model.path} : {problem}" for problem in problems])
        if config.quant.method == "bnb_4bit":
            quant.keep_packing(loaded)
        return loaded

    # int8 layers move their weights into a state of their own at the first forward, which leaves nothing to share.
    return load() if config.quant.method == "bnb_8bit" else shared.base((path, repr(arguments)), load)


def name_experts(model: Any) -> None:
    """Tell the number of experts by the name that TRL reads, where a family has another one for it (Granite's)."""
    config = model.config.get_text_config()
    if not hasattr(config, "num_experts") and hasattr(config, "num_local_experts"):
        config.num_experts = config.num_local_experts


def fit_embeddings(model: Any, tokenizer: Any) -> range:
    """Give the embeddings a row for each token that the tokenizer has beyond them, drawn near their mean.

    Returns:
        The rows that are new.
    """
    weight = model.get_input_embeddings().weight
    before = weight.shape[0]
    if len(tokenizer) > before:
        shared.own_embeddings(model)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=weight.device.type != "meta")
    return range(before, len(tokenizer))


@contextlib.contextmanager
def told(model: ModelConfig) -> Iterator[None]:
    """One sentence in place of the many in which a hub client says that it found nothing."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise RunError(
            f"model.path={model.path}: cannot be loaded from a directory of this name nor from the hub ({lines[0]})"
        ) from error
