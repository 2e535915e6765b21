"""A campaign of faults: each is planted at a random moment of a small sweep, and what must hold afterwards is checked.

`python -m scripts.faults --help`. A module per kind of fault registers its own in `fault.FAULTS`; `sweep` has the
sweep, `checks` and `recomputed` what must hold, `round` one round of the campaign.
"""
