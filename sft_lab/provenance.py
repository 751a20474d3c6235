"""Where a run came from: code, versions, hardware, data and model."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from sft_lab import __version__, embedded
from sft_lab import config as configs
from sft_lab import model as models
from sft_lab.data.prepared import Prepared
from sft_lab.schema import Config

_PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "hydra-core", "omegaconf",
    "wandb", "tokenizers", "safetensors",
)  # fmt: skip


_KEPT_BYTES = 1_000_000  # of uncommitted changes
_BY_NAME = "by its name a secret"
# Files whose contents are not recorded: where tools keep passwords, keys and tokens, and names that say so themselves.
_SECRET = re.compile(
    r"""
    (^|/) (
        (\.ssh | \.aws | \.azure | \.gnupg | \.kube | secrets? | credentials?) / .*
      | [^/]* \.(pem | key | p12 | pfx | p8 | jks | keystore | kdbx | ppk | env)
      | \.env [^/]* | [._]netrc | \.git-credentials | \.pypirc | \.npmrc | \.pgpass | \.my\.cnf | \.htpasswd | \.boto
      | \.s3cfg | \.dockercfg | \.docker/config\.json | kubeconfig | kaggle\.json
      | id_(rsa | dsa | ecdsa | ed25519) [^/]*
      | ([^/]* [ ._-])? (service[._-]?account | client[._-]?secret) [^/]* \.json
      | ([^/]* [ ._-])? (token | secrets? | credentials? | passwords? | passwd | api[._-]?keys?) (\.[^/]*)?
    ) $
    """,
    re.VERBOSE | re.IGNORECASE,
)


def collect(config: Config, data: Prepared) -> dict[str, Any]:
    return {**current(config, data.facts["data_fingerprint"]), "config": configs.to_dict(config)}


def current(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What provenance.json of a run that starts now would hold."""
    return {
        "git": git_state(Path(__file__).parent),
        "packages": package_versions(),
        "installed": installed(),
        "hardware": hardware(),
        "data_fingerprint": data_fingerprint,
        "model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "fingerprint": model_fingerprint(config),
        },
        "resolved": resolved(config),
    }


# ------------------------------------------------------------------------------------------------------------- code


@functools.cache  # what this process runs is what it found when it began
def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and what the tree holds beside it; None outside a checkout or without git.

    Returns:
        commit, dirty, `diff` against the commit, `untracked` files that git does not ignore (name: text), and
        `left_out`: what of them is not here because it is large, no text, a link, or by its name a secret.
    """
    try:
        top = Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel")).strip())
        commit = _git(top, "rev-parse", "HEAD").decode().strip()
        dirty = bool(_git(top, "status", "--porcelain"))
        changed = _names(_git(top, "diff", "--name-only", "-z", "--no-renames", "HEAD"))
        secrets = [name for name in changed if _SECRET.search(name)]
        diff = _diff(top, secrets)
        names = _names(_git(top, "ls-files", "-z", "--others", "--exclude-standard"))
    except (OSError, subprocess.CalledProcessError):
        return None
    left_out = [f"diff: {_KEPT_BYTES} of its {len(diff)} bytes are kept"] if len(diff) > _KEPT_BYTES else []
    left_out += [f"{name}: {_BY_NAME}" for name in secrets]
    diff = diff[:_KEPT_BYTES]
    untracked, not_kept = _texts(top, names, _KEPT_BYTES - len(diff))
    return {
        "commit": commit,
        "dirty": dirty,
        "diff": diff.decode(errors="replace"),
        "untracked": untracked,
        "left_out": left_out + not_kept,
    }


def _git(folder: Path, *words: str) -> bytes:
    return subprocess.run(
        ["git", "--no-optional-locks", "-C", str(folder), *words], capture_output=True, check=True
    ).stdout


def _diff(top: Path, without: list[str]) -> bytes:
    """What `git apply` takes, whatever the person's own settings make `git diff` show."""
    shown = ["--no-ext-diff", "--no-textconv", "--no-color", "--submodule=short"]
    return _git(top, "diff", *shown, "HEAD", "--", ".", *(f":(exclude,literal){name}" for name in without))


def _names(listed: bytes) -> list[str]:
    return [os.fsdecode(name) for name in listed.split(b"\0") if name]


def _texts(folder: Path, names: list[str], budget: int) -> tuple[dict[str, str], list[str]]:
    """The files' texts, `budget` bytes of them at most, and what was left out and why."""
    texts: dict[str, str] = {}
    left_out: list[str] = []
    for name in sorted(names):
        if _SECRET.search(name):
            left_out.append(f"{name}: {_BY_NAME}")
            continue
        if (folder / name).is_symlink():  # what it leads to may be anything, and lie anywhere
            left_out.append(f"{name}: a link to {(folder / name).readlink()}")
            continue
        try:
            size = (folder / name).stat().st_size
            if size > budget:
                left_out.append(f"{name}: {size} bytes")
                continue
            texts[name] = (folder / name).read_text(encoding="utf-8")
            budget -= size
        except UnicodeDecodeError:
            left_out.append(f"{name}: no text, {size} bytes")
        except OSError as error:  # not readable, gone, or a repository inside this one
            left_out.append(f"{name}: {error.strerror}")
    return texts, left_out


# ------------------------------------------------------------------------------------------ packages, machine, model


@functools.cache
def installed() -> dict[str, str]:
    """Every distribution that Python finds here, with its version."""
    return dict(sorted((canonical(found.name), found.version) for found in distributions() if found.name))


def canonical(name: str) -> str:
    """A distribution's name as it is however it was typed (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


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
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # which vector instructions torch computes with
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }


def resolved(config: Config) -> dict[str, str]:
    """What keys whose value may be `auto` come to on this machine."""
    precision = models.resolve_precision(config)
    return {
        "trainer.precision": precision.training,
        "model.dtype": precision.dtype,
        "model.attn_implementation": models.resolve_attention(config),
    }


def model_fingerprint(config: Config) -> str:
    """The commit of a hub model, or a digest of a directory's configuration and weights, to the last byte."""
    commit = getattr(models.load_config(config.model), "_commit_hash", None)
    folder = Path(embedded.resolve(config.model.path))
    if not folder.is_dir():
        return str(commit)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(path for kind in _WEIGHTS for path in folder.glob(kind)):
        known = file.stat()
        digest.update(f"{file.name}:{_digest(file, known.st_size, known.st_mtime_ns)}".encode())
    return digest.hexdigest()


_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@functools.cache  # a sweep's trials start from the same file
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    import xxhash

    with open(file, "rb") as weights:
        return hashlib.file_digest(weights, xxhash.xxh3_128).hexdigest()
