"""The one way to write a file: complete under a temporary name, then renamed, so that nobody ever reads half of one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteError(OSError):
    """A file could not be written; the message is one line with its path, the reason and what to do."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written ({self.strerror}); {_REMEDIES.get(self.errno or 0, _OTHER_FOLDER)}"


_OTHER_FOLDER = "choose a folder that can be written (results_dir=)"
_ROOM = "make room on that disk, or choose another folder (results_dir=)"
#: A full disk, and a quota that is used up.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {**dict.fromkeys(NO_ROOM, _ROOM), errno.ENAMETOOLONG: "choose a shorter name"}


def write_error(path: Path | str, error: OSError) -> WriteError:
    """Return an error that says of a path that it cannot be written, and why."""
    known = error.errno in errno.errorcode
    return WriteError(error.errno, os.strerror(error.errno or 0) if known else str(error), str(path))


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to ``target`` if the block ends without an error.

    The temporary file has a hidden name in the folder of ``target``, which is created, and is removed on an error.

    Raises:
        WriteError: the block or the rest raised an OSError.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner may read
        temporary.replace(target)
    except WriteError:
        raise
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8 in one step."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
