"""Django, Flask and FastAPI under their servers, with the agent in the web process."""

import json
import os
import signal
from dataclasses import dataclass

import pytest
import requests
from redis import Redis

from tests.support.adapter_hosts import AdapterProject
from z4j_bare.demo.brain import free_port
from z4j_bare.demo.process import until

pytestmark = [pytest.mark.timeout(180), pytest.mark.long]

GUNICORN = ("gunicorn", "-w", "1", "--threads", "4", "-b", "127.0.0.1:{port}", "-k")


@dataclass(frozen=True)
class Server:
    """A framework's site under a server.

    :param package: the server's distribution.
    :param command: console script and arguments, with ``{port}``.
    :param agents: number of processes with an agent; a preloaded application has one in the master.
    :param stop_signal: the signal that stops the server; ``SIGINT`` is sent to its process group.
    :param code: the exit code; uvicorn sends the signal to itself again after its shutdown.
    """

    framework: str
    title: str
    package: str
    command: tuple[str, ...]
    agents: int = 1
    stop_signal: int = signal.SIGTERM
    code: int = 0

    @property
    def row(self):
        return f"z4j-{self.framework}", self.title, self.package


SERVERS = [
    Server(
        "django",
        "runserver with autoreload",
        "django",
        ("django-admin", "runserver", "{port}"),
        stop_signal=signal.SIGINT,
    ),
    Server(
        "django",
        "gunicorn gevent, preloaded, `post_fork()`",
        "gunicorn",
        (*GUNICORN, "gevent", "-c", "python:gunicorn_gevent_conf", "django_wsgi"),
        agents=2,
    ),
    Server(
        "django",
        "gunicorn gthread, preloaded, `post_fork()`",
        "gunicorn",
        (*GUNICORN, "gthread", "-c", "python:gunicorn_conf", "django_wsgi"),
        agents=2,
    ),
    Server("flask", "gunicorn gthread", "gunicorn", (*GUNICORN, "gthread", "flask_app:app")),
    Server(
        "fastapi",
        "uvicorn",
        "uvicorn",
        ("uvicorn", "fastapi_app:app", "--port", "{port}"),
        code=-signal.SIGTERM,
    ),
]


@pytest.fixture(
    scope="module",
    params=SERVERS,
    ids=lambda server: "-".join([server.framework, *server.title.split()[:2]]).strip(","),
)
def server(request):
    return request.param


@pytest.fixture(scope="module")
def project(server, brain, redis_url, tmp_path_factory):
    """A project with the running server and a session of each agent."""
    with AdapterProject(
        brain, redis_url, tmp_path_factory.mktemp(server.framework), "", "celery"
    ) as here:
        port = free_port()
        here.url = f"http://127.0.0.1:{port}"
        words = [word.format(port=port) for word in server.command]
        here.host = here.start(*words, processes=server.agents, DJANGO_SETTINGS_MODULE="django_app")
        until(lambda: is_up(here.url), "the server", timeout=20)
        yield here


def is_up(url):
    """Whether the server responds."""
    try:
        return requests.get(url, timeout=5) is not None
    except requests.ConnectionError:
        return False


def get(project, path):
    answer = requests.get(f"{project.url}/{path}", timeout=20)
    answer.raise_for_status()
    return answer.json()


def test_task_of_request_has_row(server, project, prove):
    """A task that a request runs has a row with name, state and result."""
    row = project.row(get(project, "add/1/2")["id"], "success")
    assert (row["name"], row["result"]) == ("add", 3)
    prove(server.row, "events", "started, succeeded")


def test_submitted_task_is_enqueued(server, project, prove):
    """A task that an operator submits is in the broker's queue with its arguments."""
    row = project.submit("add", 30, 12)
    assert row["status"] == "completed", row["error"]
    with Redis.from_url(project.redis_url) as broker:
        (message,) = [json.loads(each) for each in broker.lrange("celery", 0, -1)]
    assert (message["headers"]["id"], message["headers"]["argsrepr"]) == (
        row["result"]["task_id"],
        "(30, 12)",
    )
    prove(server.row, "command", "`submit_task`")


def test_request_sees_no_foreign_loop(server, project, prove):
    """A request sees no running loop but its own, and its own one is not blocked."""
    get(project, "check_loop")
    project.assert_no_loop_seen()
    prove(server.row, "loop visible to tasks", "never")


def test_stop_of_server_loses_no_task(server, project, prove):
    """A server that is stopped exits as usual; its last tasks are in the brain or in the buffer."""
    last = [get(project, f"add/{number}/1")["id"] for number in range(10)]
    if server.stop_signal == signal.SIGINT:
        os.killpg(project.host.pid, server.stop_signal)
    else:
        os.kill(project.host.pid, server.stop_signal)
    until(lambda: not project.host.running, "the server's end", timeout=30)
    assert project.host.exit_code == server.code
    assert project.count_succeeded(last) + project.count_buffered() >= len(last)
    prove(
        server.row,
        "clean stop",
        f"{signal.Signals(server.stop_signal).name}, exit code {server.code}, nothing lost",
    )
