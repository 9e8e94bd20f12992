"""A preloaded application: each worker gets an agent of its own once it is what it will be (gevent has patched it)."""

import z4j_bare

preload_app = True


def post_worker_init(worker):
    z4j_bare.post_fork()
