"""`env`: versions, devices, what a run here will use and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sft_lab env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args(argv)
    facts = _collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, values in facts.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:<18}{value}")
    return 0


def _collect() -> dict[str, dict[str, Any]]:
    from sft_lab import config as configs
    from sft_lab import embedded, provenance
    from sft_lab import model as models
    from sft_lab.options import CONF_DIR

    config = configs.to_config(configs.compose([]))
    precision = models.resolve_precision(config)
    return {
        "versions": provenance.package_versions(),
        "hardware": provenance.hardware(),
        "a run here uses": {
            "device": models.device(),
            "precision": f"{precision.training} ({precision.why})",
            "attention": config.model.attn_implementation,
            "tracking": f"{config.tracking.method}, mode {config.tracking.mode}",
            "cache": str(embedded.cache_root()),
            "conf": str(CONF_DIR),
        },
    }
