"""Every example of docs/deploy is taken by the tool that it is for, and keeps the rules that its README states."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from z4j_bare.cli import configuration
from z4j_bare.cli.adapters import ENGINES, SCHEDULERS, known
from z4j_bare.cli.main import build_parser

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"


def tool(name):
    """The program of that name: this environment's, or the system's."""
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.exists() else shutil.which(name)
    assert found, f"{name} is missing: tox -e deploy installs what comes from PyPI"
    return found


def run(*command):
    """Run a tool, which has to be content and silent about it."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def understood(words):
    """Have our own command line parse what stands in an example."""
    assert Path(words[0]).name == "z4j-bare"
    return build_parser("z4j-bare", words[1:2]).parse_args(words[1:])


def test_the_readme_knows_every_file():
    """Every file of the directory is in the table, and the other way round."""
    named = set(re.findall(r"^\| \[([^\]]+)\]", (DEPLOY / "README.md").read_text(), re.MULTILINE))
    assert named == {path.name for path in DEPLOY.iterdir()} - {"README.md"}


def test_toml(monkeypatch):
    """The file holds settings that exist, and adapters that do."""
    for name in configuration.known_settings():
        monkeypatch.setenv(f"Z4J_{name.upper()}", "")
    found = configuration.apply(
        understood(["z4j-bare", "run", "--config", str(DEPLOY / "agent.toml")])
    )
    assert [known(name, ENGINES) for name in found.engines] == ["celery"]
    assert [known(name, SCHEDULERS) for name in found.schedulers] == ["celerybeat"]


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="no systemd-analyze here (Debian: apt-get install systemd)",
)
def test_systemd(tmp_path):
    """``systemd-analyze verify`` has nothing to say of the unit, once its program and its user are there."""
    unit = tmp_path / "z4j-bare.service"
    text = (DEPLOY / "z4j-bare.service").read_text()
    assert "/opt/shop/venv/bin/z4j-bare" in text
    unit.write_text(
        text.replace("/opt/shop/venv/bin/z4j-bare", sys.executable).replace(
            "User=shop", "User=root"
        )
    )
    done = run("systemd-analyze", "verify", "--man=no", str(unit))
    said = [
        line for line in done.stderr.splitlines() if "z4j-bare.service" in line
    ]  # not what it finds in the host's own
    assert (done.returncode, said) == (0, [])


def test_systemd_starts_what_there_is():
    """The unit's command line is ours, and it is told which exit codes are not worth another try."""
    unit = (DEPLOY / "z4j-bare.service").read_text()
    understood(shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1]))
    for line in (
        "Type=notify",
        "WatchdogSec=30",
        "RestartPreventExitStatus=2 3",
        "StateDirectoryMode=0700",
    ):
        assert f"\n{line}\n" in unit


def test_supervisord():
    """Supervisor's own parser takes the file, and stops the agent later than its drain."""
    code = (
        "import sys; from supervisor.options import ServerOptions; options = ServerOptions();"
        "options.realize(['-n', '-c', sys.argv[1]]); (group,) = options.process_group_configs; (one,) = group.process_configs;"
        "print(one.command); print(one.stopwaitsecs, one.exitcodes, one.environment['Z4J_HOME'])"
    )
    done = run(sys.executable, "-W", "ignore", "-c", code, str(DEPLOY / "supervisord.conf"))
    assert done.returncode == 0, done.stderr
    command, rest = done.stdout.splitlines()
    understood(shlex.split(command))
    assert rest == "20 [0, 2, 3] /var/lib/z4j/home"


def test_docker():
    """Hadolint has nothing to say, and entry point and health check are commands of ours."""
    path = DEPLOY / "Dockerfile"
    done = run(tool("hadolint"), str(path))
    assert (done.returncode, done.stdout) == (0, "")
    text = path.read_text()
    for words in re.findall(r"^(?:ENTRYPOINT|HEALTHCHECK .* CMD) \[(.*)\]$", text, re.MULTILINE):
        understood(re.findall(r'"([^"]*)"', words))
    assert text.index("\nUSER 10001") < text.index("\nENTRYPOINT")


def test_procfile():
    """``honcho check`` finds both processes."""
    done = run(tool("honcho"), "check", "-f", str(DEPLOY / "Procfile"))
    assert done.returncode == 0, done.stderr
    assert all(name in done.stderr for name in ("Valid procfile", "agent", "worker"))
    lines = dict(line.split(": ", 1) for line in (DEPLOY / "Procfile").read_text().splitlines())
    understood(shlex.split(lines["agent"]))


@pytest.mark.parametrize("number", [0, 1])
def test_kubernetes(number):
    """State lies below a volume that outlives the pod, secrets are files, and nothing restarts a worker for its agent."""
    objects = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert len(objects) == 2
    found = objects[number]
    spec = found["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    (claim,) = found["spec"]["volumeClaimTemplates"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert Path(environment["Z4J_HOME"]).parent == Path(mounts[claim["metadata"]["name"]])
    assert set(mounts) == {claim["metadata"]["name"], *(each["name"] for each in spec["volumes"])}
    assert all(
        environment[name].startswith(mounts["secrets"])
        for name in ("Z4J_TOKEN_FILE", "Z4J_HMAC_SECRET_FILE")
    )
    assert "livenessProbe" not in container
    assert (
        found["spec"]["selector"]["matchLabels"] == found["spec"]["template"]["metadata"]["labels"]
    )
    if container["command"][0] == "z4j-bare":
        arguments = understood(container["command"])
        assert spec["terminationGracePeriodSeconds"] > arguments.drain
        assert understood(container["readinessProbe"]["exec"]["command"]).quiet
        assert found["spec"]["replicas"] == 1
