"""Agents that report to a scripted brain."""

from contextlib import contextmanager

from tests.support.peer import SECRET_TEXT, TOKEN
from z4j_bare import _process_singleton, install_agent


@contextmanager
def installed_agents(peer, engine):
    """Yield ``install(**changes)``, which starts an agent; stop all started agents at the end."""
    started = []

    def install(**changes):
        options = {
            "engines": [engine],
            "brain_url": peer.url,
            "token": TOKEN,
            "project_id": "demo",
            "hmac_secret": SECRET_TEXT,
        }
        started.append(install_agent(**{**options, **changes}))
        return started[-1]

    yield install
    for runtime in started:
        runtime.stop(timeout=3)
        _process_singleton.clear_runtime(expected=runtime)
