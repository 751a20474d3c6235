"""What is read of run directories: finished ones, and those that broke off, are damaged, or older."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from sft_lab.errors import ConfigError
from sft_lab.sweep.differences import differing, tied
from sft_lab.sweep.records import Record, read
from tests.sweep.rundirs import write_ledger, write_run


def by_name(*directories: Path) -> dict[str, Record]:
    return {record.name: record for record in read(directories).records}


def with_config(**values: object) -> Record:
    return Record("run", Path("run"), config={name.replace("__", "."): value for name, value in values.items()})


# --------------------------------------------------------------------------------------------------------- states


def test_a_finished_run(tmp_path: Path) -> None:
    sample = {"id": "1", "prompt": "p", "reference": "r", "answer_before": "b", "answer": "a"}
    write_run(tmp_path / "run", {"peft.r": 8}, {"eval_loss": 0.5}, curve=[2.0, 1.0], samples=[sample])
    (record,) = read([tmp_path / "run"]).records
    assert (record.name, record.state, record.finished, record.why) == ("run", "completed", True, "")
    assert record.metrics == {"train_loss": 1.0, "eval_loss": 0.5}
    assert (record.steps, record.train_s, record.tokens_per_s, record.tokens) == (20, 12.5, 25000.0, 2000)
    assert (record.peak_memory_bytes, record.adapter_bytes) == (600 * 2**20, 134616)
    assert (record.trainable_parameters, record.samples, len(record.events)) == (32768, [sample], 3)
    assert (record.config["peft.r"], record.config["trainer.learning_rate"]) == (8, 2e-4)


def test_a_sweep_shows_every_trial_whatever_became_of_it(tmp_path: Path) -> None:
    sweep = tmp_path / "little"
    write_run(sweep / "done", {"peft.r": 8})
    write_run(sweep / "broken", {"peft.r": 16}, state="failed", status={"error": "out of memory", "step": 3})
    write_run(sweep / "hopeless", {"peft.r": 32}, state="interrupted", status={"pruned_at_step": 20})
    write_run(sweep / "stopped", {"peft.r": 64}, state="interrupted", status={"step": 7})
    write_run(sweep / "killed", {"peft.r": 64}, state="running", status={"step": 5})
    (sweep / "planned").mkdir()
    (sweep / "planned" / "later.yaml").write_text(yaml.safe_dump({"peft": {"r": 128}}))
    trials = {name: {"overrides": []} for name in ("done", "broken", "hopeless", "stopped", "killed", "later")}
    write_ledger(sweep, trials=trials, left_out=[{"overrides": ["peft.r=0"], "reason": "too small"}])
    comparison = read([sweep])
    states = {record.name: (record.state, record.why) for record in comparison.records}
    assert states == {
        "done": ("completed", ""),
        "broken": ("failed", "out of memory"),
        "hopeless": ("pruned", "pruned at step 20"),
        "stopped": ("interrupted", "interrupted at step 7"),
        "killed": ("running", "not ended, at step 5, or killed"),
        "later": ("planned", "not begun"),
    }
    assert by_name(sweep)["later"].config == {"peft.r": 128}
    assert {record.sweep for record in comparison.records} == {"little"}
    assert [entry["reason"] for entry in comparison.sweeps[0].left_out] == ["too small"]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null", b'{"metrics": 3, "parameters": []}']
)
@pytest.mark.parametrize(
    "name", ["config.yaml", "status.json", "result.json", "preflight.json", "metrics.jsonl", "samples.jsonl"]
)
def test_a_damaged_file_costs_only_what_it_held(name: str, damage: bytes, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "good", {"peft.r": 8})
    write_run(tmp_path / "sweep" / "bad", {"peft.r": 16})
    (tmp_path / "sweep" / "bad" / name).write_bytes(damage)
    records = by_name(tmp_path / "sweep")
    assert records["good"].finished
    assert records["bad"].path == tmp_path / "sweep" / "bad"
    if damage in (b"{", b"\xff\xfe\x00"):
        assert name in records["bad"].why


@pytest.mark.parametrize("name", ["result.json", "preflight.json", "metrics.jsonl", "samples.jsonl", "status.json"])
def test_a_missing_file_costs_only_what_it_held(name: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"peft.r": 16})
    (tmp_path / "run" / name).unlink()
    (record,) = read([tmp_path / "run"]).records
    assert record.config["peft.r"] == 16
    assert record.finished is (name != "status.json")


def test_a_torn_last_line_loses_one_event(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", curve=[2.0, 1.5])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "spl')
    (record,) = read([run]).records
    assert [event["step"] for event in record.events] == [10, 20, 20]
    assert "1 damaged lines" in record.why


# ---------------------------------------------------------------------------------------------------- directories


def test_runs_and_sweeps_are_united_and_each_run_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "one" / "a")
    write_run(tmp_path / "two" / "a")
    write_run(tmp_path / "single")
    comparison = read(
        [tmp_path / "one", tmp_path / "two", tmp_path / "one" / "a", tmp_path / "single", tmp_path / "one"]
    )
    assert [record.name for record in comparison.records] == ["one/a", "two/a", "single"]


def test_a_wrong_directory_is_named_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        read([tmp_path / "run", tmp_path / "nowhere", tmp_path / "empty"])
    nowhere, empty = caught.value.problems
    assert nowhere.startswith(f"{tmp_path / 'nowhere'} : no such directory")
    assert empty.startswith(f"{tmp_path / 'empty'} : holds no run")


def test_half_made_directories_are_no_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "a")
    shutil.copytree(tmp_path / "sweep" / "a", tmp_path / "sweep" / ".b.1234.tmp")
    (tmp_path / "sweep" / "c").mkdir()
    assert list(by_name(tmp_path / "sweep")) == ["a"]


# ----------------------------------------------------------------------------------------------------------- W&B


def test_the_page_in_wandb_of_a_run_that_was_online(tmp_path: Path) -> None:
    for name in ("online", "offline"):
        (write_run(tmp_path / name) / "wandb").mkdir()
        (tmp_path / name / "wandb" / "run_id").write_text("abc123\n")
    (tmp_path / "online" / "wandb" / "url").write_text("https://wandb.ai/team/sft_lab/runs/abc123\n")
    online, offline = read([tmp_path / "online", tmp_path / "offline"]).records
    assert (online.wandb_id, online.wandb_url) == ("abc123", "https://wandb.ai/team/sft_lab/runs/abc123")
    assert (offline.wandb_id, offline.wandb_url) == ("abc123", "")


# ------------------------------------------------------------------------------------------------------ differences


def test_only_what_trains_something_else_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"peft.r": 8, "tracking.notes": "first", "sweep.name": "one"})
    write_run(tmp_path / "b", {"peft.r": 16, "tracking.notes": "second", "sweep.name": "two"})
    assert read([tmp_path]).keys == ["peft.r"]


def test_a_key_that_an_older_version_lacks_is_no_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "old", {"peft.r": 8})
    write_run(tmp_path / "new", {"peft.r": 16})
    config = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    del config["trainer"]["optim"], config["evaluation"]
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    assert read([tmp_path]).keys == ["peft.r"]


def test_an_extra_argument_that_only_one_run_has_is_a_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "plain")
    write_run(tmp_path / "noisy", {"trainer.extra": {"neftune_noise_alpha": 5}})
    assert read([tmp_path]).keys == ["trainer.extra.neftune_noise_alpha"]


def test_true_is_not_one_and_a_number_is_not_its_text() -> None:
    assert differing([with_config(a=True, b=[1, 2]), with_config(a=1, b=[1, 2])]) == ["a"]
    assert differing([with_config(a=1e-3), with_config(a=0.001)]) == []


def test_what_follows_another_key_is_tied_to_it() -> None:
    records = [with_config(seed=s, r=r, alpha=2 * r, data__seed=s) for s in (1, 2) for r in (8, 16)]
    assert tied(records, ["seed", "r", "alpha", "data.seed"]) == {"seed": ["data.seed"], "r": ["alpha"]}


def test_numbers_that_a_search_draws_are_not_tied_for_being_all_different() -> None:
    records = [with_config(lr=10.0**-i, dropout=0.01 * i**2, seed=i, data__seed=i, model=f"m{i}") for i in range(1, 6)]
    assert tied(records, ["lr", "dropout", "seed", "data.seed", "model"]) == {
        "lr": [], "dropout": [], "seed": ["data.seed"], "model": [],
    }  # fmt: skip


def test_two_runs_tell_nothing_of_what_follows_what() -> None:
    records = [with_config(r=8, lr=1e-4), with_config(r=16, lr=2e-4)]
    assert tied(records, ["r", "lr"]) == {"r": [], "lr": []}


def test_metrics_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "result.json").write_text(json.dumps({"metrics": {"eval_loss": "low", "exact_match": True, "good": 1}}))
    assert read([run]).records[0].metrics == {"good": 1}
