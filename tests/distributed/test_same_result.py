"""Whatever the ranks and however they share the model: the adapter of a single process, and what was asked for for real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Cli
from tests.distributed.starting import TOLERANCE, TWENTY, adapter, apart, environment
from tests.distributed.test_joined import TORCHRUN
from tests.test_resume import kill, start, wait_for_step
from tests.test_run import check, lines, read

pytestmark = pytest.mark.e2e
SHIMS = {"ddp": "ranks_only_train", "fsdp2": "fsdp_on_cpu", "zero": "deepspeed_without_compiler"}  # one at a time


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    command = [sys.executable, "-m", "sft_lab", *TWENTY, "hydra.run.dir=run"]
    check(subprocess.run(command, cwd=path, capture_output=True, text=True, check=False))
    return path / "run"


FSDP2 = ["distributed=fsdp2", "preflight.allow=[distributed]"]
SHARDED = r"(\d+) of \1 parameters sharded"
METHODS = {
    "ddp 2": (["distributed=ddp"], 2, "gradients averaged by DistributedDataParallel"),
    "fsdp2": (FSDP2, 2, rf"{SHARDED} over 2 of 2 ranks \(DTensor\)"),
    "ddp 4": (["distributed=ddp"], 4, "gradients averaged by DistributedDataParallel"),
    "fsdp2 sharded": (
        [*FSDP2, "distributed.state_dict_type=SHARDED_STATE_DICT"], 2, rf"{SHARDED} over 2 of 2 ranks \(DTensor\)"
    ),
    "fsdp2 hybrid": ([*FSDP2, "distributed.shard_size=2"], 4, rf"{SHARDED} over 2 of 4 ranks \(DTensor\)"),
    "zero1": (["distributed=deepspeed_zero1"], 2, "DeepSpeed ZeRO stage 1"),
    "zero2": (["distributed=deepspeed_zero2"], 2, "DeepSpeed ZeRO stage 2"),
    "zero3": (["distributed=deepspeed_zero3"], 2, r"DeepSpeed ZeRO stage 3, (\d+) of \1 parameters partitioned"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name == "ddp 2" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_the_adapter_is_that_of_one_process(name: str, tmp_path: Path, cli: Cli, single: Path) -> None:
    words, ranks, proof = METHODS[name]
    count = f"distributed.num_processes={ranks}"
    env = environment(*[shim for method, shim in SHIMS.items() if name.startswith(method)])
    done = check(cli(*TWENTY, *words, count, "trainer.save_steps=10", "hydra.run.dir=run", env=env))
    assert re.search(rf"distributed: {ranks} ranks, {proof}", done.stdout), done.stdout
    assert apart(single, tmp_path / "run") <= TOLERANCE
    events, alone = (lines(run / "metrics.jsonl") for run in (tmp_path / "run", single))
    assert [event["step"] for event in events] == [event["step"] for event in alone]
    assert [event["tokens"] for event in events if "tokens" in event] == [e["tokens"] for e in alone if "tokens" in e]
    for event, other in zip(events, alone, strict=True):
        assert event.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)
    assert read(tmp_path / "run" / "status.json")["state"] == "completed"
    # Frozen weights are nowhere: all that a checkpoint has is the adapter, its optimizer, and each rank's random state.
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-20"
    sizes = {file.name: file.stat().st_size for file in checkpoint.rglob("*") if not file.name.startswith("tokenizer")}
    assert {f"rng_state_{rank}.pth" for rank in range(ranks)} <= sizes.keys()
    assert sum(sizes.values()) < 4 * 200_000  # the base's parameters
    # What a run goes on from is all there and counted; the optimizer's file has a name of its own in each method.
    named = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()} - {"whole.json"}
    assert set(read(checkpoint / "whole.json")) == named >= {"trainer_state.json", "scheduler.pt"}
    assert any("optim" in name for name in named)
    kept = [file for part in ("checkpoints", "adapter") for file in (tmp_path / "run" / part).rglob("*")]
    saved, foreseen = sum(f.stat().st_size for f in kept if f.is_file()), read(tmp_path / "run" / "preflight.json")
    beside = 2 * (ranks * 20_000 + 60_000) + 20_000  # random states, names and shapes, what describes a model
    beside += 2 * 50_000 * name.startswith("zero")  # a script of DeepSpeed's, and its settings
    beside += 2 * 300_000 * ("sharded" in name)  # torch writes some 3 kB beside each of 84 pieces of a state a rank
    assert 0.9 * foreseen["disk_bytes"] <= saved <= foreseen["disk_bytes"] + beside


@pytest.fixture(scope="module")
def single_nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single_nf4")
    command = [sys.executable, "-m", "sft_lab", *TWENTY, "quant=nf4", "hydra.run.dir=run"]
    check(subprocess.run(command, cwd=path, capture_output=True, text=True, check=False))
    return path / "run"


# SFTTrainer holds the adapter of a quantised base in bf16, which rounds by 2^-8 at most: a weight at each of 20 steps,
# on either side, by chance up or down. Sums of gradients differ by as much, which moves a weight by that share of one
# step. Ranks that do not average their gradients come to ten times the tolerance.
BF16_TOLERANCE = (2 * 20) ** 0.5 * 2**-8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp 2", "fsdp2", "zero2"])
def test_the_adapter_on_a_quantised_base_is_that_of_one_process(
    name: str, tmp_path: Path, cli: Cli, single_nf4: Path
) -> None:
    words, ranks, proof = METHODS[name]
    env = environment(*[shim for method, shim in SHIMS.items() if name.startswith(method)])
    count = f"distributed.num_processes={ranks}"
    done = check(cli(*TWENTY, "quant=nf4", *words, count, "hydra.run.dir=run", env=env))
    assert re.search(rf"distributed: {ranks} ranks, {proof}", done.stdout), done.stdout
    one, several = (_trained_from_zero(run) for run in (single_nf4, tmp_path / "run"))
    assert float((one - several).norm() / one.norm()) <= BF16_TOLERANCE
    for event, other in zip(*(lines(run / "metrics.jsonl") for run in (tmp_path / "run", single_nf4)), strict=True):
        assert event.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)


def _trained_from_zero(run: Path) -> Any:
    """LoRA's B: all that it is has been trained, where A stays close to what it was drawn as."""
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].float().flatten() for name in sorted(weights) if "lora_B" in name])


