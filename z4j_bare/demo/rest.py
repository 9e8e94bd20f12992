"""The part of the brain's REST API that a harness needs, as an operator's browser would use it."""

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

FINISHED_COMMAND = frozenset({"completed", "failed", "timeout", "cancelled"})
_PAGE = 500  # the brain's own maximum
_TIMEOUT = 30.0
_AGENT_OFFLINE = 503
# The server closes a connection that nobody used for 5 s, and perhaps just when we do.
_RETRY = Retry(1, connect=0, status=0, other=0, allowed_methods=("GET",))


class BrainRefusedError(HarnessError):
    """The brain answered with an error; ``status`` is the HTTP status, ``body`` what it said."""

    def __init__(self, call: str, status: int, body: str) -> None:
        super().__init__(f"the brain answered {status} to {call}: {body[:300]}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Credentials:
    """What one agent needs to talk to the brain; the token is shown once, at minting."""

    brain_url: str
    project: str
    agent_id: str
    token: str = field(repr=False)
    hmac_secret: str = field(repr=False)

    def env(self, home: Path) -> dict[str, str]:
        """Return a worker's ``Z4J_*`` environment; its agent keeps its state in ``home``, made private here."""
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        return {
            "Z4J_BRAIN_URL": self.brain_url,
            "Z4J_TOKEN": self.token,
            "Z4J_PROJECT_ID": self.project,
            "Z4J_HMAC_SECRET": self.hmac_secret,
            "Z4J_HOME": str(home),
        }


class BrainApi:
    """A session with the brain at ``url``, logged in by ``login``; one thread at a time, see ``sibling``.

    Methods raise ``BrainRefusedError`` for an answer of 400 and above, ``requests.RequestException`` for none.
    ``project`` is the slug everywhere. Times in rows are UTC, without an offset on SQLite.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy variable must not catch loopback
        self._session.mount("http://", HTTPAdapter(max_retries=_RETRY))

    def login(self, email: str, password: str) -> None:
        """Open a session; the brain allows 20 of them a minute."""
        self.post("/auth/login", email=email, password=password)

    def close(self) -> None:
        """Close its connections; the next call opens new ones under the same login."""
        self._session.close()

    def sibling(self) -> BrainApi:
        """Return another session under the same login, for another thread."""
        twin = BrainApi(self.url)
        twin._session.cookies.update(self._session.cookies)
        return twin

    def healthy(self) -> bool:
        """Whether the brain answers its health check now."""
        try:
            return self._session.get(f"{self.url}/api/v1/health", timeout=2).ok
        except requests.RequestException:
            return False

    def create_project(self, project: str) -> Row:
        """Create a project; the slug is 3 to 50 of ``a-z0-9-``."""
        return self._row(self.post("/projects", slug=project, name=project))

    def archive_project(self, project: str) -> None:
        """Archive it; its agents are thrown out with close code 4003."""
        self._call("DELETE", f"/projects/{project}")

    def mint_agent(self, project: str, name: str) -> Credentials:
        """Create an agent and return its credentials."""
        minted = self.post(f"/projects/{project}/agents", name=name)
        return Credentials(
            self.url, project, minted["agent"]["id"], minted["token"], minted["hmac_secret"]
        )

    def revoke_agent(self, project: str, agent_id: str) -> None:
        """Revoke its token; open sessions close with 4003, later ones are refused with 4401."""
        self._call("DELETE", f"/projects/{project}/agents/{agent_id}")

    def agents(self, project: str) -> list[Row]:
        """Return the agents: state, capabilities, versions."""
        return self._rows(self.get(f"/projects/{project}/agents"))

    def agent(self, project: str, agent_id: str) -> Row:
        """Return one of ``agents``; ``HarnessError`` when the brain does not list it."""
        for row in self.agents(project):
            if row["id"] == agent_id:
                return row
        raise HarnessError(f"the brain lists no agent {agent_id} in {project}")

    def agent_workers(self, project: str) -> list[Row]:
        """Return the processes that said hello, one row per worker id."""
        return self._rows(self.get(f"/projects/{project}/agent-workers"))

    def workers(self, project: str) -> list[Row]:
        """Return the workers that events named."""
        return self._rows(self.get(f"/projects/{project}/workers"))

    def queues(self, project: str) -> list[Row]:
        """Return the queues that events named."""
        return self._rows(self.get(f"/projects/{project}/queues"))

    def stats(self, project: str) -> Row:
        """Return the dashboard's sums: tasks by state, depths, agents and workers online."""
        return self._row(self.get(f"/projects/{project}/stats"))

    def tasks(self, project: str, **filters: Any) -> list[Row]:
        """Return every task that matches: ``state``, ``name``, ``queue``, ``worker``, ``since`` ..."""
        return self._pages(f"/projects/{project}/tasks", **filters)

    def task(self, project: str, engine: str, task_id: str) -> Row | None:
        """Return one task, ``None`` while no event has made a row of it."""
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
        """Return the commands, newest first."""
        return self._pages(f"/projects/{project}/commands", **filters)

    def command(self, project: str, command_id: str) -> Row:
        """Return one command as it stands."""
        return self._row(self.get(f"/projects/{project}/commands/{command_id}"))

    def issue(self, project: str, route: str, *, agent_id: str, **body: Any) -> Row:
        """Issue a command by its route, such as ``cancel-task`` or ``pool-resize``, and return its row.

        To an agent without a session the brain answers 503 and keeps the command all the same, for its next
        connect within 60 s; the row is then the newest one of that agent.
        """
        try:
            issued = self.post(f"/projects/{project}/commands/{route}", agent_id=agent_id, **body)
        except BrainRefusedError as exc:
            if exc.status != _AGENT_OFFLINE:
                raise
            issued = next(row for row in self.commands(project) if row["agent_id"] == agent_id)
        return self._row(issued)

    def wait_command(self, project: str, command_id: str, timeout: float = 70.0) -> Row:
        """Return the command once it is finished, well or not; the brain itself gives up after 60 s."""

        def finished() -> Row | None:
            row = self.command(project, command_id)
            return row if row["status"] in FINISHED_COMMAND else None

        row = until(finished, f"command {command_id}", timeout=timeout)
        return self._row(row)

    def get(self, path: str, **query: Any) -> Any:
        """GET ``/api/v1{path}`` and return the decoded answer."""
        return self._call("GET", path, params=query)

    def post(self, path: str, **body: Any) -> Any:
        """POST ``body`` as JSON to ``/api/v1{path}`` and return the decoded answer."""
        return self._call("POST", path, json=body)

    def _call(self, method: str, path: str, **request: Any) -> Any:
        headers = (
            {"X-CSRF-Token": self._session.cookies.get("z4j_csrf", "")} if method != "GET" else {}
        )
        url = f"{self.url}/api/v1{path}"
        answer = self._session.request(method, url, headers=headers, timeout=_TIMEOUT, **request)
        if not answer.ok:
            raise BrainRefusedError(f"{method} {path}", answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def _pages(self, path: str, **query: Any) -> list[Row]:
        rows: list[Row] = []
        cursor = None
        while True:
            page = self.get(path, limit=_PAGE, cursor=cursor, **query)
            rows += page["items"]
            cursor = page["next_cursor"]
            if not cursor:
                return rows

    @staticmethod
    def _row(answer: Any) -> Row:
        if not isinstance(answer, dict):
            raise HarnessError(f"the brain answered {answer!r:.100} where an object belongs")
        return answer

    @staticmethod
    def _rows(answer: Any) -> list[Row]:
        if not isinstance(answer, list):
            raise HarnessError(f"the brain answered {answer!r:.100} where a list belongs")
        return answer


def generate_password() -> str:
    """Return a password that meets the brain's policy: at least 16 characters of any class."""
    return secrets.token_urlsafe(18)
