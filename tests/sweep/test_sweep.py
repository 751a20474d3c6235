"""`-m` through the command line: what a sweep leaves behind, and how it goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli, online
from tests.fake_wandb import FakeWandb
from tests.test_run import check, read

pytestmark = pytest.mark.e2e

SHORT = [
    "model=tiny_llama", "trainer.max_steps=4", "trainer.logging_steps=1", "data.train_rows=40", "data.eval_rows=4",
    "evaluation.rows=0",
]  # fmt: skip
UNTRACKED = [*SHORT, "tracking=none"]
FOUR = ["peft=lora_r8,lora_r16", "trainer.learning_rate=1e-3,2e-3"]
DIVERGES = ["peft=lora_r8", "trainer.learning_rate=1e-3,1e30,2e-3", "trainer.max_grad_norm=0"]


def trials(tmp_path: Path, name: str = "s") -> dict[str, Path]:
    """The trials' directories by what each varies."""
    sweep = tmp_path / "outputs" / "sweeps" / name
    planned = read(sweep / "sweep.json")["trials"]
    return {" ".join(trial["overrides"]): sweep / directory for directory, trial in planned.items()}


def states(tmp_path: Path, name: str = "s") -> list[str]:
    return [read(t / "status.json")["state"] if t.exists() else "new" for t in trials(tmp_path, name).values()]


