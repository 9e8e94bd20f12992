"""Sends to the brain the schedules that an application declares in code.

Framework adapters use this module with an API key of the project and without an agent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from z4j_core.celerybeat_compat import (
    ScheduleSpec,
    UnsupportedScheduleError,
    parse_celery_beat_entries,
    parse_celery_beat_schedule,
)

from z4j_bare.transport.error_text import printable

if TYPE_CHECKING:
    import requests

logger = logging.getLogger("z4j.runtime.declarative")

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{1,48}[a-z0-9]").fullmatch

#: Maximum number of logged characters of the brain's error response.
_MAX_LOGGED_CHARS = 200

#: Maps a field of the brain's ``import`` response to a field of ``ReconcileResult``.
_IMPORT_FIELDS = {name: name for name in ("inserted", "updated", "unchanged", "failed", "deleted")}

#: Maps a field of the brain's ``diff`` response to a field of ``ReconcileResult``.
_DIFF_FIELDS = {
    "insert": "inserted",
    "update": "updated",
    "unchanged": "unchanged",
    "delete": "deleted",
}


@dataclass(slots=True)
class ReconcileResult:
    """The numbers of schedules by outcome.

    ``errors`` maps the index of a schedule in the request to the brain's error text.
    """

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    failed: int = 0
    deleted: int = 0
    errors: dict[int, str] = field(default_factory=dict)
    dry_run: bool = False


class ScheduleReconciler:
    """Sends declared schedules to the brain. Its methods block.

    :param brain_url: the brain's URL.
    :param api_key: an API key of the project, not the agent's token.
    :param project_slug: 3 to 50 characters of ``a-z0-9-``, without a hyphen at the start or end.
    :param timeout_seconds: timeout of a request.
    :raises ValueError: the slug is invalid.
    """

    def __init__(
        self, *, brain_url: str, api_key: str, project_slug: str, timeout_seconds: float = 30.0
    ) -> None:
        if not _SLUG(project_slug):
            raise ValueError(
                f"{project_slug!r} is not a project slug: use 3 to 50 of a-z, 0-9 and inner hyphens"
            )
        self._url = f"{str(brain_url).rstrip('/')}/api/v1/projects/{project_slug}/schedules"
        self._api_key = api_key
        self._timeout = timeout_seconds

    def collect_specs(
        self,
        *,
        z4j_schedules: Mapping[str, Any] | None,
        celery_beat_schedules: Mapping[str, Any] | None,
    ) -> list[ScheduleSpec]:
        """Return the schedules of both notations.

        Of two schedules with the same name, the one in z4j's notation is used.
        """
        native = {spec.name: spec for spec in _z4j_native_schedules_to_specs(z4j_schedules or {})}
        beat = {spec.name: spec for spec in parse_celery_beat_entries(celery_beat_schedules or {})}
        for name in native.keys() & beat.keys():
            logger.warning(
                "z4j: schedule %r is declared twice, and the z4j entry is used; "
                "remove the celery-beat entry",
                name,
            )
        return list({**beat, **native}.values())

    def reconcile(
        self,
        *,
        z4j_schedules: Mapping[str, Any] | None = None,
        celery_beat_schedules: Mapping[str, Any] | None = None,
        engine: str = "celery",
        scheduler: str | None = None,
        source: str = "declarative",
        dry_run: bool = False,
    ) -> ReconcileResult:
        """Replace the brain's schedules of ``source`` by the declared schedules.

        If the brain rejects the request, logs the error and counts all schedules as failed.

        :param z4j_schedules: schedules in z4j's notation, by name.
        :param celery_beat_schedules: schedules in the notation of Celery's ``beat_schedule``.
        :param engine: the engine of the tasks.
        :param scheduler: the scheduler that owns the schedules; ``None`` lets the brain decide.
        :param source: the label of the declared schedules in the brain.
        :param dry_run: compare the schedules without changing them.
        :raises requests.RequestException: the brain cannot be reached.
        """
        specs = self.collect_specs(
            z4j_schedules=z4j_schedules, celery_beat_schedules=celery_beat_schedules
        )
        schedules = [
            _spec_to_brain_payload(spec, engine=engine, scheduler=scheduler, source=source)
            for spec in specs
        ]
        body = {"schedules": schedules, "mode": "replace_for_source", "source_filter": source}
        response = self._post("diff" if dry_run else "import", body)
        # A redirect is an error, because following a redirect would forward the API key.
        if response.status_code != 200:  # noqa: PLR2004
            logger.error(
                "z4j: the brain rejected the declared schedules with HTTP %d: %s",
                response.status_code,
                printable(response.text[:_MAX_LOGGED_CHARS].replace(self._api_key, "***")),
            )
            return ReconcileResult(failed=len(schedules), dry_run=dry_run)
        return _result(response.json(), dry_run=dry_run)

    def _post(self, verb: str, body: dict[str, Any]) -> requests.Response:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util.retry import Retry

        with requests.Session() as session:
            retry = Retry(total=None, connect=1, read=0, redirect=0, status=0, other=0)
            for scheme in ("https://", "http://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            # Set as ``auth``, because requests would replace a plain header by a .netrc entry.
            return session.post(
                f"{self._url}:{verb}",
                json=body,
                auth=self._sign,
                timeout=self._timeout,
                allow_redirects=False,
            )

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


def _result(counts: Mapping[str, Any], *, dry_run: bool) -> ReconcileResult:
    names = _DIFF_FIELDS if dry_run else _IMPORT_FIELDS
    errors = counts.get("errors") or {}
    if not isinstance(errors, Mapping):
        errors = {}
    return ReconcileResult(
        **{field: _number(counts.get(name, 0)) for name, field in names.items()},
        errors={int(index): str(text) for index, text in errors.items()},
        dry_run=dry_run,
    )


def _number(value: Any) -> int:
    """Return a count, or the length of a list of planned changes."""
    return len(value) if isinstance(value, (list, dict)) else int(value or 0)


def _z4j_native_schedules_to_specs(schedules: Mapping[str, Any]) -> list[ScheduleSpec]:
    """Return the entries in z4j's notation as specs; skip invalid entries with a warning."""
    specs = []
    for name, entry in schedules.items():
        try:
            specs.append(_spec(name, entry))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("z4j: schedule %r is invalid and is not sent: %s", name, error)
    return specs


