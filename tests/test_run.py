"""One run through the command line: the directory it leaves, and what can be done with it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Cli, online
from tests.fake_wandb import FakeWandb

pytestmark = pytest.mark.e2e

QUICK = [
    "model=tiny_llama", "trainer.max_steps=6", "trainer.logging_steps=2", "data.train_rows=64", "data.eval_rows=8",
    "evaluation.rows=4", "evaluation.max_new_tokens=8",
]  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check(result: subprocess.CompletedProcess[str], code: int = 0) -> subprocess.CompletedProcess[str]:
    assert result.returncode == code, f"{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's directory, and what the terminal showed."""
    path = tmp_path_factory.mktemp("finished")
    words = [*QUICK, "peft=lora_r8", "trainer.eval_steps=3", "trainer.save_steps=3", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "sft_lab", *words]
    result = check(subprocess.run(command, cwd=path, capture_output=True, text=True, check=False))
    assert "Traceback" not in result.stderr
    return path / "run", result.stdout


def test_the_run_directory_is_complete(finished: tuple[Path, str]) -> None:
    run, _ = finished
    files = {
        "config.yaml", "overrides.yaml", "provenance.json", "preflight.json", "status.json", "metrics.jsonl", "result.json",
        "samples.jsonl", "train.log", "checkpoints", "adapter", "wandb",
    }  # fmt: skip
    assert files <= {p.name for p in run.iterdir()}
    assert not list(run.rglob("*.tmp"))
    status, result, preflight = read(run / "status.json"), read(run / "result.json"), read(run / "preflight.json")
    assert (status["state"], status["error"], status["step"]) == ("completed", None, 6)
    assert {"train_loss", "eval_loss", "exact_match", "exact_match_before", "composes"} <= set(result["metrics"])
    assert result["steps"] == preflight["steps"] == 6
    assert result["train_s"] > 0
    assert result["tokens_per_s"] > 0
    assert result["adapter_bytes"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert preflight["ok"]
    assert preflight["parameters"]["trainable"] < preflight["parameters"]["total"]
    assert preflight["rows"] == {"read": 64, "kept": 64, "dropped": {}}
    assert yaml.safe_load((run / "overrides.yaml").read_text())[0] == "model=tiny_llama"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["learning_rate"] == 2e-3  # resolved
    assert set(read(run / "provenance.json")) >= {"git", "packages", "hardware", "data_fingerprint", "model"}


def test_metrics_have_steps_and_count_real_tokens(finished: tuple[Path, str]) -> None:
    run, _ = finished
    events = lines(run / "metrics.jsonl")
    train = [event for event in events if event["split"] == "train"]
    assert [event["step"] for event in train] == [2, 4, 6]
    assert {3, 6} <= {event["step"] for event in events if event["split"] == "eval" and "loss" in event}
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "time_s"} <= set(train[0])
    total = read(run / "preflight.json")["tokens"]["total"]
    assert train[-1]["tokens"] == pytest.approx(total * 48 / 64, rel=0.15)  # 6 steps of 8 of the 64 rows


def test_the_terminal_tells_what_matters(finished: tuple[Path, str]) -> None:
    _, shown = finished
    for words in (
        "wandb sync",
        "precision: fp32",
        "64 to train on",
        "step 2/6",
        "tokens/s",
        "exact match before training",
    ):
        assert words in shown
    assert "FutureWarning" not in shown


