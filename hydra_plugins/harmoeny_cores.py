"""Makes the launcher of conf/hydra/launcher/cores.yaml known to Hydra, which looks for launchers only here."""

from experiments.compose.processes import CoresLauncher


class Cores(CoresLauncher):
    """See ``CoresLauncher``."""
