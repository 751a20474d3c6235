"""What a run records of the code that it runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sft_lab import config as configs
from sft_lab import embedded, provenance


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
    found = state(checkout)
    assert found["untracked"] == {"package/notes.txt": "kept\n"}
    assert found["left_out"] == ["package/.env: by its name a secret", "package/weights.bin: no text, 3 bytes"]
    assert "123" not in str(found)


SECRETS = [
    ".env", ".env.local", "prod.env", ".netrc", "_netrc", ".git-credentials", ".pypirc", ".npmrc", ".pgpass", "a.pem", "A.KEY",
    "a.p12", "a.pfx", "my.keystore", "id_rsa", "id_ed25519", "id_ed25519.old", "credentials", "credentials.json",
    "application_default_credentials.json", "secret.txt", "secrets.yaml", "Secrets.toml", "hf_token", "hf_token.txt", "token",
    ".vault-token", "kaggle.json", "service-account.json", "service_account_prod.json", "my-service-account-1.json",
    "client_secret_12.apps.json", "openai_api_key.txt", "api-keys.json", "passwords.txt", ".aws/config", ".ssh/config",
    "secrets/prod.yaml",
]  # fmt: skip
NO_SECRETS = [
    "tokenizer.json", "tokenize.py", "token_counts.py", "special_tokens_map.json", "added_tokens.json", "tokens.txt", "keys.py",
    "monkey", "environment.yaml", "env.py", "id_rows.json", "service_accounting.py", "secretary.txt", "passwordless.md",
]  # fmt: skip


def test_what_is_by_its_name_a_secret_is_named_and_no_more(checkout: Path) -> None:
    for name in [*SECRETS, *NO_SECRETS]:
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text(f"contents of {name}\n")
    found = state(checkout)
    assert found["untracked"].keys() == {f"package/{name}" for name in NO_SECRETS}
    assert set(found["left_out"]) == {f"package/{name}: by its name a secret" for name in SECRETS}


def test_changes_of_a_secret_that_git_knows_are_not_recorded(checkout: Path) -> None:
    """What was changed, added and taken away; the other changes can still be had again."""
    for name in ("secrets.yaml", "[a] token", "credentials.json", "hf_token"):
        (checkout / name).write_text("password: old123\n" * 9)
    (checkout / "plain.yaml").write_text("plain: 1\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "second")
    (checkout / "secrets.yaml").write_text("password: new123\n")
    (checkout / "[a] token").write_text("password: new123\n")
    git(checkout, "mv", "hf_token", "token")
    git(checkout, "rm", "credentials.json")
    (checkout / "id_rsa").write_text("new123\n")
    git(checkout, "add", ".")
    (checkout / "code.py").write_text("one = 2\n")
    found = state(checkout)
    assert "123" not in str(found)
    names = ["[a] token", "credentials.json", "hf_token", "id_rsa", "secrets.yaml", "token"]
    assert found["left_out"] == [f"package/{name}: by its name a secret" for name in names]
    git(checkout, "reset", "--hard")
    subprocess.run(["git", "apply"], cwd=checkout.parent, input=found["diff"].encode(), check=True)
    assert (checkout / "code.py").read_text() == "one = 2\n"


def test_what_a_persons_git_shows_in_a_diff_changes_nothing(checkout: Path) -> None:
    """A program that turns a file into text for a diff, such as one that decrypts it."""
    git(checkout, "config", "diff.shown.textconv", "sed s/^/decrypted-/")
    git(checkout, "config", "color.diff", "always")
    (checkout.parent / ".git" / "info" / "attributes").write_text("*.py diff=shown\n")
    (checkout / "code.py").write_text("one = 2\n")
    found = state(checkout)
    assert "+one = 2" in found["diff"]
    assert "decrypted" not in found["diff"]


def test_a_link_is_not_followed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "notes.txt"
    elsewhere.write_text("private\n")
    (checkout / "link").symlink_to(elsewhere)
    (checkout / "folder").symlink_to(elsewhere.parent)
    (checkout / "broken").symlink_to("nowhere")
    found = state(checkout)
    assert found["untracked"] == {}
    assert found["left_out"] == [
        "package/broken: a link to nowhere",
        f"package/folder: a link to {elsewhere.parent}",
        f"package/link: a link to {elsewhere}",
    ]


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


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf", "config.json"])
def test_a_models_fingerprint_tells_its_last_byte(name: str, tmp_path: Path) -> None:
    """Merged with an adapter, say, a model keeps its sizes, its header and its embedding."""
    shutil.copytree(embedded.resolve("embedded:tiny_llama"), tmp_path / "model")
    config = configs.to_config(configs.compose(["model=from_path", f"model.path={tmp_path}/model"]))
    file = tmp_path / "model" / name
    if name != "config.json":
        file.write_bytes(bytes(3 << 20))
    before = provenance.model_fingerprint(config)
    assert provenance.model_fingerprint(config) == before
    with open(file, "r+b") as changed:
        changed.seek(-1, 2)
        changed.write(b" ")
    assert provenance.model_fingerprint(config) != before
