"""Optuna as the sweeper: it finds what is better, and forgets nothing when it is killed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.conftest import Cli
from tests.sweep.test_sweep import UNTRACKED, begun, states, trials
from tests.test_run import check, lines, read

pytestmark = pytest.mark.e2e

SEARCH = ["-m", *UNTRACKED, "sweep.name=s", "hydra/sweeper=optuna"]
RATE = "trainer.learning_rate=tag(log,interval(1e-5,1e-1))"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_of(tmp_path: Path) -> optuna.Study:
    journal = JournalFileBackend(str(tmp_path / "outputs" / "sweeps" / "s" / "study.log"))
    return optuna.load_study(study_name="s", storage=JournalStorage(journal))


def told(study: optuna.Study) -> list[tuple[TrialState, dict[str, Any]]]:
    return [(trial.state, trial.params) for trial in study.trials]


def test_n_trials_is_a_target_and_a_second_run_goes_on(main: Cli, tmp_path: Path) -> None:
    pairs = "peft={r:4,lora_alpha:8},{r:8,lora_alpha:32}"  # values that move together
    check(main(*SEARCH, RATE, pairs, "hydra.sweeper.n_trials=3"))
    first = told(study_of(tmp_path))
    assert [state for state, _ in first] == [TrialState.COMPLETE] * 3
    assert states(tmp_path) == ["completed"] * 3
    for trial in trials(tmp_path).values():
        peft = read(trial / "preflight.json")["config"]["peft"]
        assert (peft["r"], peft["lora_alpha"]) in ((4, 8), (8, 32))
    done = check(main(*SEARCH, RATE, pairs, "hydra.sweeper.n_trials=3"))
    assert "3 trials (0 to train)" in done.stdout
    check(main(*SEARCH, RATE, pairs, "hydra.sweeper.n_trials=5"))
    second = told(study_of(tmp_path))
    assert second[:3] == first
    assert len({str(params) for _, params in second}) == 5  # seeded alike in both processes, it would repeat itself
    for trial in study_of(tmp_path).trials:
        value = read(list(trials(tmp_path).values())[trial.number] / "result.json")["metrics"]["eval_loss"]
        assert trial.value == value


def test_a_killed_search_asks_for_the_killed_trial_again(cli: Cli, tmp_path: Path) -> None:
    words = [*SEARCH, RATE, "hydra.sweeper.n_trials=3", "trainer.max_steps=60", "trainer.save_steps=10"]
    process = begun(words, tmp_path, "trial 2/3")
    assert process.stdout is not None
    next(line for line in process.stdout if re.match(r"step 3\d/", line))
    process.kill()
    process.communicate()
    assert [state for state, _ in told(study_of(tmp_path))] == [TrialState.COMPLETE, TrialState.RUNNING]
    again = check(cli(*words))
    assert "going on from step" in again.stdout
    assert states(tmp_path) == ["completed"] * 3
    ended = study_of(tmp_path).trials
    assert [trial.state for trial in ended] == [TrialState.COMPLETE, TrialState.FAIL, *[TrialState.COMPLETE] * 2]
    assert ended[2].params == ended[1].params


def test_a_failure_is_told_and_tried_again_by_the_next_run(main: Cli, tmp_path: Path) -> None:
    words = [*SEARCH, "hydra.sweeper.sampler=grid", "trainer.learning_rate=1e-3,1e30", "trainer.max_grad_norm=0"]
    result = check(main(*words), code=1)
    assert "1 of 2 trials failed" in result.stderr
    assert {state for state, _ in told(study_of(tmp_path))} == {TrialState.COMPLETE, TrialState.FAIL}
    again = check(main(*words), code=1)
    assert "trainer.learning_rate=1e+30" in again.stdout
    assert "trainer.learning_rate=0.001" not in again.stdout
    assert len(study_of(tmp_path).trials) == 3


def test_a_search_takes_no_new_choices(main: Cli, tmp_path: Path) -> None:
    check(main(*SEARCH, "peft=lora_r8,lora_r16", "hydra.sweeper.n_trials=1"))
    result = check(main(*SEARCH, "peft=lora_r8,lora_r16,lora_r64", "hydra.sweeper.n_trials=2"), code=2)
    assert "peft : this search was begun with lora_r8, lora_r16, and knows no others" in result.stderr


def test_a_trial_that_outlived_its_sweep_trains_on(main: Cli, tmp_path: Path) -> None:
    """Its process is the one of an isolated trial, whose sweep was killed: typed again, the command leaves it alone."""
    words = [*SEARCH, RATE, "hydra.sweeper.n_trials=1", "sweep.isolate=true", "trainer.max_steps=100000"]
    process = begun(words, tmp_path, "step 3/")
    (trial,) = psutil.Process(process.pid).children()
    process.kill()
    try:
        again = check(main(*words), code=1)
        assert "1 of 1 are not done yet" in again.stderr
        assert "trial " not in again.stdout.split("search s:")[1].split("report:")[0].replace("trials", "")
        assert trial.is_running()
        assert states(tmp_path) == ["running"]
        assert [state for state, _ in told(study_of(tmp_path))] == [TrialState.RUNNING]
    finally:
        trial.kill()
        process.communicate()


@pytest.mark.parametrize("pruner", ["median", pytest.param("successive_halving", marks=pytest.mark.slow)])
def test_hopeless_trials_are_stopped_early(main: Cli, tmp_path: Path, pruner: str) -> None:
    """Rates from sensible to hopeless, the sensible ones first."""
    rates = "trainer.learning_rate=2e-2,1.5e-2,1e-2,2.5e-2,1e-6,2e-6,3e-6,4e-6"
    words = [
        *SEARCH, rates, "hydra.sweeper.sampler=grid", f"hydra.sweeper.pruner={pruner}", "trainer.max_steps=16",
        "trainer.eval_steps=2", "trainer.lr_scheduler_type=constant", "hydra.sweeper.n_trials=8", "hydra.sweeper.seed=5",
    ]  # fmt: skip
    check(main(*words))
    found = {name: read(trial / "status.json") for name, trial in trials(tmp_path).items()}
    pruned = {name: status["pruned_at_step"] for name, status in found.items() if status.get("pruned_at_step")}
    assert pruned
    assert max(pruned.values()) < 16
    states_told = {trial.params["trainer.learning_rate"]: trial.state for trial in study_of(tmp_path).trials}
    for name, status in found.items():
        rate = name.split("=")[1]
        assert (states_told[rate] == TrialState.PRUNED) == (name in pruned)
        directory = trials(tmp_path)[name]
        trained = [event["step"] for event in lines(directory / "metrics.jsonl") if event["split"] == "train"]
        assert max(trained) == pruned.get(name, 16)
        assert (directory / "adapter").exists() == (name not in pruned)
        if name in pruned:
            assert status["state"] == "interrupted"
            assert "is behind other trials" in status["error"]
    again = check(main(*words))
    assert "trial " not in again.stdout.split("search s:")[1].split("\n", 1)[1].split("best")[0]


@pytest.mark.parametrize("sampler", ["cmaes", pytest.param("random", marks=pytest.mark.slow)])
def test_other_samplers_and_a_database(main: Cli, tmp_path: Path, sampler: str) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    words = [
        *SEARCH, RATE, "peft.r=range(2,9,2)", f"hydra.sweeper.sampler={sampler}", f"hydra.sweeper.storage={storage}",
    ]  # fmt: skip
    check(main(*words, "hydra.sweeper.n_trials=2"))
    check(main(*words, "hydra.sweeper.n_trials=3"))
    study = optuna.load_study(study_name="s", storage=storage)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert {trial.params["peft.r"] for trial in study.trials} <= {2, 4, 6, 8}
    assert len({trial.params["trainer.learning_rate"] for trial in study.trials}) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hydra.sweeper.sampler=tep", RATE], "hydra.sweeper.sampler=tep : not allowed; did you mean tpe?"),
        (["hydra.sweeper.pruner=median", RATE], "with trainer.eval_steps=0 nothing is measured during training"),
        (["hydra.sweeper.sampler=grid", RATE], "sampler=grid needs single values"),
        (["hydra.sweeper.sampler=cmaes", "peft=lora_r8,lora_r16"], "there are only choices"),
        (["hydra.sweeper.n_trials=0", RATE], "hydra.sweeper.n_trials=0 : not allowed (allowed: 1, 2, ...)"),
        (["data.eval_rows=0", RATE], "no rows are held out"),
        (
            ["trainer.learning_rate=tag(log,interval(0,1e-1))"],
            "not an interval (allowed: interval(LOW, HIGH), both above 0",
        ),
        (["trainer.learning_rate=interval(1e-1,1e-2)"], "not an interval"),
        (["hydra.sweeper.seed=abc", RATE], "hydra.sweeper.seed=abc : not allowed"),
        (["peft=lora_r8,none", "quant=none,nf4"], "trial peft=none quant=nf4 : quant=nf4 with peft=none"),
        (["sweep.objective=train_loss", RATE], "sweep.objective=train_loss"),
        (["trainer.learning_rte=interval(1e-5,1e-3)"], "did you mean trainer.learning_rate?"),
        (["trainer.learning_rate=interval(-1,1e-3)"], "trainer.learning_rate=-1.0 : too small"),
        ([], "nothing varies"),
    ],
)
def test_wrong_searches(main: Cli, tmp_path: Path, words: list[str], told: str) -> None:
    result = check(main(*SEARCH, *words), code=2)
    assert told in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_finds_a_better_learning_rate_than_the_default(cli: Cli, tmp_path: Path) -> None:
    """In twelve short trials on the embedded data, most of them stopped before their end."""
    short = ["model=tiny_llama", "tracking=none", "trainer.max_steps=24", "data.train_rows=200", "data.eval_rows=32", "evaluation.rows=0"]  # fmt: skip
    check(cli(*short, f"hydra.run.dir={tmp_path / 'default'}"))
    search = [
        "-m", *short, "sweep.name=s", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=12", "hydra.sweeper.pruner=median",
        "trainer.eval_steps=4", RATE,
    ]  # fmt: skip
    check(cli(*search))
    study = study_of(tmp_path)
    assert len(study.trials) == 12
    default = read(tmp_path / "default" / "result.json")["metrics"]["eval_loss"]
    assert study.best_value < default - 0.1  # seeds differ by some 0.01
    steps = [read(trial / "status.json")["step"] for trial in trials(tmp_path).values()]
    assert sum(steps) < 12 * 24
    print(f"default {default:.4f}, best {study.best_value:.4f} at {study.best_params}; {sum(steps)} of {12 * 24} steps")
