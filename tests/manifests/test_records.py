"""Records and references: what is read, and what each fault is called."""

from __future__ import annotations

import json
import os
import resource
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import InputError
from manifests.records import MAX_LINE_BYTES, BadRecord, Record, image_id_of, read_image, read_records, resolve_inside
from manifests.rejects import Reject, RejectReason

GOOD = {
    "id": "a1",
    "image": "coco/1.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A café."}],
}


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
    return path


def bad(path: Path, record: Any) -> str:
    """The message for one wrong record, which the same file's good records survive."""
    content = "\n".join([json.dumps(GOOD), record if isinstance(record, str) else json.dumps(record), json.dumps(GOOD)])
    first, wrong, last = read_records(write(path / "d.jsonl", content))
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert last.row == 2
    assert isinstance(wrong, BadRecord)
    assert wrong.row == 1
    assert "\n" not in wrong.message
    assert wrong.message.startswith(f"{path / 'd.jsonl'}, line 2")
    return wrong.message.removeprefix(f"{path / 'd.jsonl'}, line 2")


def broken(path: Path, content: str | bytes) -> str:
    with pytest.raises(InputError) as caught:
        list(read_records(write(path, content)))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
turns = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": texts})
good_records = st.fixed_dictionaries(
    {"conversations": st.lists(turns, max_size=3)},
    optional={
        "id": texts | st.integers(),
        "image": texts.filter(bool) | st.lists(texts.filter(bool), max_size=3),
        "model": st.none() | st.integers(),
    },
)


@given(
    st.lists(good_records, max_size=6),
    st.booleans(),
    st.sampled_from([None, 2]),
    st.sampled_from(["d.json", "d.jsonl", "d.json.zst", "d.jsonl.zst"]),
)
def test_the_four_forms_hold_the_same_records(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    ascii_only: bool,
    indent: int | None,
    name: str,
) -> None:
    if ".jsonl" in name:
        content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    else:
        content = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    path = write(tmp_path_factory.mktemp("records") / name, content)
    records = list(read_records(path))
    assert [record.row for record in records] == list(range(len(rows)))
    for row, record in zip(rows, records, strict=True):
        assert isinstance(record, Record)
        assert record.id == str(row.get("id", record.row))
        image = row.get("image", [])
        assert record.images == (tuple(image) if isinstance(image, list) else (image,))
        assert list(record.conversations) == row["conversations"]


def test_a_text_only_record_and_one_without_conversations(tmp_path: Path) -> None:
    text, picture = read_records(write(tmp_path / "d.json", json.dumps([{**GOOD, "image": None}, {"image": "a.png"}])))
    assert isinstance(text, Record)
    assert text.images == ()
    assert isinstance(picture, Record)
    assert picture.images == ("a.png",)
    assert picture.conversations == ()
    assert picture.id == "1"


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    line = json.dumps(GOOD)
    records = list(read_records(write(tmp_path / "d.jsonl", f"\ufeff{line}\r\n\r\n  \n{line}")))
    assert [record.row for record in records] == [0, 3]
    assert all(isinstance(record, Record) for record in records)
    assert len(list(read_records(write(tmp_path / "d.json", f"\ufeff \n[{line}]\n\n")))) == 1
    assert list(read_records(write(tmp_path / "e.jsonl", ""))) == []
    assert list(read_records(write(tmp_path / "e.json", " [ ] "))) == []


def test_wrong_lines_are_named_with_their_place(tmp_path: Path) -> None:
    assert bad(tmp_path, '{"id": "x", "image": }') == ", column 22: not JSON (Expecting value)"
    assert bad(tmp_path, '{"id": "x"') == ", column 11: not JSON (Expecting ',' delimiter)"
    assert bad(tmp_path, "[" * 100_000) == ": nested too deeply"
    assert "digits" in bad(tmp_path, '{"id": ' + "9" * 5_000 + "}")
    assert bad(tmp_path, [GOOD]) == ": a record is an object, not a list"
    assert bad(tmp_path, "null") == ": a record is an object, not null"


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    for image in (5, [""], "", ["a.jpg", None], {"path": "a.jpg"}, True):
        assert bad(tmp_path, {**GOOD, "image": image}) == ': "image" is a path or a list of paths'
    for name in (1.5, True, [], {}):
        assert bad(tmp_path, {**GOOD, "id": name}).startswith(': "id" is text or an integer, not ')
    assert bad(tmp_path, {**GOOD, "conversations": "hi"}) == ': "conversations" is a list, not text'
    for turn in ("hi", {}, {"from": "human"}, {"from": "human", "value": None}, {"role": "user", "content": "x"}):
        message = bad(tmp_path, {**GOOD, "conversations": [GOOD["conversations"][0], turn]})
        assert message == ': turn 2 of "conversations" has no texts "from" and "value"'


