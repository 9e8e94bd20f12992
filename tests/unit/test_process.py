"""The role of a process, read from its command line."""

import os
import platform

import pytest

from z4j_bare import process

COMMAND_LINES = [
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


@pytest.mark.parametrize(("argv", "command"), COMMAND_LINES)
def test_celery_command_is_found_in_command_line(argv, command):
    """The sub-command is found after global options and launchers; other programs have none."""
    assert process.celery_command(argv) == command
    assert process.is_celery_worker(argv) is (command == "worker")


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "status",
        "control",
        "purge",
        "shell",
        "events",
        "flower",
        "list",
        "report",
        "call",
        "result",
        "multi",
    ],
)
def test_short_lived_command_is_inspection_command(command):
    """Short-lived celery commands and monitors are inspection commands."""
    assert process.is_inspection_command(["celery", "-A", "shop", command])


@pytest.mark.parametrize(
    "argv", [["celery", "worker"], ["celery", "beat"], ["gunicorn", "x"], ["celery"], []]
)
def test_long_lived_process_is_not_inspection_command(argv):
    """Workers, beat and other programs are not inspection commands."""
    assert not process.is_inspection_command(argv)


def test_command_line_defaults_to_own_process(monkeypatch):
    """Without an argument the command line of this process is read."""
    monkeypatch.setattr("sys.argv", ["celery", "worker"])
    assert process.is_celery_worker()
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert process.celery_command() is None


@pytest.mark.parametrize(
    ("engine", "argv"),
    [
        ("huey", ["/usr/bin/huey_consumer.py", "shop.huey"]),
        ("huey", ["manage.py", "run_huey"]),
        ("arq", ["/usr/bin/arq", "shop.Worker"]),
        ("taskiq", ["taskiq", "worker", "shop:broker"]),
    ],
)
def test_worker_of_engine_without_names_gets_local_name(engine, argv):
    """A worker program of an engine that names no workers gets a name from host and pid."""
    assert process.local_worker_name(engine, argv) == f"{engine}@{platform.node()}-{os.getpid()}"
    assert process.local_worker_name("rq", argv) is None
    assert process.local_worker_name(engine, ["gunicorn", "shop"]) is None
    assert process.local_worker_name(engine, []) is None
