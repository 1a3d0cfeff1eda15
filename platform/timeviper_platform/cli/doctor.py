"""Checks this machine and what a run needs: `timeviper doctor [URI ...]`.

Versions, GPUs and kernels, decoders, /dev/shm, disk, token, the cluster of RAY_API_SERVER_ADDRESS, ports, and each URI
(written, read, deleted). Every fault is followed by a remedy; the exit code is 1 if any is an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timeviper_platform.cluster.doctor import describe, examine
from timeviper_platform.common.job import JobParser, JobResult, run_job


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(__doc__)
    parser.add_argument("uris", nargs="*", metavar="URI", help="folders that a run reads or writes, local or s3://")
    parser.add_argument("--gpu", action="store_true", help="a missing GPU or kernel is an error")
    return run_job(parser, doctor, arguments)


def doctor(options: argparse.Namespace) -> JobResult:
    findings = examine(options.uris, need_gpu=options.gpu)
    failed = any(finding.status == "error" for finding in findings)
    return JobResult(describe(findings), exit_code=1 if failed else 0)
