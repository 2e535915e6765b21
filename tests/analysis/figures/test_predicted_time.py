from __future__ import annotations

import numpy as np
import pytest

from analysis.figures import predicted_time
from analysis.figures.kit.base import FigureData
from tests.synthetic import LATENCY_S, NUM_LAYERS


def test_every_layer_and_batch_with_a_prediction_is_a_dot(predicting: FigureData) -> None:
    table = predicted_time.table(predicting)
    assert set(table["system"]) == {"harmoeny"}
    assert len(table) == len(LATENCY_S["harmoeny"]) * (NUM_LAYERS - 1), "layer 0 has none"
    assert (table["taken_s"] / table["predicted_s"]).tolist() == pytest.approx([1 / 0.8] * len(table))
    dots, _ = predicted_time.plot(predicting).axes[0].lines
    assert np.asarray(dots.get_xdata()).size == len(table)
