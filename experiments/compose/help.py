"""What a user can choose from: the groups, their choices and what each is, for error messages and ``--help``."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_store import ConfigStore

from experiments.registry import ALL_SYSTEMS, GROUPS, discover

CONF = Path(__file__).resolve().parents[2] / "conf"
_ABOUT = {
    "experiment": "a prepared experiment; without one, the values below are run once",
    **{name: group.description for name, group in GROUPS.items()},
    "hardware": "what is known of the machine",
    "what_if": "what else might be: one thing about the machine or the recorded routing that is taken to be different",
    "slo": "limits that a request must keep, for goodput; without one, slo.* as below",
    "machine": "a whole machine to simulate, hardware= and as many ranks as it has GPUs; or here",
}
#: Folders of conf that hold settings of Hydra or of one machine rather than choices.
_NO_GROUPS = ("hydra", "local")


def groups() -> dict[str, str]:
    """Return all groups with what they are for."""
    folders = sorted({str(path.parent.relative_to(CONF)) for path in CONF.rglob("*.yaml")} - {"."})
    return _ABOUT | {name: "" for name in folders if name not in _ABOUT and name.split("/")[0] not in _NO_GROUPS}


def choices(group: str) -> dict[str, str]:
    """Return a group's choices by name with a line on each: what is registered with Hydra, and presets in conf."""
    store = ConfigStore.instance()
    registered = store.list(group) if group in store.list("") else []
    components = discover(group)[0] if group in GROUPS else {}
    names = [name.removesuffix(".yaml") for name in registered]
    found = {name: components[name].description if name in components else "" for name in names}
    if group == "system" and ALL_SYSTEMS in found:
        found[ALL_SYSTEMS] = "every system that this installation has"
    presets = {path.stem: _first_comment(path) for path in (CONF / group).glob("*.yaml")} if group else {}
    return dict(sorted((found | presets).items()))


def unavailable(group: str) -> dict[str, str]:
    """Return a group's modules that cannot be imported, and why: a missing dependency."""
    return discover(group)[1] if group in GROUPS else {}


def help_text() -> str:
    """Return the section of ``--help`` about groups."""
    lines = []
    for group, about in groups().items():
        lines.append(f"{group}: {about}" if about else group)
        entries = choices(group) | {name: f"unavailable here: {why}" for name, why in unavailable(group).items()}
        lines += [f"    {name:<16} {text}".rstrip() for name, text in entries.items()]
    return "\n".join(lines).replace("$", "$$")  # Hydra fills the text into a string.Template


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.removeprefix("#").strip()
    return ""
