"""Shortened ids and names, their originals, and NUL in JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from z4j_bare.wire import fit, frames
from z4j_bare.wire.canonical import canonical, canonical_plain

texts = st.text(st.characters(codec="utf-8") | st.just("\0") | st.just("\\"), max_size=8)
values = st.recursive(
    st.none() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def no_originals(monkeypatch):
    """No originals from other tests."""
    monkeypatch.setattr(fit, "_originals", {})


@given(values)
def test_canonical_json_has_no_nul(value):
    """Both encoders replace NUL in values and keys, stay canonical, and change nothing else."""
    for encode in (canonical, canonical_plain):
        encoded = encode(value)
        parsed = json.loads(encoded)
        assert not fit.has_nul(encoded.decode())
        assert canonical_plain(parsed) == encoded
        if not fit.has_nul(json.dumps(value)):
            assert parsed == value


@given(st.text(min_size=1, max_size=400), st.sampled_from(["celery", "dramatiq", "rq"]))
def test_id_fits_with_engine_prefix(task_id, engine):
    """An id, with the engine's name and a colon before it, is valid text of 200 characters."""
    shown = fit.fit_id(task_id, engine)
    assert len(f"{engine}:{shown}") <= 200
    assert shown.encode()
    assert "\0" not in shown
    assert fit.original(shown) == task_id


def test_long_ids_stay_different():
    """Ids with the same start get different short ids, which begin like them."""
    first, second = (fit.fit_id("x" * 300 + end, "celery") for end in "ab")
    assert first != second
    assert first.startswith("x" * 160)
    assert len(first) == len(second) == 193


@pytest.mark.parametrize("task_id", ["plain", "x" * 193, "~" * 150, "a/b c\\u0000", "naïve"])
def test_fitting_id_is_unchanged(task_id):
    """An id that fits is sent, and found again, as it is."""
    assert fit.fit_id(task_id, "celery") == fit.original(task_id) == task_id


@pytest.mark.parametrize("text", ["i" * 250, "a\0b", "a\ud800b"])
def test_forgotten_id_has_no_original(text):
    """A changed id of which nothing is remembered is recognised as one."""
    shown = fit.fit_id(text, "celery")
    fit._originals.clear()
    assert fit.original(shown) is None


def test_forgotten_name_has_no_original():
    """A name that may have been cut is recognised as one."""
    shown = fit.fit_name("q" * 300)
    assert (shown, fit.original(shown)) == ("q" * 200, "q" * 300)
    fit._originals.clear()
    assert fit.original(shown) is None


def test_name_of_exact_width_is_its_own_original():
    """A name as wide as the column is known once it was sent."""
    assert fit.fit_name("q" * 200) == fit.original("q" * 200) == "q" * 200


def test_names_with_same_start_have_no_original():
    """A text that stands for two names is never taken for one of them."""
    shown = {fit.fit_name("q" * 250 + end) for end in "abb"}
    assert shown == {"q" * 200}
    assert fit.original("q" * 200) is None


def test_originals_are_bounded(monkeypatch):
    """The newest originals are remembered, and no huge one."""
    monkeypatch.setattr(fit, "MAX_ORIGINALS", 3)
    shown = [fit.fit_id("x" * 200 + str(number), "celery") for number in range(5)]
    fit.fit_id("y" * 100_000, "celery")
    assert list(fit._originals)[:2] == shown[3:]
    assert fit.original(fit.fit_id("y" * 100_000, "celery")) is None


def test_heartbeat_has_no_nul_inside_json_texts():
    """A health value that is JSON itself contains no NUL either."""
    health = {"celery.worker_details": json.dumps({"w": {"registered": ["a\0b"]}}), "x": "\0"}
    payload = frames.heartbeat(
        buffer_size=0, dropped_events=0, last_flush_at=None, loss={}, health=health
    )
    sent = json.loads(payload)["adapter_health"]
    assert json.loads(sent["celery.worker_details"]) == {"w": {"registered": ["a\ufffdb"]}}
    assert sent["x"] == "\ufffd"


def test_result_has_no_nul():
    """A command's result and error contain no NUL."""
    payload = frames.command_result("failed", {"k\0": ["v\0"]}, "e\0", None)
    assert json.loads(payload)["result"] == {"k\ufffd": ["v\ufffd"]}
    assert json.loads(payload)["error"] == "e\ufffd"


def test_huge_event_keeps_its_mark():
    """An event that is truncated to its names still says what was changed."""
    fields = {
        "id": "i",
        "kind": "task.received",
        "engine": "celery",
        "task_id": "t" * 300,
        "occurred_at": "2026-01-01T00:00:00+00:00",
        "data": {"args": "x" * 600_000, "other": "y" * 600_000, "task_name": "n" * 600},
    }
    event = json.loads(frames.encode_fields(fields))
    assert event["data"]["fitted"] == ["task_id", "task_name"]
    assert len(event["data"]["task_name"]) <= 500
