"""A preloaded application: each worker starts its own agent after gunicorn has set it up."""

import z4j_bare

preload_app = True


def post_worker_init(worker):
    z4j_bare.post_fork()
