"""Detection of patches, and the choice of a backend."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from z4j_bare.concurrency import CHOICES, Detection, build, choose, detect
from z4j_bare.errors import HostConfigurationError


def modules(library, *, thread, socket):
    """Return the ``sys.modules`` of a process in which ``library`` has patched these."""
    patched = {
        name
        for name, is_patched in (("thread", thread), ("threading", thread), ("socket", socket))
        if is_patched
    }
    if library == "gevent":
        return {"gevent.monkey": SimpleNamespace(is_module_patched=patched.__contains__)}
    return {"eventlet.patcher": SimpleNamespace(is_monkey_patched=patched.__contains__)}


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
@pytest.mark.parametrize(
    ("thread", "socket", "outcome"),
    [
        (True, True, None),
        (True, False, "partial"),
        (False, True, "partial"),
        (False, False, "none"),
    ],
)
def test_detect_requires_thread_and_socket_patches(library, thread, socket, outcome):
    """The outcome is the library if it has patched both, else ``partial`` or ``none``."""
    assert detect(modules(library, thread=thread, socket=socket)).outcome == (outcome or library)


def test_detect_imports_nothing():
    """A process that has loaded neither library is not patched. Detection imports nothing."""
    before = set(sys.modules)
    assert detect({}) == Detection()
    assert detect({"gevent": object(), "eventlet": object()}).outcome == "none"
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("setting", "found", "chosen"),
    [
        ("auto", Detection(), "threads"),
        ("auto", Detection("gevent", True, True), "gevent"),
        ("auto", Detection("eventlet", True, True), "eventlet"),
        ("auto", Detection("gevent", False, True), "threads"),
        ("threads", Detection(), "threads"),
        ("threads", Detection("gevent", False, True), "threads"),
        ("gevent", Detection("gevent", True, True), "gevent"),
        ("gevent", Detection("gevent", False, True), "gevent"),
        ("eventlet", Detection("eventlet", True, True), "eventlet"),
    ],
)
def test_choose_follows_patches_or_setting(setting, found, chosen):
    """``auto`` follows the patches; another setting is used where it can work."""
    assert choose(setting, found) == chosen


@pytest.mark.parametrize(
    ("setting", "found", "reason"),
    [
        ("auto", Detection("gevent", True, False), "but not sockets"),
        ("auto", Detection("eventlet", True, False), "but not sockets"),
        ("threads", Detection("gevent", True, True), "gevent has patched threads"),
        ("threads", Detection("eventlet", True, True), "eventlet has patched threads"),
        ("gevent", Detection(), "has not patched"),
        ("gevent", Detection("eventlet", True, True), "has not patched"),
        ("eventlet", Detection("gevent", True, True), "has not patched"),
        ("eventlet", Detection(), "has not patched"),
        ("twisted", Detection(), "is not one of auto, threads, gevent, eventlet"),
        ("", Detection(), "is not one of"),
    ],
)
def test_choose_rejects_setting_that_cannot_work(setting, found, reason):
    """The error names the setting and the reason."""
    with pytest.raises(HostConfigurationError, match="Z4J_CONCURRENCY") as caught:
        choose(setting, found)
    assert reason in str(caught.value)


def test_choices_can_be_built():
    """The error lists the backends that can be built, and ``auto``."""
    assert CHOICES == ("auto", "threads", "gevent", "eventlet")
    assert build("threads").name == "threads"


PATCHED_PROCESS = """
import json, sys, warnings
warnings.simplefilter("ignore")
{patch}
from z4j_bare.concurrency import choose, detect
found = detect()
def attempt(setting):
    try:
        return choose(setting, found)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
print(json.dumps([found.outcome, found.library, attempt("auto"), attempt("threads")]))
"""


@pytest.mark.parametrize(
    ("patch", "outcome", "library", "auto"),
    [
        ("", "none", "", "threads"),
        ("import gevent, eventlet", "none", "", "threads"),
        ("from gevent import monkey; monkey.patch_all()", "gevent", "gevent", "gevent"),
        (
            "from gevent import monkey; monkey.patch_all(thread=False)",
            "partial",
            "gevent",
            "threads",
        ),
        (
            "from gevent import monkey; monkey.patch_all(socket=False)",
            "partial",
            "gevent",
            "HostConfigurationError",
        ),
        ("import eventlet; eventlet.monkey_patch()", "eventlet", "eventlet", "eventlet"),
        ("import eventlet; eventlet.monkey_patch(thread=False)", "partial", "eventlet", "threads"),
        (
            "import eventlet; eventlet.monkey_patch(socket=False)",
            "partial",
            "eventlet",
            "HostConfigurationError",
        ),
    ],
)
def test_detect_in_patched_processes(mode, patch, outcome, library, auto):
    """Full and partial patches of the real libraries, each in a new process."""
    if mode != "threads":
        pytest.skip("the subprocesses are the same in every mode")
    done = subprocess.run(
        [sys.executable, "-c", PATCHED_PROCESS.format(patch=patch)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found[:2] == [outcome, library]
    assert found[2].startswith(auto)
    if auto == "HostConfigurationError":
        assert f"{library} has patched threads but not sockets" in found[2]
        assert "Z4J_CONCURRENCY" in found[2]


AGENT_PROCESS = """
import sys, warnings
warnings.simplefilter("ignore")
{patch}
from tests.support.engines import FakeEngine
from tests.support.peer import Peer, SECRET_TEXT, TOKEN
import threading
from z4j_bare import AgentRuntime
from z4j_bare.concurrency import build
from z4j_bare.framework import BareFrameworkAdapter
from z4j_core.config import resolve_agent_config
import time
peer = Peer(build("threads"))
config = resolve_agent_config(
    framework_name="bare",
    explicit_kwargs=dict(
        brain_url=peer.url, token=TOKEN, project_id="p", hmac_secret=SECRET_TEXT
    ),
)
framework = BareFrameworkAdapter(config)
runtime = AgentRuntime(config=config, framework=framework, engines=[FakeEngine()])
runtime.start()
deadline = time.monotonic() + 20
while not peer.frames("heartbeat") and time.monotonic() < deadline:
    time.sleep(0.02)
print(len(peer.frames("heartbeat")), runtime.stats()["concurrency"], runtime.stats()["restarts"])
runtime.stop()
peer.stop()
"""


@pytest.mark.parametrize(
    "patch",
    [
        "from gevent import monkey; monkey.patch_all(thread=False)",
        "import eventlet; eventlet.monkey_patch(thread=False)",
    ],
)
def test_threads_backend_works_on_patched_sockets(mode, patch):
    """An agent in real threads gets a session and a heartbeat through patched sockets."""
    if mode != "threads":
        pytest.skip("the subprocesses are the same in every mode")
    done = subprocess.run(
        [sys.executable, "-c", AGENT_PROCESS.format(patch=patch)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["1", "threads", "{}"]), done.stderr


def test_choose_refuses_an_interpreter_without_gil(monkeypatch):
    """On a free-threaded build without the GIL the error names the cause and PYTHON_GIL."""
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(HostConfigurationError, match=r"without the GIL.*PYTHON_GIL=1"):
        choose("auto", Detection())
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True)
    assert choose("auto", Detection()) == "threads"
