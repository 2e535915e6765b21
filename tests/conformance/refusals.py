"""What a component says when it cannot do what is asked."""

from __future__ import annotations

from collections.abc import Callable


def refusal_of(check: Callable[[], object]) -> str:
    """Return the one line with which something is refused; empty: it is not."""
    try:
        check()
    except ValueError as error:
        text = str(error)
        assert text, "a refusal that says nothing"
        assert "\n" not in text, text
        return text
    return ""
