"""Writes ``constraints.txt``: ``tox -e constraints`` at each release.

pip resolves the package with its extras on the lowest supported version of Python. A newer version
needs the same packages or fewer.
"""

import configparser
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: The extras of an installation. The others are for the demo, the documentation and the developers.
EXTRAS = "celery,cli,eventlet,metrics,watcher"

HEADER = """\
# The versions with which this release was tested: pip install --constraint constraints.txt ...
# Written by `tox -e constraints`; `tox -e package` checks it.
"""


def resolve():
    """Return the versions that pip would install, by name."""
    done = subprocess.run(
        (
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"),
            *("--ignore-installed", "--report", "-", f"{ROOT}[{EXTRAS}]"),
        ),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in json.loads(done.stdout)["install"]
    }


def main():
    setup_cfg = configparser.ConfigParser()
    setup_cfg.read(ROOT / "setup.cfg")
    versions = resolve() | {"z4j-bare": setup_cfg["metadata"]["version"]}
    lines = (f"{name}=={version}\n" for name, version in sorted(versions.items()))
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines))


if __name__ == "__main__":
    main()