def _spec(name: str, entry: Mapping[str, Any]) -> ScheduleSpec:
    task = entry.get("task") or entry.get("task_name")
    expression = entry.get("expression") or entry.get("schedule")
    if not task or not expression:
        raise ValueError("it needs a task and an expression or schedule")
    kind = entry.get("kind")
    if not kind or not isinstance(expression, str):
        try:
            parsed, expression = parse_celery_beat_schedule(expression)
        except UnsupportedScheduleError as error:
            raise ValueError(str(error)) from None
        if not kind:
            # z4j 1.13 does not send a schedule without a kind. If this version sent the schedule,
            # an upgrade would start a task that never ran.
            raise ValueError(f"it has no kind: add kind={parsed!r}")
        kind = parsed
    return ScheduleSpec(
        name=name,
        task_name=str(task),
        kind=str(kind),
        expression=expression,
        args=list(entry.get("args") or []),
        kwargs=dict(entry.get("kwargs") or {}),
        queue=entry.get("queue"),
        timezone=str(entry.get("timezone") or "UTC"),
    )


def _spec_to_brain_payload(
    spec: ScheduleSpec, *, engine: str, scheduler: str | None = None, source: str = "declarative"
) -> dict[str, Any]:
    """Return a schedule in the brain's format, with a hash of its declared values."""
    content = {**asdict(spec), "engine": engine, "scheduler": scheduler}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    row = {**asdict(spec), "engine": engine, "is_enabled": True, "source": source}
    row["source_hash"] = hashlib.sha256(text.encode()).hexdigest()
    return {**row, "scheduler": scheduler} if scheduler else row
