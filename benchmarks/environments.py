"""Virtual environments for the agents and libraries that are compared with this agent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import z4j_bare
from z4j_bare.demo.process import HarnessError

OUT = Path(__file__).with_name("out")
VERSION = "1.13.0"

#: Packages that have the same version in all environments, so that only the observer differs.
SHARED = (
    "celery",
    "kombu",
    "gevent",
    "eventlet",
    "greenlet",
    "redis",
    "z4j-celery",
    "z4j-core",
    "pydantic",
    "packaging",
)

#: The libraries that ``observers`` compares, a decoder for the sinks, and the metrics server.
OBSERVERS = (
    "opentelemetry-instrumentation-celery",
    "opentelemetry-sdk",
    "opentelemetry-exporter-otlp-proto-http",
    "ddtrace>=4",
    "sentry-sdk>=2",
    "msgpack>=1",
    "prometheus-client>=0.20",
)


def existing_python(folder: Path = OUT / "existing-venv") -> str:
    """Return the interpreter of an environment with the existing agent."""
    shared = shared_versions()
    wanted = [f"z4j-bare=={VERSION}", *(f"{name}=={shared[name]}" for name in shared)]
    return _environment(folder, wanted)


def observers_python(folder: Path = OUT / "observers-venv") -> str:
    """Return the interpreter of an environment with this checkout and the :data:`OBSERVERS`.

    The benchmarks' own environment is not used, because it also has the brain and pytest: in it,
    sentry-sdk would import the brain's web framework, and ddtrace would be a plugin of pytest.
    """
    shared = {name: found for name, found in shared_versions().items() if name != "eventlet"}
    root = Path(z4j_bare.__file__).parents[1]
    return _environment(
        folder,
        ["--editable", str(root), *(f"{name}=={shared[name]}" for name in shared), *OBSERVERS],
    )


def installed_versions(python: str, names: Sequence[str]) -> dict[str, str]:
    """Return the versions that the packages ``names`` have in the environment of ``python``."""
    code = (
        "import json, sys; from importlib.metadata import version;"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    found: dict[str, str] = json.loads(_run([python, "-c", code, *names]))
    return found


def shared_versions() -> dict[str, str]:
    """Return the installed versions of the ``SHARED`` packages."""
    found = {}
    for name in SHARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _environment(folder: Path, wanted: list[str]) -> str:
    """Return the interpreter in ``folder``; create the environment if it is missing or outdated."""
    python, mark = folder / "bin" / "python", folder / "bench-requirements.json"
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return str(python)
    title = wanted[0] if wanted[0] != "--editable" else "the observers"
    print(f"installing {title} into {folder} ...", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    # -I: otherwise pip counts a checkout in PYTHONPATH or in the current directory as installed.
    pip = [str(python), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *wanted])
    mark.write_text(json.dumps(wanted))
    return str(python)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise HarnessError(f"{' '.join(command[:4])} ... failed: {done.stderr.strip()[-500:]}")
    return done.stdout
