"""Runs the probes in their order and skips probes that depend on a failed probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from z4j_bare.buffer.existing_agent import key_digest
from z4j_bare.concurrency import build, choose, detect
from z4j_bare.diagnostics import broker, host, network
from z4j_bare.diagnostics.remote import BrainProbe, ProbeStep, brain_steps
from z4j_bare.diagnostics.result import OK, ProbeResult, failed, skipped
from z4j_bare.errors import HostConfigurationError
from z4j_bare.settings import Settings, load_settings, read_key
from z4j_bare.transport.endpoint import tls_context

if TYPE_CHECKING:
    from celery import Celery
    from z4j_core.models import Config

_FIX_SETTING = "correct this setting"


def all_checks(
    config: Config, settings: Settings, *, websocket: bool = True, app: object = None
) -> Iterator[ProbeResult]:
    """Yield the results of the probes of this host, then of the network, then of the brain.

    :param config: settings shared with z4j's other packages.
    :param settings: the agent's own settings.
    :param websocket: whether to probe WebSocket.
    :param app: an imported application. If it is a Celery application, its broker is probed.
    """
    yield host.probe_package()
    yield host.probe_versions()
    yield host.probe_concurrency(settings.concurrency)
    yield host.probe_buffer_path(config.buffer_path)
    leftovers = host.probe_existing_buffers(config.buffer_path, _digest(config, settings))
    if leftovers is not None:
        yield leftovers
    yield host.probe_agents(config.project_id)
    if broker.is_celery(app):
        yield broker.probe_broker(cast("Celery", app))
    yield from brain_checks(config, settings, websocket=websocket)


def quick_checks(config: Config, settings: Settings) -> Iterator[ProbeResult]:
    """Yield the results of the probes that send no token."""
    yield host.probe_buffer_path(config.buffer_path)
    health = ProbeStep("http", "tls", partial(_probe_health, config, settings))
    yield from _run_steps([*_network_steps(config, settings), health])


def brain_checks(
    config: Config, settings: Settings, *, websocket: bool = True
) -> Iterator[ProbeResult]:
    """Yield the results of the probes of the network and of the brain."""
    probe = None
    try:
        probe = _brain_probe(config, settings)
        steps = brain_steps(probe, websocket=websocket)
    except HostConfigurationError as error:
        # This step reports the wrong setting.
        # The step is skipped if the tls probe has failed because of the same setting.
        steps = [ProbeStep("http", "tls", partial(failed, "http", str(error), _FIX_SETTING))]
    try:
        yield from _run_steps([*_network_steps(config, settings), *steps])
    finally:
        if probe is not None:
            probe.close()


def run_all(config: Config) -> list[ProbeResult]:
    """Probe the buffer, the network and the brain up to the first failure; return the results.

    :param config: settings shared with z4j's other packages; the agent's own settings are read
        from the environment.
    """
    results = [host.probe_buffer_path(config.buffer_path)]
    if not results[0].ok:
        return results
    for result in brain_checks(config, load_settings()):
        results.append(result)
        if not result.ok:
            break
    return results


def probe_websocket(config: Config, timeout: float = 5.0) -> ProbeResult:
    """Upgrade to WebSocket with the agent's token and exchange one message.

    During the exchange the brain stores nothing and sends no command. The result's ``details``
    contain the booleans ``remote_connection_verified`` and ``remote_authentication_verified``.

    :param config: settings shared with z4j's other packages; the agent's own settings are read
        from the environment.
    :param timeout: maximum seconds until the brain's answer to the message.
    """
    unverified = {"remote_connection_verified": False, "remote_authentication_verified": False}
    try:
        probe = _brain_probe(config, load_settings(), timeout)
    except HostConfigurationError as error:
        return failed("websocket", str(error), _FIX_SETTING, **unverified)
    with closing(probe):
        result = probe.websocket()
    details = {
        **unverified,
        **result.details,
        "remote_authentication_verified": result.verdict == OK,
    }
    return replace(result, details=details)


def _digest(config: Config, settings: Settings) -> str | None:
    try:
        return key_digest(read_key(config, settings))
    except HostConfigurationError:  # the probes of the brain report the error
        return None


def _brain_probe(config: Config, settings: Settings, timeout: float = 5.0) -> BrainProbe:
    return BrainProbe(config, settings, build(choose(settings.concurrency, detect())), timeout)


def _probe_health(config: Config, settings: Settings) -> ProbeResult:
    try:
        probe = _brain_probe(config, settings)
    except HostConfigurationError as error:
        return failed("http", str(error), _FIX_SETTING)
    with closing(probe):
        return probe.health()


def _network_steps(config: Config, settings: Settings) -> list[ProbeStep]:
    url = str(config.brain_url)
    return [
        ProbeStep("dns", "", partial(network.probe_dns, url)),
        ProbeStep("tcp", "dns", partial(network.probe_tcp, url)),
        ProbeStep("tls", "tcp", partial(_probe_tls, url, settings)),
    ]


def _probe_tls(url: str, settings: Settings) -> ProbeResult:
    if network.parse_target(url).scheme != "https":
        return network.probe_tls(url)
    try:
        context = tls_context(settings.ca_bundle, settings.client_cert, settings.client_key)
    except HostConfigurationError as error:
        return failed("tls", str(error), network.FIX_PEM_FILE)
    return network.probe_tls(url, context=context)


def _run_steps(steps: list[ProbeStep]) -> Iterator[ProbeResult]:
    failures: set[str] = set()
    for step in steps:
        if step.requires in failures:
            failures.add(step.name)
            yield skipped(step.name, f"not run, because {step.requires} failed")
            continue
        result = step.run()
        if not result.ok:
            failures.add(step.name)
        yield result
