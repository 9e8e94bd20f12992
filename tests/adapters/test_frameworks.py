"""Django, Flask and FastAPI under their servers: the agent in a web process, on a Celery app that it sends tasks to."""

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
    """A site under a server.

    :param package: the server's.
    :param command: console script and words, with ``{port}``.
    :param agents: how many processes have an agent: a preloaded application has one in the master, too.
    :param stop_signal: the signal that ends it; ``SIGINT`` goes to the whole group, as a terminal's Ctrl-C does.
    :param code: its exit code then; uvicorn sends itself the signal again once it is done.
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
    """The server, running, with a session of every agent in it."""
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
    try:
        return requests.get(url, timeout=5) is not None
    except requests.ConnectionError:
        return False


def get(project, path):
    answer = requests.get(f"{project.url}/{path}", timeout=20)
    answer.raise_for_status()
    return answer.json()


def test_events_reach_the_brain(server, project, prove):
    """A task that a request runs itself has a row with name, state and result."""
    row = project.row(get(project, "add/1/2")["id"], "success")
    assert (row["name"], row["result"]) == ("add", 3)
    prove(server.row, "events", "started, succeeded")


def test_a_submitted_task_is_in_the_queue(server, project, prove):
    """What an operator submits is in the broker's queue, with its arguments."""
    row = project.submit("add", 30, 12)
    assert row["status"] == "completed", row["error"]
    with Redis.from_url(project.redis_url) as broker:
        (message,) = [json.loads(each) for each in broker.lrange("celery", 0, -1)]
    assert (message["headers"]["id"], message["headers"]["argsrepr"]) == (
        row["result"]["task_id"],
        "(30, 12)",
    )
    prove(server.row, "command", "`submit_task`")


def test_no_loop_but_the_server_s_own_shows(server, project, prove):
    """A request that looks for a second sees no running loop, or only the one that it runs on, which is not held up."""
    get(project, "look")
    project.assert_no_loop_seen()
    prove(server.row, "loop visible to tasks", "never")


def test_a_stop_loses_nothing(server, project, prove):
    """Ended right after its last task, the server leaves as it does without an agent, and its tasks are in the brain or, while that is busy, on disk."""
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
