"""Every example of docs/deploy is accepted by its tool and follows the rules of the README."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import parts
from z4j_bare.cli import configuration
from z4j_bare.cli.adapters import ENGINES, SCHEDULERS, require_known
from z4j_bare.cli.main import build_parser

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"


def find_tool(name):
    """Return the path of a program in this environment or in the system."""
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.exists() else shutil.which(name)
    assert found, f"{name} is missing: tox -e deploy installs the tools that are on PyPI"
    return found


def run(*command):
    """Run a tool; return the completed process."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def parse(words):
    """Parse an example's ``z4j-bare`` command with the real parser."""
    assert Path(words[0]).name == "z4j-bare"
    return build_parser("z4j-bare", words[1:2]).parse_args(words[1:])


def test_readme_lists_every_file():
    """The README's table and the directory name the same files."""
    table = re.findall(r"^\| (\[.*?) \|", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    named = {name for cell in table for name in re.findall(r"\[([^\]]+)\]", cell)}
    assert named == {path.name for path in DEPLOY.iterdir()} - {"README.md"}


def test_toml_has_known_settings_and_adapters(monkeypatch):
    """The file contains only known settings and adapters."""
    for name in configuration.known_settings():
        monkeypatch.setenv(f"Z4J_{name.upper()}", "")
    found = configuration.apply(parse(["z4j-bare", "run", "--config", str(DEPLOY / "agent.toml")]))
    assert [require_known(name, ENGINES) for name in found.engines] == ["celery"]
    assert [require_known(name, SCHEDULERS) for name in found.schedulers] == ["celerybeat"]


@parts.requires(shutil.which("systemd-analyze"), "systemd-analyze", "apt-get install systemd")
@pytest.mark.parametrize("name", ["z4j-bare.service", "z4j-metrics.service", "z4j-textfile.timer"])
def test_systemd_unit_is_verified(tmp_path, name):
    """``systemd-analyze verify`` accepts the unit with a program and user of this host."""
    for path in DEPLOY.glob("z4j-*"):
        text = path.read_text()
        assert path.suffix == ".timer" or "/opt/shop/venv/bin/z4j-bare" in text
        text = text.replace("/opt/shop/venv/bin/z4j-bare", sys.executable)
        (tmp_path / path.name).write_text(text.replace("User=shop", "User=root"))
    done = run("systemd-analyze", "verify", "--man=no", str(tmp_path / name))
    # The other lines are about units of the host.
    lines = [line for line in done.stderr.splitlines() if "z4j-" in line]
    assert (done.returncode, lines) == (0, [])


@pytest.mark.parametrize("name", ["z4j-metrics.service", "z4j-textfile.service"])
def test_units_of_metrics_run_valid_commands(name):
    """The commands are valid, in the home of the workers that z4j-bare.service uses."""
    unit = (DEPLOY / name).read_text()
    arguments = parse(shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1]))
    assert arguments.command == "metrics"
    assert "\nUser=shop\n" in unit
    assert "\nEnvironment=Z4J_HOME=/var/lib/z4j\n" in unit


def test_systemd_unit_runs_valid_command():
    """The unit's command is valid, and exit codes that a restart cannot fix prevent a restart."""
    unit = (DEPLOY / "z4j-bare.service").read_text()
    parse(shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1]))
    for line in (
        "Type=notify",
        "WatchdogSec=30",
        "RestartPreventExitStatus=2 3",
        "StateDirectoryMode=0700",
    ):
        assert f"\n{line}\n" in unit


READ_SUPERVISORD = """\
import sys
from supervisor.options import ServerOptions
options = ServerOptions()
options.realize(["-n", "-c", sys.argv[1]])
(group,) = options.process_group_configs
(process,) = group.process_configs
print(process.command)
print(process.stopwaitsecs, process.exitcodes, process.environment["Z4J_HOME"])
"""


def test_supervisord_file_is_accepted():
    """Supervisor's parser accepts the file; the stop timeout is longer than the agent's drain."""
    done = run(
        sys.executable, "-W", "ignore", "-c", READ_SUPERVISORD, str(DEPLOY / "supervisord.conf")
    )
    assert done.returncode == 0, done.stderr
    command, rest = done.stdout.splitlines()
    parse(shlex.split(command))
    assert rest == "20 [0, 2, 3] /var/lib/z4j/home"


def test_dockerfile_is_accepted():
    """Hadolint reports nothing, and entry point and health check are valid commands."""
    path = DEPLOY / "Dockerfile"
    done = run(find_tool("hadolint"), str(path))
    assert (done.returncode, done.stdout) == (0, "")
    text = path.read_text()
    for words in re.findall(r"^(?:ENTRYPOINT|HEALTHCHECK .* CMD) \[(.*)\]$", text, re.MULTILINE):
        parse(re.findall(r'"([^"]*)"', words))
    assert text.index("\nUSER 10001") < text.index("\nENTRYPOINT")


def test_procfile_is_accepted():
    """``honcho check`` accepts the file with both processes."""
    done = run(find_tool("honcho"), "check", "-f", str(DEPLOY / "Procfile"))
    assert done.returncode == 0, done.stderr
    assert all(name in done.stderr for name in ("Valid procfile", "agent", "worker"))
    lines = dict(line.split(": ", 1) for line in (DEPLOY / "Procfile").read_text().splitlines())
    parse(shlex.split(lines["agent"]))


@pytest.mark.parametrize("number", [0, 1])
def test_kubernetes_objects_follow_the_rules(number):
    """State is on a persistent volume, secrets are files, and there is no liveness probe."""
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
        arguments = parse(container["command"])
        assert spec["terminationGracePeriodSeconds"] > arguments.drain
        assert parse(container["readinessProbe"]["exec"]["command"]).quiet
        assert found["spec"]["replicas"] == 1
