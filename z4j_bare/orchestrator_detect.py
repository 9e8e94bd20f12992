"""Whether something starts this process again when it ends: the condition for ending it on an operator's word.

Environment variables alone prove nothing: a terminal of a desktop session has ``INVOCATION_ID``, a developer's shell may
have ``KUBERNETES_SERVICE_HOST``. So each sign has to be borne out by where this process stands: pid, parent, cgroup.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: What an operator says, in ``Z4J_ORCHESTRATED`` or by making the file.
_YES, _NO = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
MARKER = "etc/z4j-orchestrated"

#: Files that container engines make, by engine.
_FILES = {".dockerenv": "docker", "run/.containerenv": "podman"}

#: Words in the cgroups of v1, and in the mounts under cgroup v2, where a container sees its own cgroup as ``/``.
_CGROUPS = {
    "kubepods": "kubernetes",
    "libpod": "podman",
    "docker": "docker",
    "crio": "cri-o",
    "containerd": "containerd",
}
_MOUNTS = {
    "/kubelet/pods/": "kubernetes",
    "/docker/containers/": "docker",
    "/overlay-containers/": "podman",
    "/crio/": "cri-o",
    "/containerd/": "containerd",
}

#: Programs that are pid 1 in a container for no more than to pass signals on; when their child ends, they do.
_INITS = frozenset({"tini", "dumb-init", "docker-init", "catatonit", "pause", "s6-svscan"})

#: Programs whose worker processes are their children: those that start a new one, and those that end with it.
_MANAGERS = frozenset({"taskiq", "gunicorn"})
_MASTERS = frozenset({"dramatiq", "dramatiq-gevent"})


@dataclass(frozen=True, slots=True)
class OrchestratorDetection:
    """Whether somebody starts us again, and by what we know that."""

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
    """Look for what would start this process again; reads a few small files, never raises.

    :param fs_marker_override: the container's name in place of what the files under ``root`` say.
    :param probe_filesystem: without it, only ``Z4J_ORCHESTRATED`` and pid 1 count.

    ``Z4J_ORCHESTRATED`` decides where it is set, the file ``/etc/z4j-orchestrated`` after it. Else it takes a container,
    systemd or supervisord whose direct child this process is, or the master of this process.
    """
    env = os.environ if env is None else env
    wish = env.get("Z4J_ORCHESTRATED", "").strip().lower()
    if wish in _NO:
        return OrchestratorDetection(False, f"Z4J_ORCHESTRATED={wish}")
    if wish in _YES:
        return OrchestratorDetection(True, f"Z4J_ORCHESTRATED={wish}")
    place = _ProcessContext(os.getpid() if pid is None else pid, env, root)
    found = place.supervisor(fs_marker_override) if probe_filesystem else None
    if found is None and place.pid == 1:
        found = "pid 1"
    return OrchestratorDetection(found is not None, found)


class _ProcessContext:
    """Where a process stands, by ``/proc`` and what container engines leave."""

    def __init__(self, pid: int, env: Mapping[str, str], root: Path) -> None:
        self.pid = pid
        self._env = env
        self._root = root

    def supervisor(self, container: str | None) -> str | None:
        """Return a label for whatever starts this process again, ``None`` where there is nothing."""
        if self._exists(MARKER):
            return f"/{MARKER}"
        return (
            self.container(container)
            or self.systemd()
            or self.supervisord()
            or self.master(container)
        )

    def container(self, known: str | None) -> str | None:
        """Return a label when this is the process for which a container runs."""
        kind = known or self._engine()
        if not kind:
            return None
        if "KUBERNETES_SERVICE_HOST" in self._env:
            kind = "kubernetes"
        parent = self._parent()
        # Where a pod's containers share their pids, each one's first process has a parent that it cannot see.
        first = self.pid == 1 or (parent == 0 and kind == "kubernetes")
        if first or (parent == 1 and self._read("proc/1/comm").strip() in _INITS):
            return f"{kind}, pid {self.pid}"
        return None

    def systemd(self) -> str | None:
        """Return a label when systemd started this very process as a service, not a session's shell."""
        unit = self._read(f"proc/{self.pid}/cgroup").rstrip().rpartition("/")[2]
        if (
            not unit.endswith(".service")
            or not {"INVOCATION_ID", "NOTIFY_SOCKET"} & self._env.keys()
        ):
            return None
        by_systemd = self._read(f"proc/{self._parent()}/comm").strip() == "systemd"
        return (
            f"systemd, {unit}"
            if by_systemd or self._env.get("SYSTEMD_EXEC_PID") == str(self.pid)
            else None
        )

    def supervisord(self) -> str | None:
        """Return a label when our parent is supervisord."""
        if not {"SUPERVISOR_ENABLED", "SUPERVISOR_PROCESS_NAME"} & self._env.keys():
            return None
        if "supervisord" not in self._read(f"proc/{self._parent()}/cmdline"):
            return None
        return f"supervisord, {self._env.get('SUPERVISOR_PROCESS_NAME', 'unnamed')}"

    def master(self, container: str | None) -> str | None:
        """Return a label when our parent minds its workers, or ends with them and has somebody who minds it."""
        parent = self._parent()
        names = {Path(word).stem for word in self._read(f"proc/{parent}/cmdline").split("\0")[:3]}
        if kept := sorted(names & _MANAGERS):
            return f"{kept[0]}, pid {parent}"
        return (
            _ProcessContext(parent, self._env, self._root).supervisor(container)
            if names & _MASTERS
            else None
        )

    def _exists(self, path: str) -> bool:
        try:
            return (self._root / path).exists()
        except OSError:
            return False

    def _engine(self) -> str | None:
        """Return which container engine runs us."""
        for path, engine in _FILES.items():
            if self._exists(path):
                return engine
        for path, words in (
            ("proc/self/cgroup", _CGROUPS),
            ("proc/1/cgroup", _CGROUPS),
            ("proc/self/mountinfo", _MOUNTS),
        ):
            text = self._read(path)
            for word, engine in words.items():
                if word in text:
                    return engine
        return None

    def _parent(self) -> int:
        """Return the parent's pid, -1 when it is not to be learned."""
        # The name in the second field may contain anything, brackets and spaces included.
        fields = self._read(f"proc/{self.pid}/stat").rpartition(")")[2].split()
        return int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else -1

    def _read(self, path: str) -> str:
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
