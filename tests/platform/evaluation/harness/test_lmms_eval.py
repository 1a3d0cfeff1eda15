"""lmms-eval 0.7.3 as it is on the package index, against a gateway that serves a small model, and with our model.

TIMEVIPER_LMMS_EVAL names the Python of an environment that has it; without, one is made.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import uvicorn

from reference.tiny_serving import ServingFolders, make_serving_folders
from timeviper_model.inference.engine import EngineConfig
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.synthetic.benchmark import SynthBenchmarkConfig, make_benchmark
from timeviper_platform.evaluation.benchmark_answers import BenchmarkAnswerer
from timeviper_platform.evaluation.benchmark_config import BenchmarkConfig
from timeviper_platform.evaluation.benchmark_run import read_tasks, write_manifest
from timeviper_platform.evaluation.benchmarks.registry import BenchmarkName
from timeviper_platform.evaluation.evaluator import AnsweringConfig
from timeviper_platform.evaluation.harness.task_files import write_task_files
from timeviper_platform.evaluation.run import EvaluateConfig
from timeviper_platform.serving.engine.service import EngineService, EngineServiceConfig
from timeviper_platform.serving.features.service import FeatureService, FeatureServiceConfig
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import FeatureReference, Refusal

ROOT = Path(__file__).parents[4]
PACKAGES = (
    "lmms-eval==0.7.3",
    "accelerate==1.15.0",
    "av==15.1.0",
    "chardet==7.7.0",
    "DataProperty==1.1.1",
    "colorama==0.4.6",
    "datasets==5.2.0",
    "dill==0.4.1",
    "evaluate==0.4.6",
    "httpcore==1.0.9",
    "httpx==0.28.1",
    "jsonlines==4.0.0",
    "loguru==0.7.3",
    "lxml==6.1.3",
    "mbstrdecoder==1.1.5",
    "multiprocess==0.70.19",
    "numexpr==2.14.2",
    "opencv-python-headless==5.0.0.93",
    "pathvalidate==3.3.1",
    "portalocker==4.4.2",
    "pytablewriter==1.2.1",
    "pytz==2026.6",
    "sacrebleu==2.6.0",
    "sqlitedict==2.1.0",
    "tabledata==1.3.5",
    "tabulate==0.10.0",
    "tcolorpy==0.1.7",
    "tenacity==9.2.1",
    "tqdm-multiprocess==0.0.11",
    "typepy==2.0.0",
    "tzdata==2026.6",
    "zstandard==0.25.0",
)
"""Everything that lmms-eval imports and this project's environment lacks; lmms-eval pins another PyAV."""
MAX_FRAMES = 24
TASKS: dict[str, BenchmarkName] = {
    "timeviper_synth_choice": "synth",
    "timeviper_synth_words": "synth_words",
    "timeviper_synth_grounding": "synth_grounding",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
def harness_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    if given := os.environ.get("TIMEVIPER_LMMS_EVAL"):
        return given
    folder = tmp_path_factory.mktemp("lmms-eval")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    install = subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], capture_output=True)
    if install.returncode:
        pytest.skip(f"lmms-eval 0.7.3 cannot be installed: {install.stderr.decode()[-300:]}")
    (site,) = (folder / "lib").glob("python*/site-packages")
    own = [path for path in sys.path if path.endswith("site-packages")]
    (site / "this-projects-environment.pth").write_text("\n".join(own))
    return python


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ServingFolders:
    return make_serving_folders(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def benchmark(folders: ServingFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos with their features and task files."""
    root = tmp_path_factory.mktemp("synth")
    synth = SynthBenchmarkConfig(output=str(root), seconds=(20, 24), videos_per_kind=2, num_workers=1, side=56, fps=1)
    make_benchmark(synth)
    write_task_files(str(root))
    write_manifest(_evaluation("synth", folders, root), str(root / "manifest.parquet"))
    preprocess = PreprocessConfig(
        input=str(root / "manifest.parquet"), feature_store=str(root / "features"), encoder=folders.encoder
    )
    run_preprocess(preprocess, run=run_in_process)
    return root


def _evaluation(name: BenchmarkName, folders: ServingFolders, root: Path) -> EvaluateConfig:
    return EvaluateConfig(
        weights=folders.weights,
        feature_store=str(root / "features"),
        output=str(root / "report.json"),
        benchmark=BenchmarkConfig(name=name, folder=str(root), protocols=("whole",), prompts="owner"),
        answering=AnsweringConfig(max_frames=MAX_FRAMES),
    )


def _own_answers(folders: ServingFolders, root: Path, limits: dict[str, int]) -> dict[str, list[str]]:
    """Answers of jobs/evaluate.py's workers by task, in the table's order."""
    found = {}
    for task, name in TASKS.items():
        config = _evaluation(name, folders, root)
        answerer = BenchmarkAnswerer(
            weights_folder=config.weights,
            feature_store=config.feature_store,
            config=AnsweringConfig(max_frames=MAX_FRAMES, max_new_tokens=limits[task]),
            benchmark=name,
            prompts="owner",
            scores_options=False,
        )
        tasks = read_tasks(config)
        answers = {t.question.question_id: a for t, a in zip(tasks, answerer.answer(tasks), strict=True)}
        order = [row["question_id"] for row in pq.read_table(root / "test.parquet").to_pylist()]
        found[task] = [answers[question].answer for question in order if question in answers]
    return found


@contextmanager
def _serving(folders: ServingFolders, root: Path) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    features = FeatureServiceConfig(
        feature_store=str(root / "features"), encoder=folders.encoder, max_frames=MAX_FRAMES
    )
    engine = EngineServiceConfig(
        engine=EngineConfig(num_slots=2, max_prompt_tokens=2048, max_new_tokens=256, prefix_cache_bytes=64 << 20)
    )
    gateway = GatewayConfig(
        media_root=str(root / "media"), model_name="tiny", allowed_local_media=(str(root / "videos"),), max_tokens=256
    )

    async def read(reference: FeatureReference) -> AsyncGenerator[np.ndarray | Refusal]:
        yield reference.ref

    async def run() -> None:
        service = FeatureService(folders.weights, features, lambda array: array)
        await service.start()
        app = create_app(gateway, service, EngineService(folders.weights, engine, read))
        servers.append(uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")))
        await servers[0].serve()
        await service.close()

    servers: list[uvicorn.Server] = []
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    servers[0].should_exit = True
    thread.join(30)


def _run(python: str, root: Path, model: str, arguments: str, **environment: str) -> dict[str, list[str]]:
    """Answers by task, in the table's order."""
    output = root / f"out-{model}"
    shutil.rmtree(output, ignore_errors=True)
    command = [python, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", "timeviper_synth"]
    command += ["--include_path", str(root / "lmms_eval"), "--batch_size", "1", "--log_samples"]
    command += ["--output_path", str(output)]
    variables = {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", **environment}
    inherited = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}  # of a process group here
    done = subprocess.run(command, env=inherited | variables, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, list[str]] = {}
    for file in output.rglob("*_samples_*.jsonl"):
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
        answers = [row["filtered_resps"] for row in rows]
        found[file.stem.partition("_samples_")[2]] = [a[0] if isinstance(a, list) else a for a in answers]
    return found


LIMITS = {"timeviper_synth_choice": 32, "timeviper_synth_words": 32, "timeviper_synth_grounding": 48}
"""`max_new_tokens` of the task files."""


def test_the_served_model_answers_the_harness_like_our_evaluation(
    harness_python: str, folders: ServingFolders, benchmark: Path
) -> None:
    arguments = "model=tiny,pass_video_url=True,prefix_aware_queue=False,num_concurrent=1,timeout=120"
    with _serving(folders, benchmark) as url:
        arguments += f",max_frames_num={MAX_FRAMES}"
        found = _run(harness_python, benchmark, "openai", arguments, OPENAI_API_BASE=f"{url}/v1")
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    assert sum(map(len, found.values())) >= 20
    assert not any("LMMS_EVAL_REQUEST_FAILED" in answer for answers in found.values() for answer in answers)
    assert found == _own_answers(folders, benchmark, LIMITS)
    (cached,) = (line for line in metrics.splitlines() if line.startswith("timeviper_gateway_cached_prompt_tokens_t"))
    assert float(cached.split()[-1]) > 0, "a video's second question reuses its prefix"


def test_our_model_in_the_harness_answers_like_our_evaluation(
    harness_python: str, folders: ServingFolders, benchmark: Path, tmp_path: Path
) -> None:
    entry = tmp_path / "timeviper_entry-0.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: timeviper-entry\nVersion: 0\n")
    lines = "[lmms_eval.models]\ntimeviper = timeviper_platform.evaluation.harness.manifest:lmms_eval_models\n"
    (entry / "entry_points.txt").write_text(lines)
    arguments = f"weights={folders.weights},feature_store={benchmark / 'features'},protocol=whole,dtype=float32"
    found = _run(
        harness_python,
        benchmark,
        "timeviper",
        f"{arguments},max_frames={MAX_FRAMES},device=cpu",
        PYTHONPATH=os.pathsep.join(map(str, (tmp_path, ROOT / "platform", ROOT / "model"))),
    )
    assert found == _own_answers(folders, benchmark, LIMITS)
