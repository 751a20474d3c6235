"""Every file of multirun_examples/ is a sweep that runs, here with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sft_lab import command_line
from sft_lab.errors import ConfigError
from tests.conftest import ROOT, Cli
from tests.sweep.test_sweep import UNTRACKED, states
from tests.test_run import check, read

EXAMPLES = ROOT / "multirun_examples"
# What makes each small, and how many trials that leaves.
SMALL = {
    "grid": (["peft=lora_r8,lora_r16"], 8),
    "optuna": (["hydra.sweeper.n_trials=2", "trainer.eval_steps=2"], 2),
    "alpha_tied_to_rank": (["peft.r=4,8"], 4),
    "seeds": (["seed=range(1,3)"], 4),
    "method_shootout": ([], 5),
    "data_mixture": (["data.sources.chat.path=chats.jsonl", "data.sources.code.path=code.jsonl", "data.sources.code.weight=0.5,2"], 2),
    "slurm_array": (["hydra/launcher=submitit_local", "peft=lora_r8", "trainer.packing=false"], 2),
}  # fmt: skip
SLOW = {"method_shootout", "slurm_array"}


def test_there_is_one_for_each_file() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.yaml")} == {*SMALL, "wandb_sweep"}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL]
)
def test_it_runs(main: Cli, tmp_path: Path, name: str) -> None:
    for file in ("chats.jsonl", "code.jsonl"):
        rows = [f'{{"prompt": "{file} {n}?", "completion": "it is {n}"}}\n' for n in range(60)]
        (tmp_path / file).write_text("".join(rows))
    words, count = SMALL[name]
    check(main("--config-dir", str(EXAMPLES), "-cn", name, *UNTRACKED, "trainer.max_length=256", *words))
    assert states(tmp_path, name) == ["completed"] * count
    sweep = tmp_path / "outputs" / "sweeps" / name
    assert (sweep / "report.html").is_file()
    peft = [read(file)["config"]["peft"] for file in sweep.glob("*/preflight.json")]
    if name == "alpha_tied_to_rank":
        assert {(p["r"], p["lora_alpha"]) for p in peft} == {(4, 8), (8, 16)}
    if name == "method_shootout":
        assert len({str(p) for p in peft}) == 4  # LoRA and QLoRA differ in the base


@pytest.mark.parametrize("name", SMALL)
def test_its_values_are_valid_as_they_stand(name: str) -> None:
    """With the models and ranks that it has, not those that make it small."""
    command = command_line.parse(["--config-dir", str(EXAMPLES), "-cn", name])
    if name == "data_mixture":  # needs files
        return
    assert command_line.check(command) is None
    assert command.multirun


def test_each_says_how_it_is_typed() -> None:
    for name in SMALL:
        text = (EXAMPLES / f"{name}.yaml").read_text()
        assert f"--config-dir multirun_examples -cn {name}" in text
        assert yaml.safe_load(text)["sweep"]["name"] == name


def test_a_sweep_file_that_is_no_multirun_is_refused(tmp_path: Path) -> None:
    """Hydra would train one run and say nothing of the values."""
    text = (EXAMPLES / "grid.yaml").read_text().replace("  mode: MULTIRUN\n", "")
    (tmp_path / "quiet.yaml").write_text(text)
    command = command_line.parse(["--config-dir", str(tmp_path), "-cn", "quiet"])
    with pytest.raises(ConfigError, match=r"hydra.sweeper.params : .* would be ignored"):
        command_line.check(command)
