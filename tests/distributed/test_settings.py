"""What `distributed` makes of its keys, where no rank is needed to see it."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sft_lab import config as configs
from sft_lab import distributed, outside
from sft_lab.errors import ConfigError, RunError
from sft_lab.meetings import Meeting
from sft_lab.schema import DistributedConfig

ZERO = ["model=tiny_llama", "distributed=deepspeed_zero2", "distributed.num_processes=2"]


def test_deepspeeds_own_settings_are_merged_into_ours() -> None:
    words = [
        "distributed.deepspeed.zero_optimization.overlap_comm=true",
        "distributed.deepspeed.wall_clock_breakdown=true",
    ]
    made = distributed.arguments(configs.to_config(configs.compose([*ZERO, *words])))["deepspeed"]
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert made["wall_clock_breakdown"] is True
    assert made["gradient_clipping"] == "auto"


def test_ranks_that_others_started_are_not_ours_to_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"max_restarts=3 : torchrun started the ranks"):
        outside.require_room(DistributedConfig(method="ddp", num_processes=2, max_restarts=3))


def test_jobs_that_follow_each_other_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do the steps of each. A step takes two: where its processes meet, and the next for the ranks of its nodes."""
    settings = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "localhost",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    taken: set[int] = set()
    for job, step in itertools.product(range(77, 177), range(10)):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        group = outside.group()
        assert group is not None
        assert not taken & {group.port, group.port + 1}
        taken |= {group.port, group.port + 1}


def test_those_alive_meet_whatever_the_dead_have_left() -> None:
    """A process that came and died is replaced, and so is the first one, whose last word is still there."""
    from torch.distributed import HashStore

    store = HashStore()

    def came(index: int) -> Meeting:
        return Meeting(outside.Group(index, 3, index, "torchrun", "", 0), store)

    dead = [came(index) for index in range(3)]
    assert dead[0].earlier_run() == ""
    with ThreadPoolExecutor(3) as pool:
        told = [pool.submit(one.told) for one in dead[1:]]
        dead[0].send_to_run("runs/a", 1, 1)
        assert [one.result(timeout=30) for one in told] == [{"run": "runs/a", "each": 1}] * 2
        first, second = came(0), came(1)
        assert first.earlier_run() == "runs/a"
        early = [pool.submit(second.told), pool.submit(first.send_to_run, "runs/a", 2, 1)]
        time.sleep(0.3)
        assert not any(one.done() for one in early)  # the third that is named there answers no more
        assert came(2).told() == {"run": "runs/a", "each": 2}
        assert early[0].result(timeout=30) == {"run": "runs/a", "each": 2}


def test_who_does_not_come_is_not_waited_for_forever() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    two = [Meeting(outside.Group(index, 3, index, "torchrun", "", 0), store) for index in (0, 1)]
    for one in two:
        with pytest.raises(RunError, match="not all of 3 processes have come within"):
            one.ranks(0.002)


def test_what_one_cannot_do_all_are_told() -> None:
    """A machine that cannot get the model, say: none of the others waits for it."""
    from torch.distributed import HashStore

    store = HashStore()
    met = [Meeting(outside.Group(index, 3, index, "torchrun", "", 0), store) for index in range(3)]
    with ThreadPoolExecutor(3) as pool:
        ready = [pool.submit(one.all_ready, problem) for one, problem in zip(met, ("", "b: no room", ""), strict=True)]
        assert [str(one.exception(timeout=30)) for one in ready] == ["b: no room"] * 3
