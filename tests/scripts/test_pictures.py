from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts.pictures import PICTURES, Picture, draw

ROOT = Path(__file__).resolve().parents[2]


def test_every_picture_of_the_docs_has_its_command() -> None:
    drawn = {str(target) for picture in PICTURES.values() for target in picture.files.values()}
    shown = {
        str(path.relative_to(ROOT))
        for folder in ("docs/figures", "results/demo")
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".png", ".csv", ".txt")
    }
    shown |= {str(path.relative_to(ROOT)) for path in (ROOT / "results/predictions").glob("[ags]*.csv")}
    assert drawn == shown
    for picture in PICTURES.values():
        assert (ROOT / "conf" / "experiment" / f"{picture.experiment}.yaml").is_file()


@pytest.mark.parametrize("folder", ["sweeps/3f2a", "a-run-3f2a"])
def test_a_picture_is_its_sweeps_or_runs_figure(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], check: bool) -> None:
        assert check
        (results,) = (Path(part.removeprefix("results_dir=")) for part in command if part.startswith("results_dir="))
        figures = results / "one" / folder / "figures"
        figures.mkdir(parents=True)
        (figures / "a.png").write_text("drawn")

    monkeypatch.setattr(subprocess, "run", run)
    draw(Picture("one", {"figures/a.png": tmp_path / "shown.png"}), tmp_path / "results")
    assert (tmp_path / "shown.png").read_text() == "drawn"
