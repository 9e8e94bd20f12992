"""``z4j-bare buffer``: what dead processes have left in ``Z4J_HOME``, looked at, saved, sent or thrown away."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from z4j_bare.buffer import files as paths
from z4j_bare.buffer import report as inspect
from z4j_bare.buffer.errors import BUSY, classify
from z4j_bare.buffer.report import StoreReport
from z4j_bare.cli import configuration
from z4j_bare.cli.output import Output
from z4j_bare.cli.status import span
from z4j_bare.errors import AgentError, HostConfigurationError, LocalStorageError

EXAMPLES = """\
examples:
  z4j-bare buffer list                       every store of this user, the living agents' too
  z4j-bare buffer stats                      what they hold together, and what was lost
  z4j-bare buffer export -o rows.jsonl       every row of the dead ones, a JSON object a line
  z4j-bare buffer flush --config agent.toml  send them to the brain now; an agent that starts does so by itself
  z4j-bare buffer drop --all --yes           throw them away

A store is named by its file, with or without the directory. One whose process lives is looked at only.
exit codes: 0 done, 1 something is left or cannot be read, 2 usage or configuration, 3 the store belongs to a living process
"""

#: Exit code for a store that may not be touched.
REFUSED = 3

ACTIONS = {
    "list": "one line for each store",
    "stats": "what they hold together",
    "export": "write the rows as JSON lines",
    "flush": "send the rows to the brain and delete what it has acknowledged",
    "drop": "delete stores with everything in them",
}

COLUMNS = ("store", "process", "rows", "oldest", "size", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do, with which stores."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in ACTIONS.items():
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "stores",
            nargs="*",
            metavar="STORE",
            help="only these (default: all that are left behind)",
        )
        action.add_argument("--json", action="store_true", help="one JSON object instead of text")
        if name == "flush":
            configuration.add_connection(action)
        else:
            configuration.add_config(action)
            configuration.add_home(action)
        if name == "export":
            where = "a new file, readable by you alone (default: stdout)"
            action.add_argument("--output", "-o", type=Path, metavar="FILE", help=where)
        if name == "drop":
            action.add_argument("--all", action="store_true", help="all that are left behind")
            action.add_argument("--yes", "-y", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace) -> int:
    """Do it and return an exit code of :data:`EXAMPLES`."""
    output = Output(machine=arguments.json)
    actions = {"list": _list, "stats": _stats, "export": _export, "flush": _flush, "drop": _drop}
    try:
        if arguments.action != "flush":
            configuration.apply(arguments)
        return actions[arguments.action](output, arguments)
    except LocalStorageError as error:
        print(f"z4j-bare: {error}", file=sys.stderr)
        return REFUSED if classify(error) == BUSY else 1
    except OSError as error:
        print(f"z4j-bare: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1


def looks(arguments: argparse.Namespace) -> list[StoreReport]:
    """Return the stores in question. Raises ``HostConfigurationError`` for a name that is none."""
    found = inspect.stores(configuration.home() / "store")
    wanted = []
    for name in arguments.stores:
        match = next(
            (
                path
                for path in found
                if name in (path.name, str(path)) or Path(name).absolute() == path
            ),
            None,
        )
        if match is None:
            raise HostConfigurationError(f"there is no store {name!r}: see z4j-bare buffer list")
        wanted.append(match)
    return [inspect.read_report(path) for path in wanted or found]


def left_behind(arguments: argparse.Namespace) -> list[StoreReport]:
    """Return the stores without a living process. Raises ``LocalStorageError`` for one that was named and has one."""
    found = looks(arguments)
    if arguments.stores:
        for owner_alive in (each for each in found if each.owner_alive):
            with inspect.claim_orphan(
                owner_alive.path
            ):  # says whose it is, if it has not ended this moment
                pass
    return [each for each in found if not each.owner_alive]


def _list(output: Output, arguments: argparse.Namespace) -> int:
    found = looks(arguments)
    if not found:
        output.say(f"no store lies in {configuration.home()}")
    else:
        output.table(COLUMNS, [_row(each) for each in found])
    output.answer({"stores": [_plain(each) for each in found]})
    return 1 if any(each.error for each in found) else 0


def _stats(output: Output, arguments: argparse.Namespace) -> int:
    found = looks(arguments)
    dead = [each for each in found if not each.owner_alive]
    ages = [each.oldest_age for each in found if each.oldest_age is not None]
    figures: dict[str, Any] = {
        "stores": len(found),
        "left_behind": len(dead),
        "rows": sum(each.total for each in found),
        "rows_left_behind": sum(each.total for each in dead),
        "payload_bytes": sum(each.payload_bytes for each in found),
        "disk_bytes": sum(each.disk_bytes for each in found),
        "oldest_age_seconds": round(max(ages), 1) if ages else None,
        "lost": _sums(found),
        "unreadable": sum(bool(each.error) for each in found),
    }
    for name, value in figures.items():
        output.say(f"{name.replace('_', ' '):<20} {json.dumps(value)}")
    output.answer(figures)
    return 1 if figures["unreadable"] else 0


def _export(output: Output, arguments: argparse.Namespace) -> int:
    written = 0
    with ExitStack() as stack:
        stream: TextIO = sys.stdout
        if arguments.output is not None:
            paths.create_file(arguments.output)
            stream = stack.enter_context(arguments.output.open("w", encoding="utf-8"))
        for each in left_behind(arguments):
            stack.enter_context(inspect.claim_orphan(each.path))
            for row in inspect.rows(each.path):
                stream.write(json.dumps(_exported(each.path, row), ensure_ascii=False) + "\n")
                written += 1
    if arguments.output is not None:
        output.say(f"{written} rows are in {arguments.output}")
        output.answer({"rows": written, "file": str(arguments.output)})
    return 0


def _flush(output: Output, arguments: argparse.Namespace) -> int:
    from z4j_bare.cli.flushing import Flush

    config, settings = configuration.resolved(arguments)
    dead = left_behind(arguments)
    total = sum(each.total for each in dead)
    flush, trouble = Flush(config, settings), ""
    try:
        with output.progress("sent", total) as done:
            for each in dead:
                flush.send(each.path, done)
    except LocalStorageError:
        raise
    except AgentError as error:
        trouble = str(error)
        output.mark(
            "FAIL",
            "flush",
            trouble,
            "z4j-bare doctor tells more; nothing that was not acknowledged is gone",
        )
    finally:
        flush.close()
    for path, why in flush.passed_over:
        output.mark("SKIP", "store", f"{path.name}: {why}")
    left = sum(inspect.read_report(each.path).total for each in dead if each.path.exists())
    output.say(f"{flush.sent} of {total} rows are with the brain, {left} are still here")
    passed = [{"store": path.name, "why": why} for path, why in flush.passed_over]
    output.answer({"sent": flush.sent, "left": left, "passed_over": passed, "error": trouble})
    return 1 if left else 0


def _drop(output: Output, arguments: argparse.Namespace) -> int:
    if not arguments.stores and not arguments.all:
        raise HostConfigurationError(
            "name the stores to drop, or pass --all; z4j-bare buffer list shows them"
        )
    dead = left_behind(arguments)
    rows = sum(each.total for each in dead)
    if (
        dead
        and not arguments.yes
        and not _agreed(f"Delete {len(dead)} stores with {rows} rows for good? [y/N] ")
    ):
        output.say("nothing was deleted")
        return 1
    for each in dead:
        inspect.delete_store(each.path)
    output.say(f"{len(dead)} stores with {rows} rows are gone")
    output.answer({"dropped": [str(each.path) for each in dead], "rows": rows})
    return 0


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise HostConfigurationError("there is nobody to ask: pass --yes to delete without asking")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D is no yes
        print()
        return False


def _row(each: StoreReport) -> list[str]:
    process = f"{each.pid} lives" if each.owner_alive else f"{each.pid or '?'} is gone"
    age = "" if each.oldest_age is None else span(each.oldest_age)
    return [
        str(each.path),
        process,
        str(each.total),
        age,
        f"{each.disk_bytes / 1024:.0f} KiB",
        each.error,
    ]


def _sums(found: list[StoreReport]) -> dict[str, int]:
    lost: dict[str, int] = {}
    for each in found:
        for reason, number in each.lost.items():
            lost[reason] = lost.get(reason, 0) + number
    return lost


def _plain(each: StoreReport) -> dict[str, Any]:
    return {
        "path": str(each.path), "living": each.owner_alive, "pid": each.pid, "rows": each.rows, "lost": each.lost,
        "payload_bytes": each.payload_bytes, "disk_bytes": each.disk_bytes, "oldest_age_seconds": each.oldest_age,
        "commands": each.commands, "trouble": each.error,
    }  # fmt: skip


def _exported(path: Path, row: tuple[int, str, str, bytes, float, int]) -> dict[str, Any]:
    identity, kind, key, payload, created_at, attempts = row
    try:
        content = json.loads(payload)
    except ValueError:
        content = payload.decode(errors="replace")
    return {
        "store": path.name, "id": identity, "kind": kind, "key": key, "created_at": created_at, "attempts": attempts,
        "payload": content,
    }  # fmt: skip
