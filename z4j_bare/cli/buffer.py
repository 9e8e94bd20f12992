"""``z4j-bare buffer``: list, export, send and delete the stores of ended processes."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from z4j_bare.buffer import files, report
from z4j_bare.buffer.errors import BUSY, classify
from z4j_bare.buffer.existing_agent import (
    ExistingBufferReport,
    delete_existing_buffer,
    list_existing_buffers,
    read_existing_buffer,
)
from z4j_bare.buffer.open_runs import orphaned_runs, runs_path
from z4j_bare.buffer.report import StoreReport
from z4j_bare.buffer.rows import BufferEntry
from z4j_bare.cli import configuration
from z4j_bare.cli.output import Output
from z4j_bare.cli.status import format_duration
from z4j_bare.errors import AgentError, HostConfigurationError, LocalStorageError

if TYPE_CHECKING:
    from z4j_bare.cli.buffer_flush import OrphanUploader

EXAMPLES = """\
examples:
  z4j-bare buffer list                       all stores of this user, running agents included
  z4j-bare buffer stats                      totals of rows, bytes and lost rows
  z4j-bare buffer export -o rows.jsonl       write the rows of orphaned stores as JSON lines
  z4j-bare buffer flush --config agent.toml  send the rows of orphaned stores to the brain
  z4j-bare buffer drop --all --yes           delete all orphaned stores

A store is an agent's buffer file. It is orphaned when its process has ended. An agent that starts
adopts the orphaned stores of its project, so flush is needed only when no agent starts again.
Name a store by its file name or its path. export, flush and drop refuse the store of a running
process.
exit codes: 0 done, 1 rows are left or a store cannot be read, 2 usage or configuration,
  3 the named store belongs to a running process
