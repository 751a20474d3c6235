"""From what was typed to a checked config: what composes, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sft_lab import command_line
from sft_lab import config as configs
from sft_lab.errors import ConfigError
from sft_lab.library import EXTRA_OF, OPTIMIZERS, SCHEDULERS, enum_values, field_names
from sft_lab.options import CONF_DIR, groups
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config, SourceConfig

OPTIONS = [f"{group}={option}" for group, options in groups().items() for option in options]
MISSING = {  # the options that leave a value to the person
    "model=from_path": ["model.path=some/model"],
    "data=from_file": ["data.path=rows.jsonl"],
    "data=from_hub": ["data.path=org/name"],
    "data=mixture": ["data.sources={chat: {path: chat.jsonl}, code: {path: code.jsonl, format: alpaca}}"],
    "chat_template=from_file": ["chat_template.path=chat.jinja"],
    **{  # as many as there are GPUs
        f"distributed={method}": ["distributed.num_processes=2"]
        for method in ("ddp", "fsdp1", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
    },
}


def build(*overrides: str, conf_dir: Path = CONF_DIR) -> Config:
    return configs.to_config(configs.compose(overrides, conf_dir))


@functools.cache
def of_option(option: str) -> Config:
    """With one option, and what it asks for."""
    return build(option, *MISSING.get(option, []))


def problems(*words: str) -> list[str]:
    """What the command line `words` is refused for."""
    with pytest.raises(ConfigError) as refused:
        command_line.check(command_line.parse(words))
    return refused.value.problems


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        yield from leaves(value, f"{key}.") if dataclasses.is_dataclass(value) else [key]


# ------------------------------------------------------------------------------------------------- what is shipped


def test_groups_have_the_expected_number_of_options() -> None:
    """So that the tests over OPTIONS below cannot pass for want of options."""
    assert {group: len(options) for group, options in groups().items()} == {
        "chat_template": 9,
        "data": 4,
        "distributed": 7,
        "experiment": 0,
        "model": 8,
        "peft": 4,
        "quant": 3,
        "tracking": 5,
        "trainer": 1,
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_converts(option: str) -> None:
    config = of_option(option)
    assert OmegaConf.missing_keys(configs.to_dict(config)) == set()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_says_what_it_is(option: str) -> None:
    """The comment that heads the file is what --help shows."""
    group, name = option.split("=")
    assert len(groups()[group][name]) > 10


def test_default_config_shows_every_key_of_the_schema() -> None:
    """`--cfg job` promises every key with the value that it will have."""
    shown = configs.compose([])
    keys = list(leaves(build()))
    assert len(keys) > 70
    assert [key for key in keys if OmegaConf.select(shown, key, default="absent") == "absent"] == []


@pytest.mark.parametrize(
    "group", ["peft.method", "quant.method", "data.source", "chat_template.name", "tracking.method"]
)
def test_every_choice_of_a_kind_has_an_option(group: str) -> None:
    section, field = group.split(".")
    chosen = {getattr(getattr(of_option(o), section), field) for o in OPTIONS if o.startswith(f"{section}=")}
    declared = {f.name: f.metadata for f in dataclasses.fields(getattr(Config(), section))}[field]["choices"]
    assert chosen == set(declared)


# -------------------------------------------------------------------------------------------------- what is refused


@dataclass(frozen=True)
class Refused:
    """Words of a command line, how the one problem begins, what it goes on with, and its nearest match."""

    words: str
    begins: str
    says: tuple[str, ...] = ()
    near: str | None = None


MIXTURE = "data=mixture data.sources={chat:{path:/dev/null}}"
LORA = "peft=lora_r8, lora_r16, lora_r64"
REFUSED = [
    # an unknown key, option or extra
    Refused(
        "trainer.learning_rte=1e-3",
        "trainer.learning_rte=1e-3 : no such key;",
        ("keys of trainer: learning_rate, lr_scheduler_type,", ", extra)"),
        "trainer.learning_rate",
    ),
    Refused("+trainer.foo=1", "+trainer.foo=1 : no such key (", ("keys of trainer: learning_rate,",)),
    Refused("++trainer.foo=1", "++trainer.foo=1 : no such key (", ("keys of trainer: learning_rate,",)),
    Refused("+foo=1", "+foo=1 : no such key (", ("keys: seed, model, peft,",)),
    Refused("trainer.seed=1", "trainer.seed=1 : no such key;", (), "seed"),
    Refused("train.learning_rate=1", "train.learning_rate=1 : no such key;", (), "trainer.learning_rate"),
    Refused(
        "model=llama7",
        "model=llama7 : no such option of the group model;",
        ("(allowed: from_path, gemma3_4b, llama3_8b, llama7b, ",),
        "llama7b",
    ),
    Refused(
        "trainer.extra.neftune_noise=5",
        "trainer.extra.neftune_noise=5 : no such argument of trl.SFTConfig;",
        ("adam_beta1",),
        "neftune_noise_alpha",
    ),
    Refused(
        "peft.extra.layer_to_transform=[0]",
        "peft.extra.layer_to_transform=[0] : no such argument of peft.LoraConfig;",
        ("init_lora_weights",),
        "layers_to_transform",
    ),
    Refused(
        "model.extra.cache_dri=x",
        "model.extra.cache_dri=x : no such argument of AutoModelForCausalLM.from_pretrained;",
        ("max_memory",),
        "cache_dir",
    ),
    Refused(
        "quant.extra.bnb_4bit_quant_store=x",
        "quant.extra.bnb_4bit_quant_store=x : no such argument of transformers.BitsAndBytesConfig;",
        ("llm_int8_skip_modules",),
        "bnb_4bit_quant_storage",
    ),
    # an extra that has a key of its own
    Refused("trainer.extra.bf16=true", "trainer.extra.bf16=", ("sets this itself (use trainer.precision)",)),
    Refused("trainer.extra.max_steps=4", "trainer.extra.max_steps=4 : ", ("(use trainer.max_steps)",)),
    Refused("trainer.extra.output_dir=x", "trainer.extra.output_dir=x : ", ("(use hydra.run.dir)",)),
    Refused("peft.extra.r=4", "peft.extra.r=4 : ", ("(use peft.r)",)),
    Refused("model.extra.dtype=float32", "model.extra.dtype=float32 : ", ("(use model.dtype)",)),
    Refused("quant.extra.load_in_4bit=1", "quant.extra.load_in_4bit=1 : ", ("(use quant=nf4)",)),
    # a value of the wrong type, or not among those allowed
    Refused("peft.r=abc", "peft.r=abc : ", ("allowed is an integer",)),
    Refused("trainer.max_steps=1.5", "trainer.max_steps=1.5 : ", ("allowed is an integer",)),
    Refused("trainer.packing=maybe", "trainer.packing=maybe : ", ("allowed is true or false",)),
    Refused("peft.target_modules=q_proj", "peft.target_modules=q_proj : ", ("allowed is a list such as [a, b]",)),
    Refused("trainer.learning_rate=null", "trainer.learning_rate=null : ", ("allowed is a number",)),
    Refused("trainer.precision=fp99", "trainer.precision=fp99 : not allowed", ("(allowed: auto, bf16, fp16, fp32)",)),
    Refused("peft.r=-1", "peft.r=-1 : too small", ("(allowed: 0 and more)",)),
    Refused("peft.r=0", "peft.r=0 : too small for LoRA", ("(allowed: 1 and more, or peft=none)",)),
    Refused("trainer.learning_rate=nan", "trainer.learning_rate=nan : ", ("allowed",)),
    Refused("trainer.learning_rate=inf", "trainer.learning_rate=inf : ", ("allowed",)),
    Refused("trainer.optim=adamw_trch", "trainer.optim=adamw_trch : not allowed;", ("adafactor",), "adamw_torch"),
    Refused("trainer.optim=adamv", "trainer.optim=adamv : not allowed;", ("adamw_torch",)),
    Refused("trainer.lr_scheduler_type=cosin", "trainer.lr_scheduler_type=cosin : not allowed;", ("linear",), "cosine"),
    # a value missing or taken away
    Refused("data=from_file", "data.path=??? : a value must be given"),
    Refused("model=from_path", "model.path=??? : a value must be given"),
    Refused("~trainer.packing", "~trainer.packing : cannot be deleted"),
    Refused("~peft", "~peft : cannot be deleted"),
    Refused("model=null", "model=null : ", ("allowed: ", "llama7b")),
    # an interpolation that leads nowhere
    Refused("trainer.learning_rate=${foo}", "trainer.learning_rate", ("foo",)),
    # right by itself, wrong together
    Refused("quant=nf4 peft=none", "quant=nf4 with peft=none : ", (f"(allowed: quant=none, or {LORA})",)),
    Refused(
        "quant=int8 distributed=fsdp2 distributed.num_processes=2",
        "quant=int8 : 8-bit weights cannot be cut into shards",
        ("quant=nf4", "distributed=ddp"),
    ),
    Refused(
        "trainer.extra.load_best_model_at_end=true", "trainer.extra.load_best_model_at_end=True : a run that was killed"
    ),
    Refused("trainer.extra.ignore_data_skip=true", "trainer.extra.ignore_data_skip=True : a run that goes on"),
    Refused("quant=int8 peft=none", "quant=int8 with peft=none : ", (f"(allowed: quant=none, or {LORA})",)),
    Refused("peft=none peft.r=8", "peft.r=8 : has no effect with peft=none", ("(allowed: peft=lora_r16 peft.r=8)",)),
    Refused("peft=none peft.lora_alpha=8", "peft.lora_alpha=8 : has no effect with peft=none"),
    Refused("peft.target_modules=[]", "peft.target_modules=[] : LoRA needs modules"),
    Refused("distributed.num_processes=2", "distributed.num_processes=2 : ", ("(allowed: 1, or distributed=ddp",)),
    Refused("trainer.max_steps=0", "trainer.max_steps=0 : ", ("nothing to train",)),
    Refused("data.train_rows=0", "data.train_rows=0 : ", ("(allowed: 1 and more)",)),
    Refused(
        "data.path=nowhere.jsonl",
        "data.path=nowhere.jsonl : data=requests makes its own rows",
        ("no such file", "(allowed: data=from_file data.path=nowhere.jsonl)"),
    ),
    Refused(
        "data=from_file data.path=nowhere.jsonl",
        "data.path=nowhere.jsonl : no such file (",
        ("allowed: a .jsonl, .json, .csv, .txt (or any of them .gz), .parquet or .arrow file, a directory",),
    ),
    Refused(
        "data=from_hub data.path=o/n data.eval_split=test data.eval_rows=5",
        "data.eval_rows=5 : ",
        ("data.eval_split", "(allowed: 0)"),
    ),
    Refused("data=from_file data.path=", "data.path= : is empty"),
    Refused("data=from_file data.path=. data.eval_split=test", "data.eval_split=test : only a hub data set has splits"),
    Refused("data.eval_path=x.jsonl", "data.eval_path=x.jsonl : data=requests makes its held-out rows too"),
    Refused("data=from_file data.path=no/*.jsonl", "data.path=no/*.jsonl : no file matches (allowed: "),
    Refused("data.eval_fraction=1.5", "data.eval_fraction=1.5 : too large (allowed: 0 to 1)"),
    Refused(
        "data=from_hub data.path=o/n data.eval_fraction=0.1 data.eval_rows=5",
        "data.eval_fraction=0.1 : beside data.eval_rows=5",
    ),
    Refused("data=mixture", "data.sources={} : a mixture of nothing", ("{NAME: {path: FILE",)),
    Refused("data=mixture data.sources.a.path=x", "data.sources.a.path=x : there is no source a yet"),
    Refused(
        f"{MIXTURE} data.sources.chat.weigt=2",
        "data.sources.chat.weigt=2 : no such key;",
        (),
        "data.sources.chat.weight",
    ),
    Refused(f"{MIXTURE} data.sources.chat.weight=a", "data.sources.chat.weight=a : allowed is a number"),
    Refused(f"{MIXTURE} data.sources.chat.sample=2", "data.sources.chat.sample=2.0 : too large (allowed: 0 to 1)"),
    Refused(f"{MIXTURE} data.sources.chat.format=csv", "data.sources.chat.format=csv : not allowed (allowed: "),
    Refused(
        f"{MIXTURE} data.sources.chat.weight=2",
        "data.sources.chat.weight=2 : has no effect with data.mix=concatenate",
        ("data.sources.chat.sample", "interleave_all_exhausted"),
    ),
    Refused(f"{MIXTURE} data.path=x", "data.path=x : a mixture has a path for each source"),
    Refused(
        "data=from_file data.path=. data.streaming=true",
        "trainer.max_steps=-1 : with data.streaming=true",
        ("1 and more",),
    ),
    Refused(
        "data=from_file data.path=. data.streaming=true trainer.max_steps=5 data.deduplicate=near",
        "data.deduplicate=near : needs all rows",
    ),
    Refused("data.streaming=true trainer.max_steps=5", "data.streaming=true : not with data.source=requests"),
    Refused("chat_template.path=x.jinja", "chat_template.path=x.jinja : with chat_template.name=auto"),
    Refused("chat_template=from_file chat_template.path=x.jinja", "chat_template.path=x.jinja : no such file"),
    Refused("model=from_path model.path=./no/model", "model.path=./no/model : no such directory (", ("a hub id",)),
    # no KEY=VALUE at all
    Refused("peft.r", "peft.r : cannot be read as KEY=VALUE"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.words)
def test_refused_with_one_problem_that_names_key_value_and_what_is_allowed(
    case: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = problems(*case.words.split())
    assert problem.startswith(case.begins)
    for words in case.says:
        assert words in problem
    if case.near:
        assert f"did you mean {case.near}?" in problem
    elif case.begins.endswith("("):
        assert "did you mean" not in problem


def test_a_misspelt_file_name_is_matched_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    (problem,) = problems("data=from_file", f"data.path={tmp_path}/trian.jsonl")
    assert f"did you mean {tmp_path}/train.jsonl?" in problem


def test_a_misspelt_directory_of_a_model_too(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (problem,) = problems("model=from_path", f"model.path={tmp_path}/lama")
    assert f"did you mean {tmp_path}/llama?" in problem


def test_a_directory_and_a_glob_are_files_too(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "rows.jsonl"):
        command_line.check(command_line.parse(["data=from_file", f"data.path={path}"]))


def test_everything_wrong_comes_as_one_list() -> None:
    words = ["trainer.learning_rte=1e-3", "model=llama7", "peft.r=abc", "tracking.mode=on", "quant.extra.a=1", "seed=1"]
    assert {problem.split(" : ")[0] for problem in problems(*words)} == set(words) - {"seed=1"}


def test_a_wrong_key_hides_no_wrong_value_of_its_group() -> None:
    words = ["trainer.learning_rte=1e-3", "trainer.precision=fp99"]
    assert {problem.split(" : ")[0] for problem in problems(*words)} == set(words)


# ----------------------------------------------------------------------------------------------------- batch sizes


@pytest.mark.parametrize(
    ("words", "per_device", "accumulation", "total"),
    [
        ("", 8, 1, 8),
        ("trainer.global_batch_size=32", 8, 4, 32),
        ("trainer.global_batch_size=8", 8, 1, 8),
        ("trainer.global_batch_size=6 trainer.per_device_train_batch_size=2", 2, 3, 6),
        ("trainer.gradient_accumulation_steps=3", 8, 3, 24),
        ("trainer.global_batch_size=32 trainer.gradient_accumulation_steps=4", 8, 4, 32),
    ],
)
def test_batch_sizes_agree(words: str, per_device: int, accumulation: int, total: int) -> None:
    trainer = build(*words.split()).trainer
    assert (
        trainer.per_device_train_batch_size,
        trainer.gradient_accumulation_steps,
        trainer.global_batch_size,
    ) == (per_device, accumulation, total)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            "trainer.global_batch_size=20",
            "trainer.global_batch_size=20 : not a multiple of per_device_train_batch_size x processes=8 x 1 "
            "(allowed: 8, 16, 24, ...)",
        ),
        (
            "trainer.global_batch_size=4",
            "trainer.global_batch_size=4 : not a multiple of per_device_train_batch_size x processes=8 x 1 "
            "(allowed: 8, 16, 24, ...)",
        ),
        (
            "trainer.global_batch_size=32 trainer.gradient_accumulation_steps=2",
            "trainer.gradient_accumulation_steps=2 : does not give global_batch_size=32 "
            "(allowed: 4, or leave one of the two out)",
        ),
    ],
)
def test_batch_sizes_that_cannot_agree(words: str, problem: str) -> None:
    assert problems(*words.split()) == [problem]


# ---------------------------------------------------------------------------------------------------------- extras


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_extra_takes_further_arguments_with_and_without_plus(sign: str) -> None:
    assert build(f"{sign}trainer.extra.neftune_noise_alpha=5").trainer.extra == {"neftune_noise_alpha": 5}


def test_names_read_from_source_are_those_of_the_real_classes() -> None:
    """They are read without importing torch; a new version of a library must not make them wrong."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel
    from trl import SFTConfig

    def parameters(function: Any) -> set[str]:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {p.name for p in inspect.signature(function).parameters.values() if p.kind in named} - {"self"}

    assert field_names(EXTRA_OF["trainer"].source) == {f.name for f in dataclasses.fields(SFTConfig)}
    assert field_names(EXTRA_OF["peft"].source) == {f.name for f in dataclasses.fields(LoraConfig)}
    assert field_names(EXTRA_OF["quant"].source) == parameters(BitsAndBytesConfig.__init__)
    assert field_names(EXTRA_OF["model"].source) >= parameters(PreTrainedModel.from_pretrained)


