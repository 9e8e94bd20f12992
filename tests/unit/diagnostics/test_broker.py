"""The probe of an application's broker."""

from types import SimpleNamespace

import pytest

pytest.importorskip("celery")

from celery import Celery

from tests.support.celery_fakes import memory_app
from z4j_bare.diagnostics.broker import is_celery, probe_broker


def test_broker_that_answers_passes():
    """A broker that accepts a connection passes, with its address."""
    with memory_app("z4j-doctor") as app:
        result = probe_broker(app)
    assert result.verdict == "OK"
    assert result.text.startswith("connected to memory://")


def test_broker_that_does_not_answer_fails():
    """A broker that refuses the connection fails with address, setting and fix, but no password."""
    with Celery(broker="redis://:hunter2@127.0.0.1:1/0", set_as_current=False) as app:
        result = probe_broker(app)
    assert not result.ok
    assert result.text.startswith("no broker answers at redis://:**@127.0.0.1:1/0")
    assert result.fix == (
        "start the broker, or correct host and port of the address (setting: broker_url)"
    )
    assert "hunter2" not in str(result)


@pytest.mark.parametrize("app", [None, SimpleNamespace(conf=1)])
def test_only_celery_applications_are_probed(app):
    """No application, or one of another library, has no broker that could be probed."""
    assert not is_celery(app)
