import pytest

from analysis.data.metrics import QUANTITIES
from analysis.present.layout import axis_label
from analysis.present.panel import IDLE_SHARE, IMBALANCE, THROUGHPUT, TTFT, TTFT_PER_SEQUENCE, panel


def test_titles_units_and_directions_are_those_of_the_metrics_table() -> None:
    assert THROUGHPUT.title == "Throughput (1,000 tokens/s), higher is better"
    assert TTFT.title == "Time to first token (s), lower is better"
    assert IDLE_SHARE.title == "Idle share of the MoE layers (%), lower is better"
    assert (THROUGHPUT.scale, TTFT.scale, IDLE_SHARE.scale, panel("ttft_s", "ms").scale) == (1e-3, 1.0, 100.0, 1e3)
    for name, quantity in QUANTITIES.items():
        found = panel(name)
        assert (found.column, found.name, found.unit, found.scale) == (name, quantity.title, quantity.unit, 1.0)
        assert found.title.endswith(f"{quantity.better} is better")


@pytest.mark.parametrize(("column", "unit"), [("throughput", None), ("ttft_s", "%")])
def test_a_misspelt_column_or_unit_is_refused(column: str, unit: str | None) -> None:
    with pytest.raises(KeyError):
        panel(column, unit)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("Imbalance (max/mean)", "Imbalance (max/mean)"),
        (THROUGHPUT.label, "Throughput\n(1,000 tokens/s)"),
        (TTFT.label, "Time to first\ntoken (s)"),
        (TTFT_PER_SEQUENCE.label, "Time to first token\n(ms per sequence)"),
        (IDLE_SHARE.label, "Idle share of the\nMoE layers (%)"),
        (IMBALANCE.label, "Imbalance\n(max / mean)"),
        ("Throughput / Static EP's at skew 0", "Throughput / Static\nEP's at skew 0"),
        ("Oneverylongwordwithoutspaces", "Oneverylongwordwithoutspaces"),
    ],
)
def test_long_labels_take_two_lines_and_parentheses_stay_whole(text: str, broken: str) -> None:
    assert axis_label(text) == broken
