"""Installation of the agent in a process, and processes in which it must not start."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.e2e_project import APPS
from z4j_bare.demo.process import Service, until
from z4j_bare.demo.worker import CONCURRENCY, worker_environment

pytestmark = pytest.mark.timeout(120)

#: The ``celery`` script.
CELERY = str(Path(sys.executable).with_name("celery"))

#: The ways to start a worker. ``multi`` and ``detach`` start a daemon.
COMMANDS = {
    "module": [sys.executable, "-m", "celery", "-A", "{app}", "worker"],
    "program": [sys.executable, str(APPS / "program.py"), "{app}", "worker"],
    "detach": [CELERY, "-A", "{app}", "worker", "--detach"],
    "multi": [CELERY, "multi", "start", "{name}", "-A", "{app}"],
}

#: Workers of these tests: the way to start each, its application and its pool.
STARTS = [
    ("module", "autostart", "prefork"),
    ("module", "autostart", "gevent"),
    ("module", "autostart", "eventlet"),
    ("module", "autostart", "threads"),
    ("module", "autostart", "solo"),
    ("program", "autostart", "prefork"),
    ("program", "autostart", "threads"),
    ("program", "installed", "prefork"),
    ("program", "installed", "solo"),
    ("detach", "autostart", "prefork"),
    ("multi", "autostart", "prefork"),
    ("multi", "autostart", "gevent"),
    ("multi", "installed", "prefork"),
    ("multi", "installed", "gevent"),
]


class StartedWorker:
    """A worker that is started in one of the ways, with its own queue."""

    def __init__(self, project, way, app, pool):
        self.queue = f"{project.home.name}-{way}-{app}-{pool}"
        self.name = f"{way}-{app}-{pool}@e2e"
        self.pid_file = project.home / f"{self.name}.pid"
        self._is_daemon = way in ("detach", "multi")
        command = [word.format(app=app, name=self.name) for word in COMMANDS[way]]
        command += [] if way == "multi" else ["--hostname", self.name]
        command += [f"--pool={pool}", f"--concurrency={CONCURRENCY[pool]}", "--loglevel=INFO"]
        command += ["-Q", self.queue]
        log = project.home / f"{self.name}.log"
        if self._is_daemon:
            command += [f"--pidfile={self.pid_file}", f"--logfile={log}"]
        environment = worker_environment(project.environment())
        self.service = Service(
            self.name, command, environment=environment, cwd=project.home, log=log
        )

    @property
    def pid(self):
        return int(self.pid_file.read_text()) if self._is_daemon else self.service.pid

    def __enter__(self):
        self.service.spawn(lambda: True, 10)
        return self

    def __exit__(self, *_exc):
        self.service.kill()
        if self._is_daemon and self.pid_file.exists():
            for group in {os.getpgid(self.pid)}:
                os.killpg(group, signal.SIGKILL)


@pytest.fixture(scope="module")
def started(project):
    """All workers of ``STARTS``, which start concurrently."""
    with ExitStack() as stack:
        yield {start: stack.enter_context(StartedWorker(project, *start)) for start in STARTS}


@pytest.fixture(scope="module")
def automatic(project):
    """A worker whose app only imports z4j_celery."""
    worker = project.worker("autostart", pool="gevent", name="w@autostart")
    project.warm_up()
    return worker


#: Runs ``celery beat`` for two seconds.
BEAT = """
import signal, sys
from celery.signals import beat_init
beat_init.connect(lambda **_: signal.alarm(2), weak=False)
signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
sys.argv = ["celery", "-A", "autostart", "beat", "--loglevel=INFO", "--schedule=beat", "--pidfile="]
from celery.__main__ import main
main()
"""


def celery(project, app, *words):
    """Start a ``celery`` command."""
    return start_python(project, "-m", "celery", "-A", app, *words)


def start_python(project, *words):
    """Start Python with the environment of the workers."""
    return subprocess.Popen(
        [sys.executable, *words],
        env=worker_environment(project.environment()),
        cwd=project.home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_import_of_z4j_celery_starts_agent(project, automatic):
    """With only the environment and ``import z4j_celery`` a worker reports and takes commands."""
    row = project.row(project.send("add", 1, 2), "success")
    assert (row["args"], row["result"], row["worker_name"]) == ([1, 2], 3, "w@autostart")
    assert [(row["pid"], row["role"]) for row in project.brain.agent_workers(project.slug)] == [
        (automatic.pid, "task")
    ]
    resize = project.brain.issue(
        project.slug,
        "pool-resize",
        agent_id=project.agent.agent_id,
        worker_name="w@autostart",
        delta=1,
    )
    assert resize["action"] == "pool_grow"


@pytest.mark.parametrize("start", STARTS, ids="-".join)
def test_worker_reports_however_it_is_started(project, started, start):
    """The worker has one agent, installed by the application or by ``import z4j_celery`` alone."""
    worker = started[start]
    task_id = project.send("add", 1, 2, queue=worker.queue)
    row = project.row(task_id, "success")
    assert (row["args"], row["result"], row["worker_name"]) == ([1, 2], 3, worker.name)
    assert project.kinds(task_id) == ["task.received", "task.started", "task.succeeded"]
    agents = [row for row in project.brain.agent_workers(project.slug) if row["pid"] == worker.pid]
    assert [row["role"] for row in agents] == ["task"]


def test_multi_stop_loses_no_finished_task(project, started):
    """When ``celery multi stopwait`` has returned, the brain has each task that had finished."""
    workers = [started["multi", "installed", pool] for pool in ("prefork", "gevent")]
    sent = [project.send("add", 1, 2, queue=each.queue) for each in workers for _ in range(60)]
    for task_id in (sent[0], sent[-1]):
        project.outcome(task_id)
    stop = [CELERY, "multi", "stopwait", *(each.name for each in workers)]
    stop.append(f"--pidfile={project.home}/%p.pid")
    subprocess.run(
        stop,
        env=worker_environment(project.environment()),
        cwd=project.home,
        check=True,
        timeout=60,
    )
    assert not any(each.pid_file.exists() for each in workers)
    states = {task_id: project.producer.AsyncResult(task_id).state for task_id in sent}
    known = {row["task_id"]: row["state"] for row in project.brain.tasks(project.slug)}
    finished = [task_id for task_id, state in states.items() if state == "SUCCESS"]
    assert {known.get(task_id) for task_id in finished} == {"success"}


def test_other_processes_do_not_connect(project, automatic):
    """``celery inspect``, ``status``, ``report`` and ``shell`` do not connect to the brain.

    Without ``install_agent``, neither do ``celery beat`` and a program that imports the app.
    """
    before = project.sessions()
    commands = [
        celery(project, "installed", "inspect", "ping"),
        celery(project, "installed", "status"),
        celery(project, "installed", "report"),
        celery(project, "installed", "shell", "--python"),
        celery(project, "autostart", "inspect", "ping"),
        celery(project, "autostart", "report"),
        start_python(project, "-c", "import autostart, time; time.sleep(1)"),
        start_python(project, "-c", BEAT),
    ]
    outputs = [command.communicate(timeout=60)[0] for command in commands]
    assert [command.returncode for command in commands] == [0] * len(commands), outputs
    assert "pong" in outputs[0]
    assert "beat: Starting..." in outputs[-1]
    assert "agent started" not in "".join(outputs)
    assert project.sessions() == before


def test_disabled_agent_does_not_connect(fresh_project):
    """With ``Z4J_DISABLED`` the worker runs its tasks, and the brain receives nothing."""
    worker = fresh_project.worker(pool="threads", environment={"Z4J_DISABLED": "1"})
    assert fresh_project.run("add", 1, 2) == ("SUCCESS", 3)
    assert worker.stop() == 0
    assert fresh_project.brain.agent_workers(fresh_project.slug) == []
    assert fresh_project.brain.tasks(fresh_project.slug) == []
    assert "Traceback" not in worker.output()


def test_wrong_token_logs_one_warning(fresh_project):
    """With a wrong token the worker runs normally and logs one warning that names the variable."""
    worker = fresh_project.worker(pool="threads", environment={"Z4J_TOKEN": "x" * 43})
    until(lambda: "Z4J_TOKEN" in worker.output(), "the warning", timeout=20)
    assert fresh_project.run("add", 1, 2) == ("SUCCESS", 3)
    assert worker.stop() == 0
    lines = [line for line in worker.output().splitlines() if "Z4J_TOKEN" in line]
    assert len(lines) == 1
    assert "WARNING" in lines[0]
    assert "x" * 43 not in worker.output()
    assert fresh_project.brain.agent_workers(fresh_project.slug) == []
