"""Lets every rank fail that makes text into tokens, and nothing else.

The ranks that the command starts have a program of their own. Of those that torchrun starts the first one prepares the
data before it trains.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.shims.importing import once_imported


def _refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a rank makes text into tokens")


def _without_tokenizing(module: Any) -> None:
    for name in ("__call__", "encode", "apply_chat_template"):
        setattr(module.PreTrainedTokenizerBase, name, _refuse)


if "sft_lab.worker" in sys.orig_argv or os.environ.get("RANK", "0") != "0":
    once_imported("transformers.tokenization_utils_base", _without_tokenizing)
