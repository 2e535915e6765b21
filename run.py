"""Entry point of the harness: compose a configuration with Hydra, check it, run it. See `python run.py --help`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if Path.cwd() != ROOT:
    sys.exit(f"error: run.py must be started in the repository's root: cd {ROOT} && python run.py ...")

import hydra  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from experiments.errors import explain  # noqa: E402
from experiments.job import fail, run_point  # noqa: E402
from experiments.options import register_options  # noqa: E402

register_options()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> str | None:
    """Run one point."""
    return run_point(config)


if __name__ == "__main__":
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them over many lines
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if wants_trace:
            raise
        fail(explain(error), 2)
