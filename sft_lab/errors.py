"""What can go wrong, and the exit code that tells it.

SftLabError                1
├── ConfigError            2   the config is at fault: keys, values, contradictions
├── PreflightError         2   the data or the machine cannot give what the config asks for
├── RunError               1   a run failed
└── Interrupted      130/143   Ctrl-C or SIGTERM; `resume` goes on from the last checkpoint
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


class PreflightError(_ProblemList):
    """One or more problems of the input found before training, each naming the file and row."""


class RunError(SftLabError):
    """A run that could not go on."""


class Interrupted(SftLabError):
    """A run stopped by a signal; the exit code is the shell's 128 + signal number."""

    def __init__(self, signum: int):
        self.exit_code = 128 + signum
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