def test_messages_are_read_as_conversations(tmp_path: Path) -> None:
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "café."}]},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Tea."},
        ],
        "images": ["a.jpg", "b.jpg"],
    }
    (read,) = read_records(write(tmp_path / "d.jsonl", json.dumps(record)))
    assert isinstance(read, Record)
    assert read.images == ("a.jpg", "b.jpg")
    assert [(turn["from"], turn["value"]) for turn in read.conversations] == [
        ("system", "Be brief."),
        ("human", "<image>What?<image>"),
        ("gpt", "A café."),
        ("human", "And now?"),
        ("gpt", "Tea."),
    ]


@pytest.mark.parametrize(
    "message",
    [
        "hello",
        {"role": "tool", "content": "x"},
        {"role": ["user"], "content": "x"},
        {"role": "user"},
        {"role": "user", "content": [{"type": "audio"}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
    ],
)
def test_messages_of_wrong_shape_are_named(tmp_path: Path, message: Any) -> None:
    assert "message 1 has" in bad(tmp_path, {"messages": [message]})


def test_half_a_surrogate_pair_is_no_text_but_a_whole_one_is(tmp_path: Path) -> None:
    assert "surrogate" in bad(tmp_path, '{"image": "a\\ud83d.jpg"}')
    assert "surrogate" in bad(tmp_path, '{"conversations": [{"from": "human", "value": "\\udc00"}]}')
    (record,) = read_records(write(tmp_path / "e.jsonl", '{"image": "\\ud83d\\ude00.jpg"}'))
    assert isinstance(record, Record)
    assert record.images == ("\N{GRINNING FACE}.jpg",)


def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", b'{"id": "x"}\n{"id": "\xff"}\n')
    assert list(read_records(path))[1] == BadRecord(1, f"{path}, line 2, byte 9: not UTF-8")
    assert "line 2, byte 10: not UTF-8" in broken(tmp_path / "d.json", b'[\n {"id": "\xff"}]')


def test_a_json_file_that_breaks_off_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    assert "line 3, column 2: not a JSON list (Expecting ',' or ']')" in broken(path, '[\n{"id": "a"}\n {"id": "b"}]')
    assert "line 2, column 1: not a JSON list (Expecting value)" in broken(path, '[{"id": "a"},\n')
    assert "line 1, column 13: not a JSON list (Expecting ',' or ']')" in broken(path, '[{"id": "a"}')
    assert "line 2, column 1: not a JSON list (Extra data after the list)" in broken(path, "[]\n[]")
    assert "line 1, column 1: not a JSON list (Expecting '['" in broken(path, "")
    assert "one object a line is a .jsonl" in broken(path, json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    assert "nested too deeply" in broken(path, "[" * 100_000)
    assert "digits" in broken(path, "[{" + '"id": ' + "9" * 5_000 + "}]")


def test_records_before_the_break_are_delivered(tmp_path: Path) -> None:
    records: Iterator[Record | BadRecord] = read_records(write(tmp_path / "d.json", '[{"id": "a"}, {"id": '))
    first = next(records)
    assert isinstance(first, Record)
    assert first.id == "a"
    with pytest.raises(InputError):
        next(records)


def test_one_wrong_record_of_a_list_is_a_bad_record(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", json.dumps([GOOD, 7, GOOD]))
    assert list(read_records(path))[1] == BadRecord(1, f"{path}, record 2: a record is an object, not a number")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for name, words in (("none.json", "No such file"), ("folder.jsonl", "Is a directory")):
        (tmp_path / "folder.jsonl").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=words):
            read_records(tmp_path / name)
    for name in ("d.csv", "d.json.gz", "json", "d.zst"):
        with pytest.raises(InputError, match="is not a record file"):
            read_records(tmp_path / name)


def test_damaged_zstd_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.zst"
    whole = zstandard.compress("".join(json.dumps({**GOOD, "id": n}) + "\n" for n in range(5_000)).encode())
    path.write_bytes(whole)
    assert len(list(read_records(path))) == 5_000
    for data, words in ((whole[:-1], "cut off"), (whole[: len(whole) // 2], "cut off"), (b"plain text", "not zstd")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=words):
            list(read_records(path))
    path.write_bytes(b"")
    assert list(read_records(path)) == []


def test_several_zstd_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress((json.dumps(GOOD) + "\n").encode()) for _ in range(50)))
    assert len(list(read_records(path))) == 50


def test_a_zstd_bomb_of_one_line_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.zst"
    with zstandard.ZstdCompressor(level=1).stream_writer(path.open("wb")) as out:
        for _ in range(32):
            out.write(bytes(2**24))
        out.write(b"\n" + json.dumps(GOOD).encode())
    assert path.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    long, good = read_records(path)
    assert isinstance(long, BadRecord)
    assert f"longer than {MAX_LINE_BYTES} bytes" in long.message
    assert isinstance(good, Record)
    assert good.row == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB, of 512 MiB


# --- references ---


def reason(ref: object) -> RejectReason:
    with pytest.raises(Reject) as caught:
        image_id_of(ref)
    assert "\n" not in caught.value.message
    return caught.value.reason


def test_references_are_normalised() -> None:
    for ref, image_id in (
        ("a.jpg", "a.jpg"),
        ("./a.jpg", "a.jpg"),
        ("coco//train/./1.jpg", "coco/train/1.jpg"),
        ("a/b/../c.jpg", "a/c.jpg"),
        ("a/b/c.jpg/", "a/b/c.jpg"),
        (" a b .jpg", " a b .jpg"),
        ("~a.jpg", "~a.jpg"),
        ("http/a.jpg", "http/a.jpg"),
        ("café/图.jpg", "café/图.jpg"),
        ("..a/...jpg", "..a/...jpg"),
        ("ab:c.jpg", "ab:c.jpg"),
    ):
        assert image_id_of(ref) == image_id


@pytest.mark.parametrize(
    "ref",
    [
        "/etc/passwd",
        "//host/a",
        "..",
        "../a",
        "a/../../b",
        "a/../..",
        "./../a",
        "\\a",
        "\\\\host\\a",
        "C:/a",
        "c:a",
        "C:\\a",
        "~/a",
        "~root/a",
        "./~/a",
        "./c:/a",
        "http://x/a.jpg",
        "s3://b/a.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
    ],
)
def test_references_outside_the_root_are_rejects(ref: str) -> None:
    assert reason(ref) is RejectReason.OUTSIDE_ROOT


@pytest.mark.parametrize(
    "ref", ["a\0.jpg", "a\\b.jpg", "..a\\..\\b", "\ud800.jpg", "x" * 256, "a/" * 3_000 + "b", "é" * 128]
)
def test_references_that_are_no_file_name_are_rejects(ref: str) -> None:
    assert reason(ref) is RejectReason.UNREADABLE


@pytest.mark.parametrize("ref", [None, 5, b"a.jpg", ["a.jpg"], Path("a.jpg")])
def test_references_that_are_no_text_are_rejects(ref: object) -> None:
    assert reason(ref) is RejectReason.UNREADABLE


@pytest.mark.parametrize("ref", ["", ".", "./", "a/.."])
def test_references_to_nothing_are_missing(ref: str) -> None:
    assert reason(ref) is RejectReason.MISSING


@given(st.text(max_size=40) | st.text("a./\\~:C \0" + string.punctuation, max_size=40))
@settings(max_examples=600)
def test_any_reference_is_an_id_inside_the_root_or_a_reject(ref: str) -> None:
    try:
        image_id = image_id_of(ref)
    except Reject as reject:
        reasons = (RejectReason.OUTSIDE_ROOT, RejectReason.UNREADABLE, RejectReason.MISSING)
        assert any(reject.reason is reason for reason in reasons)  # noqa: PT017 - either outcome is right
        return
    assert image_id_of(image_id) == image_id
    assert os.path.normpath("/root/" + image_id) == "/root/" + image_id
    assert image_id.encode()
    assert "\0" not in image_id
    assert "\\" not in image_id


def test_symbolic_links_may_not_leave_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"secret")
    (root / "sub" / "a.jpg").write_bytes(b"a")
    (root / "link").symlink_to(outside)
    (root / "file.jpg").symlink_to(outside / "secret.jpg")
    (root / "inner.jpg").symlink_to("sub/a.jpg")
    (root / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to(root)
    (tmp_path / "root-2").mkdir()
    (root / "sibling").symlink_to(tmp_path / "root-2")
    assert resolve_inside(tmp_path / "alias", "inner.jpg") == (root / "sub" / "a.jpg").resolve()
    assert read_image(root, "inner.jpg") == b"a"
    assert resolve_inside(root, "none/at/all.jpg") == root.resolve() / "none/at/all.jpg"
    for ref in ("link/secret.jpg", "file.jpg", "sibling", "sibling/a.jpg"):
        with pytest.raises(Reject) as caught:
            resolve_inside(root, ref)
        assert caught.value.reason is RejectReason.OUTSIDE_ROOT
    with pytest.raises(Reject) as caught:
        read_image(root, "loop")
    assert caught.value.reason is RejectReason.UNREADABLE


def test_what_is_not_a_readable_file_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"a")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 2**40)  # all hole: it takes no space
    for ref, expected in (
        ("none.jpg", RejectReason.MISSING),
        ("a.jpg/b.jpg", RejectReason.MISSING),
        ("folder", RejectReason.UNREADABLE),
        ("pipe", RejectReason.UNREADABLE),
        ("huge.png", RejectReason.UNSUPPORTED),
        ("/dev/zero", RejectReason.OUTSIDE_ROOT),
    ):
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(Reject) as caught:
            read_image(tmp_path, ref)
        assert caught.value.reason is expected, ref
        assert len(list(Path("/proc/self/fd").iterdir())) == before, ref  # a file left open each time ends a long job
