"""Whether a run that goes on is still the one that began: its config, its data, its base model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import Any

from sft_lab import checks, provenance
from sft_lab import config as configs
from sft_lab.data.prepare import fingerprint
from sft_lab.errors import ConfigError, PreflightError, RunError
from sft_lab.runs import RunDirectory, read_json
from sft_lab.schema import Config

log = logging.getLogger("sft_lab")

_FREE = (  # what may change, since it changes no bit of the adapter
    "preflight.", "tracking.", "sweep.", "trainer.save_steps", "trainer.save_minutes", "trainer.save_total_limit",
    "trainer.dataloader_num_workers", "distributed.max_restarts", "distributed.timeout_min",
)  # fmt: skip
_WHY = {
    "data": "the data is not what this run trains on",
    "model": "the base model is not what this run started from",
}


def require_none(run: RunDirectory, config: Config, allowed: Collection[str]) -> None:
    """
    Args:
        allowed: names of what may have changed: data, model, or a key of the config.

    Raises:
        ConfigError: each thing that has changed since the run began, by its name, and nothing else was touched.
    """
    if not run.provenance.is_file():  # it ended before anything was made of the config
        return
    record = read_json(run.provenance)
    found = dict(_changes(record, config))
    if unknown := [name for name in allowed if name not in _WHY and checks.type_of(name) is None]:
        raise ConfigError([f"--allow {name} : no such thing (allowed: data, model, or a key)" for name in unknown])
    refused = [
        f"{name}: {before} -> {now} : {_WHY.get(name, 'the run began with the first')} "
        f"(--allow {name} goes on nevertheless)"
        for name, (before, now) in found.items()
        if name not in allowed
    ]
    if refused:
        raise ConfigError([f"{run.path}: {problem}" for problem in refused])
    for name, (before, now) in found.items():
        log.warning("%s: %s -> %s, allowed: the result is not that of an undisturbed run", name, before, now)


def _changes(record: dict[str, Any], config: Config) -> Iterator[tuple[str, tuple[Any, Any]]]:
    before, now = configs.flat(record.get("config", {})), configs.flat(configs.to_dict(config))
    for key in before | now if before else ():
        known = (key in before and key in now) or checks.is_open(key)  # else it is of a later version, at its default
        if known and before.get(key) != now.get(key) and not key.startswith(_FREE):
            yield key, (before.get(key), now.get(key))
    for key, here in provenance.resolved(config).items():
        if (there := record.get("resolved", {}).get(key, here)) != here:
            yield key, (there, here)
    for name, was, ask in (
        ("data", record["data_fingerprint"], lambda: fingerprint(config.data)),
        ("model", record["model"]["fingerprint"], lambda: provenance.model_fingerprint(config)),
    ):
        try:
            found = ask()
        except (PreflightError, RunError) as error:  # gone, or the hub is not there: what is needed of it is in the run
            log.warning("%s could not be compared with what the run began with: %s", name, error)
            continue
        if found != was:
            yield name, (was, found)
