"""Probes of this host: packages, monkey-patching, the buffer's directory, running agents."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import z4j_bare
from z4j_bare import control
from z4j_bare.buffer import files
from z4j_bare.buffer.existing_agent import (
    ExistingBufferReport,
    list_existing_buffers,
    read_existing_buffer,
)
from z4j_bare.buffer.store import BufferStore
from z4j_bare.concurrency import choose, detect
from z4j_bare.diagnostics.result import ProbeResult, failed, passed, skipped, warned
from z4j_bare.errors import HostConfigurationError, LocalStorageError
from z4j_bare.home import replacement
from z4j_bare.monitoring.duplicate_agents import workers_of

#: Start of the local version label. The version of every release of this package contains it.
VERSION_LABEL = "+green."

#: Task queues for which z4j has adapters.
ENGINES = ("celery", "rq", "dramatiq", "huey", "arq", "taskiq")

#: Packages whose versions :func:`probe_versions` lists, because a bug report needs the versions.
PACKAGES = ("z4j-bare", "z4j-core", "gevent", "eventlet", "websocket-client", *ENGINES)

#: :func:`probe_buffer_path` warns if fewer bytes of disk space are free, because a buffer of the
#: default maximum size (256 MiB) could then fill the disk.
MIN_FREE_BYTES = 256 * 1024 * 1024

#: An agent's answer to ``status``, with ``adapter`` and ``pid`` added.
#: An agent that did not answer has ``adapter``, ``pid`` and ``error``.
AgentStatus = dict[str, Any]


def probe_package(installed: Sequence[Distribution] | None = None) -> ProbeResult:
    """Check that this package, and no other release of z4j-bare, is installed.

    :param installed: the distributions to search, by default all distributions on ``sys.path``.
    """
    releases = [
        each
        for each in (distributions() if installed is None else installed)
        if _name(each) == "z4j-bare"
    ]
    versions = sorted({each.version for each in releases})
    if not releases:
        problem = "z4j-bare is not installed: its files are on the path, but not its metadata"
    elif len(versions) > 1:
        problem = f"several releases are installed side by side ({', '.join(versions)})"
    elif VERSION_LABEL not in versions[0]:
        problem = f"z4j-bare {versions[0]} is the asyncio agent, not this package"
    else:
        problem = ""
    details = {"versions": versions, "path": str(Path(z4j_bare.__file__).parent)}
    if problem:
        fix = (
            "pip install --force-reinstall 'z4j-bare==<version>+green.<n>', "
            "and pin it in a constraints file"
        )
        return failed("package", problem, fix, **details)
    return passed("package", f"z4j-bare {versions[0]}", **details)


def probe_versions() -> ProbeResult:
    """List the versions of Python and of the installed packages. This probe cannot fail."""
    packages = dict(installed_versions())
    python = platform.python_version()
    text = ", ".join(f"{name} {number}" for name, number in packages.items() if name != "z4j-bare")
    return passed("versions", f"Python {python}, {text}", python=python, packages=packages)


def installed_versions() -> Iterator[tuple[str, str]]:
    """Yield name and version of each installed package of :data:`PACKAGES`, then of adapters."""
    adapters = sorted(
        {_name(each) for each in distributions() if _name(each).startswith("z4j-")} - set(PACKAGES)
    )
    for name in (*PACKAGES, *adapters):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def probe_concurrency(setting: str = "auto") -> ProbeResult:
    """Check whether monkey-patching is complete; name the backend that an agent would use.

    :param setting: value of ``Z4J_CONCURRENCY``.
    """
    detection = detect()
    details: dict[str, Any] = {
        "library": detection.library,
        "thread": detection.thread,
        "socket": detection.socket,
    }
    if detection.outcome == "partial":
        patched, missing = ("threads", "sockets") if detection.thread else ("sockets", "threads")
        cause = f"{detection.library} has patched {patched} but not {missing}"
        fix = f"call {detection.library}'s full monkey patch before any other import"
        return failed("concurrency", cause, fix, **details)
    try:
        name = choose(setting, detection)
    except HostConfigurationError as error:
        return failed("concurrency", str(error), "set Z4J_CONCURRENCY to auto", **details)
    reason = "nothing is patched"
    if detection.outcome != "none":
        reason = f"{detection.library} has patched threads and sockets"
    return passed("concurrency", f"{name}: {reason}", chosen=name, **details)


def probe_buffer_path(buffer_path: str | os.PathLike[str]) -> ProbeResult:
    """Create and delete a store in the buffer's directory, and check the free disk space.

    :param buffer_path: path of the buffer. The probe uses only the directory of the path.
    """
    directory = Path(buffer_path).parent
    try:
        directory = files.absolute(buffer_path).parent
        BufferStore(files.new_store_path(buffer_path), deployment="doctor").close()
    except LocalStorageError as error:
        return _unusable_directory(directory, error)
    free = shutil.disk_usage(directory).free
    details = {"path": str(directory), "free_bytes": free}
    replaced = replacement()
    if replaced is not None and directory == replaced.directory:
        problem = replaced.notice.partition(". ")[0]
        return warned("buffer_path", problem, _fix_home(), **details)
    if free < MIN_FREE_BYTES:
        fix = "free disk space, or lower Z4J_BUFFER_MAX_BYTES"
        cause = f"only {free >> 20} MiB are free in {directory}"
        return warned("buffer_path", cause, fix, **details)
    return passed("buffer_path", f"a buffer can be created in {directory}", **details)


def _unusable_directory(directory: Path, error: LocalStorageError) -> ProbeResult:
    candidates = files.candidate_directories(directory / "x")[1:]
    fallback = next((each for each in candidates if _is_usable(each)), None)
    details = {
        "path": str(directory),
        "uid": os.geteuid(),
        "fallback": str(fallback or ""),
        "fallback_writable": bool(fallback),
    }
    return failed("buffer_path", str(error), _fix_home(), **details)


def _fix_home() -> str:
    return (
        "set Z4J_HOME to a directory on a local file system "
        f"that only uid {os.geteuid()} can read and write"
    )


def _is_usable(directory: Path) -> bool:
    try:
        BufferStore(files.new_store_path(directory / "x"), deployment="doctor").close()
    except LocalStorageError:
        return False
    return True


def probe_existing_buffers(
    buffer_path: str | os.PathLike[str], digest: str | None
) -> ProbeResult | None:
    """Search for events in the buffers of the existing agent.

    Returns ``None`` if the buffers contain no events.

    :param buffer_path: path of the buffer. The probe uses only the directory of the path.
    :param digest: the digest of the project's key; ``None`` if the key is not known.
    """
    try:
        reports = [
            read_existing_buffer(path, digest) for path in list_existing_buffers(buffer_path)
        ]
    except (OSError, LocalStorageError) as error:
        return skipped("leftovers", f"cannot read the buffer's directory ({error})")
    left = [each for each in reports if not each.running and (each.events or each.problem)]
    if not left:
        return None
    cause = "the existing agent left " + "; ".join(map(_describe_buffer, left))
    fix = "z4j-bare buffer flush sends the events; an agent that starts here sends them too"
    if all(each.problem for each in left):
        fix = (
            "start the agent that wrote the file, with its key, or delete the file with "
            "z4j-bare buffer drop NAME"
        )
    details = {str(each.path): {"events": each.events, "problem": each.problem} for each in left}
    return warned("leftovers", cause, fix, buffers=details)


def _describe_buffer(report: ExistingBufferReport) -> str:
    text = f"{report.events} unsent event frames in {report.path}"
    return f"{text} ({report.problem})" if report.problem else text


def probe_agents(project: str) -> ProbeResult:
    """Check that every agent of this ``Z4J_HOME`` answers and is connected.

    The probe also warns if two agents report the same worker, if an agent's broker does not answer,
    or if an agent advises a change of its process. Only the first problem is reported.

    :param project: the project whose agents are checked.
    """
    try:
        statuses = control.status()
    except OSError as error:
        return skipped("agents", f"cannot read Z4J_HOME ({error.strerror})")
    agents = [agent for agent in statuses if "error" in agent or agent.get("project") == project]
    if not agents:
        return passed("agents", "no agent is running")
    pids: dict[str, Any] = {"pids": [agent["pid"] for agent in agents]}
    for check in (
        _check_answers,
        _check_duplicates,
        _check_connections,
        _check_brokers,
        _check_advice,
    ):
        problem = check(agents)
        if problem is not None:
            return warned("agents", *problem, **pids)
    return passed("agents", f"{len(agents)} connected", **pids)


def duplicated_workers(agents: Sequence[AgentStatus]) -> dict[str, list[int]]:
    """Return the workers that several agents report, with the pids of these agents."""
    reporters: dict[str, list[int]] = {}
    for agent in agents:
        for worker in workers_of(agent):
            reporters.setdefault(worker, []).append(agent["pid"])
    return {worker: pids for worker, pids in sorted(reporters.items()) if len(pids) > 1}


def _check_answers(agents: Sequence[AgentStatus]) -> tuple[str, str] | None:
    """Return cause and fix if an agent does not answer."""
    silent = [agent for agent in agents if "error" in agent]
    if not silent:
        return None
    cause = "; ".join(
        f"process {agent['pid']} does not answer ({agent['error']})" for agent in silent
    )
    return cause, (
        "check whether the process is stopped, its event loop is blocked, or another user owns it"
    )


def _check_duplicates(agents: Sequence[AgentStatus]) -> tuple[str, str] | None:
    """Return cause and fix if several agents report the same worker."""
    duplicates = duplicated_workers(agents)
    if not duplicates:
        return None
    cause = "; ".join(
        f"{worker} is reported by processes {', '.join(map(str, pids))}"
        for worker, pids in duplicates.items()
    )
    return cause, (
        "each event arrives twice: stop the standalone agent, or remove the agent from the worker"
    )


def _check_connections(agents: Sequence[AgentStatus]) -> tuple[str, str] | None:
    """Return cause and fix if an agent has no session."""
    unconnected = [agent for agent in agents if not agent.get("connected")]
    if not unconnected:
        return None
    cause = "; ".join(
        f"process {agent['pid']} has no session ({agent.get('last_error') or 'connecting'})"
        for agent in unconnected
    )
    return cause, "the agent buffers events and retries; the next probes show why it cannot connect"


def broker_problem(agent: AgentStatus) -> str:
    """Return why an agent's broker is unreachable; ``""`` if it answers or was not checked."""
    health = agent.get("health", {})
    return "; ".join(
        f"broker: {health.get(f'{engine}.broker_error', '')}"
        for engine, _, name in (key.rpartition(".") for key in health)
        if name == "broker_connected" and health[f"{engine}.{name}"] == "False"
    )


