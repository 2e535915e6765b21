"""From the exceptions of Hydra and OmegaConf to one line that names the field, its value and what is allowed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from experiments.compose.help import CONF, choices, unavailable
from results_schema.atomic import NO_ROOM, WriteError, write_error


def explain(error: BaseException) -> str:
    """Return one line that says what is wrong with a configuration."""
    return one_line(_explain(error))


def one_line(text: object) -> str:
    """Return a text on one line, with escapes in place of what cannot be printed."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def explain_hydra(error: Exception, arguments: Sequence[str]) -> str | None:
    """Return one line where Hydra itself fails on a command line; None where code of this project was running."""
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    if any(Path(file).is_relative_to(CONF.parent / "experiments") for file in files):
        return None
    given = " ".join(map(repr, arguments))
    return (
        f"{given} cannot be composed ({type(error).__name__}: {one_line(error)}), must be FIELD=VALUE or GROUP=CHOICE"
    )


def _explain(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename:
        return str(write_error(error.filename, error))
    if isinstance(error, OSError) and error.filename and not isinstance(error, WriteError):
        return one_line(f"{error.filename}: {error.strerror}")
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        reason = one_line(error.message.partition("See http")[0])
        quoted = "" if (error.override or "").isascii() else ", letters beyond ASCII in quotes: 'FIELD=\"VALUE\"'"
        return f"{error.override!r} cannot be read ({reason}), must be FIELD=VALUE or GROUP=CHOICE{quoted}"
    if ambiguous := re.match("Ambiguous value for argument 'system=([^']*)'", str(error)):
        return (
            f"system: several values, must be a list in brackets to be compared in one run: 'system=[{ambiguous[1]}]'"
        )
    if ambiguous := re.match("Ambiguous value for argument '(.*)'", str(error)):
        return f"{ambiguous[1]}: several values, must be one, or all of them one after another with --multirun"
    if clash := re.match(r"In 'system/(\w+)'.*Merge error: \w+ is not a subclass of \w+", str(error), re.DOTALL):
        return (
            f"system: this experiment has {clash[1]} under the name of another system that was asked for, must be "
            "systems of other names"
        )
    if isinstance(error, InstantiationException):
        return one_line(str(error).partition(", set env var")[0].partition("full_key:")[0])
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key or one_line(cause).rsplit(' ', 1)[-1]}: missing, must be set"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_field(cause)
    if (override := _unreadable_override(cause)) is not None:
        reason = one_line(str(cause).partition("full_key:")[0])
        return f"{override!r} cannot be read ({reason}), must be FIELD=VALUE or GROUP=CHOICE"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {one_line(str(cause).partition('full_key:')[0])}"
    return one_line(error)


def _unreadable_override(error: BaseException) -> str | None:
    """Return the argument that Hydra failed to note among what was given; None where it failed elsewhere."""
    if not isinstance(error, OmegaConfBaseException) or not (error.full_key or "").startswith("hydra.overrides."):
        return None
    found = (frame.f_locals.get("override") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((override.input_line for override in found if isinstance(override, Override)), None)


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if choice == "submitit_slurm":
        return "hydra/launcher: 'slurm' is unavailable here without hydra-submitit-launcher: pip install '.[slurm]'"
    known = list(choices(group)) or list(error.options or ())
    if not known:
        return one_line(str(error).partition("Config search path")[0])
    missing = unavailable(group)
    if choice in missing:
        return f"{group}: {choice!r} is unavailable here ({missing[choice]}), must be one of {', '.join(known)}"
    text = f"{group}: {choice!r}, must be one of {', '.join(known)}"
    if missing:
        text += "; unavailable here: " + ", ".join(f"{name} ({reason})" for name, reason in missing.items())
    return text


def _unknown_field(error: OmegaConfBaseException) -> str:
    parent: Any = error.parent_node
    field = error.full_key or str(error.key)
    if not isinstance(parent, DictConfig):
        return f"{field}: {one_line(str(error).partition('full_key:')[0])}"
    allowed = ", ".join(str(key) for key in parent if key != "_target_" and not str(key).startswith("hydra"))
    return f"{field}: no such field, must be one of {allowed or 'nothing: there are no options'}"
