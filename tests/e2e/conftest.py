"""The real peers: one brain for the whole session, workers and Redis as a test asks for them."""

import shutil
import subprocess
import uuid
from contextlib import ExitStack

import pytest
from redis import Redis, RedisError

from z4j_bare.demo.brain import Brain, free_port
from z4j_bare.demo.process import until
from z4j_bare.demo.worker import Worker


@pytest.fixture(scope="session")
def brain(tmp_path_factory):
    """A running brain, logged in; tests share it, so each works in projects of its own."""
    with Brain(tmp_path_factory.mktemp("brain")) as running:
        yield running


@pytest.fixture
def agent_credentials(brain):
    """``agent_credentials(name)``: mint an agent; all agents of one test share a new project."""
    project = f"p-{uuid.uuid4().hex[:12]}"
    brain.create_project(project)

    def mint(name="agent"):
        return brain.mint_agent(project, name)

    yield mint
    brain.archive_project(project)


@pytest.fixture
def worker(tmp_path):
    """``worker(app, pool=..., environment=...)``: start a worker, as ``Worker`` takes it; it ends with the test."""
    with ExitStack() as started:

        def start(app, **how):
            log = tmp_path / f"worker-{uuid.uuid4().hex[:6]}.log"
            one = started.enter_context(Worker(app, log=log, **how))
            one.start()
            return one

        yield start


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """The address of a private Redis that keeps nothing."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.fail(
            "these tests need redis-server on the PATH (Debian: apt-get install redis-server)"
        )
    port = free_port()
    command = [
        server,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    with (tmp_path_factory.mktemp("redis") / "redis.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"redis://127.0.0.1:{port}/0"
        until(lambda: _answers(url), "an answer of Redis", timeout=10)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url):
    with Redis.from_url(url) as client:
        try:
            return client.ping()
        except RedisError:
            return False
