"""Reads the positions of greenlets, threads and coroutines in the code.

The functions read no values of local variables. A read of ``frame.f_locals`` keeps all values alive
until the frame's function ends (CPython 3.11 and 3.12). A :class:`Position` refers to no frame, so
it can be stored.
"""

from __future__ import annotations

import gc
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

#: Maximum number of frames that are read from one stack. The innermost frames are read.
MAX_FRAMES = 100

#: Top-level modules whose frames are not the user's code, even outside ``site-packages``.
RUNTIME_PACKAGES = frozenset(
    (
        "amqp",
        "billiard",
        "celery",
        "eventlet",
        "gevent",
        "greenlet",
        "kombu",
        "vine",
        "z4j_bare",
        "z4j_celery",
        "z4j_core",
    )
)

#: Modules and functions that switch to the hub.
#: Their frames are the innermost ones of a waiting greenlet, and do not show why it waits.
_HUB_MODULES = ("eventlet.hubs", "gevent._hub_", "gevent._waiter", "gevent._socketcommon")
_HUB_FUNCTIONS = frozenset(("_read_trampoline", "_trampoline", "trampoline", "switch"))

#: Maps functions of gevent and eventlet to the names under which users know them.
_KNOWN_NAMES = {
    "eventlet.greenthread.sleep": "time.sleep",
    "gevent.hub.sleep": "time.sleep",
    "eventlet.green.select.select": "select.select",
    "gevent.select.select": "select.select",
    "gevent.hub.Hub.join": "gevent.wait",
}

#: Packages whose modules replace the standard library's modules of the same name.
_PATCHED_PACKAGES = ("eventlet.green", "gevent")

_KNOWN_CLASSES = {"GreenSocket": "socket", "LockType": "Lock", "SocketMixin": "socket"}

