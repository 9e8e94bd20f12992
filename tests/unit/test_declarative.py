"""Declared schedules: the request, the result, and invalid entries, rejections and redirects."""

import json
import logging
from datetime import timedelta

import pytest
import requests
from celery.schedules import crontab

from tests.support.http_peer import HttpPeer
from z4j_bare.declarative import (
    ReconcileResult,
    ScheduleReconciler,
    _spec_to_brain_payload,
    _z4j_native_schedules_to_specs,
)

KEY = "z4j_key_that_must_not_be_logged"


@pytest.fixture
def brain(backend):
    """A scripted brain; a test puts its responses into ``answers``."""
    peer = HttpPeer(backend)
    yield peer
    peer.stop()


@pytest.fixture
def reconciler(brain):
    return ScheduleReconciler(brain_url=brain.url + "/", api_key=KEY, project_slug="shop")


def test_reconcile_sends_both_notations_in_one_request(brain, reconciler):
    """Both notations are sent in one request with the API key; the brain's counts are returned."""
    brain.answers["POST"] = [
        (
            200,
            {},
            json.dumps({"inserted": 1, "updated": 1, "failed": 1, "errors": {"1": "bad"}}).encode(),
        )
    ]
    result = reconciler.reconcile(
        z4j_schedules={
            "own": {
                "task": "shop.own",
                "kind": "cron",
                "expression": "0 * * * *",
                "queue": "q",
                "args": [1],
            }
        },
        celery_beat_schedules={
            "beat": {"task": "shop.beat", "schedule": crontab(minute=5), "kwargs": {"a": 2}}
        },
        scheduler="celery-beat",
        source="django",
    )
    assert result == ReconcileResult(inserted=1, updated=1, failed=1, errors={1: "bad"})
    (request,) = brain.requests
    assert (request.method, request.path) == ("POST", "/api/v1/projects/shop/schedules:import")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    body = json.loads(request.body)
    assert (body["mode"], body["source_filter"]) == ("replace_for_source", "django")
    beat, own = body["schedules"]
    assert (beat["name"], beat["kind"], beat["kwargs"], beat["scheduler"]) == (
        "beat",
        "cron",
        {"a": 2},
        "celery-beat",
    )
    assert (own["task_name"], own["queue"], own["args"], own["timezone"], own["is_enabled"]) == (
        "shop.own",
        "q",
        [1],
        "UTC",
        True,
    )
    assert len(own["source_hash"]) == 64


def test_dry_run_requests_differences_only(brain, reconciler):
    """A dry run calls the diff endpoint and changes nothing."""
    brain.answers["POST"] = [
        (200, {}, b'{"insert": 3, "update": [1, 2], "unchanged": 4, "delete": 5}')
    ]
    result = reconciler.reconcile(z4j_schedules={}, dry_run=True)
    assert result == ReconcileResult(inserted=3, updated=2, unchanged=4, deleted=5, dry_run=True)
    assert brain.requests[0].path.endswith("schedules:diff")


HOURLY = {"a": {"task": "t", "kind": "cron", "schedule": "0 * * * *"}}


def test_rejected_request_counts_all_schedules_as_failed(brain, reconciler, caplog):
    """A rejection counts all schedules as failed; the log quotes the response without the key."""
    brain.answers["POST"] = [(403, {}, f"no {KEY} \x1b[2J {'x' * 500}".encode())]
    result = reconciler.reconcile(z4j_schedules=HOURLY)
    assert result == ReconcileResult(failed=1)
    assert "HTTP 403" in caplog.text
    assert KEY not in caplog.text
    assert "\x1b" not in caplog.text
    assert "x" * 250 not in caplog.text


def test_reconcile_ignores_redirect_and_raises_connection_error(brain, reconciler):
    """A redirect is not followed, and an unreachable brain raises an error of requests."""
    brain.answers["POST"] = [(307, {"Location": brain.url + "/elsewhere"}, b"{}")]
    assert reconciler.reconcile(z4j_schedules=HOURLY).failed == 1
    assert len(brain.requests) == 1
    brain.stop()
    with pytest.raises(requests.ConnectionError):
        reconciler.reconcile(z4j_schedules={})


def test_invalid_native_entries_are_skipped_with_warning(caplog):
    """z4j's own entries have several spellings; each invalid one is skipped with a warning."""
    good = {
        "every": {"task": "t", "kind": "interval", "schedule": timedelta(seconds=30)},
        "cron": {
            "task_name": "t",
            "kind": "cron",
            "expression": "*/5 * * * *",
            "timezone": "Europe/Berlin",
        },
    }
    bad = {
        "no task": {"schedule": "0 * * * *"},
        "no time": {"task": "t"},
        "no table": 7,
        "strange": {"task": "t", "kind": "cron", "schedule": object()},
        "no kind": {"task": "t", "expression": "0 * * * *"},
        "empty kind": {"task": "t", "kind": "", "schedule": timedelta(seconds=30)},
        "unknown kind": {"task": "t", "schedule": "30"},
    }
    with caplog.at_level(logging.WARNING):
        specs = _z4j_native_schedules_to_specs({**good, **bad})
    assert [(spec.name, spec.kind, spec.timezone) for spec in specs] == [
        ("every", "interval", "UTC"),
        ("cron", "cron", "Europe/Berlin"),
    ]
    assert [record.args[0] for record in caplog.records] == list(bad)
    assert "it has no kind: add kind='cron'" in caplog.text
    assert "it has no kind: add kind='interval'" in caplog.text


def test_native_entry_wins_over_beat_entry_of_same_name(reconciler, caplog):
    """If both notations declare a name, z4j's own entry is used, with a warning."""
    (spec,) = reconciler.collect_specs(
        z4j_schedules={"a": {"task": "own", "kind": "cron", "schedule": "0 * * * *"}},
        celery_beat_schedules={"a": {"task": "beat", "schedule": 60.0}},
    )
    assert spec.task_name == "own"
    assert "declared twice" in caplog.text


def test_source_hash_changes_with_declaration():
    """The hash is stable for equal declarations and differs after any change."""
    entry = {"task": "t", "kind": "cron", "schedule": "0 * * * *"}
    (spec,) = _z4j_native_schedules_to_specs({"a": entry})
    first = _spec_to_brain_payload(spec, engine="celery")
    assert first == _spec_to_brain_payload(spec, engine="celery")
    assert "scheduler" not in first
    others = [
        _spec_to_brain_payload(spec, engine="rq"),
        _spec_to_brain_payload(spec, engine="celery", scheduler="s"),
    ]
    assert len({row["source_hash"] for row in (first, *others)}) == 3


@pytest.mark.parametrize("slug", ["", "ab", "-shop", "shop-", "Shop", "a" * 51, "a/b"])
def test_invalid_project_slug_raises_error(slug):
    """An invalid slug is rejected by the constructor."""
    with pytest.raises(ValueError, match="slug"):
        ScheduleReconciler(brain_url="http://x", api_key=KEY, project_slug=slug)
