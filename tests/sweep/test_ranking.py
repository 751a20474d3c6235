"""Which run is called best, and when none is."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from sft_lab.errors import ConfigError
from sft_lab.sweep.ranking import best, resolve
from sft_lab.sweep.records import Comparison, Record, Sweep
from sft_lab.sweep.student import t_quantile


def run(
    name: str, state: str = "completed", seed: int = 1, config: dict[str, object] | None = None, **metrics: float
) -> Record:
    """A run whose config, but for the seed, is that of all runs whose names begin alike."""
    own = {"seed": seed, "data.seed": seed, "peft.r": name[0]} | (config or {})
    return Record(name, Path(name), state=state, config=own, metrics=metrics)


def seeds(name: str, *losses: float) -> list[Record]:
    return [run(f"{name}{i}", seed=i, eval_loss=loss) for i, loss in enumerate(losses)]


def names(records: list[Record]) -> list[str]:
    return [record.name for record in records]


# ---------------------------------------------------------------------------------------------------------- order


def test_a_loss_is_better_low_and_anything_else_high() -> None:
    runs = [run("a", eval_loss=2.0, exact_match=0.9), run("b", eval_loss=1.0, exact_match=0.1)]
    assert names(best(runs, "eval_loss").ranked) == ["b", "a"]
    assert names(best(runs, "exact_match").ranked) == ["a", "b"]
    assert names(best(runs, "exact_match", "minimize").ranked) == ["b", "a"]
    assert best(runs, "exact_match").behind(runs[1]) == pytest.approx(0.8)


def test_what_cannot_be_ranked_comes_last_with_why() -> None:
    runs = [
        run("a", state="failed", eval_loss=0.1),
        run("b", eval_loss=math.nan),
        run("c", exact_match=1.0),
        run("d", eval_loss=3.0),
        run("e", eval_loss=math.inf),
    ]
    runs[0].error = "out of memory"
    verdict = best(runs, "eval_loss")
    assert names(verdict.ranked) == ["d"]
    assert [(record.name, why) for record, why in verdict.unranked] == [
        ("a", "out of memory"),
        ("b", "eval_loss is nan"),
        ("c", "has no eval_loss"),
        ("e", "eval_loss is inf"),
    ]


# ------------------------------------------------------------------------------------------------------ objective


def comparison(*records: Record, **sweep: str) -> Comparison:
    return Comparison(list(records), [Sweep("s", Path("s"), **sweep)] if sweep else [])


def test_the_sweep_says_what_ranks_its_trials() -> None:
    runs = [run("a", eval_loss=1.0, exact_match=0.5)]
    assert resolve(comparison(*runs, objective="exact_match", direction="maximize")) == ("exact_match", "maximize")
    assert resolve(comparison(*runs, objective="exact_match", direction="minimize")) == ("exact_match", "minimize")
    assert resolve(comparison(*runs, objective="exact_match"), "eval_loss") == ("eval_loss", "minimize")
    assert resolve(comparison(*runs)) == ("eval_loss", "minimize")
    assert resolve(comparison(*runs), "exact_match", "minimize") == ("exact_match", "minimize")


def test_without_a_metric_that_all_have_nothing_is_ranked() -> None:
    runs = [run("a", eval_loss=1.0), run("b", exact_match=1.0)]
    assert resolve(comparison(*runs))[0] == ""
    verdict = best(runs, "")
    assert (verdict.kind, verdict.best, verdict.ranked, len(verdict.unranked)) == ("none", None, [], 2)
    assert "--objective NAME" in verdict.sentence


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (
            "train_loss",
            ["--objective train_loss : measured on the rows trained on", "(allowed: eval_loss, exact_match)"],
        ),
        ("exact_mach", ["--objective exact_mach : no finished run has it", "did you mean exact_match?"]),
        ("exact_match_before", ["--objective exact_match_before : no finished run has it"]),
    ],
)
def test_only_a_metric_of_an_evaluation_after_training_ranks(objective: str, words: list[str]) -> None:
    record = run("a", train_loss=0.1, eval_loss=1.0, exact_match=0.5, exact_match_before=0.9)
    with pytest.raises(ConfigError) as caught:
        resolve(comparison(record), objective)
    assert all(word in str(caught.value) for word in words)


# -------------------------------------------------------------------------------------------------------- verdicts


def test_a_win_beyond_the_noise_of_seeds_is_named() -> None:
    verdict = best([*seeds("a", 1.00, 1.02, 0.98), *seeds("b", 2.00, 2.03, 1.97)], "eval_loss")
    assert (verdict.kind, verdict.best and verdict.best.name) == ("best", "a2")
    assert verdict.sentence.startswith("Best: a2 and its 2 other seeds (eval_loss 1.0000 on average), ahead of b2")


def test_a_lead_within_the_noise_of_seeds_is_no_win() -> None:
    verdict = best([*seeds("a", 1.0, 1.4, 0.6), *seeds("b", 1.1, 1.5, 0.7), *seeds("c", 1.2, 1.6, 0.8)], "eval_loss")
    assert (verdict.kind, verdict.best, verdict.leader and verdict.leader.name) == ("noise", None, "a2")
    assert verdict.sentence.startswith("No best: a2")
    assert "2 configs" in verdict.sentence


def test_a_lead_over_the_second_is_none_if_a_third_with_one_seed_may_be_as_good() -> None:
    """The mean of one seed is less sure than that of four."""
    verdict = best([*seeds("a", 1.0, 1.1, 0.9, 1.0), *seeds("b", 1.2, 1.1, 1.3, 1.2)], "eval_loss")
    assert verdict.kind == "best"
    verdict = best([*verdict.ranked, *seeds("c", 1.21)], "eval_loss")
    assert verdict.kind == "noise"
    assert "ahead of c0 (1.2100) by 0.21, within the noise of seeds (0.22 would" in verdict.sentence


def test_the_noise_is_pooled_over_the_configs_with_several_seeds() -> None:
    verdict = best([*seeds("a", 1.0, 1.2), *seeds("b", 2.0, 2.4), *seeds("c", 9.0)], "eval_loss")
    assert verdict.noise == pytest.approx(math.sqrt((0.02 + 0.08) / 2))
    assert [(group.n, group.sd and round(group.sd, 4)) for group in verdict.groups] == [
        (2, 0.1414),
        (2, 0.2828),
        (1, None),
    ]


def test_without_repeated_seeds_the_noise_is_said_to_be_unknown() -> None:
    verdict = best([*seeds("a", 1.0), *seeds("b", 2.0)], "eval_loss")
    assert (verdict.kind, verdict.noise, verdict.best and verdict.best.name) == ("unknown", None, "a0")
    assert "noise is unknown" in verdict.sentence


def test_equal_configs_tie() -> None:
    verdict = best([*seeds("a", 1.0), *seeds("b", 1.0), *seeds("c", 2.0)], "eval_loss")
    assert (verdict.kind, verdict.best) == ("tie", None)
    assert "a0, b0 tie at eval_loss 1.0000" in verdict.sentence


def test_one_config_alone_and_none() -> None:
    alone = best(seeds("a", 1.0, 1.2), "eval_loss")
    assert (alone.kind, alone.best and alone.best.name) == ("only", "a0")
    nothing = best([run("a", state="failed")], "eval_loss")
    assert (nothing.kind, nothing.best, nothing.leader) == ("none", None, None)
    assert "no finished run has eval_loss" in nothing.sentence


def test_a_data_seed_of_its_own_is_another_config() -> None:
    """Only where it follows the seed is it a part of the repetition."""
    runs = [
        run("a1", eval_loss=1.0, config={"data.seed": 7}),
        run("a2", seed=2, eval_loss=1.1, config={"data.seed": 7}),
    ]
    assert [group.n for group in best(runs, "eval_loss").groups] == [2]
    runs[1].config["data.seed"] = 8
    assert [group.n for group in best(runs, "eval_loss").groups] == [1, 1]


def test_the_seed_that_is_as_large_as_a_fixed_data_seed_is_one_of_them() -> None:
    fixed = [run(f"a{i}", seed=i, eval_loss=i / 10, config={"data.seed": 42}) for i in (41, 42, 43)]
    assert [group.n for group in best(fixed, "eval_loss").groups] == [3]
    follow = [run(f"a{i}", seed=i, eval_loss=9.0) for i in (1, 2)]
    assert [group.n for group in best([*fixed, *follow], "eval_loss").groups] == [3, 2]


def test_runs_that_were_evaluated_on_other_rows_are_told_of() -> None:
    runs = [
        run("a", eval_loss=1.0, config={"data.path": "a.jsonl"}),
        run("b", eval_loss=2.0, config={"data.path": "b.jsonl"}),
    ]
    assert best(runs, "eval_loss").notes == ["eval_loss was not measured alike in all runs: they differ in data.path."]
    assert best(seeds("a", 1.0, 2.0), "eval_loss").notes == []


HELD_OUT: dict[str, object] = {"data.path": "x.jsonl", "data.eval_rows": 4, "data.eval_fraction": 0.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, True),
        ({"data.eval_rows": 0, "data.eval_fraction": 0.1}, True),
        ({"data.source": "requests"}, True),
        ({"data.seed": 42}, False),
        ({"data.eval_rows": 0}, False),
        ({"data.eval_rows": 0, "data.eval_path": "held_out.jsonl"}, False),
        ({"data.eval_rows": 0, "data.eval_split": "test"}, False),
    ],
)
def test_seeds_that_were_measured_on_other_rows_are_told_of(changes: dict[str, object], told: bool) -> None:
    runs = [run(f"a{seed}", seed=seed, eval_loss=1.0, config=HELD_OUT | changes) for seed in (1, 2)]
    note = (
        "eval_loss was not measured alike in all runs: they differ in data.seed. data.seed=42 in all of them holds the "
        "same rows out."
    )
    assert best(runs, "eval_loss").notes == ([note] if told else [])


def mixed(**sources: dict[str, object]) -> dict[str, object]:
    keys = {f"data.sources.{name}.{key}": value for name, source in sources.items() for key, value in source.items()}
    return HELD_OUT | {"data.seed": 42} | keys


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"chat": {"path": "a", "sample": 0.5, "weight": 1.0}}, "data.sources.chat.sample"),
        ({"chat": {"path": "b", "sample": 1.0, "weight": 1.0}}, "data.sources.chat.path"),
        (
            {"chat": {"path": "a", "sample": 1.0, "weight": 1.0}, "code": {"path": "b", "sample": 1.0, "weight": 1.0}},
            "data.sources.code.path",
        ),
        ({"chat": {"path": "a", "sample": 1.0, "weight": 0.1}}, ""),
    ],
)
def test_rows_held_out_of_another_mixture_are_told_of(other: dict[str, dict[str, object]], told: str) -> None:
    """Weights say how often rows are trained on, not which are held out."""
    first = run("a", eval_loss=1.0, config=mixed(chat={"path": "a", "sample": 1.0, "weight": 1.0}))
    runs = [first, run("b", eval_loss=2.0, config=mixed(**other))]
    note = f"eval_loss was not measured alike in all runs: they differ in {told}."
    assert best(runs, "eval_loss").notes == ([note] if told else [])
    for record in runs:
        record.config |= {"data.eval_path": "held_out.jsonl", "data.eval_rows": 0}
    assert best(runs, "eval_loss").notes == []


def test_a_loss_over_other_tokens_is_told_of_and_an_exact_match_is_not() -> None:
    runs = [run(name, eval_loss=1.0, exact_match=1.0, config={"model.path": name}) for name in "ab"]
    assert "model.path" in best(runs, "eval_loss").notes[0]
    assert best(runs, "exact_match").notes == []


def test_where_nothing_differs_a_winner_is_named_in_about_one_of_twenty() -> None:
    """That is what 5 % means for two configs; 4000 draws put the share within 0.01 of it (three standard errors)."""
    draw = random.Random(1)
    drawn = ([*seeds("a", *noise(draw)), *seeds("b", *noise(draw))] for _ in range(4000))
    named = sum(best(runs, "eval_loss").kind == "best" for runs in drawn)
    assert 0.04 < named / 4000 < 0.06


def noise(draw: random.Random) -> list[float]:
    return [draw.gauss(1.0, 0.1) for _ in range(3)]


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (30, 2.0423), (120, 1.9799)]
)
def test_quantiles_of_students_t(df: int, quantile: float) -> None:
    """As tabulated to four decimals."""
    assert t_quantile(0.975, df) == pytest.approx(quantile, abs=5e-5)
