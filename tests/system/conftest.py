"""The parts that a package index cannot install: RabbitMQ, and the distribution's PostgreSQL."""

import shutil
from pathlib import Path

import kombu.pools
import pytest

from tests.e2e.conftest import agent_credentials, brain, redis_url
from tests.support import parts, rabbitmq
from tests.support.postgres import PostgresServer

__all__ = ["agent_credentials", "brain", "redis_url"]


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory):
    """A private RabbitMQ node."""
    if rabbitmq.find_program("rabbitmq-server") is None:
        parts.missing("RabbitMQ", "apt-get install rabbitmq-server")
    with rabbitmq.RabbitNode(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node
        kombu.pools.reset()


@pytest.fixture(scope="session")
def postgres():
    """A private server with the distribution's PostgreSQL."""
    # Debian has a directory for each version, which is not on PATH.
    found = max(Path("/usr/lib/postgresql").glob("*/bin/postgres"), default=None)
    found = found or shutil.which("postgres")
    if found is None:
        parts.missing("PostgreSQL", "apt-get install postgresql")
    with PostgresServer(Path(found).parent) as server:
        yield server
