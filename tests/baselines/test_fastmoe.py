from hypothesis import given

from baselines.fastmoe import FastMoE
from baselines.static_ep import StaticEP
from harmoeny.placement import IntArray, Placement
from tests.strategies import batches, examples


@examples(100)
@given(batch=batches())
def test_every_expert_is_executed_at_home_which_is_the_plan_of_static_ep(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan, static = FastMoE().plan(counts, placement), StaticEP().plan(counts, placement)
    for expert, home in enumerate(placement.home):
        assert plan.tokens[:, expert, home].tolist() == counts[:, expert].tolist()
    assert plan.tokens.sum() == counts.sum()
    assert plan.tokens.tolist() == static.tokens.tolist()
    assert plan.fetch.tolist() == static.fetch.tolist()


def test_it_runs_in_the_runtime_as_static_ep_does() -> None:
    for method in ("executor", "place", "update_placement", "calibrated", "fitted"):
        assert getattr(FastMoE, method) is getattr(StaticEP, method)
    assert {f: getattr(FastMoE(), f) for f in vars(FastMoE())} == vars(StaticEP())
