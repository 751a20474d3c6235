"""The page of a comparison: whole, safe, and drawn in a browser that has no network and no GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from sft_lab.sweep import ranking, records, report
from sft_lab.sweep.axes import axis_of
from sft_lab.sweep.effects import by_effect
from sft_lab.sweep.ranking import Verdict, best
from sft_lab.sweep.records import read
from tests.sweep.rundirs import write_ledger, write_run, write_search

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> ${7*7} {{7*7}} <b>\x1b[31m</td>"


class Page(HTMLParser):
    """What a browser would load, follow and show of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.loads: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.figures: dict[str, list[Any]] = {}
        self.text = ""
        self.tags: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "srcset", "data", "poster", "background")
        ]
        if tag == "link":
            self.loads.append(values.get("href") or "")
        if tag == "a" and "href" in values:
            self.links.append(values["href"] or "")
        assert not [name for name, _ in attrs if name.startswith("on")], attrs
        if tag == "script":
            self._script = values

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        elif self._script.get("type") == "application/json":
            figure = json.loads(data, parse_constant=pytest.fail)
            self.figures.setdefault(self._script["data-figure"] or "", []).append(figure)
        else:
            self.scripts.append(data)


def write_sweep(sweep: Path) -> ranking.Verdict:
    """report.html, as the end of a sweep writes it."""
    comparison = records.read([sweep])
    verdict = ranking.judge(comparison)
    report.write(comparison, verdict, sweep / "report.html")
    return verdict


def page_of(sweep: Path) -> Page:
    write_sweep(sweep)
    return Page((sweep / "report.html").read_text())


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_search(tmp_path_factory.mktemp("sweeps") / "search", 40, steps=20)


# --------------------------------------------------------------------------------------------------------- content


def test_the_page_loads_nothing(search: Path) -> None:
    page = page_of(search)
    text = (search / "report.html").read_text()
    assert page.loads == []
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", text.split("<body>")[0])
    assert sum("plotly.js v" in script for script in page.scripts) == 1


def test_every_trial_is_in_it_with_its_state_and_reason(search: Path) -> None:
    page = page_of(search)
    names = [path.name for path in search.iterdir() if path.is_dir()]
    assert len(names) == 40
    assert [name for name in names if name not in page.text] == []
    assert page.text.count("pruned at step 100") == 4
    assert page.text.count("RuntimeError: the loss is not a number") == 1
    assert "peft.r=0 : too small" in page.text
    assert read([search]).records[0].name in page.text


def test_links_lead_to_the_runs_from_where_the_page_lies(search: Path) -> None:
    page = page_of(search)
    assert len(page.links) >= 40
    for link in page.links:
        assert (search / unquote(link)).exists(), link
    assert all(not link.startswith(("/", "file:")) for link in page.links)


def test_the_page_can_lie_elsewhere_and_names_may_be_odd(tmp_path: Path) -> None:
    write_run(tmp_path / "a b#c%20?é" / "run <1>")
    comparison = read([tmp_path / "a b#c%20?é"])
    (tmp_path / "pages").mkdir()
    report.write(comparison, best(comparison.records, "eval_loss"), tmp_path / "pages" / "page.html")
    links = Page((tmp_path / "pages" / "page.html").read_text()).links
    assert [(tmp_path / "pages" / unquote(link)).resolve().name for link in links] == ["run <1>"]


def test_what_the_data_says_is_text(tmp_path: Path) -> None:
    sweep = tmp_path / "hostile"
    sample = dict.fromkeys(["id", "prompt", "reference", "answer_before", "answer"], HOSTILE)
    for i, rank in enumerate((8, 16, 32)):
        changes = {"peft.r": rank, "data.path": f"{HOSTILE}{i % 2}", "trainer.extra": {HOSTILE: i}}
        write_run(sweep / f"r{rank}<script>", changes, {"eval_loss": 1.0 + i, HOSTILE: 1.0}, samples=[sample])
    write_run(sweep / "broken", state="failed", status={"error": HOSTILE})
    write_ledger(sweep, name=HOSTILE, sampler=HOSTILE, left_out=[{"overrides": [HOSTILE], "reason": HOSTILE}])
    page = page_of(sweep)
    assert "img" not in page.tags
    assert page.tags.count("script") == sum(map(len, page.figures.values())) + 2
    assert "\x1b" not in (sweep / "report.html").read_text()
    assert page.text.count("</script><script>alert(1)</script>") > 10
    shown = [
        [trace.get("text"), trace.get("meta")]
        for figures in page.figures.values()
        for figure in figures
        for trace in figure["data"]
    ]
    assert "<script>" not in json.dumps(shown)  # Plotly reads tags in texts


