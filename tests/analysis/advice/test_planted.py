"""Advice on routing whose answer is known beforehand, through the whole command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.advice.choose import Verdict
from analysis.advice.margin import margin_of
from analysis.advice.points import Points
from analysis.advice.write import CSV, HTML, MARKDOWN
from analysis.data.load import load_sweep
from experiments.routing.trace import RecordedRouting
from experiments.routing.trace_files import write_trace
from tests.programs import Programs

EXPERTS, TOP_K, BATCHES, LAYERS, TOKENS = 64, 4, 16, 2, 2**20
SYSTEMS = "[static_ep,harmoeny,eplb]"
#: EPLB places experts for every batch: had it seen the batch that it is scored on, nothing would be better. Where
#: nothing changes, it does so once.
EVERY = {"even": 1, "fixed": 100, "moving": 1}
#: What is planted is about balance and memory: nobody hides the exchange behind products.
ALIKE = "systems.harmoeny.overlap=false"
#: Slots beside an even share: in none of them EPLB has a replica.
SPARE = (2, 0)


def shares(kind: str, batch: int) -> np.ndarray:
    """No skew; three hot experts that stay; or three that are others in every batch."""
    weights = np.ones(EXPERTS)
    if kind != "even":
        rng = np.random.default_rng([1, batch if kind == "moving" else 0])
        weights[rng.choice(EXPERTS, 3, replace=False)] = 16.0
    normal: np.ndarray = weights / weights.sum()
    return normal


def planted(kind: str, path: Path) -> Path:
    counts = np.stack([np.floor(shares(kind, b) * TOKENS * TOP_K).astype(np.int64) for b in range(BATCHES)])
    counts = np.repeat(counts[:, None, None], LAYERS, axis=1)
    num_tokens = np.full(counts.shape[:3], TOKENS, dtype=np.int64)
    write_trace(RecordedRouting(str(path), "planted", kind, TOP_K, num_tokens, counts), "planted")
    return path


@pytest.fixture(scope="module")
def verdicts(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for kind in ("even", "fixed", "moving"):
        folder = tmp_path_factory.mktemp(kind)
        words = (
            "run.py", "experiment=advise", f"router.path={planted(kind, folder / 'trace.parquet')}", "rounds=12",
            f"system={SYSTEMS}", f"systems.eplb.interval={EVERY[kind]}", "systems.eplb.window=1", ALIKE,
            "~systems.flashlb_eager", "~systems.llep_loose", "~systems.eplb_16",
            "~systems.harmoeny_fixed", "model=moe_stack", f"model.num_experts={EXPERTS}", f"model.top_k={TOP_K}",
            "model.hidden_size=4096", "model.intermediate_size=6144", "model.gated=true", "model.dtype=bfloat16",
            f"model.num_layers={LAYERS}", "seq_len=8192", f"spare_slots={','.join(map(str, SPARE))}",
            "what_if=as_recorded", "hydra/launcher=basic", "hydra/sweeper=basic", f"results_dir={folder}",
        )  # fmt: skip
        done = programs.run(*words, timeout_s=300)
        assert done.returncode == 0, done.stderr
        (sweep,) = (folder / "advise" / "sweeps").iterdir()
        assert f"advice: {sweep / HTML}" in done.stdout
        assert (sweep / MARKDOWN).read_text().splitlines()[0].startswith("# Which system for MoE layers of 64 experts")
        assert (sweep / CSV).is_file()
        if not found:
            page = (sweep / MARKDOWN).read_bytes()
            (sweep / MARKDOWN).unlink()
            again = programs.run("-m", "analysis.advice", str(sweep))
            assert again.stdout.splitlines()[-2:] == [str(sweep / HTML), str(sweep / MARKDOWN)], again.stderr
            assert (sweep / MARKDOWN).read_bytes() == page
        loaded = load_sweep(sweep)
        found[kind] = Points.of(loaded, margin_of(loaded.runs))
    return found


pytestmark = pytest.mark.timeout(900)


def at(points: Points, tokens: int, spare_slots: int) -> Verdict:
    (found,) = (v for v in points.verdicts if (v.tokens, v.spare_slots) == (tokens, spare_slots))
    return found


def usable(verdict: Verdict) -> set[str]:
    """What is recommended, or as good."""
    return {gain.policy for gain in [verdict.best, *verdict.equals] if gain is not None}


def test_without_skew_nothing_is_recommended(verdicts: dict[str, Points]) -> None:
    assert [verdict.best for verdict in verdicts["even"].verdicts] == [None] * 2


def test_where_popularity_moves_eplb_is_not_recommended(verdicts: dict[str, Points]) -> None:
    for spare_slots in SPARE:
        assert usable(at(verdicts["moving"], 8192, spare_slots)) == {"harmoeny"}


def test_where_it_stays_memory_decides(verdicts: dict[str, Points]) -> None:
    assert usable(at(verdicts["fixed"], 8192, 2)) == {"harmoeny", "eplb"}
    assert usable(at(verdicts["fixed"], 8192, 0)) == {"harmoeny"}


def test_the_page_says_who_has_what_it_advises(verdicts: dict[str, Points]) -> None:
    origin = "| EPLB | window=1, interval=100 | vLLM (--enable-eplb --eplb-config '{\"num_redundant_experts\": 16}'),"
    for kind, points in verdicts.items():
        (page,) = points.run.folder.parent.glob(f"sweeps/*/{MARKDOWN}")
        assert (origin in page.read_text()) == (kind == "fixed"), "2 on each of 8 ranks are 16"
