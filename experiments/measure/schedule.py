"""Which requests the next forward pass of an open loop computes; the same for real ranks and for the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        prefill: whether it reads prompts; otherwise it computes one more token of every request.
        requests: by rank, the numbers of its requests.
        steps: by rank and request, how many tokens it has had; 0 in a prefill.
    """

    prefill: bool
    requests: Sequence[Sequence[int]]
    steps: Sequence[Sequence[int]]


@dataclass
class Schedule:
    """Serves requests first come, first served: prompts go before further tokens, and passes never mix the two.

    Request i belongs to rank i modulo the number of ranks. It is read as soon as the system is free and its rank has
    room, and then gets one token in every pass that reads no prompts, together with all others that run. This is what
    SGLang does without mixed chunks (docs.sglang.ai, ``--enable-mixed-chunk``), and with one token per request a queue
    that is served in batches.

    Attributes:
        num_requests: that arrive in all.
        world_size: number of ranks.
        batch_size: requests that a rank may have at a time.
        output_tokens: of every request, at least 1.
        running: by rank, its requests and how many tokens each has had.
        num_taken: requests that were read.
    """

    num_requests: int
    world_size: int
    batch_size: int
    output_tokens: int
    running: list[dict[int, int]] = field(init=False)
    num_taken: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self.running = [{} for _ in range(self.world_size)]

    @property
    def done(self) -> bool:
        """Whether all requests have all their tokens."""
        return self.num_taken == self.num_requests and self.idle

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do before the next request arrives."""
        return not any(self.running)

    def next(self, num_arrived: int) -> Pass:
        """Return the next pass, and count its tokens.

        Args:
            num_arrived: requests that have arrived by now; more than were taken where nothing runs.
        """
        taken = self._take(num_arrived)
        if any(taken):
            chosen, steps = taken, [[0] * len(requests) for requests in taken]
        else:
            chosen = [list(requests) for requests in self.running]
            steps = [list(requests.values()) for requests in self.running]
        for requests, of_rank in zip(chosen, self.running, strict=True):
            for request in requests:
                of_rank[request] = of_rank.get(request, 0) + 1
                if of_rank[request] == self.output_tokens:
                    del of_rank[request]
        return Pass(any(taken), chosen, steps)

    def _take(self, num_arrived: int) -> list[list[int]]:
        """Take those that wait, in their order, until the first whose rank has no room."""
        taken: list[list[int]] = [[] for _ in range(self.world_size)]
        while self.num_taken < num_arrived:
            rank = self.num_taken % self.world_size
            if len(self.running[rank]) + len(taken[rank]) == self.batch_size:
                break
            taken[rank].append(self.num_taken)
            self.num_taken += 1
        return taken
