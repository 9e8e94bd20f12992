"""Long-poll, and the change to it and back, with the real brain's body limit of 8 KiB."""

import datetime as dt
import socket
import threading
from contextlib import suppress
from uuid import uuid4

import pytest
from z4j_core.models import CommandResult, Event, EventKind

from z4j_bare import _process_singleton, install_agent
from z4j_bare.demo.process import until
from z4j_bare.transport import auto

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def host(project):
    """A gevent worker with forced long-poll and without an agent id in its settings."""
    worker = project.worker(pool="gevent", environment={"Z4J_TRANSPORT": "longpoll"})
    project.warm_up()
    return worker


def test_events_and_heartbeats_arrive_over_longpoll(project, host):
    """Tasks arrive complete, and heartbeats keep the agent online without any hello."""
    rows = [
        project.row(task_id, "success")
        for task_id in [project.send("add", number, 1) for number in range(60)]
    ]
    assert [row["result"] for row in rows] == list(range(1, 61))
    assert project.kinds(rows[-1]["task_id"]) == ["task.received", "task.started", "task.succeeded"]
    assert project.sessions() == {}
    until(
        lambda: project.brain.agent(project.slug, project.agent.agent_id)["state"] == "online",
        "the agent online",
        timeout=20,
    )
    assert "connected over longpoll" in host.output()


def test_event_over_body_limit_is_truncated(project, host):
    """A task whose arguments exceed the body limit has a row with a truncation mark."""
    row = project.row(
        project.send("add", 1, 2, notes=[f"{number:0100d}" for number in range(140)]), "success"
    )
    assert row["result"] == 3
    assert "bytes cut" in str((row["args"], row["kwargs"]))


def test_commands_complete_over_longpoll(project, host):
    """A retry and a cancellation are executed, and their results arrive by POST."""
    task_id = project.send("fails", "no")
    project.row(task_id, "failure")
    issued = project.brain.issue(
        project.slug,
        "retry-task",
        agent_id=project.agent.agent_id,
        engine="celery",
        task_id=task_id,
    )
    done = project.brain.wait_command(project.slug, issued["id"])
    assert (done["status"], done["error"]) == ("completed", None)
    issued = project.brain.issue(
        project.slug,
        "cancel-task",
        agent_id=project.agent.agent_id,
        engine="celery",
        task_id=uuid4().hex,
    )
    done = project.brain.wait_command(project.slug, issued["id"])
    assert (done["status"], done["error"]) == ("completed", None)


def test_sigterm_during_poll_stops_worker(project, host):
    """SIGTERM ends the worker in time during a poll, and its last events arrive."""
    task_id = project.send("add", 20, 3)
    project.outcome(task_id)
    assert host.stop() == 0
    assert project.row(task_id, "success")["result"] == 23
    assert "please report it" not in host.output()


class Proxy:
    """A proxy in front of the brain that rejects WebSocket upgrades while ``blocking``."""

    def __init__(self, brain):
        self.blocking = True
        self.rejected = 0
        self._brain = ("127.0.0.1", brain.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._socks = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()
        for sock in self._socks:
            sock.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._socks.append(sock)
                threading.Thread(target=self._forward, args=(sock,), daemon=True).start()

    def _forward(self, sock):
        with suppress(OSError), sock:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = sock.recv(65536)
                if not piece:
                    return
                head += piece
            if b"upgrade: websocket" in head.lower() and self.blocking:
                self.rejected += 1
                sock.sendall(
                    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 7\r\n"
                    b"Connection: close\r\n\r\nBlocked"
                )
                return
            inner = socket.create_connection(self._brain)
            self._socks.append(inner)
            inner.sendall(head)
            back = threading.Thread(target=_copy, args=(inner, sock), daemon=True)
            back.start()
            _copy(sock, inner)
            back.join()


def _copy(source, target):
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for sock in (source, target):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class Engine:
    name = "stub"

    def capabilities(self):
        return {"cancel_task"}

    async def cancel_task(self, task_id):
        return CommandResult(status="success", result={"cancelled": task_id})


def make_event(number):
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=f"t-{number}",
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=dt.datetime.now(dt.UTC),
        data={"task_name": "e2e.stub", "result": number},
    )


def test_agent_falls_back_to_longpoll_and_returns(brain, agent_credentials, monkeypatch):
    """Behind a blocking proxy the agent uses long-poll, later WebSocket; each event has one row."""
    monkeypatch.setattr(auto, "PROBE_DELAY_INITIAL", 2.0)
    monkeypatch.setattr(auto, "PROBE_DELAY_MAX", 2.0)
    agent = agent_credentials()
    proxy = Proxy(brain)
    runtime = install_agent(
        engines=[Engine()],
        brain_url=proxy.url,
        token=agent.token,
        project_id=agent.project,
        hmac_secret=agent.hmac_secret,
    )
    try:
        for number in range(50):
            runtime.record_event(make_event(number))
        until(lambda: runtime.stats()["acked"] == 50, "acks over long-poll", timeout=30)
        assert runtime.stats()["transport"] == "longpoll"
        assert brain.agent(agent.project, agent.agent_id)["state"] == "online"
        issued = brain.issue(
            agent.project, "cancel-task", agent_id=agent.agent_id, engine="stub", task_id="t-1"
        )
        assert brain.wait_command(agent.project, issued["id"])["status"] == "completed"
        proxy.blocking = False
        for number in range(50, 100):
            runtime.record_event(make_event(number))
        until(lambda: runtime.stats()["transport"] == "ws", "WebSocket again", timeout=60)
        for number in range(100, 150):
            runtime.record_event(make_event(number))
        until(lambda: runtime.stats()["acked"] == 150, "all acks", timeout=30)
        assert proxy.rejected >= 1
        assert len(brain.agent_workers(agent.project)) == 1
        assert sorted(row["result"] for row in brain.tasks(agent.project)) == list(range(150))
        assert {
            len(brain.events(agent.project, "stub", f"t-{number}")) for number in (0, 75, 149)
        } == {1}
    finally:
        runtime.stop()
        _process_singleton.clear_runtime(expected=runtime)
        proxy.close()
