"""What is relied on beyond the documented interfaces of other libraries: where it is not so, the version is named."""

from __future__ import annotations

from importlib.metadata import version


class DependencyError(ValueError):
    """A library behaves otherwise than this project needs; the message is one line with its version."""


def require(package: str, what: str, *, holds: bool) -> None:
    """Refuse a release in which something that is relied on is not so.

    Args:
        package: its name in the package index.
        what: what it must do.
        holds: whether it does.

    Raises:
        DependencyError: it does not.
    """
    if not holds:
        raise DependencyError(f"{package} {version(package)}: {what}; pyproject.toml names the releases that do")
