"""The broker goes away while workers of each pool run a task that needs no broker."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.support.e2e_project import E2EProject
from tests.support.toxics import BlackHole, HalfOpen, Proxy, Refused
from z4j_bare import control
from z4j_bare.demo.process import clean_environment, until
from z4j_bare.demo.redis_server import RedisServer
from z4j_bare.engines.celery.broker_health import BROKEN

pytestmark = pytest.mark.timeout(180)

#: The pool and the variables of each worker. Only ``gevent`` keeps kombu's unpatched sleep.
WORKERS = {
    "gevent": ("gevent", {}),
    "green_kombu": ("gevent", {"Z4J_GREEN_KOMBU": "1"}),
    "eventlet": ("eventlet", {}),
    "threads": ("threads", {}),
    "prefork": ("prefork", {}),
}

#: Workers in which Celery does not replace a silent connection.
NEVER_RECONNECTED = ("gevent", "green_kombu", "eventlet", "threads")

#: Ticks that a task makes in 3 s.
TICKS = 60

#: Timeout of each awaited condition, in seconds.
TIMEOUT = 40.0


class BrokerLab:
    """A private Redis behind a proxy, and a project with a worker for each of ``WORKERS``."""

    def __init__(self, brain, redis_url, home, server, proxy, stack):
        self.server = server
        self.proxy = proxy
        url = server.url()
        self._broker = {"DEMO_BROKER": url.replace(f":{server.port}/", f":{proxy.port}/")}
        self.projects = {}
        for name in WORKERS:
            directory = home / name
            directory.mkdir()
            project = E2EProject(brain.clone(), redis_url, directory, url)
            self.projects[name] = stack.enter_context(project)

    def start(self, name):
        """Start a worker, wait until it is observed, and start its task."""
        pool, variables = WORKERS[name]
        project = self.projects[name]
        project.host = project.worker(
            "ticking", pool=pool, environment={**variables, **self._broker}
        )
        project.warm_up()
        project.ticking = project.send("ticks", "all")
        project.row(project.ticking, "started")

    def in_each(self, work):
        """Call ``work(name)`` for all workers at once."""
        with ThreadPoolExecutor(len(WORKERS)) as executor:
            list(executor.map(work, WORKERS))

    def health(self, name):
        """Return the health that a worker's agent reports; empty if the hub is blocked."""
        os.environ["Z4J_HOME"] = str(self.projects[name].home / "agent")
        return next((agent.get("health", {}) for agent in control.status()), {})

    def wait_error(self, error, names=WORKERS):
        """Wait until all agents report ``error``, and none of them an old queue depth."""
        for name in names:

            def reported(name=name):
                health = self.health(name)
                if health.get("celery.broker_error") != error:
                    return None
                assert ("celery.queue_depths" in health) is (error == "")
                return health["celery.broker_connected"]

            connected = until(reported, f"{error or 'no error'} of {name}", timeout=TIMEOUT)
            assert connected == str(error == "")

    def ticks(self, name):
        """Return the number of ticks of a worker's task."""
        return (self.projects[name].home / "all.ticks").stat().st_size

    def wait_ticks(self, names):
        """Wait until the tasks of these workers have run for 3 s more."""
        before = {name: self.ticks(name) for name in names}
        for name in names:
            until(lambda name=name: self.ticks(name) >= before[name] + TICKS, name, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def lab(brain, redis_url, tmp_path_factory):
    """The workers, each of which runs a task."""
    home = tmp_path_factory.mktemp("broker")
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(home / "redis"))
        proxy = Proxy(server.port)
        stack.callback(proxy.close)
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("Z4J_HOME", str(home))
        lab = BrokerLab(brain, redis_url, home, server, proxy, stack)
        lab.in_each(lab.start)
        lab.wait_error("")
        yield lab


def test_unpatched_sleep_is_reported_with_setting(lab):
    """A gevent worker logs one warning, and ``doctor`` repeats it; other workers log none."""
    warning = "kombu.utils.functional.sleep is not patched by gevent"
    counts = {name: lab.projects[name].host.output().count(warning) for name in WORKERS}
    assert counts == {**dict.fromkeys(WORKERS, 0), "gevent": 1}
    project = lab.projects["gevent"]
    done = subprocess.run(
        [sys.executable, "-m", "z4j_bare", "doctor", "--no-websocket", "--json"],
        env={**clean_environment(), **project.environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    probes = {probe["name"]: probe for probe in json.loads(done.stdout)["probes"]}
    assert warning in probes["agents"]["message"]
    assert "Z4J_GREEN_KOMBU=1" in str(probes["agents"]["details"])


def test_stopped_broker_does_not_stop_tasks(lab):
    """While Redis is stopped, tasks continue, and the agents report the system's error.

    The exception is a gevent worker without the setting: its tasks stand still.
    """
    others = [name for name in WORKERS if name != "gevent"]
    with lab.proxy.inject(Refused()):
        lab.server.stop()
        lab.wait_error("ConnectionRefusedError", others)
        before = {name: lab.ticks(name) for name in ("gevent", "green_kombu")}
        lab.wait_ticks(others)
        made = {name: lab.ticks(name) - before[name] for name in before}
        assert made["gevent"] < made["green_kombu"] / 2
        lab.server.start()
    lab.wait_error("")
    for name, project in lab.projects.items():
        project.row(project.send("add", 1, 2), "success")
        if name != "gevent":
            output = project.host.output()
            assert output.count("the broker cannot be reached (ConnectionRefusedError)") == 1
            assert output.count("z4j: celery: the broker answers again") == 1


def test_silent_broker_is_reported(lab):
    """The agents report a network that drops all packets, and then one that drops the packets of
    old connections only; the tasks run on.
    """
    with lab.proxy.inject(BlackHole()):
        lab.wait_error("TimeoutError")
        lab.wait_ticks(WORKERS)
        with lab.proxy.inject(HalfOpen()):
            lab.wait_error(BROKEN, NEVER_RECONNECTED)
    for connection in list(lab.proxy.connections):
        connection.reset = True
    lab.wait_error("")
    for project in lab.projects.values():
        project.row(project.send("add", 1, 2), "success")
        (project.home / "all.end").touch()
        project.row(project.ticking, "success")
