from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from scripts.lowest import lowest


def test_every_claimed_bound_is_tried_but_torchs() -> None:
    dependencies = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    constraints = {line.partition("==")[0]: line.partition("==")[2] for line in lowest(dependencies)}
    wanted = {Requirement(d).name: Requirement(d).specifier for d in dependencies}
    assert set(constraints) == set(wanted) - {"torch"}, "every dependency says from which release on it works"
    for name, version in constraints.items():
        assert wanted[name].contains(version)
        assert any(s.operator == ">=" and s.version == version for s in wanted[name])
