"""Published annotations become samples; every other row is counted by its reason."""

from __future__ import annotations

import io
import json
import runpy
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from timeviper_model.batching.prompt import MEDIA_MARKER
from timeviper_platform.data.annotations.convert import ConvertConfig, convert
from timeviper_platform.data.annotations.rows import read_objects
from timeviper_platform.data.inputs.readers import read_pages
from timeviper_platform.data.media.medium import media_id_of
from timeviper_platform.evaluation.scoring.spans import parse_span
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig

ROOT = Path(__file__).resolve().parents[4]


def run(tmp_path: Path, format: str, source: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The samples, and the rejects by reason."""
    config = ConvertConfig(
        format=format, input=str(source), output=str(tmp_path / "samples.parquet"), source=format, **changes
    )
    report = convert(config)
    assert pq.read_metadata(config.output).num_rows == report.samples
    table = SampleRows.read([SourceConfig(uri=config.output)]) if report.samples else []
    return [table[number] for number in range(report.samples)], report.rejects


def texts(sample: dict[str, Any]) -> list[str]:
    return [turn["text"] for turn in sample["conversation"]]


def media_ids(sample: dict[str, Any]) -> list[str]:
    return [medium["media_id"] for medium in sample["media"]]


def test_llava_rows(tmp_path: Path) -> None:
    def row(*turns: tuple[str, str], **media: object) -> dict[str, object]:
        return {"id": "7", **media, "conversations": [{"from": who, "value": text} for who, text in turns]}

    good = [
        row(("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Why?"), ("gpt", "Look."), video="a/v.mp4"),
        row(("human", "<image> and <image>"), ("gpt", "Two <image> tags."), image=["x.jpg", "y.jpg"]),
        row(("system", "Be brief."), ("human", "Hi."), ("gpt", "Hello.")),
    ]
    bad = [
        (row(("human", "<image><image>"), ("gpt", "x"), image="x.jpg"), "marker_mismatch"),
        (row(("human", "one"), ("human", "two"), image="x.jpg"), "bad_turns"),
        (row(("human", "one"), image="x.jpg"), "bad_turns"),
        (row(("human", "one"), ("robot", "two"), image="x.jpg"), "bad_turns"),
        (row(("human", "one"), ("gpt", "  "), image="x.jpg"), "no_answer"),
        (row(("human", "one"), ("gpt", "two"), image={"bytes": None}), "no_media"),
        ({"id": "8", "video": "v.mp4"}, "bad_row"),
        (["no object"], "bad_row"),
    ]
    entries = [*good, *(entry for entry, _ in bad)]
    (tmp_path / "array.json").write_text(json.dumps(entries, indent=1))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    for name in ("array.json", "lines.jsonl"):
        samples, rejects = run(tmp_path, "llava", tmp_path / name, media_prefix="videos", weight=2.0)
        assert rejects == {kind: [k for _, k in bad].count(kind) for _, kind in bad}
        assert texts(samples[0])[0] == f"{MEDIA_MARKER}\nWhat is it?"
        assert [turn["role"] for turn in samples[0]["conversation"]] == ["user", "assistant"] * 2
        assert media_ids(samples[0]) == [media_id_of("/root/videos/a/v.mp4", "/root")]
        assert texts(samples[1]) == [f"{MEDIA_MARKER} and {MEDIA_MARKER}", "Two <image> tags."]
        assert len(samples[1]["media"]) == 2
        assert samples[2]["media"] == []
        assert [sample["sample_id"] for sample in samples] == ["llava/0/7", "llava/1/7", "llava/2/7"]
        assert {(sample["source"], sample["weight"]) for sample in samples} == {("llava", 2.0)}


def converted(tmp_path: Path, format: str, *rows: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return run(tmp_path, format, tmp_path / "rows.jsonl")


def llava(question: str, *, turns: tuple[dict[str, str], ...] = (), **fields: Any) -> dict[str, Any]:
    return {**fields, "conversations": [*turns, {"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]}


def messages(content: Any, **fields: Any) -> dict[str, Any]:
    return {**fields, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}


def named(*names: str) -> list[str]:
    return [media_id_of(name, "") for name in names]


@pytest.mark.parametrize("make", [llava, messages])
def test_each_marker_takes_the_next_medium_of_its_kind(tmp_path: Path, make: Any) -> None:
    rows = [
        make("<video> then <image>, <image>", images=["1.jpg", "2.jpg"], videos=["v.mp4"]),
        make("No markers.", image="1.jpg", video="v.mp4"),
        make("<image> a video, as LLaVA-Video marks it, <image>", videos=["v.mp4", "w.mp4"]),
        make("<image><image>", image="1.jpg", video="v.mp4"),
        make("<image>", images=["1.jpg"], videos=["v.mp4"]),
        make("a literal <media> and <image>", image="1.jpg"),
    ]
    samples, rejects = converted(tmp_path, "llava" if make is llava else "messages", *rows)
    assert [media_ids(sample) for sample in samples] == [
        named("v.mp4", "1.jpg", "2.jpg"),
        named("1.jpg", "v.mp4"),
        named("v.mp4", "w.mp4"),
    ]
    assert texts(samples[0])[0] == f"{MEDIA_MARKER} then {MEDIA_MARKER}, {MEDIA_MARKER}"
    assert rejects == {"marker_mismatch": 3}


def test_times_of_a_row_make_clips_of_its_videos(tmp_path: Path) -> None:
    rows = [
        llava("?", video="v.mp4", start=1.5, end=4),
        llava("?", video="v.mp4", video_start=2, start=None),
        llava("?", image="i.jpg", videos=["v.mp4", "w.mp4"], video_start=[0, 7], video_end=[5, None]),
        llava("?", videos=[{"video": "v.mp4", "video_start": 1, "video_end": 2}]),
        llava("?", video="v.mp4", start=None, end=None),
        llava("?", videos=["v.mp4", "w.mp4"], start=1, end=2),
        llava("?", image="i.jpg", start=1, end=2),
        llava("?", video="v.mp4", start=3, end=3),
        llava("?", video="v.mp4", start="0:03"),
        llava("?", video="v.mp4", start=float("nan")),
        llava("?", video="v.mp4", start=1, video_start=2),
    ]
    samples, rejects = converted(tmp_path, "llava", *rows)
    clips = [[(item["start_seconds"], item["end_seconds"]) for item in sample["media"]] for sample in samples]
    assert clips == [
        [(1.5, 4.0)],
        [(2.0, None)],
        [(None, None), (0.0, 5.0), (7.0, None)],
        [(1.0, 2.0)],
        [(None, None)],
    ]
    assert rejects == {"bad_times": 6}


def test_the_system_text_of_a_row_is_its_first_turn(tmp_path: Path) -> None:
    brief = {"from": "system", "value": "Be brief."}
    rows = [
        llava("?", system="Be brief."),
        llava("?", system="Be brief.", turns=(brief,)),
        llava("?", system=None),
        llava("?", system="Be long.", turns=(brief,)),
        llava("?", system=["Be brief."]),
    ]
    samples, rejects = converted(tmp_path, "llava", *rows)
    assert [texts(sample) for sample in samples] == [["Be brief.", "?", "yes"]] * 2 + [["?", "yes"]]
    assert samples[0]["conversation"][0]["role"] == "system"
    assert rejects == {"bad_turns": 2}


def test_messages_of_openai_parts(tmp_path: Path) -> None:
    def text(value: str) -> dict[str, str]:
        return {"type": "text", "text": value}

    url = "https://a.invalid/1.jpg"
    rows = [
        messages([{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, text("What?"), text("Why?")]),
        messages([text("a <image> tag"), {"type": "video", "video": "v.mp4", "video_start": 1, "video_end": 9}]),
        messages([{"type": "image"}, text("first"), {"type": "image"}], images=["1.jpg", {"path": "2.jpg"}]),
        messages([{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "?"}], id=7),
        messages([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]),
        messages([{"type": "input_audio", "input_audio": {}}]),
        messages([{"type": "image"}]),
        {"messages": [{"role": "developer", "content": "Be brief."}, *messages("Hi.")["messages"]]},
        {"messages": [{"role": "tool", "content": "x"}, *messages("Hi.")["messages"]]},
    ]
    samples, rejects = converted(tmp_path, "messages", *rows)
    assert [texts(sample)[0] for sample in samples] == [
        f"{MEDIA_MARKER}What?\nWhy?",
        f"a <image> tag{MEDIA_MARKER}",
        f"{MEDIA_MARKER}first{MEDIA_MARKER}",
        f"{MEDIA_MARKER}?",
        "Be brief.",
    ]
    assert media_ids(samples[0]) == named(url)
    assert samples[1]["media"] == [{"media_id": named("v.mp4")[0], "start_seconds": 1.0, "end_seconds": 9.0}]
    assert media_ids(samples[2]) == named("1.jpg", "2.jpg")
    assert rejects == {"no_media": 1, "bad_turns": 2, "marker_mismatch": 1}


def test_fields_that_no_converter_reads_are_counted_by_name(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {
        "llava": [llava("?", data_source="academic"), llava("?", data_source="youtube", objects={})],
        "messages": [messages([{"type": "text", "text": "?", "cache_control": {}}], audios=["a.wav"])],
        "qvhighlights": [
            {"vid": "v", "query": "x", "duration": 9, "relevant_windows": [[0, 2]], "saliency_scores": []}
        ],
    }
    rows["messages"][0]["messages"][1]["weight"] = 0
    expected = {
        "llava": {"data_source": 2, "objects": 1},
        "messages": {"messages.content.cache_control": 1, "audios": 1, "messages.weight": 1},
        "qvhighlights": {"saliency_scores": 1},
    }
    for format, entries in rows.items():
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
        config = ConvertConfig(
            format=format,  # type: ignore[arg-type]
            input=str(tmp_path / "rows.jsonl"),
            output=str(tmp_path / "samples.parquet"),
            source="s",
        )
        report = convert(config)
        assert report.ignored_fields == expected[format]
    assert report.lines()[-1] == "ignored    1 saliency_scores"


def test_cc12m_media_ids_equal_those_of_a_manifest_of_the_same_urls(tmp_path: Path) -> None:
    url = "https://images.invalid/cat.jpg?size=2"
    (tmp_path / "cc12m.tsv").write_text(f"{url}\ta cat on a mat <PERSON>\nno tab\nhttps://images.invalid/b.jpg\t \n")
    samples, rejects = run(tmp_path, "cc12m", tmp_path / "cc12m.tsv")
    assert rejects == {"bad_row": 1, "no_caption": 1}
    (tmp_path / "manifest.csv").write_text(f"url\n{url}\n")
    ((item,),) = read_pages(str(tmp_path / "manifest.csv"))
    assert media_ids(samples[0]) == [item.media_id]
    assert texts(samples[0])[1] == "a cat on a mat <PERSON>"


def test_pixelprose_rows(tmp_path: Path) -> None:
    def row(**changes: object) -> dict[str, object]:
        base = {"uid": "0a", "url": "https://a.invalid/1.jpg", "key": "000", "status": "success"}
        return {**base, "vlm_caption": " This image displays: a cat.", "original_caption": "cat", **changes}

    rows = [row(), row(status="blocked"), row(vlm_caption=None), row(url=None)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "vlm_captions_cc12m_00.parquet")
    pq.write_table(pa.Table.from_pylist([row(uid="0b")]), tmp_path / "vlm_captions_cc12m_01.parquet")
    samples, rejects = run(tmp_path, "pixelprose", tmp_path / "vlm_captions_*.parquet")
    assert rejects == {"not_captioned": 1, "no_caption": 1, "no_media": 1}
    assert [sample["sample_id"] for sample in samples] == ["pixelprose/0/0a", "pixelprose/4/0b"]
    assert texts(samples[0])[1] == "This image displays: a cat."


def test_media_ids_of_captions_in_tars_equal_those_of_preprocessing(tmp_path: Path) -> None:
    files = {
        "000.jpg": b"x", "000.txt": b"a cat", "000.json": b'{"caption": "another"}',
        "001.json": b'{"caption": "a dog", "url": "u"}', "001.jpg": b"y", "002.jpg": b"z", "002.json": b"{",
    }  # fmt: skip
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "00000.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    samples, rejects = run(tmp_path, "webdataset", tmp_path / "shards")
    assert rejects == {"no_caption": 1}
    assert [texts(sample)[1] for sample in samples] == ["a cat", "a dog"]
    (items,) = read_pages(str(tmp_path / "shards"))
    assert [media_ids(sample)[0] for sample in samples] == [item.media_id for item in items[:2]]


def test_captions_behind_a_damaged_header_are_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.txt", "1.jpg", "1.txt", "2.jpg", "2.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"cat"))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[2 * 1024] ^= 0xFF  # the header of 1.jpg
    (tmp_path / "a.tar").write_bytes(data)
    samples, rejects = run(tmp_path, "webdataset", tmp_path / "a.tar")
    assert rejects == {"bad_row": 1}
    assert [sample["sample_id"] for sample in samples] == ["webdataset/0/0", "webdataset/2/2"]


def test_activitynet_captions(tmp_path: Path) -> None:
    sentences = ["A man sits down.", " He plays the piano."]
    annotations = {
        "v_QOlSCBRmfWY": {"duration": 82.73, "timestamps": [[17.37, 60.81], [0.83, 19.86]], "sentences": sentences},
        "v_late": {"duration": 10.0, "timestamps": [[0, 12]], "sentences": ["x"]},
        "v_back": {"duration": 10.0, "timestamps": [[5, 2]], "sentences": ["x"]},
        "v_none": {"duration": 10.0, "timestamps": [], "sentences": []},
        "v_uneven": {"duration": 10.0, "timestamps": [[0, 1]], "sentences": []},
    }
    (tmp_path / "train.json").write_text(json.dumps(annotations))
    (sample,), rejects = run(tmp_path, "activitynet", tmp_path / "train.json")
    assert rejects == {"bad_times": 2, "no_segment": 1, "bad_row": 1}
    assert texts(sample)[1] == (
        "From 0.8 to 19.9 seconds: He plays the piano.\nFrom 17.4 to 60.8 seconds: A man sits down."
    )
    assert media_ids(sample) == [media_id_of("v_QOlSCBRmfWY.mp4", "")]


def test_youcook2(tmp_path: Path) -> None:
    events = [
        {"segment": [90, 102], "id": 0, "sentence": "spread margarine on two slices of white bread"},
        {"segment": [114, 127], "id": 1, "sentence": "place a slice of cheese on the bread"},
    ]
    database = {
        "GLd3aX16zBg": {"duration": 241.62, "subset": "training", "recipe_type": "113", "annotations": events},
        "test": {"duration": 10.0, "subset": "testing", "recipe_type": "113"},
    }
    (tmp_path / "y.json").write_text(json.dumps({"database": database}))
    (sample,), rejects = run(tmp_path, "youcook2", tmp_path / "y.json")
    assert rejects == {"no_segment": 1}
    assert texts(sample)[1].splitlines()[1] == "From 114 to 127 seconds: place a slice of cheese on the bread"


def test_evaluation_parses_charades_sta_answers(tmp_path: Path) -> None:
    lines = ["AO8RW 0.0 6.9##a person is putting a book on a shelf.", "BAUQE 9.1 3.0##x", "CCCCC 1.0##x", "D 0 1##"]
    (tmp_path / "charades_sta_train.txt").write_text("\n".join(lines))
    (sample,), rejects = run(tmp_path, "charades_sta", tmp_path / "charades_sta_train.txt")
    assert rejects == {"bad_times": 1, "bad_row": 1, "no_caption": 1}
    question, answer = texts(sample)
    assert question == "When does this happen in the video: a person is putting a book on a shelf."
    assert parse_span(answer) == (0.0, 6.9)
    assert media_ids(sample) == [media_id_of("AO8RW.mp4", "")]


def test_didemo_takes_the_interval_that_most_annotators_chose(tmp_path: Path) -> None:
    def row(times: list[list[int]], **changes: object) -> dict[str, object]:
        video = "54322086@N00_2408598493_274c77d26a.avi"
        return {
            "annotation_id": 3,
            "video": video,
            "description": "a ball",
            "num_segments": 6,
            "times": times,
            **changes,
        }

    rows = [row([[1, 1], [2, 3], [2, 3], [0, 5]]), row([[0, 0], [1, 1]]), row([]), row([[0, 0]] * 4, description="")]
    (tmp_path / "train_data.json").write_text(json.dumps(rows))
    (sample,), rejects = run(tmp_path, "didemo", tmp_path / "train_data.json")
    assert rejects == {"no_segment": 1, "bad_row": 1, "no_caption": 1}
    assert texts(sample)[1] == "From 10 to 20 seconds."


def test_qvhighlights_gives_every_window(tmp_path: Path) -> None:
    base = {"qid": 9769, "query": "some military patriots", "duration": 150, "vid": "j7rJstUseKg_360.0_510.0"}
    rows = [{**base, "relevant_windows": [[82, 150], [72, 80]], "saliency_scores": [[4, 1, 1]]}, base]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (sample,), rejects = run(tmp_path, "qvhighlights", tmp_path / "train.jsonl")
    assert rejects == {"no_segment": 1}
    assert texts(sample)[1] == "From 72 to 80 seconds, from 82 to 150 seconds."


def test_a_caption_that_is_not_utf8_is_one_reject(tmp_path: Path) -> None:
    good, bad = "ein schöner Tag".encode(), "ein schöner Tag".encode("latin-1")
    event = b'{"vid": "v", "duration": 9, "query": "%s", "relevant_windows": [[0, 2]]}'
    film = b'"%s": {"duration": 9, "timestamps": [[0, 2]], "sentences": ["%s"]}'
    talk = b'{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "%s"}]}'
    files = {
        "cc12m": b"https://a.invalid/1\t%s\nhttps://a.invalid/2\t%s\n" % (good, bad),
        "charades_sta": b"A 0.0 6.9##%s\nB 0.0 6.9##%s\n" % (good, bad),
        "qvhighlights": b"\n".join([event % good, event % bad]),
        "activitynet": b"{%s, %s}" % (film % (b"v1", good), film % (b"v2", bad)),
        "llava": b"\n".join([talk % good, talk % bad, talk % b"\\ud800"]),
    }
    for format, data in files.items():
        (tmp_path / format).write_bytes(data)
    captions = pa.array([good, bad], pa.binary()).view(pa.string())
    rest = {"uid": ["a", "b"], "url": ["https://a.invalid/1"] * 2, "status": ["success"] * 2}
    pq.write_table(pa.table({**rest, "vlm_caption": captions}), tmp_path / "pixelprose")
    with tarfile.open(tmp_path / "webdataset.tar", "w") as tar:
        for name, content in {"0.jpg": b"x", "0.txt": good, "1.jpg": b"x", "1.txt": bad}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "webdataset.tar").rename(tmp_path / "webdataset.TAR")
    for format in (*files, "pixelprose", "webdataset"):
        samples, rejects = run(tmp_path, format, tmp_path / (format + ".TAR" * (format == "webdataset")))
        assert len(samples) == 1, format
        assert rejects == {"bad_text": 2 if format == "llava" else 1}, format
        assert good.decode() in texts(samples[0])[0] + texts(samples[0])[1], format


def test_times_that_are_not_seconds_are_rejects(tmp_path: Path) -> None:
    base = {"qid": 1, "query": "x", "duration": 150, "vid": "v", "relevant_windows": [[0, 9]]}
    wrong = [{"duration": "150"}, {"duration": float("inf")}, {"relevant_windows": [[0, float("nan")]]}]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({**base, **change}) for change in [{}, *wrong]))
    samples, rejects = run(tmp_path, "qvhighlights", tmp_path / "q.jsonl")
    assert (len(samples), rejects) == (1, {"bad_times": 3})
    entry = {"annotation_id": 3, "video": 7, "description": "a ball", "times": [[1, 1], [1, 1]]}
    (tmp_path / "d.json").write_text(json.dumps([entry, {**entry, "video": "a.avi"}]))
    samples, rejects = run(tmp_path, "didemo", tmp_path / "d.json")
    assert (len(samples), rejects) == (1, {"no_media": 1})


def test_json_is_read_in_chunks_of_any_size(tmp_path: Path) -> None:
    values = [{"a": [1, {"b": "] , [ ü"}]}, 12345, "é" * 50, [], {"last": 1.5}]
    (tmp_path / "array.json").write_text(json.dumps(values, ensure_ascii=False, indent=2))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(value) for value in values))
    for size in (1, 3, 7, 1 << 20):
        assert list(read_objects(str(tmp_path / "lines.jsonl"), chunk_chars=size)) == values
        assert list(read_objects(str(tmp_path / "array.json"), chunk_chars=size)) == values
    (tmp_path / "broken.json").write_text('[{"a": 1}, {"b":')
    with pytest.raises(ValueError, match="neither a JSON array"):
        list(read_objects(str(tmp_path / "broken.json")))


def test_a_file_of_another_format_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "x.tar").write_bytes(b"x" * 600)
    for format, name, message in (
        ("youcook2", "x.json", "is not in the format youcook2"),
        ("activitynet", "list.json", "is not in the format activitynet"),
        ("llava", "list.json", "has no rows of format llava"),
        ("webdataset", "x.tar", "is not in the format webdataset"),
        ("didemo", "missing.json", "cannot read .*missing.json"),
        ("pixelprose", "*.parquet", "has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, format, tmp_path / name)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(("samples", ".samples"))]


def test_the_job_reports_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "jobs" / "convert.py"))["main"]
    (tmp_path / "a.txt").write_text("AO8RW 0.0 6.9##a person sits.\nAO8RW 7.0 6.9##a person stands.\n")
    config = ["--config", str(ROOT / "ray_configs" / "tiny" / "convert.yaml"), f"output={tmp_path}/s.parquet"]
    assert main([*config, "format=charades_sta", f"input={tmp_path}/a.txt"]) == 0
    out = capsys.readouterr().out
    assert f"samples    1\nrejected   1 = 1 bad_times\nrejects    {tmp_path}/s.rejects.jsonl" in out
    (line,) = (tmp_path / "s.rejects.jsonl").read_text().splitlines()
    assert json.loads(line) == {"row": 1, "reason": "bad_times", "detail": "AO8RW.mp4: 7.0..6.9 s is not an interval"}
    assert main([*config, f"input={tmp_path}/none.json"]) == 1
    assert "cannot read" in capsys.readouterr().err
