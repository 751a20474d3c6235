"""How processes that were started together, from outside, tell each other what to do.

The first of them leads: it composes, checks and prepares. The others wait for its word and then take their part from
the run directory, which all of them see. They meet in a `TCPStore`, long before there is a process group, so that no
collective's timeout counts the time that the data takes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import time
from datetime import timedelta
from typing import Any

from sft_lab import outside
from sft_lab.errors import RunError
from sft_lab.outside import Group

_FAREWELL_S = 10
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
        store = PrefixStore("ranks", self._among_those_alive(timeout))
        store.set_timeout(timeout)
        return store

    def _among_those_alive(self, timeout: timedelta) -> Any:
        """A part of the store that is theirs alone: the first one asks each name it finds, until every one answers."""
        from torch.distributed import DistError, DistStoreError, PrefixStore

        if self._shared is None:
            try:
                common = self._ask(timeout) if self.group.leads else self._answer(timeout)
            except (TimeoutError, DistStoreError) as error:
                minutes = timeout.total_seconds() / 60
                raise RunError(
                    f"not all of {self.group.count} processes have come within {minutes:g} minutes"
                ) from error
            except DistError as error:
                raise RunError(f"the first of {self.group.count} processes ended without a word ({error})") from error
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
            time.sleep(0.05)
        raise TimeoutError

    def _answer(self, timeout: timedelta) -> str:
        self._store.wait([f"asked/{self._name}"], timeout)
        leader = self._store.get(f"asked/{self._name}").decode()
        self._store.set(f"alive/{leader}/{self._name}", "")
        self._store.wait([f"common/{self._name}"], timeout)
        return str(self._store.get(f"common/{self._name}").decode())

    def all_ready(self, problem: str = "") -> None:
        """Until each of those alive has come here, however long the others take.

        Args:
            problem: why this one cannot go on.

        Raises:
            RunError: on each of them, with the problem of the one that has one.
        """
        shared = self._among_those_alive(_PATIENCE)
        if problem or shared.add("ready", 1) == self.group.count:
            shared.set("problem", problem)
        shared.wait(["problem"], _PATIENCE)
        if told := shared.get("problem").decode():
            raise RunError(told)

    # -------------------------------------------------------------------------------------------------------- words

    def send_to_run(self, run: str, each: int, timeout_min: float) -> None:
        """Have the others take part in the run in the directory `run`, each starting so many ranks (1: it is one).

        Raises:
            RunError: some have not come in time.
        """
        self._say({"run": run, "each": each}, timedelta(minutes=timeout_min))
        self._store.set("run", run)

    def dismiss(self, exit_code: int) -> None:
        """Let those leave that were told nothing, and wait until they know."""
        if self._has_spoken:
            return
        try:
            self._say({"leave": exit_code}, timedelta(seconds=_FAREWELL_S))
        except RunError:  # who comes later finds nobody
            return
        until = time.monotonic() + _FAREWELL_S
        while self._shared.add("heard", 0) < self.group.count - 1 and time.monotonic() < until:
            time.sleep(0.05)

    def _say(self, word: dict[str, Any], timeout: timedelta) -> None:
        self._has_spoken = True
        self._among_those_alive(timeout).set("word", json.dumps(word))

    def told(self) -> dict[str, Any]:
        """What the first one says, however long it takes: `run` and `each`, or to `leave` with that exit code.

        Raises:
            RunError: it died.
        """
        shared = self._among_those_alive(_PATIENCE)
        shared.wait(["word"], _PATIENCE)
        word: dict[str, Any] = json.loads(shared.get("word"))
        shared.add("heard", 1)
        return word

    def earlier_run(self) -> str:
        """The run that was under way when all were started again, by a starter whose store has outlived them."""
        return self._store.get("run").decode() if self._store.check(["run"]) else ""


@functools.cache
def current() -> Meeting | None:
    """That of this process's group; None for a process that stands alone."""
    found = outside.group()
    return Meeting(found) if found else None