LISTENING = """
import sys
from sft_lab import __main__, console, distributed

def prove(config, trainer, original=distributed.prove):
    model = trainer.model_wrapped
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda layer, args, output: console.say(f"between layers: {output.dtype}"))
    model.register_forward_hook(lambda model, args, output: console.say(f"log-probabilities: {output.log_probs.dtype}"))
    return original(config, trainer)

distributed.prove = prove
sys.exit(__main__.main())
"""


@pytest.mark.slow
def test_sharded_in_bf16_layers_pass_on_bf16_and_the_model_fp32(tmp_path: Path) -> None:
    """As without sharding: fp32 between layers would double what gradient checkpointing keeps."""
    (tmp_path / "rank.py").write_text(LISTENING)
    words = [*TWENTY, *FSDP2, "trainer.precision=bf16", "trainer.max_steps=2", "evaluation.rows=0", "hydra.run.dir=run"]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "rank.py", *words]
    env = {**os.environ, **environment("fsdp_on_cpu")}
    done = check(subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False))
    assert re.search(rf"distributed: 2 ranks, {SHARDED}", done.stdout)
    assert set(re.findall("between layers: (.*)", done.stdout)) == {"torch.bfloat16"}
    assert set(re.findall("log-probabilities: (.*)", done.stdout)) == {"torch.float32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp 4", "fsdp2 sharded", "fsdp2 hybrid", "zero2", "zero3"])
