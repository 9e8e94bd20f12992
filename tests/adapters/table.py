"""The compatibility table: what the tests of a whole run have proven, a row per host."""

from importlib.metadata import version

BEGIN, END = "<!-- adapters: begin -->", "<!-- adapters: end -->"
COLUMNS = ("events", "command", "clean stop", "loop visible to tasks")

#: Celery's rows are proven by tests that run in CI; these are their files.
CELERY = dict(zip(COLUMNS, ("`test_pools.py`", "`test_commands.py`", "`test_exit.py`", "`test_pools.py`"), strict=True))
ELSEWHERE = {
    ("z4j-celery", f"worker, {pool}", "celery"): CELERY for pool in ("gevent", "eventlet", "threads", "solo", "prefork")
}


def render(proven):
    """Return the table as Markdown lines; ``proven`` maps ``(adapter, host, package)`` to its cells by column."""
    lines = ["| adapter | host | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for (adapter, host, package), cells in {**ELSEWHERE, **proven}.items():
        names = [f"{adapter} {version(adapter)}", f"{host} ({package} {version(package)})"]
        lines.append("| " + " | ".join([*names, *(cells.get(column, "") for column in COLUMNS)]) + " |")
    return lines


def write(path, proven):
    """Put the table between the two marks of the document at ``path``."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text("\n".join([before + BEGIN, "", *render(proven), "", END]) + after)
