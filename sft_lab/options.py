"""conf/ as a person sees it: where it lies, its groups, their options, and the help that lists them."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def groups(conf_dir: Path = CONF_DIR) -> dict[str, dict[str, str]]:
    """Every config group's options, each with the comment line that heads its file."""
    return {
        folder.name: {file.stem: _headline(file) for file in sorted(folder.glob("*.yaml"))}
        for folder in sorted(conf_dir.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }


def _headline(file: Path) -> str:
    comments = (line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def help_text() -> str:
    """What `--help` prints: Hydra's template with our groups, options and their comments in it."""
    lines = [
        "sft_lab trains LoRA adapters for language models, with configs composed by Hydra.",
        "",
        "  python -m sft_lab [train] [GROUP=OPTION ...] [KEY=VALUE ...]     one run",
        "  python -m sft_lab -m KEY=VALUE,VALUE ...                         a sweep",
        "  python -m sft_lab plan|inspect [GROUP=OPTION ...]                what it will do; the rows as they train",
        "  python -m sft_lab resume|eval|chat|repro RUN_DIR                 --help tells more of each",
        "  python -m sft_lab compare DIR ..., env",
        "",
        "Groups and their options",
    ]
    for group, options in groups().items():
        width = max(map(len, options), default=0)
        lines += ["", f"  {group}" + ("" if options else "  (none yet)")]
        lines += [f"    {option:<{width}}  {comment}" for option, comment in options.items()]
    lines += [
        "",
        "Keys: `--cfg job --resolve` prints each with the value it will have; --hydra-help lists Hydra's own flags.",
    ]
    return "\n".join(lines).replace("$", "$$") + "\n"  # Hydra fills in a string.Template
