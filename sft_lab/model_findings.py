"""What the preflight finds in the model: its weights, what of it is trained, what of it is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft_lab import adapter, base_weights, embedded, quant, targets
from sft_lab import model as models
from sft_lab import trainer as trainers
from sft_lab.data.prepared import Prepared
from sft_lab.errors import PreflightError
from sft_lab.findings import Report
from sft_lab.schema import Config

_LITTLE = 0.005  # a share of the weights that is not worth a warning


def of_model(config: Config, data: Prepared, report: Report) -> None:
    """Add every finding that the model without its weights shows.

    Raises:
        PreflightError: the adapter does not fit the architecture, or a name in `peft` matches nothing of it.
    """
    base, loading = without_weights(config)
    for name, (level, told) in base_weights.problems(loading, base).items():
        report.add(name, level, told)
    new_rows = models.fit_embeddings(base, data.tokenizer)
    _quantised(config, base, report)
    model = _with_adapter(config, data, base, new_rows)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trainable = sum(n for n, _ in counts), sum(n for n, trained in counts if trained)
    report.numbers["parameters"] = {"total": total, "trainable": trainable}
    report.add("parameters", "fact", f"{trainable} of {total} parameters are trained ({trainable / total:.2%})")
    if config.peft.method != "none":
        _without_adapter(config, model, report)
    report.add("attention", "fact", trainers.attention_of(config))
    _vocabulary(data, model.get_input_embeddings().weight.shape[0], report)


def without_weights(config: Config) -> tuple[Any, dict[str, Any]]:
    """The base on the meta device, and what loading it would report; empty where its files are not on this machine."""
    import torch
    from transformers import AutoModelForCausalLM

    architecture = models.load_config(config.model)
    path, trust = embedded.resolve(config.model.path), config.model.trust_remote_code
    with models.told(config.model), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=trust)
    plain = not config.model.extra and not trust and not getattr(architecture, "quantization_config", None)
    if not plain or not Path(path).is_dir():
        return model, {}
    with models.told(config.model):
        return model, base_weights.reported(Path(path), model)


def _with_adapter(config: Config, data: Prepared, base: Any, new_rows: range) -> Any:
    from peft import get_peft_model

    if config.peft.method == "none":
        return base
    if found := targets.problems(config.peft, base):
        raise PreflightError(found)
    try:
        lora = adapter.build(config.peft, adapter.new_tokens(base, data.template, data.tokenizer, new_rows))
        model = get_peft_model(base, lora, low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise PreflightError(_refusal(config, str(error))) from None
    if found := targets.without_effect(config.peft, model):
        raise PreflightError(found)
    return model


def _refusal(config: Config, told: str) -> str:
    """What PEFT refuses, by our key where it is known which one it means."""
    if "ParamWrapper" in told:
        why = "experts that are one parameter are adapted as such"
        if "lora_dropout" in told:
            given = f"peft.lora_dropout={config.peft.lora_dropout:g}"
            return f"{given} : {why}, without dropout (allowed: peft.lora_dropout=0)"
        if "use_dora" in told:
            return f"peft.use_dora=true : {why}, without DoRA (allowed: peft.use_dora=false)"
    return f"peft : does not fit this model ({told})"


def _without_adapter(config: Config, model: Any, report: Report) -> None:
    left, total = targets.without_adapter(model)
    share = sum(left.values()) / total if total else 0
    if share < _LITTLE:
        return
    names = [name for name in left if name.rpartition(".")[2] not in ("weight", "bias")]
    hint = ""
    if names:
        hint = f"; 'peft.extra.target_parameters=[{','.join(sorted(names))}]' peft.lora_dropout=0 adapts parameters"
    level = "warning" if config.peft.target_modules == ["all-linear"] else "fact"
    told = f"{share:.0%} of the weight matrices get no adapter: {targets.shares(left, total)}{hint}"
    report.add("without_adapter", level, told)


def _quantised(config: Config, base: Any, report: Report) -> None:
    """How much of the weights quantisation leaves in full, on which the memory depends."""
    if config.quant.method == "none":
        return
    left, total = targets.unquantised(base, quant.skipped(config.quant, base))
    share = 1 - sum(left.values()) / total if total else 1.0
    report.numbers["quantised_share"] = round(share, 4)
    if 1 - share >= _LITTLE:
        told = f"{1 - share:.0%} of the weight matrices are not quantised, since they are no linear layers: "
        report.add("not_quantised", "warning", told + targets.shares(left, total))


def _vocabulary(data: Prepared, rows: int, report: Report) -> None:
    import pyarrow.compute as pc

    tables = [data.train.data, data.eval.data] if len(data.eval) else [data.train.data]
    highest = max(pc.max(chunk.values).as_py() for table in tables for chunk in table.column("input_ids").chunks)
    if highest >= rows:
        told = f"token {highest} of the tokenizer has no embedding, the model has {rows}"
        report.add("vocabulary", "error", told)
