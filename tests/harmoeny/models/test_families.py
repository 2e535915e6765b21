"""All families that declare Transformers' experts interface, against their own unmodified code."""

from __future__ import annotations

import pytest
import transformers

from tests.harmoeny.models.families import MIN_EFFECT, TOLERANCE, Family, committed, families, outcome, section
from tests.strategies import is_quick


@pytest.mark.many
@pytest.mark.parametrize("family", families(), ids=str)
def test_family_is_exact(family: Family) -> None:
    result = outcome(family)
    assert result.error is not None, result.reason
    assert result.num_calls >= 1
    assert result.effect > MIN_EFFECT, "a model that is the same without its experts proves nothing"
    assert result.error <= TOLERANCE
    assert result.shared_error <= TOLERANCE, "a copy that was built without weights holds something of its own"


def test_documented_table_is_what_the_families_did() -> None:
    if is_quick():
        pytest.skip("make check runs a few families only")
    documented = committed()[1]
    if f"Transformers {transformers.__version__}:" not in documented:
        pytest.skip(f"docs/models.md lists the families of another Transformers than {transformers.__version__}")
    assert documented == section(), "run: python -m tests.harmoeny.models.families --update"
