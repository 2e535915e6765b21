from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from scripts import validate


def frame(system: str, case: str, *errors: float, fitted: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"system": system, "case": case, "published": 1.0, "predicted": 1 + error, "error": error}
            | {"calibration": i < fitted}
            for i, error in enumerate(errors)
        ]
    )


def wrong(monkeypatch: pytest.MonkeyPatch, out: Path, *frames: pd.DataFrame) -> list[str]:
    names = ("validate_paper", "validate_ranks", "validate_gpus", "validate_shared_gpu")
    for name, one in zip(names, frames, strict=True):
        monkeypatch.setattr(validate, name, lambda *_, one=one: one)
    return validate.validate_all(Path(), out, 1)


def test_medians_and_points_far_off_are_told_unless_they_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = frame("harmoeny", "skew 0", -0.09, 0.05, 0.02)
    assert wrong(monkeypatch, tmp_path, good, good, frame("llep", "Kimi-K2", 0.01, 0.02, 0.43), good) == []
    summary = pd.read_csv(tmp_path / "validation.csv")
    assert summary["points"].tolist() == [3, 3, 3, 3]
    assert summary["median"].tolist() == [0.05, 0.05, 0.02, 0.05]
    assert summary["far_off"].tolist() == [0, 0, 1, 0]
    assert (tmp_path / "validation.png").is_file()
    assert "DGX-1, 8 x V100" in capsys.readouterr().out
    found = wrong(
        monkeypatch, tmp_path,
        frame("harmoeny", "skew 0", 0.9, 0.11, -0.12, fitted=1), good,
        frame("llep", "Kimi-K2", 0.01, 0.02, 0.03, 0.43, -0.5),
        frame("llep", "skew 0.9", -0.19, -0.21, -0.22),
    )  # fmt: skip
    assert found == [
        "DGX-1, 8 x V100: median error 11.5%, must be at most 10%",
        "H200: llep, Kimi-K2: 50% off, must be explained",
        "4 ranks of one GPU: median error 21.0%, must be at most 10%",
    ]
