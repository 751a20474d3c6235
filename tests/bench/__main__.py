"""Measurements, side by side in one run: `python -m tests.bench [NAME ...]`, or `make bench`.

Each bench is a function without arguments in BENCHES that prints one table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.bench.million import million
from tests.bench.packing import packing
from tests.bench.scaling import scaling
from tests.bench.startup import startup
from tests.bench.sweep import memory, sweep

BENCHES: dict[str, Callable[[], None]] = {
    "startup": startup,
    "packing": packing,
    "million": million,
    "sweep": sweep,
    "memory": memory,
    "scaling": scaling,
}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        sys.exit(f"no such bench: {', '.join(unknown)} (there are: {', '.join(BENCHES)})")
    for name in names or BENCHES:
        BENCHES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
