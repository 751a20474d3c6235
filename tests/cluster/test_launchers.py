"""hydra/launcher: which process trains a trial changes nothing about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins

from sft_lab.sweep import ranking, records
from tests.conftest import Cli
from tests.sweep.test_sweep import UNTRACKED, states, trials
from tests.test_run import check

WORDS = ["-m", *UNTRACKED, "sweep.name=s", "peft=lora_r8", "trainer.learning_rate=1e-3,3e-3"]
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
# The class that each needs, and the extra that brings it.
NEEDS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "launchers"),
    "local": (f"{SUBMITIT}.LocalLauncher", "launchers"),
    "slurm": (f"{SUBMITIT}.SlurmLauncher", "launchers"),
    "ray": ("hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher", "ray"),
}
Swept = tuple[dict[str, bytes], str]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Swept]]:
    """Adapters by what each varies, and the verdict on them, of the sweep through a launcher."""
    short = tempfile.mkdtemp(prefix="ray.", dir="/tmp")  # for its sockets, whose paths hold 107 bytes
    # Ray and joblib would each give a trial another number of threads, and so sums another order.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": short}
    known: dict[str, Swept] = {}

    def run(launcher: str) -> Swept:
        if launcher not in known:
            folder = tmp_path_factory.mktemp(launcher)
            command = [sys.executable, "-m", "sft_lab", *WORDS, f"hydra/launcher={launcher}"]
            check(subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600))
            assert states(folder) == ["completed"] * 2
            adapters = {
                name: (trial / "adapter" / "adapter_model.safetensors").read_bytes()
                for name, trial in trials(folder).items()
            }
            known[launcher] = adapters, ranking.judge(records.read([folder / "outputs" / "sweeps" / "s"])).sentence
        return known[launcher]

    yield run
    shutil.rmtree(short)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("launcher", ["joblib", "local", "ray"])
def test_a_trial_is_the_same_to_the_byte_through_every_launcher(swept: Callable[[str], Swept], launcher: str) -> None:
    adapters, verdict = swept("basic")
    assert len(set(adapters.values())) == 2
    assert swept(launcher) == (adapters, verdict)


@pytest.mark.parametrize("launcher", [*NEEDS, "submitit_local", "submitit_slurm"])
def test_each_launcher_is_known(main: Cli, launcher: str) -> None:
    if launcher in NEEDS and NEEDS[launcher][0] not in Plugins.instance().class_name_to_class:
        pytest.skip(f"the extra {NEEDS[launcher][1]} is not installed")
    result = check(main(*WORDS, f"hydra/launcher={launcher}", "sweep.dry_run=true"))
    assert "2 trials (2 to train, 0 done)" in result.stdout


@pytest.mark.parametrize("launcher", NEEDS)
def test_a_launcher_without_its_package_is_refused(
    main: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    target, extra = NEEDS[launcher]
    for name in (target, "hydra_plugins.sft_lab.SlurmLauncher"):
        monkeypatch.delitem(Plugins.instance().class_name_to_class, name, raising=False)
    result = check(main(*WORDS, f"hydra/launcher={launcher}"), code=2)
    assert f"hydra/launcher={launcher} : needs a package that is not installed" in result.stderr
    assert f"pip install 'sft-lab[{extra}]'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_slurm_away_from_a_cluster_is_refused_and_can_still_be_planned(
    main: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(SUBMITIT)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    result = check(main(*WORDS, "hydra/launcher=slurm"), code=2)
    assert "hydra/launcher=slurm : no sbatch on this machine" in result.stderr
    assert "2 trials" in check(main(*WORDS, "hydra/launcher=slurm", "sweep.dry_run=true")).stdout
    assert list(tmp_path.iterdir()) == []


def test_a_lost_job_is_over_and_a_live_one_is_not() -> None:
    pytest.importorskip("submitit")
    from sft_lab.sweep.slurm import QueueWatcher

    class Answered(QueueWatcher):
        def _make_command(self) -> list[str]:
            return [
                "printf",
                r"7_0|CANCELLED\n7_1|CONFIGURING\n7_2|PREEMPTED\n7_3|SUSPENDED\n7_4|COMPLETED\n8_0|FAILED\n",
            ]

    watcher = Answered()
    over = {job: watcher.is_done(job, mode="force") for job in ("7_0", "7_1", "7_2", "7_3", "7_4", "7_5")}
    assert over == {"7_0": True, "7_1": False, "7_2": False, "7_3": False, "7_4": True, "7_5": True}
