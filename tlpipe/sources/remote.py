"""Folders and archives at an address that ``fsspec`` knows, such as S3's."""

import tempfile
from typing import Any

from tlpipe.errors import DataError, ImageError
from tlpipe.sources import archives
from tlpipe.sources.storage import (
    Listed,
    Storage,
    check_collisions,
    check_inside,
    check_size,
    is_ignored,
)


class Remote(Listed):
    """A folder at an address that ``fsspec`` knows."""

    def __init__(self, filesystem: Any, root: str) -> None:
        """Take the file system and the folder in it."""
        self._filesystem = filesystem
        self._root = root.rstrip("/") + "/"
        found = filesystem.find(root, detail=True)
        names = {path: path.removeprefix(self._root) for path in found}
        kept = {n: found[p] for p, n in names.items() if not any(map(is_ignored, n.split("/")))}
        self._sizes = {name: int(info.get("size") or 0) for name, info in kept.items()}
        self._tags = {name: str(info.get("ETag") or "") for name, info in kept.items()}
        check_collisions(root, self._sizes)
        super().__init__(self._sizes)

    def read(self, name: str) -> bytes:
        """Fetch a file's bytes.

        Raises:
            ImageError: it is missing, too large, or cannot be fetched.
        """
        check_inside(name)
        check_size(self._sizes.get(name, 0))
        try:
            return bytes(self._filesystem.cat_file(self._root + name))
        except FileNotFoundError:
            raise ImageError("missing", "there is no such file") from None
        except OSError as error:
            raise ImageError("unreadable", str(error)) from None

    def stamp(self, name: str) -> str:
        """Return the tag that the server gives each content, where it gives one."""
        return self._tags.get(name, "")


def open_remote(address: str) -> Storage:
    """Open a folder or an archive at an address.

    Raises:
        DataError: it cannot be reached, is empty, or an archive that is not safe to read.
    """
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(address)
        if address.lower().endswith(archives.SUFFIXES):
            copy = tempfile.TemporaryFile()  # noqa: SIM115  closed with the archive
            with filesystem.open(root, "rb") as remote:
                while chunk := remote.read(2**22):
                    copy.write(chunk)
            copy.flush()
            copy.seek(0)
            return archives.open_archive(copy, address)
        storage = Remote(filesystem, root)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"ingest.source {address} cannot be reached: {type(error).__name__}: {error}. Check "
            f"the address, the credentials, and that the package for its kind is installed."
        ) from None
    if not storage.folders() and next(storage.names(), None) is None:
        raise DataError(f"ingest.source {address} holds no files. Check the address.")
    return storage