_LIBRARY_DIRECTORIES = tuple(
    {
        path + "/"
        for name, path in sysconfig.get_paths().items()
        if name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
)


class Position(NamedTuple):
    """A line of code that a stack has reached.

    :param module: ``__name__`` of the module; empty if it is unknown.
    :param function: qualified name of the function.
    :param names: names of the function's local variables, without their values.
    """

    file: str
    line: int
    module: str
    function: str
    names: tuple[str, ...]


def position_of(frame: FrameType) -> Position:
    """Return the position of one frame."""
    code = frame.f_code
    module = frame.f_globals.get("__name__")
    return Position(
        code.co_filename,
        frame.f_lineno or code.co_firstlineno,
        module if isinstance(module, str) else "",
        code.co_qualname,
        code.co_varnames,
    )


def read_stack(frame: FrameType | None) -> list[Position]:
    """Return the positions of a stack, innermost first; at most :data:`MAX_FRAMES`."""
    positions: list[Position] = []
    while frame is not None and len(positions) < MAX_FRAMES:
        positions.append(position_of(frame))
        frame = frame.f_back
    return positions


def read_coroutine(coroutine: object) -> list[Position]:
    """Return the positions of a suspended coroutine and of its awaited objects, innermost first."""
    positions: list[Position] = []
    while coroutine is not None and len(positions) < MAX_FRAMES:
        for frame, awaited in (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom")):
            if hasattr(coroutine, frame):
                if (found := getattr(coroutine, frame)) is not None:
                    positions.append(position_of(found))
                coroutine = getattr(coroutine, awaited, None)
                break
        else:
            break
    positions.reverse()
    return positions


def text_of(position: Position) -> str:
    """Return a position as text, such as ``shop/pay.py:88 in charge``."""
    function = position.function.rpartition("<locals>.")[2]
    return f"{short_path(position.file)}:{position.line} in {function}"


def short_path(path: str) -> str:
    """Return a path relative to the longest directory of ``sys.path`` that contains it."""
    directories = [each for each in (*sys.path, str(Path.cwd())) if each.startswith("/")]
    prefixes = [each.rstrip("/") + "/" for each in directories]
    longest = max((len(each) for each in prefixes if path.startswith(each)), default=0)
    return path[longest:]


def is_library(position: Position) -> bool:
    """Return whether a position lies in the standard library, an installed package or a runtime."""
    return (
        position.module.partition(".")[0] in RUNTIME_PACKAGES
        or position.file.startswith(("<frozen", "<string>", "<template>"))
        or position.file.startswith(_LIBRARY_DIRECTORIES)
    )


def is_runtime(position: Position) -> bool:
    """Return whether a position lies in Celery, in a hub, or in code that starts threads."""
    return position.module.partition(".")[0] in RUNTIME_PACKAGES or position.module in (
        "concurrent.futures.thread",
        "threading",
    )


def is_tracer(position: Position) -> bool:
    """Return whether a position lies in the function of Celery that runs a task."""
    return position.module == "celery.app.trace" and position.function.endswith("trace_task")


def is_internal(position: Position) -> bool:
    """Return whether a position lies in Celery or in the part of a hub that switches greenlets."""
    return position.module.startswith("celery.") or _is_hub(position)


def innermost_user_code(stack: Sequence[Position], package: str = "") -> tuple[int, str]:
    """Return the index of the innermost position in the user's code, and what that code awaits.

    The user's code is the task's own ``package`` and all code outside libraries. If the stack
    contains no user's code, the innermost position outside :func:`is_runtime` code is returned, or
    -1 if all positions lie in such code.

    :param stack: the positions of a task, innermost first.
    :param package: the top-level module of the task's function.
    """

    def is_user_code(position: Position) -> bool:
        in_package = bool(package) and position.module.partition(".")[0] == package
        return in_package or not is_library(position)

    def is_called_code(position: Position) -> bool:
        return not is_runtime(position)

    for accepts in (is_user_code, is_called_code):
        for index, position in enumerate(stack):
            if accepts(position):
                return index, _wait_of(stack[:index])
    return -1, _wait_of(stack)


def _wait_of(callees: Sequence[Position]) -> str:
    """Return the name of the called function, and in parentheses of the function that waits.

    :param callees: the positions below the caller, innermost first. If empty, the result is empty.
    """
    callees = [each for each in callees if not _is_hub(each)] or list(callees[-1:])
    if not callees:
        return ""
    public = next((each for each in callees if not _is_private(each)), callees[0])
    called, waiting = _name(callees[-1]), _name(public)
    return called if called == waiting else f"{called} ({waiting})"


def _is_hub(position: Position) -> bool:
    return position.module.startswith(_HUB_MODULES) or (
        position.module.startswith(("eventlet.", "gevent."))
        and position.function.rpartition(".")[2] in _HUB_FUNCTIONS
    )


def _is_private(position: Position) -> bool:
    """Return whether a function's name is private, such as ``Popen._try_wait``."""
    name = position.function.rpartition(".")[2]
    return name.startswith("_") and not name.endswith("__")


def _name(position: Position) -> str:
    """Return the name under which users know a function, such as ``socket.recv``."""
    name = f"{position.module}.{position.function}"
    if name in _KNOWN_NAMES:
        return _KNOWN_NAMES[name]
    function = position.function.rpartition("<locals>.")[2]
    if "." not in function:
        package, _, last = position.module.rpartition(".")
        if package in _PATCHED_PACKAGES:  # as in ``gevent.subprocess.run``
            return f"{last}.{function}"
        return f"{position.module.partition('.')[0]}.{function}"
    owner, _, method = function.partition(".")
    return f"{_KNOWN_CLASSES.get(owner, owner)}.{method}"


class _Task(Protocol):
    def get_coro(self) -> object: ...
    def get_name(self) -> str: ...
    def done(self) -> bool: ...


class HeapScan:
    """Finds the greenlets and asyncio tasks of the process.

    No registry contains all of these objects. ``run`` traverses the objects of the garbage
    collector. A million objects take about 30 ms, so ``run`` must be called off the hub.
    """

    def __init__(self) -> None:
        #: Greenlets by the id of the greenlet that spawned them. Only gevent records the spawner.
        self._spawned: dict[int, list[object]] = {}
        #: asyncio tasks by the identifier of the thread or greenlet that runs their loop.
        self._tasks: dict[int, list[_Task]] = {}

    def run(self) -> None:
        """Traverse all objects."""
        gevent, asyncio = sys.modules.get("gevent"), sys.modules.get("asyncio")
        kinds = tuple(
            kind
            for kind in (getattr(gevent, "Greenlet", None), getattr(asyncio, "Task", None))
            if kind is not None
        )
        if not kinds:
            return
        for found in gc.get_objects():
            # ``isinstance`` would read ``__class__``, which can run code of the host.
            if not issubclass(type(found), kinds):
                continue
            if hasattr(found, "get_coro"):
                thread = getattr(found.get_loop(), "_thread_id", None)
                if thread is not None and not found.done():
                    self._tasks.setdefault(thread, []).append(found)
            elif found.gr_frame is not None and (parent := _spawner(found)) is not None:
                self._spawned.setdefault(id(parent), []).append(found)

    def children(self, context: object) -> Iterator[object]:
        """Iterate over the greenlets that ``context`` has spawned."""
        yield from self._spawned.get(id(context), ())

    def coroutines(self, context: object) -> list[list[Position]]:
        """Return the stacks of the asyncio tasks that run in ``context``, oldest task first."""
        identifier = context if isinstance(context, int) else id(context)
        tasks = sorted(self._tasks.get(identifier, ()), key=_age)
        return [stack for task in tasks if (stack := read_coroutine(task.get_coro()))]


def _spawner(found: object) -> object:
    """Return the greenlet that has spawned a gevent greenlet; ``None`` if it no longer exists."""
    reference = getattr(found, "spawning_greenlet", None)
    return None if reference is None else reference()


def _age(task: _Task) -> int:
    """Return the number in the default name of an asyncio task; a renamed task comes last."""
    number = task.get_name().rpartition("-")[2]
    return int(number) if number.isdecimal() else sys.maxsize
