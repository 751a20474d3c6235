"""Where a run came from: code, versions, hardware, data and model."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sft_lab import __version__, embedded
from sft_lab import model as models
from sft_lab.data.prepared import Prepared
from sft_lab.schema import Config

_PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "hydra-core", "omegaconf",
    "wandb", "tokenizers", "safetensors",
)  # fmt: skip


def collect(config: Config, data: Prepared) -> dict[str, Any]:
    return {
        "git": git_state(Path(__file__).parent),
        "packages": package_versions(),
        "hardware": hardware(),
        "data_fingerprint": data.facts["data_fingerprint"],
        "model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "fingerprint": _model_fingerprint(config),
        },
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def package_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {"sft_lab": __version__, "python": platform.python_version(), **found}


def hardware() -> dict[str, Any]:
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }


def _model_fingerprint(config: Config) -> str:
    """The commit of a hub model, or a digest of a directory's configuration and the sizes of its weight files."""
    commit = getattr(models.load_config(config.model), "_commit_hash", None)
    folder = Path(embedded.resolve(config.model.path))
    if not folder.is_dir():
        return str(commit)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with open(file, "rb") as weights:
            digest.update(weights.read(1 << 20))
    return digest.hexdigest()
