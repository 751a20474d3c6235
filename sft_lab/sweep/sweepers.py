"""Hydra's side of a sweep: what was typed becomes trials, and trials become runs.

Hydra takes plugins whose names begin with `hydra_plugins` alone; `register` gives ours such names, so that no second
package has to be installed beside this one.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sft_lab import command_line, outside
from sft_lab import config as configs
from sft_lab.composing import COMPOSE_ERRORS
from sft_lab.errors import ConfigError, Interrupted, Leave, RunError, SftLabError
from sft_lab.schema import SweepConfig
from sft_lab.sweep import conduct, trial
from sft_lab.sweep.ledger import SweepDirectory, Trial
from sft_lab.sweep.plan import Candidate

_SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher."
_EXTRAS = {  # of the classes in conf/hydra/launcher/
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher": ("joblib", "launchers"),
    f"{_SUBMITIT}LocalLauncher": ("local", "launchers"),
    f"{command_line.SWEEPERS}SlurmLauncher": ("slurm", "launchers"),
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher": ("ray", "ray"),
}
_HERE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher", "RayLauncher")  # they start processes of this machine


def register() -> None:
    """Make conf/hydra/sweeper/ and conf/hydra/launcher/ known to Hydra; may be called again."""
    from sft_lab.sweep.search import OptunaSweeper

    plugins = Plugins.instance()
    ours: list[type[Sweeper] | type[Launcher]] = [GridSweeper, OptunaSweeper]
    if f"{_SUBMITIT}SlurmLauncher" in plugins.class_name_to_class:
        from sft_lab.sweep.slurm import SlurmLauncher

        ours.append(SlurmLauncher)
    for plugin in ours:
        plugins.register(plugin)
        plugins.class_name_to_class[f"{command_line.SWEEPERS}{plugin.__name__}"] = plugin


def require_launcher(target: str) -> None:
    """
    Raises:
        ConfigError: the package that the launcher comes with is not installed.
    """
    if target in _EXTRAS and target not in Plugins.instance().class_name_to_class:
        name, extra = _EXTRAS[target]
        raise ConfigError(
            f"hydra/launcher={name} : needs a package that is not installed (allowed: hydra/launcher=basic; or "
            f"pip install 'sft-lab[{extra}]')"
        )


class GridSweeper(Sweeper):
    """Every combination of the values given, each once."""

    def __init__(self, params: dict[str, str] | None = None):
        self.launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """
        Raises:
            Leave: with a ConfigError; the launcher cannot be had here.
        """
        try:
            require_launcher(str(config.hydra.launcher._target_))
        except ConfigError as error:
            raise Leave(error) from error
        self.config: DictConfig = config
        self.loader = hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """
        Raises:
            Leave: with the error of ours that ended it.
        """
        try:
            self.carry_out(self.parsed(arguments))
        except SftLabError as error:
            raise Leave(error) from error
        except OSError as error:  # the sweep's own files; a trial's are the trial's affair
            raise Leave(RunError(f"sweep {self.directory.name}: {error}")) from error

    def carry_out(self, overrides: Sequence[Override]) -> None:
        unbounded = [o.input_line for o in overrides if o.is_sweep_override() and not o.is_discrete_sweep()]
        if unbounded:
            raise ConfigError(
                [
                    f"{text} : a grid needs single values (allowed: values, or hydra/sweeper=optuna)"
                    for text in unbounded
                ]
            )
        conduct.grid((self.compose(words, varied) for words, varied in _combinations(overrides)), self)

    # ------------------------------------------------------------------------------------------ what a sweep needs

    def parsed(self, arguments: Sequence[str]) -> list[Override]:
        """The overrides of a sweep's file and of the command line, which win."""
        parser = OverridesParser.create(config_loader=self.loader)
        found = parser.parse_overrides([*command_line.sweep_params(self.config), *arguments])
        overrides = {override.get_key_element(): override for override in found}
        for key, override in overrides.items():
            if key.startswith("sweep.") and override.is_sweep_override():
                raise ConfigError(f"{override.input_line} : is of the whole sweep (allowed: one value)")
        return list(overrides.values())

    @property
    def in_this_process(self) -> bool:
        return self._launchers_kind == "BasicLauncher"

    @property
    def _launchers_kind(self) -> str:
        """The class by its name: Hydra reads its plugins' modules anew, and has classes of its own of them."""
        return str(self.config.hydra.launcher._target_).rpartition(".")[2]

    @functools.cached_property
    def elsewhere(self) -> bool:
        """Whether the launcher has other machines train, such as a cluster's; of an unknown one that is assumed."""
        joins = OmegaConf.select(self.config.hydra.launcher, "ray.init.address") or os.environ.get("RAY_ADDRESS")
        return self._launchers_kind not in _HERE or (self._launchers_kind == "RayLauncher" and bool(joins))

    def _processes(self) -> int:
        """What distributed.num_processes=0 comes to where trials train, whichever machine plans them.

        Raises:
            ConfigError: nobody says it.
        """
        if not self.elsewhere:
            return outside.processes()
        keys = ("nodes", "tasks_per_node", "gpus_per_node")
        nodes, tasks, gpus = (OmegaConf.select(self.config.hydra.launcher, key) for key in keys)
        each = tasks if tasks and tasks > 1 else gpus  # tasks that share a node are ranks, one alone starts one a GPU
        if not each or not isinstance(each, int):
            also = ", hydra.launcher.gpus_per_node=N" if "gpus_per_node" in self.config.hydra.launcher else ""
            raise ConfigError(
                "distributed.num_processes=0 : is one a GPU where trials train, and hydra/launcher="
                f"{self.config.hydra.runtime.choices['hydra/launcher']} does not say how many those are "
                f"(allowed: distributed.num_processes=N{also})"
            )
        return (nodes or 1) * each

    @functools.cached_property
    def directory(self) -> SweepDirectory:
        return SweepDirectory(str(self.config.hydra.sweep.dir))

    @functools.cached_property
    def settings(self) -> SweepConfig:
        return configs.sweep_settings(self.config)

    def compose(self, words: Sequence[str], varied: Sequence[str]) -> Candidate:
        """A trial's config as Hydra would compose it for a job, or what is wrong with it."""
        try:
            cfg = self.loader.load_sweep_config(self.config, list(words))
            config = configs.to_config(cfg, self._processes)
        except ConfigError as error:
            return Candidate(list(varied), list(words), None, error.problems)
        except COMPOSE_ERRORS as error:
            return Candidate(list(varied), list(words), None, [str(error).strip().splitlines()[0]])
        config.sweep.name = self.directory.name
        tracking = config.tracking
        tracking.group = tracking.group or self.directory.name
        tracking.job_type = "trial" if tracking.job_type == "train" else tracking.job_type
        tracking.tags = [*tracking.tags, *varied]
        return Candidate(list(varied), list(words), config, [])

    def launch(self, trials: Sequence[Trial], watch: trial.Watch) -> None:
        """Run trials in this process, in processes of their own, or through Hydra's launcher."""
        if not self.in_this_process:
            for begun in trials:
                watch.begins(begun)
            self._through_launcher(trials)
            for ended in trials:
                watch.ends(trial.settled(self.directory, ended.id))
        elif self.settings.isolate:
            trial.run_isolated(trials, self.directory, watch)
        else:
            trial.run_all(trials, self.directory, watch)

    def _through_launcher(self, trials: Sequence[Trial]) -> None:
        """Hydra composes each job once more, in its process; the task then runs what was planned, by the directory."""
        place = [f"hydra.sweep.dir={_quoted(str(self.directory.path))}", f"sweep.name={_quoted(self.directory.name)}"]
        jobs = [[*job.typed, *place, f"hydra.sweep.subdir={job.id}"] for job in trials]
        try:
            self.launcher.launch(jobs, initial_job_idx=0)
        except Interrupted:
            raise
        except Exception as error:  # a launcher's own: a worker that was killed, say; each trial's state tells the rest
            conduct.log.warning("the launcher ended with %s: %s", type(error).__name__, error)


def _combinations(overrides: Sequence[Override]) -> Iterator[tuple[list[str], list[str]]]:
    """The words of each trial, and those of them that vary."""
    fixed = [o.input_line for o in overrides if not o.is_sweep_override()]
    swept: list[Iterable[str]] = [values_of(o) for o in overrides if o.is_sweep_override()]
    for varied in itertools.product(*swept):
        yield [*(text for text in fixed if text), *varied], list(varied)


def _quoted(text: str) -> str:
    """A text as Hydra's grammar takes any."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def values_of(override: Override) -> list[str]:
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
