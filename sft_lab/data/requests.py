"""The embedded data set: requests in plain English, each with the one sft_lab command that it asks for.

    tune mistral in 4 bit, rank 64   ->   python -m sft_lab model=mistral7b peft=lora_r64 quant=nf4

It gives every machine, with no download, a task that a 135M model fails before fine-tuning and can learn from about a
thousand rows. What keeps it learnable: names and numbers are copied or mapped one to one, the order of the overrides is
fixed (that of OPTIONS) whatever the order of the clauses, and a command holds only what the request mentions. What
keeps it honest: training and held-out rows share no sentence frame and no clause, only the names of things; every
option of conf/ that is not the default and needs no further argument is asked for; no command contradicts itself.

`model=from_path` and `data=from_hub` are left out: their arguments are long names that few rows could teach to copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from random import Random
from typing import Any

from sft_lab.errors import ConfigError

# The most rows of one split. There, one in twenty of the one-clause requests drawn is a repeat and drawn again; further
# on they run out, and the mix of lengths would drift to the long ones.
MOST_ROWS = 20_000

# Share of the draws with so many clauses besides the model.
CLAUSE_COUNTS = {1: 0.2, 2: 0.45, 3: 0.35}
MOST_OVERRIDES = 5  # the model's included: at most 62 tokens of SmolLM2, within evaluation.max_new_tokens

# What people ask for most beside the model: how often such a key is drawn, where any other is drawn once.
KEY_WEIGHTS = {"peft": 3, "quant": 2}

MODELS = {
    "mistral7b": ("mistral", "mistral 7b", "Mistral 7B"),
    "llama7b": ("llama 2", "llama 7b", "Llama 2 7B"),
    "llama3_8b": ("llama 3", "llama 3 8b", "Llama 3.1 8B"),
    "qwen3_8b": ("qwen", "qwen 3", "Qwen3 8B"),
    "gemma3_4b": ("gemma", "gemma 3", "Gemma 3 4B"),
    "smollm2_135m": ("smollm", "smollm2", "SmolLM2 135M"),
    "tiny_llama": ("tiny llama", "the tiny llama", "Tiny Llama"),
}

# What cannot go together: a full fine-tune has no frozen base to quantise, ChatML needs two tokens that only these two
# models' tokenizers have, and steps beat epochs.
CONFLICTS = {
    "quant=nf4": {"peft=none"},
    "quant=int8": {"peft=none"},
    "chat_template=chatml": {f"model={name}" for name in MODELS} - {"model=qwen3_8b", "model=smollm2_135m"},
    "trainer.max_steps": {"trainer.num_train_epochs"},
}

# How a request is framed. `{what}` is the model followed by the clauses. A terse frame takes any clause; a sentence
# takes only those that attach by a preposition, as in "with seed 7".
TERSE_FRAMES = {
    "train": (
        "train {what}",
        "fine-tune {what}",
        "{what}",
        "finetune {model}: {clauses}",
        "new run: {what}",
        "{clauses}: train {model}",
        "todo: fine-tune {what}",
    ),
    "eval": ("tune {what}", "next run: {what}", "{model} run: {clauses}", "{clauses}: tune {model}"),
}
SENTENCE_FRAMES = {
    "train": (
        "Please fine-tune {what}.",
        "Train {what}, please.",
        "I want to train {what}.",
        "We need to finetune {what}.",
        "Start a run of {what}.",
        "Can you train {what}?",
        "Could you please tune {what}?",
        "How do I fine-tune {what}?",
        "Give me the command to train {what}.",
    ),
    "eval": (
        "Please train {what}.",
        "I would like to fine-tune {what}.",
        "Set up a run of {what}.",
        "Could you finetune {what}?",
        "How would I train {what}?",
        "What is the command to tune {what}?",
    ),
}
PREPOSITIONS = {"as", "at", "for", "in", "on", "over", "using", "with", "without"}

FILE_STEMS = ("chats", "dialogs", "emails", "faq", "lessons", "notes", "orders", "questions", "reviews", "support")
FILES = tuple(f"{stem}.{suffix}" for stem in FILE_STEMS for suffix in ("jsonl", "json", "csv", "parquet"))


@dataclass(frozen=True)
class Option:
    """Something to ask for: its overrides, and the clauses that ask for it; `{n}` is one of `values` in both.

    `train` and `eval` are disjoint, and each has a clause that attaches by a preposition.
    """

    overrides: str
    train: tuple[str, ...]
    eval: tuple[str, ...]
    values: tuple[str, ...] = ("",)
    weight: int = 1  # beside the other options of its key


# In the order of the command; a request takes at most one of a key.
OPTIONS = (
    Option(
        "peft=lora_r{n}",
        train=("with rank {n}", "with a LoRA of rank {n}", "LoRA rank {n}", "using rank {n}", "at rank {n}"),
        eval=("rank {n}", "with LoRA rank {n}", "using a LoRA of rank {n}", "with a rank {n} LoRA"),
        values=("8", "16", "64"),
        weight=3,
    ),
    Option(
        "peft=none",
        train=("without an adapter", "with full fine-tuning", "with no LoRA", "no adapter", "without any LoRA"),
        eval=("without a LoRA", "with no adapter", "without any adapter", "full fine-tuning", "no LoRA"),
    ),
    Option(
        "quant=nf4",
        train=("with 4 bit weights", "with a 4-bit base", "using nf4", "quantised to 4 bit", "4 bits", "as QLoRA"),
        eval=("in 4 bit", "using 4-bit weights", "on a 4 bit base", "in nf4", "4-bit", "with QLoRA"),
    ),
    Option(
        "quant=int8",
        train=("with 8 bit weights", "with an 8-bit base", "using int8", "quantised to 8 bit", "8 bits"),
        eval=("in 8 bit", "using 8-bit weights", "on an 8 bit base", "in int8", "8-bit"),
    ),
    Option(
        "data=from_file data.path={n}",
        train=("on {n}", "using the file {n}", "with data from {n}", "on the rows of {n}", "data: {n}"),
        eval=("on the file {n}", "on data from {n}", "using the rows of {n}", "data from {n}"),
        values=FILES,
    ),
    Option(
        "chat_template={n}",
        train=(
            "with the {n} template",
            "using {n} as the chat template",
            "in {n} format",
            "{n} template",
            "on the {n} chat template",
        ),
        eval=("using the {n} template", "with the {n} chat template", "in the {n} format", "chat template {n}"),
        values=("chatml", "zephyr"),
    ),
    Option(
        "tracking=none",
        train=("without wandb", "without tracking", "with no wandb", "tracking off", "with no tracking"),
        eval=("without any tracking", "no wandb", "with tracking off", "without wandb logging", "no tracking"),
    ),
    Option(
        "trainer.learning_rate={n}",
        train=(
            "with learning rate {n}",
            "with a learning rate of {n}",
            "at lr {n}",
            "learning rate {n}",
            "learning rate: {n}",
        ),
        eval=("at learning rate {n}", "with lr {n}", "lr {n}", "using a learning rate of {n}"),
        values=("1e-5", "2e-5", "5e-5", "1e-4", "2e-4", "3e-4", "5e-4", "1e-3", "2e-3"),
    ),
    Option(
        "trainer.num_train_epochs={n}",
        train=("for {n} epochs", "over {n} epochs", "with {n} epochs of training", "epochs: {n}"),
        eval=("{n} epochs", "with {n} epochs", "for {n} epochs of training"),
        values=("2", "3", "4", "5", "6", "8", "10"),
    ),
    Option(
        "trainer.max_steps={n}",
        train=("for {n} steps", "over {n} steps", "with {n} steps of training", "steps: {n}"),
        eval=("{n} steps", "with {n} steps", "for {n} steps of training"),
        values=("20", "50", "80", "100", "120", "150", "200", "250", "300", "400", "500", "800", "1000", "2000"),
    ),
    Option(
        "trainer.per_device_train_batch_size={n}",
        train=("with batch size {n}", "with a batch size of {n}", "in batches of {n}", "batch size {n}", "batch: {n}"),
        eval=("at batch size {n}", "using a batch size of {n}", "with batches of {n}", "batches of {n}"),
        values=("2", "4", "8", "16", "32", "64"),
    ),
    Option(
        "trainer.packing=true",
        train=("with packing", "packing on", "with packing enabled", "with packed rows"),
        eval=("using packing", "with packing on", "packing enabled"),
    ),
    Option(
        "seed={n}",
        train=("with seed {n}", "using seed {n}", "seed {n}", "with the seed set to {n}", "on seed {n}"),
        eval=("with the seed {n}", "at seed {n}", "seed set to {n}"),
        values=tuple(str(n) for n in range(100)),
    ),
)
BY_KEY = [list(options) for _, options in groupby(OPTIONS, key=lambda option: option.overrides.split("=")[0])]


def generate(train_rows: int, eval_rows: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows, {"id", "messages"} each; fewer rows are a prefix of more.

    Raises:
        ConfigError: more rows than can be made, or fewer than none.
    """
    asked = {"train": train_rows, "eval": eval_rows}
    problems = [
        f"data.{split}_rows={rows} : data=requests cannot make that many (allowed: 0 to {MOST_ROWS})"
        for split, rows in asked.items()
        if not 0 <= rows <= MOST_ROWS
    ]
    if problems:
        raise ConfigError(problems)
    train, held_out = (_rows(split, rows, seed) for split, rows in asked.items())
    return train, held_out


