"""What a message says of itself beside its words: whether it is learned, and what would change how it is learned.

Other tools have keys for what `"weight": 0` is here. Those that mean one thing everywhere are taken; one that is known
to change how a message trains, and that cannot be taken, refuses it by name.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sft_lab.data.values import RowError, holds

# Key: the value with which a turn is learned. Of OpenAI, Axolotl, xtuner and ms-swift, LLaMA-Factory, verl, slime;
# torchtune says the opposite.
_SWITCHES: dict[str, bool] = {
    **dict.fromkeys(
        ("weight", "train", "training", "loss", "loss_weight", "loss_scale", "loss_mask", "trainable"), True
    ),
    "step_loss_mask": True,
    "masked": False,
}
_NUMBERS = ("weight", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask")  # the others are true or false
_ASKS = _SWITCHES.keys() - {"weight", "masked"}  # the two are often written on every message
_LOOKS_LIKE_A_SWITCH = re.compile(r"(^|_)(loss|mask|masked|train|training|trainable|learn|weights?)(_|$)")


class _Known(NamedTuple):
    """A key that changes how a message of these roles trains (of any, where none is named).

    harmless: values with which it does not.
    """

    why: str
    roles: tuple[str, ...] = ()
    harmless: tuple[Any, ...] = ()


_MEDIA = _Known("which is not read: only words are learned")
_OPEN = _Known("so the answer goes on and its end is not to be learned", ("assistant",), (False, 0))
_ENDED = _Known("so the answer goes on and its end is not to be learned", ("assistant",), (True, 1))
_THOUGHT = _Known("which is not read (a thought is, under reasoning_content, reasoning or thinking)", ("assistant",))
_OF_THE_ROW = _Known("which is read as a column of the row alone")
_KNOWN: dict[str, _Known] = {
    **dict.fromkeys(("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio"), _MEDIA),
    **dict.fromkeys(("prefix", "prefill", "partial"), _OPEN),
    **dict.fromkeys(("end_turn", "eot"), _ENDED),
    **dict.fromkeys(("thought", "thoughts", "thinking_content", "reasoning_text"), _THOUGHT),
    **dict.fromkeys(("reasoning_details", "thinking_blocks", "tool_plan"), _THOUGHT),
    **dict.fromkeys(("tools", "functions", "documents"), _OF_THE_ROW),
    "function_calls": _Known("which is not read (calls are, under tool_calls)"),
    "context": _Known("which is not read (allowed: in the content)"),
    "recipient": _Known("which no chat template is told", ("assistant",), ("all", "user")),
    "channel": _Known("which no chat template is told", ("assistant",), ("final",)),
    "ipython": _Known("so it is a call of a tool (allowed: as tool_calls)", ("assistant",), (False, 0)),
    "refusal": _Known("which is not read (allowed: as content)", ("assistant",)),
}


def learned(message: Mapping[str, Any], where: str) -> bool | None:
    """What the keys of a message say of whether it is learned; None where none of them says anything.

    Raises:
        RowError: one has a value between, or none that is known, or two contradict each other.
    """
    said: dict[str, bool] = {}
    for key in _SWITCHES.keys() & message.keys():
        value = message[key]
        if value is None or value == "":
            continue
        if value not in (0, 1):  # which true and false are, too
            allowed = "0, 1" if key in _NUMBERS else "true, false"
            raise RowError(f"{where} has {key} {reprlib.repr(value)} (allowed: {allowed})")
        said[key] = bool(value) == _SWITCHES[key]
    if len(set(said.values())) > 1:
        both = " and ".join(f"{key} {str(message[key]).lower()}" for key in _SWITCHES if key in said)
        raise RowError(f"{where} has {both}, which contradict each other")
    return next(iter(said.values()), None)


def asks(message: Mapping[str, Any]) -> bool:
    """Whether a message that is learned says so by a key that nobody writes on every message."""
    return any(message.get(key) not in (None, "") for key in _ASKS & message.keys())


SWITCHES = _SWITCHES.keys()


def check_unread(message: Mapping[str, Any], left: Iterable[str], role: str, where: str, thought: bool) -> list[str]:
    """Those of the keys `left`, which nothing reads, that hold a value.

    thought: whether one was read, under another key.

    Raises:
        RowError: a key is known to change how the message trains.
    """
    found = []
    for key in left:
        value = message[key]
        if not holds(value):
            continue
        known = _KNOWN.get(key)
        if known is None and _LOOKS_LIKE_A_SWITCH.search(key) and not isinstance(value, str):
            known = _Known(f"a switch of the loss that is not known (known: {', '.join(_SWITCHES)})")
        if known is None or (known.roles and role not in known.roles) or value in known.harmless:
            found.append(key)
        elif not (known is _THOUGHT and thought):
            way = f"data.ignore_columns=[{key}] takes it for nothing"
            raise RowError(f"{where} has {key} {reprlib.repr(value)}, {known.why} ({way})")
    return found
