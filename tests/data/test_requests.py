"""The embedded data set: the same everywhere, honest about what is held out, and in step with conf/ and the schema."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sft_lab.data import requests
from sft_lab.data.requests import MODELS, MOST_ROWS, OPTIONS, generate
from sft_lab.errors import ConfigError
from sft_lab.schema import Config

CONF = Path(__file__).parents[2] / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
DEFAULTS = {
    "model=smollm2_135m",
    "peft=lora_r16",
    "quant=none",
    "chat_template=auto",
    "tracking=wandb",
}  # may go unasked
NEED_ARGUMENTS = {"model=from_path", "chat_template=from_file"}  # asked for by a long name, see the module
# Named as chatml and zephyr are; with seven templates each would be too rare to be learned in a short demonstration.
NOT_ASKED = {f"chat_template={name}" for name in ("llama3", "mistral", "gemma", "qwen", "alpaca")}
NOT_ASKED |= {"tracking=tensorboard", "tracking=trackio", "tracking=mlflow"}  # the same holds for these
EXAMPLE = "tune mistral in 4 bit, rank 64"


@pytest.fixture(scope="module")
def rows() -> tuple[list[dict], list[dict]]:
    return generate(3000, 500, seed=42)


def request(row: dict) -> str:
    return row["messages"][0]["content"]


def overrides(row: dict) -> list[str]:
    prefix = "python -m sft_lab "
    command = row["messages"][1]["content"]
    assert command.startswith(prefix)
    return command[len(prefix) :].split()


def options_of(group: str) -> set[str]:
    return {f"{group}={path.stem}" for path in (CONF / group).glob("*.yaml")}


def plain(phrasing: str) -> str:
    """A phrasing without what makes only a spelling: case, punctuation, s or z."""
    return " ".join(re.findall(r"\w+", phrasing.casefold())).replace("quantiz", "quantis")


def phrasings(split: str) -> set[str]:
    frames = requests.TERSE_FRAMES[split] + requests.SENTENCE_FRAMES[split]
    clauses = [clause for option in OPTIONS for clause in getattr(option, split)]
    return {plain(text) for text in [*frames, *clauses]}


def test_first_rows_never_change(rows):
    """A run's record names this data by its seed alone, so another version of Python must make the same rows."""
    assert [tuple(message["content"] for message in split[0]["messages"]) for split in rows] == [
        ("LoRA rank 16: train llama 3 8b", "python -m sft_lab model=llama3_8b peft=lora_r16"),
        (
            "How would I train llama 2 with the zephyr chat template, on an 8 bit base, on data from emails.jsonl?",
            "python -m sft_lab model=llama7b quant=int8 data=from_file data.path=emails.jsonl chat_template=zephyr",
        ),
    ]


def test_same_seed_same_rows(rows):
    assert generate(3000, 500, seed=42) == rows
    assert generate(10, 10, seed=43)[0] != rows[0][:10]


def test_fewer_rows_are_a_prefix(rows):
    train, held_out = generate(100, 20, seed=42)
    assert (train, held_out) == (rows[0][:100], rows[1][:20])
    assert generate(0, 20, seed=42) == ([], held_out)


def test_rows_are_distinct(rows):
    both = [*rows[0], *rows[1]]
    assert len({row["id"] for row in both}) == len({request(row).casefold() for row in both}) == 3500


def test_wording_is_disjoint(rows):
    """No held-out row can be answered by having seen its wording: neither as a whole nor a frame nor a clause."""
    assert phrasings("train").isdisjoint(phrasings("eval"))
    assert {plain(request(row)) for row in rows[0]}.isdisjoint(plain(request(row)) for row in rows[1])


def test_example_is_held_out_wording():
    nf4 = next(option for option in OPTIONS if option.overrides == "quant=nf4")
    lora = next(option for option in OPTIONS if option.overrides == "peft=lora_r{n}")
    assert "tune {what}" in requests.TERSE_FRAMES["eval"]
    assert "mistral" in MODELS["mistral7b"]
    assert "in 4 bit" in nf4.eval
    assert "rank {n}" in lora.eval
    assert EXAMPLE not in {request(row) for row in generate(MOST_ROWS, 0, seed=42)[0]}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_option_has_a_clause_for_sentences(split):
    assert len(OPTIONS) == 13
    for option in OPTIONS:
        assert any(requests.attaches(clause) for clause in getattr(option, split)), option
        assert all(("{n}" in clause) == (len(option.values) > 1) for clause in getattr(option, split)), option


@pytest.mark.parametrize("group", ["model", "peft", "quant", "chat_template", "tracking"])
def test_every_option_of_conf_is_asked_for_and_no_other(rows, group):
    for split in rows:
        asked = [override for row in split for override in overrides(row) if override.startswith(f"{group}=")]
        assert set(asked) <= options_of(group)
        assert set(asked) >= options_of(group) - NEED_ARGUMENTS - NOT_ASKED - DEFAULTS
        assert min(asked.count(option) for option in set(asked)) >= 0.03 * len(split)


def test_every_override_is_an_option_or_fits_the_schema(rows):
    """Groups by the files in conf/, keys by name and type: a structured config refuses any other."""
    texts = sorted({override for row in [*rows[0], *rows[1]] for override in overrides(row)})
    assert len(texts) > 150
    schema = OmegaConf.structured(Config)
    for text, parsed in zip(texts, OverridesParser.create().parse_overrides(texts), strict=True):
        if parsed.key_or_group in GROUPS:
            assert text in options_of(parsed.key_or_group)
        else:
            OmegaConf.update(schema, parsed.key_or_group, parsed.value())


def test_no_command_contradicts_itself(rows):
    for row in [*rows[0], *rows[1]]:
        given = overrides(row)
        keys = [override.split("=")[0] for override in given]
        assert len(set(keys)) == len(keys)
        assert ("data=from_file" in given) == ("data.path" in keys)
        assert not {"trainer.max_steps", "trainer.num_train_epochs"} <= set(keys)
        assert "peft=none" not in given or {"quant=nf4", "quant=int8"}.isdisjoint(given)
        assert "chat_template=chatml" not in given or {"model=qwen3_8b", "model=smollm2_135m"} & set(given)


def test_commands_are_short_and_in_one_order(rows):
    keys = [override.split("=")[0] for option in OPTIONS for override in option.overrides.split()]
    order = {key: i for i, key in enumerate(dict.fromkeys(["model", *keys]))}
    for row in [*rows[0], *rows[1]]:
        places = [order[override.split("=")[0]] for override in overrides(row)]
        assert places == sorted(places)
        assert places[0] == 0
        assert 2 <= len(places) <= requests.MOST_OVERRIDES


def test_too_many_rows_says_what_is_possible():
    with pytest.raises(ConfigError) as error:
        generate(MOST_ROWS + 1, -1, seed=42)
    assert error.value.problems == [
        f"data.train_rows={MOST_ROWS + 1} : data=requests cannot make that many (allowed: 0 to {MOST_ROWS})",
        f"data.eval_rows=-1 : data=requests cannot make that many (allowed: 0 to {MOST_ROWS})",
    ]
