"""The modules that an event and a command pass are those of docs/architecture.md, in that order."""

import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import signals
from celery.concurrency.solo import TaskPool as Solo
from z4j_celery import CeleryEngineAdapter

import z4j_bare
from tests.support.celery_fakes import memory_app, worker_consumer
from tests.support.engines import FakeEngine
from tests.support.peer import SECRET_TEXT, TOKEN
from z4j_bare import _process_singleton, install_agent
from z4j_bare.engines import manager
from z4j_bare.transport import websocket

ROOT = Path(z4j_bare.__file__).parent
PAGE = ROOT.parent / "docs" / "architecture.md"

#: Packages and modules below every path: they call functions and translate errors for all others.
GROUND = {"concurrency", "safety", "interfaces", "errors"}


class PathTrace:
    """Records the functions of the package that get one of ``markers`` in an argument.

    An instance is the profile function of a thread.
    """

    def __init__(self, *markers):
        self.markers = set(markers)
        self.steps = {}

    def __call__(self, frame, event, _arg):
        """Record a call."""
        code = frame.f_code
        if event != "call" or self._step(code) is None or self._step(code) in self.steps:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = frame.f_locals
        if any(self._contains(arguments.get(name), 4) for name in names if name != "self"):
            self._add(frame.f_back)  # the caller had it as a local variable
            self._add(frame)

    def modules(self):
        """Return the modules in the order of their first call."""
        return list(dict.fromkeys(module for module, _ in self.steps))

    def _add(self, frame):
        if frame is not None and (step := self._step(frame.f_code)) is not None:
            self.steps[step] = None

    @staticmethod
    def _step(code):
        """Return the module and the function, or ``None`` outside of the path's packages."""
        if not code.co_filename.startswith(str(ROOT)):
            return None
        module = str(Path(code.co_filename).relative_to(ROOT).with_suffix("")).replace("/", ".")
        return None if GROUND.intersection(module.split(".")) else (module, code.co_qualname)

    def _contains(self, value, depth):
        if isinstance(value, str):
            return any(marker in value for marker in self.markers)
        if isinstance(value, bytes | bytearray | memoryview):
            return any(marker.encode() in bytes(value) for marker in self.markers)
        if depth == 0:
            return False
        if isinstance(value, dict):
            return any(self._contains(each, depth - 1) for each in (*value, *value.values()))
        if isinstance(value, list | tuple):
            return any(self._contains(each, depth - 1) for each in value)
        fields = ("id", "payload", "acked_id", "parent_id")  # of frames, commands and requests
        return any(self._contains(getattr(value, name, None), depth - 1) for name in fields)


def documented(heading):
    """Return the modules in the table under ``heading``, in order."""
    section = PAGE.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| \d+ \| `([\w.]+)` \|", section, re.MULTILINE)


@pytest.fixture
def trace(mode, monkeypatch):
    """``trace(*markers)`` starts a :class:`PathTrace` in this thread and in all later ones."""
    if mode != "threads":
        pytest.skip("the store runs on a native thread, which no profile function sees")
    # A mask of zeros leaves frames readable on their way to the socket.
    monkeypatch.setattr(websocket, "os", SimpleNamespace(urandom=bytes))

    def start(*markers):
        made = PathTrace(*markers)
        threading.setprofile(made)
        sys.setprofile(made)
        return made

    yield start
    sys.setprofile(None)
    threading.setprofile(None)


@pytest.fixture
def install(peer, until):
    """``install(engine)``: a started agent that has a session with the scripted peer."""
    made = []

    def start(engine):
        options = {"token": TOKEN, "project_id": "demo", "hmac_secret": SECRET_TEXT}
        made.append(install_agent(engines=[engine], brain_url=peer.url, **options))
        until(lambda: peer.last and peer.last.frames)
        return made[-1]

    yield start
    for runtime in made:
        runtime.stop(timeout=3)
        _process_singleton.clear_runtime(expected=runtime)


def test_event_passes_documented_modules(trace, install, peer, until, monkeypatch):
    """An event passes the documented modules, at most 18, from the signal to the ack."""
    consumer = worker_consumer(Solo)
    monkeypatch.setattr(manager, "ready_worker", lambda: consumer)
    peer.acks = "none"
    path, app = trace("parent-to-trace"), memory_app()
    runtime = install(CeleryEngineAdapter(celery_app=app))
    request = SimpleNamespace(
        id="task",
        task=app.tasks["celery.backend_cleanup"],
        args=[],
        kwargs={},
        parent_id="parent-to-trace",
        root_id=None,
        delivery_info={"routing_key": "q"},
        request_dict={},
    )
    signals.task_received.send(sender=None, request=request)
    acked = {}

    def traced_batch():
        # The agent sends one frame at a time, so an earlier frame must be acknowledged first.
        for frame in peer.last.of("event_batch"):
            if "parent-to-trace" in str(frame.payload):
                return frame
            if frame.id not in acked:
                acked[frame.id] = len(frame.payload.events)
                peer.last.ack(frame)
        return None

    batch = until(traced_batch)
    until(lambda: runtime.stats()["sent"])  # the sender has entered the frame into the window
    path.markers.add(batch.id)
    peer.last.ack(batch)
    events = sum(acked.values()) + len(batch.payload.events)
    until(lambda: runtime.stats()["acked"] == events)
    assert path.modules() == documented("The path of an event")
    assert len(path.modules()) <= 18


def test_command_passes_documented_modules(trace, install, peer, until):
    """A command passes the documented modules, at most 16, from its frame to its result's frame."""
    path = trace("11112222-3333-4444-8555-666677778888")
    install(FakeEngine("cancel_task"))
    peer.last.command(
        "cancel_task",
        {"engine": "stub", "task_id": "t"},
        identity="11112222-3333-4444-8555-666677778888",
    )
    until(lambda: peer.last.of("command_result"))
    assert path.modules() == documented("The path of a command")
    assert len(path.modules()) <= 16
