"""Forked children of a test."""

import os
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
