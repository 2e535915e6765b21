"""The commands that the pages show, in code blocks and within sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from experiments.compose.help import CONF

ROOT = CONF.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
#: What a command begins with; a line of a block that begins otherwise is no command.
_PROGRAMS = ("python", ".venv/bin/python", "torchrun", "srun", "sbatch", "make", "pip")


def commands(page: Path) -> list[str]:
    """Return a page's commands in their order, without comments, each once."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    return list(dict.fromkeys(command for command in _commands(text) if command.split()[0] in _PROGRAMS))


def _commands(text: str) -> Iterator[str]:
    blocks = re.findall(r"^```(?!mermaid)\w*\n(.*?)^```", text, re.M | re.S)
    for line in re.findall(r"^ {4}(\S.*)$", text, re.M) + [line for block in blocks for line in block.splitlines()]:
        # What stands some spaces away, or behind a #, explains the command.
        if command := re.split(r"\s#|(?<=\S)\s{3,}(?=[^-\s])(?!\S*=)", line.strip())[0].strip():
            yield command
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for quoted in re.findall(r"`([^`]+)`", prose):
        if len(quoted.split()) > 1:
            yield " ".join(quoted.split())


def program(command: str) -> str:
    """Return what a command starts: ``run.py``, a module, or a program and its target, as in ``make demo``."""
    words = shlex.split(command)
    if "run.py" in words:
        return "run.py"
    if "-m" in words:
        return words[words.index("-m") + 1]
    return " ".join(words[:2])


def overrides(command: str) -> list[str]:
    """Return the overrides of a command that starts run.py."""
    words = shlex.split(command)
    return words[words.index("run.py") + 1 :]
