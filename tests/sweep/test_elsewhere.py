"""Sweeps whose trials train on other machines: what plans them asks nothing of the machine that it is on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from sft_lab.sweep import trial
from sft_lab.sweep.ledger import SweepDirectory
from sft_lab.sweep.sweepers import GridSweeper
from tests.conftest import Cli
from tests.sweep.test_sweep import UNTRACKED, trials
from tests.test_run import check

SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
WORDS = ["-m", *UNTRACKED, "sweep.name=s", "peft=lora_r8"]
SLURM = [*WORDS, "hydra/launcher=slurm"]
OPEN = ["distributed=ddp", "distributed.num_processes=0", "trainer.per_device_train_batch_size=1"]
needs_submitit = pytest.mark.skipif(
    f"{SUBMITIT}.SlurmLauncher" not in Plugins.instance().class_name_to_class, reason="submitit is not installed"
)


def gpus(patch: pytest.MonkeyPatch, number: int) -> None:
    """This machine has so many."""
    patch.setattr(torch.cuda, "is_available", lambda: number > 0)
    patch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are handed over to a Slurm that never begins them."""
    from sft_lab.sweep.slurm import SlurmLauncher

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(SlurmLauncher, "launch", lambda *_, **__: [])


ASKS: dict[str, tuple[list[str], str]] = {
    "fsdp2": (["distributed=fsdp2", "distributed.num_processes=2"], "on a CPU Accelerate trains as DDP does"),
    "fsdp1": (["distributed=fsdp1", "distributed.num_processes=2"], "does not run on a CPU"),
    "fp16": (["trainer.precision=fp16"], "needs a GPU"),
    "context parallelism": (
        ["distributed=fsdp2", "distributed.num_processes=2", "distributed.context_parallel_size=2"],
        "its attention runs on GPUs alone",
    ),
}  # fmt: skip


@needs_submitit
@pytest.mark.parametrize("launcher", ["slurm", "submitit_slurm"])
@pytest.mark.parametrize("asked", ASKS)
def test_a_machine_without_gpus_plans_trials_that_need_them(
    main: Cli, monkeypatch: pytest.MonkeyPatch, asked: str, launcher: str
) -> None:
    gpus(monkeypatch, 0)
    words, said = ASKS[asked]
    planned = check(main(*WORDS, *words, f"hydra/launcher={launcher}", "sweep.dry_run=true"))
    assert "1 trials (1 to train, 0 done); 4 steps" in planned.stdout
    assert "h of training" not in planned.stdout  # how fast they are, nobody knows here
    assert said in check(main(*WORDS, *words, "hydra/launcher=local", "sweep.dry_run=true"), code=2).stderr


@needs_submitit
def test_attention_that_is_not_here_may_be_there(main: Cli) -> None:
    words = ["model.attn_implementation=flash_attention_2", "trainer.packing=true", "sweep.dry_run=true"]
    check(main(*SLURM, *words))


@needs_submitit
def test_a_search_asks_nothing_of_this_machine_either(main: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    words = ["hydra/sweeper=optuna", "peft.r=choice(4,8)", "trainer.precision=fp16", "sweep.dry_run=true"]
    planned = check(main(*SLURM, *words))
    assert "h of training" not in planned.stdout


@needs_submitit
def test_ranks_of_several_nodes_need_no_gpus_of_the_machine_that_submits(
    main: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 8)
    words = ["distributed=ddp", "distributed.num_processes=16", "trainer.per_device_train_batch_size=1"]
    check(main(*SLURM, *words, "hydra.launcher.nodes=2", "sweep.dry_run=true"))
    here = check(main(*WORDS, *words, "sweep.dry_run=true"), code=2)
    assert "distributed.num_processes=16 : needs 16 GPUs here, 8 are visible" in here.stderr


@needs_submitit
@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize(
    ("settings", "ranks"),
    [("nodes=2 gpus_per_node=8", 16), ("gpus_per_node=4", 4), ("nodes=2 tasks_per_node=8", 16)],
)
def test_the_launcher_says_how_many_processes_there_are(
    main: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, ranks: int
) -> None:
    """The same trial, whichever machine plans it, of as many rows a step as were asked for."""
    words = [
        *SLURM,
        *OPEN,
        "trainer.global_batch_size=32",
        *(f"hydra.launcher.{setting}" for setting in settings.split()),
    ]
    for here in (0, 2, 8):
        gpus(monkeypatch, here)
        check(main(*words), code=1)
        ((_, directory),) = trials(tmp_path).items()
        config = yaml.safe_load((directory.parent / "planned" / f"{directory.name}.yaml").read_text())
        assert config["distributed"]["num_processes"] == ranks
        assert config["trainer"]["global_batch_size"] == 32
        assert config["trainer"]["gradient_accumulation_steps"] == 32 // ranks


@needs_submitit
def test_processes_that_nobody_counts_are_refused(main: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    refused = check(main(*SLURM, *OPEN, "sweep.dry_run=true"), code=2)
    assert (
        "distributed.num_processes=0 : is one a GPU where trials train, and hydra/launcher=slurm does not say how many "
        "those are (allowed: distributed.num_processes=N, hydra.launcher.gpus_per_node=N)"
    ) in refused.stderr
    assert list(tmp_path.iterdir()) == []


@needs_submitit
@pytest.mark.usefixtures("submitted")
def test_the_machine_is_asked_where_a_trial_runs(main: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert "1 of 1 are not done yet" in check(main(*SLURM, "trainer.precision=fp16"), code=1).stderr
    ((_, directory),) = trials(tmp_path).items()
    outcome = trial.run(SweepDirectory(directory.parent), directory.name)
    assert outcome.state == "failed"
    assert "trainer.precision=fp16 : needs a GPU" in outcome.error


@pytest.mark.parametrize(
    ("launcher", "elsewhere"),
    [
        ({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}, False),
        ({"_target_": f"{SUBMITIT}.LocalLauncher", "gpus_per_node": 1}, False),
        ({"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}, False),
        ({"_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", "ray": {"init": {}}}, False),
        (
            {"_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", "ray": {"init": {"address": "auto"}}},
            True,
        ),
        ({"_target_": "hydra_plugins.hydra_ray_launcher.ray_aws_launcher.RayAWSLauncher", "ray": {"init": {}}}, True),
        ({"_target_": "hydra_plugins.hydra_rq_launcher.rq_launcher.RQLauncher"}, True),
    ],
)  # fmt: skip
def test_which_launchers_have_other_machines_train(
    monkeypatch: pytest.MonkeyPatch, launcher: dict[str, object], elsewhere: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sweeper = GridSweeper()
    sweeper.config = OmegaConf.create({"hydra": {"launcher": launcher}})
    assert sweeper.elsewhere is elsewhere
