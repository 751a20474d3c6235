"""What `distributed` makes of its keys, where no rank is needed to see it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_lab import config as configs
from sft_lab import distributed, meetings, outside, ranks
from sft_lab.callbacks import Saving, Stop
from sft_lab.errors import ConfigError, Interrupted, RunError
from sft_lab.meetings import Meeting
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config, DistributedConfig


def composed(method: str, *words: str, processes: int = 4) -> Config:
    keys = [f"distributed.{word}" for word in words]
    count = f"distributed.num_processes={processes}"
    return configs.to_config(configs.compose(["model=tiny_llama", f"distributed={method}", count, *keys]))


# Keys as they are set, and what `arguments` gives: its keys, joined by dots, with their values; None for none.
FSDP, ZERO = "fsdp_config", "deepspeed.zero_optimization"
TOLD = [
    ("ddp", ["timeout_min=7"], {"ddp_timeout": 420, "ddp_find_unused_parameters": False}),
    ("fsdp1", ["reshard_after_forward=true"], {f"{FSDP}.reshard_after_forward": "full_shard"}),
    ("fsdp1", ["reshard_after_forward=false"], {f"{FSDP}.reshard_after_forward": "shard_grad_op"}),
    ("fsdp2", ["reshard_after_forward=true"], {f"{FSDP}.reshard_after_forward": True}),
    ("fsdp2", ["reshard_after_forward=false"], {f"{FSDP}.reshard_after_forward": False}),
    *(
        (
            method,
            [f"cpu_offload={offload}", f"state_dict_type={kind}", "timeout_min=7"],
            {
                "ddp_timeout": 420, "fsdp": True, f"{FSDP}.version": int(method[-1]), f"{FSDP}.cpu_offload": offload,
                f"{FSDP}.state_dict_type": kind,
            },
        )
        for method in ("fsdp1", "fsdp2")
        for offload, kind in ((True, "FULL_STATE_DICT"), (False, "SHARDED_STATE_DICT"))
    ),
    ("fsdp2", ["shard_size=4"], {"parallelism_config": None}),
    ("fsdp2", ["shard_size=2"], {"parallelism_config": (2, 2, 1)}),
    ("fsdp2", ["context_parallel_size=2"], {"parallelism_config": (1, 2, 2)}),
    ("fsdp2", ["context_parallel_size=4"], {"parallelism_config": (1, 1, 4)}),
    *(
        (
            f"deepspeed_zero{stage}",
            ["timeout_min=7", f"offload_optimizer={offload}", "deepspeed.wall_clock_breakdown=true"],
            {
                "ddp_timeout": 420, f"{ZERO}.stage": stage, "deepspeed.wall_clock_breakdown": True,
                f"{ZERO}.offload_optimizer": {"device": "cpu"} if offload else None, f"{ZERO}.offload_param": None,
            },
        )
        for stage in (1, 2, 3)
        for offload in (True, False)
    ),
    ("deepspeed_zero3", ["offload_param=true"], {f"{ZERO}.offload_param": {"device": "cpu"}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "words", "wanted"), TOLD, ids=[" ".join([method, *words]) for method, words, _ in TOLD]
)
def test_every_key_reaches_what_training_is_told(method: str, words: list[str], wanted: dict[str, Any]) -> None:
    made = distributed.arguments(composed(method, *words))
    found = {place: _at(made, place) for place in wanted}
    if parallel := found.get("parallelism_config"):
        found["parallelism_config"] = (parallel.dp_replicate_size, parallel.dp_shard_size, parallel.cp_size)
    assert found == wanted


def _at(made: dict[str, Any], place: str) -> Any:
    value: Any = made
    for key in place.split("."):
        value = value.get(key) if value else None
    return value


def test_no_key_is_missing_above() -> None:
    elsewhere = {"method", "num_processes", "max_restarts"}  # of who starts the ranks
    above = {word.split("=")[0].split(".")[0] for _, words, _ in TOLD for word in words}
    assert above | elsewhere == {field.name for field in dataclasses.fields(DistributedConfig)}


@pytest.mark.parametrize(
    ("word", "multiple"),
    [("context_parallel_size=1", 1), ("context_parallel_size=2", 4), ("context_parallel_size=4", 8)],
)
def test_context_parallelism_takes_two_pieces_of_a_row_a_rank(word: str, multiple: int) -> None:
    assert distributed.row_multiple(composed("fsdp2", word)) == multiple


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("ddp", "the model is a Linear"),
        ("fsdp1", "0 modules are sharded"),
        ("fsdp2", "0 of 2 parameters are sharded"),
        *((f"deepspeed_zero{stage}", "the model is a Linear of ZeRO stage 0") for stage in (1, 2, 3)),
    ],
)
def test_a_model_that_nothing_has_wrapped_is_not_what_was_asked_for(method: str, said: str) -> None:
    from torch.nn import Linear

    with pytest.raises(RunError, match=f"distributed={method} : is not what runs: {said}"):
        distributed.prove(composed(method), SimpleNamespace(model_wrapped=Linear(4, 4)))


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """This process as the first of eight that never talk: enough to lay out a mesh and cut weights over it."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Slicing a flattened dim:UserWarning")  # Accelerate's
@pytest.mark.parametrize(
    ("words", "over"),
    [
        ([], 8),
        (["shard_size=2"], 2),
        (["shard_size=4"], 4),
        (["context_parallel_size=2"], 8),
        (["context_parallel_size=8"], 8),
        (["context_parallel_size=2", "shard_size=2"], 4),
    ],
)
def test_the_ranks_that_share_the_weights_are_counted_on_the_mesh(
    words: list[str], over: int, eight_ranks: None
) -> None:
    """Meshes as Accelerate makes them of our settings, where the dimension that is cut may be one of several, or two."""
    from accelerate.parallelism_config import ParallelismConfig
    from torch.distributed.fsdp import fully_shard
    from torch.nn import Linear

    def proof(words: list[str]) -> str:
        return distributed._prove_fsdp2(composed("fsdp2", *words, processes=8), trainer)

    made = distributed.arguments(composed("fsdp2", *words, processes=8))
    parallel = made.get("parallelism_config") or ParallelismConfig(dp_shard_size=8)
    mesh = parallel.build_device_mesh("cpu")[tuple(parallel.fsdp_dim_names)]
    trainer = SimpleNamespace(model_wrapped=fully_shard(Linear(8, 8), mesh=mesh))
    assert proof(words) == f"2 of 2 parameters sharded over {over} of 8 ranks (DTensor)"
    with pytest.raises(RunError, match=f"parameters are sharded over {over} of 8 ranks, not over"):
        proof(["shard_size=4"] if over == 8 else [])


