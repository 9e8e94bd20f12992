"""The host itself: whose package is installed, what is patched, and whether there is a directory for the buffer."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import z4j_bare
from z4j_bare.buffer import files as paths
from z4j_bare.buffer.store import BufferStore
from z4j_bare.concurrency import choose, detect
from z4j_bare.diagnostics.result import ProbeResult, failed, passed, warned
from z4j_bare.errors import HostConfigurationError, LocalStorageError

#: What our versions say after the plus sign.
MARK = "+green."

#: The task queues that z4j knows.
ENGINES = ("celery", "rq", "dramatiq", "huey", "arq", "taskiq")

#: Packages whose versions a report is incomplete without.
PACKAGES = ("z4j-bare", "z4j-core", "gevent", "eventlet", "websocket-client", *ENGINES)

#: Bytes of room under which a buffer of the usual size would fill the disk.
LITTLE_ROOM = 256 * 1024 * 1024


def probe_package(found: Sequence[Distribution] | None = None) -> ProbeResult:
    """Tell whether the ``z4j_bare`` in use is this one, and the only one installed.

    :param found: the distributions to look among; default: everything on ``sys.path``.
    """
    ours = [
        each for each in (distributions() if found is None else found) if _name(each) == "z4j-bare"
    ]
    fix = "pip install --force-reinstall 'z4j-bare==<version>+green.<n>', and pin it in a constraints file"
    versions = sorted({each.version for each in ours})
    details = {"versions": versions, "path": str(Path(z4j_bare.__file__).parent)}
    if not ours:
        return failed(
            "package",
            "z4j-bare is not installed: its files lie on the path without metadata",
            fix,
            **details,
        )
    if len(versions) > 1:
        return failed(
            "package",
            f"several releases are installed side by side ({', '.join(versions)})",
            fix,
            **details,
        )
    if MARK not in versions[0]:
        return failed(
            "package", f"z4j-bare {versions[0]} is the asyncio agent, not this one", fix, **details
        )
    return passed("package", f"z4j-bare {versions[0]}", **details)


def probe_versions() -> ProbeResult:
    """List what is installed; it cannot fail."""
    found = dict(installed_versions())
    python = platform.python_version()
    text = ", ".join(f"{name} {number}" for name, number in found.items() if name != "z4j-bare")
    return passed("versions", f"Python {python}, {text}", python=python, packages=found)


def installed_versions() -> Iterator[tuple[str, str]]:
    """Yield name and version of each package that matters and is installed, adapters included."""
    adapters = sorted(
        {_name(each) for each in distributions() if _name(each).startswith("z4j-")} - set(PACKAGES)
    )
    for name in (*PACKAGES, *adapters):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def probe_concurrency(setting: str = "auto") -> ProbeResult:
    """Tell what carries the agent in this process, and whether it is patched by half."""
    found = detect()
    details: dict[str, Any] = {
        "library": found.library,
        "thread": found.thread,
        "socket": found.socket,
    }
    fix = f"call {found.library or 'gevent'}'s full monkey patch before anything else is imported"
    if found.outcome == "partial":
        done, left = ("threads", "sockets") if found.thread else ("sockets", "threads")
        return failed(
            "concurrency", f"{found.library} has patched {done} but not {left}", fix, **details
        )
    try:
        name = choose(setting, found)
    except HostConfigurationError as error:
        return failed("concurrency", str(error), "set Z4J_CONCURRENCY to auto", **details)
    how = (
        "nothing is patched"
        if found.outcome == "none"
        else f"{found.library} has patched threads and sockets"
    )
    return passed("concurrency", f"{name}: {how}", chosen=name, **details)


def probe_buffer_path(buffer_path: str | os.PathLike[str]) -> ProbeResult:
    """Make a real store in the buffer's directory, and remove it."""
    directory = Path(buffer_path).parent
    try:
        directory = paths.absolute(buffer_path).parent
        BufferStore(paths.new_store_path(buffer_path), deployment="doctor").close()
    except LocalStorageError as error:
        return _no_buffer(directory, error)
    room = shutil.disk_usage(directory).free
    details = {"path": str(directory), "free_bytes": room}
    if room < LITTLE_ROOM:
        fix = "make room, or lower Z4J_BUFFER_MAX_BYTES"
        return warned("buffer_path", f"{directory} has {room >> 20} MiB left", fix, **details)
    return passed("buffer_path", f"{directory} takes a buffer", **details)


def _no_buffer(directory: Path, error: LocalStorageError) -> ProbeResult:
    other = next(
        (place for place in paths.candidate_directories(directory / "x")[1:] if _serves(place)),
        None,
    )
    fix = f"point Z4J_HOME at a directory of uid {os.geteuid()} alone, writable, on a local file system"
    details = {
        "path": str(directory),
        "uid": os.geteuid(),
        "fallback": str(other or ""),
        "fallback_writable": bool(other),
    }
    return failed("buffer_path", str(error), fix, **details)


def _serves(place: Path) -> bool:
    try:
        BufferStore(paths.new_store_path(place / "x"), deployment="doctor").close()
    except LocalStorageError:
        return False
    return True


def _name(distribution: Distribution) -> str:
    return str(distribution.metadata["Name"] or "").lower().replace("_", "-")