def test_a_wandb_link_is_shown_where_there_is_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "a")
    (run / "wandb").mkdir()
    (run / "wandb" / "url").write_text("https://wandb.ai/team/sft_lab/runs/abc123")
    assert "https://wandb.ai/team/sft_lab/runs/abc123" in page_of(tmp_path / "runs").links


def test_answers_of_the_best_configs_stand_side_by_side(tmp_path: Path) -> None:
    """Of each config the run that answered the same rows: another seed holds out others."""
    sweep = tmp_path / "sweep"
    for rank in (8, 16):
        for seed in (1, 2):
            sample = {
                "id": "1",
                "prompt": f"Question {seed}",
                "reference": "yes",
                "answer_before": "no",
                "answer": f"r{rank}s{seed}",
            }
            loss = rank / 10 + (0.01 if (rank == 8) == (seed == 1) else 0.02)
            write_run(sweep / f"r{rank}s{seed}", {"peft.r": rank, "seed": seed}, {"eval_loss": loss}, samples=[sample])
    page = page_of(sweep)
    section = page.text.split("Answers side by side")[1]
    assert re.search(r"Question 1\s*yes\s*no\s*r8s1\s*r16s1", section)
    assert "Question 2" not in section


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_there_is_a_page_for_few_runs(finished: int, tmp_path: Path) -> None:
    for number in range(finished):
        write_run(tmp_path / "runs" / f"done{number}", {"peft.r": 8 + number})
    write_run(tmp_path / "runs" / "broken", state="failed", status={"error": "out of memory"}, curve=[])
    page = page_of(tmp_path / "runs")
    assert "out of memory" in page.text
    assert sorted(page.figures) == [[], ["curves"], ["curves", "effects", "parallel"]][finished]


# --------------------------------------------------------------------------------------------------------- figures


def test_two_hundred_trials_are_few_traces_and_none_needs_webgl(tmp_path: Path) -> None:
    page = page_of(write_search(tmp_path / "search", 200, steps=200))
    traces = [trace for plot in page.figures.values() for trace in plot[0]["data"]]
    assert len(traces) < 80
    assert {trace["type"] for trace in traces} == {"scatter", "heatmap"}
    points = [len(trace["x"]) for trace in page.figures["curves"][0]["data"]]
    assert sum(points) < 45_000
    assert (tmp_path / "search" / "report.html").stat().st_size < 10e6


def test_each_line_of_the_parallel_coordinates_is_a_trial(search: Path) -> None:
    verdict = write_sweep(search)
    figure = page_of(search).figures["parallel"][0]
    axes = figure["layout"]["xaxis"]["ticktext"]
    assert axes[0] == "trainer.<br>learning_rate"  # by which the losses were made
    assert axes[-1] == "eval_loss"
    assert "peft.<br>lora_alpha" not in axes  # follows the rank
    lines = [trace for trace in figure["data"] if trace.get("meta")]
    assert all(sum(count for _, count in trace["meta"]) == len(trace["x"]) for trace in lines)
    assert sum(trace["x"].count(None) for trace in lines) == len(verdict.ranked)
    heights = [y for trace in lines for y in trace["y"] if y is not None]
    assert -0.05 <= min(heights) < max(heights) <= 1.05


