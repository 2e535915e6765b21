"""Entry point of the harness: compose a configuration with Hydra, check it, run it. See `python run.py --help`."""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if Path.cwd() != ROOT:
    sys.exit(f"error: run.py must be started in the repository's root: cd {ROOT} && python run.py ...")

from experiments.startup import quick_imports  # noqa: E402

with quick_imports():
    from experiments.launch.environment import (
        adopt_slurm_step,
        check_library_variables,
        check_rank_variables,
        joined_world_size,
    )
    from results_schema.printing import print_anything

    print_anything()
    try:
        check_library_variables()  # before the libraries are imported
        adopt_slurm_step()
        check_rank_variables()
    except ValueError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(2)

    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from experiments.compose.choices import check_choices
    from experiments.compose.job import fail, leave_interrupted, run_point
    from experiments.compose.messages import explain, explain_hydra
    from experiments.compose.schema import register_options
    from experiments.launch.interrupt import interruptible
    from experiments.launch.leave import leave_failed
    from experiments.launch.local import InterruptedRun

    register_options()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> str | None:
    """Run one point."""
    return run_point(config)


def run() -> None:
    """Run what the command line says.

    Raises:
        SystemExit: it failed, and has said why.
    """
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them over many lines
    try:
        check_choices(sys.argv[1:])
        # Ranks that somebody else started end at once, as their launcher expects: a wait for others has no Python code.
        with interruptible() if joined_world_size() is None else nullcontext():
            main()
    except InterruptedRun as error:
        leave_interrupted(error.signal)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if wants_trace:
            raise
        fail(explain(error), 2)
    except OSError as error:  # Hydra writes, too
        fail(explain(error), 1)
    except Exception as error:
        if wants_trace or (line := explain_hydra(error, sys.argv[1:])) is None:
            raise
        fail(line, 2)
    except KeyboardInterrupt:
        leave_interrupted(signal.SIGINT)


if __name__ == "__main__":
    try:
        run()
    except SystemExit as end:
        if joined_world_size() is not None and isinstance(end.code, int) and end.code > 0:
            leave_failed(end.code)
        raise
