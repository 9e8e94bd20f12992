"""Engine descriptions: recognition, health probes, discovery and restarts."""

from types import SimpleNamespace

import pytest
from z4j_celery import CeleryEngineAdapter
from z4j_core.models import DiscoveryHints

from tests.support.celery_fakes import memory_app
from z4j_bare.engines.engine import describe_engine


@pytest.fixture
def app():
    app = memory_app()
    yield app
    app.close()


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [({"celery_app": None}, "celery"), ({"rq_app": None}, "rq"), ({}, "generic")],
)
def test_describe_engine_recognises_application(attributes, kind):
    """An engine is recognised by the application that its adapter holds."""
    assert describe_engine(SimpleNamespace(name="x", **attributes)).kind == kind


def test_generic_engine_uses_adapter(backend):
    """A generic engine has no probes, controls or discovery of its own."""
    engine = describe_engine(SimpleNamespace(name="x"))
    assert engine.make_probes(None) == []
    assert engine.make_controls(backend) is None
    assert engine.iter_definitions(DiscoveryHints(), lambda: None) is None


@pytest.mark.parametrize(("capabilities", "by_exit"), [({"restart_worker"}, False), (set(), True)])
def test_generic_engine_restarts_by_exit_without_capability(capabilities, by_exit):
    """An adapter that cannot restart a worker leaves the restart to the process."""
    adapter = SimpleNamespace(name="x", capabilities=lambda: capabilities)
    assert describe_engine(adapter).restarts_by_exit() is by_exit


def test_celery_engine_restarts_by_remote_control(app):
    """A Celery worker is never restarted by ending its process."""
    assert describe_engine(CeleryEngineAdapter(celery_app=app)).restarts_by_exit() is False


def test_celery_probe_error_is_reported_without_address(app):
    """The entries of a failed broker check name only the class of the error."""
    broker, details = describe_engine(CeleryEngineAdapter(celery_app=app)).make_probes(None)
    assert broker.on_error(OSError("redis://:secret@host")) == {
        "celery.broker_connected": "False",
        "celery.broker_error": "OSError",
    }
    assert details.on_error(OSError()) == {}


def test_celery_engine_leaves_overridden_discovery_to_adapter(app):
    """The adapter's own discovery is done in steps, but an overridden one is called."""

    class Adapter(CeleryEngineAdapter):
        async def discover_tasks(self, hints=None):
            return []

    hints, pauses = DiscoveryHints(), []
    own = describe_engine(CeleryEngineAdapter(celery_app=app))
    names = {found.name for found in own.iter_definitions(hints, lambda: pauses.append(1))}
    assert names <= set(app.tasks)
    assert pauses
    assert describe_engine(Adapter(celery_app=app)).iter_definitions(hints, print) is None
