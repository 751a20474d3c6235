"""W&B's own sweeps: the real `wandb sweep` and `wandb agent` against a server in this process run our command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft_lab.config import compose, to_config
from tests.conftest import ROOT, online
from tests.fake_wandb import FakeWandb

EXAMPLE = ROOT / "multirun_examples" / "wandb_sweep.yaml"
QUICK = {
    "model": "tiny_llama",
    "data.train_rows": 40,
    "data.eval_rows": 4,
    "evaluation.rows": 0,
    "trainer.max_steps": 2,
    "tracking.mode": "online",
}


def wandb(*words: str, server: FakeWandb, cwd: Path) -> str:
    """What the real program prints; the agent starts `python`, which has to be this one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **online(server), "PATH": path}
    environment.pop("WANDB_MODE")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_value_of_the_example_is_one_of_ours() -> None:
    sweep = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert sweep["command"] == ["python", "-m", "sft_lab", "${args_no_hyphens}"]
    for key, given in sweep["parameters"].items():
        for value in given.get("values") or [v for v in (given.get("min"), given.get("max"), given.get("value")) if v]:
            to_config(compose([f"{key}={value}"]))


@pytest.mark.e2e
@pytest.mark.slow
def test_an_agent_runs_the_example(wandb_server: FakeWandb, tmp_path: Path) -> None:
    """Each trial is the very run that the agent made for it, and what it was to try is what it tried."""
    said = wandb("sweep", "--project", "p", str(EXAMPLE), server=wandb_server, cwd=tmp_path)
    (path,) = re.findall(r"wandb agent (\S+)", re.sub(r"\x1b\[\d*m", "", said))
    ((name, sweep),) = wandb_server.sweeps.items()
    assert yaml.safe_load(sweep.config)["metric"] == {"name": "eval/loss", "goal": "minimize"}
    for rate, peft in ((0.0002, "lora_r8"), (0.002, "lora_r16")):
        sweep.trials.append({"peft": peft, "trainer.learning_rate": rate, "trainer.packing": False, **QUICK})

    wandb("agent", path, "--count", "2", server=wandb_server, cwd=tmp_path)

    runs = list(wandb_server.runs.values())
    assert [(run.id, run.project, run.sweep, run.exit_code) for run in runs] == [
        ("trial0", "p", name, 0),
        ("trial1", "p", name, 0),
    ]
    configs = [run.config["sft_lab"]["value"] for run in runs]
    assert [(c["trainer"]["learning_rate"], c["peft"]["r"]) for c in configs] == [(0.0002, 8), (0.002, 16)]
    assert all("eval/loss" in run.summary for run in runs)
    (data,) = {name for run in runs for name in run.used}
    assert data.startswith("data-")
    kept = sorted(tmp_path.glob("outputs/*/*/wandb/run_id"))
    assert [file.read_text().strip() for file in kept] == ["trial0", "trial1"]
    states = [json.loads((file.parents[1] / "status.json").read_text())["state"] for file in kept]
    assert states == ["completed", "completed"]