def times(folder: Path) -> dict[Path, int]:
    """When each file of a run was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_grid_is_one_group_and_the_same_command_repeats_nothing(
    cli: Cli, tmp_path: Path, wandb_server: FakeWandb
) -> None:
    words = ["-m", *SHORT, "sweep.name=s"]
    check(cli(*words, *FOUR, env=online(wandb_server)))
    assert states(tmp_path) == ["completed"] * 4
    runs = [run for run in wandb_server.runs.values() if run.job_type == "trial"]
    assert {run.group for run in runs} == {"s"}
    assert {run.name for run in runs} == {trial.name for trial in trials(tmp_path).values()}
    assert {tuple(run.tags) for run in runs} == {tuple(varied.split(" ")) for varied in trials(tmp_path)}
    assert {run.exit_code for run in runs} == {0}

    before = {name: times(trial) for name, trial in trials(tmp_path).items()}
    more = check(cli(*words, "peft=lora_r8,lora_r16", "trainer.learning_rate=1e-3,2e-3,3e-3", env=online(wandb_server)))
    assert "6 trials (2 to train, 4 done)" in more.stdout
    assert states(tmp_path) == ["completed"] * 6
    for name, written in before.items():
        assert times(trials(tmp_path)[name]) == written


def test_a_trial_is_the_run_that_it_would_be_alone(cli: Cli, main: Cli, tmp_path: Path) -> None:
    """Weights that trials share reach each of them unchanged, after one that trained them all."""
    check(cli("-m", *UNTRACKED, "sweep.name=s", "trainer.learning_rate=1e-3", "peft=none,lora_r8,lora_r16"))
    in_sweep = {name: trial / "adapter" for name, trial in trials(tmp_path).items()}
    for peft, file in (("lora_r16", "adapter_model.safetensors"), ("none", "model.safetensors")):
        alone = tmp_path / peft
        check(main(*UNTRACKED, f"peft={peft}", "trainer.learning_rate=1e-3", f"hydra.run.dir={alone}"))
        assert (in_sweep[f"peft={peft}"] / file).read_bytes() == (alone / "adapter" / file).read_bytes()


def test_doubled_trials_are_one(main: Cli, tmp_path: Path) -> None:
    result = check(main("-m", *UNTRACKED, "sweep.name=s", "peft.r=16,4,16", "sweep.dry_run=true"))
    assert "2 trials (2 to train, 0 done, 1 the same as another)" in result.stdout


def test_a_dry_run_tells_the_cost_and_leaves_nothing(main: Cli, tmp_path: Path) -> None:
    result = check(main("-m", *UNTRACKED, "sweep.name=s", *FOUR, "sweep.dry_run=true"))
    assert re.search(
        r"4 trials \(4 to train, 0 done\); 16 steps, about .* h of training .* MB of \d+ GB", result.stdout
    )
    assert list(tmp_path.iterdir()) == []


BAD = ["trainer.per_device_train_batch_size=4", "trainer.global_batch_size=8,10"]


def test_a_bad_trial_stops_the_sweep_before_it_starts(main: Cli, tmp_path: Path) -> None:
    result = check(main("-m", *UNTRACKED, "sweep.name=s", *BAD), code=2)
    assert "trainer.global_batch_size=10 : not a multiple" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_trials_that_contradict_themselves_only_together_are_found_too(main: Cli, tmp_path: Path) -> None:
    words = ["-m", *UNTRACKED, "sweep.name=s", "peft=lora_r8,none", "quant=none,nf4"]
    result = check(main(*words), code=2)
    assert "trial peft=none quant=nf4 : quant=nf4 with peft=none" in result.stderr
    assert "sweep.on_bad_trial=skip" in result.stderr
    assert list(tmp_path.iterdir()) == []
    skipped = check(main(*words, "sweep.on_bad_trial=skip"))
    assert "left out: peft=none quant=nf4: quant=nf4 with peft=none" in skipped.stdout
    assert states(tmp_path) == ["completed"] * 3
    (left_out,) = read(tmp_path / "outputs" / "sweeps" / "s" / "sweep.json")["left_out"]
    assert left_out["overrides"] == ["peft=none", "quant=nf4"]


def test_a_single_bad_value_is_left_out_when_told_to(main: Cli, tmp_path: Path) -> None:
    words = ["-m", *UNTRACKED, "sweep.name=s", "peft.r=8,0", "sweep.on_bad_trial=skip"]
    result = check(main(*words))
    assert "left out: peft.r=0: peft.r=0 : too small for LoRA" in result.stdout
    assert states(tmp_path) == ["completed"]
    typo = check(main(*words, "trainer.learning_rte=1"), code=2)
    assert "did you mean trainer.learning_rate?" in typo.stderr


def test_what_only_the_data_shows_stops_the_sweep_too(main: Cli, tmp_path: Path) -> None:
    """With 16 tokens a row none is left to train on."""
    result = check(main("-m", *UNTRACKED, "sweep.name=s", "trainer.max_length=1024,16"), code=2)
    assert "trial trainer.max_length=16 : " in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("isolate", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_trial_that_fails_leaves_the_others_alone(
    cli: Cli, tmp_path: Path, wandb_server: FakeWandb, isolate: str
) -> None:
    words = ["-m", *SHORT, "sweep.name=s", *DIVERGES, f"sweep.isolate={isolate}"]
    result = check(cli(*words, env=online(wandb_server)), code=1)
    assert states(tmp_path) == ["completed", "failed", "completed"]
    failed = trials(tmp_path)["trainer.learning_rate=1e+30"]
    assert f"{failed.name} failed: loss is nan" in result.stdout
    assert "1 of 3 trials failed" in result.stderr
    assert read(failed / "status.json")["error"] in (failed / "train.log").read_text()
    runs = {run.name: run.exit_code == 0 for run in wandb_server.runs.values() if run.job_type == "trial"}
    assert runs == {t.name: t != failed for t in trials(tmp_path).values()}


def begun(words: list[str], cwd: Path, shown: str) -> subprocess.Popen[str]:
    """A command that has shown a line which matches `shown`, and goes on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_lab", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(shown, line):
            return process
    raise AssertionError(f"ended without {shown}")


