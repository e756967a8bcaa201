"""Folders, archives and packed files: what is read, what is left out, whose fault is named."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.traces.containers import parts
from antiphon.traces.readers import BadLines, read_trace, trace_sha256
from antiphon.traces.schema import SessionTrace, TraceError, session_fault


def session(name: str, prompt: int = 5) -> bytes:
    line = {"session_id": name, "rounds": [{"prompt_tokens": prompt, "output_tokens": 2}]}
    return json.dumps(line).encode() + b"\n"


def tar(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def weka(name: str) -> bytes:
    request = {"t": 0.0, "type": "n", "in": 10, "out": 3, "hash_ids": [1]}
    document = {"id": name, "block_size": 64, "hash_id_scope": "local", "requests": [request]}
    return json.dumps(document, indent=1).encode()


def ids(path: Path, bad: BadLines | None = None, ignored: list[str] | None = None) -> list[str]:
    return [found.session_id for found in read_trace(path, bad, ignored=ignored)]


def fault(path: Path, bad: BadLines | None = None) -> str:
    with pytest.raises(TraceError) as raised:
        ids(path, bad)
    return str(raised.value)


PACKINGS: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, lzma.compress]


@pytest.mark.parametrize("pack", PACKINGS)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_are_told_by_content(tmp_path: Path, pack: Callable[[bytes], bytes], form: int) -> None:
    """A tar archive, packed or not, gives the sessions of its files, sorted by name, packed or not."""
    path = tmp_path / "no-telling-name"
    members = {
        "b/2.jsonl": gzip.compress(session("z")),
        "b/1": session("y"),
        "a": lzma.compress(session("x")),
    }
    path.write_bytes(pack(tar(members, form)))
    assert ids(path) == ["x", "y", "z"]


@pytest.mark.parametrize("pack", PACKINGS)
def test_one_file_is_read_however_it_is_packed(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """JSON lines read the same plain, gzipped and xz, whatever the file is called."""
    path = tmp_path / "t"
    path.write_bytes(pack(session("a") + session("b")))
    assert ids(path) == ["a", "b"]


def test_a_folder_is_read_sorted_and_says_what_it_left_out(tmp_path: Path) -> None:
    """Files of a trace format are read in order of name, also in archives; the rest can be asked for."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_bytes(session("b"))
    (tmp_path / "z.tar.xz").write_bytes(lzma.compress(tar({"in.json": weka("w"), "LICENSE": b"free\n"})))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(session("a")))
    (tmp_path / "README.md").write_bytes(b"# Sessions\n\n" + session("example"))
    (tmp_path / "manifest.json").write_bytes(b'{\n "seed": 1\n}\n')
    (tmp_path / "list.json").write_bytes(b"[1, 2]")
    (tmp_path / "template").write_bytes(b"{{ name }}\n{% end %}\n")
    (tmp_path / "picture").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty").write_bytes(b"")
    ignored: list[str] = []
    assert ids(tmp_path, ignored=ignored) == ["a", "b", "w"]
    names = [Path(text.partition(": ")[0]).name for text in ignored]
    said = ["README.md", "empty", "list.json", "manifest.json", "picture", "template", "z.tar.xz:LICENSE"]
    assert names == said


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    """A folder or archive with no file of a trace format says so and names some of what is in it."""
    assert "it has no files" in fault(tmp_path)
    (tmp_path / "notes").write_bytes(b"hello\n")
    assert "no file of a known trace format" in fault(tmp_path) and "notes" in fault(tmp_path)
    (tmp_path / "t.tar").write_bytes(tar({"inner.tar": tar({"a": session("a")})}))
    assert "t.tar:inner.tar: an archive in an archive" in fault(tmp_path)


def test_a_session_in_two_files_of_a_folder_is_refused(tmp_path: Path) -> None:
    """The same session in two files ends the reading, both named, even where bad lines are skipped."""
    (tmp_path / "rounds.jsonl").write_bytes(session("trace_1"))
    (tmp_path / "weka.tar").write_bytes(tar({"trace_1.json": weka("trace_1")}))
    for bad in (None, BadLines()):
        said = fault(tmp_path, bad)
        assert "'trace_1'" in said and "give one of them" in said
        assert "rounds.jsonl" in said and "weka.tar:trace_1.json" in said


