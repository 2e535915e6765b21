"""Makes the sweeper of conf/hydra/sweeper/pairs.yaml known to Hydra, which looks for sweepers only here."""

from experiments.compose.cover import PairwiseSweeper


class Pairs(PairwiseSweeper):
    """See ``PairwiseSweeper``."""
