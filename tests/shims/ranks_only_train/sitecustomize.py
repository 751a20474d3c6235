"""Lets every rank fail that composes a config or makes text into tokens, and nothing else.

The ranks that the command starts have a program of their own. Of those that torchrun or Slurm starts the first one
prepares the run before it trains.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.shims.importing import once_imported


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a rank composes, or makes text into tokens")


def _without_tokenizing(module: Any) -> None:
    for name in ("__call__", "encode", "apply_chat_template"):
        setattr(module.PreTrainedTokenizerBase, name, _refuse)


def _without_composing(module: Any) -> None:
    module.compose = _refuse


if "sft_lab.worker" in sys.orig_argv or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
    once_imported("transformers.tokenization_utils_base", _without_tokenizing)
    once_imported("hydra.compose", _without_composing)
