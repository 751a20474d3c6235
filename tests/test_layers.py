"""A module imports only from layers below its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import sft_lab
from tests.conftest import ROOT

PACKAGE = Path(sft_lab.__file__).parent
LAYERS: dict[str, int] = {
    **dict.fromkeys(["", "directories", "errors", "schema", "library", "options"], 1),
    **dict.fromkeys(
        [
            "checks",
            "contradictions",
            "outside",
            "meetings",
            "command_line",
            "composing",
            "config",
            "runs",
            "checkpoints",
            "logs",
            "console",
            "wandb_file",
        ],
        2,
    ),
    **dict.fromkeys(
        [
            "adapter",
            "attention",
            "base_weights",
            "embedded",
            "evaluate",
            "evaluating",
            "loss",
            "model",
            "quant",
            "shared",
            "targets",
            "integrations",
            "tracking",
            "unlogged",
            "trainer",
            "wandb_client",
            "wandb_run",
            "wandb_sweep",
            "callbacks",
            "distributed",
            "ranks",
            "data",
        ],
        3,
    ),
    **dict.fromkeys(
        [
            "agent",
            "answering",
            "drift",
            "failures",
            "findings",
            "held_out",
            "launch",
            "model_findings",
            "outcome",
            "preflight",
            "provenance",
            "repro",
            "sweep",
            "train",
            "worker",
        ],
        4,
    ),
    "commands": 5,
    "__main__": 6,
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "wandb", "bitsandbytes", "accelerate", "plotly", "optuna"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """`data.pack` and the like belong to the layer of their package."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0].replace("__init__", "")


def imports(file: Path) -> list[tuple[str, bool]]:
    """Every module imported, and whether at the top of the file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "sft_lab":
            found += [(f"sft_lab.{alias.name}", top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, top))
    return found


def test_the_table_of_contributing_says_the_same() -> None:
    table = re.findall(
        r"^\| (\d) \| ([^|]*) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    told = {name: int(layer) for layer, modules in table for name in re.findall(r"`(\w+)/?`", modules)}
    assert told == {name: layer for name, layer in LAYERS.items() if name}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    own = name_of(file)
    assert own in LAYERS, f"give {own} a layer"
    for module, _ in imports(file):
        if module.startswith("sft_lab."):
            other = module.split(".")[1]
            other = "" if other.startswith("__version") else other
            assert LAYERS[other] <= LAYERS[own], f"{own} (layer {LAYERS[own]}) imports {other} (layer {LAYERS[other]})"


@pytest.mark.parametrize("file", [f for f in MODULES if LAYERS[name_of(f)] in (1, 2, 5, 6)], ids=lambda f: f.stem)
def test_what_answers_quickly_imports_nothing_heavy(file: Path) -> None:
    heavy = [module for module, top in imports(file) if top and module.split(".")[0] in HEAVY]
    assert not heavy


def test_only_the_config_layer_knows_hydra() -> None:
    knowing = {
        file.relative_to(PACKAGE).with_suffix("").as_posix() if name_of(file) == "sweep" else name_of(file)
        for file in MODULES
        for module, _ in imports(file)
        if module.split(".")[0] in ("hydra", "omegaconf")
    }
    sweeper = {
        "sweep/sweepers",
        "sweep/search",
        "sweep/slurm",
        "sweep/study",
    }  # Hydra's plugins, and what they sweep over
    assert knowing == {"schema", "composing", "config", "command_line", "commands", *sweeper}
