"""A substitute of supervisord: it restarts a program that exits with an unexpected code.

``python supervisord.py COMMAND...``; SIGTERM ends both. The agent detects it by its file name.
"""

import os
import signal
import subprocess
import sys

child = None
ended = []


def end(number, _frame):
    ended.append(number)
    if child is not None:
        child.terminate()


signal.signal(signal.SIGTERM, end)
environment = {**os.environ, "SUPERVISOR_ENABLED": "1", "SUPERVISOR_PROCESS_NAME": "worker"}
while not ended:
    child = subprocess.Popen(sys.argv[1:], env=environment)
    code = child.wait()
    print(f"supervisor: {child.pid} ended with {code}", flush=True)
    if code == 0:
        break
