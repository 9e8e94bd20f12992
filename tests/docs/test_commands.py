"""Runs the commands of the pages against a real worker, or checks their words."""

import argparse
import configparser
import importlib
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.support.page_shell import commands_of
from tests.support.pages import DOCS, ROOT, Page, read_pages
from z4j_bare.cli.main import COMMANDS, build_parser
from z4j_bare.demo.process import until

#: Pages of this directory are excluded: test_getting_started.py follows them.
FOLLOWED = "docs/getting-started/"

PAGES = [page for page in read_pages() if not page.name.startswith(FOLLOWED)]

#: Commands that are run beside the worker of the page about gevent. They end by themselves.
RUN = re.compile(
    r"(source <\()?z4j-bare (buffer (list|stats|flush)|check|completion|doctor|hub|metrics|reload"
    r"|restart|status|tasks|top --once|version)\b(?!.*(--watch|--listen|--stack --json$))"
)

#: Commands that make the agents reconnect. They run last, because the others expect a session.
RECONNECT = re.compile(r"z4j-bare (reload|restart)")

#: Commands that are not run, and the reason. The words of ``z4j-bare`` commands are checked.
NOT_RUN = {
    r".*\bpip (install|wheel)\b": "needs the package index",
    r"python3 -m venv \.venv$": "the commands that follow it need the package index",
    r"git clone ": "needs a network",
    r"git (checkout|tag) |twine |sha256sum |.*\bpython -m (build|venv)\b|build-env/bin/pip ": (
        "tox -e package builds and checks the files of a release"
    ),
    r"\.venv/bin/(pre-commit|tox)\b": "the tests themselves are run by tox",
    r"export ": "the settings are checked by test_texts.py",
    r"celery -A shop worker ": "the pages of getting started run it",
    r"z4j-bare run ": "the page about the standalone agent runs it",
    r"z4j-bare (top|status --watch)$": "runs until q is pressed: e2e/test_inspection.py",
    r"z4j-bare metrics --listen ": "runs until it is stopped: e2e/test_metrics.py",
    r"z4j-bare (demo|buffer drop|buffer$)": "e2e/test_demo.py and e2e/test_flush.py run it",
    r"python -m benchmarks ": "takes minutes; its words are checked",
    r"npx ": "needs the package index of Node.js",
}

#: Maximum number of runs of a command. On a busy machine the agent may answer after the timeout of
#: the command line. The command then exits with 1.
ATTEMPTS = 3

#: Words of the pages, and the words that the test runs in their place.
ARGUMENTS = {"--profile 15": "--profile 1", "--output FILE": "--output shop.prom"}

#: A ``z4j-bare`` command inside a line; ``z4j-bare 1.13.0`` is a version.
_OWN = re.compile(r"(?:\.venv/bin/)?\bz4j-bare (?!\d|\.\.\.)([^|&;)#]+)")


def lines():
    """Return ``(page, command)`` of each line in a block of commands."""
    shell = [
        (page.name, command)
        for page in PAGES
        for block in page.blocks("sh")
        for command in commands_of(block.text)
    ]
    prompt = [
        (page.name, line.removeprefix("$ "))
        for page in PAGES
        for block in page.blocks("", "console", "text")
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]
    return shell + prompt


def spans():
    """Return ``(page, command)`` of each code span with a command of ``z4j-bare``."""
    return [
        (page.name, span)
        for page in PAGES
        for span in page.spans()
        if re.match(r"(source <\()?z4j-bare [a-z]", span)
    ]


def parse(words):
    """Parse words with the parser of the command line; return its error, or ``None``."""
    if words[0] in COMMANDS and words[1:] in ([], ["--help"]):
        return None
    parser = build_parser("z4j-bare", words[:1])
    try:
        parser.parse_args([word for word in words if word not in ("--help", "...")])
    except SystemExit:
        return f"z4j-bare {' '.join(words)}"
    return None


def is_run(command):
    return RUN.match(command) and not re.search(r"\.\.\.|\bNAME\b|\bCOMMAND\b|\bID\b", command)


