"""A folder of results that can be sent to somebody: no absolute paths, no names of users or hosts."""

from __future__ import annotations

import getpass
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.data.load import Run, load_run, load_sweep, run_folders, sweep_folders
from analysis.report.html.write import write_report
from results_schema.atomic import write_text
from results_schema.files import MANIFEST, SWEEP

#: What of a sweep's or run's folder is read by people; besides everything in its ``figures``.
_TEXTS = (
    "table.txt", "table.csv", "ratios.txt", "ratios.csv", "serving.txt", "serving.csv", "report.html", "advice.html",
    "advice.md", "advice.csv",
    "summary.json",
)  # fmt: skip
#: Fields of the manifest that name the machine, or files and processes on it.
_LOCAL_FIELDS = ("beside", "checksums")
_ABSOLUTE = re.compile(r"^(~|/|[A-Za-z]:[\\/])")
#: What of a page is code and not text: nobody's names are in it, and it works only as it is.
_CODE = re.compile(r"(<style>.*?</style>|<script(?![^>]*json)[^>]*>.*?</script>)", re.S)
#: Users whose names say nothing of anybody.
_ANYBODY = ("root", "runner", "ubuntu", "user")
_PLACEHOLDERS = {"host": "HOST", "user": "USER", "path": "FOLDER"}


def export(folder: Path, out: Path) -> list[Path]:
    """Write a folder with the report, figures, tables, configurations and manifests of a sweep or a run.

    Args:
        folder: of the sweep or the run.
        out: is created; must be empty.

    Returns:
        The files.

    Raises:
        ValueError: nothing finished is there, or ``out`` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {str(out)!r}, must be empty or not there")
    if not any((folder / name).exists() for name in (SWEEP, MANIFEST)):
        inside = [str(path) for path in (*sweep_folders(folder), *run_folders(folder))][:1]
        raise ValueError(f"{folder}: must be the folder of a sweep or a run{f', as {inside[0]}' if inside else ''}")
    runs = load_sweep(folder).runs if (folder / SWEEP).exists() else [load_run(folder)]
    if not runs:
        raise ValueError(f"{folder}: no finished run in it")
    if not (folder / "report.html").exists():
        write_report(folder)
    secrets = _secrets(runs, [folder.resolve(), Path.cwd(), Path.home()])
    texts = [folder / name for name in _TEXTS if (folder / name).is_file()]
    written = [_write(out / path.name, _clean(path.read_text(encoding="utf-8"), secrets)) for path in texts]
    for path in sorted((folder / "figures").glob("*")):
        target = out / "figures" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            _write(target, _clean(path.read_text(encoding="utf-8"), secrets))
        else:
            shutil.copyfile(path, target)
        written.append(target)
    written += _runs(runs, out, secrets)
    return written


def _runs(runs: Sequence[Run], out: Path, secrets: Mapping[str, str]) -> list[Path]:
    """Write every run's manifest and configuration, and the iterations of all as one table."""
    written = []
    for run in runs:
        name = str(run.manifest["run_id"])
        manifest = {key: value for key, value in run.manifest.items() if key not in _LOCAL_FIELDS}
        manifest["host"] = {k: v for k, v in (manifest.get("host") or {}).items() if k not in ("name", "platform")}
        texts = {"manifest.json": json.dumps(_local(manifest), indent=2) + "\n"}
        texts["config.yaml"] = yaml.safe_dump(_local(run.config), sort_keys=False)
        written += [_write(out / "runs" / f"{name}.{file}", _clean(text, secrets)) for file, text in texts.items()]
    rows = pd.concat([run.iterations.assign(run_id=run.manifest["run_id"]) for run in runs])
    written.append(_write(out / "iterations.csv", _clean(rows.to_csv(index=False), secrets)))
    return written


def _secrets(runs: Iterable[Run], folders: Iterable[Path]) -> dict[str, str]:
    """Return what must not stand anywhere, and what stands there instead; the longest first."""
    found = {str(folder): _PLACEHOLDERS["path"] for folder in folders if len(folder.parts) > 1}
    found |= {
        str(parent): _PLACEHOLDERS["path"] for f in list(found) for parent in Path(f).parents if len(parent.parts) > 2
    }
    found |= {path: Path(path).name for run in runs for path in _paths([run.config, run.manifest])}
    user = _user()
    hosts = {str((run.manifest.get("host") or {}).get("name") or "") for run in runs} - {""}
    found |= dict.fromkeys(hosts, _PLACEHOLDERS["host"])
    if user not in _ANYBODY:
        found |= {f"/home/{user}": _PLACEHOLDERS["path"], user: _PLACEHOLDERS["user"]}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _paths(value: Any) -> list[str]:
    """Return the absolute paths in plain data."""
    if isinstance(value, Mapping | list | tuple):
        return [path for item in (value.values() if isinstance(value, Mapping) else value) for path in _paths(item)]
    return [value] if isinstance(value, str) and _ABSOLUTE.match(value) and len(Path(value).parts) > 1 else []


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        return "root"


def _clean(text: str, secrets: Mapping[str, str]) -> str:
    """Replace what must not be there: paths wherever they begin, names where they are words of their own."""
    parts = _CODE.split(text)
    for place in range(0, len(parts), 2):  # every second part is code
        for secret, placeholder in secrets.items():
            found = re.escape(secret)
            pattern = found if _ABSOLUTE.match(secret) else rf"(?<![\w-]){found}(?![\w-])"
            parts[place] = re.sub(pattern, placeholder, parts[place])
    return "".join(parts)


def _local(value: Any) -> Any:
    """Return plain data in which of absolute paths only the name of the file is left."""
    if isinstance(value, Mapping):
        return {key: _local(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_local(item) for item in value]
    return Path(value).name if isinstance(value, str) and _ABSOLUTE.match(value) else value


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path