def verdict_of(losses: dict[tuple[Any, ...], float], keys: list[str], tmp_path: Path) -> Verdict:
    for number, (values, loss) in enumerate(losses.items()):
        write_run(tmp_path / f"{number:03d}", dict(zip(keys, values, strict=True)), {"eval_loss": loss})
    return best(read([tmp_path]).records, "eval_loss")


def test_the_effect_of_a_parameter_is_its_share_of_the_variance(tmp_path: Path) -> None:
    losses = {(r, d, s): 1 / r + 1e-6 * s for r in (8, 16) for d in (0.0, 0.1) for s in (1, 2)}
    verdict = verdict_of(losses, ["peft.r", "peft.lora_dropout", "seed"], tmp_path)
    axes = [axis_of(key, verdict.ranked) for key in ("peft.lora_dropout", "seed", "peft.r")]
    ordered, effects = by_effect(verdict, axes)
    assert ordered[0].key == "peft.r"
    assert [effect.share and round(effect.share, 2) for effect in effects] == [1.0, 0.0, 0.0]


def test_numbers_over_more_than_a_decade_lie_by_their_logarithm(tmp_path: Path) -> None:
    rates = [10.0 ** (-5 + i / 5) for i in range(16)]
    verdict = verdict_of(
        {(rate, i / 100): rate for i, rate in enumerate(rates)},
        ["trainer.learning_rate", "peft.lora_dropout"],
        tmp_path,
    )
    rate, dropout = (axis_of(key, verdict.ranked) for key in ("trainer.learning_rate", "peft.lora_dropout"))
    assert (rate.log, dropout.log) == (True, False)
    heights = rate.spread(verdict.ranked)
    steps = [b - a for a, b in pairwise(heights)]
    assert max(steps) - min(steps) < 1e-9
    assert [text for _, text in rate.ticks()] == [
        "1e-05",
        "2e-05",
        "5e-05",
        "0.0001",
        "0.0002",
        "0.0005",
        "0.001",
        "0.002",
        "0.005",
        "0.01",
    ]


def test_the_heat_map_holds_the_mean_of_each_cell(tmp_path: Path) -> None:
    losses = {(r, p, s): (r if p else 2 * r) + s for r in (8, 16) for p in (True, False) for s in (1, 2)}
    verdict_of(losses, ["peft.r", "trainer.packing", "seed"], tmp_path / "sweep")
    (figure,) = page_of(tmp_path / "sweep").figures["heat"]
    layout, (trace,) = figure["layout"], figure["data"]
    assert (layout["xaxis"]["ticktext"], layout["yaxis"]["ticktext"]) == (["8", "16"], ["false", "true"])
    assert trace["z"] == [[17.5, 33.5], [9.5, 17.5]]


def test_a_run_that_diverged_does_not_press_the_others_together(tmp_path: Path) -> None:
    losses = {(2e-4 * (i + 1),): 1.0 + i / 100 for i in range(12)} | {(0.1,): 1e6}
    verdict_of(losses, ["trainer.learning_rate"], tmp_path / "sweep")
    page = page_of(tmp_path / "sweep")
    low, high = page.figures["effects"][0]["layout"]["yaxis"]["range"]
    assert 0.9 < low < 1.0 < 1.1 < high < 1.2
    assert "Trials far worse than the rest lie outside" in page.text


# -------------------------------------------------------------------------------------------------------- browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_draws_every_plot_and_has_no_error(search: Path, tmp_path: Path) -> None:
    write_sweep(search)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}"]
    flags += [
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=20000",
        "--window-size=1400,1000",
        "--dump-dom",
    ]
    command = ["chromium", *flags, f"file://{search / 'report.html'}"]
    env = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert re.search(r'data-drawn-ms="\d+"', done.stdout)
    for plot in ("curves", "parallel", "effects"):
        drawn = re.search(rf'<div class="plot[^>]*id="{plot}".*?(?=<script type="application/json")', done.stdout, re.S)
        assert drawn, plot
        assert drawn[0].count('<path class="js-line"') + drawn[0].count('<path class="point"') > 5, plot
    assert re.search(r'<g class="heatmaplayer[^>]*>.*?<image', done.stdout, re.S)