def _rows(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{split}-{i:05}",
            "messages": [{"role": "user", "content": request}, {"role": "assistant", "content": command}],
        }
        for i, (request, command) in enumerate(islice(_pairs(split, seed), count))
    ]


def _pairs(split: str, seed: int) -> Iterator[tuple[str, str]]:
    """Requests, no two alike, and their commands: an endless stream that `split` and `seed` alone decide."""
    rng = Random(f"requests-{seed}-{split}")  # a string is hashed by SHA-512: the same on every machine
    seen = set()
    while True:
        options = _draw_options(rng)
        overrides = _overrides(options)
        model = _draw_model(rng, overrides)
        request = _request(rng, split, model, options)
        if request.casefold() not in seen:
            seen.add(request.casefold())
            yield request, " ".join(["python -m sft_lab", f"model={model}", *overrides])


def _draw_options(rng: Random) -> list[tuple[Option, str]]:
    """Options with a value each, in the order of the command; drawn again until they go together."""
    while True:
        count = rng.choices(list(CLAUSE_COUNTS), list(CLAUSE_COUNTS.values()))[0]
        drawn = []
        for i in _draw_keys(rng, count):
            option = rng.choices(BY_KEY[i], [option.weight for option in BY_KEY[i]])[0]
            drawn.append((option, rng.choice(option.values)))
        overrides = _overrides(drawn)
        if len(overrides) < MOST_OVERRIDES and not _conflict(overrides):
            return drawn


