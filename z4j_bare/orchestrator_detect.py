"""Detects whether this process would be restarted after an exit, as restart commands require."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Values of ``Z4J_ORCHESTRATED`` that override the detection.
_YES, _NO = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})

#: Path below ``/`` of a file that declares every process of this host as orchestrated.
MARKER = "etc/z4j-orchestrated"

#: Maps a file that a container engine creates to the engine's name.
_FILES = {".dockerenv": "docker", "run/.containerenv": "podman"}

#: Maps a substring of a cgroup v1 path to the name of the container engine.
_CGROUPS = {
    "kubepods": "kubernetes",
    "libpod": "podman",
    "docker": "docker",
    "crio": "cri-o",
    "containerd": "containerd",
}

#: Maps a substring of the mount table to the name of the container engine.
#: The mount table is needed for cgroup v2, because the cgroup path in a container is ``/`` there.
_MOUNTS = {
    "/kubelet/pods/": "kubernetes",
    "/docker/containers/": "docker",
    "/overlay-containers/": "podman",
    "/crio/": "cri-o",
    "/containerd/": "containerd",
}

#: Programs that run as pid 1 in a container and exit when their child exits.
_INITS = frozenset({"tini", "dumb-init", "docker-init", "catatonit", "pause", "s6-svscan"})

#: Parents that replace a worker process that exits.
_RESTARTING_PARENTS = frozenset({"taskiq", "gunicorn"})

#: Parents that exit when a worker process exits.
_EXITING_PARENTS = frozenset({"dramatiq", "dramatiq-gevent"})


@dataclass(frozen=True, slots=True)
class OrchestratorDetection:
    """Whether this process is started again when it exits. ``signal`` is the evidence."""

    detected: bool
    signal: str | None


def detect_orchestrator(
    *,
    pid: int | None = None,
    env: Mapping[str, str] | None = None,
    fs_marker_override: str | None = None,
    probe_filesystem: bool = True,
    root: Path = Path("/"),
) -> OrchestratorDetection:
    """Detect what restarts this process when it exits. Reads a few small files. Never raises.

    The variable ``Z4J_ORCHESTRATED`` and then the file ``/etc/z4j-orchestrated`` override the
    detection. Without an override, a restart is expected for the first process of a container, and
    for a child of systemd, supervisord or a parent that restarts its workers.

    Other environment variables are not sufficient evidence: a terminal of a desktop session has
    ``INVOCATION_ID``, and a developer's shell may have ``KUBERNETES_SERVICE_HOST``. Such a variable
    must agree with the pid, the parent or the cgroup of this process.

    :param pid: the process to examine, the current one by default.
    :param env: the environment, ``os.environ`` by default.
    :param fs_marker_override: the name of the container engine; ``None`` detects it.
    :param probe_filesystem: if false, only ``Z4J_ORCHESTRATED`` and pid 1 count.
    :param root: the directory that contains ``proc``, ``etc`` and ``run``.
    """
    env = os.environ if env is None else env
    override = env.get("Z4J_ORCHESTRATED", "").strip().lower()
    if override in _NO:
        return OrchestratorDetection(False, f"Z4J_ORCHESTRATED={override}")
    if override in _YES:
        return OrchestratorDetection(True, f"Z4J_ORCHESTRATED={override}")
    context = _ProcessContext(os.getpid() if pid is None else pid, env, root)
    evidence = context.orchestrator(fs_marker_override) if probe_filesystem else None
    if evidence is None and context.pid == 1:
        evidence = "pid 1"
    return OrchestratorDetection(evidence is not None, evidence)


class _ProcessContext:
    """The parent, cgroup and container of a process, read from the file system."""

    def __init__(self, pid: int, env: Mapping[str, str], root: Path) -> None:
        self.pid = pid
        self._env = env
        self._root = root

    def orchestrator(self, container: str | None) -> str | None:
        """Return the name of the program that restarts this process, or ``None``."""
        if self._exists(MARKER):
            return f"/{MARKER}"
        return (
            self.container(container)
            or self.systemd()
            or self.supervisord()
            or self.parent_program(container)
        )

    def container(self, known: str | None) -> str | None:
        """Return the container engine and the pid if this is the main process of a container."""
        engine = known or self._container_engine()
        if not engine:
            return None
        if "KUBERNETES_SERVICE_HOST" in self._env:
            engine = "kubernetes"
        parent = self._parent()
        # In a pod with a shared pid namespace, a container's first process has the parent pid 0,
        # because the parent is outside the namespace.
        first = self.pid == 1 or (parent == 0 and engine == "kubernetes")
        if first or (parent == 1 and self._read("proc/1/comm").strip() in _INITS):
            return f"{engine}, pid {self.pid}"
        return None

    def systemd(self) -> str | None:
        """Return the unit if systemd started this process as a service."""
        unit = self._read(f"proc/{self.pid}/cgroup").rstrip().rpartition("/")[2]
        if not unit.endswith(".service"):
            return None
        if not {"INVOCATION_ID", "NOTIFY_SOCKET"} & self._env.keys():
            return None
        by_systemd = self._read(f"proc/{self._parent()}/comm").strip() == "systemd"
        if by_systemd or self._env.get("SYSTEMD_EXEC_PID") == str(self.pid):
            return f"systemd, {unit}"
        return None

    def supervisord(self) -> str | None:
        """Return the name that supervisord gives this process, if it is the parent."""
        if not {"SUPERVISOR_ENABLED", "SUPERVISOR_PROCESS_NAME"} & self._env.keys():
            return None
        if "supervisord" not in self._read(f"proc/{self._parent()}/cmdline"):
            return None
        return f"supervisord, {self._env.get('SUPERVISOR_PROCESS_NAME', 'unnamed')}"

    def parent_program(self, container: str | None) -> str | None:
        """Return the parent if it replaces this process; if it exits, return what restarts it."""
        parent = self._parent()
        names = {Path(word).stem for word in self._read(f"proc/{parent}/cmdline").split("\0")[:3]}
        if programs := sorted(names & _RESTARTING_PARENTS):
            return f"{programs[0]}, pid {parent}"
        if names & _EXITING_PARENTS:
            return _ProcessContext(parent, self._env, self._root).orchestrator(container)
        return None

    def _exists(self, path: str) -> bool:
        try:
            return (self._root / path).exists()
        except OSError:
            return False

    def _container_engine(self) -> str | None:
        """Return the name of the container engine that runs this process."""
        for path, engine in _FILES.items():
            if self._exists(path):
                return engine
        for path, substrings in (
            ("proc/self/cgroup", _CGROUPS),
            ("proc/1/cgroup", _CGROUPS),
            ("proc/self/mountinfo", _MOUNTS),
        ):
            text = self._read(path)
            for substring, engine in substrings.items():
                if substring in text:
                    return engine
        return None

    def _parent(self) -> int:
        """Return the parent's pid, or -1 if it is unknown."""
        # Split after the last bracket, because the process name in brackets may contain brackets.
        fields = self._read(f"proc/{self.pid}/stat").rpartition(")")[2].split()
        return int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else -1

    def _read(self, path: str) -> str:
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