def test_fewer_ranks_than_were_asked_for_do_not_begin(tmp_path: Path) -> None:
    from torch import multiprocessing

    with pytest.raises(multiprocessing.ProcessRaisedException, match="num_processes=4 : 2 processes were started"):
        multiprocessing.start_processes(_as_one_of_two, (str(tmp_path / "store"),), nprocs=2, start_method="fork")


def _as_one_of_two(rank: int, file: str) -> None:
    from torch.distributed import FileStore

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    ranks.begin(4, 1, FileStore(file, 2))


def test_a_process_that_is_alone_uses_one_gpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Arguments:  # as much of transformers' as is read and set
        _n_gpu = 2
        n_gpu = property(lambda self: self._n_gpu)

    alone = configs.to_config(configs.compose(["model=tiny_llama"]))
    arguments, of_ranks = Arguments(), Arguments()
    distributed.use_one_gpu(alone, arguments)
    distributed.use_one_gpu(composed("ddp"), of_ranks)
    assert (arguments.n_gpu, of_ranks.n_gpu) == (1, 2)
    assert distributed.prove(alone, None) == "distributed: single process"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = "2 GPUs are visible, this run uses the first (distributed=ddp uses all)"
    assert distributed.prove(alone, None) == f"distributed: single process; {said}"


def test_a_checkpoint_is_due_by_the_clock_a_minute_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn import Linear

    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    run, state = RunDirectory(tmp_path), SimpleNamespace(global_step=1)
    added: list[Path] = []
    saving = Saving(run, every_minutes=1, limit=2, add=added.append)

    def due() -> bool:
        control = SimpleNamespace(should_save=False)
        saving.on_step_end(None, state, control)
        return control.should_save

    clock += 600  # loading and preparing do not count
    saving.on_train_begin(None, state, None)
    clock += 59
    assert not due()
    clock += 2
    assert due()
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    run.set_status("running")
    saving.on_save(None, state, None, model=Linear(1, 1))
    assert added == [run.checkpoints / "checkpoint-1"]
    assert not due()
    clock += 61
    assert due()
    saving = Saving(run, every_minutes=0, limit=2, add=added.append)
    clock += 10**6
    assert not due()


def test_deepspeeds_own_settings_are_merged_into_ours() -> None:
    words = [
        "deepspeed.zero_optimization.overlap_comm=true",
        "deepspeed.wall_clock_breakdown=true",
    ]
    made = distributed.arguments(composed("deepspeed_zero2", *words))["deepspeed"]
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


def test_a_signal_within_a_second_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal and what was started there may both pass Ctrl-C on; who types it again means it."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = Stop()
    stop.on_train_begin(None, None, None)
    for after in (0.0, 0.5, 0.9):
        now = 100.0 + after
        stop._on_signal(signal.SIGINT, None)
    assert stop.signum == signal.SIGINT
    now = 101.1
    with pytest.raises(Interrupted):
        stop._on_signal(signal.SIGINT, None)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be waited for for days fails."""
    monkeypatch.setattr(meetings, "_PATIENCE", timedelta(seconds=30))


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
        dead[0].note_run("runs/a")
        dead[0].send_to_run("runs/a", 1, 1)
        assert [one.result(timeout=30) for one in told] == [{"run": "runs/a", "each": 1}] * 2
        first, second = came(0), came(1)
        assert first.earlier_run() == "runs/a"
        early = [pool.submit(second.told), pool.submit(first.send_to_run, "runs/a", 2, 1)]
        assert not wait(early, timeout=0.5).done  # the third that is named there answers no more
        assert came(2).told() == {"run": "runs/a", "each": 2}
        assert early[0].result(timeout=30) == {"run": "runs/a", "each": 2}


def test_who_does_not_come_is_not_waited_for_forever() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    two = [Meeting(outside.Group(index, 3, index, "torchrun", "", 0), store) for index in (0, 1)]
    for one in two:
        with pytest.raises(RunError, match=r"not all processes have come within distributed\.timeout_min=0\.002"):
            one.ranks(0.002)


def test_what_one_cannot_do_all_are_told() -> None:
    """A machine that cannot get the model, say: none of the others waits for it."""
    from torch.distributed import HashStore

    store = HashStore()
    met = [Meeting(outside.Group(index, 3, index, "torchrun", "", 0), store) for index in range(3)]
    with ThreadPoolExecutor(3) as pool:
        problems = zip(met, ("", "b: no room", ""), strict=True)
        ready = [pool.submit(one.all_ready, problem, 1) for one, problem in problems]
        assert [str(one.exception(timeout=30)) for one in ready] == ["b: no room"] * 3
