"""What both kinds of clusters need."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments.compose.load import load_point
from experiments.compose.schema import register_options
from experiments.text.prepare import prepare_point
from tests.experiments.command import ROOT


@pytest.fixture(scope="session")
def text_prepared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first run of all trains the tokenizer, for longer than ranks with a short timeout wait for each other."""
    register_options()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        point = load_point(compose("config", ["experiment=smoke", f"results_dir={tmp_path_factory.mktemp('text')}"]))
    prepare_point(point)
