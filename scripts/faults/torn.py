"""Files that are torn between two runs: cut off, overwritten, empty or gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

from scripts.faults.fault import Fault, Planted, end, fault
from scripts.faults.sweep import TinySweep


def _cut(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def _flip(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _zero(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    begin = rng.randrange(len(content))
    stop = min(len(content), begin + rng.randint(1, 512))
    content[begin:stop] = bytes(stop - begin)
    path.write_bytes(content)


def _remove(path: Path, rng: Random) -> None:  # noqa: ARG001
    path.unlink()


_WAYS = {"cut off": _cut, "with flipped bits": _flip, "zeroed in part": _zero, "gone": _remove}


class _Torn(Fault):
    """One or two files of a folder."""

    def missing(self, rng: Random) -> list[int]:  # noqa: ARG002
        """Begin with a sweep that is complete."""
        return []

    def candidates(self, sweep: TinySweep) -> list[Path]:
        """Return the files that may be torn."""
        raise NotImplementedError

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Tear the files, then start the sweep."""
        files = sorted(path for path in self.candidates(sweep) if path.is_file() and path.stat().st_size)
        planted, said = Planted("", struck=True), []
        for path in rng.sample(files, k=rng.randint(1, 2)):
            way = rng.choice(sorted(_WAYS))
            _WAYS[way](path, rng)
            said.append(f"{path.relative_to(sweep.folder)} {way}")
        planted.what = " and ".join(said)
        planted.before = {path: digest for path, digest in sweep.finished().items() if not _is_torn(path, said, sweep)}
        with sweep.start() as command:
            planted.ended.append(end(command))
        return planted


def _is_torn(path: str, said: list[str], sweep: TinySweep) -> bool:
    """Tell whether a file lies in the folder of a point of which one is torn: that point may be measured again."""
    folder = str(Path(path).parent.relative_to(sweep.folder))
    return any(line.startswith(folder) for line in said)


@fault
class TornResults(_Torn):
    """Files of finished points and of the sweep."""

    name = "torn results"

    def candidates(self, sweep: TinySweep) -> list[Path]:
        """Return all but logs and pictures, which nobody reads."""
        return [path for path in sweep.results.rglob("*") if path.suffix in (".json", ".yaml", ".parquet")]


@fault
class TornCache(_Torn):
    """Prepared texts and tokenizers, which a point that is not finished needs."""

    name = "torn cache"
    backends = ("ranks",)

    def candidates(self, sweep: TinySweep) -> list[Path]:
        """Return everything in the cache; nothing is finished, so that all of it is needed."""
        for folder in sweep.points().values():
            shutil.rmtree(folder)
        return list(sweep.cache.rglob("*"))