def test_a_run_of_several_ranks_that_was_killed_goes_on_to_the_same_bytes(name: str, tmp_path: Path, cli: Cli) -> None:
    words, ranks, _ = METHODS[name]
    env = environment(*[shim for method, shim in SHIMS.items() if name.startswith(method)])
    run = [*TWENTY, *words, f"distributed.num_processes={ranks}", "trainer.save_steps=5", "trainer.logging_steps=1"]
    check(cli(*run, "hydra.run.dir=whole", env=env))
    process = start([*run, "hydra.run.dir=run"], tmp_path, env)
    wait_for_step(process, 12)
    kill(process, signal.SIGKILL)
    resumed = check(cli("resume", "run", env=env))
    assert "going on from step 10" in resumed.stdout
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_save_by_the_clock_together(tmp_path: Path, cli: Cli) -> None:
    """Each has a clock of its own, and all of them write a checkpoint: who saved alone would wait for the others."""
    two = ["distributed=ddp", "distributed.num_processes=2", "distributed.timeout_min=1"]
    often = ["trainer.save_steps=1000", "trainer.save_minutes=1e-6", "trainer.save_total_limit=50"]
    check(cli(*TWENTY, *two, *often, "hydra.run.dir=run", env=environment()))
    saved = (tmp_path / "run" / "checkpoints").glob("checkpoint-*/whole.json")
    assert sorted(int(file.parent.name.split("-")[1]) for file in saved) == list(range(1, 21))


@pytest.mark.slow
def test_an_epoch_of_several_ranks_is_that_of_one(tmp_path: Path, cli: Cli) -> None:
    """Rows that fill neither the last batch nor every rank: none is trained twice, none left out."""
    words = [*TWENTY, "trainer.max_steps=-1", "trainer.num_train_epochs=2", "data.train_rows=21"]
    check(cli(*words, "hydra.run.dir=one"))
    check(cli(*words, "distributed=ddp", "distributed.num_processes=2", "hydra.run.dir=two", env=environment()))
    assert read(tmp_path / "two" / "result.json")["steps"] == read(tmp_path / "one" / "result.json")["steps"] == 6
    assert apart(tmp_path / "one", tmp_path / "two") <= TOLERANCE
    one, two = (
        [event["tokens"] for event in lines(tmp_path / run / "metrics.jsonl") if "tokens" in event]
        for run in ("one", "two")
    )
    assert one == two


def test_what_does_something_else_than_it_says_does_not_train(tmp_path: Path, cli: Cli, main: Cli) -> None:
    """FSDP on a CPU is DDP: refused beforehand, and where that is allowed, at the start."""
    words = [*TWENTY, "distributed=fsdp2", "distributed.num_processes=2", "hydra.run.dir=run"]
    refused = check(main(*words), code=2)
    assert "on a CPU Accelerate trains as DDP does" in refused.stderr
    assert not (tmp_path / "run").exists()
    failed = check(cli(*words, "preflight.allow=[distributed]"), code=1)
    assert "distributed=fsdp2 : is not what runs: 0 of" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert read(tmp_path / "run" / "status.json")["state"] == "failed"
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distributed=ddp"], "distributed.num_processes=0 : is one a GPU, and there is none"),
        (["distributed=fsdp2", "distributed.num_processes=4", "distributed.shard_size=1"], "(allowed: 2, 4, or 0 for all"),
        (["distributed=ddp", "distributed.num_processes=3"], "trainer.global_batch_size=8 : not a multiple"),
        (["distributed=fsdp1", "distributed.num_processes=2"], "distributed=fsdp1 : does not run on a CPU"),
        (["distributed.num_processes=2"], "or distributed=ddp distributed.num_processes=2"),
        (["distributed=ddp", "distributed.num_processes=2", "distributed.shard_size=2"], "has no effect with distributed=ddp"),
        (["distributed=fsdp2", "distributed.num_processes=4", "distributed.shard_size=3"], "(allowed: 2, 4, or 0 for all of them)"),
        (["distributed=fsdp2", "distributed.num_processes=4", "distributed.context_parallel_size=2"], "runs on GPUs alone"),
        (
            ["distributed=ddp", "distributed.num_processes=2", "data.streaming=true", "data=from_file", "data.path=x.jsonl"],
            "which ranks never do",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words: list[str], said: str, tmp_path: Path, main: Cli) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    refused = check(main(*TWENTY, *words, "hydra.run.dir=run"), code=2)
    assert said in refused.stderr
    assert not (tmp_path / "run").exists()
