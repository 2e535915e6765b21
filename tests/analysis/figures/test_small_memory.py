"""The figures of the papers on less memory than experts draw what runs and papers say."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.data.paper_values import load_published
from analysis.figures import expert_stages, memory_parts, memory_sweep, ways_indexes
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
    n = 8  # a token's experts in a cache of M random ones: one at least, and both (Huang et al.)
    some, both = (1 - (n - 2) / n * (n - 3) / (n - 1), 2 / n * 1 / (n - 1))
    assert hits["Random cache"] == pytest.approx([100, 100])  # two ranks with 8 and with 4 slots
    assert memory_sweep.random_share(2, 1, n) == pytest.approx((some + both) / 2)


def test_a_layer_in_stages_is_compared_with_one_stage_and_with_the_paper(stages: FigureData) -> None:
    frame = expert_stages.table(stages).set_index(["tokens_per_rank", "stages"])
    assert frame["layer_s"].loc[(1024, "2")] == 4.0
    assert frame["speedup"].loc[(512, "by its cost model")] == 2.0
    time, speedup = expert_stages.plot(stages).axes
    assert lines_of(time)["Published: N = 1"][0] == pytest.approx(0.869)
    assert lines_of(speedup)["Published: N = 2"] == pytest.approx([1.085, 1.242, 1.066, 1.070, 1.036], abs=1e-3)


def test_parts_are_compared_with_a_system_without_them_and_with_the_paper(parts: FigureData) -> None:
    """The base takes 3 s for a prompt and 2 s for each of 5 tokens, scheduling 2 s and 1 s, all parts 1 s and 2 s."""
    frame = memory_parts.table(parts).set_index(["part", "phase"])["speedup"]
    assert frame["scheduling"].to_dict() == {"prefill": 1.5, "decode": 2.0, "answer": pytest.approx(13 / 7)}
    assert frame["all"].to_dict() == {"prefill": 3.0, "decode": 1.0, "answer": pytest.approx(13 / 11)}
    for axes, published in zip(memory_parts.plot(parts).axes, ([1.26, 1.31], [1.46, 1.86], []), strict=True):
        drawn = [np.asarray(line.get_xdata()) for line in axes.lines if line.get_label() == "Published"]
        assert [float(value) for values in drawn for value in values] == published


def test_shapes_of_a_cache_stand_by_what_the_host_takes_beside_the_published_rate(shapes: FigureData) -> None:
    frame = ways_indexes.table(shapes)
    assert frame["shape"].unique().tolist() == ["2 ways x 3 layers", "4 ways x 1 layers"]
    assert frame["host_s"].tolist() == pytest.approx([0.0073, 0.0441] * 2)
    assert lines_of(ways_indexes.plot(shapes).axes[0])["Published: 4 ways x 14 layers"] == [4.8]
    times = load_published("huang_expert_s")
    link = times[(times["place"] == "link") & times["hub_name"].str.contains("Mixtral")]["seconds"]
    assert link.item() == 0.028


def test_other_sweeps_are_refused(skews: FigureData, small_memory: FigureData) -> None:
    assert "experiment=memory_sweep" in str(memory_sweep.missing(skews))
    assert "experiment=stages_sweep" in str(expert_stages.missing(small_memory))