def test_a_session_in_two_members_of_an_archive_is_a_bad_line(tmp_path: Path) -> None:
    """Two members of one archive with the same session: the second is a bad line that names both."""
    path = tmp_path / "weka.tar"
    path.write_bytes(tar({"1.json": weka("s"), "2.json": weka("s"), "3.json": weka("t")}))
    assert "weka.tar:2.json, line 1" in fault(path) and "weka.tar:1.json" in fault(path)
    bad = BadLines()
    assert ids(path, bad) == ["s", "t"]
    assert bad.count == 1


def test_bad_lines_in_a_folder_name_file_and_line(tmp_path: Path) -> None:
    """A broken object in front does not make a trace an ignored file; members are named too."""
    path = tmp_path / "t.tar"
    path.write_bytes(tar({"a.jsonl": b'{"session_id": "cut\n' + session("a") + b"{}\n"}))
    assert "t.tar:a.jsonl, line 1: not a JSON object" in fault(path)
    bad = BadLines()
    assert ids(path, bad) == ["a"]
    assert bad.count == 2 and "t.tar:a.jsonl, line 3" in bad.first[1]


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    """An archive that is cut off or has a broken header is never read as a shorter one."""
    whole = tar({name: session(name) for name in ("a", "b", "c")})
    header = whole.index(b"b\0")
    broken = whole[:header] + b"?" * 512 + whole[header + 512 :]
    cut = whole[: whole.index(session("c")) + 9]
    for content in (broken, cut, gzip.compress(whole)[:-20], lzma.compress(whole)[:-20]):
        path = tmp_path / "t.tar"
        path.write_bytes(content)
        assert "t.tar" in fault(path, BadLines())


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    """Only regular files are read: a link that leads out of the archive gives nothing."""
    outside = tmp_path / "outside"
    outside.write_bytes(session("secret"))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(outside)
            archive.addfile(info)
        info = tarfile.TarInfo("../../good")
        info.size = len(session("a"))
        archive.addfile(info, io.BytesIO(session("a")))
    path = tmp_path / "t.tar"
    path.write_bytes(out.getvalue())
    assert ids(path) == ["a"]


def test_only_what_is_asked_for_is_opened(tmp_path: Path) -> None:
    """Reading is a stream: a broken second file does not matter until it is reached."""
    (tmp_path / "1").write_bytes(session("a"))
    (tmp_path / "2").write_bytes(gzip.compress(session("b"))[:-9])
    stream = read_trace(tmp_path)
    assert next(stream).session_id == "a"
    with pytest.raises(TraceError, match="cannot be read"):
        next(stream)


def test_sha256_is_of_bytes_and_names(tmp_path: Path) -> None:
    """A file's digest is that of its bytes; a folder's changes with any name or byte, and only with these."""
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    first = trace_sha256(tmp_path)
    assert trace_sha256(tmp_path / "a") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert first == trace_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "c")
    second = trace_sha256(tmp_path)
    (tmp_path / "c").write_bytes(b"3")
    assert len({first, second, trace_sha256(tmp_path)}) == 3
    with pytest.raises(TraceError, match="nowhere"):
        trace_sha256(tmp_path / "nowhere")


WHOLE = {
    "archive": tar({"a.jsonl": session("a"), "w.json": weka("w"), "note": b"x\n"}),
    "packed in packed": gzip.compress(tar({"a.jsonl": gzip.compress(session("a") * 2)})),
    "xz archive": lzma.compress(tar({"a.jsonl": session("a")})),
    "gzip": gzip.compress(session("a") + b"{}\n"),
    "xz": lzma.compress(session("a")),
}
changes = st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=12)), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 20_000), changes, st.booleans())
def test_any_damage_gives_sound_sessions_or_a_trace_error(
    kind: str, end: int, damage: list[tuple[int, bytes]], skip: bool
) -> None:
    """However an archive or packed file is cut and changed, nothing but TraceError is raised."""
    content = bytearray(WHOLE[kind][:end])
    for place, put in damage:
        content[place : place + len(put)] = put
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        path.write_bytes(content)
        for trace in (path, Path(folder)):
            found: list[SessionTrace] = []
            try:
                found.extend(read_trace(trace, BadLines() if skip else None))
            except TraceError as error:
                assert folder in str(error)
            assert all(session_fault(each) is None for each in found)


def test_parts_close_their_files(tmp_path: Path) -> None:
    """A part is closed when the next is asked for, so a large folder needs one open file."""
    for name in "ab":
        (tmp_path / name).write_bytes(session(name))
    stream = parts(tmp_path, [])
    first = next(stream)
    assert not first.file.closed
    next(stream)
    assert first.file.closed
    stream.close()
