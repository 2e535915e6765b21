"""What happens to results once a run has ended, beside what the callback's and W&B's tests see."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from analysis.report.finish import finish_run
from tests.synthetic import change_config, write_rates, write_run


def test_a_kept_run_is_judged_by_the_limits_that_are_asked_for_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    write_run(folder, latency_s={"static_ep": [1.0] * 3})
    write_rates(folder, {("static_ep", rate): [0.5 * rate] * 20 for rate in (1.0, 2.0)})
    change_config(folder, slo={"ttft_s": 0.1, "share": 0.9})
    for limit_s, shares, best in ((0.7, [1.0, 0.0], "1/s"), (9.0, [1.0, 1.0], "2/s or more")):
        config = OmegaConf.create({"wandb": {"mode": "disabled"}, "slo": {"ttft_s": limit_s, "share": 0.9}})
        finish_run(folder, config, None, is_single=True)
        assert pd.read_csv(folder / "serving.csv")["good_share"].tolist() == shares
        said = capsys.readouterr().out
        assert f"Highest rate at which 90% are good: Static EP {best}." in said
    assert (folder / "figures" / "serving_rates.png").is_file()
