"""The claims of the paper's abstract beside a section's runs."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.claims import TITLES, cells, claims
from analysis.report.html.section import Section


@dataclass(frozen=True)
class Claim:
    """A claim with what was published, and what these runs say.

    Attributes:
        title: what it is about.
        rows: origin, skew, change, system compared with, conditions.
    """

    title: str
    rows: list[tuple[str, str, str, str, str]]


def claims_of(section: Section) -> list[Claim]:
    """Return the claims on which the section's runs have a say; none where no run has HarMoEny under a heavy skew."""
    frame = claims([run.folder for run in section.runs])
    frame = frame[frame["change"].notna() | (frame["origin"] == "abstract")]
    ours = frame[frame["origin"].isin(["simulated", "measured"])]
    return [
        Claim(title, [cells(row) for row in frame[frame["claim"] == claim].to_dict("records")])
        for claim, title in TITLES.items()
        if claim in set(ours["claim"])
    ]
