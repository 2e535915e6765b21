"""The figures of the papers on less memory than experts draw what runs and papers say."""

from __future__ import annotations

import pytest

from analysis.figures import expert_stages, memory_sweep
from analysis.figures.kit.base import FigureData
from tests.analysis.figures.runs import lines_of


def test_measures_of_both_phases_stand_by_slots_beside_published_hits(small_memory: FigureData) -> None:
    frame = memory_sweep.table(small_memory)
    ours = frame[frame["system"] == "harmoeny"]
    assert ours["num_slots"].tolist() == [4, 8]
    assert ours["prefill_s"].tolist() == [1.0, 1.0]
    assert (
        ours[["decode_s", "decode_hit_share", "decode_host_share", "decode_hidden_share"]].to_numpy().tolist()
        == [[2.0, 0.75, 0.25, 0.5]] * 2
    )
    hits = lines_of(memory_sweep.plot(small_memory).axes[5])
    assert hits["HarMoEny"] == [75, 75]
    assert hits["Published: MRS"] == pytest.approx([52.7])
    assert hits["Published: LRU"] == pytest.approx([47.7])


def test_a_layer_in_stages_is_compared_with_one_stage_and_with_the_paper(stages: FigureData) -> None:
    frame = expert_stages.table(stages).set_index(["tokens_per_rank", "stages"])
    assert frame["layer_s"].loc[(1024, "2")] == 4.0
    assert frame["speedup"].loc[(512, "by its cost model")] == 2.0
    time, speedup = expert_stages.plot(stages).axes
    assert lines_of(time)["Published: N = 1"][0] == pytest.approx(0.869)
    assert lines_of(speedup)["Published: N = 2"] == pytest.approx([1.085, 1.242, 1.066, 1.070, 1.036], abs=1e-3)


def test_other_sweeps_are_refused(skews: FigureData, small_memory: FigureData) -> None:
    assert "experiment=memory_sweep" in str(memory_sweep.missing(skews))
    assert "experiment=stages_sweep" in str(expert_stages.missing(small_memory))