@pytest.mark.parametrize("group", ["peft", "quant", "trainer"])  # model's own go through **kwargs
def test_what_sft_lab_sets_itself_exists_in_the_library(group: str) -> None:
    owner = EXTRA_OF[group]
    assert set(owner.ours) <= field_names(owner.source)


def accepted_extras(group: str) -> set[str]:
    own = {field.name for field in dataclasses.fields(getattr(Config(), group))}
    return field_names(EXTRA_OF[group].source) - own - set(EXTRA_OF[group].ours)


def test_every_accepted_trainer_extra_reaches_sft_config(tmp_path: Path) -> None:
    """An argument that sft_lab passes too would end in a TypeError once a run has begun."""
    from trl import SFTConfig

    from sft_lab import trainer as trainers

    defaults = {f.name: f.default for f in dataclasses.fields(SFTConfig) if f.default is not dataclasses.MISSING}
    refused, config = {}, build()
    names = sorted(accepted_extras("trainer") & set(defaults))
    assert len(names) > 50
    for name in names:
        config.trainer.extra = {name: defaults[name]}
        try:
            trainers.build_arguments(config, RunDirectory(tmp_path))
        except TypeError as error:
            refused[name] = str(error)
    assert refused == {}


@pytest.mark.parametrize("group", ["peft", "quant"])
def test_every_accepted_extra_is_an_argument_of_its_builder(group: str) -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from sft_lab import adapter, quant

    config, owner = build("quant=nf4"), {"peft": LoraConfig, "quant": BitsAndBytesConfig}[group]
    parameters = inspect.signature(owner).parameters
    names = sorted(accepted_extras(group))
    assert names
    for name in names:
        getattr(config, group).extra = {name: parameters[name].default}
        assert adapter.build(config.peft) is not None
        assert quant.build(config.quant, "float32") is not None


