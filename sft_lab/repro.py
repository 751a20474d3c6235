"""Whether a run made again is the same: what differs from its record beforehand, and in its result afterwards."""

from __future__ import annotations

import filecmp
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_lab import checks, provenance
from sft_lab import config as configs
from sft_lab.data.prepare import fingerprint
from sft_lab.errors import ConfigError
from sft_lab.runs import RunDirectory, read_json
from sft_lab.schema import Config

_MUST_BE_THE_SAME = {
    "data": "the data is not what this run trained on",
    "model": "the base model is not what this run started from",
}


@dataclass(frozen=True)
class Difference:
    """A value of provenance.json, named by where it stands there, and what it would be now."""

    what: str
    recorded: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what}: {self.recorded} -> {self.now}"

    @property
    def part(self) -> str:
        """What it concerns, as --allow names it: data, model, code, packages or hardware."""
        first = self.what.split(".")[0]
        parts = {"data_fingerprint": "data", "git": "code", "installed": "packages", "resolved": "hardware"}
        return parts.get(first, first)

    @property
    def real(self) -> bool:
        return bool(self.recorded != self.now)


# --------------------------------------------------------------------------------------------------- before training


def record_of(run: RunDirectory) -> tuple[Config, dict[str, Any]]:
    """The config and the provenance of a run that was completed.

    Raises:
        ConfigError: it was not, or what it left cannot be run again or compared with.
    """
    state = read_json(run.status)["state"] if run.status.is_file() else "unknown"
    if state != "completed":
        raise ConfigError(
            f"{run.path}: the run's state is {state}, there is no result to compare with; "
            f"`python -m sft_lab resume {run.path}` goes on with it"
        )
    for path in (run.provenance, run.result, run.adapter):
        if not path.exists():
            raise ConfigError(f"{run.path}: {path.name} is missing, there is nothing to compare with")
    config = configs.load(run.config)
    if problems := checks.missing_files(config):
        raise ConfigError(problems)
    return config, read_json(run.provenance)


def differences(record: dict[str, Any], config: Config) -> list[Difference]:
    """What of code, packages, machine, data and model is not as it was recorded.

    Raises:
        PreflightError: the run's data cannot be read.
        RunError: data or model that are not local cannot be had.
    """
    now = provenance.current(config, fingerprint(config.data))
    found = [*_code(record["git"], now["git"]), *_packages(record, now)]
    for name in ("machine", "cpus", "cpu_capability", "torch_threads", "gpus"):
        if name in record["hardware"]:
            found.append(Difference(f"hardware.{name}", record["hardware"][name], now["hardware"][name]))
    for key, value in record.get("resolved", {}).items():
        found.append(Difference(f"resolved.{key}", value, now["resolved"][key]))
    found.append(Difference("data_fingerprint", record["data_fingerprint"], now["data_fingerprint"]))
    found.append(Difference("model.fingerprint", record["model"]["fingerprint"], now["model"]["fingerprint"]))
    return [difference for difference in found if difference.real]


def refusals(found: list[Difference], allowed: list[str]) -> list[str]:
    """Why the run is not to be made again: its input is another one, so its result says nothing of the old one."""
    return [
        f"{difference} : {_MUST_BE_THE_SAME[difference.part]} (--allow {difference.part} runs it nevertheless)"
        for difference in found
        if difference.part in _MUST_BE_THE_SAME and difference.part not in allowed
    ]


def _code(recorded: dict[str, Any] | None, now: dict[str, Any] | None) -> list[Difference]:
    if recorded is None or now is None:
        return [Difference("git", _commit(recorded), _commit(now))]
    found = [Difference("git.commit", recorded["commit"], now["commit"])]
    if _changes(recorded) != _changes(now) or (recorded["dirty"] and "diff" not in recorded):
        found.append(Difference("git.diff", _told(recorded), f"{_told(now)}{_which_files(recorded, now)}"))
    return found


def _commit(git: dict[str, Any] | None) -> str:
    return git["commit"] if git else "no git checkout"


def _changes(git: dict[str, Any]) -> list[Any]:
    return [git.get("diff", ""), git.get("untracked", {}), git.get("left_out", [])]


def _told(git: dict[str, Any]) -> str:
    """Uncommitted changes in a few words: their text stands in provenance.json."""
    if not git["dirty"]:
        return "clean"
    if "diff" not in git:
        return "uncommitted changes that were not recorded"
    lines = [line for line in git["diff"].splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return f"{len(lines)} changed lines, {len(git['untracked'])} untracked files"


def _which_files(recorded: dict[str, Any], now: dict[str, Any]) -> str:
    """The files that differ, where both sides say what their changes are."""
    if "diff" not in recorded:
        return ""
    old, new = ({**_by_file(git["diff"]), **git["untracked"]} for git in (recorded, now))
    files = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f" (not alike: {', '.join(files)})" if files else ""


def _by_file(diff: str) -> dict[str, str]:
    """A diff's parts by the file that they change."""
    parts = f"\n{diff}".split("\ndiff --git ")[1:]
    return {part.splitlines()[0].split(" b/")[-1]: part for part in parts}


def _packages(record: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """Those named first; of the others every one that is installed on one of the two sides."""
    known = {**now["installed"], **now["packages"]}
    found = [
        Difference(f"packages.{name}", version, known.get(name, "not installed"))
        for name, version in record["packages"].items()
    ]
    if "installed" not in record:
        return found
    old, new = record["installed"], now["installed"]
    told = {provenance.canonical(difference.what.removeprefix("packages.")) for difference in found if difference.real}
    others = sorted((old.keys() | new.keys()) - told)
    return found + [
        Difference(f"installed.{name}", old.get(name, "not installed"), new.get(name, "not installed"))
        for name in others
    ]


# ---------------------------------------------------------------------------------------------------- after training


def compare(old: RunDirectory, new: RunDirectory) -> dict[str, Any]:
    """How the two runs' results differ.

    Returns:
        adapter_equal (to the byte), max_abs_difference (None where tensors' names or shapes differ), tensor (where it
        is), metrics {name: [old, new]}, same.
    """
    before, after = (read_json(run.result)["metrics"] for run in (old, new))
    metrics = {name: [before.get(name), after.get(name)] for name in {**before, **after}}
    equal = _same_bytes(old.adapter, new.adapter)
    difference, tensor = (0.0, None) if equal else largest_difference(old.adapter, new.adapter)
    return {
        "adapter_equal": equal,
        "max_abs_difference": difference,
        "tensor": tensor,
        "metrics": metrics,
        "same": equal and all(one == other for one, other in metrics.values()),
    }


def _same_bytes(old: Path, new: Path) -> bool:
    names = [file.name for file in _weights(old)]
    return names == [file.name for file in _weights(new)] and all(
        filecmp.cmp(old / name, new / name, shallow=False) for name in names
    )


def _weights(adapter: Path) -> list[Path]:
    return sorted(adapter.glob("*.safetensors"))


def largest_difference(old: Path, new: Path) -> tuple[float | None, str | None]:
    """Between the weights of two adapters, and the tensor that has it; no number where they have different tensors."""
    before, after = _tensors(old), _tensors(new)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or before[name].shape != after[name].shape:
            return None, name
    worst = {name: float((before[name].double() - after[name].double()).abs().max()) for name in before}
    tensor = max(worst, key=lambda name: worst[name])
    return worst[tensor], tensor


def _tensors(adapter: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in _weights(adapter) for name, tensor in load_file(file).items()}


def as_dicts(found: list[Difference]) -> list[dict[str, Any]]:
    return [asdict(difference) for difference in found]
