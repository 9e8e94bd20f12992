"""Failures of the network and of the brain, in all modes: every event arrives exactly once."""

from contextlib import ExitStack, contextmanager

import pytest

from tests.support.e2e_host import start_hosts
from tests.support.toxics import (
    Bandwidth,
    BlackHole,
    Fragmentation,
    Garbage,
    HalfOpen,
    Latency,
    Proxy,
    Refused,
    Reset,
)
from z4j_bare.demo.brain import Brain

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

#: Problems that a session survives.
SLOW = {
    "latency": lambda: Latency(seconds=0.15),
    "bandwidth": lambda: Bandwidth(20_000),
    "slicing": Fragmentation,
}

#: Problems that end a session.
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
    """A brain that only this module uses, because it is killed."""
    with Brain(tmp_path_factory.mktemp("brain")) as running:
        yield running


@pytest.fixture(scope="class")
def default_hosts(brain, tmp_path_factory):
    """Hosts of both transports with the default timeouts."""
    with start_hosts(brain, tmp_path_factory, ("auto", "longpoll")) as hosts:
        yield hosts


@pytest.fixture(scope="class")
def fast_hosts(brain, tmp_path_factory):
    """Hosts of both transports with timeouts of a few seconds."""
    with start_hosts(brain, tmp_path_factory, ("auto", "longpoll"), FAST_TIMEOUTS="1") as hosts:
        yield hosts


@contextmanager
def toxic_on_all(hosts, toxic):
    """Activate a toxic in the proxies of all hosts."""
    with ExitStack() as stack:
        for host in hosts:
            host.toxic = stack.enter_context(host.proxy.inject(toxic()))
        yield


def assert_delivered(hosts, brain, batch):
    """Wait until all events are acknowledged, and assert that each is in the brain once."""
    for host in hosts:
        host.wait_acked()
        assert host.delivered(brain, batch), host.title
        assert host.request("stats")["restarts"] == {}
        assert "please report" not in host.output()


class TestSlow:
    """Problems that a session survives."""

    @pytest.mark.parametrize("toxic", SLOW)
    def test_slow_network_keeps_session(self, brain, default_hosts, toxic):
        """Over a slow connection each event arrives once, and WebSocket sessions are kept."""
        before = {
            host: host.request("stats")["sessions"]
            for host in default_hosts
            if host.name.endswith("auto")
        }
        with toxic_on_all(default_hosts, SLOW[toxic]):
            for host in default_hosts:
                host.produce(toxic, 60, 1.0)
            assert_delivered(default_hosts, brain, toxic)
            assert all(host.toxic.hits for host in default_hosts)
        assert {host: host.request("stats")["sessions"] for host in before} == before


class TestBroken:
    """Problems that end a session."""

    @pytest.mark.parametrize("toxic", BROKEN)
    def test_broken_network_loses_no_event(self, brain, fast_hosts, toxic):
        """Events recorded before, during and after the problem arrive exactly once."""
        before = {host: host.request("stats")["sessions"] for host in fast_hosts}
        for host in fast_hosts:
            host.produce(toxic, 20, 0.5)
            host.until(lambda stats: stats["session_id"], "a session that the problem ends")
        with toxic_on_all(fast_hosts, BROKEN[toxic]):
            for host in fast_hosts:
                host.produce(toxic, 40, 1.0)
            for host in fast_hosts:
                host.until(
                    lambda stats, host=host: (
                        host.toxic.hits
                        and (stats["last_error"] or stats["sessions"] > before[host])
                    ),
                    "an error",
                )
        for host in fast_hosts:
            host.produce(toxic, 20, 0.2)
        assert_delivered(fast_hosts, brain, toxic)

    @pytest.mark.parametrize("end", ["stop", "kill"])
    def test_restart_of_brain_under_load_loses_no_event(self, brain, fast_hosts, end):
        """If the brain is stopped or killed under load, each event still arrives exactly once."""
        for host in fast_hosts:
            host.produce(end, 100, 8.0)
        for host in fast_hosts:
            host.until(lambda stats: stats["busy"] and stats["acked"], "acks")
        if end == "stop":
            brain.stop(timeout=5)
        else:
            brain.kill()
        for host in fast_hosts:
            host.until(lambda stats: stats["last_error"], "a broken connection")
        brain.start()
        assert_delivered(fast_hosts, brain, end)


@pytest.mark.parametrize("pool", ["gevent"])
def test_worker_on_broken_network_reports_every_task(brain, fresh_project, pool):
    """A worker whose connection fails under load runs every task, and the brain has each once."""
    project = fresh_project
    proxy = Proxy(brain.port)
    worker = project.worker(pool=pool, environment={"Z4J_BRAIN_URL": proxy.url})
    project.warm_up()
    sent = []
    for toxic in (Reset, BlackHole, Refused):
        with proxy.inject(toxic()):
            sent += [project.send("add", number, 1) for number in range(40)]
            assert [project.outcome(task_id)[0] for task_id in sent] == ["SUCCESS"] * len(sent)
    assert {project.row(task_id, "success")["result"] for task_id in sent} == set(range(1, 41))
    assert {tuple(project.kinds(task_id)) for task_id in sent[::10]} == {
        ("task.received", "task.started", "task.succeeded")
    }
    assert worker.stop() == 0
    assert "please report" not in worker.output()
    proxy.close()
