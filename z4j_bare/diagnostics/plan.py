"""Which probes are made, in which order, and which are not worth making after others have failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from z4j_bare.concurrency import build, choose, detect
from z4j_bare.diagnostics import host, network
from z4j_bare.diagnostics.agents import probe_agents
from z4j_bare.diagnostics.remote import BrainProbe, sequence
from z4j_bare.diagnostics.result import OK, ProbeResult, failed, skipped
from z4j_bare.errors import HostConfigurationError
from z4j_bare.settings import Settings, load_settings
from z4j_bare.transport.endpoint import tls_context

if TYPE_CHECKING:
    from z4j_core.models import Config

Probe = Callable[[], ProbeResult]


def examine(config: Config, settings: Settings, *, websocket: bool = True) -> Iterator[ProbeResult]:
    """Yield every result as it comes: this host first, then the way to the brain, then the brain."""
    yield host.probe_package()
    yield host.probe_versions()
    yield host.probe_concurrency(settings.concurrency)
    yield host.probe_buffer_path(config.buffer_path)
    yield probe_agents(config.project_id)
    yield from approach(config, settings, websocket=websocket)


def glance(config: Config, settings: Settings) -> Iterator[ProbeResult]:
    """Yield what can be found out without showing the token to anybody."""
    yield host.probe_buffer_path(config.buffer_path)
    yield from _in_turn(
        [*_way(config, settings), ("http", "tls", partial(_healthy, config, settings))]
    )


def approach(
    config: Config, settings: Settings, *, websocket: bool = True
) -> Iterator[ProbeResult]:
    """Yield the results for the way to the brain and the brain."""
    remote = None
    try:
        remote = _remote(config, settings)
        steps = sequence(remote, websocket=websocket)
    except HostConfigurationError as error:
        # What is wrong with a setting is told once, as the first thing that would need it.
        steps = [("http", "tls", partial(failed, "http", str(error), "correct that setting"))]
    try:
        yield from _in_turn([*_way(config, settings), *steps])
    finally:
        if remote is not None:
            remote.close()


def run_all(config: Config) -> list[ProbeResult]:
    """Return the results up to the first failure, for the settings in the environment."""
    results = [host.probe_buffer_path(config.buffer_path)]
    if not results[0].ok:
        return results
    for result in approach(config, load_settings()):
        results.append(result)
        if not result.ok:
            break
    return results


def probe_websocket(config: Config, timeout: float = 5.0) -> ProbeResult:
    """Upgrade to WebSocket with the agent's token and have a message answered; nothing is stored, no command taken."""
    unverified = {"remote_connection_verified": False, "remote_authentication_verified": False}
    try:
        remote = _remote(config, load_settings(), timeout)
    except HostConfigurationError as error:
        return failed("websocket", str(error), "correct that setting", **unverified)
    with closing(remote):
        result = remote.websocket()
    details = {
        **unverified,
        **result.details,
        "remote_authentication_verified": result.verdict == OK,
    }
    return replace(result, details=details)


def _remote(config: Config, settings: Settings, timeout: float = 5.0) -> BrainProbe:
    return BrainProbe(config, settings, build(choose(settings.concurrency, detect())), timeout)


def _healthy(config: Config, settings: Settings) -> ProbeResult:
    try:
        remote = _remote(config, settings)
    except HostConfigurationError as error:
        return failed("http", str(error), "correct that setting")
    with closing(remote):
        return remote.health()


def _way(config: Config, settings: Settings) -> list[tuple[str, str, Probe]]:
    url = str(config.brain_url)
    return [
        ("dns", "", partial(network.probe_dns, url)),
        ("tcp", "dns", partial(network.probe_tcp, url)),
        ("tls", "tcp", partial(_tls, url, settings)),
    ]


def _tls(url: str, settings: Settings) -> ProbeResult:
    if network.target_of(url).scheme != "https":
        return network.probe_tls(url)
    try:
        context = tls_context(settings.ca_bundle, settings.client_cert, settings.client_key)
    except HostConfigurationError as error:
        return failed("tls", str(error), "name a PEM file that exists and holds certificates")
    return network.probe_tls(url, context=context)


def _in_turn(steps: list[tuple[str, str, Probe]]) -> Iterator[ProbeResult]:
    bad: set[str] = set()
    for name, ground, probe in steps:
        result = skipped(name, f"not tried, because {ground} failed") if ground in bad else probe()
        if not result.ok or ground in bad:
            bad.add(name)
        yield result
