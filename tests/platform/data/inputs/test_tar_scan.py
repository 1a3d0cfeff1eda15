"""Every complete member of a damaged or joined tar is found, and each damaged place once."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from timeviper_platform.data.inputs import tar_scan
from timeviper_platform.data.inputs.tar_scan import TarBreak, scan_tar

CASES = Path(__file__).parents[3] / "reference" / "cases" / "inputs"
NAMES = [f"{number}.jpg" for number in range(8)]


def make_tar(names: list[str] = NAMES, size: int = 1200, format: int = tarfile.PAX_FORMAT) -> bytearray:
    """Members are 2048 bytes apart, the header with them: 512 + 1536."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(name[:1].encode() * size))
    return bytearray(file.getvalue())


def found_in(data: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """Names whose bytes are right, and the breaks."""
    names, breaks = [], []
    for found in scan_tar(io.BytesIO(data)):
        if isinstance(found, TarBreak):
            breaks.append((found.start, found.end))
        else:
            content = data[found.offset_data : found.offset_data + found.size]
            assert content == Path(found.name).name[:1].encode() * found.size, found.name
            names.append(found.name)
    return names, breaks


def without(*numbers: int) -> list[str]:
    return [name for number, name in enumerate(NAMES) if number not in numbers]


def test_a_whole_tar_has_no_break() -> None:
    assert found_in(make_tar()) == (NAMES, [])
    assert found_in(bytes(10240)) == ([], [])


@pytest.mark.parametrize("kind", ["bad checksum", "zeroed", "noise", "negative size", "size past the end", "hole"])
def test_a_damaged_header_costs_its_member(kind: str) -> None:
    data, start = make_tar(), 3 * 2048
    header = tarfile.TarInfo("3.jpg")
    if kind == "bad checksum":
        data[start + 10] ^= 0xFF
    elif kind == "zeroed":
        data[start : start + 512] = bytes(512)
    elif kind == "noise":
        data[start : start + 512] = random.Random(0).randbytes(512)
    elif kind == "hole":
        data[start : start + 2048] = bytes(2048)
    else:
        header.size = -4096 if kind == "negative size" else 1 << 40
        data[start : start + 512] = header.tobuf(tarfile.GNU_FORMAT)[:512]
    assert found_in(data) == (without(3), [(start, start + 2048)])


def test_a_hole_over_half_a_member_and_a_header_is_one_break() -> None:
    data = make_tar(size=1536)
    data[3 * 2048 + 600 : 4 * 2048 + 900] = bytes(2348)  # the data of 3 is the decoder's to judge
    members = [found for found in scan_tar(io.BytesIO(data)) if not isinstance(found, TarBreak)]
    assert [member.name for member in members] == without(4)
    assert [tuple(found)[:2] for found in scan_tar(io.BytesIO(data)) if isinstance(found, TarBreak)] == [(8192, 10240)]


def test_two_damaged_places_are_two_breaks() -> None:
    data = make_tar()
    data[0] ^= 0xFF
    data[5 * 2048] ^= 0xFF
    assert found_in(data) == (without(0, 5), [(0, 2048), (5 * 2048, 6 * 2048)])


@pytest.mark.parametrize("lost", [1, 100, 512, 700])
def test_members_after_lost_bytes_are_found_off_their_blocks(lost: int) -> None:
    data = make_tar()
    del data[2 * 2048 + 1 : 2 * 2048 + 1 + lost]  # in the header of 2
    names, breaks = found_in(data)
    assert names == without(2)
    assert breaks[0] == (4096, 6144 - lost)
    assert len(breaks) == 1 or lost > 256  # the end mark's place is then unknown


@pytest.mark.parametrize(
    ("size", "names", "start"),
    [
        (2 * 2048, NAMES[:2], 2 * 2048),  # between two members
        (2 * 2048 + 300, NAMES[:2], 2 * 2048),  # in a header
        (2 * 2048 + 512 + 600, NAMES[:2], 2 * 2048),  # in the data
        (2 * 2048 + 512 + 1200, NAMES[:3], 2 * 2048 + 512 + 1200),  # behind the data: its padding is missing
        (300, [], 0),
        (0, [], 0),
    ],
)
def test_a_cut_tar_ends_with_one_break(size: int, names: list[str], start: int) -> None:
    assert found_in(make_tar()[:size]) == (names, [(start, size)])


def test_a_cut_inside_the_end_mark_loses_nothing() -> None:
    data = make_tar()
    for size in (8 * 2048 + 512, 8 * 2048 + 1024, 8 * 2048 + 2000, len(data)):
        assert found_in(data[:size]) == (NAMES, []), size


def test_a_download_that_never_finished_is_a_break() -> None:
    data = make_tar()
    data[4096:] = bytes(100_000)
    assert found_in(data) == (NAMES[:2], [(4096, 104_096)])


@pytest.mark.parametrize("padding", [10240, 1024])
def test_joined_archives_are_read_on(padding: int) -> None:
    """GNU tar and Python pad to 10,240 bytes; Go writes two blocks."""
    first, second = make_tar(), make_tar([f"{n}.png" for n in range(3)])
    if padding == 1024:
        first, second = first[: 8 * 2048 + 1024], second[: 3 * 2048 + 1024]
    assert found_in(first + second) == (NAMES + [f"{n}.png" for n in range(3)], [])


def test_the_committed_cases_are_read_as_far_as_they_go() -> None:
    for name, num_members, breaks in (
        ("bad_header", 7, [(8192, 10240)]),
        ("trunc_header_boundary", 4, [(8192, 8192)]),
        ("concatenated", 16, []),
    ):
        found = list(scan_tar(io.BytesIO((CASES / f"{name}.tar").read_bytes())))
        assert [tuple(entry)[:2] for entry in found if isinstance(entry, TarBreak)] == breaks, name
        assert sum(not isinstance(entry, TarBreak) for entry in found) == num_members, name


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_kept_beside_damage(format: int) -> None:
    long = [f"{number}{'x' * 200}.jpg" for number in range(4)]
    data = make_tar(long, format=format)
    assert found_in(data) == (long, [])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        second = tar.getmembers()[1]
    data[second.offset_data - 512] ^= 0xFF  # the header behind that of the long name
    names, breaks = found_in(data)
    assert names == [long[0], *long[2:]]
    assert [start for start, _ in breaks] == [second.offset]


def test_a_size_that_only_pax_states_is_read() -> None:
    data = make_tar()
    member = tarfile.TarInfo("0.jpg")
    member.size = 1200
    member.pax_headers = {"size": "1200"}
    pax = member.tobuf(tarfile.PAX_FORMAT)
    plain = tarfile.TarInfo("0.jpg").tobuf(tarfile.USTAR_FORMAT)  # size 0
    data[:512] = pax[:-512] + plain
    assert found_in(data) == (NAMES, [])


def test_a_name_header_of_a_terabyte_is_not_read_into_memory() -> None:
    data = make_tar()
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    data[2048 : 2048 + 512] = header.tobuf(tarfile.GNU_FORMAT)[-512:]
    assert found_in(data) == (without(1), [(2048, 4096)])


def test_a_header_across_two_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_scan, "READ_AHEAD_BYTES", 700)
    data = make_tar()
    data[2048] ^= 0xFF
    assert found_in(data) == (without(1), [(2048, 4096)])


def test_any_damage_leaves_an_answer() -> None:
    """Drawn bytes of a tar flipped, cut and zeroed: no error, no endless loop, every byte in order."""
    for seed in range(300):
        rng = random.Random(seed)
        data = make_tar(format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        for _ in range(rng.randint(1, 4)):
            start, length = rng.randrange(len(data)), rng.randint(1, 3000)
            kind = rng.randrange(4)
            if kind == 0:
                data[start] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[start : start + length] = bytes(min(length, len(data) - start))
            elif kind == 2:
                del data[start : start + length]
            else:
                data[start:start] = rng.randbytes(length)
        position = 0
        for found in scan_tar(io.BytesIO(data)):
            start = found.start if isinstance(found, TarBreak) else found.offset
            assert start >= position, seed
            position = found.end if isinstance(found, TarBreak) else found.offset_data + found.size
            assert position <= len(data), seed
