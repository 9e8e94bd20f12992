"""Records ``z4j-bare top`` and ``z4j-bare tasks`` beside a real gevent worker, as SVG images.

``python -m tests.docs.recording.record`` writes ``docs/images/top.svg`` and ``tasks.svg``. It needs
the extra ``demo``, which contains the brain, a Redis server and rich.
"""

import io
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

from celery import Celery
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import until
from z4j_bare.demo.redis_server import RedisServer
from z4j_bare.demo.worker import Worker

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

#: Maximum seconds to wait for each condition.
TIMEOUT = 90

#: Columns and lines of the recorded terminal.
COLUMNS, LINES = 80, 24

#: Minimum age of the waiting tasks in the recording, in seconds.
AGE = 12


def main():
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(RedisServer(folder / "redis")).url()
        brain = stack.enter_context(Brain(folder / "brain"))
        brain.create_project("shop")
        variables = brain.mint_agent("shop", "shop").env(folder / "home")
        worker = Worker(
            "shop",
            pool="gevent",
            name="celery@web-1",
            log=folder / "worker.log",
            environment={**variables, "BROKER": redis, "PYTHONPATH": _search_path()},
        )
        stack.callback(worker.kill)
        worker.start()
        with Celery("producer", broker=redis) as producer:
            send_waiting(producer)
            record = Recorder(variables["Z4J_HOME"])
            until(lambda: record.age() >= AGE, "tasks of that age", timeout=TIMEOUT)
            with sending(producer):
                until(lambda: record.failures() > 2, "three failures", timeout=TIMEOUT)
                record.save("top", "top", "--once")
            record.save("tasks", "tasks")


def send_waiting(producer):
    for name in ("shop.charge", "shop.export", "shop.report"):
        producer.send_task(name)


@contextmanager
def sending(producer):
    """Send short tasks until the end of the block."""
    stop = threading.Event()

    def send():
        number = 0
        while not stop.wait(0.04):
            number += 1
            producer.send_task("shop.add", args=(number, 1))
            if number % 10 == 0:
                producer.send_task("shop.sync", args=(number,))
            if number % 40 == 0:
                producer.send_task("shop.pay", args=(number,))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Recorder:
    """Runs ``z4j-bare`` beside the worker and writes what it prints as an SVG image."""

    def __init__(self, home):
        self._environment = {
            **os.environ,
            "Z4J_HOME": home,
            "COLUMNS": str(COLUMNS),
            "LINES": str(LINES),
        }

    def output(self, *words):
        return subprocess.run(
            [sys.executable, "-m", "z4j_bare", *words],
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    def failures(self):
        """Return how many failures ``top`` lists."""
        return self.output("top", "--once").count("ValueError")

    def age(self):
        """Return the age of the youngest waiting task in seconds, or 0 unless all of them run."""
        lines = self.output("tasks").splitlines()[1:]
        ages = [int(line.split()[0]) for line in lines if line.split()[1:2] == ["s"]]
        return min(ages) if len(ages) == 3 else 0

    def save(self, name, *words):
        lines = self.output(*words).rstrip().splitlines()
        width = max(COLUMNS, *map(len, lines))
        console = Console(record=True, width=width, file=io.StringIO())
        console.print(Text(f"$ z4j-bare {' '.join(words)}", style="bold green"))
        for line, above in zip(lines, ["", *lines], strict=False):
            # The head of a table is the first line, or one that follows an empty line.
            console.print(Text(line, style="" if above else "bold"))
        svg = console.export_svg(
            title="celery@web-1", theme=MONOKAI, code_format=_format(), unique_id=name
        )
        (ROOT / "docs" / "images" / f"{name}.svg").write_text(svg, encoding="utf-8")


def _format():
    """Return rich's template without web fonts, because an image in a page cannot load them."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    head, _, rest = CONSOLE_SVG_FORMAT.partition("@font-face")
    return head + rest[rest.index(".{unique_id}-matrix") :]


def _search_path():
    return os.pathsep.join((str(HERE), str(ROOT)))


if __name__ == "__main__":
    main()
