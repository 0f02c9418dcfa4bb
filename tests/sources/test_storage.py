import io
import os
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from dvc.repo import Repo
from PIL import Image

from tests.conftest import INGEST, Workspace
from tlpipe import versioning
from tlpipe.errors import DataError, ImageError
from tlpipe.sources import archives, listing


def contents(workspace: Workspace) -> dict[str, bytes]:
    """Return what ingest wrote, but for the report, which names the source."""
    out = workspace.path / "artifacts/ingest"
    names = [
        "manifest.csv",
        "rejects.csv",
        *(f"pixels/{p.name}" for p in (out / "pixels").iterdir()),
    ]
    return {name: (out / name).read_bytes() for name in names}


def pack(photos: Path, target: Path) -> Path:
    kind = {"zip": "zip", "tar": "tar", "tgz": "gztar", "bz2": "bztar", "xz": "xztar"}
    made = shutil.make_archive(str(target), kind[target.suffix[1:]], photos.parent, photos.name)
    return Path(made)


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "bz2", "xz"])
def test_an_archive_is_read_as_the_folder_in_it(
    empty: Workspace, photos: Path, tmp_path: Path, kind: str
) -> None:
    (photos / "dark" / "bad.png").write_bytes(b"no image")
    archive = pack(photos, tmp_path / f"packed.{kind}")
    empty.set_source(photos)
    empty.ingest()
    expected = contents(empty)
    empty.replace("params.yaml", f"source: {photos} ", f"source: {archive} ")
    shutil.rmtree(empty.path / "artifacts")
    before = empty.names()
    empty.ingest()
    assert contents(empty) == expected
    assert empty.names() == sorted([*before, "artifacts"])


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_members_of_every_compression_are_read(
    empty: Workspace, photos: Path, tmp_path: Path, method: int
) -> None:
    empty.set_source(photos)
    empty.ingest()
    expected = contents(empty)
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", method) as archive:
        for file in photos.rglob("*.png"):
            archive.write(file, file.relative_to(photos))
    empty.replace("params.yaml", f"source: {photos} ", f"source: {tmp_path / 'packed.zip'} ")
    shutil.rmtree(empty.path / "artifacts")
    empty.ingest()
    assert contents(empty) == expected


def test_a_zip_with_backslashes_is_read(empty: Workspace, photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for file in photos.rglob("*.png"):
            member = zipfile.ZipInfo()
            member.filename = str(file.relative_to(photos)).replace("/", "\\")
            archive.writestr(member, file.read_bytes())
    empty.set_source(tmp_path / "packed.zip")
    empty.ingest()
    assert {row["label"] for row in empty.rows("artifacts/ingest/manifest.csv")} == {
        "dark",
        "light",
    }


UNKNOWN = {"RAR": b"Rar!\x1a\x07\0", "7-Zip": b"7z\xbc\xaf'\x1c", "Zstandard": b"\x28\xb5\x2f\xfd"}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_archive_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "photos").write_bytes(UNKNOWN[kind] + b"\0" * 99)
    message = rf"photos is an archive of the kind {kind}, which is not known; expected zip, or tar"
    with pytest.raises(DataError, match=message), listing.opened(str(tmp_path / "photos")):
        pass


@pytest.mark.fault("D71")
def test_an_encrypted_archive_is_an_error_before_any_image_is_read(
    photos: Path, tmp_path: Path
) -> None:
    """The flag stands in the directory of the archive."""
    path = pack(photos, tmp_path / "packed.zip")
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\1\2")
    while place >= 0:
        data[place + 8] |= 1
        place = data.find(b"PK\1\2", place + 1)
    path.write_bytes(data)
    with (
        pytest.raises(DataError, match=r"zip is encrypted \(.* members\); expect.*Unpack"),
        listing.opened(str(path)),
    ):
        pass


@pytest.mark.fault("D71")
def test_a_part_of_a_split_archive_is_an_error(photos: Path, tmp_path: Path) -> None:
    path = pack(photos, tmp_path / "packed.zip")
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\5\6") + 4] = 2  # the number of this file
    path.write_bytes(data)
    with (
        pytest.raises(DataError, match=r"zip is the last of 3 files of a split archive"),
        listing.opened(str(path)),
    ):
        pass


