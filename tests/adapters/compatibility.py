"""The compatibility table: one row per host with what its tests have proven."""

from importlib.metadata import version

BEGIN, END = "<!-- adapters: begin -->", "<!-- adapters: end -->"
COLUMNS = ("events", "command", "clean stop", "loop visible to tasks")
HEAD = ["| adapter | host | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]


def render(proven):
    """Return table rows as Markdown lines.

    ``proven`` maps ``(adapter, host, package)`` to the row's cells by column.
    """
    lines = []
    for (adapter, host, package), cells in proven.items():
        names = [f"{adapter} {version(adapter)}", f"{host} ({package} {version(package)})"]
        lines.append(
            "| " + " | ".join([*names, *(cells.get(column, "") for column in COLUMNS)]) + " |"
        )
    return lines


def write(path, proven):
    """Replace these adapters' rows in the document at ``path``.

    Rows of other adapters stay, because not all adapters can be installed in one environment.
    """
    before, _, rest = path.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    here = {adapter for adapter, _host, _package in proven}
    others = [
        line
        for line in old.splitlines()
        if line.startswith("| z4j-") and _adapter(line) not in here
    ]
    rows = sorted([*others, *render(proven)], key=_adapter)
    path.write_text("\n".join([before + BEGIN, "", *HEAD, *rows, "", END]) + after)


def _adapter(line):
    """Return the adapter's distribution name in a row."""
    return line.split()[1]