def test_optimizers_and_schedulers_are_those_of_transformers() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert enum_values(*OPTIMIZERS) == {member.value for member in OptimizerNames}
    assert enum_values(*SCHEDULERS) == {member.value for member in SchedulerType}


# -------------------------------------------------------------------------------- experiments and further conf dirs


@pytest.fixture
def conf_dir(tmp_path: Path) -> Path:
    """A person's own conf directory, as given to --config-dir."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "trainer").mkdir()
    (tmp_path / "experiment" / "small.yaml").write_text(
        "# @package _global_\n# a small one\n"
        "defaults:\n  - override /peft: lora_r8\nseed: 7\ntrainer:\n  max_steps: 3\n"
    )
    return tmp_path


def test_an_experiment_is_listed_with_its_comment_and_not_with_its_package(conf_dir: Path) -> None:
    """Hydra reads `# @package` only from the first line."""
    assert groups(conf_dir)["experiment"] == {"small": "a small one"}


def test_experiment_beats_config_and_command_line_beats_both(conf_dir: Path) -> None:
    plain, small = build(conf_dir=conf_dir), build("experiment=small", conf_dir=conf_dir)
    assert (plain.seed, plain.peft.r, plain.trainer.max_steps) == (42, 16, -1)
    assert (small.seed, small.peft.r, small.trainer.max_steps) == (7, 8, 3)
    for words in (["experiment=small", "seed=9", "peft=lora_r64"], ["seed=9", "peft=lora_r64", "experiment=small"]):
        typed = build(*words, conf_dir=conf_dir)
        assert (typed.seed, typed.peft.r, typed.trainer.max_steps) == (9, 64, 3)


@pytest.mark.parametrize(
    ("file", "text", "option", "key", "near"),
    [
        ("trainer/odd.yaml", "learning_rte: 1e-3\n", "trainer=odd", "trainer.learning_rte", "trainer.learning_rate"),
        (
            "experiment/odd.yaml",
            "# @package _global_\ntrainer:\n  learning_rte: 1e-3\n",
            "experiment=odd",
            "trainer.learning_rte",
            "trainer.learning_rate",
        ),
        ("experiment/odd.yaml", "# @package _global_\nsede: 1\n", "experiment=odd", "sede", "seed"),
        ("experiment/odd.yaml", "# @package _global_\npeft:\n  r: abc\n", "experiment=odd", "peft.r", None),
        ("trainer/odd.yaml", "precision: fp99\n", "trainer=odd", "trainer.precision=fp99", None),
    ],
)
def test_config_files_are_checked_like_what_is_typed(
    conf_dir: Path, file: str, text: str, option: str, key: str, near: str | None
) -> None:
    (conf_dir / file).write_text(text)
    (problem,) = problems("--config-dir", str(conf_dir), option)
    assert key in problem
    assert near is None or f"did you mean {near}?" in problem


def test_a_config_dir_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (problem,) = problems("--config-dir", str(tmp_path / "none"), "seed=1")
    assert str(tmp_path / "none") in problem


def test_an_override_misspelt_beside_an_experiment_does_not_hide_the_experiment(conf_dir: Path) -> None:
    (problem,) = problems("--config-dir", str(conf_dir), "experiment=small", "trainer.max_step=5")
    assert problem.startswith("trainer.max_step=5 : no such key; did you mean trainer.max_steps?")


# ---------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("peft=lora_r8,lora_r17", ["peft=lora_r17"]),
        ("peft.r=8,abc trainer.learning_rate=1e-3,x", ["peft.r=abc", "trainer.learning_rate=x"]),
        ("trainer.precision=auto,fp32,fp99", ["trainer.precision=fp99"]),
        ("peft.r=choice(4,a)", ["peft.r=a"]),
        ("peft.r=range(-1,10,4)", ["peft.r=-1"]),
        ("peft=none,lora_r8 quant=none,nf4", ["quant=nf4 with peft=none"]),
        ("peft=lora_r8,none peft.r=4", ["peft.r=4"]),
        ("trainer.learning_rte=1,2,3", ["trainer.learning_rte=1", "trainer.learning_rte=2", "trainer.learning_rte=3"]),
    ],
)
def test_each_swept_value_is_checked(words: str, expected: list[str]) -> None:
    assert [problem.split(" : ")[0] for problem in problems("-m", *words.split())] == expected


@pytest.mark.parametrize(
    "words",
    [
        "peft=lora_r8,lora_r16 trainer.learning_rate=1e-4,2e-4 trainer.packing=true,false",
        "peft.r=range(4,10)",
        "peft.target_modules=[q_proj],[k_proj,v_proj]",
        "peft.r=shuffle(4,8)",
        "tracking=glob(*)",
    ],
)
def test_sweeps_that_hydra_understands_are_let_through(words: str) -> None:
    command_line.check(command_line.parse(["-m", *words.split()]))


def test_a_list_of_values_without_m_says_how_to_sweep() -> None:
    (problem,) = problems("peft=lora_r8,lora_r16")
    assert problem.startswith("peft=lora_r8,lora_r16 : ")
    assert "-m" in problem


# --------------------------------------------------------------------------------------- frozen configs, trial ids


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trainer.learning_rate=1e-5", "trainer.weight_decay=1e-20", "seed=0"],
        ["peft=none"],
        ["quant=nf4", "peft.target_modules=[q_proj,v_proj]"],
        ["data=from_file", "data.path='a b/ü.jsonl'", "data.name=1e-3", "data.eval_path=no"],
        ["tracking.notes='one: \"two\"\n  # three'", "tracking.tags=[yes,1e3,'null']"],
        ["trainer.extra.lr_scheduler_kwargs={num_cycles: 2}", "trainer.extra.adam_beta2=0.95"],
        ["tracking.notes='costs \\${price}'"],
    ],
    ids=" ".join,
)
def test_a_frozen_config_loads_as_it_was(words: list[str], tmp_path: Path) -> None:
    config = build(*words)
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
    assert configs.load(tmp_path / "config.yaml") == config


def test_a_frozen_config_of_another_version_is_refused_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(configs.to_yaml(build()).replace("learning_rate", "learning_rte"))
    with pytest.raises(ConfigError) as refused:
        configs.load(file)
    assert all(problem.startswith(f"{file}: ") for problem in refused.value.problems)
    assert "trainer.learning_rte" in str(refused.value)


# --------------------------------------------------------------------------------------------- other data for `eval`


@pytest.mark.parametrize("name", ["rows.jsonl", "two words.jsonl", "grüße.jsonl", 'a"b.jsonl', "a,b=c.jsonl"])
def test_other_data_keeps_what_is_not_typed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.touch()
    config = build("data=from_file", "data.path=x.jsonl")
    config.data.path = str(path)
    changed = configs.with_other_data(config, ["data.on_bad_row=skip"])
    assert changed == dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_row="skip"))


def test_other_data_of_a_mixture(tmp_path: Path) -> None:
    """Names and paths of its sources are the user's own, and one of them can be changed alone."""
    (tmp_path / "a${b}.jsonl").touch()
    sources = {
        "one-2": {"path": f"{tmp_path}/a${{b}}.jsonl", "columns": {"prompt": "q.0"}},
        "two": {"path": str(tmp_path)},
    }
    config = build("data=mixture", "data.sources={x: {path: x.jsonl}}")
    config.data.sources = {name: SourceConfig(**settings) for name, settings in sources.items()}  # type: ignore[arg-type]
    changed = configs.with_other_data(config, ["data.eval_rows=3", "data.sources.two.sample=0.5"])
    two = dataclasses.replace(config.data.sources["two"], sample=0.5)
    expected = dataclasses.replace(config.data, eval_rows=3, sources={**config.data.sources, "two": two})
    assert changed == dataclasses.replace(config, data=expected)
    with pytest.raises(ConfigError, match=r"data\.sources\.three\.sample=0\.5 : there is no source three yet"):
        configs.with_other_data(config, ["data.sources.three.sample=0.5"])
    with pytest.raises(ConfigError, match=r"data\.eval_row=3 : no such key; did you mean data\.eval_rows\?"):
        configs.with_other_data(config, ["data.eval_row=3"])


def test_other_data_takes_nothing_but_data() -> None:
    with pytest.raises(ConfigError, match=r"peft\.r=4 : only data="):
        configs.with_other_data(build(), ["peft.r=4"])
