"""An adapter holds what is trained, also where tokens are new, and plain PEFT loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_lab import embedded
from tests.conftest import Cli
from tests.test_base_weights import made

QUICK = (
    "data.train_rows=20", "data.eval_rows=4", "evaluation.rows=0", "trainer.max_steps=2", "trainer.save_steps=1", "tracking=none",
    "trainer.per_device_train_batch_size=2", "peft=lora_r8", "hydra.run.dir=run",
)  # fmt: skip


def plain(run: Path, base: str) -> Any:
    """The model as a user of PEFT loads it, who follows README."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, run / "adapter").eval(), tokenizer


def files_of(run: Path) -> list[Path]:
    return [run / "adapter" / "adapter_model.safetensors", *sorted(run.glob("checkpoints/*/adapter_model.safetensors"))]


@pytest.mark.e2e
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_of_new_tokens_only_their_rows_are_saved(main: Callable[..., Any], tmp_path: Path, tied: bool) -> None:
    folder = made(tmp_path / "base", tie_word_embeddings=tied)
    words = ("model=from_path", f"model.path={folder}", "chat_template=llama3", *QUICK)
    assert main(*words).returncode == 0
    run = tmp_path / "run"
    for file in files_of(run):
        tensors = load_file(file)
        rows = [tensor.shape[0] for name, tensor in tensors.items() if "lora_" not in name]
        assert rows == [3] * (1 if tied else 2)  # <|start_header_id|>, <|end_header_id|>, <|eot_id|>
    result = json.loads((run / "result.json").read_text())
    predicted = json.loads((run / "preflight.json").read_text())
    assert result["adapter_bytes"] < 1.2 * 4 * predicted["parameters"]["trainable"] + 20_000  # names and shapes
    model, _ = plain(run, str(folder))
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        once, again = model(ids).logits, plain(run, str(folder))[0](ids).logits
    assert torch.equal(once, again)  # nothing in it is drawn at random
    evaluated = json.loads(main("eval", "run", "--json").stdout)["metrics"]["loss"]
    assert evaluated == pytest.approx(result["metrics"]["eval_loss"], rel=2e-6)


@pytest.mark.e2e
def test_rows_that_the_base_lacks_come_back_as_they_were(main: Callable[..., Any], tmp_path: Path) -> None:
    """A tokenizer with more tokens than the embedding has rows: they are drawn at random when it grows."""
    from transformers import AutoTokenizer

    folder = made(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra_1>", "<extra_2>"])
    tokenizer.save_pretrained(folder)
    assert main("model=from_path", f"model.path={folder}", *QUICK).returncode == 0
    run = tmp_path / "run"
    assert all("embed_tokens.weight" not in name for file in files_of(run) for name in load_file(file))
    found = json.loads((run / "result.json").read_text())["metrics"]["eval_loss"]
    for _ in range(2):
        assert json.loads(main("eval", "run", "--json").stdout)["metrics"]["loss"] == pytest.approx(found, rel=2e-6)


@pytest.mark.e2e
def test_an_embedding_that_is_saved_whole_needs_no_rows_of_its_own(main: Callable[..., Any], tmp_path: Path) -> None:
    folder = made(tmp_path / "base")
    words = ("model=from_path", f"model.path={folder}", "chat_template=llama3", *QUICK)
    assert main(*words, "peft.modules_to_save=[embed_tokens,lm_head]").returncode == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["eval_loss"]
    assert json.loads(main("eval", "run", "--json").stdout)["metrics"]["loss"] == pytest.approx(found, rel=2e-6)


@pytest.mark.e2e
@pytest.mark.slow
def test_smollm2_with_new_tokens_is_a_few_megabytes(cli: Cli, tmp_path: Path) -> None:
    """Its embedding alone has 113 MB."""
    result = cli("model=smollm2_135m", "chat_template=llama3", *QUICK)
    assert result.returncode == 0, result.stderr
    assert [file.stat().st_size < 12e6 for file in files_of(tmp_path / "run")] == [True] * 3
    model, tokenizer = plain(tmp_path / "run", embedded.resolve("embedded:smollm2_135m"))
    with torch.no_grad():
        logits = model(**tokenizer("hello", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
