"""Printing where the terminal, or the file behind a pipe, does not take every letter."""

from __future__ import annotations

import sys
from io import TextIOWrapper


def print_anything() -> None:
    """Let the standard streams escape what their encoding lacks; every command calls this first.

    Under ``PYTHONIOENCODING=ascii`` or an 8-bit locale the name of a folder would otherwise end the command with a
    traceback after all has been measured. What a UTF-8 stream refuses, a file's name that is none, is escaped too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
