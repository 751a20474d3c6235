"""What `distributed` makes of its keys, where no rank is needed to see it."""

from __future__ import annotations

import pytest

from sft_lab import config as configs
from sft_lab import distributed, outside
from sft_lab.errors import ConfigError

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
        outside.require_room("ddp", 2, 3)


def test_jobs_that_follow_each_other_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job takes two: where its processes meet, and the next for the ranks of its nodes."""
    settings = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_ID": "0", "MASTER_ADDR": "localhost",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    taken: set[int] = set()
    for job in (77, 78, 79):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        group = outside.group()
        assert group is not None
        assert not taken & {group.port, group.port + 1}
        taken |= {group.port, group.port + 1}
