"""Walking tars: the same members as the standard library sees, and whatever is damaged costs one error and no sample."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from made_containers import samples, tar_of

from manifests.zstd_stream import DamagedZstd, ZstdStream
from tokenize_stage.sources.tar_index import FileBlocks, StreamBlocks
from tokenize_stage.sources.tar_walk import DamagedTar, TarMember, walk_tar


def walk(data: bytes, ahead: int = 2**14) -> tuple[list[TarMember], str | None]:
    """The members, and what ended the walk early."""
    return _collect(FileBlocks(pa.BufferReader(data), len(data), ahead))


def walk_zst(data: bytes) -> tuple[list[TarMember], str | None]:
    return _collect(StreamBlocks(ZstdStream(io.BytesIO(data))))


def _collect(blocks: FileBlocks | StreamBlocks) -> tuple[list[TarMember], str | None]:
    members = []
    try:
        for member in walk_tar(blocks):
            members.append(member)  # noqa: PERF402 - what came before the damage is kept
    except (DamagedTar, DamagedZstd) as damage:
        return members, str(damage)
    return members, None


def files(data: bytes) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files, by the standard library."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=200)
archives = st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=8)


@given(archives, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.sampled_from([512, 2**14, 2**22]))
def test_members_are_those_of_the_standard_library(members: list[tuple[str, bytes]], form: int, ahead: int) -> None:
    data = tar_of(members, form)
    found, damage = walk(data, ahead)
    assert damage is None
    assert [(member.name, member.offset, member.size) for member in found] == files(data)
    assert [data[member.offset : member.offset + member.size] for member in found] == [
        content for _, content in members
    ]
    assert walk_zst(zstandard.compress(data)) == (found, None)


def test_what_gnu_tar_writes(tmp_path: Path) -> None:
    folder = tmp_path / "in" / ("deep" * 30) / ("deeper" * 20)
    folder.mkdir(parents=True)
    (folder / ("n" * 120 + ".jpg")).write_bytes(b"long")
    (tmp_path / "in" / "a.jpg").write_bytes(b"a picture")
    (tmp_path / "in" / "b.jpg").hardlink_to(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "c.jpg").symlink_to("a.jpg")
    with (tmp_path / "in" / "sparse.jpg").open("wb") as sparse:
        sparse.truncate(2**20)
        sparse.seek(2**19)
        sparse.write(b"x" * 4096)
    (tmp_path / "in" / "empty.jpg").touch()
    gnu = shutil.which("tar")
    assert gnu
    for form in ("gnu", "posix", "ustar"):
        options = ["--sort=name", f"--format={form}", *(["-S"] if form != "ustar" else [])]
        keep = [] if form != "ustar" else ["--exclude=deep*"]
        subprocess.run([gnu, *options, *keep, "-cf", tmp_path / f"{form}.tar", "-C", tmp_path / "in", "."], check=True)
        data = (tmp_path / f"{form}.tar").read_bytes()
        found, damage = walk(data)
        assert damage is None
        said = {member.name.rpartition("/")[2]: member.what for member in found}
        assert said["a.jpg"] == "file"
        assert (said["b.jpg"], said["c.jpg"]) == ("link", "a symbolic link")
        assert said["sparse.jpg"] == ("file" if form == "ustar" else "a sparse file")
        assert [member.link for member in found if member.what == "link"] == ["./a.jpg"]
        sizes = {name.rpartition("/")[2]: (offset, size) for name, offset, size in files(data)}
        for member in found:
            if member.what == "file":
                assert (member.offset, member.size) == sizes[member.name.rpartition("/")[2]]
        assert form == "ustar" or said["n" * 120 + ".jpg"] == "file"


def test_each_cut_gives_the_whole_samples_before_it_and_one_error() -> None:
    data = tar_of(samples(3))
    whole, _ = walk(data)
    end = max(member.offset + -(-member.size // 512) * 512 for member in whole)
    for cut in [*range(1, len(data), 97), *(member.offset + member.size for member in whole), end]:
        found, damage = walk(data[:cut])
        if cut < end + 512:
            assert damage
            assert found == [member for member in whole if member.offset + member.size <= cut]
        else:
            assert (found, damage) == (whole, None)
    assert walk(b"") == ([], "is empty")


def test_a_cut_compressed_tar_gives_the_whole_samples_before_the_cut() -> None:
    data = tar_of(samples(40))
    packed = zstandard.ZstdCompressor(level=1).compress(data)
    whole, _ = walk(data)
    kept = []
    for cut in range(0, len(packed), len(packed) // 23):
        found, damage = walk_zst(packed[:cut])
        assert damage
        assert found == whole[: len(found)]
        kept.append(len(found))
    assert kept == sorted(kept)
    assert 0 < kept[-1] < len(whole)


@given(st.randoms(use_true_random=False), st.integers(1, 40))
@settings(max_examples=300)
def test_flipped_bytes_end_in_members_or_one_error(rng: random.Random, count: int) -> None:
    data = bytearray(tar_of(samples(2), rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    for _ in range(count):
        data[rng.randrange(len(data))] = rng.randrange(256)
    found, _ = walk(bytes(data))
    assert all(0 <= member.offset <= member.offset + member.size <= len(data) for member in found)
    walk_zst(zstandard.compress(bytes(data)))


@given(st.binary(max_size=3000))
def test_noise_is_no_tar(data: bytes) -> None:
    found, damage = walk(data)
    assert not found
    assert damage or not data.strip(b"\0")
    assert walk_zst(data)[0] == []


def test_wrong_sizes_in_headers_are_damage() -> None:
    good = tar_of({"a.jpg": b"x" * 600, "b.jpg": b"y"})
    for size in (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"12x45678901\0"):
        header = bytearray(good[:512])
        header[124:136] = size
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
        found, damage = walk(bytes(header) + good[512:])
        assert found == []
        assert damage


@pytest.mark.parametrize(
    "records", [b"9999 path=x\n", b"0 path=x\n", b"x path=y\n", b"-5 path=x\n", b"12 pathxxxxx\n", b"13 size=-12\n\n"]
)
def test_a_broken_pax_header_is_damage(records: bytes) -> None:
    good = tar_of({"a.jpg": b"x"}, tarfile.GNU_FORMAT)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    block = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    found, damage = walk(block + good)
    assert found == []
    assert "pax" in str(damage)


def test_tars_put_together_by_cat_are_read_to_the_end() -> None:
    one, two = tar_of({"a.jpg": b"1"}), tar_of({"b.jpg": b"2"})
    found, damage = walk(one + two)
    assert damage is None
    assert [member.name for member in found] == ["a.jpg", "b.jpg"]


def test_a_bomb_is_an_error_soon() -> None:
    header = tarfile.TarInfo("a.jpg")
    header.size = 2**40
    packed = io.BytesIO()
    with zstandard.ZstdCompressor(level=1).stream_writer(packed, closefd=False) as out:
        out.write(header.tobuf())
        for _ in range(160):
            out.write(bytes(2**23))
    found, damage = walk_zst(packed.getvalue())
    assert found == []
    assert "times larger" in str(damage)
