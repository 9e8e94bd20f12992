"""Runs of ``z4j-bare demo`` in a temporary directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

from z4j_bare.demo.worker import worker_environment

#: The figures of the report in every pool, and their counts.
FIGURES = {
    "failing": 1,
    "automatic retry": 1,
    "asyncio.run": 5,
    "Django ORM": 5,
    "failing before retry": 1,
    "retried by operator": 1,
    "retry events": 1,
    "operator commands": 2,
    "unknown tasks": 0,
}

#: The figure of the cancelled task in the pools that can terminate a running task.
CANCELLED = dict.fromkeys(("gevent", "eventlet", "prefork"), "cancelled while running")

#: Number of plain tasks.
PLAIN = 50


def start_demo(temporary, *arguments):
    environment = worker_environment({"TMPDIR": str(temporary)})
    return subprocess.Popen(
        [sys.executable, "-m", "z4j_bare", "demo", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_demo(temporary, *arguments):
    """Run the demo to its end and return exit code, stdout and stderr."""
    with start_demo(temporary, *arguments) as demo:
        try:
            out, err = demo.communicate(timeout=240)
        except BaseException:
            demo.terminate()  # The demo stops its brain and worker.
            raise
    return demo.returncode, out, err


def assert_figures_agree(pool, temporary, *arguments):
    """Run a demo, assert that the brain shows what the script produced, and return its report."""
    code, out, err = run_demo(temporary, "--json", "--pool", pool, *arguments)
    assert out, err
    report = json.loads(out)
    assert (code, report["problems"], report["mismatches"]) == (0, [], []), err
    assert {figure["kind"]: figure["produced"] for figure in report["figures"]} == {
        **FIGURES,
        "plain": PLAIN,
        "plain, no loop visible": PLAIN,
        CANCELLED.get(pool, "cancelled before start"): 1,
    }
    assert all(figure["seen"] == figure["produced"] for figure in report["figures"])
    assert report["ok"]
    assert report["agent"]["state_at_work"] == "online"
    assert report["worker"]["seen"] == ["worker@demo"]
    assert report["worker"]["exit_code"] == 0
    assert 0 < report["slowest_delay"] < 10
    assert list(temporary.iterdir()) == []
    assert processes_of(temporary) == []
    return report


def processes_of(temporary):
    """Return the ids of processes whose environment contains the directory."""
    mark = f"{temporary}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]