def test_the_adapter_is_small_and_loads_with_plain_peft(finished: tuple[Path, str], cli: Cli) -> None:
    """Plain transformers and peft give the answer that `chat` gives."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sft_lab import embedded

    run, _ = finished
    base = AutoModelForCausalLM.from_pretrained(embedded.resolve("embedded:tiny_llama"))
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    prompt = "tune mistral in 4 bit, rank 64"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    plain = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = check(cli("chat", str(run), "--prompt", prompt, "--max-new-tokens", "20")).stdout
    assert answer == plain + "\n"
    names = {p.name for p in (run / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert tokenizer.pad_token != tokenizer.eos_token


def test_eval_repeats_the_runs_own_evaluation(finished: tuple[Path, str], cli: Cli) -> None:
    run, _ = finished
    report = json.loads(check(cli("eval", str(run), "--json")).stdout)
    assert report["rows"] == 8
    assert report["metrics"]["loss"] == pytest.approx(read(run / "result.json")["metrics"]["eval_loss"], rel=1e-4)


def test_eval_on_other_rows(finished: tuple[Path, str], main: Cli, tmp_path: Path) -> None:
    run, _ = finished
    row = {"prompt": "train qwen", "completion": "python -m sft_lab model=qwen3_8b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["data=from_file", "data.path=rows.jsonl", "data.metrics=[exact_match]", "--json"]
    report = json.loads(check(main("eval", str(run), *words)).stdout)
    assert (report["rows"], report["source"]) == (1, "rows.jsonl")
    assert set(report["metrics"]) == {"loss", "exact_match"}
    wrong = check(main("eval", str(run), "trainer.max_steps=3"), code=2)
    assert "trainer.max_steps=3" in wrong.stderr


def test_the_same_seed_gives_the_same_bytes(cli: Cli, main: Cli, tmp_path: Path) -> None:
    """In a process of its own and in this one, which has trained others before."""
    adapters = []
    for name, seed, run in (("a", 1, cli), ("b", 1, main), ("c", 2, main)):
        check(run(*QUICK, "tracking=none", "evaluation.rows=0", f"seed={seed}", f"hydra.run.dir={name}"))
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert adapters[0] != adapters[2]


def test_a_directory_is_never_used_twice(finished: tuple[Path, str], main: Cli) -> None:
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    refused = check(main(*QUICK, f"hydra.run.dir={run}"), code=2)
    assert "holds a run already" in refused.stderr
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_full_training_without_an_adapter(main: Cli, tmp_path: Path) -> None:
    check(main(*QUICK, "peft=none", "tracking=none", "hydra.run.dir=run"))
    assert (tmp_path / "run" / "adapter" / "model.safetensors").exists()
    assert check(main("chat", "run", "--prompt", "hello", "--max-new-tokens", "4")).stdout


def test_a_model_that_cannot_be_had_fails_in_one_sentence(cli: Cli, main: Cli, tmp_path: Path) -> None:
    """Without a hub llama7b fails with exit code 1; the same config on a local Llama trains."""
    from sft_lab import embedded

    words = ["model=llama7b", "peft=lora_r16", *QUICK[1:], "tracking=none"]
    failed = check(cli(*words, "hydra.run.dir=a"), code=1)
    assert failed.stderr.count("\n") == 1
    assert "model.path=meta-llama/Llama-2-7b-hf" in failed.stderr
    assert read(tmp_path / "a" / "status.json")["state"] == "failed"
    check(
        main(*words, "trainer.max_steps=1", f"model.path={embedded.resolve('embedded:tiny_llama')}", "hydra.run.dir=b")
    )


def test_bad_rows_are_refused_or_left_out_on_the_record(main: Cli, tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})
    bad = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    (tmp_path / "rows.jsonl").write_text("\n".join([good, good, bad, "{", good]) + "\n")
    words = ["model=tiny_llama", "data=from_file", "data.path=rows.jsonl", "trainer.max_steps=1", "tracking=none"]
    refused = check(main(*words), code=2)
    assert "rows.jsonl: row 3: no assistant turn" in refused.stderr
    assert "rows.jsonl: row 4: broken JSON" in refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    check(main(*words, "data.on_bad_row=skip", "hydra.run.dir=run"))
    report = read(tmp_path / "run" / "preflight.json")
    assert report["rows"] == {"read": 5, "kept": 3, "dropped": {"bad": 2}}
    finding = next(f for f in report["findings"] if f["name"] == "dropped_bad")
    assert [row.split(": ")[0] for row in finding["rows"]] == ["rows.jsonl:3", "rows.jsonl:4"]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_has_the_whole_run(cli: Cli, tmp_path: Path, wandb_server: FakeWandb, mode: str) -> None:
    """Config, group, tags, notes, metrics with steps, sample table and adapter, live or by the command that was shown."""
    settings = [
        "tracking.project=p",
        "tracking.group=g",
        "tracking.tags=[a,b]",
        "tracking.notes=why",
        "tracking.name=n",
    ]
    words = [*QUICK, *settings, f"tracking.mode={mode}", "hydra.run.dir=run"]
    shown = check(cli(*words, env={**online(wandb_server), "WANDB_MODE": mode})).stdout
    if mode == "offline":
        (command,) = re.findall("wandb sync .*", shown)
        sync = [sys.executable, "-m", *shlex.split(command)]
        subprocess.run(sync, env={**os.environ, **online(wandb_server)}, check=True, capture_output=True, timeout=120)
    (run,) = wandb_server.runs.values()
    assert (run.project, run.group, run.name, run.tags, run.notes, run.exit_code) == (
        "p",
        "g",
        "n",
        ["a", "b"],
        "why",
        0,
    )
    assert run.config["sft_lab"]["value"]["peft"]["r"] == 16
    losses = {row["_step"]: row["train/loss"] for row in run.history if "train/loss" in row}
    events = lines(tmp_path / "run" / "metrics.jsonl")
    assert losses == {event["step"]: event["loss"] for event in events if event["split"] == "train"}
    assert {"eval/exact_match", "eval/loss"} <= {key for row in run.history for key in row}
    assert any(row.get("samples", {}).get("_type") == "table-file" for row in run.history)
    assert run.summary["preflight/steps"] == 6
    model = next(artifact for artifact in wandb_server.artifacts.values() if artifact.type == "model")
    assert model.committed
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(model.files)
    assert model.metadata["base_model"] == "embedded:tiny_llama"
    assert model.metadata["data_fingerprint"] == read(tmp_path / "run" / "provenance.json")["data_fingerprint"]
    assert model.metadata["config"]["peft"]["r"] == 16
