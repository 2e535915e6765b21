"""Which exchange ranks use: the one that was asked for or, with ``auto``, puts wherever they are possible."""

from __future__ import annotations

from harmoeny.choices import Exchange
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.exchange.put import PutCommunicator
from harmoeny.runtime.exchange.shared import SharedWindows
from harmoeny.runtime.exchange.symmetric import SymmetricWindows
from harmoeny.runtime.exchange.windows import WindowsError


def open_exchange(comm: Communicator, asked: str) -> Communicator:
    """Return what the ranks of a communicator exchange with; all ranks call it together.

    Args:
        comm: their collectives.
        asked: ``auto``, ``collective`` or ``put``.

    Returns:
        The communicator, whose :attr:`~Communicator.remark` says why it does not put where that was possible to ask.

    Raises:
        ValueError: ``put`` was asked for, and is not possible here.
    """
    if asked == Exchange.COLLECTIVE or comm.world_size == 1:
        return comm
    windows = SymmetricWindows if Device.of(comm.device).has_own_memory else SharedWindows
    try:
        return PutCommunicator(comm, lambda: windows(comm), strict=asked == Exchange.PUT)
    except WindowsError as error:
        if asked == Exchange.PUT:
            raise ValueError(f"exchange: 'put', must be auto or collective here: {error}") from error
        comm.remark = str(error)
        return comm
