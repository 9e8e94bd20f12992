"""What kind of process this is, read from its command line."""

import os
import platform

import pytest

from z4j_bare import process as hosting

TABLE = [
    (["celery", "-A", "shop", "worker", "-P", "gevent"], "worker"),
    (["/usr/local/bin/celery", "--app=shop", "worker"], "worker"),
    (["celery", "-Ashop", "worker"], "worker"),
    (
        ["celery", "--app", "shop", "-b", "redis://x", "--workdir", "/srv", "worker", "-c", "100"],
        "worker",
    ),
    (["celery", "--config", "worker", "inspect", "ping"], "inspect"),
    (["celery", "--no-color", "--quiet", "inspect", "active"], "inspect"),
    (["celery", "worker", "-A", "shop"], "worker"),
    (["C:/venv/Scripts/celery.exe", "worker"], "worker"),
    (["/venv/lib/python3.11/site-packages/celery/__main__.py", "-A", "shop", "worker"], "worker"),
    (["python", "-m", "celery", "-A", "shop", "worker"], "worker"),
    (["uv", "run", "celery", "-A", "shop", "beat"], "beat"),
    (["celery", "-A", "shop", "control", "shutdown"], "control"),
    (["celery", "multi", "start", "w1"], "multi"),
    (["celery", "--version"], ""),
    (["celery"], ""),
    (["celery", "-A"], ""),
    (["manage.py", "runserver"], None),
    (["gunicorn", "shop.wsgi"], None),
    (["/srv/celery_tools/run.py", "worker"], None),
    (["/srv/celery/manage.py", "worker"], None),
    (["myceleryapp", "worker"], None),
    ([""], None),
    ([], None),
]


@pytest.mark.parametrize(("argv", "command"), TABLE)
def test_commands(argv, command):
    """The sub-command is found behind global options and launchers; other processes are none of Celery's."""
    assert hosting.celery_command(argv) == command
    assert hosting.is_celery_worker(argv) is (command == "worker")


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "status",
        "control",
        "purge",
        "shell",
        "events",
        "list",
        "report",
        "call",
        "result",
        "multi",
    ],
)
def test_visitors(command):
    """Commands that come and go are visitors."""
    assert hosting.is_inspection_command(["celery", "-A", "shop", command])


@pytest.mark.parametrize(
    "argv", [["celery", "worker"], ["celery", "beat"], ["gunicorn", "x"], ["celery"], []]
)
def test_residents(argv):
    """Workers, beat and other programs are no visitors."""
    assert not hosting.is_inspection_command(argv)


def test_the_own_command_line_is_the_default(monkeypatch):
    """Without an argument this process's own command line is read."""
    monkeypatch.setattr("sys.argv", ["celery", "worker"])
    assert hosting.is_celery_worker()
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert hosting.celery_command() is None


@pytest.mark.parametrize(
    ("engine", "argv"),
    [
        ("huey", ["/usr/bin/huey_consumer.py", "shop.huey"]),
        ("huey", ["manage.py", "run_huey"]),
        ("arq", ["/usr/bin/arq", "shop.Worker"]),
        ("taskiq", ["taskiq", "worker", "shop:broker"]),
    ],
)
def test_workers_without_a_name(engine, argv):
    """The worker of an engine that names none is known by its program, and gets a name of its own."""
    assert hosting.local_worker_name(engine, argv) == f"{engine}@{platform.node()}-{os.getpid()}"
    assert hosting.local_worker_name("rq", argv) is None
    assert hosting.local_worker_name(engine, ["gunicorn", "shop"]) is None
    assert hosting.local_worker_name(engine, []) is None