@pytest.fixture(scope="module")
def worker(open_shell):
    """The shell of the page about gevent, with its worker running."""
    with open_shell("commands") as shell:
        for block in Page(DOCS / "getting-started/gevent.md").blocks("python", "sh"):
            if block.language == "python":
                shell.write(block.text)
            for command in commands_of(block.text) if block.language == "sh" else ():
                if command.startswith(("export ", "celery -A shop worker ")):
                    shell.run(command)
        shell.wait_for("z4j: connected over")
        yield shell


def test_every_line_is_run_or_excused():
    """Each line of a block of commands is run by a test, or listed with a reason not to run it."""
    excused = re.compile("|".join(NOT_RUN))
    left = [(page, line) for page, line in lines() if not is_run(line) and not excused.match(line)]
    assert left == []


def test_every_excuse_is_needed():
    """Each pattern of ``NOT_RUN`` matches a command of the pages."""
    commands = [command for _page, command in lines() + spans()]
    assert [
        pattern
        for pattern in NOT_RUN
        if not any(re.match(pattern, command) for command in commands)
    ] == []


def test_words_of_every_own_command_are_known(capsys):
    """The parser accepts each ``z4j-bare`` command of a line or a code span."""
    commands = [(page, found) for page, line in lines() + spans() for found in _OWN.findall(line)]
    assert len(commands) > 30
    wrong = [
        (page, command)
        for page, command in commands
        if command.split()[0] != "COMMAND" and parse(shlex.split(command))
    ]
    assert wrong == [], capsys.readouterr().err


def test_every_option_in_a_page_exists():
    """Each option that a page names alone is an option of ``z4j-bare`` or of a named program."""
    parser = build_parser("z4j-bare", COMMANDS)
    actions = next(
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    known = {"--detach", "--suite"}  # Celery, debootstrap
    for sub in _with_children(actions):
        known.update(option for action in sub._actions for option in action.option_strings)
    named = {
        (page.name, span)
        for page in PAGES
        if page.name in {"README.md", "docs/command-line.md", "docs/inspection.md"}
        for span in page.spans()
        if re.fullmatch(r"--[a-z-]+", span)
    }
    assert {each for each in named if each[1] not in known} == set()


def _with_children(actions):
    for parser in actions.choices.values():
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from _with_children(action)


def test_benchmark_commands_are_accepted():
    """The parser of the benchmarks accepts each ``python -m benchmarks`` command."""
    commands = [line for _page, line in lines()]
    commands += [span for page in PAGES for span in page.spans()]
    found = [
        match[1]
        for command in commands
        for match in re.finditer(r"python -m benchmarks (\w+(?: [\w. -]+)?)", command)
    ]
    assert len(found) > 4
    for words in map(str.split, found):
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"benchmarks.{words[0]}").add_arguments(parser)
        parser.parse_args(words[1:])


def test_tox_commands_name_environments():
    """Each ``tox -e`` and ``tox -m`` names environments and labels of tox.ini."""
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "tox.ini")
    known = set(re.split(r"[\s,]+", ini["tox"]["env_list"] + "," + ini["tox"]["labels"]))
    known |= {section.removeprefix("testenv:") for section in ini}
    named = {
        (page.name, name)
        for page in PAGES
        for names in re.findall(r"tox -[em] ([\w,-]+)", page.text)
        for name in names.split(",")
    }
    assert len(named) > 5
    assert {each for each in named if each[1] not in known} == set()


def test_commands_run_beside_a_worker(worker):
    """Each command that ends by itself exits with 0 beside a connected worker."""
    commands = {command for _page, command in lines() + spans() if is_run(command)}
    assert len(commands) > 12
    run = partial(worker.run, attempts=ATTEMPTS)
    last = sorted(command for command in commands if RECONNECT.match(command))
    # Three at a time, because a command mostly waits for the agent or the brain.
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, map(_with_arguments, sorted(commands - set(last)))))
    assert last
    for command in last:
        connections = worker.services[-1].output().count("z4j: connected over")
        run(command)
        until(
            lambda before=connections: (
                worker.services[-1].output().count("z4j: connected over") > before
            ),
            f"a new session after {command}",
            timeout=30,
        )


def _with_arguments(command):
    for shown, used in ARGUMENTS.items():
        command = command.replace(shown, used)
    return command
