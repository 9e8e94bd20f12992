"""The PostgreSQL database for the brain of ``z4j-bare demo --database``."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, Self
from urllib.parse import urlsplit

from z4j_bare.demo.process import HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence


class _Connection(Protocol):
    """The methods of an asyncpg connection that this module uses."""

    async def fetch(self, statement: str) -> Sequence[Sequence[str]]: ...

    async def execute(self, statement: str) -> object: ...


#: Schemes of the addresses that the option accepts.
_SCHEMES = ("postgresql", "postgres", "postgresql+asyncpg")

_EXAMPLE = "postgresql://user:password@host:5432/name"

#: Extensions that the brain's migrations create.
_EXTENSIONS = ("citext", "pg_trgm", "pgcrypto")

#: Timeout of a connection, in seconds.
_CONNECT_TIMEOUT = 5.0

#: Timeout of a statement, in seconds.
_STATEMENT_TIMEOUT = 30.0

_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1 LIMIT 3"

_PRIVILEGES = """
SELECT has_database_privilege(current_database(), 'CREATE')
    AND has_schema_privilege('public', 'CREATE')
"""

_INSTALLED = "SELECT extname FROM pg_extension"

_AVAILABLE = "SELECT name FROM pg_available_extensions"

#: Selects the statements that drop what a brain creates: tables with their sequences and triggers,
#: functions and types. Nothing that belongs to an extension is dropped.
_DROPS = """
SELECT format('DROP TABLE IF EXISTS %s CASCADE', oid::regclass) FROM pg_class AS it
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND {own}
UNION ALL
SELECT format('DROP ROUTINE IF EXISTS %s CASCADE', oid::regprocedure) FROM pg_proc AS it
    WHERE pronamespace = 'public'::regnamespace AND {own}
UNION ALL
SELECT format('DROP TYPE IF EXISTS %s CASCADE', oid::regtype) FROM pg_type AS it
    WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd') AND {own}
""".format(own="NOT EXISTS (SELECT FROM pg_depend WHERE objid = it.oid AND deptype = 'e')")


class DemoDatabase:
    """An empty database that the user names.

    The start of a ``with`` block checks the database.
    The end of the block drops everything that the brain has created.

    :param url: the address, such as ``postgresql://user:password@host:5432/name``.
    :param keep: whether to keep the data at the end.
    :raises HarnessError: the database cannot be used. The message names the cause and the fix, but
        no password.
    """

    def __init__(self, url: str, *, keep: bool = False) -> None:
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in _SCHEMES or not urlsplit(f"//{rest}").path.strip("/"):
            raise HarnessError(f"--database is not the address of a PostgreSQL: use {_EXAMPLE}")
        if find_spec("asyncpg") is None:
            raise HarnessError("--database needs asyncpg: pip install asyncpg")
        self.brain_url = f"postgresql+asyncpg://{rest}"
        #: The address without user and password.
        self.address = rest.rpartition("@")[2].partition("?")[0]
        self._dsn = f"postgresql://{rest}"
        self._keep = keep
        self._extensions: set[str] = set()

    def __enter__(self) -> Self:
        self._run(self._check)
        return self

    def __exit__(self, *_exc_info: object) -> None:
        if not self._keep:
            self._run(self._clear)

    async def _check(self, connection: _Connection) -> None:
        tables = [row[0] for row in await connection.fetch(_TABLES)]
        if tables:
            raise HarnessError(
                f"--database: {self.address} contains tables ({', '.join(tables)}), and the demo "
                "needs an empty database: create one with createdb, and name it"
            )
        if not (await connection.fetch(_PRIVILEGES))[0][0]:
            raise HarnessError(
                f"--database: the user may not create tables in {self.address}: "
                "name a database that the user owns"
            )
        self._extensions = {row[0] for row in await connection.fetch(_INSTALLED)}
        available = {row[0] for row in await connection.fetch(_AVAILABLE)}
        if missing := [name for name in _EXTENSIONS if name not in available]:
            raise HarnessError(
                f"--database: the server of {self.address} lacks the extensions "
                f"{', '.join(missing)}: install PostgreSQL's contrib package there"
            )

    async def _clear(self, connection: _Connection) -> None:
        for row in await connection.fetch(_DROPS):
            await connection.execute(row[0])
        for row in await connection.fetch(_INSTALLED):
            if row[0] in _EXTENSIONS and row[0] not in self._extensions:
                await connection.execute(f"DROP EXTENSION IF EXISTS {row[0]} CASCADE")

    def _run(self, work: Callable[[_Connection], Coroutine[object, object, None]]) -> None:
        async def connected() -> None:
            import asyncpg

            connection = await asyncpg.connect(
                self._dsn, timeout=_CONNECT_TIMEOUT, command_timeout=_STATEMENT_TIMEOUT
            )
            try:
                await work(connection)
            finally:
                await connection.close()

        try:
            asyncio.run(connected())
        except HarnessError:
            raise
        except Exception as error:
            raise HarnessError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        import asyncpg

        if isinstance(error, asyncpg.InvalidCatalogNameError):
            return f"--database: {self.address} does not exist: create it with createdb"
        if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
            return f"--database: {self.address} refuses the user: correct user and password"
        if isinstance(error, (OSError, TimeoutError)):
            return (
                f"--database: no PostgreSQL answers at {self.address} "
                f"({str(error) or 'timeout'}): start it, or correct host and port"
            )
        if isinstance(error, asyncpg.TooManyConnectionsError):
            return f"--database: {self.address} has no free connection: raise max_connections"
        if isinstance(error, ValueError) and not isinstance(error, asyncpg.InterfaceError):
            # The error's text is not shown, because it may contain a part of the password.
            return (
                f"--database is not a valid address: use {_EXAMPLE}, and write the characters "
                "/ ? # @ : % of user and password as %2F %3F %23 %40 %3A %25"
            )
        return f"--database: {self.address}: {type(error).__name__}: {error}"