def _check_brokers(agents: Sequence[AgentStatus]) -> tuple[str, str] | None:
    """Return cause and fix if an agent cannot reach its broker."""
    problems = {agent["pid"]: problem for agent in agents if (problem := broker_problem(agent))}
    if not problems:
        return None
    cause = "; ".join(f"process {pid} ({problem})" for pid, problem in problems.items())
    return f"no task can arrive in {cause}", (
        "check whether the broker runs, the network to it, and its address (for Celery: broker_url)"
    )


def _check_advice(agents: Sequence[AgentStatus]) -> tuple[str, str] | None:
    """Return cause and fix if an agent advises a change of its process."""
    found: dict[str, list[int]] = {}
    for agent in agents:
        for advice in agent.get("advice", ()):
            found.setdefault(advice, []).append(agent["pid"])
    if not found:
        return None
    advice, pids = next(iter(found.items()))
    cause, _, fix = advice.partition(". ")
    return f"process {', '.join(map(str, pids))}: {cause}", fix[:1].lower() + fix[1:]


#: The checks of the running agents. The first problem is reported.
_AGENT_CHECKS = (
    _check_answers,
    _check_duplicates,
    _check_connections,
    _check_brokers,
    _check_advice,
)


def _name(distribution: Distribution) -> str:
    return str(distribution.metadata["Name"] or "").lower().replace("_", "-")
