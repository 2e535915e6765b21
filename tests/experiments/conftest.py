"""Real runs that several tests look at; each is made once."""

from __future__ import annotations

import pytest

from tests.smoke import SmokeRun, run_smoke


@pytest.fixture(scope="session")
def joined_smoke(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """The smoke experiment on two ranks that torchrun started."""
    return run_smoke(tmp_path_factory.mktemp("joined"), "-m", "torch.distributed.run", "--nproc-per-node", "2")
