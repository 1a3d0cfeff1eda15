"""Judges: what they are asked, how replies are read, and that no call is lost or repeated."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reference.benchmark_miniatures import make_miniature
from timeviper_platform.common.job import JobError
from timeviper_platform.common.lease import LeaseHeldError
from timeviper_platform.evaluation.benchmark_answers import BenchmarkAnswer
from timeviper_platform.evaluation.benchmark_config import BenchmarkConfig
from timeviper_platform.evaluation.benchmark_run import answers_uri, judge, rescore, write_benchmark_report
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS, BenchmarkName
from timeviper_platform.evaluation.judging.exams import Call, exams_of, verdict_of
from timeviper_platform.evaluation.judging.judge import JudgeConfig
from timeviper_platform.evaluation.judging.run import MAX_FAILURES_IN_A_ROW, replies_uri
from timeviper_platform.evaluation.outcomes import hash_of
from timeviper_platform.evaluation.run import EvaluateConfig

CAPTION = "A kitchen with a white cat on a table."


def _question(name: BenchmarkName, folder: Path, number: int = 0) -> BenchmarkQuestion:
    return BENCHMARKS[name].read(make_miniature(name, folder))[number]


def _calls(question: BenchmarkQuestion, replies: list[str]) -> list[Call]:
    (exam,) = exams_of(question, CAPTION)
    return [step(replies[:number]) for number, step in enumerate(exam.steps)]


def test_vdc_asks_from_the_caption_alone_and_then_compares(tmp_path: Path) -> None:
    question = _question("vdc", tmp_path)
    answer, compare = _calls(question, ["a cooking room"])
    assert CAPTION in answer.user
    assert "kitchen" not in answer.user.replace(CAPTION, ""), "the truth is not shown"
    assert "Predicted answer: a cooking room" in compare.user
    assert "Correct answer: kitchen" in compare.user
    assert CAPTION not in compare.user


@pytest.mark.parametrize(
    ("reply", "accuracy", "score", "num_unparsable"),
    [
        ('{"pred": "yes", "score": 4}', 1.0, 0.8, 0),
        ("{'pred': 'yes', 'score': 4.8}", 1.0, 0.96, 0),
        ("Here it is: {'pred': 'YES', 'score': 5}.", 1.0, 1.0, 0),
        ("pred: no, score: 2", 0.0, 0.4, 0),
        ("{'pred': 'yes', 'score': 9}", 1.0, 1.0, 0),
        ("yes", 0.0, 0.0, 1),
        ("{'pred': 'maybe', 'score': 3}", 0.0, 0.0, 1),
    ],
)
def test_verdicts_of_vdc(reply: str, accuracy: float, score: float, num_unparsable: int, tmp_path: Path) -> None:
    verdict = verdict_of(_question("vdc", tmp_path), [("a room", reply)])
    assert verdict.values == pytest.approx({"accuracy": accuracy, "score of 5": score})
    assert verdict.num_unparsable == num_unparsable


def test_unparsable_verdicts_stay_in_the_denominator(tmp_path: Path) -> None:
    question = _question("vdc", tmp_path, 1)  # the pair twice
    verdict = verdict_of(question, [("a", '{"pred": "yes", "score": 5}'), ("a", "well")])
    assert verdict.values == {"accuracy": 0.5, "score of 5": 0.5}


def test_an_empty_caption_is_wrong_without_a_call(tmp_path: Path) -> None:
    question = _question("vdc", tmp_path)
    assert exams_of(question, " ") == []
    assert verdict_of(question, []).values == {"accuracy": 0.0, "score of 5": 0.0}


def test_mlvus_two_marks(tmp_path: Path) -> None:
    scene, summary = (_question("mlvu_generation", tmp_path, number) for number in range(2))
    assert "a cat; on a roof" in _calls(scene, [])[0].user
    assert "What does the cat do?" in _calls(scene, [])[0].user
    verdict = verdict_of(scene, [('{"accuracy": 5, "relevance": 3}',)])
    assert verdict.values == pytest.approx({"G-Avg": 0.8, "accuracy of 5": 1.0, "relevance of 5": 0.6})
    verdict = verdict_of(summary, [("completeness: 2",)])
    assert verdict.values == pytest.approx({"G-Avg": 0.2, "completeness of 5": 0.4, "reliability of 5": 0.0})
    assert verdict.num_unparsable == 1


@pytest.mark.parametrize(
    ("reply", "score", "num_unparsable"),
    [
        ("Reasoning: it runs.\nAnswer: B. running", 1.0, 0),
        ("Answer: B", 1.0, 0),
        ("Answer: A. jumping", 0.0, 0),
        ("Reasoning: A and B do not fit.\nAnswer: None of the choices are correct", 0.0, 0),
        ("Answer: A or B", 0.0, 1),
    ],
)
def test_tempcompass_lets_the_judge_choose_by_the_caption(
    reply: str, score: float, num_unparsable: int, tmp_path: Path
) -> None:
    question = _question("tempcompass_captioning", tmp_path)
    (call,) = _calls(question, [])
    assert "What happens?\nA. jumping\nB. running" in call.user
    verdict = verdict_of(question, [(reply,)])
    assert (verdict.values, verdict.num_unparsable) == ({"accuracy": score}, num_unparsable)


class _Endpoint(ThreadingHTTPServer):
    """A chat endpoint; every second request fails, with an error or an empty reply."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.num_requests = 0
        self.answered: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: _Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.path.startswith("/v1/"):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")
            return
        with self.server.lock:
            self.server.num_requests += 1
            number = self.server.num_requests
            fails = number % 2 == 0
            if not fails:
                self.server.answered[json.dumps(body["messages"])] += 1
        is_verdict = "Predicted answer" in body["messages"][-1]["content"]
        text = '{"pred": "yes", "score": 4}' if is_verdict else f"room {hash_of(body['messages'])}"
        content = "" if fails and number % 4 == 0 else text
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        reply |= {
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]
        }
        self.send_response(500 if fails and number % 4 else 200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[_Endpoint]:
    server = _Endpoint()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _captions(tmp_path: Path, judge_config: JudgeConfig | None) -> EvaluateConfig:
    """Ten captions of VDC as an evaluation leaves them."""
    folder = make_miniature("vdc", tmp_path / "vdc")
    config = EvaluateConfig(
        weights="gone",
        feature_store="gone",
        output=str(tmp_path / "report.json"),
        benchmark=BenchmarkConfig(name="vdc", folder=folder, protocols=("paper",), num_examples=0),
        judge=judge_config,
    )
    answers = [
        BenchmarkAnswer(
            task_hash=question.question_id,
            question=json.dumps(asdict(question)),
            protocol="paper",
            status="ok",
            answer=f"{CAPTION} {question.question_id}",
        )
        for question in BENCHMARKS["vdc"].read(folder)
    ]
    write_benchmark_report(config, answers)
    return config


def _judge_config(url: str, **changes: int) -> JudgeConfig:
    return replace(JudgeConfig(base_url=url, model="llama", max_retries=0, num_concurrent=3), **changes)  # type: ignore[arg-type]


def test_a_judge_that_fails_half_of_the_time_loses_nothing_and_repeats_nothing(
    tmp_path: Path, endpoint: _Endpoint
) -> None:
    config = _captions(tmp_path, _judge_config(endpoint.url))
    with pytest.raises(JobError, match=r"calls to the judge failed, the first by .* repeat those alone"):
        judge(config)
    partial = json.loads((tmp_path / "report.json").read_text())["protocols"]["paper"]
    assert 0 < partial["num_unjudged"] <= 10
    for _ in range(20):
        with suppress(JobError):
            report = judge(config)
            break
    assert set(endpoint.answered.values()) == {1}, "an answered call was repeated"
    rows = pq.read_table(replies_uri(config.output)).to_pylist()
    assert len(rows) == len(endpoint.answered) == 2 * 10, "each caption's two calls; equal pairs of a caption once"
    assert {row["judge"] for row in rows} == {"llama"}
    found = report["protocols"]["paper"]
    assert found["num_unjudged"] == 0
    metrics = found["scorers"]["judge llama"]["metrics"]
    assert (metrics["accuracy"]["score"], metrics["accuracy"]["num_questions"]) == (100.0, 10)
    assert metrics["score of 5"]["score"] == pytest.approx(80.0)
    assert set(found["scorers"]["judge llama"]["breakdowns"]["aspect"]) == {
        "background",
        "camera",
        "detailed",
        "main_object",
        "short",
    }

    answers = pq.read_table(answers_uri(config.output)).to_pylist()
    assert [row["judge_score"] for row in answers] == [1.0] * 10

    num_requests = endpoint.num_requests
    assert judge(config) == report
    assert endpoint.num_requests == num_requests
    assert rescore(replace(config, judge=None))["protocols"] == report["protocols"], "without judge and model"


def test_a_killed_judge_run_repeats_no_call_that_was_written(tmp_path: Path) -> None:
    config = _captions(tmp_path, _judge_config("http://127.0.0.1:9/v1", num_concurrent=1))
    first: list[Call] = []
    second: list[Call] = []

    class _Killed(BaseException):
        pass

    def ask(call: Call) -> str:
        if len(first) == 7:
            raise _Killed
        return answer(call, first)

    def answer(call: Call, asked: list[Call]) -> str:
        asked.append(call)
        return f"room {call.call_hash}" if "Predicted answer" not in call.user else '{"pred": "no", "score": 1}'

    with pytest.raises(_Killed):
        judge(config, ask)
    assert not Path(replies_uri(config.output)).exists()
    report = judge(config, lambda call: answer(call, second))
    assert len(first) == 7
    assert len(second) == 13
    assert not set(first) & set(second)
    assert report["protocols"]["paper"]["num_unjudged"] == 0
    assert sorted(path.name for path in tmp_path.glob("report*")) == [
        "report.answers.parquet",
        "report.html",
        "report.json",
        "report.replies.parquet",
    ]


def test_a_judge_run_beside_another_is_refused(tmp_path: Path) -> None:
    """The later to end would replace the replies of the other."""
    config = _captions(tmp_path, _judge_config("http://127.0.0.1:9/v1", num_concurrent=1))
    refused: list[str] = []

    def ask(call: Call) -> str:
        for other in (judge, rescore):
            with pytest.raises(LeaseHeldError) as error:
                other(config)
            refused.append(str(error.value))
        return '{"pred": "no", "score": 1}'

    judge(config, ask)
    assert len(refused) > 2
    assert all("report.partial is in use by jobs/evaluate.py" in message for message in refused)


def test_a_judge_that_is_gone_ends_the_run_soon(tmp_path: Path) -> None:
    config = _captions(tmp_path, _judge_config("http://127.0.0.1:9/v1"))
    answers = pq.read_table(answers_uri(config.output)).to_pylist()
    many = [row | {"answer": f"{row['answer']} {number}"} for number in range(20) for row in answers]
    assert config.benchmark is not None
    write_benchmark_report(config, [BenchmarkAnswer.from_row(row) for row in many])
    asked: list[Call] = []

    def ask(call: Call) -> str:
        asked.append(call)
        raise RuntimeError("APIConnectionError: refused")

    with pytest.raises(JobError, match=rf"{MAX_FAILURES_IN_A_ROW} of {MAX_FAILURES_IN_A_ROW} calls .* refused"):
        judge(config, ask)
    assert len(asked) < MAX_FAILURES_IN_A_ROW + 10


def test_an_address_without_the_api_is_named(tmp_path: Path, endpoint: _Endpoint) -> None:
    config = _captions(tmp_path, _judge_config(endpoint.url.removesuffix("/v1")))
    with pytest.raises(JobError, match=r"http://127.0.0.1:\d+ does not answer like OpenAI's API; judge.base_url"):
        judge(config)


def test_a_judge_needs_a_configuration_and_captions(tmp_path: Path) -> None:
    config = _captions(tmp_path, None)
    with pytest.raises(ValueError, match=r"set judge\.base_url and judge\.model"):
        judge(config)
    with pytest.raises(ValueError, match="no answers at"):
        judge(replace(config, judge=_judge_config("http://x/v1"), output=str(tmp_path / "other.json")))
