"""What can go wrong, and the exit code that tells it.

SftLabError                1
├── ConfigError            2   the config is at fault: keys, values, contradictions
│   └── InUse              2   another process works on that run or sweep
├── PreflightError         2   the data or the machine cannot give what the config asks for
├── RunError               1   a run failed
├── Interrupted      130/143   Ctrl-C or SIGTERM (138, 140: SIGUSR1, SIGUSR2); `resume` goes on from the last checkpoint
└── Pruned                     a sweep's search gave the trial up; no failure, and `resume` would go on with it
"""

from __future__ import annotations

import signal
from collections.abc import Sequence


class SftLabError(Exception):
    """Base of every error whose text is meant for the person at the terminal."""

    exit_code = 1


class _ProblemList(SftLabError):
    exit_code = 2

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(_ProblemList):
    """One or more problems of the config, each naming the key as typed, what was given and what is allowed."""


class InUse(ConfigError):
    """Another process works on the run or sweep that was asked for."""


class PreflightError(_ProblemList):
    """One or more problems of the input found before training, each naming the file and row."""


class RunError(SftLabError):
    """A run that could not go on."""


class Interrupted(SftLabError):
    """A run stopped by a signal; the exit code is the shell's 128 + signal number."""

    def __init__(self, signum: int):
        self.signum, self.exit_code = signum, 128 + signum
        self.warned = signum in (signal.SIGUSR1, signal.SIGUSR2)  # by a cluster, that the job's time is over
        super().__init__(f"interrupted by {signal.Signals(signum).name}")


class Pruned(SftLabError):
    """A trial that a search stopped after `step`, because others had got further by then."""

    def __init__(self, step: int, reason: str):
        self.step, self.reason = step, reason
        super().__init__(f"given up at step {step}: {reason}")


class Leave(SystemExit):
    """Carries an error out through Hydra, which would print a traceback for an Exception."""

    def __init__(self, error: SftLabError):
        self.error = error
        super().__init__(error.exit_code)