def test_a_sweep_on_other_data_is_refused(main: Cli, tmp_path: Path) -> None:
    """The finished trial would count for what it no longer is."""
    rows = [f'{{"prompt": "say {n}", "completion": "{n}"}}\n' for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    words = [
        "-m", "model=tiny_llama", "data=from_file", f"data.path={data}", "data.eval_rows=4", "trainer.max_steps=2",
        "evaluation.rows=0", "tracking=none", "sweep.name=s",
    ]  # fmt: skip
    check(main(*words, "peft=lora_r8"))
    data.write_text("".join(rows[::-1]))
    result = check(main(*words, "peft=lora_r8,lora_r16"), code=2)
    assert "holds a run on data that has changed since" in result.stderr


def test_trials_through_a_launcher(cli: Cli, main: Cli, tmp_path: Path) -> None:
    """Two processes of joblib train what was planned; of what the same command finds, one is still to be trained."""
    words = ["-m", *UNTRACKED, "sweep.name=s", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *DIVERGES]
    result = check(cli(*words), code=1)
    assert "1 of 3 trials failed" in result.stderr
    assert states(tmp_path) == ["completed", "failed", "completed"]
    again = check(main(*words, "sweep.dry_run=true"))
    assert "3 trials (1 to train, 2 done)" in again.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sweep.objective=train_loss"], "sweep.objective=train_loss : falls the more"),
        (["sweep.objective=exact_mach"], "did you mean exact_match?"),
        (["sweep.direction=up"], "sweep.direction=up : not allowed"),
        (["sweep.on_bad_trial=ignore"], "sweep.on_bad_trial=ignore : not allowed"),
        (["sweep.nam=x"], "did you mean sweep.name?"),
        (["trainer.learning_rate=interval(1e-5,1e-3)"], "a grid needs single values"),
        (["sweep.name=../x"], "sweep.name=../x : not the name of a directory"),
        (["sweep.name="], "sweep.name= : not the name of a directory"),
        (["sweep.objective=eval_loss,exact_match"], "is of the whole sweep (allowed: one value)"),
        (["data.eval_rows=0"], "no rows are held out to measure it on"),
    ],
)
def test_wrong_settings_of_a_sweep(main: Cli, tmp_path: Path, words: list[str], told: str) -> None:
    result = check(main("-m", *UNTRACKED, "evaluation.rows=4", "peft=lora_r8,lora_r16", *words), code=2)
    assert told in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_a_trial_is_kept_in_memory(tmp_path: Path) -> None:
    """Two that finish and one that fails: afterwards the process holds no model, no trainer and no optimizer."""
    program = (
        "import gc, sys, torch, trl, transformers\n"
        "from sft_lab.__main__ import main\n"
        "print(main(sys.argv[1:]))\n"
        "gc.collect()\n"
        "kinds = (transformers.PreTrainedModel, trl.SFTTrainer, torch.optim.Optimizer)\n"
        "print('left:', [type(o).__name__ for o in gc.get_objects() if isinstance(o, kinds)])\n"
    )
    words = ["-m", *UNTRACKED, "sweep.name=s", *DIVERGES]
    result = check(
        subprocess.run(
            [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    )
    assert result.stdout.splitlines()[-1] == "left: []", result.stdout[-2000:]
    assert states(tmp_path) == ["completed", "failed", "completed"]


@pytest.mark.parametrize(
    ("words", "varied"),
    [
        ("peft=glob(lora_r?)", ["peft=lora_r8"]),
        ("peft=choice(lora_r8,none)", ["peft=lora_r8", "peft=none"]),
        ("peft.r=range(2,9,3)", ["peft.r=2", "peft.r=5", "peft.r=8"]),
        ("peft={r:2,lora_alpha:4},{r:4,lora_alpha:8}", ["peft={r:2,lora_alpha:4}", "peft={r:4,lora_alpha:8}"]),
        ("trainer.packing=true,false", ["trainer.packing=True", "trainer.packing=False"]),
        (
            "peft.target_modules=[q_proj],[q_proj,v_proj]",
            ["peft.target_modules=[q_proj]", "peft.target_modules=[q_proj,v_proj]"],
        ),
    ],
)
def test_every_way_to_write_values(main: Cli, words: str, varied: list[str]) -> None:
    result = check(main("-m", *UNTRACKED, "sweep.name=s", words, "sweep.dry_run=true"))
    table = [line.split("  ")[0] for line in result.stdout.splitlines()[1:-1]]
    assert table == varied
