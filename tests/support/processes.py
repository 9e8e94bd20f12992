"""Forked children of a test, and commands in other processes."""

import os
import subprocess
import sys
import traceback


def in_child(function):
    """Call ``function`` in a forked child and return the child's exit status."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_command(until, *words):
    """Run a z4j-bare command without blocking the hub; return exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "z4j_bare", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: process.poll() is not None)
        return process.returncode, process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
