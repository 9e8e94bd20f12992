"""``os.open`` for whatever may run on a native thread.

eventlet's own gives the thread that calls it a hub. When such a thread ends, greenlet looks through the whole heap, in the
main thread, for what that hub has left: 20 to 70 ms.
"""

from posix import open as open_file

__all__ = ["open_file"]
