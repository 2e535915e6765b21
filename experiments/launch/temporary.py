"""Temporary folders whose removal never fails loudly: permission to write may be gone by the time of it."""

from __future__ import annotations

import atexit
import multiprocessing.process
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder that is removed with the block, as far as that is possible.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def provide_sockets_folder() -> None:
    """Give multiprocessing the folder of its sockets, which it would otherwise remove itself, or print a traceback.

    Raises:
        OSError: it cannot be made.
    """
    # Where multiprocessing.util.get_temp_dir looks first; without it, it makes a folder of its own.
    config: dict[str, Any] = vars(multiprocessing.process.current_process()).setdefault("_config", {})
    if config.get("tempdir") is None:
        config["tempdir"] = tempfile.mkdtemp(prefix="pymp-")
        atexit.register(shutil.rmtree, config["tempdir"], ignore_errors=True)
