from pathlib import Path

import pytest

from analysis.present.style import RC


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in to W&B, and it keeps its files in the test's folder."""
    for name in ("API_KEY", "MODE", "IDENTITY_TOKEN_FILE", "PROJECT", "ENTITY", "DATA_DIR", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("CONFIG", "CACHE", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are coarse, and their PDFs embed no fonts: for tests that do not look at pictures."""
    monkeypatch.setitem(RC, "savefig.dpi", 40)
    monkeypatch.setitem(RC, "pdf.use14corefonts", True)
