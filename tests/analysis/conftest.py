from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.figures import skew_sweep, time_breakdown
from analysis.present.style import RC


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in to W&B, and it keeps its files in the test's folder."""
    for name in ("API_KEY", "MODE", "IDENTITY_TOKEN_FILE", "PROJECT", "ENTITY", "DATA_DIR", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("CONFIG", "CACHE", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))


@pytest.fixture(autouse=True, scope="module")
def drafts() -> Iterator[None]:
    """Figures are coarse, and their PDFs embed no fonts, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RC, "savefig.dpi", 40)
        patch.setitem(RC, "pdf.use14corefonts", True)
        yield


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two figures stand for all, so that a test draws in moments: one of a sweep, one of a run."""
    for module in ("analysis.figures.kit.base", "analysis.figures.kit.result_sets"):
        monkeypatch.setattr(f"{module}.discover", lambda: [skew_sweep, time_breakdown])


@pytest.fixture(autouse=True, scope="module")
def few_resamples() -> Iterator[None]:
    """Fewer resamples make the same intervals coarser; here it matters only that they are shown as computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.data.stats._RESAMPLES", 100)
        yield
