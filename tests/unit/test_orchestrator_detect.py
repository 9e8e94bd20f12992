"""Orchestrator detection from a fake /proc, container engines' files, and the environment."""

import os

import pytest

from z4j_bare.orchestrator_detect import OrchestratorDetection, detect_orchestrator

V1 = "12:pids:/docker/3f9ad1\n11:cpu:/docker/3f9ad1\n"
SERVICE = "0::/system.slice/celery.service\n"
SESSION = "0::/user.slice/user-1000.slice/session-3.scope\n"
HIDDEN = "0::/\n"  # A container's view of its own cgroup under cgroup v2.

DOCKER_MOUNT = "/containers/3f/hosts /etc/hosts\n"
POD_MOUNT = "/pods/1/etc-hosts /etc/hosts\n"


def make_root(root, pid=1, parent=0, **files):
    """Create ``proc/<pid>/stat`` and other files below ``root``.

    In a name a double underscore stands for a slash, and ``mine`` for ``proc/<pid>``.
    """
    made = {
        f"proc/{pid}/stat": f"{pid} (a name) with) S {parent} 1 1",
        **{name.replace("__", "/"): text for name, text in files.items()},
    }
    for name, text in made.items():
        path = root / name.replace("mine", f"proc/{pid}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def detect(root, pid=1, **env):
    return detect_orchestrator(pid=pid, env=env, root=root)


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ({".dockerenv": ""}, "docker, pid 1"),
        ({"run__.containerenv": ""}, "podman, pid 1"),
        ({"proc__self__cgroup": V1}, "docker, pid 1"),
        ({"proc__1__cgroup": "4:cpu:/kubepods/burstable/pod1/abc\n"}, "kubernetes, pid 1"),
        ({"proc__self__cgroup": "4:cpu:/machine.slice/libpod-1.scope\n"}, "podman, pid 1"),
        ({"proc__self__cgroup": "4:cpu:/system.slice/containerd.service/x\n"}, "containerd, pid 1"),
        (
            {
                "proc__self__cgroup": HIDDEN,
                "proc__self__mountinfo": f"1 /var/lib/docker{DOCKER_MOUNT}",
            },
            "docker, pid 1",
        ),
        (
            {
                "proc__self__cgroup": HIDDEN,
                "proc__self__mountinfo": f"1 /var/lib/kubelet{POD_MOUNT}",
            },
            "kubernetes, pid 1",
        ),
        (
            {
                "proc__self__cgroup": HIDDEN,
                "proc__self__mountinfo": "1 /x/overlay-containers/1/hosts\n",
            },
            "podman, pid 1",
        ),
        (
            {
                "proc__self__cgroup": HIDDEN,
                "proc__self__mountinfo": "1 /run/containerd/io.containerd/1\n",
            },
            "containerd, pid 1",
        ),
    ],
)
def test_container_engine_is_detected(tmp_path, files, label):
    """Each container engine is detected by its file, its cgroup (v1) or its mounts (v2)."""
    assert detect(make_root(tmp_path, **files)) == OrchestratorDetection(True, label)


def test_only_main_process_of_container_is_orchestrated(tmp_path):
    """A container's first process, or the child of its init, counts; other processes do not."""
    assert (
        detect(
            make_root(tmp_path / "a", 7, 1, **{".dockerenv": "", "proc__1__comm": "tini\n"}), 7
        ).signal
        == "docker, pid 7"
    )
    assert not detect(
        make_root(tmp_path / "b", 7, 1, **{".dockerenv": "", "proc__1__comm": "bash\n"}), 7
    ).detected
    assert not detect(
        make_root(tmp_path / "c", 7, 0, **{".dockerenv": ""}), 7
    ).detected  # docker exec
    shared = make_root(tmp_path / "d", 7, 0, **{".dockerenv": ""})
    assert detect(shared, 7, KUBERNETES_SERVICE_HOST="10.0.0.1").signal == "kubernetes, pid 7"


def test_kubernetes_variable_without_container_does_not_count(tmp_path):
    """A developer's shell with the cluster's variables is not a pod."""
    assert detect(
        make_root(tmp_path, 77, 70, mine__cgroup=SESSION), 77, KUBERNETES_SERVICE_HOST="10.0.0.1"
    ) == OrchestratorDetection(False, None)


