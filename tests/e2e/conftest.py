"""The real peers: a shared brain, a private Redis, and projects with workers."""

import uuid
from contextlib import ExitStack

import pytest

from tests.support.e2e_project import E2EProject
from tests.support.postgres import PostgresServer
from tests.support.schedule_project import ScheduleProject
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.redis_server import RedisServer
from z4j_bare.demo.worker import Worker


@pytest.fixture(scope="session")
def brain(tmp_path_factory):
    """A running brain with an administrator's session; each test uses its own projects."""
    with Brain(tmp_path_factory.mktemp("brain")) as running:
        yield running


@pytest.fixture(scope="session")
def postgres():
    """A private PostgreSQL server."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def make_brain(request):
    """``make_brain(database, home, **environment)``: return a brain that is not started.

    The database is ``sqlite`` or ``postgresql``.
    """

    def make(database, home, **environment):
        if database == "sqlite":
            return Brain(home, environment=environment)
        return request.getfixturevalue("postgres").brain(home, **environment)

    return make


@pytest.fixture(scope="session")
def postgres_brain(postgres, tmp_path_factory):
    """A running brain on PostgreSQL, as :func:`brain` is one on SQLite."""
    with postgres.brain(tmp_path_factory.mktemp("brain")) as running:
        yield running


@pytest.fixture(scope="module")
def project(request, brain, redis_url, tmp_path_factory):
    """A project that all tests of a module share."""
    name = request.module.__name__.rpartition("test_")[2]
    with E2EProject(brain, redis_url, tmp_path_factory.mktemp(name)) as project:
        yield project


@pytest.fixture
def fresh_project(brain, redis_url, tmp_path):
    """A project for one test."""
    with E2EProject(brain, redis_url, tmp_path) as project:
        yield project


@pytest.fixture
def schedule_project(brain, redis_url, tmp_path):
    """A project for one test whose schedules an operator changes."""
    with ScheduleProject(brain, redis_url, tmp_path) as project:
        yield project


@pytest.fixture
def agent_credentials(brain):
    """``agent_credentials(name)``: create an agent in a project that the test owns."""
    project = f"p-{uuid.uuid4().hex[:12]}"
    brain.create_project(project)

    def mint(name="agent"):
        return brain.mint_agent(project, name)

    yield mint
    brain.archive_project(project)


@pytest.fixture
def worker(tmp_path):
    """``worker(app, pool=..., environment=...)``: start a ``Worker`` that ends with the test."""
    with ExitStack() as stack:

        def start(app, **options):
            log = tmp_path / f"worker-{uuid.uuid4().hex[:6]}.log"
            started = stack.enter_context(Worker(app, log=log, **options))
            started.start()
            return started

        yield start


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """The URL of a private Redis server without persistence."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url()
