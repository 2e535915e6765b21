"""English text that every machine has: the documentation in Python's standard library, read without importing it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from experiments.datasets.base import Dataset
from experiments.files import kept_content, kept_file

#: A distribution that ships less than this has stripped its docstrings.
MIN_CHARACTERS = 500_000

#: Fields that hold statements, or handlers and cases that hold some, in the order in which nodes have them.
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(kw_only=True)
class PyDoc(Dataset):
    """Docstrings of the standard library's modules, classes and functions, and the topics of ``help()``."""

    name: ClassVar[str] = "pydoc"
    description: ClassVar[str] = "docstrings and help topics of Python's standard library"

    def fingerprint(self) -> str:
        """Digest Python's version and the names and sizes of the sources."""
        return _fingerprint()

    def documents(self) -> Iterator[str]:
        """Yield every text once, in the order of file names; collected once and then read from the cache.

        Raises:
            ValueError: this Python has no sources with docstrings.
        """
        path = kept_file(f"pydoc-{self.fingerprint()}.json", _collected)
        yield from json.loads(kept_content(path))


def _collected() -> bytes:
    """Return the texts as a JSON array."""
    texts = list(dict.fromkeys(text for path in _sources() for text in _texts(path)))
    if sum(map(len, texts)) < MIN_CHARACTERS:
        raise ValueError(
            f"dataset: 'pydoc' found too little text under {sysconfig.get_path('stdlib')}; "
            "use dataset=local dataset.path=FILE"
        )
    return json.dumps(texts).encode()


@cache
def _fingerprint() -> str:
    digest = hashlib.sha256(sys.version.encode())
    for path in _sources():
        digest.update(f"{path}:{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


@cache
def _sources() -> Sequence[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "test")]
        found += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(found)


def _texts(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some sources are written to be warned about
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # kept broken on purpose, as samples
    for node in _statements(tree):
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
            if text and text.strip():
                yield text.encode("utf-8", "ignore").decode()
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                yield from (inspect.cleandoc(topic) for topic in ast.literal_eval(node).values())


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module and its statements in the order of `ast.walk`, which goes through all expressions, too."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        yield node
        for block in _BLOCKS:
            todo.extend(getattr(node, block, ()))
