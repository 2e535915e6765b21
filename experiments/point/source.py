"""Digests of the code that a component is made of, so that an edited one is noticed."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType

#: What lies here has a revision or a version, which the manifest notes.
_PROJECT = Path(__file__).resolve().parents[2]
_VERSIONED = (
    *(_PROJECT / name for name in ("harmoeny", "baselines", "experiments", "results_schema")),
    *{Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")},
)


def component_digest(component: object, base: type, modules: Iterable[str] = ()) -> str:
    """Digest the code that a component adds to its interface.

    Args:
        component: of a class that users may write.
        base: the interface.
        modules: names of other modules that it depends on.

    Returns:
        As `source_digest` does.
    """
    classes = [cls for cls in type(component).__mro__ if issubclass(cls, base) and cls is not base]
    return source_digest([*(cls.__module__ for cls in classes), *modules])


def source_digest(names: Iterable[str]) -> str:
    """Digest modules and what they import: of this project what is in their own folder and below it, of others all.

    Comments, docstrings and formatting do not count, nor do installed packages.

    Args:
        names: of the modules.

    Returns:
        16 hexadecimal digits; empty where a module comes from no file.
    """
    files = {path for name in set(names) for path in _files(name)}
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: (path.name, str(path))):
        digest.update(f"{path.name} {_code_digest(path, path.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


@cache
def _files(name: str) -> set[Path]:
    """Return a module's file and those of the same author that it needs directly or through others."""
    first = _file(name)
    if first is None:
        return set()
    packaged = "." in name
    found, todo = {first}, [(name, first)]
    while todo:
        module, path = todo.pop()
        for imported in _imports(module, path):
            file = _file(imported)
            if file is None or file in found:
                continue
            beside = first.parent in file.parents if packaged else first.parent == file.parent
            if beside or not any(folder in file.parents for folder in _VERSIONED):
                found.add(file)
                todo.append((imported, file))
    return found


def _imports(module: str, path: Path) -> Iterator[str]:
    """Yield the names of modules, and of what may be one, that a file imports anywhere."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _file(name: str) -> Path | None:
    """Return the file of a module; None: there is no such module, or it has no file of Python code."""
    module = sys.modules.get(name)
    origin = getattr(module, "__file__", None) if isinstance(module, ModuleType) else _unloaded(name)
    return Path(origin).resolve() if origin is not None and origin.endswith(".py") else None


def _unloaded(name: str) -> str | None:
    if name.rpartition(".")[0] not in ("", *sys.modules):
        return None  # what nothing has loaded is looked for only where that runs no code
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None  # a name in a module, and no module
    return None if spec is None else spec.origin


@lru_cache(maxsize=1024)
def _code_digest(path: Path, _: int) -> str:
    """Digest a file's code; the second argument tells whether the file has changed since it was last read."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _is_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _is_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
