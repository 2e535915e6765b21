"""How many stages are enough, and what more of them cost.

Source: EPS-MoE, arXiv 2410.12247: how many groups of experts pay.
"""

from __future__ import annotations

from harmoeny.cells import largest
from harmoeny.compiled import borrowing, inlined
from harmoeny.predict import SLICES, TOKENS_S, Costs, Loads, work_s

#: The most stages of a plan that chooses their number.
MOST_STAGES = 16
#: What more stages have to gain, as a share of the time of fewer.
_LEAST_GAIN = 0.001
#: How much larger than the outermost stages the largest are, and how many stages from the ends.
_LARGEST, _GROWING = 4, 2


@inlined
def weight(stage: int, num_stages: int) -> int:
    """Return how large a stage is meant to be: a quarter, half or all of the largest ones.

    Nothing is hidden behind the first rows on their way, nor behind the last results, so these are few. Each stage in
    between has the products of a smaller one to hide behind, which take at least as long as its rows where they decide.
    """
    nearest = min(stage, num_stages - 1 - stage)
    return _LARGEST if nearest >= _GROWING else 1 << nearest


@inlined
def slowest_work_s(loads: Loads, costs: Costs) -> float:
    """Return how long the rank computes that computes longest, in seconds."""
    slowest_s = 0.0
    for rank in range(len(loads.sent)):
        slowest_s = max(slowest_s, work_s(loads.work, rank, costs))
    return slowest_s


@inlined
def _slices_and_s(loads: Loads) -> tuple[float, float]:
    """Return how many slices all ranks have, and how long their assignments take with what fills up their tiles."""
    slices = tokens_s = 0.0
    for rank in range(len(loads.sent)):
        slices += loads.work[SLICES, rank]
        tokens_s += loads.work[TOKENS_S, rank]
    return slices, tokens_s


@borrowing
def reads_most(loads: Loads, costs: Costs) -> bool:
    """Return whether slices take about as long as reading their weights, or less."""
    slices, tokens_s = _slices_and_s(loads)
    return bool(tokens_s < 2 * slices * costs.weights_s)


@borrowing
def lost_by_cut_s(loads: Loads, costs: Costs) -> float:
    """Return how much longer a rank computes if an expert is cut, in seconds.

    That is half a tile, a whole one where slices have few; a launch, unless all slices share one; and reading the
    weights again, where that is what most slices take.

    Args:
        loads: what the ranks do.
        costs: the machine's.
    """
    slices, tokens_s = _slices_and_s(loads)
    tile_s = costs.tile_tokens * costs.token_s
    lost_s = tile_s if tokens_s < 3 * slices * tile_s else tile_s / 2
    if costs.grouped == 0:
        lost_s += costs.launch_s
    if tokens_s < 2 * slices * costs.weights_s:
        lost_s += costs.weights_s
    return float(lost_s)


@borrowing
def best_stages(loads: Loads, exchange_s: float, costs: Costs) -> tuple[int, float]:
    """Return how many stages are enough, and how many seconds these gain at best.

    With ``X`` what an exchange takes beside its latency ``l``, ``C`` the products of the slowest rank, ``s`` their
    launch, ``A`` adding up results, and ``f`` the first and the last stage's part of the rows, which is no less than
    that of one of so many experts unless one is cut, N stages take at least
    ``C + (N - 1) s + 2 (l + f X)``, where the first rows and the last results wait for products, and at least
    ``2 (N l + X)``, where the link is never idle; with more stages than slices ``C`` is no less than N times reading an
    expert's weights. Besides ``(1 + f / 2) A``, of which ``(1 - f) A`` hides behind the last results on their way, or
    as much of it as these take. Enough are the fewest that no other number is better than by more than 0.1 %. Where the
    latency of an exchange is not known, there is one stage.

    Args:
        loads: what the ranks do.
        exchange_s: what the exchange takes one way.
        costs: the machine's.
    """
    latency_s, cut_s = costs.exchange_latency_s, lost_by_cut_s(loads, costs)
    rows_s = exchange_s - latency_s
    computed_s, most = slowest_work_s(loads, costs), max(int(largest(loads.work[SLICES])), 1)
    add_s = 2 * largest(loads.routed) * costs.copy_token_s
    plain_s = computed_s + 2 * exchange_s + add_s
    best, best_s = 1, plain_s
    if latency_s > 0:
        whole, weights = reads_most(loads, costs), 1
        for number in range(2, (min(most, MOST_STAGES) if whole else MOST_STAGES) + 1):
            weights += weight((number - 1) // 2, number)  # one more in the middle
            end_s = rows_s / weights
            if weights > most:
                end_s = rows_s / most if whole else min(end_s + cut_s, rows_s / most)
            launches_s = (number - 1) * costs.launch_s if costs.grouped > 0 else max(number - most, 0) * cut_s
            products_s = computed_s + launches_s
            if number > most:  # every stage reads weights
                products_s = max(products_s, number * (costs.launch_s + costs.weights_s))
            waiting_s = products_s + 2 * (latency_s + end_s)
            last_add_s = add_s * end_s / max(rows_s, 1e-12)
            hidden_s = min(latency_s + end_s, add_s - last_add_s)
            stages_s = max(waiting_s, 2 * (number * latency_s + rows_s)) + add_s + last_add_s / 2 - hidden_s
            if stages_s < (1 - _LEAST_GAIN) * best_s:
                best, best_s = number, stages_s
    return best, plain_s - best_s
