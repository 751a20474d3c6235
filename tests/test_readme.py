"""README is true: what it names exists, and what it shows can be run."""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from sft_lab import checks, command_line, drift
from sft_lab import config as configs
from sft_lab.__main__ import VERBS
from sft_lab.options import groups
from sft_lab.runs import RunDirectory

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for line in re.findall(r"^    (?:\.venv/bin/)?(python -m sft_lab.*)$", README, flags=re.MULTILINE)
]
(TORCHRUN,) = re.findall(r"^    (torchrun .*)$", README.replace("\\\n", " "), flags=re.MULTILINE)
(_BLOCK,) = re.findall(r"^    #!/bin/bash\n(?:    .*\n)+", README, flags=re.MULTILINE)
JOB = textwrap.dedent(_BLOCK)  # big.sh; tests/cluster/test_slurm.py has a real Slurm run it


def test_it_is_short_and_shows_commands() -> None:
    assert len(README.splitlines()) < 200
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_one(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs exist; everything else composes, the files it names being there."""
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "multirun_examples").symlink_to(ROOT / "multirun_examples")
    words = command[3:]
    if words and words[0] in ("plan", "inspect"):
        words = [word for word in words[1:] if "=" in word]
    if words and words[0] in VERBS and words[0] != "train":
        assert words[0] in ("env", "compare") or words[1] == "RUN_DIR"
        overrides = [word for word in words[2:] if "=" in word]
        if overrides:
            configs.compose(overrides)
        return
    command_line.check(command_line.parse(words))


def test_the_line_for_two_machines_is_torchruns_and_ours() -> None:
    """torchrun itself takes it apart; its other words and `resume` stand in the text."""
    from torch.distributed.run import get_args_parser

    section = re.split(r"^##+ .*$", README.split("### Two machines, plain torchrun\n")[1], flags=re.MULTILINE)[0]
    parser = get_args_parser()
    found = parser.parse_args(shlex.split(TORCHRUN)[1:])
    assert (found.nnodes, found.nproc_per_node, found.max_restarts) == ("2", "8", 3)
    assert (found.rdzv_backend, found.rdzv_id, found.rdzv_endpoint) == ("c10d", "NAME", "HOST:29500")
    assert (found.module, found.training_script) == (True, "sft_lab")
    assert command_line.check(command_line.parse(found.training_script_args)) == Path("outputs/two")
    assert "-m sft_lab resume outputs/two" in section.replace("\n", " ")
    named = set(re.findall(r"--\w+", section)) - {"--rdzv_"}
    assert named >= {"--max_restarts", "--node_rank", "--master_addr", "--master_port", "--local_addr"}
    assert named <= set(parser._option_string_actions)


def _job(folder: Path) -> list[str]:
    """What the job script has srun start, run in a folder by the real bash."""
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv" / "bin" / "activate").write_text('PATH="$PWD:$PATH"\n')
    srun = folder / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "64"}
    return subprocess.check_output(["bash", "-euc", JOB], cwd=folder, env=environment, text=True).splitlines()


def test_the_slurm_script_starts_a_run_and_then_resumes_it(tmp_path: Path) -> None:
    options, started = ["--kill-on-bad-exit=1", "--cpus-per-task=64"], ["python", "-m", "sft_lab"]
    assert _job(tmp_path)[:5] == options + started
    run = command_line.check(command_line.parse(_job(tmp_path)[5:]))
    assert run == Path("outputs/big")
    (tmp_path / run).mkdir(parents=True)
    (tmp_path / run / "config.yaml").touch()
    assert _job(tmp_path) == [*options, *started, "resume", "outputs/big"]
    assert "resume" in VERBS


def test_every_key_of_the_slurm_launcher_it_names_exists() -> None:
    keys = yaml.safe_load((ROOT / "conf" / "hydra" / "launcher" / "slurm.yaml").read_text()).keys()
    section = re.split(r"^##+ .*$", README.split("### Slurm\n")[1], flags=re.MULTILINE)[0]
    named = set(re.findall(r"hydra\.launcher\.(\w+)", README)) | set(re.findall(r"`([a-z_]+)`", section)) - {"scancel"}
    assert named >= {
        "partition",
        "gpus_per_node",
        "nodes",
        "setup",
        "timeout_min",
        "max_num_timeout",
        "array_parallelism",
    }
    assert named <= keys
    words = re.findall(r"`('?hydra\.launcher\.[^`]*)`", section.replace("\n", " "))
    typed = [word for part in words for word in shlex.split(part)]
    assert len(typed) == 5
    command_line.check(command_line.parse(["-m", "hydra/launcher=slurm", *typed]))


def test_what_resume_lets_change_is_named_and_what_it_is_told_to_allow_exists() -> None:
    (free,) = re.findall(r"Free, since they change no bit of it: ((?:`[^`]+`,? ?)+)\.", README.replace("\n", " "))
    named = set()
    for word in re.findall(r"`([^`]+)`", free):
        section, _, keys = word.partition(".")
        named |= {f"{section}.{key}" for key in keys.strip("{}").split(",")}  # of a whole section: `section.`
    assert named == set(drift._FREE)
    (example,) = re.findall(r"`resume RUN_DIR (--allow [^`]*)`", README.replace("\n", " "))
    allowed = [word for word in example.split() if word != "--allow"]
    assert len(allowed) == 2
    assert all(name in drift._WHY or checks.type_of(name) for name in allowed)


def test_deepspeed_is_installed_by_one_and_the_same_command_everywhere() -> None:
    command = "pip install {}--no-build-isolation 'sft-lab[deepspeed]'"
    assert command.format("") in README
    told = (ROOT / "sft_lab" / "distributed.py").read_text(encoding="utf-8")
    assert command.format("") in re.sub(r'"\s+"', "", told)  # a text over two lines
    assert command.format("-qq -c constraints.txt ") in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_option_is_in_its_table() -> None:
    for group, options in groups().items():
        if not options:
            continue
        (row,) = re.findall(rf"^\| `{group}` \|(.*)\|$", README, flags=re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row.split("|")[0])) == set(options)


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"make ([\w-]+) ", README)) - {"are"}
    assert {"demo", "test"} <= named & targets


def test_every_file_of_a_run_is_told_of(tmp_path: Path) -> None:
    paths = {p.name for p in vars(RunDirectory(tmp_path)).values() if isinstance(p, Path) and p.parent == tmp_path}
    assert {name for name in paths if name not in README} == set()
