"""Schedules in code: what is sent for them, what comes of it, and what no bad entry, refusal or redirect may do."""

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

KEY = "z4j_key_that_nobody_may_log"


@pytest.fixture
def brain(backend):
    """A scripted brain; what it shall answer stands in ``answers``."""
    peer = HttpPeer(backend)
    yield peer
    peer.stop()


@pytest.fixture
def reconciler(brain):
    return ScheduleReconciler(brain_url=brain.url + "/", api_key=KEY, project_slug="shop")


def test_import(brain, reconciler):
    """Both notations go out in one request under the API key; what the brain counted comes back."""
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


def test_dry_run(brain, reconciler):
    """A dry run asks for the differences only."""
    brain.answers["POST"] = [
        (200, {}, b'{"insert": 3, "update": [1, 2], "unchanged": 4, "delete": 5}')
    ]
    result = reconciler.reconcile(z4j_schedules={}, dry_run=True)
    assert result == ReconcileResult(inserted=3, updated=2, unchanged=4, deleted=5, dry_run=True)
    assert brain.requests[0].path.endswith("schedules:diff")


def test_refusal(brain, reconciler, caplog):
    """A refusal counts every schedule as failed, and the log has a piece of the answer, but not the key."""
    brain.answers["POST"] = [(403, {}, f"no {KEY} \x1b[2J {'x' * 500}".encode())]
    result = reconciler.reconcile(z4j_schedules={"a": {"task": "t", "schedule": "0 * * * *"}})
    assert result == ReconcileResult(failed=1)
    assert "HTTP 403" in caplog.text
    assert KEY not in caplog.text
    assert "\x1b" not in caplog.text
    assert "x" * 250 not in caplog.text


def test_the_way_there(brain, reconciler):
    """A redirect is not followed, and a brain that is not there is an error of requests."""
    brain.answers["POST"] = [(307, {"Location": brain.url + "/elsewhere"}, b"{}")]
    assert (
        reconciler.reconcile(z4j_schedules={"a": {"task": "t", "schedule": "0 * * * *"}}).failed
        == 1
    )
    assert len(brain.requests) == 1
    brain.stop()
    with pytest.raises(requests.ConnectionError):
        reconciler.reconcile(z4j_schedules={})


def test_specs(caplog):
    """Entries of z4j's own take several spellings; those that cannot be read are left out, one warning each."""
    good = {
        "every": {"task": "t", "schedule": timedelta(seconds=30)},
        "cron": {"task_name": "t", "expression": "*/5 * * * *", "timezone": "Europe/Berlin"},
    }
    bad = {
        "no task": {"schedule": "0 * * * *"},
        "no time": {"task": "t"},
        "no table": 7,
        "strange": {"task": "t", "schedule": object()},
    }
    with caplog.at_level(logging.WARNING):
        specs = _z4j_native_schedules_to_specs({**good, **bad})
    assert [(spec.name, spec.kind, spec.timezone) for spec in specs] == [
        ("every", "interval", "UTC"),
        ("cron", "cron", "Europe/Berlin"),
    ]
    assert [record.args[0] for record in caplog.records] == list(bad)


def test_one_name_twice(reconciler, caplog):
    """Of two schedules with one name z4j's own is taken, with a warning."""
    (spec,) = reconciler.collect_specs(
        z4j_schedules={"a": {"task": "own", "schedule": "0 * * * *"}},
        celery_beat_schedules={"a": {"task": "beat", "schedule": 60.0}},
    )
    assert spec.task_name == "own"
    assert "declared twice" in caplog.text


def test_the_hash():
    """It is the same for the same declaration, and another one for any change of it."""
    (spec,) = _z4j_native_schedules_to_specs({"a": {"task": "t", "schedule": "0 * * * *"}})
    first = _spec_to_brain_payload(spec, engine="celery")
    assert first == _spec_to_brain_payload(spec, engine="celery")
    assert "scheduler" not in first
    others = [
        _spec_to_brain_payload(spec, engine="rq"),
        _spec_to_brain_payload(spec, engine="celery", scheduler="s"),
    ]
    assert len({row["source_hash"] for row in (first, *others)}) == 3


@pytest.mark.parametrize("slug", ["", "ab", "-shop", "shop-", "Shop", "a" * 51, "a/b"])
def test_slugs(slug):
    """What is no slug is refused before anything is sent."""
    with pytest.raises(ValueError, match="slug"):
        ScheduleReconciler(brain_url="http://x", api_key=KEY, project_slug=slug)