def versioned(root: Path, source: str) -> Path:
    """Make a folder a repository of DVC whose ``ingest`` reads a source."""
    root.mkdir(exist_ok=True)
    Repo.init(str(root), no_scm=True)
    text = f"stages:\n  ingest:\n    cmd: tlpipe ingest\n    deps:\n    - {source}\n"
    (root / "dvc.yaml").write_text(text)
    return root


@pytest.mark.fault("D72")
def test_a_name_that_is_not_utf_8_is_said_and_no_dead_store(photos: Path) -> None:
    root = versioned(photos.parent, "photos")
    assert versioning.data_version(root).endswith(".dir")
    versioning.check_hidden(root, photos)
    (photos / "dark" / os.fsdecode(b"gr\xfcn.png")).write_bytes(b"")
    with pytest.raises(DataError, match=r"gr.*n.png' is a file whose name is not UTF-8, which DVC"):
        versioning.check_hidden(root, photos)
    with pytest.raises(DataError, match=r"gr.*n.png' has a name that is not UTF-8.* Rename it"):
        versioning.data_version(root)


@pytest.mark.fault("E23")
def test_the_repository_above_a_project_is_that_which_dvc_takes(tmp_path: Path) -> None:
    """Several projects in one repository: what DVC cannot read is refused in each."""
    root = versioned(tmp_path / "root", "photos")
    project = root / "below" / "project"
    (project / "photos").mkdir(parents=True)
    for folder in (root, project, project / "photos"):
        assert versioning.dvc_root(folder) == Path(Repo.find_root(str(folder)))
    assert versioning.dvc_root(tmp_path) is None
    os.mkfifo(project / "photos" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png is a pipe, a socket or a device, which DVC"):
        versioning.check_hidden(project, project / "photos")
    versioning.check_hidden(project, project / "photos", hide=True)
    versioning.check_hidden(project, project / "photos")
    with Repo(str(project)) as repo:
        assert repo.dvcignore.is_ignored_file(str(project / "photos" / "pipe.png"))


@pytest.mark.fault("D55")
def test_a_source_that_is_not_there_is_no_dead_store(tmp_path: Path) -> None:
    root = versioned(tmp_path, "photos")
    with pytest.raises(DataError, match=r"ingest.source is not there, .*photos.*'dvc pull'"):
        versioning.data_version(root)


def around(workspace: Workspace) -> set[Path]:
    """Return everything in and beside a workspace, but for the cache."""
    found = set(workspace.path.parent.rglob("*"))
    cache = Path(workspace.env["XDG_CACHE_HOME"])
    return {path for path in found if cache not in (path, *path.parents)}


def tar_with(name: str, photos: Path, change: Callable[[tarfile.TarInfo], None]) -> Path:
    path = photos.parent / name
    with tarfile.open(path, "w") as archive:
        archive.add(photos, "photos")
        member = tarfile.TarInfo("photos/dark/extra.png")
        member.size = 4
        change(member)
        archive.addfile(member, io.BytesIO(b"data"))
    return path


def set_to(**values: object) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        for name, value in values.items():
            setattr(member, name, value)

    return change


@pytest.mark.fault("D15")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (set_to(name="../evil.png"), "'../evil.png', a path that leads outside"),
        (set_to(name="photos/../../evil.png"), "a path that leads outside"),
        (set_to(name="/tmp/evil.png"), "'/tmp/evil.png', a path that leads outside"),
        (set_to(name="..\\evil.png"), "a path that leads outside"),
        (
            set_to(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0),
            "a link, a pipe or a device",
        ),
        (set_to(type=tarfile.LNKTYPE, linkname="photos/dark/1.png", size=0), "a link, a pipe"),
        (set_to(type=tarfile.CHRTYPE, size=0), "a link, a pipe or a device"),
        (set_to(type=tarfile.FIFOTYPE, size=0), "a link, a pipe or a device"),
    ],
)
def test_a_tar_that_leads_outside_is_an_error(
    empty: Workspace, photos: Path, change: Callable[[tarfile.TarInfo], None], what: str
) -> None:
    empty.set_source(tar_with("bad.tar", photos, change))
    before = around(empty)
    assert what in empty.ingest(code=4)
    assert around(empty) == before


@pytest.mark.fault("D15")
@pytest.mark.parametrize("name", ["../evil.png", "/tmp/evil.png", "C:/evil.png", "link"])
def test_a_zip_that_leads_outside_is_an_error(empty: Workspace, photos: Path, name: str) -> None:
    path = pack(photos, photos.parent / "bad.zip")
    with zipfile.ZipFile(path, "a") as archive:
        member = zipfile.ZipInfo(name)
        if name == "link":
            member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    empty.set_source(path)
    assert f"{name!r}, a " in empty.ingest(code=4)
    assert not (empty.path / "artifacts").exists()


