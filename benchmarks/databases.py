"""A brain on SQLite or PostgreSQL, and queries of its tables."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.support.postgres import PostgresServer
from z4j_bare.demo.brain import Brain

DATABASES = ("sqlite", "postgresql")


@contextmanager
def running_brain(database: str, home: Path) -> Iterator[Brain]:
    """Start a brain on the database, and stop both at the end."""
    if database == "sqlite":
        with Brain(home) as brain:
            yield brain
        return
    with PostgresServer() as server, server.brain(home) as brain:
        yield brain


def query(brain: Brain, statement: str) -> list[tuple[Any, ...]]:
    """Return the rows of a statement that reads the brain's database."""
    url = brain.database_url
    if url.startswith("sqlite"):
        path = url.partition("///")[2].partition("?")[0]
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return connection.execute(statement).fetchall()
    return asyncio.run(_query(url.replace("+asyncpg", ""), statement))


async def _query(url: str, statement: str) -> list[tuple[Any, ...]]:
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()
