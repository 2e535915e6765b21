"""Print the lowest releases that pyproject.toml claims, as constraints for pip; PyTorch is left out.

`make test-lowest` tests with them. Of PyTorch an environment has one build, which TORCH= chooses.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path


def lowest(requirements: Sequence[str]) -> Iterator[str]:
    """Yield ``name==version`` for every requirement that says from which version on it is met.

    Args:
        requirements: as pyproject.toml has them, ``name>=1.2,<2``.
    """
    for requirement in requirements:
        name, _, bounds = requirement.partition(">=")
        if bounds and name != "torch":
            yield f"{name}=={bounds.partition(',')[0]}"


def main() -> None:
    """Print them for the package itself; what tests it is free."""
    argparse.ArgumentParser(prog="python -m scripts.lowest", description=__doc__).parse_args()
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    sys.stdout.writelines(f"{line}\n" for line in lowest([re.sub(r"\s", "", d) for d in project["dependencies"]]))


if __name__ == "__main__":
    main()
