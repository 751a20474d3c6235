"""The evaluation loss is the cross-entropy of supervised tokens, whatever is trained on and however it is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_lab import embedded
from sft_lab.data.prepared import Prepared
from sft_lab.runs import RunDirectory
from tests.conftest import Cli

ROWS = [
    {"prompt": f"What is {i} and {j}?", "completion": f"It is {i + j}{', of course' * (j % 3)}."}
    for i in range(6)
    for j in range(4)
]
QUICK = (
    "data=from_file", "data.path=rows.jsonl", "data.eval_path=held_out.jsonl", "preflight.allow=[leak]", "evaluation.rows=0",
    "tracking=none", "trainer.max_steps=4", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2",
)  # fmt: skip
MOE = {"olmoe": "OlmoeConfig", "mixtral": "MixtralConfig", "qwen3_moe": "Qwen3MoeConfig"}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for name, some in (("rows", ROWS), ("held_out", ROWS[::2])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
    return tmp_path


def mixture_of_experts(folder: Path, family: str) -> str:
    """A tiny model of a family whose routers have a loss of their own."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.resolve("embedded:tiny_llama"))
    more = (
        {"intermediate_size": 32} if family != "qwen3_moe" else {"intermediate_size": 64, "moe_intermediate_size": 32}
    )
    torch.manual_seed(0)
    config = getattr(transformers, MOE[family])(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=512, num_experts_per_tok=2, head_dim=16, pad_token_id=tokenizer.pad_token_id,
        **({"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4}), **more,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def by_hand(run: RunDirectory, dtype: torch.dtype = torch.float64) -> float:
    """Mean cross-entropy over supervised tokens, one row at a time, by plain Transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = Prepared.load(run)
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"], dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, str(run.adapter)).to(dtype).eval()
    total, count = 0.0, 0
    for row in data.eval:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1][labels != -100]
        total += float(torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def trained(main: Callable[..., Any], *words: str, name: str) -> RunDirectory:
    result = main(*QUICK, *words, f"hydra.run.dir={name}")
    assert result.returncode == 0, result.stderr
    return RunDirectory(name)


OBJECTIVES = {
    "plain": [],
    "dft": ["trainer.extra.loss_type=dft"],
    "label smoothing": ["trainer.extra.label_smoothing_factor=0.2"],
    "noise": ["trainer.extra.neftune_noise_alpha=5"],
    "one row at a time": ["trainer.per_device_eval_batch_size=1"],
    "packed": ["trainer.packing=true", "trainer.max_length=128"],
}


@pytest.mark.e2e
@pytest.mark.parametrize("words", OBJECTIVES.values(), ids=OBJECTIVES)
def test_it_is_the_cross_entropy_whatever_is_trained(main: Callable[..., Any], rows: Path, words: list[str]) -> None:
    run = trained(main, "model=tiny_llama", *words, name="run")
    found = json.loads(run.result.read_text())["metrics"]["eval_loss"]
    assert found == pytest.approx(by_hand(run), rel=2e-6)  # float32 sums against float64
    evaluated = main("eval", "run", "--json")
    assert json.loads(evaluated.stdout)["metrics"]["loss"] == pytest.approx(found, rel=2e-6)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("family", MOE)
def test_the_loss_of_routers_is_no_part_of_it(main: Callable[..., Any], rows: Path, family: str) -> None:
    path = mixture_of_experts(rows / "model", family)
    words = (
        "model=from_path",
        f"model.path={path}",
        "peft.target_modules=[q_proj,v_proj]",
        "trainer.learning_rate=1e-9",
    )
    losses = [
        json.loads(trained(main, *words, *more, name=name).result.read_text())["metrics"]["eval_loss"]
        for name, *more in (
            ("none", "trainer.extra.router_aux_loss_coef=0.0"),
            ("some", "trainer.extra.router_aux_loss_coef=0.05"),
            ("single", "trainer.extra.router_aux_loss_coef=0.05", "trainer.per_device_eval_batch_size=1"),
        )
    ]
    assert losses == pytest.approx([by_hand(RunDirectory("none"), torch.float32)] * 3, rel=5e-6)
    evaluated = json.loads(main("eval", "some", "--json").stdout)
    assert evaluated["metrics"]["loss"] == pytest.approx(losses[1], rel=2e-6)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    "swept",
    [
        "trainer.extra.loss_type=nll,dft",
        "trainer.extra.label_smoothing_factor=0.0,0.3",
        "trainer.extra.router_aux_loss_coef=0.0,0.05",
    ],
)
def test_a_sweep_over_the_objective_ranks_by_what_eval_reports(cli: Cli, rows: Path, swept: str) -> None:
    """A trial that has learned nothing is never ahead of one that has, whatever their own losses are."""
    model = ["model=tiny_llama"]
    if "router" in swept:
        path = mixture_of_experts(rows / "model", "olmoe")
        model = ["model=from_path", f"model.path={path}", "peft.target_modules=[q_proj,v_proj]"]
    result = cli("-m", *model, *QUICK, "sweep.name=s", swept, "trainer.learning_rate=2e-2,1e-8")
    assert result.returncode == 0, result.stderr
    compared = json.loads(cli("compare", "outputs/sweeps/s", "--json").stdout)
    assert [run["config"]["trainer.learning_rate"] for run in compared["runs"]] == [2e-2, 2e-2, 1e-8, 1e-8]
    for run in compared["runs"]:
        evaluated = json.loads(cli("eval", f"outputs/sweeps/s/{run['name']}", "--json").stdout)
        assert evaluated["metrics"]["loss"] == pytest.approx(run["metrics"]["eval_loss"], rel=5e-6)


@pytest.mark.e2e
def test_an_evaluation_that_is_not_finite_fails_the_run(main: Callable[..., Any], rows: Path) -> None:
    result = main("model=tiny_llama", *QUICK, "trainer.weight_decay=1e30", "trainer.max_steps=2", "hydra.run.dir=run")
    assert result.returncode == 1
    assert "training has diverged" in result.stderr
    assert "trainer.weight_decay=1e+30" in result.stderr
    run = RunDirectory("run")
    assert json.loads(run.status.read_text())["state"] == "failed"
    assert not run.result.exists()
    for line in run.metrics.read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@pytest.mark.e2e
def test_the_last_step_is_evaluated_once(main: Callable[..., Any], rows: Path) -> None:
    run = trained(main, "model=tiny_llama", "trainer.eval_steps=2", name="run")
    evaluations = [event for event in run.read_metrics() if event["split"] == "eval"]
    assert [event["step"] for event in evaluations] == [2, 4]
    assert json.loads(run.result.read_text())["metrics"]["eval_loss"] == evaluations[-1]["loss"]


@pytest.mark.e2e
@pytest.mark.parametrize("words", [["quant=nf4"], ["trainer.precision=bf16"]], ids=["nf4", "bf16"])
def test_eval_computes_as_the_run_did(main: Callable[..., Any], rows: Path, words: list[str]) -> None:
    run = trained(main, "model=tiny_llama", *words, name="run")
    found = json.loads(run.result.read_text())["metrics"]["eval_loss"]
    evaluated = json.loads(main("eval", "run", "--json").stdout)
    assert evaluated["metrics"]["loss"] == pytest.approx(found, rel=1e-5)
