"""The metrics of a worker and its successor, against what the real brain shows."""

import re
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import z4j_bare
from z4j_bare.demo.process import Service, clean_environment, until

pytestmark = pytest.mark.timeout(120)

#: The brain's state of a task that each of these counters counts.
STATES = {"succeeded": "success", "failed": "failure", "revoked": "revoked"}


def command(project, *options):
    """Return the command line and the environment of ``z4j-bare metrics``."""
    environment = {**clean_environment(), "Z4J_HOME": str(project.home / "agent")}
    environment["PYTHONPATH"] = str(Path(z4j_bare.__file__).parents[1])
    return [sys.executable, "-m", "z4j_bare", "metrics", *options], environment


def samples(text):
    """Return the samples of an OpenMetrics text as ``(name, labels, value)``."""
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def totals(text, worker=None):
    """Return the sum of each counter of tasks, by kind and task name."""
    counts = Counter()
    for name, labels, value in samples(text):
        kind = name.removeprefix("celery_task_").removesuffix("_total")
        if name == f"celery_task_{kind}_total" and worker in (None, labels["worker"]):
            counts[kind, labels["name"]] += int(value)
    return +counts


def scrape(project, *options):
    """Return the text that ``z4j-bare metrics`` prints."""
    words, environment = command(project, *options)
    done = subprocess.run(words, capture_output=True, env=environment, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def served(project):
    """Return the text that ``z4j-bare metrics --listen`` serves to Prometheus."""
    words, environment = command(project, "--listen", "127.0.0.1:0")
    log = project.home / "metrics.log"
    address = re.compile(r"at (http://\S+)")
    with Service("the server", words, environment=environment, cwd=project.home, log=log) as server:
        server.spawn(lambda: address.search(server.output()) is not None, 20)
        request = urllib.request.Request(
            address.search(server.output())[1],
            headers={"Accept": "application/openmetrics-text;version=1.0.0"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            text = response.read().decode()
        assert server.stop() == 0
    return text


def run_tasks(project):
    """Run tasks with every end, and wait until the brain shows each end."""
    sent = [project.send("add", number, 1) for number in range(10)]
    sent += [project.send("fails", "x") for _ in range(3)]
    sent += [project.send("retries") for _ in range(2)]
    sent += [
        str(project.producer.send_task("e2e.add", args=(1, 1), expires=-1).id) for _ in range(2)
    ]
    for task_id in sent:
        project.row(task_id)


def shown(project):
    """Return the ends that the brain shows, by kind and task name."""
    rows = project.brain.tasks(project.slug)
    counts = Counter(
        (kind, row["name"])
        for row in rows
        for kind, state in STATES.items()
        if row["state"] == state
    )
    for row in rows:
        if row["name"] == "e2e.retries":
            kinds = project.kinds(row["task_id"])
            counts["retried", row["name"]] += kinds.count("task.retried")
    return counts


def ends(counts):
    """Return the counts without arrivals and starts."""
    return {key: value for key, value in counts.items() if key[0] not in ("received", "started")}


@pytest.mark.parametrize(
    ("pool", "end"),
    [("gevent", "kill"), ("eventlet", "stop"), ("threads", "stop"), ("prefork", "stop")],
)
def test_metrics_summed_over_restart_equal_brain(pool, end, fresh_project):
    """After failures, retries and a restart, the sum of both workers' counts is what the brain
    shows. It includes a run that was killed, and what a worker counts while it stops. The ended
    worker's series stay until the next worker has its name.
    """
    project = fresh_project
    worker = project.worker(pool=pool)
    project.warm_up()
    run_tasks(project)
    until(
        lambda: ends(totals(scrape(project))) == shown(project),
        "the metrics of the first worker",
        timeout=15,
    )
    first = scrape(project)
    total = totals(first)
    assert total["retried", "e2e.retries"] == 4
    assert total["revoked", "e2e.add"] == 2
    runtime = [
        value
        for name, labels, value in samples(first)
        if name.endswith("runtime_sum") and labels["name"] == "e2e.add"
    ]
    assert 0.02 * 10 <= sum(runtime) < 60
    if end == "kill":
        project.row(project.send("wait", 60), "started")
        until(lambda: totals(scrape(project))["started", "e2e.wait"] == 1, "the start", timeout=15)
        total = totals(scrape(project))
        worker.kill()
    else:
        worker.stop()
    words, environment = command(project)
    gone = subprocess.run(words, capture_output=True, env=environment, timeout=30, check=False)
    assert gone.returncode == 1
    if end == "stop":  # the app counts a task while its worker stops
        total["succeeded", "e2e.shutting_down"] = 1
        assert ends(total) == shown(project)
    assert totals(gone.stdout.decode()) == total
    assert [
        value for name, _, value in samples(gone.stdout.decode()) if name == "celery_worker_up"
    ] == [0.0]

    project.worker(pool=pool)
    run_tasks(project)
    until(
        lambda: ends(total + totals(scrape(project))) == shown(project),
        "the metrics of both workers",
        timeout=15,
    )
    last = scrape(project)
    assert totals(served(project)) == totals(last)
    up = [(labels, value) for name, labels, value in samples(last) if name == "celery_worker_up"]
    assert up == [({"hostname": "e2e", "worker": "w@e2e", "project": project.slug}, 1.0)]
    queues = {
        (name, labels["queue_name"]): value
        for name, labels, value in samples(last)
        if "queue_name" in labels and "name" not in labels
    }
    assert queues == {
        ("celery_queue_length", project.home.name): 0,
        ("celery_active_worker_count", project.home.name): 1,
    }
