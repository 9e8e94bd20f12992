"""Runs the commands of a page in a temporary directory, against a real brain and broker."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack

from tests.support.pages import ROOT
from z4j_bare.demo.process import HarnessError, Service, clean_environment, until

#: Commands that run until they are stopped, and the text that shows that they are ready.
SERVICES = (
    (re.compile(r"celery -A \S+ worker\b"), re.compile(r" ready\.$", re.MULTILINE)),
    (re.compile(r"z4j-bare run\b"), re.compile(r"z4j: connected over ws")),
)

#: Timeout of a command, and of the start of a service, in seconds.
TIMEOUT = 120

_COMMENT = re.compile(r"\s+# .*")


def commands_of(text):
    """Return the commands of a code block, without comments and continuation lines."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (_COMMENT.sub("", line).removeprefix("$ ").strip() for line in lines)
    return [command for command in found if command and not command.startswith("#")]


def make_programs(folder):
    """Write ``z4j-bare`` and ``python`` into a folder, for this interpreter; return its path.

    If the package is imported from a checkout, no console script is installed.
    """
    folder.mkdir()
    for name, arguments in (("z4j-bare", "-m z4j_bare"), ("python", "")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)
    return folder


class PageShell:
    """Runs the commands of one page, in order, in one environment.

    :param folder: the working directory.
    :param programs: the directory of :func:`make_programs`.
    :param variables: values that replace those that the page exports, by variable.
    :param replaced: maps texts of the page to those that the commands and files get instead.
    """

    def __init__(self, folder, programs, variables, replaced):
        self.folder = folder
        self.exports = []
        self.services = []
        self._replaced = replaced
        self._stack = ExitStack()
        path = os.pathsep.join((str(programs), os.path.dirname(sys.executable), os.environ["PATH"]))
        self._environment = {
            **clean_environment(),
            **variables,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
        }

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stack.close()

    def write(self, text):
        """Write a code block whose first line is a comment with the file's path."""
        path = self.folder / text.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(self._actual(text))

    def run(self, command, attempts=1):
        """Run a command to its end, or start a service; return what it has printed.

        :param attempts: maximum number of runs until the command succeeds.
        :raises AssertionError: the command failed.
        """
        if command.startswith("export "):
            self.exports += re.findall(r"\b([A-Z]\w+)=", command)
            return ""
        for pattern, ready in SERVICES:
            if pattern.match(command):
                return self._start(self._actual(command), ready)
        for _attempt in range(attempts):
            done = self._run(command)
            if done.returncode == 0:
                return done.stdout
        raise AssertionError(f"{command}: exit code {done.returncode}\n{done.stdout}")

    def _run(self, command):
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self._actual(command)],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def wait_for(self, pattern):
        """Wait until the last service has printed the pattern."""
        service = self.services[-1]
        try:
            until(lambda: re.search(pattern, service.output()), pattern, timeout=TIMEOUT)
        except HarnessError as error:
            raise AssertionError(f"{error}\n{service.output()}") from None

    def _start(self, command, ready):
        log = self.folder / f"service-{len(self.services)}.log"
        service = Service(
            command,
            ["bash", "-c", f"exec {command}"],
            environment=self._environment,
            cwd=self.folder,
            log=log,
        )
        self._stack.callback(service.kill)
        service.spawn(lambda: ready.search(service.output()), TIMEOUT)
        self.services.append(service)
        return service.output()

    def _actual(self, text):
        for found, instead in self._replaced.items():
            text = text.replace(found, instead)
        return text
