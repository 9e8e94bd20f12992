"""The brain and the Redis server that the commands of the pages use."""

import pytest

from tests.support.page_shell import PageShell, make_programs
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.redis_server import RedisServer

#: The broker's address in the pages.
REDIS = "redis://localhost/0"


@pytest.fixture(scope="session")
def brain(tmp_path_factory):
    """A running brain with an administrator's session."""
    with Brain(tmp_path_factory.mktemp("brain")) as running:
        yield running


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """The URL of a private Redis server."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url()


@pytest.fixture(scope="session")
def open_shell(brain, redis_url, tmp_path_factory):
    """``open_shell(name)``: a shell that has its own project, agent and Redis database."""
    programs = make_programs(tmp_path_factory.mktemp("programs") / "bin")
    opened = []

    def open_(name):
        project = f"shop-{name}"
        opened.append(project)
        brain.create_project(project)
        variables = brain.mint_agent(project, name).env(tmp_path_factory.mktemp("home") / "z4j")
        database = f"{redis_url.rpartition('/')[0]}/{len(opened)}"
        return PageShell(tmp_path_factory.mktemp(name), programs, variables, {REDIS: database})

    return open_
