"""Schedules kept in code: the brain's list is made to agree with what the application declares.

Frameworks' adapters call this with their settings and an API key of the project; no agent takes part in it.
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

#: Characters of an answer that are logged when the brain refuses.
_QUOTED = 200

#: What the brain calls its counts, and what we call them.
_IMPORTED = {name: name for name in ("inserted", "updated", "unchanged", "failed", "deleted")}
_COMPARED = {
    "insert": "inserted",
    "update": "updated",
    "unchanged": "unchanged",
    "delete": "deleted",
}


@dataclass(slots=True)
class ReconcileResult:
    """What came of it, in schedules. ``errors`` are texts by the schedule's place in what was sent."""

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    failed: int = 0
    deleted: int = 0
    errors: dict[int, str] = field(default_factory=dict)
    dry_run: bool = False


class ScheduleReconciler:
    """Sends declared schedules to the brain. Synchronous: a web server calls it in a thread.

    :param brain_url: address of the brain.
    :param api_key: a key of the project, not the agent's token.
    :param project_slug: 3 to 50 of ``a-z0-9-``, the first and the last no hyphen; else ``ValueError``.
    """

    def __init__(
        self, *, brain_url: str, api_key: str, project_slug: str, timeout_seconds: float = 30.0
    ) -> None:
        if not _SLUG(project_slug):
            raise ValueError(
                f"{project_slug!r} is no project slug: 3 to 50 of a-z, 0-9 and hyphens inside"
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
        """Return the schedules of both notations; of two with one name z4j's own is taken."""
        native = {spec.name: spec for spec in _z4j_native_schedules_to_specs(z4j_schedules or {})}
        beat = {spec.name: spec for spec in parse_celery_beat_entries(celery_beat_schedules or {})}
        for name in native.keys() & beat.keys():
            logger.warning(
                "z4j: schedule %r is declared twice; z4j's own entry is taken, celery-beat's left out",
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
        """Make the brain's schedules of this ``source`` agree with the declared ones; ``dry_run`` only compares.

        A refusal of the brain's counts every schedule as failed and is logged; what is wrong on the way there raises
        ``requests.RequestException``.
        """
        specs = self.collect_specs(
            z4j_schedules=z4j_schedules, celery_beat_schedules=celery_beat_schedules
        )
        schedules = [
            _spec_to_brain_payload(spec, engine=engine, scheduler=scheduler, source=source)
            for spec in specs
        ]
        body = {"schedules": schedules, "mode": "replace_for_source", "source_filter": source}
        answer = self._post("diff" if dry_run else "import", body)
        if answer.status_code != 200:  # noqa: PLR2004 - HTTP; a redirect is not followed, for it would take the key along
            said = printable(answer.text[:_QUOTED].replace(self._api_key, "***"))
            logger.error(
                "z4j: the brain refused the schedules with HTTP %d: %s", answer.status_code, said
            )
            return ReconcileResult(failed=len(schedules), dry_run=dry_run)
        return _result(answer.json(), dry_run=dry_run)

    def _post(self, verb: str, body: dict[str, Any]) -> requests.Response:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util.retry import Retry

        with requests.Session() as session:
            retry = Retry(total=None, connect=1, read=0, redirect=0, status=0, other=0)
            for scheme in ("https://", "http://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            # As ``auth``: a .netrc would replace the header.
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
    names = _COMPARED if dry_run else _IMPORTED
    errors = counts.get("errors") or {}
    return ReconcileResult(
        **{ours: _number(counts.get(theirs, 0)) for theirs, ours in names.items()},
        errors={int(place): str(text) for place, text in errors.items()}
        if isinstance(errors, Mapping)
        else {},
        dry_run=dry_run,
    )


def _number(value: Any) -> int:
    """Return a count; where the brain lists what it would do, how many those are."""
    return len(value) if isinstance(value, (list, dict)) else int(value or 0)


def _z4j_native_schedules_to_specs(schedules: Mapping[str, Any]) -> list[ScheduleSpec]:
    """Return z4j's own entries as specs; one that cannot be read is left out with a warning."""
    specs = []
    for name, entry in schedules.items():
        try:
            specs.append(_spec(name, entry))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("z4j: schedule %r is left out: %s", name, error)
    return specs


def _spec(name: str, entry: Mapping[str, Any]) -> ScheduleSpec:
    task = entry.get("task") or entry.get("task_name")
    expression = entry.get("expression") or entry.get("schedule")
    if not task or not expression:
        raise ValueError("it needs a task and an expression (or schedule)")
    kind = entry.get("kind")
    if not kind or not isinstance(expression, str):
        try:
            kind, expression = parse_celery_beat_schedule(expression)
        except UnsupportedScheduleError as error:
            raise ValueError(str(error)) from None
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
    """Return a schedule as the brain takes it; its hash changes with anything that is declared."""
    content = {**asdict(spec), "engine": engine, "scheduler": scheduler}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    row = {**asdict(spec), "engine": engine, "is_enabled": True, "source": source}
    row["source_hash"] = hashlib.sha256(text.encode()).hexdigest()
    return {**row, "scheduler": scheduler} if scheduler else row
