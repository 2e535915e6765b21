"""The parts of the page of advice, one function each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.advice.document import Part, Picture, Table
from analysis.advice.figure import draw_gains
from analysis.advice.gains import Gain, gains_of, passes_per_batch
from analysis.advice.points import Points
from analysis.advice.texts import (
    NOTHING,
    gain_text,
    kind_of,
    names,
    next_ones,
    origin,
    provenance,
    settled,
    size,
    size_of,
    use,
)
from analysis.data.serving import limits_of
from analysis.present.style import label
from results_schema.advising import STATIC

#: What every variation is, for people; others are named as they are.
WHAT_IF_TEXTS = {
    "as_recorded": "as recorded",
    "links_half": "links half as fast",
    "links_double": "links twice as fast",
    "lean_runtime": "a runtime whose own code takes no time",
    "flatter": "experts more alike in popularity",
    "steeper": "experts less alike in popularity",
    "no_drift": "popularity that stays",
    "full_drift": "popularity that moves in every batch",
}
#: Policies whose placements serving engines can take, the best known first.
_PLACED = ("eplb", "flashlb", "trtllm_eplb", "lplb", "metro", "eplb_lp")
_SIZE = ("tokens per rank",)


def where(points: Points, folder: Path) -> Part:
    """Say what to use at every size, and draw all gains into the folder's ``figures``."""
    rows, strong = [], set()
    for index, one in enumerate(points.sizes):
        if one.best is None:
            best = f"best: {label(one.gains[0].system)} {gain_text(one.gains[0])}" if one.gains else "nothing fits"
            rows.append([size(one), NOTHING, "", best])
            continue
        strong |= {(index, 1), (index, 2)}
        equal = f"as good: {names(one.equals)}" if one.equals else ""
        rows.append([size(one), label(one.best.system), gain_text(one.best), equal])
    run, first = points.run, points.sizes[0]
    rounds = run.iterations["round"].nunique()
    caption = (
        f"{kind_of(run).capitalize()}: {run.manifest['world_size']} ranks of {run.manifest['device']}, {rounds} "
        f"batches, routing of {run.manifest['dataset']['name']}. Whiskers: 95 %. Band: within {points.margin.name} "
        f"({points.margin.relative:.0%}). Systems that stay below 0.7 are left out."
    )
    return Part(
        "What to use where",
        text=[
            f"All systems have the same memory: room for {first.spare_slots} experts per rank and layer beside an even "
            "share. Gain: throughput to that of static EP [95 % interval]; of every system the best of its settings. "
            f"As good: not behind by more than {points.margin.name}. {NOTHING.capitalize()}: stay with static EP."
        ],
        table=Table([*_SIZE, "use", "gain", "and"], rows, frozenset(strong)),
        picture=Picture(draw_gains(points.sizes, folder / "figures", caption), "Gain against tokens per rank"),
        notes=[
            *_spreading(points),
            *settled(run),
        ],
    )


def _spreading(points: Points) -> list[str]:
    """Say for how many passes a placement that waits for its weights is taken to serve."""
    passes = {one.tokens: passes_per_batch(points.run_of(one)) for one in points.sizes}
    if max(passes.values()) <= 1:
        return []
    least, most = min(passes), max(passes)
    return [
        f"Waits for new placements are in the gains. A recorded batch has the tokens of {passes[least]:,.0f} passes of "
        f"{least:,} tokens per rank, or {passes[most]:,.0f} of {most:,}; only the first of them waits."
    ]


def memory(points: Points) -> Part:
    """Say what more or less room for experts makes of it."""
    rows = []
    for tokens in [one.tokens for one in points.sizes]:
        found = points.with_memory(tokens)
        for one in found if len(found) > 1 else []:
            needed = size_of(one.gains[0].device_expert_bytes) if one.gains else ""
            rows.append([size(one), str(one.spare_slots), needed, use(one), next_ones(one)])
    layers = points.run.manifest["model"]["num_moe_layers"]
    full = sorted({name for one in points.verdicts for name in one.out_of_memory})
    return Part(
        "Memory it needs",
        text=["Spare slots: room for experts per rank and layer beside an even share, the same for all systems."],
        table=Table([*_SIZE, "spare slots", f"experts of {layers} layers, per rank", "use", "next"], rows),
        notes=[f"Out of memory at some point: {', '.join(map(label, full))}."] if full else [],
    )


