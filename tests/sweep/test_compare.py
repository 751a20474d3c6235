"""`compare` as a person and a script meet it."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_lab.commands import compare
from sft_lab.errors import ConfigError
from tests.sweep.rundirs import write_ledger, write_run

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
HOSTILE = "[bold]b[/bold] [/] \x1b[31mred <b>"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two ranks with two seeds each, one trial that failed and one that diverged."""
    folder = tmp_path / "little"
    for rank, losses in {8: (2.0, 2.1), 16: (1.0, 1.1)}.items():
        for seed, loss in enumerate(losses):
            changes = {"seed": seed, "peft.r": rank, "peft.lora_alpha": 2 * rank}
            write_run(folder / f"r{rank}-{seed}", changes, {"eval_loss": loss, "exact_match": loss / 10})
    write_run(
        folder / "broken", {"peft.r": 32, "peft.lora_alpha": 64}, state="failed", status={"error": HOSTILE, "step": 3}
    )
    write_run(folder / "wild", {"peft.r": 64, "peft.lora_alpha": 128}, {"eval_loss": float("nan")})
    return write_ledger(folder, left_out=[{"overrides": ["peft.r=0"], "reason": "too small"}])


def out_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert compare.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def strict(text: str) -> dict:
    """One JSON document without NaN, which no other language reads."""
    return json.loads(text, parse_constant=pytest.fail)


# ------------------------------------------------------------------------------------------------ on the terminal