def _draw_keys(rng: Random, count: int) -> list[int]:
    """Distinct places in BY_KEY, in order."""
    keys = [options[0].overrides.split("=")[0] for options in BY_KEY]
    weights, places = [KEY_WEIGHTS.get(key, 1) for key in keys], set[int]()
    while len(places) < count:
        places |= set(rng.choices(range(len(keys)), weights))
    return sorted(places)


def _draw_model(rng: Random, overrides: list[str]) -> str:
    """Drawn last, so that an option that suits few models is asked for as often as the others."""
    return rng.choice([name for name in MODELS if not _conflict([f"model={name}", *overrides])])


def _overrides(options: list[tuple[Option, str]]) -> list[str]:
    return " ".join(option.overrides.format(n=value) for option, value in options).split()


def _conflict(overrides: list[str]) -> bool:
    given = {*overrides, *(override.split("=")[0] for override in overrides)}
    return any(CONFLICTS.get(name, set()) & given for name in given)


def _request(rng: Random, split: str, model: str, options: list[tuple[Option, str]]) -> str:
    """The options in the split's own wording, in any order."""
    terse = rng.random() < 0.5
    clauses = []
    for option, value in options:
        phrasings = [phrasing for phrasing in getattr(option, split) if terse or attaches(phrasing)]
        clauses.append(rng.choice(phrasings).format(n=value))
    rng.shuffle(clauses)
    if not terse and len(clauses) > 1 and rng.random() < 0.5:
        clauses[-2:] = [" and ".join(clauses[-2:])]
    name, text = rng.choice(MODELS[model]), ", ".join(clauses)
    frame = rng.choice((TERSE_FRAMES if terse else SENTENCE_FRAMES)[split])
    return frame.format(model=name, clauses=text, what=f"{name}{' ' if attaches(text) else ', '}{text}")


def attaches(clause: str) -> bool:
    """Whether a clause follows the model without a comma: "mistral in 4 bit", but "mistral, rank 64"."""
    return clause.split()[0] in PREPOSITIONS