"""

#: Exit code if the command names a store that belongs to a running process.
STORE_IN_USE = 3

ACTIONS = {
    "list": "show one line per store",
    "stats": "show totals of all stores",
    "export": "write the rows of orphaned stores as JSON lines",
    "flush": "send the rows of orphaned stores and delete the rows that the brain acknowledges",
    "drop": "delete orphaned stores with all their rows",
}

STORE_HELP = {
    "list": "only these stores (default: all)",
    "stats": "only these stores (default: all)",
    "export": "only these stores (default: all orphaned stores)",
    "flush": "only these stores (default: all orphaned stores)",
    "drop": "the stores to delete",
}

COLUMNS = ("store", "process", "rows", "oldest", "size", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("stores", nargs="*", metavar="STORE", help=STORE_HELP[name])
        configuration.add_json(action)
        if name == "flush":
            configuration.add_connection(action)
        else:
            configuration.add_config(action)
            configuration.add_home(action)
        if name == "export":
            where = "new file to write, readable only by this user (default: stdout)"
            action.add_argument("--output", "-o", type=Path, metavar="FILE", help=where)
        if name == "drop":
            action.add_argument("--all", action="store_true", help="delete all orphaned stores")
            action.add_argument("--yes", "-y", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace) -> int:
    """Perform the action and return its exit code. :data:`EXAMPLES` explains the exit codes."""
    output = Output(json_only=arguments.json)
    actions = {"list": _list, "stats": _stats, "export": _export, "flush": _flush, "drop": _drop}
    try:
        if arguments.action != "flush":
            configuration.apply(arguments)
        return actions[arguments.action](output, arguments)
    except LocalStorageError as error:
        print(f"z4j-bare: {error}", file=sys.stderr)
        return STORE_IN_USE if classify(error) == BUSY else 1
    except OSError as error:
        print(f"z4j-bare: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1


def selected_stores(arguments: argparse.Namespace) -> list[StoreReport]:
    """Return reports on the stores that the command names, or on all stores if it names none.

    A name may also belong to a buffer of the existing agent; the result omits such buffers.
    Raises ``HostConfigurationError`` if there is neither a store nor a buffer with a name.
    """
    paths = report.stores(configuration.home() / "store")
    existing = [each.path for each in existing_buffers(arguments)]
    selected = []
    for name in arguments.stores:
        if any(_is_named(path, name) for path in existing):
            continue
        path = next((path for path in paths if _is_named(path, name)), None)
        if path is None:
            # A word without this suffix may be a secret that follows a misspelt flag.
            shown = repr(name) if name.endswith(".sqlite") else "with that name (not shown)"
            raise HostConfigurationError(
                f"there is no store {shown}: `z4j-bare buffer list` shows all stores"
            )
        selected.append(path)
    if arguments.stores:
        paths = selected
    return [report.read_report(path) for path in paths]


def existing_buffers(arguments: argparse.Namespace) -> list[ExistingBufferReport]:
    """Return reports on the selected buffers of the existing agent, or on all of them."""
    paths = list_existing_buffers(configuration.home() / "store")
    names = arguments.stores
    return [
        read_existing_buffer(path)
        for path in paths
        if not names or any(_is_named(path, name) for name in names)
    ]


def orphaned_stores(arguments: argparse.Namespace) -> list[StoreReport]:
    """Return the selected stores whose process has ended.

    Raises ``LocalStorageError`` if the operator named a store that belongs to a running process.
    """
    stores = selected_stores(arguments)
    if arguments.stores:
        for store in stores:
            if store.owner_alive:
                # claim_orphan raises LocalStorageError, unless the process has just ended.
                with report.claim_orphan(store.path):
                    pass
    return [store for store in stores if not store.owner_alive]


def _is_named(path: Path, name: str) -> bool:
    return name in (path.name, str(path)) or Path(name).absolute() == path


def _list(output: Output, arguments: argparse.Namespace) -> int:
    stores, existing = selected_stores(arguments), existing_buffers(arguments)
    if not stores and not existing:
        output.print_line(f"there is no store in {configuration.home()}")
    else:
        rows = [*map(_row, stores), *map(_existing_row, existing)]
        output.print_table(COLUMNS, rows)
    answer: dict[str, Any] = {"stores": [as_dict(store) for store in stores]}
    if existing:
        answer["existing_agent"] = [_existing_as_dict(each) for each in existing]
    output.print_json(answer)
    return 1 if any(store.error for store in stores) else 0


def _stats(output: Output, arguments: argparse.Namespace) -> int:
    stores = selected_stores(arguments)
    orphaned = [store for store in stores if not store.owner_alive]
    ages = [store.oldest_age for store in stores if store.oldest_age is not None]
    totals: dict[str, Any] = {
        "stores": len(stores),
        "left_behind": len(orphaned),
        "rows": sum(store.total for store in stores),
        "rows_left_behind": sum(store.total for store in orphaned),
        "payload_bytes": sum(store.payload_bytes for store in stores),
        "disk_bytes": sum(store.disk_bytes for store in stores),
        "oldest_age_seconds": round(max(ages), 1) if ages else None,
        "lost": _losses(stores),
        "unreadable": sum(bool(store.error) for store in stores),
    }
    for name, value in totals.items():
        output.print_line(f"{name.replace('_', ' '):<20} {json.dumps(value)}")
    output.print_json(totals)
    return 1 if totals["unreadable"] else 0


def _export(output: Output, arguments: argparse.Namespace) -> int:
    written = 0
    with ExitStack() as stack:
        stream: TextIO = sys.stdout
        if arguments.output is not None:
            files.create_file(arguments.output)
            stream = stack.enter_context(arguments.output.open("w", encoding="utf-8"))
        for store in orphaned_stores(arguments):
            stack.enter_context(report.claim_orphan(store.path))
            for row in report.rows(store.path):
                stream.write(json.dumps(_exported(store.path, row), ensure_ascii=False) + "\n")
                written += 1
    if arguments.output is not None:
        output.print_line(f"wrote {written} rows to {arguments.output}")
        output.print_json({"rows": written, "file": str(arguments.output)})
    return 0


def _flush(output: Output, arguments: argparse.Namespace) -> int:
    from z4j_bare.cli.buffer_flush import OrphanUploader

    config, settings = configuration.resolved(arguments)
    uploader, failure = OrphanUploader(config, settings), ""
    orphaned = orphaned_stores(arguments)
    orphaned += map(report.read_report, _import_existing(arguments, uploader))
    total = sum(store.total for store in orphaned)
    try:
        with output.progress("sent", total) as done:
            for store in orphaned:
                uploader.send(store.path, done)
            for path in _orphaned_runs(arguments, orphaned):
                uploader.send_runs(path)
    except LocalStorageError:
        raise
    except AgentError as error:
        failure = str(error)
        fix = "run z4j-bare doctor; rows that the brain has not acknowledged are still in the store"
        output.print_verdict("FAIL", "flush", failure, fix)
    finally:
        uploader.close()
    for path, reason in uploader.skipped:
        output.print_verdict("SKIP", "store", f"{path.name}: {reason}")
    left = sum(report.read_report(store.path).total for store in orphaned if store.path.exists())
    left += sum(each.events for each in existing_buffers(arguments) if not each.running)
    output.print_line(f"sent {uploader.sent} of {total} rows, {left} rows are left")
    if uploader.runs:
        output.print_line(f"reported {uploader.runs} runs that were open when their process ended")
    skipped = [{"store": path.name, "why": reason} for path, reason in uploader.skipped]
    answer = {"sent": uploader.sent, "left": left, "passed_over": skipped, "error": failure}
    if uploader.runs:
        answer["runs"] = uploader.runs
    output.print_json(answer)
    return 1 if left or failure else 0


def _import_existing(arguments: argparse.Namespace, uploader: OrphanUploader) -> list[Path]:
    """Move the events of the existing agent's buffers into a new store; return its path."""
    with ExitStack() as stack:
        buffers = []
        for each in existing_buffers(arguments):
            if each.events and not each.running:
                try:
                    buffers.append(uploader.claim_existing(each.path))
                except LocalStorageError as error:
                    uploader.skipped.append((each.path, str(error)))
                else:
                    stack.callback(buffers[-1].close)
        if not buffers:
            return []
        path = files.new_store_path(configuration.home() / "store")
        uploader.import_existing(buffers, path)
    return [path]


