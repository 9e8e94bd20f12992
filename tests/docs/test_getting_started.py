"""Each page of getting started works from its first to its last command."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.page_shell import commands_of
from tests.support.pages import DOCS, Page
from z4j_bare.demo.process import until

FOLDER = DOCS / "getting-started"
NAMES = sorted(path.stem for path in FOLDER.glob("*.md"))

#: The commands of step 1, which need the package index. The test uses what is installed.
INSTALL = re.compile(r"python3 -m venv |pip install ")

#: The four settings without a default.
REQUIRED = {"Z4J_BRAIN_URL", "Z4J_PROJECT_ID", "Z4J_TOKEN", "Z4J_HMAC_SECRET"}


def follow(page, shell):
    """Write the files and run the commands of a page; return the output of its last command."""
    output = ""
    for block in page.blocks("python", "sh", "text"):
        if block.language == "python":
            shell.write(block.text)
        elif block.language == "sh":
            for command in commands_of(block.text):
                if not INSTALL.match(command):
                    output = shell.run(command)
        elif "z4j: " in block.text:
            for line in block.text.splitlines():
                shell.wait_for(expected(line))
        else:
            assert_similar(block.text, output)
    return output


def expected(line):
    """Return the pattern of a log line. The project's name and the session's id can differ."""
    line = re.sub(r"project \S+", "project ANY", re.sub(r"session \S+", "session ANY", line))
    return re.escape(line).replace("ANY", r"\S+")


def assert_similar(shown, printed):
    """Assert that a table has the columns that the page shows, and the words that never change."""
    head, row = shown.splitlines()
    assert head.split() == printed.splitlines()[0].split()
    fixed = [word for word in row.split() if word in ("gevent", "eventlet", "threads", "ws")]
    assert len(fixed) == 2
    # One agent is listed under the name of the worker. The name of the host differs.
    (listed,) = printed.splitlines()[1:]
    assert listed.split()[0].partition("@")[0] == row.split()[0].partition("@")[0]
    assert [word for word in fixed if word not in listed.split()] == []


def test_overview_lists_every_page():
    """The overview links each page, in its table and in its table of contents."""
    text = (DOCS / "getting-started.md").read_text()
    assert [name for name in NAMES if text.count(f"getting-started/{name}") != 2] == []


@pytest.fixture(scope="module")
def followed(open_shell, brain):
    """Maps each page to the future of its run; three pages are followed at a time."""
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(task_of, name, open_shell(name), brain.clone()) for name in NAMES}


def task_of(name, shell, brain):
    """Follow a page; return the exported variables and the names of the tasks that succeeded."""
    with shell:
        follow(Page(FOLDER / f"{name}.md"), shell)
        rows = until(lambda: brain.tasks(f"shop-{name}", state="success"), "a task", timeout=30)
    return set(shell.exports), [row["name"] for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_page_leads_to_a_task_in_the_brain(name, followed):
    """The page's files and commands start a worker, and its task is in the brain."""
    exports, tasks = followed[name].result()
    assert exports == REQUIRED
    assert [task.partition(".")[0] for task in tasks] == ["shop"]
