"""Whether a finished run is kept: it answers the same question, and nobody asked to measure it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.point.point import Point
from experiments.results.manifest import environment
from experiments.results.run_folder import RunFolder


def is_done(point: Point) -> bool:
    """Tell whether a point's run is finished and what it was made of is as it was.

    Its files have to be as they were written, the trace that it records has to be there, and neither the code of its
    policies, router, model and data set nor the files that policies read may have changed. Runs that do not say what
    they were made of are done.
    """
    folder, record = RunFolder(point.folder), point.options.trace.record
    if not folder.is_finished or folder.damaged or (record is not None and not Path(record).exists()):
        return False
    return not any(_changed(folder.manifest, point))


def is_kept(point: Point) -> bool:
    """Tell whether nothing of a point is to be run: it is done, and ``force`` is not set."""
    return is_done(point) and not point.options.force


def remarks(point: Point) -> str:
    """Return what the reader of a kept run should know of it, as the end of a line; empty: nothing."""
    manifest = RunFolder(point.folder).manifest
    unnoticed = "" if "sources" in manifest else "; it does not say of which code, so edits of policies go unnoticed"
    differing = ", ".join(_differences(manifest, environment()))
    return unnoticed + (f"; measured with {differing}" if differing else "")


def replaced(point: Point) -> str:
    """Say which finished run a new one replaces although nobody forced it, and why; empty: none."""
    folder = RunFolder(point.folder)
    changed = ", ".join(_changed(folder.manifest, point)) if folder.is_finished and not point.options.force else ""
    return changed and (
        f"in place of the finished run, as the code or a file of {changed} has changed; tag=NAME measures beside it"
    )


def _changed(manifest: Mapping[str, Any], point: Point) -> Iterator[str]:
    sources, inputs = (manifest.get(field) for field in ("sources", "inputs"))
    if isinstance(sources, Mapping):
        now = point.sources()
        # What an earlier version didn't note may be as it was.
        yield from (name for name in sorted(sources) if sources[name] != now.get(name))
    if isinstance(inputs, Mapping):
        now = point.inputs()
        yield from (name for name in sorted({*now, *inputs}) if inputs.get(name) != now.get(name))


def _differences(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a run was measured with and is another now: revision, versions, machine."""
    for section, keys in _NOTED.items():
        before, present = manifest.get(section) or {}, now[section]
        for key in keys or sorted({*before, *present}):
            if section in manifest and before.get(key) != present.get(key):
                yield f"{_NAMES.get(key, key)} {_text(before.get(key))} (now {_text(present.get(key))})"


#: What of the manifest's notes on its environment may change numbers; none named: all.
_NOTED: dict[str, tuple[str, ...]] = {
    "git": ("revision", "dirty"),
    "packages": (),
    "host": ("cpu", "num_cores", "gpus", "python"),
}
_NAMES = {"dirty": "changed tracked files:", "num_cores": "cores:", "cpu": "processor", "gpus": "GPUs"}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 40 and set(text) <= set("0123456789abcdef") else text