def test_the_table_has_the_best_first_and_only_what_differs(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = out_of(capsys, sweep).splitlines()
    head = re.split(r"\s{2,}", lines[0].strip())
    assert head == [
        "#", "run", "seed", "peft.r", "peft.lora_alpha", "data.seed", "eval_loss", "exact_match", "train_loss",
        "behind (± 0.071)", "tokens/s", "memory", "time", "state",
    ]  # fmt: skip
    assert [line.split()[1] for line in lines[1:5]] == ["r16-0", "r16-1", "r8-0", "r8-1"]
    assert lines[2].split() == [
        "2", "r16-1", "1", "16", "32", "1", "1.1000", "0.1100", "1.0000", "+0.1000", "25,000", "600.0", "MiB", "12.5", "s", "completed",
    ]  # fmt: skip
    assert {line.split()[0] for line in lines[5:7]} == {"broken", "wild"}


def test_the_verdict_and_what_failed_stand_below_the_table(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out_of(capsys, sweep)
    assert "Best: r16-0 and its other seed (eval_loss 1.0500 on average), ahead of r8-0" in text
    assert "wild (completed): eval_loss is nan" in text
    assert r"broken (failed): [bold]b[/bold] [/] \x1b[31mred <b>" in text
    assert "\x1b" not in text


def test_a_narrow_terminal_gets_what_matters(sweep: Path) -> None:
    program = f"import sys; sys.stdout.isatty = lambda: True; from sft_lab.commands import compare; compare.main([{str(sweep)!r}])"
    env = {
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "TERM": "xterm",
        "PATH": "/usr/bin",
        "PYTHONPATH": str(Path(compare.__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "too narrow for exact_match, train_loss, tokens/s, memory, time" in lines[2]
    assert lines[:2] == ["data.seed: moving with seed", "peft.lora_alpha: moving with peft.r"]
    assert "1.0000" in next(line for line in lines if "r16-0" in line)


def test_a_single_run_can_be_looked_at(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out_of(capsys, sweep / "r8-0")
    assert "r8-0 (eval_loss 2.0000) is the only config that finished" in text


# --------------------------------------------------------------------------------------------------- for a script


def test_json_is_one_document_with_everything(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = strict(out_of(capsys, sweep, "--json"))
    assert (document["objective"], document["direction"], document["best"]) == ("eval_loss", "minimize", "r16-0")
    assert document["verdict"]["kind"] == "best"
    assert document["noise"] == pytest.approx(0.0707, abs=1e-4)
    assert document["keys"] == ["seed", "peft.r", "peft.lora_alpha", "data.seed"]
    runs = {run["name"]: run for run in document["runs"]}
    assert [run["rank"] for run in document["runs"]] == [1, 2, 3, 4, None, None]
    assert runs["r8-0"]["config"] == {"seed": 0, "peft.r": 8, "peft.lora_alpha": 16, "data.seed": 0}
    assert runs["r8-0"]["behind"] == pytest.approx(1.0)
    assert runs["r8-0"]["path"] == str(sweep / "r8-0")
    assert runs["wild"]["metrics"]["eval_loss"] is None
    assert (runs["broken"]["state"], runs["broken"]["why"]) == ("failed", HOSTILE)
    assert [(group["n"], group["mean"]) for group in document["groups"]] == [(2, 1.05), (2, 2.05)]
    assert document["left_out"] == [{"overrides": ["peft.r=0"], "reason": "too small"}]


def test_another_objective_is_ranked_the_other_way(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = strict(out_of(capsys, sweep, "--json", "--objective", "exact_match"))
    assert (document["direction"], document["runs"][0]["name"]) == ("maximize", "r8-1")
    document = strict(out_of(capsys, sweep, "--json", "--objective", "exact_match", "--direction", "minimize"))
    assert document["runs"][0]["name"] == "r16-0"


def test_csv_has_a_line_a_run(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(out_of(capsys, sweep, "--csv"))))
    assert len(rows) == 6
    assert (rows[0]["name"], rows[0]["rank"], rows[0]["peft.r"], rows[0]["eval_loss"]) == ("r16-0", "1", "16", "1.0")
    assert {row["name"]: row["why"] for row in rows}["broken"] == HOSTILE


def test_equal_runs_share_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rank, loss in (("a", 8, 1.0), ("b", 16, 1.0), ("c", 32, 2.0)):
        write_run(tmp_path / "runs" / name, {"peft.r": rank}, {"eval_loss": loss})
    document = strict(out_of(capsys, tmp_path / "runs", "--json"))
    assert [run["rank"] for run in document["runs"]] == [1, 1, 3]
    assert (document["best"], document["verdict"]["kind"]) == (None, "tie")


def test_html_is_written_beside_what_is_printed(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    document = strict(out_of(capsys, sweep, "--json", "--html", page))
    assert document["verdict"]["sentence"] in page.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere : no such directory"),
        (["little", "--objective", "train_loss"], "--objective train_loss : measured on the rows trained on (allowed: eval_loss, exact_match)"),
        (["little", "--objective", "eval_los"], "did you mean eval_loss?"),
        (["little", "--direction", "up"], "invalid choice: 'up'"),
        (["little", "--html", "no/such/place.html"], "--html=no/such/place.html : no file can be written there"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_and_nothing_written(words: list[str], told: str, sweep: Path, cli: Cli) -> None:
    done = cli("compare", *words, cwd=sweep.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_comparing_needs_no_torch(sweep: Path) -> None:
    program = f"""if True:
        import sys
        from sft_lab.__main__ import main
        assert main(["compare", {str(sweep)!r}, "--html", {str(sweep / "page.html")!r}]) == 0
        print(sorted({{"torch", "transformers", "datasets", "wandb", "optuna"}} & set(sys.modules)), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_wrong_directory_among_good_ones_is_refused(sweep: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere : no such directory"):
        compare.main([str(sweep), "nowhere"])


# ----------------------------------------------------------------------------------------------------- real runs


@pytest.mark.e2e
def test_two_real_runs(cli: Cli, tmp_path: Path) -> None:
    words = [
        "model=tiny_llama",
        "tracking=none",
        "trainer.max_steps=4",
        "trainer.eval_steps=2",
        "trainer.logging_steps=1",
    ]
    words += ["data.train_rows=24", "data.eval_rows=4", "evaluation.rows=2", "evaluation.max_new_tokens=4"]
    done = cli("-m", *words, "peft=lora_r8,lora_r16", "sweep.name=little")
    assert done.returncode == 0, done.stderr
    done = cli("compare", "outputs/sweeps/little", "--json", "--html", "page.html")
    assert done.returncode == 0, done.stderr
    document = strict(done.stdout)
    assert document["keys"] == ["peft.r", "peft.lora_alpha"]
    assert sorted(run["config"]["peft.r"] for run in document["runs"]) == [8, 16]
    for run in document["runs"]:
        assert (run["state"], run["why"], run["steps"]) == ("completed", "", 4)
        assert (
            min(run[name] for name in ("train_s", "tokens_per_s", "peak_memory_bytes", "tokens", "adapter_bytes")) > 0
        )
        assert run["trainable_parameters"] > 0
    assert document["runs"][0]["metrics"]["eval_loss"] <= document["runs"][1]["metrics"]["eval_loss"]
    page = (tmp_path / "page.html").read_text()
    assert "Answers side by side" in page
    assert "eval_loss by each parameter" in page
