from collections.abc import Callable

import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.present.prediction_figure import plot, plot_machines


def points() -> pd.DataFrame:
    """EPLB has points that were fitted on and others, LLEP only fitted ones."""
    rows = [("eplb", True), ("eplb", False), ("llep", True), ("harmoeny", False)]
    return pd.DataFrame(
        [
            {"system": system, "case": "one", "published": 1.0, "predicted": 1.1, "error": 0.1, "calibration": fitted}
            for system, fitted in rows
        ]
    )


@pytest.mark.parametrize("draw", [lambda frame: plot_machines({"one": frame}), lambda frame: plot(frame, "s", "")])
def test_every_system_is_named_once(draw: Callable[[pd.DataFrame], Figure]) -> None:
    (legend,) = draw(points()).legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["EPLB", "HarMoEny", "LLEP"]
