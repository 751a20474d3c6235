"""What a run records of the code that it runs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from sft_lab import provenance


def git(folder: Path, *words: str) -> None:
    named = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *named, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit, as seen from a package inside it."""
    package = tmp_path / "package"
    package.mkdir()
    git(tmp_path, "init")
    (package / "code.py").write_text("one = 1\n")
    (tmp_path / ".gitignore").write_text("ignored\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return package


def state(folder: Path) -> dict[str, Any]:
    provenance.git_state.cache_clear()  # a process asks once
    found = provenance.git_state(folder)
    assert found is not None
    return found


def test_a_clean_tree_is_its_commit(checkout: Path) -> None:
    found = state(checkout)
    assert (found["dirty"], found["diff"], found["untracked"], found["left_out"]) == (False, "", {}, [])
    assert len(found["commit"]) == 40


def test_what_is_not_committed_can_be_had_again(checkout: Path) -> None:
    """Changes anywhere in the repository, staged or not, and files that git does not know yet."""
    (checkout / "code.py").write_text("one = 2\n")
    (checkout.parent / "conf.yaml").write_text("key: ü\n")
    (checkout.parent / "staged.py").write_text("staged = 1\n")
    (checkout.parent / "ignored").write_text("a secret")
    git(checkout, "add", "../staged.py")
    found = state(checkout)
    assert found["dirty"]
    assert found["untracked"] == {"conf.yaml": "key: ü\n"}
    assert found["left_out"] == []
    git(checkout, "reset", "--hard")
    subprocess.run(["git", "apply"], cwd=checkout.parent, input=found["diff"].encode(), check=True)
    assert (checkout / "code.py").read_text() == "one = 2\n"
    assert (checkout.parent / "staged.py").read_text() == "staged = 1\n"


def test_what_is_too_much_to_record_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_KEPT_BYTES", 200)
    (checkout / "code.py").write_text("one = 2\n" * 50)
    (checkout / "large.txt").write_text("x" * 300)
    found = state(checkout)
    assert len(found["diff"]) == 200
    assert found["left_out"][0].startswith("diff: 200 of its ")
    assert found["left_out"][1] == "package/large.txt: 300 bytes"


def test_secrets_and_what_is_no_text_are_not_recorded(checkout: Path) -> None:
    (checkout / "weights.bin").write_bytes(b"\xff\xfe\x00")
    (checkout / ".env").write_text("WANDB_API_KEY=123\n")
    (checkout / "notes.txt").write_text("kept\n")
    (checkout / "link").symlink_to("nowhere")
    found = state(checkout)
    assert found["untracked"] == {"package/notes.txt": "kept\n"}
    told = dict(line.split(": ", 1) for line in found["left_out"])
    assert told.keys() == {"package/weights.bin", "package/.env", "package/link"}
    assert "123" not in str(found)


def test_outside_a_checkout_or_without_git_there_is_no_state(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    provenance.git_state.cache_clear()
    assert provenance.git_state(tmp_path_factory.mktemp("elsewhere")) is None
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(checkout) is None
    provenance.git_state.cache_clear()


def test_every_package_is_recorded_under_one_spelling() -> None:
    found = provenance.installed()
    assert {"torch", "hydra-core", "pyyaml"} <= found.keys()
    assert found["torch"] == provenance.package_versions()["torch"]
    assert list(found) == sorted(found)