def _orphaned_runs(arguments: argparse.Namespace, sent: list[StoreReport]) -> list[Path]:
    """Return the files of open runs whose store is selected and either deleted or empty."""
    beside = [runs_path(store.path) for store in sent]
    empty = [
        path
        for store, path in zip(sent, beside, strict=True)
        if path.exists() and store.path.exists() and not report.read_report(store.path).total
    ]
    gone = orphaned_runs(configuration.home() / "store")
    return empty + [path for path in gone if path in beside or not arguments.stores]


def _drop(output: Output, arguments: argparse.Namespace) -> int:
    if not arguments.stores and not arguments.all:
        raise HostConfigurationError(
            "name the stores to delete or pass --all: `z4j-bare buffer list` shows all stores"
        )
    orphaned = orphaned_stores(arguments)
    # --all does not delete buffers of the existing agent. They must be named.
    existing = existing_buffers(arguments) if arguments.stores else []
    rows = sum(store.total for store in orphaned) + sum(each.total for each in existing)
    number = len(orphaned) + len(existing)
    question = f"Delete {number} stores with {rows} rows permanently? [y/N] "
    if number and not arguments.yes and not _confirmed(question):
        output.print_line("no store was deleted")
        return 1
    for store in orphaned:
        report.delete_store(store.path)
    for each in existing:
        delete_existing_buffer(each.path)
    dropped = [*(str(store.path) for store in orphaned), *(str(each.path) for each in existing)]
    output.print_line(f"deleted {number} stores with {rows} rows")
    output.print_json({"dropped": dropped, "rows": rows})
    return 0


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise HostConfigurationError(
            "cannot ask for confirmation, because stdin is not a terminal: pass --yes to delete"
        )
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def _row(store: StoreReport) -> list[str]:
    return [
        str(store.path),
        f"{store.pid} running" if store.owner_alive else f"{store.pid or '?'} ended",
        str(store.total),
        "" if store.oldest_age is None else format_duration(store.oldest_age),
        f"{store.disk_bytes / 1024:.0f} KiB",
        store.error,
    ]


def _existing_row(buffer: ExistingBufferReport) -> list[str]:
    note = "of the existing agent"
    if buffer.problem:
        note += f": {buffer.problem}"
    elif buffer.events and not buffer.running:
        note += ": an agent of its project sends the events when it starts"
    return [
        str(buffer.path),
        f"{buffer.pid or '?'} {'running' if buffer.running else 'ended'}",
        str(buffer.total),
        "" if buffer.oldest_age is None else format_duration(buffer.oldest_age),
        f"{buffer.disk_bytes / 1024:.0f} KiB",
        note,
    ]


def _existing_as_dict(buffer: ExistingBufferReport) -> dict[str, Any]:
    return {
        "path": str(buffer.path),
        "living": buffer.running,
        "pid": buffer.pid,
        "rows": {"event_batch": buffer.events, "other": buffer.others},
        "disk_bytes": buffer.disk_bytes,
        "oldest_age_seconds": buffer.oldest_age,
        "trouble": buffer.problem,
    }


def _losses(stores: list[StoreReport]) -> dict[str, int]:
    lost: dict[str, int] = {}
    for store in stores:
        for reason, number in store.lost.items():
            lost[reason] = lost.get(reason, 0) + number
    return lost


def as_dict(store: StoreReport) -> dict[str, Any]:
    """Return the report on a store as JSON types."""
    return {
        "path": str(store.path),
        "living": store.owner_alive,
        "pid": store.pid,
        "rows": store.rows,
        "lost": store.lost,
        "payload_bytes": store.payload_bytes,
        "disk_bytes": store.disk_bytes,
        "oldest_age_seconds": store.oldest_age,
        "commands": store.commands,
        "trouble": store.error,
    }


def _exported(path: Path, row: BufferEntry) -> dict[str, Any]:
    try:
        payload = json.loads(row.payload)
    except ValueError:
        payload = row.payload.decode(errors="replace")
    return {
        "store": path.name,
        "id": row.id,
        "kind": row.kind,
        "key": row.key,
        "created_at": row.created_at,
        "attempts": row.attempts,
        "payload": payload,
    }
