"""The shims that a test's claim rests on do what they say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.distributed.starting import environment

PROGRAM = """
from sft_lab import config, embedded, model, schema
config.compose(["model=tiny_llama"]) if {composes} else model.load_tokenizer(schema.ModelConfig(path=embedded.resolve(
    "embedded:tiny_llama")))("text")
"""


@pytest.mark.parametrize("composes", [True, False], ids=["compose", "tokenize"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_does_what_only_the_first_may_fails(composes: bool, rank: str) -> None:
    env = {**os.environ, **environment("ranks_only_train"), "RANK": rank}
    program = [sys.executable, "-c", PROGRAM.format(composes=composes)]
    ended = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    refused = "AssertionError: a rank composes, or makes text into tokens" in ended.stderr
    assert (refused, ended.returncode) == ((True, 1) if rank == "1" else (False, 0)), ended.stderr
