"""What is built, what it depends on, and that the installed program is the one in the repository."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUN_REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]
DEV_REQUIREMENTS = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it as an installer would."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_wheel_carries_package_conf_and_templates_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sft_lab"}
    assert {name for name in names if name.startswith("sft_lab/conf/")} == _files("conf", "**/*", "sft_lab/")
    assert "sft_lab/conf/config.yaml" in names
    templates = _files("sft_lab/templates", "*.jinja")
    assert templates
    assert templates <= names
    assert _files("sft_lab", "**/*.py") <= names


def test_sdist_carries_what_a_contributor_needs(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    for folder in ("conf", "multirun_examples", "tests", "sft_lab"):
        assert _files(folder, "**/*") <= names
    assert {"constraints.txt", "Makefile", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert not any(name.startswith(("outputs", ".venv", ".git/")) for name in names)


def test_wheel_metadata_states_version_and_licence(wheel: Path) -> None:
    import sft_lab

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        fields = archive.read(name).decode()
    assert f"\nVersion: {sft_lab.__version__}\n" in fields
    assert "\nLicense-Expression: Apache-2.0\n" in fields


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["trian"]], ids=" ".join)
def test_console_script_is_the_same_program(wheel: Path, arguments: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(name).decode())
    module, function = entry_points["console_scripts"]["sft-lab"].split(":")
    script = tmp_path / "sft-lab"  # as an installer writes it
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    as_script = _run([sys.executable, str(script), *arguments], tmp_path, ROOT)
    as_module = _run([sys.executable, "-m", "sft_lab", *arguments], tmp_path, ROOT)
    assert as_script.returncode == as_module.returncode
    assert as_script.stdout == as_module.stdout
    assert as_script.stderr == as_module.stderr
    assert as_module.stdout or as_module.stderr


def test_constraints_are_exact_public_versions_in_order() -> None:
    _, *lines = (ROOT / "constraints.txt").read_text().splitlines()
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))


def test_constraints_pin_everything_that_the_dependencies_pull_in() -> None:
    pinned = _pins()
    pulled_in = _pulled_in([*RUN_REQUIREMENTS, *DEV_REQUIREMENTS], pinned)
    assert len(pulled_in) > len(RUN_REQUIREMENTS) + len(DEV_REQUIREMENTS)
    assert pulled_in - set(pinned) == set()


def test_constraints_lie_within_the_declared_ranges() -> None:
    pinned = _pins()
    for requirement in [*RUN_REQUIREMENTS, *DEV_REQUIREMENTS]:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_every_library_that_the_package_imports_is_declared() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in RUN_REQUIREMENTS}
    distributions = metadata.packages_distributions()
    imported = {name for file in (ROOT / "sft_lab").rglob("*.py") for name in _imports(file)}
    third_party = imported - set(sys.stdlib_module_names) - {"sft_lab"}
    assert "hydra" in third_party
    undeclared = {
        name for name in third_party if declared.isdisjoint(canonicalize_name(d) for d in distributions.get(name, []))
    }
    extras = PROJECT["optional-dependencies"]
    by_extra = {"mlflow": "mlflow", "trackio": "trackio", "submitit": "launchers", "hydra_plugins": "launchers"}
    assert undeclared - by_extra.keys() == set()  # those only where tracking.method or hydra/launcher asks for them
    assert set(by_extra.values()) <= extras.keys()


def test_installed_wheel_runs_from_any_directory(wheel: Path, tmp_path: Path) -> None:
    """Installed beside this environment's libraries, away from the repository and its conf/."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = _run([sys.executable, "-c", "import sft_lab; print(sft_lab.__file__)"], elsewhere, site)
    assert where.stdout.strip() == str(site / "sft_lab" / "__init__.py")
    for command in ([sys.executable, "-m", "sft_lab"], [sys.executable, str(site / "bin" / "sft-lab")]):
        done = _run([*command, "--cfg", "job"], elsewhere, site)
        assert done.returncode == 0, done.stderr
        assert "learning_rate" in done.stdout
    assert list(elsewhere.iterdir()) == []


def _run(command: list[str], cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True)


def _files(folder: str, pattern: str, prefix: str = "") -> set[str]:
    """Paths of the files in a folder of the repository, as an archive names them."""
    found = (path for path in (ROOT / folder).glob(pattern) if path.is_file() and "__pycache__" not in path.parts)
    return {prefix + path.relative_to(ROOT).as_posix() for path in found}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {str(canonicalize_name(name)): version for name, version in pairs}


def _pulled_in(requirements: list[Requirement], pinned: dict[str, str]) -> set[str]:
    """Names of the installed distributions that the requirements lead to.

    A distribution that its parent pins itself with `==` (what a CUDA build of torch brings) is as fixed as by a
    constraint, and so is what comes after it.
    """
    seen: set[tuple[str, str]] = set()  # distribution, extra
    waiting = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        name = str(canonicalize_name(requirement.name))
        fixed = any(s.operator == "==" and "*" not in s.version for s in requirement.specifier)
        if (name, extra) in seen or (fixed and name not in pinned):
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            child = Requirement(text)
            if child.marker is None or child.marker.evaluate({"extra": extra}):
                waiting += [(child, e) for e in ("", *child.extras)]
    return {name for name, _ in seen}


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]