def test_main_process_of_systemd_service_is_orchestrated(tmp_path):
    """A service's main process counts; a session's shell and a service's grandchild do not."""
    root = make_root(tmp_path / "a", 50, 1, mine__cgroup=SERVICE, proc__1__comm="systemd\n")
    assert detect(root, 50, INVOCATION_ID="x") == OrchestratorDetection(
        True, "systemd, celery.service"
    )
    assert detect(root, 50, NOTIFY_SOCKET="/run/x").detected
    assert not detect(root, 50).detected
    assert not detect(
        make_root(tmp_path / "b", 50, 1, mine__cgroup=SESSION, proc__1__comm="systemd\n"),
        50,
        INVOCATION_ID="x",
    ).detected
    grandchild = make_root(tmp_path / "c", 50, 40, mine__cgroup=SERVICE, proc__40__comm="sh\n")
    assert not detect(grandchild, 50, INVOCATION_ID="x").detected
    assert detect(grandchild, 50, INVOCATION_ID="x", SYSTEMD_EXEC_PID="50").detected


def test_child_of_supervisord_is_orchestrated(tmp_path):
    """A child of supervisord counts; a process that only inherited its variables does not."""
    root = make_root(
        tmp_path / "a", 50, 40, proc__40__cmdline="/usr/bin/python3\0/usr/bin/supervisord\0-n\0"
    )
    assert (
        detect(root, 50, SUPERVISOR_ENABLED="1", SUPERVISOR_PROCESS_NAME="worker").signal
        == "supervisord, worker"
    )
    assert not detect(root, 50).detected
    assert not detect(
        make_root(tmp_path / "b", 50, 40, proc__40__cmdline="bash\0"), 50, SUPERVISOR_ENABLED="1"
    ).detected


def test_worker_of_restarting_parent_is_orchestrated(tmp_path):
    """A worker counts if its parent restarts it, or exits with it and is itself restarted."""
    taskiq = make_root(
        tmp_path / "a",
        50,
        40,
        proc__40__cmdline="/usr/bin/python\0/usr/bin/taskiq\0worker\0shop:broker\0",
    )
    assert detect(taskiq, 50) == OrchestratorDetection(True, "taskiq, pid 40")
    dramatiq = {"proc__40__cmdline": "/usr/bin/python\0/usr/bin/dramatiq\0shop\0"}
    root = make_root(
        tmp_path / "b",
        50,
        40,
        **dramatiq,
        proc__40__stat="40 (dramatiq) S 30",
        proc__30__cmdline="supervisord\0",
    )
    assert (
        detect(root, 50, SUPERVISOR_ENABLED="1", SUPERVISOR_PROCESS_NAME="d").signal
        == "supervisord, d"
    )
    assert not detect(
        make_root(tmp_path / "c", 50, 40, **dramatiq, proc__40__stat="40 (dramatiq) S 30"), 50
    ).detected
    inside = make_root(
        tmp_path / "d",
        8,
        1,
        **{".dockerenv": ""},
        proc__1__cmdline="dramatiq\0shop\0",
        proc__1__stat="1 (dramatiq) S 0",
    )
    assert detect(inside, 8).signal == "docker, pid 1"


def test_override_and_marker_precede_detection(tmp_path):
    """Z4J_ORCHESTRATED takes precedence over the marker file, and that over the detection."""
    docker = make_root(tmp_path, **{".dockerenv": "", "etc__z4j-orchestrated": ""})
    for no in ("0", "false", "No", " off "):
        assert detect(docker, Z4J_ORCHESTRATED=no) == OrchestratorDetection(
            False, f"Z4J_ORCHESTRATED={no.strip().lower()}"
        )
    assert detect(tmp_path / "nothing", 5, Z4J_ORCHESTRATED="yes").detected
    assert detect(docker).signal == "/etc/z4j-orchestrated"
    assert (
        detect_orchestrator(
            pid=1, env={}, fs_marker_override="lxc", root=tmp_path / "nothing"
        ).signal
        == "lxc, pid 1"
    )


def test_detection_without_filesystem_uses_pid_and_override(tmp_path):
    """With probe_filesystem off only pid 1 and Z4J_ORCHESTRATED count."""
    assert detect_orchestrator(pid=1, env={}, probe_filesystem=False) == OrchestratorDetection(
        True, "pid 1"
    )
    assert not detect_orchestrator(
        pid=2, env={}, probe_filesystem=False, root=make_root(tmp_path, **{".dockerenv": ""})
    ).detected


@pytest.mark.parametrize("stat", ["", "1", "1 (x", "1 (x) S what", "\udcff(\udcff) \udcff"])
def test_malformed_proc_is_not_orchestrated(tmp_path, stat):
    """A malformed or missing /proc file never raises and does not count."""
    root = make_root(tmp_path, 9, 1, **{".dockerenv": ""})
    (root / "proc/9/stat").write_bytes(os.fsencode(stat))
    assert not detect(root, 9, INVOCATION_ID="x", SUPERVISOR_ENABLED="1").detected


def test_detection_reads_real_files(monkeypatch):
    """The real files of this machine can be read without an error."""
    monkeypatch.delenv("Z4J_ORCHESTRATED")
    assert isinstance(detect_orchestrator().detected, bool)
