"""Interruptions of a training: checkpoints, stop requests, and out-of-memory (OOM) errors.

A checkpoint is ``NUMBER.safetensors`` and then ``NUMBER.json``, whose presence says that
it is complete; both are written atomically and verified by sha256, and the last two are kept.
What they belong to is named by a digest, and each training has a folder ``NUMBER-DIGEST`` of its
own, so that another one, begun meanwhile, takes nothing away. Numbers count up; no clock is asked.
"""

import hashlib
import json
import logging
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlpipe import files
from tlpipe.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor


_log = logging.getLogger(__name__)
_KEPT = 2
_TRAININGS = 4  # unfinished ones whose checkpoints are kept


@dataclass(frozen=True)
class Checkpoint:
    """``state``: what JSON holds of it; ``tensors``: the rest."""

    state: dict[str, Any]
    tensors: "dict[str, Tensor]"


class Checkpoints:
    """The checkpoints of one training, beside those of others."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Take the folder of all, and the digest of all that the training depends on."""
        self._all, self._digest = folder, digest
        begun = self._begun()
        last = int(begun[-1].name.partition("-")[0]) if begun else 0
        own = [path for path in begun if path.name.endswith(f"-{digest[:16]}")]
        self._folder = own[-1] if own else folder / f"{last + 1:06d}-{digest[:16]}"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write one more, and take away all but the last two; of other trainings, the first begun.

        Raises:
            TrainingError: there is no room; those before it stay.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        numbers = self._numbers()
        number = (numbers[0] if numbers else 0) + 1
        tensors = self._folder / f"{number:06d}.safetensors"
        try:
            with files.replacing(tensors) as path:
                save_file({n: t.detach().contiguous() for n, t in checkpoint.tensors.items()}, path)
            index = {
                "digest": self._digest,
                "state": checkpoint.state,
                "sha256": _sha256(checkpoint.state, tensors.read_bytes()),
            }
            files.write_json(tensors.with_suffix(".json"), index)
        except (OSError, SafetensorError) as error:
            tensors.unlink(missing_ok=True)
            raise TrainingError(
                f"the checkpoint {tensors} cannot be written: {error}. The one before it is "
                f"intact: "
                f"make room, then run again to resume from there."
            ) from None
        for old in numbers[_KEPT - 1 :]:
            for suffix in (".json", ".safetensors"):
                (self._folder / f"{old:06d}{suffix}").unlink(missing_ok=True)
        others = [path for path in self._begun() if path != self._folder]
        for training in others[: 1 - _TRAININGS]:
            _log.warning(
                "the checkpoints in %s are taken away: %s other unfinished trainings were begun "
                "since",
                *(training, _TRAININGS - 1),
            )
            shutil.rmtree(training, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest one that is intact and belongs to this training, or none.

        What is damaged, or of another training, is said and left aside.
        """
        for number in self._numbers():
            path = self._folder / f"{number:06d}.json"
            try:
                index = json.loads(path.read_bytes())
                if index["digest"] != self._digest:
                    raise ValueError("it is of another training")
                content = path.with_suffix(".safetensors").read_bytes()
                return self._checked(index, content)
            except FileNotFoundError:
                _log.warning("the checkpoint %s lacks a file; looking at the one before", path)
            except OSError as error:  # damage is known by its bytes
                raise TrainingError(
                    f"the checkpoint {path} cannot be read: {error.strerror}; expected a disk that "
                    f"answers. Fix that and run again, or delete {self._folder} to begin anew."
                ) from None
            except (ValueError, KeyError, TypeError) as error:
                _log.warning(
                    "the checkpoint %s is damaged (%s); looking at the one before", path, error
                )
        if any(path != self._folder for path in self._begun()):
            _log.warning(
                "the checkpoints in %s are of other data, parameters, threads or code; "
                "starting from the beginning, and leaving them",
                self._all,
            )
        return None

    def clear(self) -> None:
        """Take those of this training away."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # others lie there, or nothing was written
            self._all.rmdir()

    def _begun(self) -> list[Path]:
        """Return the folders of all trainings, the first begun first."""
        return sorted(self._all.glob("[0-9]*-*"), key=lambda path: int(path.name.partition("-")[0]))

    def _numbers(self) -> list[int]:
        """Return the numbers of those that were completed, the newest first."""
        names = (path.stem for path in self._folder.glob("*.json"))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def _checked(self, index: dict[str, Any], content: bytes) -> Checkpoint:
        from safetensors import SafetensorError
        from safetensors.torch import load

        if (found := _sha256(index["state"], content)) != index["sha256"]:
            raise ValueError(f"its sha256 is {found[:16]}..., not {index['sha256'][:16]}...")
        try:
            return Checkpoint(index["state"], load(content))
        except SafetensorError as error:
            raise ValueError(str(error)) from None


def _sha256(state: dict[str, Any], tensors: bytes) -> str:
    """Return a hash of both parts of a checkpoint."""
    return hashlib.sha256(files.json_bytes(state) + tensors).hexdigest()


_MEMORY = re.compile("out of memory|can't allocate|enough memory", re.IGNORECASE)


class Stop:
    """Whether somebody asked to stop."""

    requested = False


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one ends at once."""
    stop = Stop()

    def request(number: int, _: object) -> None:
        stop.requested = True
        _log.info("stopping after this step")
        signal.signal(number, before[number])

    before: Mapping[int, Any] = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def out_of_memory_explained(remedy: str) -> Iterator[None]:
    """Turn an out-of-memory (OOM) error of torch or Python into a TrainingError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split())[:160]
        if isinstance(error, RuntimeError) and not _MEMORY.search(line):
            raise
        raise TrainingError(
            f"there is not enough memory to train ({line}); the last checkpoint is kept. {remedy}"
        ) from None
