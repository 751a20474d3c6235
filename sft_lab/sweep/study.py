"""Optuna's study of a sweep: where it is kept, how it samples and prunes, what trials it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from sft_lab import checks, directories
from sft_lab.errors import ConfigError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

SAMPLERS = ("tpe", "cmaes", "random", "grid")
PRUNERS = ("none", "median", "successive_halving")


def distributions_of(overrides: Sequence[Override], values: Mapping[str, list[str]]) -> dict[str, BaseDistribution]:
    """What each swept key may be: an interval (log where it is tagged so), a range, or one of `values`.

    Raises:
        ConfigError: an interval that is none.
    """
    from optuna import distributions as d

    space: dict[str, BaseDistribution] = {}
    for override in overrides:
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            assert value.start is not None
            assert value.end is not None
            log = "log" in value.tags
            if value.start >= value.end or (log and value.start <= 0):
                raise ConfigError(
                    f"{override.input_line} : not an interval (allowed: interval(LOW, HIGH)"
                    f"{', both above 0 where it is tagged log' if log else ''})"
                )
            if checks.type_of(key) is int:
                space[key] = d.IntDistribution(int(value.start), int(value.end), log=log)
            else:
                space[key] = d.FloatDistribution(float(value.start), float(value.end), log=log)
        elif isinstance(value, RangeSweep) and checks.type_of(key) is int:
            whole = [int(text.split("=")[1]) for text in values[key]]
            step = whole[1] - whole[0] if len(whole) > 1 else 1
            space[key] = d.IntDistribution(min(whole), max(whole), step=abs(step))
        else:
            space[key] = d.CategoricalDistribution([text.removeprefix(f"{key}=") for text in values[key]])
    return space


def ends_of(override: Override) -> list[str]:
    """Both ends of an interval, as overrides; none of anything else."""
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return []
    return [f"{override.get_key_element()}={end}" for end in (value.start, value.end)]


def require_same_choices(study: optuna.Study, space: Mapping[str, BaseDistribution]) -> None:
    """
    Raises:
        ConfigError: the study knows other choices of a key, which Optuna cannot add to.
    """
    for trial in study.trials:
        for key, before in trial.distributions.items():
            choices = getattr(before, "choices", None)
            if key in space and choices and choices != getattr(space[key], "choices", None):
                raise ConfigError(
                    f"{key} : this search was begun with {', '.join(map(str, choices))}, and knows no others "
                    "(allowed: the same, or another sweep.name)"
                )


def require_known(sampler: str, pruner: str, space: Mapping[str, BaseDistribution]) -> None:
    """
    Raises:
        ConfigError: no such sampler or pruner, or a grid of something that has no single values.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    problems = [
        checks.not_among(f"hydra.sweeper.{key}={given}", "not allowed", given, allowed)
        for key, given, allowed in (("sampler", sampler, SAMPLERS), ("pruner", pruner, PRUNERS))
        if given not in allowed
    ]
    if sampler == "grid":
        problems += [
            f"{key}=interval(...) : sampler=grid needs single values (allowed: values, or sampler=tpe, cmaes, random)"
            for key, distribution in space.items()
            if isinstance(distribution, FloatDistribution)
        ]
    if sampler == "cmaes" and all(isinstance(each, CategoricalDistribution) for each in space.values()):
        problems.append(
            "hydra.sweeper.sampler=cmaes : varies numbers, and there are only choices (allowed: tpe, random, grid)"
        )
    if problems:
        raise ConfigError(problems)


def sampler_of(name: str, seed: int, number: int, space: Mapping[str, BaseDistribution]) -> Any:
    """The sampler for trial `number`. One that is seeded alike in each process would repeat its first trials."""
    from optuna import samplers

    own = seed * 100_003 + number
    if name == "grid":  # by number, in an order that the seed alone decides
        return samplers.GridSampler({key: grid_values(each) for key, each in space.items()}, seed=seed)
    if name == "cmaes":
        return samplers.CmaEsSampler(seed=own, warn_independent_sampling=False)
    return samplers.TPESampler(seed=own) if name == "tpe" else samplers.RandomSampler(seed=own)


def grid_values(distribution: Any) -> list[Any]:
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return list(range(distribution.low, distribution.high + 1, distribution.step))


def pruner_of(name: str, warmup_steps: int) -> Any:
    """`warmup_steps` training steps go by before the median decides; halving begins at the first evaluation."""
    from optuna import pruners

    if name == "median":
        return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=warmup_steps)
    if name == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource="auto", reduction_factor=2)
    return pruners.NopPruner()


def storage_of(place: str) -> Any:
    """A database for an address such as sqlite:///study.db, else a journal in a file, which shared disks can keep.

    Raises:
        ConfigError: the database cannot be opened.
    """
    from optuna import storages
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    if "://" not in place:
        directories.require_journal(Path(place))
        return storages.JournalStorage(JournalFileBackend(place))
    try:
        return storages.RDBStorage(place)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"hydra.sweeper.storage={place} : cannot be opened ({reason})") from error


def quieten() -> None:
    """Optuna tells of each trial on its own; ours does."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_trial(place: Mapping[str, Any]) -> tuple[optuna.trial.Trial, set[int]]:
    """A running trial, in whichever process, and the steps that it has reported."""
    import optuna

    quieten()
    pruner = pruner_of(place["pruner"], place["warmup_steps"])
    study = optuna.load_study(study_name=place["study"], storage=storage_of(place["storage"]), pruner=pruner)
    (trial,) = [each for each in study.trials if each.number == place["number"]]
    return optuna.trial.Trial(study, trial._trial_id), set(trial.intermediate_values)
