"""``z4j-bare version``."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from z4j_core.version import PROTOCOL_VERSION

PACKAGES = ("z4j-bare", "z4j-core", "gevent", "eventlet", "websocket-client", "z4j-celery", "celery")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(_arguments: argparse.Namespace) -> int:
    """Print one line per package that matters, the protocol and Python."""
    for package in PACKAGES:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    print(f"protocol {PROTOCOL_VERSION}")
    print(f"python {platform.python_version()}")
    return 0
