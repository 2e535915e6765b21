"""Makes the launcher of conf/hydra/launcher/slurm.yaml known to Hydra, which looks for launchers only here."""

from importlib.util import find_spec

if find_spec("hydra_plugins.hydra_submitit_launcher") is not None:
    from experiments.compose.slurm import SlurmSweep

    class SlurmArray(SlurmSweep):
        """See ``SlurmSweep``."""
