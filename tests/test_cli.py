"""The command line as a person meets it: what it answers, with which exit code, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_lab.options import groups

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
TINY = ["model=tiny_llama", "tracking=none"]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """What was said of a user's mistake: exit code 2, nothing on standard output, no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


# ------------------------------------------------------------------------------------------------------ quickness


@pytest.mark.parametrize(
    "words",
    [
        None,
        ["--help"],
        ["--cfg", "job"],
        ["--cfg", "job", "peft.extra.layers_to_transform=[0]", "trainer.optim=adafactor"],
        ["trainer.learning_rte=1e-3"],
        ["trainer.extra.neftune_noise=5"],
        ["data=from_file", "data.path=nowhere.jsonl"],
        ["trane"],
        ["resume", "nowhere"],
        ["eval", "nowhere"],
        ["chat", "nowhere"],
    ],
    ids=lambda words: " ".join(words) if words else "import",
)
def test_no_torch_where_none_is_needed(words: list[str] | None, tmp_path: Path) -> None:
    """torch and transformers take seconds to import; these answers must come at once."""
    program = """if True:
        import sys
        from sft_lab.__main__ import main
        try:
            if sys.argv[1:]:
                main()
        finally:
            heavy = {"torch", "transformers", "datasets", "trl", "peft", "wandb"}
            print(sorted(heavy & set(sys.modules)), file=sys.stderr)
    """
    command = [sys.executable, "-c", program, *(words or [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


# ----------------------------------------------------------------------------------------------------------- help


def test_help_lists_every_option_with_its_comment(cli: Cli, tmp_path: Path) -> None:
    done = cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    options = [[name, comment] for group in groups().values() for name, comment in group.items()]
    assert len(options) > 20
    assert [option for option in options if option not in lines] == []
    assert all(["resume|eval|chat" in done.stdout, "--cfg job" in done.stdout])
    assert listing(tmp_path) == []


@pytest.mark.parametrize("verb", ["resume", "eval", "chat", "env"])
def test_each_verb_has_help_of_its_own(cli: Cli, verb: str) -> None:
    done = cli(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: sft_lab {verb} ")


def test_cfg_job_shows_the_settings_of_model_adapter_quantisation_and_trainer(cli: Cli, tmp_path: Path) -> None:
    done = cli("model=llama7b", "peft=lora_r16", "quant=nf4", "trainer.max_length=512", "--cfg", "job", "--resolve")
    assert done.returncode == 0, done.stderr
    for line in [
        "path: meta-llama/Llama-2-7b-hf",
        "method: lora",
        "r: 16",
        "lora_alpha: 32",
        "- all-linear",
        "method: bnb_4bit",
        "bnb_4bit_quant_type: nf4",
        "bnb_4bit_use_double_quant: true",
        "learning_rate: 0.0002",
        "lr_scheduler_type: cosine",
        "max_length: 512",
        "packing: false",
        "gradient_checkpointing: true",
        "precision: auto",
    ]:
        assert f"  {line}\n" in done.stdout
    assert listing(tmp_path) == []


def test_train_is_the_same_as_no_verb(cli: Cli) -> None:
    fixed = ["seed=7", "sweep.name=x", "--cfg", "job"]
    plain, train = cli(*fixed), cli("train", *fixed)
    assert plain.returncode == train.returncode == 0
    assert plain.stdout == train.stdout
    assert "seed: 7" in plain.stdout


def test_output_may_be_cut_off_by_head(tmp_path: Path) -> None:
    """`python -m sft_lab --help | head -1` closes the pipe early, which is no error to tell of."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sft_lab", "--help"]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr


def test_env_is_one_json_document(cli: Cli, tmp_path: Path) -> None:
    done = cli("env", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {"torch", "transformers", "trl", "peft", "sft_lab"} <= {name.replace("-", "_") for name in facts["versions"]}
    assert listing(tmp_path) == []


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trainer.learning_rte=1e-3", "trainer.learning_rte=1e-3 : no such key; did you mean trainer.learning_rate? ("),
        ("+trainer.foo=1", "trainer.foo"),
        ("model=llama7", "model=llama7 : no such option of the group model; did you mean llama7b? (allowed: "),
        ("model=null", "model=null : "),
        ("peft.r=abc", "peft.r=abc : allowed is an integer"),
        ("trainer.learning_rate=${nothing}", "trainer.learning_rate"),
        ("quant=nf4 peft=none", "quant=nf4 with peft=none : a quantised base cannot be trained itself"),
        ("data=from_file", "data.path=??? : a value must be given"),
        ("data.path=nowhere.jsonl", "there is no such file either (allowed: data=from_file data.path=nowhere.jsonl)"),
        ("data=from_file data.path=nowhere.jsonl", "data.path=nowhere.jsonl : no such file (allowed: a .jsonl, "),
        ("-m peft.r=8,abc", "peft.r=abc : allowed is an integer"),
        ("trane", "trane : neither a verb nor KEY=VALUE; did you mean train? (verbs: train, plan, inspect, resume, "),
        ("train trane", "trane : "),
        ("--confg job", "--confg"),
        ("--config-dir nowhere", "nowhere"),
        ("--config-name nope", "nope"),
        ("hydra.run.dri=x", "hydra.run.dri"),
        ("resume nowhere", "nowhere: no such run directory"),
        ("eval nowhere", "nowhere: no such run directory"),
        ("chat nowhere", "nowhere: no such run directory"),
        ("resume .", ".: not a run directory, it has no config.yaml"),
        ("eval .", ".: not a run directory, it has no config.yaml"),
        ("chat . --prompt hello", ".: not a run directory, it has no config.yaml"),
        ("resume", "RUN_DIR"),
        ("chat . --prompt x --max-new-tokens 0", "--max-new-tokens=0 : too small (allowed: 1 and more)"),
    ],
)
def test_refused_in_words_and_leaves_nothing_behind(cli: Cli, tmp_path: Path, words: str, said: str) -> None:
    assert said in refused(cli(*words.split()))
    assert listing(tmp_path) == []


def test_several_mistakes_are_told_at_once(cli: Cli, tmp_path: Path) -> None:
    told = refused(cli("trainer.learning_rte=1e-3", "model=llama7", "peft.r=abc"))
    assert "3 problems, nothing was started" in told
    assert all(
        word in told for word in ("\n  trainer.learning_rte=1e-3 : ", "\n  model=llama7 : ", "\n  peft.r=abc : ")
    )
    assert listing(tmp_path) == []


def test_hydras_own_flags_are_refused_under_our_name(cli: Cli) -> None:
    assert "__main__.py" not in refused(cli("--confg", "job"))


@pytest.mark.parametrize("where", [[], ["hydra.run.dir=out/run"]], ids=" ".join)
def test_bad_rows_are_told_with_file_and_row_and_leave_nothing_behind(
    main: Cli, tmp_path: Path, where: list[str]
) -> None:
    """Found after Hydra has made the run's directory, which must go again."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n{"prompt": "a", "completion": 3}\n')
    told = refused(main(*where, *TINY, "data=from_file", "data.path=rows.jsonl"))
    assert "rows.jsonl: row 2: columns prompt fit no format" in told
    assert "rows.jsonl: row 3: prompt is text and completion is int (allowed: " in told
    assert "data.on_bad_row=skip" in told
    assert listing(tmp_path) == ["rows.jsonl"]


def test_more_held_out_rows_than_there_are_is_refused(main: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    told = refused(main(*TINY, "data=from_file", "data.path=rows.jsonl", "data.eval_rows=3"))
    assert "data.eval_rows=3 : rows.jsonl has 3 rows, none would be left to train on (allowed: 0 to 2)" in told
    assert listing(tmp_path) == ["rows.jsonl"]
