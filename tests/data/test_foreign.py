"""Files made for other methods and other tools: each trains what it means, or is refused by name."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Audio, Dataset, DatasetDict, Features, Image, Value

from sft_lab import config as configs
from sft_lab import findings
from sft_lab.data import sources
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.errors import PreflightError
from sft_lab.schema import Config, DataConfig
from tests.data.preparing import written

USER = {"role": "user", "content": "Name a fruit"}
PEAR = {"role": "assistant", "content": "Pear"}
BAD = {"role": "assistant", "content": "Granite"}
HUMAN, GPT = {"from": "human", "value": "Name a fruit"}, {"from": "gpt", "value": "Pear"}
CHAT, PAIR = {"messages": [USER, PEAR]}, {"prompt": "Name a fruit", "completion": "Pear"}
TWO = [USER, BAD, USER, PEAR]


@cache
def _composed() -> Config:
    words = ["model=tiny_llama", "tracking=none", "data=from_file", "data.path=x", "chat_template=qwen"]
    return configs.to_config(configs.compose(words))


def config_of(path: Path, **settings: Any) -> Config:
    config = copy.deepcopy(_composed())
    config.data.path = str(path)
    for name, value in settings.items():
        setattr(config.data, name, value)
    return config


def learned(data: Prepared) -> list[str]:
    """Of each training row what carries loss, without the ends of turns."""
    rows = ([i for i in row["labels"] if i not in (-100, data.turn_end_id)] for row in data.train)
    return [data.tokenizer.decode(row) for row in rows]


def found(config: Config, data: Prepared) -> dict[str, str]:
    report = findings.Report()
    findings.of_data(config, data, report)
    return {finding["name"]: finding["message"] for finding in report.findings}


def last_two(**flags: Any) -> dict[str, Any]:
    """A conversation of which other tools would not learn the first answer."""
    name, (off, on) = next(iter(flags.items()))
    return {"messages": [USER, {**BAD, name: off}, USER, {**PEAR, name: on}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # KTO, DPO, media: refused
        ({**CHAT, "label": False}, "column label is False, which marks an answer as a bad one (KTO; "),
        ({**PAIR, "label": False}, "column label is False"),
        ({"conversations": [HUMAN, GPT], "kto_tag": False}, "column kto_tag is False"),
        ({"instruction": "a", "output": "b", "label": "False"}, "column label is 'False'"),
        (
            {"prompt": [USER], "chosen": [PEAR], "rejected": [BAD]},
            "data.columns={completion: chosen} trains the chosen",
        ),
        ({"conversations": [HUMAN, GPT, HUMAN], "chosen": GPT, "rejected": GPT}, "column chosen is an answer of a "),
        ({**CHAT, "rejected_response": "Granite"}, "column rejected_response is an answer of a preference row"),
        ({**CHAT, "images": ["cup.png"]}, "column images holds media"),
        (
            {"conversations": [{**HUMAN, "value": "<audio>What?"}, GPT], "audios": ["a.wav"]},
            "column audios holds media",
        ),
        (
            {"conversations": [{**HUMAN, "value": "<video>What?"}, GPT], "videos": ["a.mp4"]},
            "column videos holds media",
        ),
        ({"messages": [{**USER, "images": ["a.png"]}, PEAR]}, "message 1 has images ['a.png']"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, PEAR]}, "part 1 has type 'image' (allowed: "),
        ({"input_ids": [1, 2, 3], "seq_lengths": [2, 1]}, "column seq_lengths says that the row has several documents"),
        (
            {"question": "Which?", "answer": "Pear", "context": "Pears."},
            "column context holds words that format question",
        ),
        # KTO's good answers, and words that only look like media, train
        ({**CHAT, "label": True}, "Pear"),
        ({"messages": [{**USER, "content": "<image>Name a fruit"}, PEAR]}, "Pear"),
        ({**CHAT, "images": []}, "Pear"),
        # switches of other tools
        (last_two(loss=(False, True)), "Pear"),
        (last_two(loss_weight=(0.0, 1.0)), "Pear"),
        (last_two(masked=(True, False)), "Pear"),
        (last_two(trainable=(False, True)), "Pear"),
        (last_two(training=(False, True)), "Pear"),
        (last_two(loss_weight=(0.5, 1.0)), "message 2 has loss_weight 0.5 (allowed: 0, 1)"),
        (last_two(mask=(True, False)), "message 2 has mask True, a switch of the loss that is not known"),
        # LLaMA-Factory's parts
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "Hi"}], "loss_weight": 0.0},
                    {"role": "assistant", "content": [{"type": "text", "value": "Pear"}], "loss_weight": 1.0},
                ]
            },
            "Pear",
        ),
    ],
)
def test_a_row_of_each_foreign_kind_trains_rightly_or_is_refused_by_name(
    row: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", [CHAT if "input_ids" not in row else {"text": "a"}, row])
    if expected == "Pear":
        assert learned(prepare(config_of(path))) == ["Pear", "Pear"]
        return
    with pytest.raises(PreflightError, match=re.escape(f"{path}: row 2: ") + ".*" + re.escape(expected)):
        prepare(config_of(path))
    data = prepare(config_of(path, on_bad_row="skip"))
    assert len(data.train) == 1
    assert data.facts["bad_rows"][0][:2] == [0, 2]


def test_ignored_columns_count_as_absent_and_are_part_of_the_key(tmp_path: Path) -> None:
    rows = [{**CHAT, "label": True}, {"messages": [USER, {**BAD, "mask": True}], "label": False}]
    path = written(tmp_path / "rows.jsonl", rows)
    config = config_of(path, ignore_columns=["label", "mask"])
    data = prepare(config)
    assert learned(data) == ["Pear", "Granite"]
    assert not {"unread_columns", "unread_message_keys"} & found(config, data).keys()
    again = prepare(config_of(path, ignore_columns=["label", "mask", "id"]))
    assert "changed: ignore_columns" in again.facts["cache"]


def test_a_mixture_ignores_for_all_and_for_each(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{**CHAT, "label": False, "images": ["x"]}])
    data = DataConfig(source="mixture", path="", ignore_columns=["label"])
    data.sources = {"a": sources.SourceConfig(path=str(path), ignore_columns=["images"])}
    (source,) = sources.training(data)
    assert source.ignored == {"label", "images"}


def test_one_finding_names_what_nothing_reads(tmp_path: Path) -> None:
    rows = [{**CHAT, "id": 1, "source": ""}, {"messages": [{**USER, "name": "Ann"}, {**PEAR, "n": 0}], "id": 2}]
    held_out = written(
        tmp_path / "eval.jsonl", [{"prompt": "Name a tree", "completion": "Oak", "id": 3, "source": "x"}]
    )
    config = config_of(written(tmp_path / "rows.jsonl", rows), eval_path=str(held_out))
    data = prepare(config)
    told = found(config, data)
    assert told["unread_columns"] == "columns that nothing reads: id (3 rows), source (1 rows)"
    assert told["unread_message_keys"] == "keys of messages that nothing reads: n (1 rows), name (1 rows)"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_answer_does_not_stream_by(streaming: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [CHAT, {**CHAT, "label": False}])
    with pytest.raises(PreflightError, match="row 2: column label is False"):
        prepare(config_of(path, streaming=streaming))


# ----------------------------------------------------------------------------------------------------------- Arrow


def calling(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in arguments}
    tool = {"name": name, "parameters": {"type": "object", "properties": properties}}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "tools": [{"type": "function", "function": tool}],
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "7"},
            PEAR,
        ],
        "chat_template_kwargs": {f"with_{name}": True},
    }


CALLS = [calling("weather", {"town": "Bern"}), calling("add", {"a": "1", "b": {"deep": [{"x": None}, {"y": "2"}]}})]
PADDED = [CALLS[0], calling("add", {"a": "1", "b": {"deep": [{}, {"y": "2"}]}})]


def to_parquet(folder: Path) -> DataConfig:
    Dataset.from_list(CALLS).to_parquet(folder / "rows.parquet")
    return DataConfig(path=str(folder / "rows.parquet"))


def to_disk(folder: Path) -> DataConfig:
    Dataset.from_list(CALLS).save_to_disk(folder / "saved")
    return DataConfig(path=str(folder / "saved"))


def to_split_on_disk(folder: Path) -> DataConfig:
    DatasetDict({"train": Dataset.from_list(CALLS)}).save_to_disk(folder / "saved")
    return DataConfig(path=str(folder / "saved" / "train"))


def to_hub(folder: Path, streaming: bool = False) -> DataConfig:
    to_parquet(folder)
    return DataConfig(source="hub", path=str(folder), streaming=streaming)


def to_stream(folder: Path) -> DataConfig:
    return to_hub(folder, streaming=True)


def to_jsonl(folder: Path) -> DataConfig:
    return DataConfig(path=str(written(folder / "rows.jsonl", CALLS)))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment on import
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("write", [to_parquet, to_disk, to_split_on_disk, to_hub, to_stream, to_jsonl])
def test_no_null_of_arrow_becomes_data(write: Callable[[Path], DataConfig], tmp_path: Path) -> None:
    """Arrow pads each object with the keys of all others; a .jsonl file's nulls are its author's."""
    (tmp_path / "set").mkdir()
    config = config_of(tmp_path)
    config.data = write(tmp_path / "set")
    (source,) = sources.training(config.data)
    rows = [row.value for row in source]
    assert rows == (CALLS if write is to_jsonl else PADDED)
    data = prepare(config)
    calls = [re.search(r'"arguments": (.*)}\n', text) for text in learned(data)]
    assert [json.loads(call[1]) for call in calls if call] == [
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows
    ]
    assert "null" not in "".join(learned(data)) or write is to_jsonl
    told = found(config, data).get("null_arguments", "")
    assert told.startswith("2 rows have calls with arguments that are null") if write is not to_jsonl else not told


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [Audio(), Image()])
def test_a_column_of_the_hub_that_nothing_reads_is_not_decoded(kind: Any, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rows = Dataset.from_list([{**PAIR, "clip": {"bytes": b"no such format", "path": None}}])
    features = Features({"prompt": Value("string"), "completion": Value("string"), "clip": kind})
    rows.cast(features).to_parquet(tmp_path / "set" / "train.parquet")
    config = config_of(tmp_path / "set", source="hub", streaming=streaming)
    data = prepare(config)
    assert learned(data) == ["Pear"]
    assert found(config, data)["unread_columns"] == "columns that nothing reads: clip (1 rows)"


# -------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("files", "words", "says"),
    [
        ({"kto.jsonl": [CHAT, {**CHAT, "label": False}]}, ("data.path=kto.jsonl",), "row 2: column label is False"),
        (
            {"d/train.jsonl": [CHAT], "d/test.jsonl": [PAIR]},
            ("data.path=d",),
            "d: holds files of several splits (test, ",
        ),
        (
            {"d/a.jsonl": [CHAT], "d/b.jsonl": [CHAT]},
            ("data.path=d", "data.eval_path=d/b.jsonl"),
            "1 of 1 held-out rows stand among the training rows",
        ),
    ],
)
def test_plan_refuses_with_exit_code_2(
    files: dict[str, list[Any]],
    words: tuple[str, ...],
    says: str,
    main: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, rows)
    result = main("plan", "model=tiny_llama", "tracking=none", "data=from_file", *words)
    assert result.returncode == 2
    assert says in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_plan_takes_the_way_out(main: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    written(tmp_path / "kto.jsonl", [CHAT, {**PAIR, "prompt": "Name a tree", "label": False}])
    words = (
        "model=tiny_llama",
        "tracking=none",
        "data=from_file",
        "data.path=kto.jsonl",
        "data.ignore_columns=[label]",
    )
    assert main("plan", *words).returncode == 0
