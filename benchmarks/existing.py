"""Installs the existing agent from the package index into a virtual environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from z4j_bare.demo.process import HarnessError

OUT = Path(__file__).with_name("out")
VERSION = "1.13.0"

#: Packages that have the same version in both environments, so that only the agent differs.
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


def existing_python(folder: Path = OUT / "existing-venv") -> str:
    """Return the interpreter in ``folder``; create the environment if it is missing or outdated."""
    wanted = [
        f"z4j-bare=={VERSION}",
        *(f"{name}=={found}" for name, found in shared_versions().items()),
    ]
    python, mark = folder / "bin" / "python", folder / "bench-requirements.json"
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return str(python)
    print(f"installing {wanted[0]} into {folder} ...", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted])
    mark.write_text(json.dumps(wanted))
    return str(python)


def shared_versions() -> dict[str, str]:
    """Return the installed versions of the ``SHARED`` packages."""
    found = {}
    for name in SHARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise HarnessError(f"{' '.join(command[:4])} ... failed: {done.stderr.strip()[-500:]}")
