"""Everything that a network and a brain can do to an agent, in all three modes at once: nothing is lost, nothing doubled."""

from contextlib import ExitStack, contextmanager

import pytest

from tests.support.e2e_host import start_hosts
from tests.support.e2e_project import E2EProject
from tests.support.toxics import (
    Bandwidth,
    BlackHole,
    Garbage,
    HalfOpen,
    Latency,
    Proxy,
    Refused,
    Reset,
    TimeSlice,
)
from z4j_bare.demo.brain import Brain

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

#: What a session outlives, and what it does not.
SLOW = {
    "latency": lambda: Latency(0.15),
    "bandwidth": lambda: Bandwidth(20_000),
    "slicing": TimeSlice,
}
BROKEN = {
    "half-open": HalfOpen,
    "reset": Reset,
    "black-hole": BlackHole,
    "garbage-down": lambda: Garbage(down=True),
    "garbage-up": lambda: Garbage(down=False),
    "refused": Refused,
}


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """A brain of this module's own, because it is killed."""
    with Brain(tmp_path_factory.mktemp("brain")) as running:
        yield running


@pytest.fixture(scope="class")
def patient(brain, tmp_path_factory):
    """Hosts of both transports that wait as long as they do for users."""
    with start_hosts(brain, tmp_path_factory, ("auto", "longpoll")) as hosts:
        yield hosts


@pytest.fixture(scope="class")
def hurried(brain, tmp_path_factory):
    """Hosts of both transports that give up within seconds."""
    with start_hosts(brain, tmp_path_factory, ("auto", "longpoll"), HURRY="1") as hosts:
        yield hosts


@contextmanager
def everywhere(hosts, toxic):
    """Poison all their proxies."""
    with ExitStack() as stack:
        for host in hosts:
            host.toxic = stack.enter_context(host.proxy.poisoned(toxic()))
        yield


def all_told(hosts, brain, lot):
    """Wait for the acks of everything, and look at what the brain has of the lot: each event once."""
    for host in hosts:
        host.settle()
        assert host.delivered(brain, lot), host.title
        assert host.ask("stats")["restarts"] == {}
        assert "please report" not in host.output()


class TestSlow:
    """Trouble that a session outlives."""

    @pytest.mark.parametrize("toxic", SLOW)
    def test_a_slow_network_only_slows(self, brain, patient, toxic):
        """Over a line that is merely bad everything arrives while it is, once; WebSocket sessions are not given up for it."""
        before = {
            host: host.ask("stats")["sessions"] for host in patient if host.name.endswith("auto")
        }
        with everywhere(patient, SLOW[toxic]):
            for host in patient:
                host.produce(toxic, 60, 1.0)
            all_told(patient, brain, toxic)
            assert all(host.toxic.hits for host in patient)
        assert {host: host.ask("stats")["sessions"] for host in before} == before


class TestBroken:
    """Trouble that no session outlives."""

    @pytest.mark.parametrize("toxic", BROKEN)
    def test_a_broken_network_loses_nothing(self, brain, hurried, toxic):
        """Events recorded before, during and after the trouble arrive once each, though no session outlives it."""
        before = {host: host.ask("stats")["sessions"] for host in hurried}
        for host in hurried:
            host.produce(toxic, 20, 0.5)
        with everywhere(hurried, BROKEN[toxic]):
            for host in hurried:
                host.produce(toxic, 40, 1.0)
            for host in hurried:
                host.until(
                    lambda stats, host=host: (
                        host.toxic.hits
                        and (stats["last_error"] or stats["sessions"] > before[host])
                    ),
                    "trouble",
                )
        for host in hurried:
            host.produce(toxic, 20, 0.2)
        all_told(hurried, brain, toxic)

    @pytest.mark.parametrize("end", ["stop", "kill"])
    def test_a_brain_that_restarts_under_load(self, brain, hurried, end):
        """The brain ends by SIGTERM or SIGKILL in the middle of a stream, comes back, and has every event once."""
        for host in hurried:
            host.produce(end, 100, 8.0)
        for host in hurried:
            host.until(lambda stats: stats["busy"] and stats["acked"], "acks")
        if end == "stop":
            brain.stop(timeout=5)
        else:
            brain.kill()
        for host in hurried:
            host.until(lambda stats: stats["last_error"], "a broken line")
        brain.start()
        all_told(hurried, brain, end)


@pytest.mark.parametrize("pool", ["gevent"])
def test_a_worker_on_a_bad_network(brain, redis_url, tmp_path, pool):
    """A Celery worker whose line is torn, silenced and refused under load runs every task, and the brain has each one."""
    proxy = Proxy(brain.port)
    with E2EProject(brain, redis_url, tmp_path) as project:
        worker = project.worker(pool=pool, environment={"Z4J_BRAIN_URL": proxy.url})
        project.warm_up()
        sent = []
        for toxic in (Reset, BlackHole, Refused):
            with proxy.poisoned(toxic()):
                sent += [project.send("add", number, 1) for number in range(40)]
                assert [project.outcome(task_id)[0] for task_id in sent] == ["SUCCESS"] * len(sent)
        assert {project.row(task_id, "success")["result"] for task_id in sent} == set(range(1, 41))
        assert {tuple(project.kinds(task_id)) for task_id in sent[::10]} == {
            ("task.received", "task.started", "task.succeeded")
        }
        assert worker.stop() == 0
        assert "please report" not in worker.output()
    proxy.close()
