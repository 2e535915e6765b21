"""Two network namespaces, joined by a cable, that stand for two hosts."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

#: Of the hosts, in a network for documentation (RFC 5737) that nobody has.
ADDRESSES = ("203.0.113.1", "203.0.113.2")


class TwoHosts:
    """Hosts 0 and 1, each with loopback and one other interface."""

    def __init__(self, name: str) -> None:
        self._names = [f"{name}-{i}" for i in range(2)]

    def on(self, host: int) -> list[str]:
        """Return what starts a command on a host; the host's name is its own."""
        name = self._names[host]
        script = f'hostname {name} && exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script, "sh"]

    def cut(self) -> None:
        """Cut the cable: packets are lost from now on, and nobody is told."""
        _ip("-n", self._names[0], "link", "set", "cable", "down")

    def make(self) -> None:
        for name in self._names:
            _ip("netns", "add", name)
        first, second = self._names
        _ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=10, check=False)


class NoHostsError(Exception):
    """This machine lets nobody make hosts; the message says why."""


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Set up the hosts.

    Raises:
        NoHostsError: that is not allowed here.
    """
    for command in ("ip", "unshare", "hostname"):
        if shutil.which(command) is None:
            raise NoHostsError(f"no {command} here (Debian: iproute2, util-linux, hostname)")
    if os.geteuid() != 0:
        raise NoHostsError("only root may make network namespaces")
    hosts = TwoHosts(f"harmoeny-{uuid.uuid4().hex[:8]}")
    try:
        try:
            hosts.make()
        except subprocess.CalledProcessError as error:
            raise NoHostsError(f"network namespaces are not allowed here: {error.stderr.strip()}") from error
        yield hosts
    finally:
        hosts.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=True)
