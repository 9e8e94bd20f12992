"""A client of the brain's REST API, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from z4j_bare.demo.process import HarnessError, until

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]

#: Final states of a command.
FINISHED_COMMAND = frozenset({"completed", "failed", "timeout", "cancelled"})

#: Rows per page of a list. The brain allows at most this number.
_PAGE_SIZE = 500

#: Timeout of a request, in seconds.
_TIMEOUT = 30.0

#: HTTP status of the brain's response if a command is issued for an agent without a session.
_AGENT_OFFLINE = 503

#: A GET that fails without a response is repeated once. The server closes a connection after 5 idle
#: seconds, possibly just when this client sends the next request.
_RETRY = Retry(1, connect=0, status=0, other=0, allowed_methods=("GET",))


class BrainRefusedError(HarnessError):
    """The brain returned an error; ``status`` is the HTTP status and ``body`` the response text."""

    def __init__(self, call: str, status: int, body: str) -> None:
        super().__init__(f"the brain returned status {status} for {call}: {body[:300]}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Credentials:
    """The credentials of an agent; the brain returns the token only when it creates the agent."""

    brain_url: str
    project: str
    agent_id: str
    token: str = field(repr=False)
    hmac_secret: str = field(repr=False)

    def env(self, home: Path) -> dict[str, str]:
        """Return the ``Z4J_*`` variables of an agent whose state directory is ``home``.

        The directory is created with mode 0700.
        """
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        return {
            "Z4J_BRAIN_URL": self.brain_url,
            "Z4J_TOKEN": self.token,
            "Z4J_PROJECT_ID": self.project,
            "Z4J_HMAC_SECRET": self.hmac_secret,
            "Z4J_HOME": str(home),
        }


class BrainApi:
    """A REST session for one thread. :meth:`clone` returns a session for another thread.

    Methods raise ``BrainRefusedError`` for a status of 400 or more, and
    ``requests.RequestException`` if there is no response. ``project`` is always the project's slug.
    Timestamps in rows are UTC. If the brain uses SQLite, the timestamps have no UTC offset.

    :param url: the brain's URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False  # Ignore proxy variables for loopback.
        self._session.mount("http://", HTTPAdapter(max_retries=_RETRY))

    def login(self, email: str, password: str) -> None:
        """Log in; the brain allows 20 logins per minute."""
        self.post("/auth/login", email=email, password=password)

    def close(self) -> None:
        """Close the connections. The next call opens a new connection with the same login."""
        self._session.close()

    def clone(self) -> BrainApi:
        """Return another session with the same login, for another thread."""
        other = BrainApi(self.url)
        other._session.cookies.update(self._session.cookies)
        return other

    def healthy(self) -> bool:
        """Whether the brain's health check succeeds."""
        try:
            return self._session.get(f"{self.url}/api/v1/health", timeout=2).ok
        except requests.RequestException:
            return False

    def create_project(self, project: str) -> Row:
        """Create a project; its slug has 3 to 50 characters of ``a-z0-9-``."""
        return self._row(self.post("/projects", slug=project, name=project))

    def archive_project(self, project: str) -> None:
        """Archive a project. The brain closes the sessions of its agents with code 4003."""
        self._call("DELETE", f"/projects/{project}")

    def mint_agent(self, project: str, name: str) -> Credentials:
        """Create an agent and return its credentials."""
        minted = self.post(f"/projects/{project}/agents", name=name)
        return Credentials(
            self.url, project, minted["agent"]["id"], minted["token"], minted["hmac_secret"]
        )

    def revoke_agent(self, project: str, agent_id: str) -> None:
        """Revoke an agent's token.

        The brain closes open sessions with code 4003, and new sessions with code 4401.
        """
        self._call("DELETE", f"/projects/{project}/agents/{agent_id}")

    def agents(self, project: str) -> list[Row]:
        """Return the project's agents with their states, capabilities and versions."""
        return self._rows(self.get(f"/projects/{project}/agents"))

    def agent(self, project: str, agent_id: str) -> Row:
        """Return one agent. Raises ``HarnessError`` if the brain does not list the agent."""
        for row in self.agents(project):
            if row["id"] == agent_id:
                return row
        raise HarnessError(f"the brain lists no agent {agent_id} in {project}")

    def agent_workers(self, project: str) -> list[Row]:
        """Return one row for each worker id with which a process has connected."""
        return self._rows(self.get(f"/projects/{project}/agent-workers"))

    def workers(self, project: str) -> list[Row]:
        """Return the workers that are named in the stored events."""
        return self._rows(self.get(f"/projects/{project}/workers"))

    def queues(self, project: str) -> list[Row]:
        """Return the queues that are named in the stored events."""
        return self._rows(self.get(f"/projects/{project}/queues"))

    def stats(self, project: str) -> Row:
        """Return the dashboard's totals: tasks by state, queue depths, agents and workers."""
        return self._row(self.get(f"/projects/{project}/stats"))

    def tasks(self, project: str, **filters: Any) -> list[Row]:
        """Return the tasks that match the filters.

        Filters are ``state``, ``name``, ``queue``, ``worker``, ``since`` and others.
        """
        return self._pages(f"/projects/{project}/tasks", **filters)

    def task(self, project: str, engine: str, task_id: str) -> Row | None:
        """Return one task; ``None`` if the brain has no row for the task."""
        try:
            return self._row(self.get(f"/projects/{project}/tasks/{engine}/{task_id}"))
        except BrainRefusedError as exc:
            if exc.status == requests.codes.not_found:
                return None
            raise

    def events(self, project: str, engine: str, task_id: str) -> list[Row]:
        """Return the stored events of one task, newest first."""
        return self._pages(f"/projects/{project}/events", engine=engine, task_id=task_id)

    def commands(self, project: str, **filters: Any) -> list[Row]:
        """Return the commands that match the filters, newest first."""
        return self._pages(f"/projects/{project}/commands", **filters)

    def command(self, project: str, command_id: str) -> Row:
        """Return the current row of one command."""
        return self._row(self.get(f"/projects/{project}/commands/{command_id}"))

    def issue(self, project: str, route: str, *, agent_id: str, **body: Any) -> Row:
        """Issue a command and return its row.

        If the agent has no session, the brain returns status 503 and keeps the command for a
        session that begins within 60 s. In this case, the method returns the agent's newest
        command.

        :param route: the command's route, such as ``cancel-task`` or ``pool-resize``.
        """
        try:
            issued = self.post(f"/projects/{project}/commands/{route}", agent_id=agent_id, **body)
        except BrainRefusedError as exc:
            if exc.status != _AGENT_OFFLINE:
                raise
            issued = next(row for row in self.commands(project) if row["agent_id"] == agent_id)
        return self._row(issued)

    def wait_command(self, project: str, command_id: str, timeout: float = 70.0) -> Row:
        """Wait until a command has finished or failed, and return its row.

        :param timeout: maximum time to wait, in seconds. The brain ends a command after 60 s.
        """

        def finished() -> Row | None:
            row = self.command(project, command_id)
            return row if row["status"] in FINISHED_COMMAND else None

        row = until(finished, f"command {command_id}", timeout=timeout)
        return self._row(row)

    def get(self, path: str, **query: Any) -> Any:
        """GET ``/api/v1{path}`` and return the decoded response."""
        return self._call("GET", path, params=query)

    def post(self, path: str, **body: Any) -> Any:
        """POST ``body`` as JSON to ``/api/v1{path}`` and return the decoded response."""
        return self._call("POST", path, json=body)

    def _call(self, method: str, path: str, **request: Any) -> Any:
        headers = {}
        if method != "GET":
            headers["X-CSRF-Token"] = self._session.cookies.get("z4j_csrf", "")
        url = f"{self.url}/api/v1{path}"
        response = self._session.request(method, url, headers=headers, timeout=_TIMEOUT, **request)
        if not response.ok:
            raise BrainRefusedError(f"{method} {path}", response.status_code, response.text)
        return response.json() if response.content else None

    def _pages(self, path: str, **query: Any) -> list[Row]:
        rows: list[Row] = []
        cursor = None
        while True:
            page = self.get(path, limit=_PAGE_SIZE, cursor=cursor, **query)
            rows += page["items"]
            cursor = page["next_cursor"]
            if not cursor:
                return rows

    @staticmethod
    def _row(value: object) -> Row:
        if not isinstance(value, dict):
            raise HarnessError(f"the brain returned {value!r:.100} instead of a JSON object")
        return value

    @staticmethod
    def _rows(value: object) -> list[Row]:
        if not isinstance(value, list):
            raise HarnessError(f"the brain returned {value!r:.100} instead of a JSON array")
        return value


def generate_password() -> str:
    """Return a password that meets the brain's policy of at least 16 characters."""
    return secrets.token_urlsafe(18)