@pytest.mark.fault("D16")
def test_a_zip_bomb_is_an_error_before_it_is_unpacked(empty: Workspace, photos: Path) -> None:
    """By the sizes that its directory states, of which each alone would be allowed."""
    path = pack(photos, photos.parent / "bomb.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for number in range(2):
            archive.writestr(f"photos/dark/{number}-zeros.png", bytes(1000))
            archive.infolist()[-1].file_size = 2**29 + 2**20
    empty.set_source(path)
    assert "at most 100 times as many are read" in empty.ingest(code=4)


@pytest.mark.fault("D52")
@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_a_member_is_never_inflated_beyond_what_it_claims(tmp_path: Path, method: int) -> None:
    path = tmp_path / "lies.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/zeros.png", bytes(100_000_000))
        archive.infolist()[0].file_size = 1000
    with closing(archives.open_archive(path.open("rb"), "lies.zip")) as opened:
        tracemalloc.start()
        with pytest.raises(ImageError, match="unreadable: BadZipFile"):
            opened.read(next(opened.names()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.fault("D16")
def test_members_are_counted_in_the_directory_and_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the archive states one; zipfile makes an object of each that is listed."""
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1000)
    path = tmp_path / "few.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1500):
            archive.writestr(f"a/{number}.png", b"")
    data = bytearray(path.read_bytes())
    struct.pack_into("<HH", data, data.rindex(b"PK\5\6") + 8, 1, 1)
    path.write_bytes(data)
    with pytest.raises(DataError, match="1,500 members or more; at most 1,000 are read"):
        archives.open_archive(path.open("rb"), "few.zip")


@pytest.mark.parametrize("flag", [0x800, 0])
def test_names_in_utf8_are_read_with_and_without_the_flag(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flag: int
) -> None:
    """Only Windows means code page 437 where the flag is missing: for cafe with an accent, 0x82."""
    path = tmp_path / "names.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("caf\u00e9/1.png", b"x")
        archive.writestr("b/2.png", b"x")
    data = path.read_bytes()
    if not flag:
        for magic, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            start = data.index(magic)
            data = data[: start + place + 1] + b"\0" + data[start + place + 2 :]
    path.write_bytes(data)
    with closing(archives.open_archive(path.open("rb"), "names.zip")) as opened:
        assert list(opened.names()) == ["b/2.png", "caf\u00e9/1.png"]
        assert opened.read("caf\u00e9/1.png") == b"x"
    assert caplog.text == ""
    path.write_bytes(data.replace(b"caf\xc3\xa9/", b"cafs\x82/"))
    if not flag:
        with closing(archives.open_archive(path.open("rb"), "names.zip")) as opened:
            assert list(opened.names()) == ["b/2.png", "cafs\u00e9/1.png"]
        assert "1 names are not in UTF-8 and read as code page 437" in caplog.text


@pytest.mark.fault("D50")
def test_no_room_to_unpack_is_no_damaged_archive(
    empty: Workspace, photos: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk: the system's own answer is EFBIG."""
    archive = pack(photos, tmp_path / "packed.tgz")
    empty.set_source(archive)
    program = (
        "import resource, signal, sys\nfrom tlpipe.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nmain()\n"
    )
    error = empty.run("python", "-c", program, *INGEST, code=4).stderr
    assert f"{archive} cannot be read: [Errno 27] File too large" in error
    assert "the room in " in error


@pytest.mark.fault("D57")
def test_archives_in_place_of_class_folders_are_named(
    empty: Workspace, photos: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for label in ("dark", "light"):
        shutil.make_archive(str(source / label), "zip", photos / label)
    empty.set_source(source)
    error = empty.ingest(code=4)
    assert "holds 2 archives (dark.zip, light.zip) and no folders; expected images" in error
    assert "unpack each into a folder of its name" in error


@pytest.mark.fault("D16")
def test_a_compressed_tar_bomb_is_an_error_at_the_cap(
    empty: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert archives._SPARE_BYTES == 2**30
    monkeypatch.setattr(archives, "_SPARE_BYTES", 2**24)  # a gigabyte takes ten seconds
    path = photos.parent / "bomb.tar.xz"
    with tarfile.open(path, "w:xz", preset=0) as archive:
        archive.add(photos, "photos")
        member = tarfile.TarInfo("photos/dark/zeros.png")
        member.size = 50_000_000
        with Path("/dev/zero").open("rb") as zeros:
            archive.addfile(member, zeros)
    empty.set_source(path)
    assert "at most 100 times as many are read" in empty.ingest(code=4)


@pytest.mark.fault("D16")
def test_a_million_members_are_errors(empty: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "million.zip"
    with path.open("wb") as file:
        for start in range(0, 1_000_000, 10_000):
            entries = []
            for number in range(start, start + 10_000):
                name = b"%07d.png" % number
                entry = bytearray(46)
                entry[:4] = b"PK\1\2"
                struct.pack_into("<H", entry, 28, len(name))
                entries.append(bytes(entry) + name)
            file.write(b"".join(entries))
        size = file.tell()
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *[1_000_000] * 2, size, 0)
        file.write(end64 + struct.pack("<4sLQL", b"PK\6\7", 0, size, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))
    empty.set_source(path)
    assert "holds 1,000,000 members or more; at most 500,000 are read" in empty.ingest(code=4)


@pytest.mark.fault("D17")
def test_members_that_unicode_holds_equal_are_errors(empty: Workspace, photos: Path) -> None:
    path = pack(photos, photos.parent / "twice.zip")
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("caf\u00e9.png", "cafe\u0301.png"):
            archive.write(photos / "dark/1.png", f"photos/dark/{name}")
    empty.set_source(path)
    assert "one name in Unicode's normal form" in empty.ingest(code=4)


@pytest.mark.fault("D33")
def test_damaged_members_are_named_and_the_rest_goes_on(empty: Workspace, photos: Path) -> None:
    path = photos.parent / "damaged.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(photos.rglob("*.png")):
            archive.write(file, file.relative_to(photos).as_posix())
        offset = archive.getinfo("dark/1.png").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 80] ^= 0xFF
    path.write_bytes(data)
    empty.set_source(path)
    empty.ingest()
    assert empty.rejects() == {"dark/1.png": "unreadable"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.zip", b"PK\3\4 no", "a.zip begins like a zip archive and is damaged or incomplete"),
        ("b.tar", b"x" * 600, "b.tar cannot be read as an archive"),
        ("c.tar.gz", b"\x1f\x8b no", "c.tar.gz is damaged"),
        ("labels.csv", b"path,label\na.png,a\n", "A table is read from the folder that holds it"),
    ],
)
def test_what_is_no_archive_is_an_error(
    empty: Workspace, tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    empty.set_source(tmp_path / name)
    assert message in empty.ingest(code=4)


UPLOAD = """
import pathlib, sys, boto3
client, root = boto3.client("s3"), pathlib.Path(sys.argv[1])
for path in [root] if root.is_file() else root.rglob("*"):
    if path.is_file():
        name = sys.argv[2] + ("" if root.is_file() else "/" + path.relative_to(root).as_posix())
        client.upload_file(str(path), "bucket", name)
"""


@pytest.mark.slow
def test_a_bucket_is_read_as_the_folder_in_it(
    empty: Workspace, photos: Path, bucket: dict[str, str], tmp_path: Path
) -> None:
    (photos / "dark" / "bad.png").write_bytes(b"no image")
    empty.set_source(photos)
    empty.ingest()
    expected = contents(empty)
    remote = Workspace(empty.path, {**empty.env, **bucket})
    remote.run("python", "-c", UPLOAD, str(photos), "photos")
    remote.run("python", "-c", UPLOAD, str(pack(photos, tmp_path / "packed.zip")), "p.zip")
    last = str(photos)
    for address in ("s3://bucket/photos", "s3://bucket/p.zip"):
        remote.replace("params.yaml", f"source: {last} ", f"source: {address} ")
        shutil.rmtree(empty.path / "artifacts")
        remote.run("tlpipe", *INGEST)
        assert contents(empty) == expected
        last = address
    for address, message in (
        ("s3://bucket/nothing", "s3://bucket/nothing holds no files"),
        ("s3://nowhere/photos", "s3://nowhere/photos"),
        ("nokind://x/y", "nokind://x/y cannot be reached: ValueError: Protocol not known"),
    ):
        remote.replace("params.yaml", f"source: {last} ", f"source: {address} ")
        assert message in remote.run("tlpipe", *INGEST, code=4).stderr
        last = address


@pytest.mark.slow
def test_dvc_watches_a_bucket(workspace: Workspace, photos: Path, bucket: dict[str, str]) -> None:
    remote = Workspace(workspace.path, {**workspace.env, **bucket})
    remote.run("python", "-c", UPLOAD, str(photos), "photos")
    remote.set_source("s3://bucket/photos")
    remote.run("dvc", "repro", "split")
    rows = remote.rows("artifacts/ingest/manifest.csv")
    assert len(rows) == 24
    assert len(rows[0]["data_version"]) >= 32
    assert rows[0]["data_version"] in (remote.path / "dvc.lock").read_text()
    assert "Data and pipelines are up to date" in remote.run("dvc", "repro", "split").stdout
    Image.effect_noise((60, 60), 90).save(photos / "dark" / "new.png")
    remote.run("python", "-c", UPLOAD, str(photos / "dark" / "new.png"), "photos/dark/new.png")
    remote.run("dvc", "repro", "split")
    assert len(remote.rows("artifacts/ingest/manifest.csv")) == 25


@pytest.mark.fault("D12", "D14", "D28", "D54")
@pytest.mark.slow
def test_what_dvc_cannot_read_is_hidden_from_it_and_reported(
    workspace: Workspace, photos: Path
) -> None:
    inside = workspace.path / "data" / "photos"
    shutil.copytree(photos, inside)
    os.mkfifo(inside / "dark" / "pipe [1].png")
    (inside / "light" / "gone.png").symlink_to("nowhere.png")
    (inside / "light" / "loop.png").symlink_to("loop.png")
    (inside / "light" / "loop").symlink_to("..")
    workspace.set_source("data/photos")
    workspace.replace("params.yaml", "max_rejected: 0.02", "max_rejected: 0.5")
    ignore = workspace.path / ".dvcignore"
    own = ignore.read_text() if ignore.exists() else ""
    error = workspace.call("check", code=4).stderr
    assert (
        "data/photos/dark/pipe [1].png is a pipe, a socket or a device, which DVC cannot" in error
    )
    assert "and so are 2 more" in error
    assert "'tlpipe check --hide' names them in .dvcignore" in error
    assert (ignore.read_text() if ignore.exists() else "") == own
    workspace.call("check", "--hide")
    assert ignore.read_text().startswith(own)
    assert r"/data/photos/dark/pipe\ \[1\].png" in ignore.read_text().splitlines()
    (line,) = workspace.call("check").stdout.splitlines()
    assert "images in 2 classes: dark " in line
    workspace.run("dvc", "repro", "split")  # DVC itself would wait for the pipe for ever
    rejects = workspace.rows("artifacts/ingest/rejects.csv")
    assert {row["path"]: row["reason"] for row in rejects} == {
        "dark/pipe [1].png": "not_a_file",
        "light/gone.png": "unreadable",
        "light/loop.png": "unreadable",
        "light/loop": "not_a_file",
    }
    # A file that can be read again must not stay hidden.
    (inside / "dark" / "pipe [1].png").unlink()
    Image.new("RGB", (50, 50), "teal").save(inside / "dark" / "pipe [1].png")
    said = workspace.call(*INGEST).stderr
    assert "pipe [1].png can be read now, but .dvcignore hides it" in said
    error = workspace.call("check", code=4).stderr
    assert r"hides /data/photos/dark/pipe\ \[1\].png and 0 more files that can be read" in error
    workspace.call("check", "--hide")
    assert "dark" not in ignore.read_text()
    assert "loop.png" in ignore.read_text()
    for name in ("gone.png", "loop.png", "loop"):
        (inside / "light" / name).unlink()
    workspace.call("check", "--hide")
    assert ignore.read_text() == own
    workspace.replace("params.yaml", "source: data/photos ", f"source: {photos} ")
    os.mkfifo(photos / "dark" / "pipe.png")
    error = workspace.call("check", code=4).stderr
    assert "pipe.png' is a pipe, a socket or a device, which DVC cannot read" in error
    workspace.replace("params.yaml", f"source: {photos} ", "source: data/digits.yaml ")
    workspace.configure("evaluate", ood="data/nowhere")
    error = workspace.call("check", code=4).stderr
    assert "evaluate.ood data/nowhere does not exist; expected a folder" in error
