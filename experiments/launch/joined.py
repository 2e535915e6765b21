"""Be one rank of a job that torchrun or SLURM started."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch.distributed as dist

from experiments.config import Point, is_main_rank
from experiments.datasets.tokens import prepare_tokens
from experiments.manifest import forget_unfinished, is_done
from experiments.worker import join, run_rank


def run_joined(point: Point, folder: Path) -> bool:
    """Run a point as this process's rank, together with all others.

    Returns:
        False where the point had been finished before.

    Raises:
        ValueError: the text is not usable, or shorter than a sequence.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C has to end a rank that waits in a collective, too
    join(point)
    if _agree(is_done(point), point):
        return False
    if is_main_rank():
        forget_unfinished(folder)
    arguments = (point.dataset, point.model.vocab_size, point.model.tokenizer)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        prepare_tokens(*arguments)
    if point["world_size"] > 1:
        dist.barrier()
    tokens = prepare_tokens(*arguments)
    tokens.check(point["seq_len"])
    run_rank(point, tokens, folder)
    return True


def _agree(answer: bool, point: Point) -> bool:
    """Give all ranks rank 0's answer: a shared file system may show the others an older state."""
    if point["world_size"] == 1:
        return answer
    answers = [answer]
    dist.broadcast_object_list(answers, src=0)
    return answers[0]
