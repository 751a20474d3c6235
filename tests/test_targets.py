"""Every name in `peft` matches something of the model, and what gets no adapter is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_lab import adapter, model_findings, targets
from sft_lab import config as configs
from sft_lab import model as models
from sft_lab.errors import PreflightError
from tests.test_base_weights import QUICK, config_of, made

WRONG = {
    "peft.target_modules=[q_proj,v_porj]": r"peft.target_modules : v_porj matches no module of this model (allowed: ",
    "peft.target_modules=[q_prj]": "; did you mean q_proj?",
    "peft.target_modules=[q_proj,input_layernorm]": "peft : does not fit this model",
    "peft.target_modules=[q_proj,k_proj] peft.extra.exclude_modules=[k_proj]": "k_proj matches nothing that gets an adapter",
    "peft.target_modules=[q_proj] peft.extra.rank_pattern={v_proj:4}": "v_proj matches nothing that gets an adapter",
    "peft.modules_to_save=[lm_haed]": "peft.modules_to_save : lm_haed matches no module",
    "peft.extra.rank_pattern={q_porj:4}": "peft.extra.rank_pattern : q_porj matches no module",
    "peft.extra.alpha_pattern={v_porj:4}": "peft.extra.alpha_pattern : v_porj matches no module",
    "peft.extra.exclude_modules=[down_prj]": "peft.extra.exclude_modules : down_prj matches no module",
    "peft.extra.exclude_modules='.*down_prj'": "peft.extra.exclude_modules : .*down_prj matches no module",
    "peft.extra.target_parameters=[mlp.experts.gate_proj]": "peft.extra.target_parameters : mlp.experts.gate_proj matches",
    "peft.target_modules=[q_proj] peft.extra.layers_to_transform=[0,7]": "peft.extra.layers_to_transform : there is no layer 7 (allowed: 0 to 1)",
    "peft.target_modules=[q_proj] peft.extra.layers_pattern=blocks": "peft.extra.layers_pattern : blocks matches no module",
    "peft.extra.trainable_token_indices={embed_tokns:[1]}": "peft.extra.trainable_token_indices : embed_tokns matches",
}
RIGHT = [
    "peft.target_modules=[q_proj,layers.0.self_attn.v_proj]",
    "peft.modules_to_save=[lm_head]",
    "peft.extra.rank_pattern={q_proj:4,down_proj:2}",
    "peft.extra.exclude_modules=[down_proj]",
    "peft.target_modules=[q_proj] peft.extra.layers_to_transform=[1]",
    "peft.extra.trainable_token_indices={embed_tokens:[1]}",
]


def refused(words: str) -> list[str]:
    """What the preflight says of `peft` on tiny_llama."""
    config = configs.to_config(configs.compose(["model=tiny_llama", "tracking=none", *words.split()]))
    data = SimpleNamespace(template=SimpleNamespace(added_tokens=()), tokenizer=models.load_tokenizer(config.model))
    try:
        model_findings._with_adapter(config, data, model_findings.without_weights(config)[0], range(0))
    except PreflightError as error:
        return error.problems
    return []


@pytest.mark.parametrize(("words", "told"), WRONG.items(), ids=WRONG)
def test_a_name_that_matches_nothing_is_refused(words: str, told: str) -> None:
    assert any(told in problem for problem in refused(words))


@pytest.mark.parametrize("words", RIGHT)
def test_names_that_match_are_taken(words: str) -> None:
    assert refused(words) == []


def test_the_plan_refuses_them_all_at_once(main: Callable[..., Any], tmp_path: Path) -> None:
    result = main(
        "plan", "model=tiny_llama", *QUICK, "peft.target_modules=[q_proj,v_porj]", "peft.modules_to_save=[lm_haed]"
    )
    assert result.returncode == 2
    assert "v_porj matches no module" in result.stderr
    assert "lm_haed matches no module" in result.stderr


@pytest.mark.parametrize(
    ("family", "share", "names"),
    [
        ("llama", 0, []),
        ("qwen3_moe", 0, []),
        ("qwen2_moe", 0.63, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("gpt_oss", 0.86, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("deepseek_v3", 0.32, ["mlp.gate_proj.weight", "mlp.shared_experts.gate_proj.weight"]),
    ],
)
def test_what_all_linear_leaves_out_is_told_with_its_share(
    main: Callable[..., Any], tmp_path: Path, family: str, share: float, names: list[str]
) -> None:
    folder = made(tmp_path / "base", family)
    words = ("plan", "model=from_path", f"model.path={folder}", *QUICK, "peft.lora_dropout=0")
    report = json.loads(main(*words, "--json").stdout)
    found = [finding for finding in report["findings"] if finding["name"] == "without_adapter"]
    if not share:
        assert found == []
        return
    (finding,) = found
    assert (finding["level"], finding["message"][:3]) == ("warning", f"{share:.0%}")
    assert all(name in finding["message"] for name in names)
    if "target_parameters" in finding["message"]:  # what it proposes works as it stands
        proposed = finding["message"].split("'")[1]
        report = json.loads(main(*words, proposed, "--json").stdout)
        assert "mlp.experts" not in str([f for f in report["findings"] if f["name"] == "without_adapter"])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("peft.lora_dropout=0.05", "peft.lora_dropout=0.05 : experts that are one parameter"),
        ("peft.use_dora=true", "peft.use_dora=true : experts that are one parameter"),
    ],
)
def test_what_peft_refuses_of_experts_is_told_by_our_key(
    main: Callable[..., Any], tmp_path: Path, word: str, told: str
) -> None:
    folder = made(tmp_path / "base", "mixtral")
    words = ("plan", "model=from_path", f"model.path={folder}", *QUICK, "peft.lora_dropout=0", word)
    result = main(*words)
    assert (result.returncode, told in result.stderr) == (2, True), result.stderr


@pytest.mark.e2e
def test_granites_experts_are_counted_by_the_name_that_trl_reads(main: Callable[..., Any], tmp_path: Path) -> None:
    folder = made(tmp_path / "base", "granitemoe")
    result = main("model=from_path", f"model.path={folder}", *QUICK, "peft.lora_dropout=0", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr


def test_matrices_of_an_adapted_model_are_counted_once(tmp_path: Path) -> None:
    config = config_of(made(tmp_path), "peft.target_modules=[q_proj]")
    from peft import get_peft_model

    base, _ = model_findings.without_weights(config)
    model = get_peft_model(base, adapter.build(config.peft), low_cpu_mem_usage=True)
    left, total = targets.without_adapter(model)
    assert total == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert sum(left.values()) == total - 2 * 32 * 32
    assert "self_attn.q_proj.weight" not in left
