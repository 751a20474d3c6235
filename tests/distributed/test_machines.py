"""Which machine serves which ranks: those started from outside, on machines of several GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_lab import config as configs
from sft_lab import distributed, outside
from sft_lab.errors import ConfigError
from sft_lab.schema import Config

SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "MASTER_ADDR": "localhost"}


def torchrun(nodes: int, each: int, index: int = 0) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(index), "WORLD_SIZE": str(nodes * each), "LOCAL_RANK": str(index % each), "LOCAL_WORLD_SIZE": str(each),
    }  # fmt: skip


def slurm(nodes: int, each: int, index: int = 0) -> dict[str, str]:
    """What srun tells a task."""
    return SLURM | {
        "SLURM_STEP_NUM_TASKS": str(nodes * each), "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index % each),
    }  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is started by nobody, until a test says otherwise."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def here(machine: pytest.MonkeyPatch, gpus: int, started: dict[str, str]) -> None:
    """This process sees so many GPUs, and was started so."""
    import torch

    machine.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    machine.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in started.items():
        machine.setenv(name, value)


def of(num_processes: int) -> Config:
    words = ["model=tiny_llama", "distributed=ddp", f"distributed.num_processes={num_processes}"]
    return configs.to_config(configs.compose(words))


@pytest.mark.parametrize(
    ("gpus", "started", "ranks"),
    [
        pytest.param(8, torchrun(2, 8), 16, id="torchrun on two machines"),
        pytest.param(8, slurm(1, 8), 8, id="tasks that see all GPUs of their node"),
        pytest.param(1, slurm(1, 8), 8, id="tasks that see one GPU each"),
        pytest.param(1, slurm(2, 8), 16, id="such tasks on two nodes"),
        pytest.param(8, slurm(2, 8), 16, id="tasks on two nodes that see all GPUs of theirs"),
        pytest.param(8, slurm(2, 1), 16, id="a task a node, which starts a rank a GPU"),
        pytest.param(1, slurm(2, 1), 2, id="a task a node of one GPU"),
        pytest.param(0, slurm(2, 4), 8, id="tasks on CPUs"),
        pytest.param(4, {}, 4, id="a command alone"),
    ],
)
def test_ranks_that_have_a_gpu_each_are_let_in(
    machine: pytest.MonkeyPatch, gpus: int, started: dict[str, str], ranks: int
) -> None:
    """And are what distributed.num_processes=0 comes to."""
    here(machine, gpus, started)
    config = of(0)
    assert config.distributed.num_processes == ranks
    outside.require_room(config.distributed)
    distributed.require_machine(config)


@pytest.mark.parametrize(
    ("gpus", "started", "ranks", "needed"),
    [
        pytest.param(4, torchrun(2, 8), 16, 8, id="torchrun on two machines"),
        pytest.param(1, torchrun(1, 2), 2, 2, id="torchrun on a machine of one GPU"),
        pytest.param(4, slurm(2, 8), 16, 8, id="tasks that see half as many GPUs"),
        pytest.param(4, slurm(2, 1), 16, 8, id="a task a node, which starts more ranks than it has GPUs"),
        pytest.param(4, {}, 8, 8, id="a command alone"),
    ],
)
def test_ranks_without_a_gpu_each_are_refused(
    machine: pytest.MonkeyPatch, gpus: int, started: dict[str, str], ranks: int, needed: int
) -> None:
    here(machine, gpus, started)
    said = rf"^distributed\.num_processes={ranks} : needs {needed} GPUs here, {gpus} are visible"
    with pytest.raises(ConfigError, match=said):
        distributed.require_machine(of(ranks))


@pytest.mark.parametrize(
    ("gpus", "started", "device"),
    [
        pytest.param(8, torchrun(2, 8, index=11), 3, id="torchrun"),
        pytest.param(8, slurm(2, 8, index=11), 3, id="tasks that see all GPUs of their node"),
        pytest.param(1, slurm(2, 8, index=11), 0, id="tasks that see one GPU each"),
        pytest.param(0, slurm(2, 8, index=11), 3, id="tasks on CPUs"),
    ],
)
def test_a_rank_takes_a_gpu_that_it_sees(
    machine: pytest.MonkeyPatch, gpus: int, started: dict[str, str], device: int
) -> None:
    here(machine, gpus, started)
    group = outside.group()
    assert group is not None
    assert group.as_rank()["LOCAL_RANK"] == str(device)


def test_a_step_whose_nodes_nobody_can_name_is_refused(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a container Slurm's commands are often missing."""
    here(machine, 0, {**slurm(2, 1), "PATH": str(tmp_path)})
    machine.delenv("MASTER_ADDR")
    told = r"MASTER_ADDR : is not set, .*'scontrol' \(allowed: its name or address\)"
    with pytest.raises(ConfigError, match=told):
        outside.group()
