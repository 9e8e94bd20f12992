"""Measures the steps of the hub while the file ``record`` exists.

A step is the time between two switches of greenlets. Its CPU time excludes the time in which the
thread waits, so the hub's own waits do not count.
"""

import gc
import json
import threading
import time
from pathlib import Path

#: Seconds between two checks of the file.
POLL_INTERVAL = 0.1


class StepRecorder:
    """The longest step, the code in which it ended, and the longest garbage collection."""

    def __init__(self):
        self.longest = 0.0
        self.place = ""
        self.longest_collection = 0.0
        self._switched_at = time.thread_time()
        self._collection_started = 0.0

    def on_switch(self, _event, greenlets):
        now = time.thread_time()
        if now - self._switched_at > self.longest:
            self.longest = now - self._switched_at
            frame = greenlets[0].gr_frame
            self.place = f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame else "an end"
        self._switched_at = time.thread_time()

    def on_collection(self, phase, _info):
        now = time.perf_counter()
        if phase == "start":
            self._collection_started = now
        else:
            self.longest_collection = max(self.longest_collection, now - self._collection_started)

    def to_json(self):
        return json.dumps(
            {
                "longest": self.longest,
                "place": self.place,
                "longest_collection": self.longest_collection,
            }
        )


def watch(home):
    """Start the recorder when the file ``record`` appears in ``home``.

    Write ``steps.json`` when ``record`` has been deleted.
    """
    threading.Thread(target=_watch, args=(Path(home),), daemon=True).start()


def _watch(home):
    import greenlet

    while True:
        while not (home / "record").exists():
            time.sleep(POLL_INTERVAL)
        recorder = StepRecorder()
        # In a worker without a hub there are no switches.
        greenlet.settrace(recorder.on_switch)
        gc.callbacks.append(recorder.on_collection)
        while (home / "record").exists():
            time.sleep(POLL_INTERVAL)
        greenlet.settrace(None)
        gc.callbacks.remove(recorder.on_collection)
        unfinished = home / "steps.tmp"
        unfinished.write_text(recorder.to_json())
        unfinished.rename(home / "steps.json")
