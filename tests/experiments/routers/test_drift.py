import numpy as np
import pytest

from experiments.routers.base import CALIBRATION_BATCH, RoutingRequest
from experiments.routers.drift import DriftRouter


def request(batch: int, layer: int = 0, num_layers: int | None = None) -> RoutingRequest:
    return RoutingRequest(
        num_tokens=1000, num_experts=16, top_k=2, batch=batch, layer=layer, rank=0, seed=3, world_size=2,
        num_layers=num_layers,
    )  # fmt: skip


def test_popularity_moves_on_by_one_expert_per_period() -> None:
    router = DriftRouter(exponent=1.0, period=4.0)
    first = router.shares(request(0))
    assert np.sort(first)[::-1] == pytest.approx(1 / np.arange(1, 17) / (1 / np.arange(1, 17)).sum())
    order = np.argsort(-first)  # from popular to unpopular
    then = router.shares(request(4))
    assert then[order] == pytest.approx(np.roll(first[order], 1))
    halfway = router.shares(request(2))
    assert halfway == pytest.approx((first + then) / 2)


def test_after_a_round_all_is_as_before_and_layers_differ() -> None:
    router = DriftRouter(period=2.0)
    assert router.shares(request(32)) == pytest.approx(router.shares(request(0)))
    assert router.shares(request(0, layer=1)) != pytest.approx(router.shares(request(0)))
    assert router.shares(request(CALIBRATION_BATCH + 3)) == pytest.approx(router.shares(request(0)))


def test_tokens_after_a_prompt_have_the_popularity_of_the_models_layer() -> None:
    router = DriftRouter()
    for step in (1, 2):
        assert router.shares(request(0, 3 * step + 1, num_layers=3)) == pytest.approx(router.shares(request(0, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"exponent": -1.0}, "exponent: -1.0, must be 0 to 10"), ({"period": 0.0}, "period: 0.0, must be above 0")],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DriftRouter(**options).validate(16, 2)
