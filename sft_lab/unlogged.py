"""What a run has counted by a checkpoint, and not logged in full.

It lies in the checkpoint, so that a run that goes on from there logs what it would have logged: in each session the
Trainer sums its loss from zero, and TRL begins its means anew.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sft_lab import ranks
from sft_lab.errors import RunError
from sft_lab.runs import read_json, write_json

_FILE = "unlogged.json"


@dataclass
class Unlogged:
    """As it stands at a checkpoint; at the beginning of a run nothing.

    Attributes:
        events: lines of metrics.jsonl.
        tokens: that training has passed through the model, over all ranks.
        time_s: seconds spent training, over all sessions.
        of_ranks: for each rank the sum of its losses since `logged_at`, the last step that was logged, the values of
            which TRL will log means, and the tokens that TRL has counted.
    """

    events: int = 0
    tokens: int = 0
    time_s: float = 0.0
    of_ranks: list[dict[str, Any]] = field(default_factory=list)


def at(checkpoint: Path | None) -> Unlogged:
    return Unlogged(**read_json(checkpoint / _FILE)) if checkpoint else Unlogged()


def keep(checkpoint: Path, trainer: Any, events: int, tokens: int, time_s: float) -> None:
    """Write it into a checkpoint; all ranks come here together, and the first one writes."""
    mine = {
        "loss": trainer._tr_loss.item(),  # of 32 bits, which JSON keeps
        "logged_at": trainer._globalstep_last_logged,
        "means_of": dict(trainer._metrics["train"]),
        "num_tokens": trainer._total_train_tokens,
    }
    of_ranks = ranks.gathered(mine)
    if broken := [rank["loss"] for rank in of_ranks if not math.isfinite(rank["loss"])]:
        raise RunError(f"loss is {broken[0]} at step {trainer.state.global_step}: training has diverged")
    if ranks.leads():
        write_json(checkpoint / _FILE, asdict(Unlogged(events, tokens, time_s, of_ranks)))


def restore(unlogged: Unlogged, trainer: Any) -> None:
    """Have the Trainer, whose counts stand at zero, count on from there; nothing for a run that begins.

    Ranks that are more or fewer than before take what these had on average: all of it but the losses is alike.
    """
    if not unlogged.of_ranks:
        return
    average = sum(rank["loss"] for rank in unlogged.of_ranks) / len(unlogged.of_ranks)
    same = len(unlogged.of_ranks) == ranks.size()
    mine = unlogged.of_ranks[ranks.index()] if same else {**unlogged.of_ranks[0], "loss": average}
    trainer._tr_loss += mine["loss"]
    trainer._total_loss_scalar -= average  # of this session alone, by whose steps the Trainer divides it at the end
    trainer._globalstep_last_logged = mine["logged_at"]
    trainer._metrics["train"].update(mine["means_of"])
    trainer._total_train_tokens = mine["num_tokens"]
