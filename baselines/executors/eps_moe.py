"""EPS-MoE's choice of the kernel by load: one expert after another where each has many tokens, else all at once."""

from __future__ import annotations

from torch import Tensor

from baselines.eps_moe import EpsMoE
from harmoeny.runtime.kernels.base import Kernel, Results
from harmoeny.runtime.kernels.grouped import GroupedKernel
from harmoeny.runtime.kernels.loop import LoopKernel
from harmoeny.runtime.layer.plan_executor import PlanExecutor
from harmoeny.runtime.layer.planner import Planner
from harmoeny.runtime.layer.recorder import Recorder
from harmoeny.runtime.memory.fetch.base import RankMemory
from harmoeny.runtime.memory.waves import Wave


class KernelByLoad(GroupedKernel):
    """A grouped kernel that leaves waves of large slices to dense products."""

    def __init__(self, grouped: GroupedKernel, dense_from: int) -> None:
        """Take a layer's kernel.

        Args:
            grouped: what computes waves with fewer tokens.
            dense_from: mean tokens per expert from which on they are computed one after another.
        """
        super().__init__(grouped.slots, grouped.products)
        self._loop, self._dense_from = LoopKernel(grouped.slots), dense_from

    def __call__(self, wave: Wave, rows_RH: Tensor, results: Results) -> None:
        """Compute a wave in one of the two ways."""
        if sum(wave.num_tokens) >= self._dense_from * len(wave.num_tokens):
            self._loop(wave, rows_RH, results)
        else:
            super().__call__(wave, rows_RH, results)


class EpsMoEExecutor(PlanExecutor):
    """Carries out any plan as usual, with a kernel that is chosen wave by wave."""

    def __init__(self, planner: Planner, memory: RankMemory, recorder: Recorder) -> None:
        """Keep what the layers are executed with; see :class:`harmoeny.runtime.layer.executor.Executor`."""
        super().__init__(planner, memory, recorder)
        assert isinstance(planner.policy, EpsMoE)
        self.kernels = [_by_load(kernel, planner.policy.dense_from) for kernel in self.kernels]


def _by_load(kernel: Kernel, dense_from: int | None) -> Kernel:
    if dense_from is None or not isinstance(kernel, GroupedKernel):
        return kernel
    return KernelByLoad(kernel, dense_from)
