"""What both kinds of clusters need."""

from __future__ import annotations

import pytest

from experiments.compose.compose import compose_point
from experiments.text.prepare import prepare_point


@pytest.fixture(scope="session")
def text_prepared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first run of all trains the tokenizer, for longer than ranks with a short timeout wait for each other."""
    prepare_point(compose_point("experiment=smoke", f"results_dir={tmp_path_factory.mktemp('text')}"))
