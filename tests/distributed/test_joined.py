"""Ranks that somebody else has started: torchrun on one machine, on two, and what does not fit."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sft_lab import embedded
from sft_lab.runs import RunDirectory
from tests.conftest import Cli
from tests.distributed.starting import TWENTY, adapter, environment
from tests.fake_hub import COMMIT, FakeHub
from tests.test_run import check, read

pytestmark = pytest.mark.e2e
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(
    path: Path, *words: str, ranks: int = 2, options: tuple[str, ...] = ("--standalone",), shims: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, *options, "--nproc_per_node", str(ranks), "-m", "sft_lab", *words]
    env = {**os.environ, **environment(*shims)}
    return subprocess.run(command, cwd=path, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_four_ranks_on_a_cold_cache_build_it_once(tmp_path: Path) -> None:
    """Whoever starts them: one directory, data prepared by one process, and to the same bytes."""
    words = [*TWENTY, "distributed=ddp"]
    ways = {
        "own": [sys.executable, "-m", "sft_lab", *words, "distributed.num_processes=4"],
        "joined": [*TORCHRUN, "--standalone", "--nproc_per_node", "4", "-m", "sft_lab", *words],
    }
    for name, command in ways.items():
        folder = tmp_path / name
        folder.mkdir()
        cold = {**os.environ, **environment("ranks_only_train"), "SFT_LAB_CACHE": str(folder / "cold")}
        done = check(subprocess.run(command, cwd=folder, env=cold, capture_output=True, text=True, check=False))
        assert done.stdout.count("cache miss") == 1
        assert len(list((folder / "cold" / "data").glob("*/key.json"))) == 1
        assert "distributed: 4 ranks" in done.stdout
    own, joined = (list((tmp_path / name / "outputs").glob("*/*")) for name in ways)
    assert len(own) == len(joined) == 1
    assert adapter(own[0]) == adapter(joined[0])


def accelerate(path: Path, options: list[str], *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2"]
    command, variables = [*launch, "-m", "sft_lab", *words], {**os.environ, **environment(), **env}
    return subprocess.run(command, cwd=path, env=variables, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_accelerate_launch_gives_what_our_own_launch_gives(tmp_path: Path, cli: Cli) -> None:
    words = [*TWENTY, "distributed=ddp"]
    joined = accelerate(tmp_path, ["--multi_gpu"], *words, "hydra.run.dir=joined", ACCELERATE_USE_CPU="true")
    assert "distributed: 2 ranks, gradients averaged by DistributedDataParallel" in check(joined).stdout
    check(cli(*words, "distributed.num_processes=2", "hydra.run.dir=own", env=environment()))
    assert adapter(tmp_path / "joined") == adapter(tmp_path / "own")


@pytest.mark.slow
def test_a_launch_that_quietly_starts_one_process_is_refused(tmp_path: Path) -> None:
    """`--cpu` does, whatever the number it is given."""
    refused = accelerate(tmp_path, ["--cpu"], *TWENTY, "distributed=ddp", "hydra.run.dir=run")
    assert "sft_lab: distributed.num_processes=0 : is one a GPU, and there is none (allowed: " in refused.stderr
    assert "returned non-zero exit status 2." in refused.stderr  # Accelerate's word on it; its own status is 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "distributed=single : torchrun started this command 2 times"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["distributed=ddp", "distributed.num_processes=4"], "num_processes=4 : torchrun started 2 (allowed: 2)"),
                (["-m", "distributed=ddp", "seed=1,2"], "-m : torchrun started this command 2 times"),
                (["distributed=ddp", "trainer.learning_rte=1"], "did you mean trainer.learning_rate?"),
            )
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_once(words: list[str], said: str, tmp_path: Path) -> None:
    refused = torchrun(tmp_path, *words, *TWENTY)
    assert refused.returncode == 1  # torchrun's own; each rank's is 2
    assert set(re.findall(r"exitcode *: (\d+)", refused.stderr)) == {"2"}
    assert refused.stderr.count(said) == 1
    assert not list((tmp_path / "outputs").glob("*/*")) if (tmp_path / "outputs").exists() else True


@pytest.mark.slow
@pytest.mark.parametrize("words", [["plan", "--help"], ["resume"]], ids=" ".join)
def test_what_leaves_early_takes_the_others_along(words: list[str], tmp_path: Path) -> None:
    """What argparse answers by itself."""
    done = torchrun(tmp_path, *words)
    assert "usage: sft_lab" in done.stdout + done.stderr
    assert done.returncode == (0 if "--help" in words else 1)


@pytest.mark.slow
def test_what_the_second_rank_failed_of_is_what_the_run_tells(tmp_path: Path) -> None:
    """The first one sees no more than that the connection to it is closed."""
    words = [*TWENTY, "distributed=ddp", "hydra.run.dir=run"]
    failed = torchrun(tmp_path, *words, shims=("second_rank_fails",))
    told = "process 1 failed: ValueError: nobody foresaw this"
    assert failed.returncode == 1
    assert f"sft_lab: {told}\n" in failed.stderr
    status = read(tmp_path / "run" / "status.json")
    assert (status["state"], status["error"]) == ("failed", told)


@pytest.mark.slow
def test_a_rank_that_torchrun_starts_again_goes_on_with_the_run(tmp_path: Path) -> None:
    """The directory's name has the time in it: the second attempt must find the first one's."""
    words = [*TWENTY, "distributed=ddp", "trainer.max_steps=60", "trainer.save_steps=5", "trainer.logging_steps=1"]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max_restarts", "1", "-m", "sft_lab", *words]
    env = {**os.environ, **environment()}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    from tests.test_resume import wait_for_step

    wait_for_step(process, 12)
    ranks = [p for p in psutil.Process(process.pid).children() if "sft_lab" in p.cmdline()]
    max(ranks, key=lambda p: int(p.environ()["RANK"])).kill()
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert re.search(r"going on from step 1\d", output)
    (directory,) = (tmp_path / "outputs").glob("*/*")
    assert (directory / "adapter").is_dir()


@pytest.mark.slow
def test_a_run_that_failed_before_it_trained_is_gone_on_with(tmp_path: Path) -> None:
    """Its directory is there when all are started again."""
    options = ("--standalone", "--max_restarts", "1")
    words = [*TWENTY, "distributed=ddp", "hydra.run.dir=run"]
    done = check(torchrun(tmp_path, *words, options=options, shims=("first_fetch_fails",)))
    assert "the hub is away" in done.stderr
    assert "there is no whole checkpoint: it begins again" in done.stdout
    assert read(tmp_path / "run" / "status.json")["state"] == "completed"


@pytest.mark.slow
def test_machines_that_count_restarts_differently_go_on_with_one_run(tmp_path: Path) -> None:
    """Two torchruns of a rank each: when the second one's rank dies, the first one counts no restart of its own."""
    words = [*TWENTY, "distributed=ddp", "trainer.max_steps=60", "trainer.save_steps=5", "trainer.logging_steps=1"]
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "1", "--rdzv_backend", "c10d"]
    meet += ["--rdzv_endpoint", f"127.0.0.1:{_free_port()}", "--rdzv_id", "two", "--local_addr", "127.0.0.1"]
    command = [*TORCHRUN, *meet, "-m", "sft_lab", *words]
    env = {**os.environ, **environment()}
    machines = [
        subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        (directory,) = _eventually(
            lambda: list((tmp_path / "outputs").glob("*/*/checkpoints/checkpoint-10/whole.json"))
        )
        ranks = [p for one in machines for p in psutil.Process(one.pid).children() if "sft_lab" in p.cmdline()]
        (second,) = [p for p in ranks if p.environ()["RANK"] == "1"]
        second.kill()
        outputs = [machine.communicate(timeout=300) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert sum(out.count("going on from step") for out, _ in outputs) == 1
    run = directory.parents[2]
    assert [path.parent.parent for path in (tmp_path / "outputs").glob("*/*")] == [run.parent.parent]
    assert [event["step"] for event in RunDirectory(run).read_metrics() if event["split"] == "train"] == list(
        range(1, 61)
    )


def _eventually(look: Callable[[], list[Path]]) -> list[Path]:
    """What is there as soon as there is something."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError("nothing came")


@pytest.mark.slow
def test_a_machine_fetches_the_model_once_for_its_ranks(tmp_path: Path) -> None:
    """Two machines of two ranks each, whose hub caches are their own."""
    words = [*(word for word in TWENTY if not word.startswith("model=")), "distributed=ddp", "trainer.max_steps=4"]
    with FakeHub(Path(embedded.resolve("embedded:tiny_llama"))) as hub:
        words += ["model=from_path", f"model.path={hub.model}", "hydra.run.dir=run"]
        meet = [
            "--nnodes",
            "2",
            "--nproc_per_node",
            "2",
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(_free_port()),
        ]
        env = {**os.environ, **environment("ranks_only_train"), **hub.environment}
        machines = [
            subprocess.Popen(
                [*TORCHRUN, *meet, "--node_rank", str(node), "-m", "sft_lab", *words],
                cwd=tmp_path,
                env={**env, "HF_HOME": str(tmp_path / f"hub_{node}")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for node in range(2)
        ]
        ended = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ended
    assert "distributed: 4 ranks" in ended[0][0]
    assert {file: hub.downloads(file) for file in hub.files} == dict.fromkeys(hub.files, 2)
    last = max(i for i, asked in enumerate(hub.requests) if asked.startswith(f"GET /{hub.model}/resolve/{COMMIT}/"))
    assert not hub.requests[last + 1 :]  # when both machines have it, nothing is asked


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _may_make_namespaces() -> bool:
    if os.geteuid() or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "sft_lab_probe"], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", "sft_lab_probe"], capture_output=True, check=False)
    return made


@pytest.mark.slow
@pytest.mark.skipif(not _may_make_namespaces(), reason="needs root and iproute2")
def test_two_nodes_are_one_run(tmp_path: Path) -> None:
    """Two network namespaces, joined by a veth pair alone: a torchrun in each, which meet over it.

    They share the run's directory and no cache: each makes the model for its own ranks.
    """
    setup = """
        ip netns add sft_a; ip netns add sft_b
        ip link add sft_va netns sft_a type veth peer name sft_vb netns sft_b
        ip -n sft_a addr add 10.77.0.1/24 dev sft_va; ip -n sft_b addr add 10.77.0.2/24 dev sft_vb
        for n in a b; do ip -n sft_$n link set lo up; ip -n sft_$n link set sft_v$n up; done
    """
    try:
        subprocess.run(["sh", "-ec", setup], check=True, capture_output=True, text=True)
        nodes = []
        for node, name in enumerate("ab"):
            meet = ["--nnodes", "2", "--nproc_per_node", "2", "--node_rank", str(node)]
            meet += ["--master_addr", "10.77.0.1", "--master_port", "29555"]
            words = [*TWENTY, "distributed=ddp", "hydra.run.dir=run"]
            env = {**os.environ, **environment("ranks_only_train"), "GLOO_SOCKET_IFNAME": f"sft_v{name}"}
            env["SFT_LAB_CACHE"] = str(tmp_path / f"cache_{name}")
            command = ["ip", "netns", "exec", f"sft_{name}", *TORCHRUN, *meet, "-m", "sft_lab", *words]
            nodes.append(
                subprocess.Popen(
                    command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        ended = [node.communicate(timeout=300) for node in nodes]
    finally:
        for name in "ab":
            subprocess.run(["ip", "netns", "delete", f"sft_{name}"], capture_output=True, check=False)
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert "distributed: 4 ranks, gradients averaged by DistributedDataParallel" in ended[0][0]
    assert "loss" not in ended[1][0]  # one node speaks
    assert (tmp_path / "cache_b" / "models").is_dir()
    assert not (tmp_path / "cache_b" / "data").exists()
    one = torchrun(tmp_path, *TWENTY, "distributed=ddp", "hydra.run.dir=one", ranks=4)
    check(one)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "one")
