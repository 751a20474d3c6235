"""How processes that were started together, from outside, tell each other what to do.

The first of them leads: it composes, checks and prepares. The others wait for its word and then take their part from
the run directory, which all of them see. They meet in a `TCPStore`, long before there is a process group, so that no
collective's timeout counts the time that the data takes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from sft_lab import outside
from sft_lab.errors import RunError
from sft_lab.outside import Group

_FAREWELL = timedelta(seconds=10)
_LOOK_S = 0.1
_PATIENCE = timedelta(days=7)  # preparing data has no timeout; the death of the leader ends the waiting too


class Meeting:
    """A group's meeting, opened by each of its processes before anything else.

    The store may outlive them: what started them keeps it, starts them again when one has died, and counts restarts on
    each machine for itself. So a process brings a name of its own, and what is said counts among those alive now.
    """

    def __init__(self, group: Group, store: Any = None):
        self.group = group
        self._store = store or group.store()
        self._name = secrets.token_hex(8)
        self._places = [f"here/{index}" for index in range(group.count)]
        self._shared: Any = None
        self._has_spoken = False
        self._store.set(self._places[group.index], self._name)

    def ranks(self, timeout_min: float) -> Any:
        """The store in which ranks look for each other's addresses, without those that the dead have left behind.

        Raises:
            RunError: some have not come in time, or the first one died.
        """
        from torch.distributed import PrefixStore

        timeout = timedelta(minutes=timeout_min)
        with _in_words(timeout):
            store = PrefixStore("ranks", self._among_those_alive(timeout))
        store.set_timeout(timeout)
        return store

    def all_here(self, timeout_min: float) -> None:
        """Until each has come, and all of an attempt before this one are gone.

        Raises:
            RunError: some have not come in time.
        """
        timeout = timedelta(minutes=timeout_min)
        with _in_words(timeout):
            self._among_those_alive(timeout)

    def all_ready(self, problem: str, timeout_min: float) -> None:
        """Until each of those alive has come here.

        Args:
            problem: why this one cannot go on, if it cannot.

        Raises:
            RunError: on each of them, with the problem of the one that has one; or some have not come in time.
        """
        timeout = timedelta(minutes=timeout_min)
        with _in_words(timeout):
            shared = self._among_those_alive(timeout)
            if problem or shared.add("ready", 1) == self.group.count:
                shared.set("problem", problem)
            problem = _awaited(shared, "problem", timeout)
        if problem:
            raise RunError(problem)

    def _among_those_alive(self, timeout: timedelta) -> Any:
        """A part of the store that is theirs alone: the first one asks each name it finds, until every one answers."""
        from torch.distributed import PrefixStore

        if self._shared is None:
            common = self._ask(timeout) if self.group.leads else self._answer(timeout)
            self._shared = PrefixStore(common, self._store)
        return self._shared

    def _ask(self, timeout: timedelta) -> str:
        until = time.monotonic() + timeout.total_seconds()
        asked: set[str] = set()
        while time.monotonic() < until:
            if self._store.check(self._places):
                names = [name.decode() for name in self._store.multi_get(self._places)]
                for name in {*names} - asked:
                    self._store.set(f"asked/{name}", self._name)
                    asked.add(name)
                if self._store.check([f"alive/{self._name}/{name}" for name in names[1:]]):
                    common = hashlib.sha256(" ".join(names).encode()).hexdigest()
                    for name in names[1:]:
                        self._store.set(f"common/{name}", common)
                    return common
            time.sleep(_LOOK_S)
        raise TimeoutError

    def _answer(self, timeout: timedelta) -> str:
        leader = _awaited(self._store, f"asked/{self._name}", timeout)
        self._store.set(f"alive/{leader}/{self._name}", "")
        return _awaited(self._store, f"common/{self._name}", timeout)

    # -------------------------------------------------------------------------------------------------------- words

    def send_to_run(self, run: str, each: int, timeout_min: float) -> None:
        """Have the others take part in the run in the directory `run`, each starting so many ranks (1: it is one).

        Raises:
            RunError: some have not come in time.
        """
        self._say({"run": run, "each": each}, timedelta(minutes=timeout_min))

    def dismiss(self, exit_code: int) -> None:
        """Let those leave that were told nothing, and wait until they know: where all is well, for late ones too."""
        if self._has_spoken:
            return
        try:
            self._say({"leave": exit_code}, _FAREWELL if exit_code else outside.CONNECT)
        except RunError:  # who started us ends them
            return
        until = time.monotonic() + _FAREWELL.total_seconds()
        while self._shared.add("heard", 0) < self.group.count - 1 and time.monotonic() < until:
            time.sleep(_LOOK_S)

    def _say(self, word: dict[str, Any], timeout: timedelta) -> None:
        self._has_spoken = True
        with _in_words(timeout):
            self._among_those_alive(timeout).set("word", json.dumps(word))

    def told(self) -> dict[str, Any]:
        """What the first one says, however long it takes: `run` and `each`, or to `leave` with that exit code.

        Raises:
            RunError: it died.
        """
        with _in_words(_PATIENCE):
            shared = self._among_those_alive(_PATIENCE)
            word: dict[str, Any] = json.loads(_awaited(shared, "word", _PATIENCE))
            shared.add("heard", 1)
        return word

    def note_run(self, run: str) -> None:
        """Have those that are started after us, if one of us dies, go on with the run in the directory `run`."""
        self._store.set("run", run)

    def earlier_run(self) -> str:
        """The run that was begun when all were started again, by a starter whose store has outlived them."""
        return self._store.get("run").decode() if self._store.check(["run"]) else ""


def _awaited(store: Any, key: str, timeout: timedelta) -> str:
    """What stands under `key` once it is there; looked for again and again, since no signal is heard in a store's wait.

    Raises:
        TimeoutError: it did not come.
    """
    until = time.monotonic() + timeout.total_seconds()
    while not store.check([key]):
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(_LOOK_S)
    return str(store.get(key).decode())


@contextlib.contextmanager
def _in_words(timeout: timedelta) -> Iterator[None]:
    """
    Raises:
        RunError: in a sentence, what a store that is waited for or has gone raises.
    """
    from torch.distributed import DistError

    try:
        yield
    except TimeoutError as error:
        minutes = f"{timeout.total_seconds() / 60:g}"
        raise RunError(f"not all processes have come within distributed.timeout_min={minutes} minutes") from error
    except DistError as error:
        raise RunError(f"the first of the processes ended without a word ({error})") from error


@functools.cache
def current() -> Meeting | None:
    """That of this process's group; None for a process that stands alone."""
    found = outside.group()
    return Meeting(found) if found else None
