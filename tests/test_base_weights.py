"""A base whose weights are not those of its files is not trained on, evaluated or talked to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_lab import base_weights, embedded, model_findings, quant, targets
from sft_lab import config as configs
from sft_lab.schema import Config, QuantConfig

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "mistral", "qwen2", "phi3", "cohere")},
    **{name: {"head_dim": 16} for name in ("qwen3", "gemma2", "gemma3_text")},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {},
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    "glm4_moe": {**DEEPSEEK, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
QUICK = ("data.train_rows=20", "data.eval_rows=4", "evaluation.rows=0", "trainer.max_steps=1", "tracking=none")


def made(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A tiny model of a family with tiny_llama's tokenizer; `max_shard_size` goes to saving, the rest to its config."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.resolve("embedded:tiny_llama"))
    shard = options.pop("max_shard_size", "5GB")
    sizes = {key: value for key, value in SIZES.items() if (family, key) != ("gpt_neox", "num_key_value_heads")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{"vocab_size": len(tokenizer), **sizes, **FAMILIES[family], **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(folder: Path, *words: str) -> Config:
    return configs.to_config(configs.compose(["model=from_path", f"model.path={folder}", "tracking=none", *words]))


def problems(folder: Path) -> dict[str, base_weights.Problem]:
    model, loading = model_findings.without_weights(config_of(folder))
    return base_weights.problems(loading, model)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def reconfigure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    "options", [{}, {"tie_word_embeddings": True}, {"max_shard_size": "20KB"}], ids=["", "tied", "sharded"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_base_of_any_family_is_taken(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    assert problems(made(tmp_path, family, **options)) == {}


def test_a_part_of_a_model_of_another_task_is_only_told(tmp_path: Path) -> None:
    made(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "v_head.summary.weight": torch.ones(1, 32)})
    assert problems(tmp_path)["unexpected_weights"][0] == "warning"


def test_an_expert_that_is_not_there_is_told(tmp_path: Path) -> None:
    made(tmp_path, "mixtral")
    (lost,) = [name for name in load_file(tmp_path / "model.safetensors") if "0.block_sparse_moe.experts.1.w1" in name]
    rewrite(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if name != lost})
    assert problems(tmp_path)["missing_weights"][0] == "error"


def test_files_of_other_programs_beside_it_are_not_read(tmp_path: Path) -> None:
    made(tmp_path)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"):
        save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / name)
    assert problems(tmp_path) == {}


def test_masks_that_older_files_of_gpt_neo_hold_stop_nothing(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.resolve("embedded:tiny_llama"))
    sizes = {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "attention_types": [[["global"], 1]],
        "max_position_embeddings": 64,
    }
    config = AutoConfig.for_model("gpt_neo", vocab_size=len(tokenizer), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 64, 64)})
    assert problems(tmp_path) == {}


def test_a_base_in_torchs_own_files_is_taken(tmp_path: Path) -> None:
    made(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert problems(tmp_path) == {}


def test_buffers_that_older_files_hold_stop_nothing(tmp_path: Path) -> None:
    made(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert problems(tmp_path) == {}


BROKEN: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "names with a prefix": (
        "missing_weights",
        "21 weights of the model are not in its files, the first is lm_head.weight",
        lambda folder: rewrite(folder, lambda t: {f"_orig_mod.{name}": tensor for name, tensor in t.items()}),
    ),
    "one weight lost": (
        "missing_weights",
        "1 weights of the model are not in its files, the first is model.layers.1.mlp.up_proj.weight",
        lambda folder: rewrite(folder, lambda t: {n: w for n, w in t.items() if n != "model.layers.1.mlp.up_proj.weight"}),
    ),
    "a layer too many in the files": (
        "unexpected_weights",
        "9 weights in the files are none of the model's, the first is model.layers.1.input_layernorm.weight",
        lambda folder: reconfigure(folder, num_hidden_layers=1),
    ),
    "another width in the config": (
        "missing_weights",
        "have another shape in the model's files",
        lambda folder: reconfigure(folder, intermediate_size=48),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("finding", "told", "damage"), BROKEN.values(), ids=BROKEN)
def test_a_base_that_its_files_do_not_hold_stops_the_plan(
    main: Callable[..., Any], tmp_path: Path, finding: str, told: str, damage: Callable[[Path], None]
) -> None:
    folder = made(tmp_path / "base")
    damage(folder)
    words = ("plan", "model=from_path", f"model.path={folder}", *QUICK, "--json")
    result = main(*words)
    (found,) = [f for f in json.loads(result.stdout)["findings"] if f["name"] == finding]
    assert (result.returncode, found["level"], told in found["message"]) == (2, "error", True)
    assert main(*words, f"preflight.allow=[{finding}]").returncode == 0


@pytest.mark.e2e
def test_a_base_that_was_damaged_after_the_run_is_neither_evaluated_nor_asked(
    main: Callable[..., Any], tmp_path: Path
) -> None:
    folder = made(tmp_path / "base")
    assert main("model=from_path", f"model.path={folder}", *QUICK, "hydra.run.dir=run").returncode == 0
    assert main("eval", "run").returncode == 0
    BROKEN["names with a prefix"][2](folder)
    for words in (("eval", "run"), ("chat", "run", "--prompt", "hello"), ("repro", "run")):
        result = main(*words)
        assert (result.returncode, "not" in result.stderr) == (2, True), result.stderr
    assert "21 weights of the model are not in its files" in main("eval", "run").stderr


# ------------------------------------------------------------------------------------------------------ quantisation


@pytest.mark.parametrize("method", ["bnb_4bit", "bnb_8bit"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "deepseek_v3"])
def test_the_share_that_is_quantised_is_the_loaded_models(tmp_path: Path, family: str, method: str) -> None:
    """Counted beforehand on a model without weights, and afterwards on the layers that bitsandbytes made."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    made(tmp_path, family)
    base, _ = model_findings.without_weights(config_of(tmp_path))
    left, total = targets.unquantised(base, quant.skipped(QuantConfig(method=method), base))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quant.build(QuantConfig(method=method), "float32"), device_map={"": "cpu"}
    )
    sizes = {name: p.numel() for name, p in base.named_parameters()}
    layers = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    quantised = sum(sizes[f"{name}.weight"] for name, module in loaded.named_modules() if isinstance(module, layers))
    assert total - sum(left.values()) == quantised


def test_experts_that_stay_in_full_are_told(main: Callable[..., Any], tmp_path: Path) -> None:
    folder = made(tmp_path / "base", "mixtral")
    words = ("plan", "model=from_path", f"model.path={folder}", *QUICK, "quant=nf4", "peft.lora_dropout=0", "--json")
    report = json.loads(main(*words).stdout)
    (found,) = [f for f in report["findings"] if f["name"] == "not_quantised"]
    assert found["message"].startswith("86% of the weight matrices are not quantised")
    assert "mlp.experts.gate_up_proj (57%)" in found["message"]
    assert report["quantised_share"] == pytest.approx(0.14, abs=0.01)
    shutil.rmtree(folder)
    made(folder)
    assert "not_quantised" not in main(*words).stdout