def rebalancing(points: Points) -> Part:
    """Price new placements: what one costs, what it saves, and after how many passes it has paid."""
    rows = [
        [size(one), *_price(gain)]
        for one in points.varied
        for gain in sorted(one.gains, key=lambda gain: gain.rebalance_s)
        if gain.rebalance_s > 0
    ]
    return Part(
        "What a rebalance costs, and when it has paid",
        text=[
            "Systems that place experts anew by earlier batches wait for the weights. A placement should stay for "
            "at least as many passes as the last column says; the faster popularity drifts, the less it saves."
        ],
        table=Table([*_SIZE, "system", "one rebalance", "moves", "then saves per pass", "paid after passes"], rows),
        notes=[] if rows else ["No system waited for new placements."],
    )


def _price(gain: Gain) -> list[str]:
    passes = gain.passes_to_pay
    return [
        label(gain.system),
        f"{gain.rebalance_s * 1e3:,.1f} ms",
        size_of(gain.rebalance_bytes),
        f"{gain.saved_s * 1e3:,.2f} ms" if gain.saved_s > 0 else "nothing",
        "never" if passes is None else f"{max(passes, 1):,.0f}",
    ]


def sensitivity(points: Points) -> Part:
    """Say what changes the advice."""
    rows: list[list[str]] = []
    strong, changing = set(), []
    for one in points.varied:
        for other in points.what_ifs(one):
            name = WHAT_IF_TEXTS.get(other.what_if, other.what_if.replace("_", " "))
            if one.differs(other):
                strong.add((len(rows), 2))
                changing.append(f"{name} ({size(one)})")
            rows.append([size(one), name, use(other), next_ones(other)])
    text = f"The advice changes with: {', '.join(changing)}." if changing else "None of them changes the advice."
    return Part(
        "What the answer depends on",
        text=[f"One thing at a time is taken to be different. {text}"],
        table=Table([*_SIZE, "with", "use", "next"], rows, frozenset(strong)),
    )


def limits(points: Points) -> list[Part]:
    """Say who keeps the limits that were asked for; nothing where there were none."""
    slo = limits_of(points.run)
    if not slo.keys() & {"ttft_s", "tpot_s"}:
        return []
    if points.run.manifest["scope"] != "model":
        return [Part("Limits", text=["slo.* are limits of whole models, and only MoE layers were run (model=)."])]
    rows = []
    for one in points.sizes:
        limit_s = slo.get("ttft_s" if one.is_prefill else "tpot_s")
        if limit_s is None:
            continue
        static = next(gain for gain in gains_of(points.run_of(one)) if gain.system == STATIC)
        fitting = [gain for gain in [static, *one.gains] if gain.latency_s <= limit_s]
        cells = [f"{limit_s * 1e3:,.0f} ms", f"{static.latency_s * 1e3:,.1f} ms", names(fitting) or "nobody"]
        rows.append([size(one), *cells])
    return [
        Part(
            "Limits",
            text=[
                "A pass alone, without a queue before it: prefill against TTFT, decode against time per output token."
            ],
            table=Table([*_SIZE, "limit", "static EP takes", "within it"], rows),
            notes=["Decode passes are run without attention to earlier tokens: in service they take longer."],
        )
    ]


def export(points: Points, policies: Sequence[str]) -> Part:
    """Show how to take a placement to a serving engine.

    Args:
        points: of the sweep.
        policies: that are recommended.
    """
    placed = [gain for one in points.sizes for gain in one.gains if gain.policy in _PLACED]
    best = max(placed, key=lambda gain: gain.gain, default=None)
    system = next((policy for policy in _PLACED if policy in policies), best.policy if best else _PLACED[0])
    text = "A placement made of the recorded batches, in the files that serving engines read"
    if system not in policies:
        worth = f" ({label(system)}: {best.gain:.2f} times at best, in the tables above)" if best else ""
        text = f"No placement alone is advised{worth}. Should you want one all the same: {text[0].lower()}{text[1:]}"
    path = points.run.config["router"].get("path", "FILE")
    return Part(
        "Taking a placement along",
        text=[f"{text}:"],
        code=(
            f"python -m scripts.placement {path} --system {system} --ranks {points.run.manifest['world_size']} "
            f"--spare-slots {points.sizes[0].spare_slots} --to sglang --out placement.json"
        ),
    )


def sureness(points: Points) -> Part:
    """Say how the numbers came about, and what could be wrong with them."""
    run = points.run
    rounds = run.iterations["round"].nunique()
    return Part(
        "How sure this is",
        bullets=[
            *provenance(run),
            *points.margin.details,
            "What places experts by earlier batches is scored on later ones that it has not seen, and the first batch, "
            "before which nobody has seen any, counts for nobody. What plans by the batch itself sees it.",
            f"Intervals are over {rounds - 1} batches and know of no other days"
            + (": so few say little." if rounds < 9 else "."),
            "Of every system the best of its settings was chosen on the batches that it is shown for.",
        ],
        notes=[origin(run)],
    )
