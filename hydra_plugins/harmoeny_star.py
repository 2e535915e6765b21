"""Makes the sweeper of conf/hydra/sweeper/star.yaml known to Hydra, which looks for sweepers only here."""

from experiments.compose.star import StarSweeper


class Star(StarSweeper):
    """See ``StarSweeper``."""
