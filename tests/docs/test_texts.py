"""Log lines, messages, settings, links and files that the pages name exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.code_texts import quotes, texts_of
from tests.support.pages import DOCS, GENERATED, ROOT, read_pages

PAGES = read_pages()
BY_NAME = {page.name: page for page in PAGES}

#: The pages that quote messages of the agent to a user.
USER_PAGES = [
    page
    for page in PAGES
    if page.name.startswith("docs/getting-started")
    or page.name
    in {
        "README.md",
        "docs/command-line.md",
        "docs/commands.md",
        "docs/deploy/README.md",
        "docs/deployment.md",
        "docs/inspection.md",
        "docs/metrics.md",
        "docs/migration.md",
        "docs/security.md",
        "docs/troubleshooting.md",
    }
]

#: Quotations that another program writes, and the program.
FOREIGN = {
    "asyncio.run() cannot be called from a running event loop": "asyncio",
    "certificate verify failed": "OpenSSL",
    "consumer: Cannot connect to amqp://...: (530) NOT_ALLOWED - vhost ...": "Celery",
    "missing required Z4J settings": "z4j_core",
}

#: Messages that the code puts together from several texts, and these texts.
COMPOSED = {
    "the existing agent left 12 unsent event frames in /var/lib/z4j/buffer-40.sqlite": (
        "the existing agent left ...",
        "12 unsent event frames in /var/lib/z4j/buffer-40.sqlite",
    ),
    "the stored change of schedule ... cannot be read and is ignored": (
        "the stored change of schedule ...",
        "cannot be read and is ignored",
    ),
}

#: Settings that only other programs read, and the programs.
FOREIGN_SETTINGS = {
    "Z4J_AUDIT_CHAIN_SECRET": "the brain",
    "Z4J_COMMAND_TIMEOUT_SECONDS": "the brain",
    "Z4J_DATABASE_URL": "the brain",
    "Z4J_MAX_PAYLOAD_SIZE_BYTES": "the brain",
    "Z4J_PURGE_THRESHOLD": "the adapters",
    "Z4J_SCHEDULES": "the adapters of web frameworks",
    "Z4J_SECRET": "the brain",
    "Z4J_SESSION_SECRET": "the brain",
    "Z4J_WS_PER_AGENT_CONCURRENCY_CAP": "the brain",
}

#: Files that a command writes and Git ignores.
BUILT = frozenset({"benchmarks/out", "docs/configuration.md"})

#: First words of the code spans that are commands, not messages.
PROGRAMS = frozenset(
    [
        "apt-get",
        "celery",
        "docker",
        "doctor",
        "export",
        "gunicorn",
        "hub",
        "manage.py",
        "max",
        "pip",
        "promtool",
        "python",
        "source",
        "sum",
        "tasks",
        "tox",
        "twine",
        "z4j",
        "z4j-bare",
    ]
)

_SETTING = re.compile(r"\bZ4J_[A-Z0-9_]*[A-Z0-9]")


def package(name):
    """Return the directory of an installed package without importing it."""
    return Path(find_spec(name).origin).parent


def written(quotation, texts, whole=False):
    """Whether one of the texts, or several texts of a composed message, match the quotation."""
    parts = COMPOSED.get(quotation, (quotation,))
    return all(any(quotes(part, text, whole) for text in texts) for part in parts)


def is_message(span):
    """Whether a code span is a sentence, not a command, a name or code."""
    words = span.split()
    return (
        len(words) > 2
        and words[0] not in PROGRAMS
        and not re.search(r"[={\[|]|^\W|^Z4J_|^\w+\(", span)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_log_line_exists_in_code(page):
    """Every log line that a page quotes is in a log call of the package."""
    lines = [span for span in page.spans() if span.startswith("z4j: ")]
    lines += re.findall(r"(?<![\w-])z4j: .*", "\n".join(block.text for block in page.blocks()))
    known = texts_of(ROOT / "z4j_bare").log_lines
    assert [line for line in lines if not written(line.strip(), known, whole=True)] == []


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.name)
def test_quoted_message_exists_in_code(page):
    """Every message that a page quotes is a text of the package or of a named other program."""
    source = texts_of(ROOT / "z4j_bare")
    known = source.texts | source.log_lines
    messages = [span for span in page.spans() if is_message(span) and span not in FOREIGN]
    assert [each for each in messages if not written(each, known)] == []


def test_exceptions_of_messages_are_needed():
    """Every message in ``FOREIGN`` and ``COMPOSED`` is still quoted by a page."""
    spans = {span for page in USER_PAGES for span in page.spans()}
    assert sorted({*FOREIGN, *COMPOSED} - spans) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_setting_exists(page):
    """Every ``Z4J_`` variable that a page names is read by the package or by another program."""
    known = set(FOREIGN_SETTINGS)
    for name in ("z4j_bare", "z4j_core"):
        folder = ROOT / name if name == "z4j_bare" else package(name)
        known.update(*(_SETTING.findall(text) for text in texts_of(folder).texts))
    assert sorted(set(_SETTING.findall(page.text)) - known) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_leads_to_file_and_heading(page):
    """Every link inside the repository leads to a file and, with an anchor, to a heading."""
    broken = []
    for target in page.links():
        path, _, anchor = target.partition("#")
        file = (page.path.parent / path).resolve() if path else page.path
        if file.parent == DOCS and file.name in GENERATED:
            file = file.with_name(f"{file.stem}.in.md")
        linked = BY_NAME.get(str(file.relative_to(ROOT)))
        if not file.exists() or (anchor and linked and anchor not in linked.anchors()):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_file_of_repository_exists(page):
    """Every path of the repository's source that a page names exists."""
    pattern = re.compile(r"(?:z4j_bare|tests|benchmarks|docs)/[\w./-]*\w")
    named = [span for span in page.spans() if pattern.fullmatch(span)]
    assert [name for name in named if not (ROOT / name).exists() and name not in BUILT] == []


@pytest.mark.parametrize(
    ("quotation", "text", "whole"),
    [
        (
            "z4j: agent started for project shop on gevent",
            "z4j: agent started for project \0",
            True,
        ),
        ("z4j: agent ended for ...", "z4j: agent started for project \0 on \0", True),
        ("the broker refuses the host", "the broker at \0 refuses the user", False),
        ("no answer from <name>", "\0: \0", False),
    ],
)
def test_changed_quotation_is_found(quotation, text, whole):
    """A quotation is rejected if the code has only a part of it, or only placeholders."""
    assert quotes(quotation, text, whole) is (quotation.endswith("gevent"))
