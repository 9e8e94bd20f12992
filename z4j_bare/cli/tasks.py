"""``z4j-bare tasks``: the running tasks, and the position of each task in the code."""

from __future__ import annotations

import argparse
import linecache
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from z4j_bare import control
from z4j_bare.cli import configuration
from z4j_bare.cli.agents import (
    add_watch,
    answers_exit_code,
    no_agent_text,
    no_answer_text,
    query_selected,
)
from z4j_bare.cli.output import Output, column_widths
from z4j_bare.cli.status import format_duration

EXAMPLES = """\
examples:
  z4j-bare tasks                       every running task of this Z4J_HOME, longest run first
  z4j-bare tasks --task ID --stack     the whole stack of one task
  z4j-bare tasks --worker celery@web-1 --watch
  z4j-bare tasks --json

The agent reads the stacks without stopping the tasks. It reads no values of variables.
exit codes: 0 every agent answered, 1 an agent did not answer or no agent runs, 2 usage
"""

COLUMNS = ("age", "name", "id", "worker", "pid", "position", "waiting in")

#: Texts for a task without a position: the task runs in a prefork child; the task runs no code of
#: the user; the agent does not know the task's thread or greenlet.
IN_CHILD, IN_LIBRARY, UNKNOWN = "(in a child process)", "(in a library)", "(unknown)"

#: Characters before a task's name and further lines, if the terminal is too narrow for the table.
INDENT = 7

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tasks``."""
    parser.add_argument("--worker", metavar="NAME", help="only tasks of this worker")
    parser.add_argument("--task", metavar="ID", default="", help="only this task")
    parser.add_argument("--stack", action="store_true", help="show the whole stacks")
    parser.add_argument(
        "--all-frames",
        action="store_true",
        help="with --stack: also show the frames of Celery and of the hub",
    )
    add_watch(parser)
    configuration.add_agents(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the running tasks; return 0 if every selected agent has answered, else 1."""
    configuration.open_home(arguments)
    output = Output(json_only=arguments.json)
    code = 0
    try:
        with output.live() as redraw:
            while True:
                answers = query_tasks(arguments)
                code = answers_exit_code(answers)
                if not arguments.watch:
                    break
                redraw(partial(print_answers, output, answers, arguments))
                output.print_json(_document(answers, code))
                time.sleep(arguments.watch)
    except KeyboardInterrupt:
        return code
    print_answers(output, answers, arguments)
    output.print_json(_document(answers, code))
    return code


def query_tasks(arguments: argparse.Namespace) -> list[Row]:
    """Return the answer of each selected agent; the answer of a failed request has ``error``."""
    parameters = {
        "task": arguments.task,
        "stack": arguments.stack,
        "all_frames": arguments.all_frames,
    }
    return query_selected(control.TASKS, parameters, arguments)


def print_answers(output: Output, answers: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Write the tasks of all agents, longest run first, and the agents that did not answer."""
    if not answers:
        output.print_line(no_agent_text(arguments))
        return
    for answer in answers:
        if "error" in answer:
            output.print_line(no_answer_text(answer), "bold red")
    tasks = sorted(
        (task for answer in answers for task in answer.get("tasks", ())),
        key=lambda task: -task["age_seconds"],
    )
    if not tasks:
        if not all("error" in answer for answer in answers):
            output.print_line(no_task_text(arguments))
    elif arguments.stack:
        for task in tasks:
            print_stack(output, task)
    else:
        print_tasks(output, tasks)


def no_task_text(arguments: argparse.Namespace) -> str:
    """Return the text for agents that have answered without a task."""
    if not arguments.task:
        return "no task is running in the processes of these agents"
    return (
        f"task {arguments.task} is not running in the processes of these agents:"
        " it has ended, has not started, or runs on another host"
    )


def print_tasks(output: Output, tasks: Sequence[Row]) -> None:
    """Write a table. If the terminal is too narrow for it, write several lines for each task.

    The columns are not shortened, because the operator needs whole ids and positions.
    """
    rows = [cells for task in tasks for cells in rows_of(task)]
    width = sum(column_widths(COLUMNS, rows)) + 2 * (len(COLUMNS) - 1)
    if output.width is None or width <= output.width:
        output.print_table(COLUMNS, rows)
        return
    heads = [
        (f"{age:<{INDENT}}{name}  {task_id}".rstrip(), _process_text(worker, pid))
        for age, name, task_id, worker, pid, *_ in rows
    ]
    fits = all(len(head) + 2 + len(process) <= output.width for head, process in heads)
    for (head, process), (*_, pid, position, waiting) in zip(heads, rows, strict=True):
        output.print_line(f"{head}  {process}".rstrip() if fits else head, "bold" if pid else "")
        if process and not fits:
            output.print_line(f"{'':<{INDENT}}{process}")
        if position:
            wait = f", waiting in {waiting}" if waiting else ""
            output.print_line(f"{'':<{INDENT if pid else INDENT + 4}}{position}{wait}")


def _process_text(worker: str, pid: str) -> str:
    return f"{worker or 'no worker'} (pid {pid})" if pid else ""


def rows_of(task: Row) -> list[list[str]]:
    """Return table rows: one for the task, one for each eager task, greenlet or coroutine in it."""
    below = [
        ["", f"  {each['name']} (eager)", each["id"], "", "", "", ""]
        for each in task.get("eager", ())
    ]
    for kind in ("greenlets", "coroutines"):
        below += [["", f"  {kind[:-1]}", "", "", "", *_place(each)] for each in task.get(kind, ())]
    return [
        [
            format_duration(task["age_seconds"]),
            task["name"],
            task["id"],
            task["worker"] or "",
            str(task["pid"]),
            *_place(task),
        ],
        *below,
    ]


def print_stack(output: Output, task: Row) -> None:
    """Write a task with its whole stack, outermost frame first, as a traceback does."""
    output.print_line(
        f"{task['name']}[{task['id']}] in {task['worker'] or 'this process'} "
        f"(pid {task['pid']}), for {format_duration(task['age_seconds'])}",
        "bold",
    )
    for each in task.get("eager", ()):
        output.print_line(f"  runs {each['name']}[{each['id']}] eagerly")
    _print_frames(output, task)
    for kind in ("greenlets", "coroutines"):
        for each in task.get(kind, ()):
            output.print_line(f"  {kind[:-1]}")
            _print_frames(output, each)
    output.print_line()


def _print_frames(output: Output, place: Mapping[str, Any]) -> None:
    frames = place.get("stack")
    if not frames:
        output.print_line(f"  {_place(place)[0]}")
        return
    for frame in reversed(frames):
        output.print_line(f'  File "{frame["file"]}", line {frame["line"]}, in {frame["function"]}')
        # This command, not the agent, reads the source file.
        # The source line is omitted if this host does not have the file.
        if text := linecache.getline(frame["file"], frame["line"]).strip():
            output.print_line(f"    {text}")


def _place(place: Mapping[str, Any]) -> list[str]:
    if "position" not in place:
        return [IN_CHILD, ""]
    waiting = place["waiting_in"] or ""
    return [place["position"] or (IN_LIBRARY if waiting else UNKNOWN), waiting]


def _document(answers: Sequence[Row], code: int) -> Row:
    return {
        "ok": code == 0,
        "home": str(configuration.home()),
        "agents": list(answers),
    }
