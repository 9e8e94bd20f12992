"""Projects whose workers use RabbitMQ, one for each pool."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from z4j_core.purge_token import compute_purge_confirm_token
from z4j_core.transport.hmac import decode_agent_hmac_secret

from tests.support.e2e_project import E2EProject
from z4j_bare.demo.process import until

POOLS = ("gevent", "threads", "prefork")

#: Settings with which a worker of Celery 5.7 gets over an outage of RabbitMQ more reliably.
_RELIABLE = {"broker_heartbeat": 5, "worker_enable_prefetch_count_reduction": False}

#: Celery's settings by type of queue. A task with a countdown waits in RabbitMQ if the exchange of
#: a quorum queue is a topic, else in the worker.
SETTINGS = {
    "classic": _RELIABLE,
    "quorum": {
        **_RELIABLE,
        "task_default_queue_type": "quorum",
        "task_default_exchange_type": "topic",
        # Otherwise the worker declares 28 quorum queues.
        "broker_native_delayed_delivery_queue_type": "classic",
        "broker_transport_options": {"confirm_publish": True},
    },
}


class RabbitProject(E2EProject):
    """A project with one worker on RabbitMQ.

    :param pool: the worker's pool.
    :param queue_type: a key of :data:`SETTINGS`.
    """

    def __init__(self, brain, redis_url, home, broker_url, pool, queue_type):
        super().__init__(brain.clone(), redis_url, home, broker_url)
        self.pool = pool
        self.queue_type = queue_type
        self._settings = SETTINGS[queue_type]

    def __enter__(self):
        super().__enter__()
        self.producer.conf.update(self._settings)
        # Otherwise the first message after an outage is lost with the connection.
        self.producer.conf.broker_transport_options = {"confirm_publish": True}
        return self

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.brain.close()

    def environment(self, **options):
        settings = {"RABBITMQ_SETTINGS": json.dumps(self._settings)}
        return {**super().environment(**options), **settings}

    def start(self, name="w1@e2e", **options):
        """Start a worker that runs two tasks at a time, and wait until its events are captured."""
        options = {"concurrency": 2, "options": ("--prefetch-multiplier", "1"), **options}
        self.host = self.worker("killable", pool=self.pool, name=name, **options)
        self.warm_up()

    def stop(self):
        """Stop the worker."""
        self.host.stop()

    def states(self, task_ids):
        """Wait until the brain has a final state of each task, and return the set of states."""
        return {self.row(task_id)["state"] for task_id in task_ids}

    def command(self, route, **body):
        """Issue a command and return its row after it has finished."""
        issued = self.brain.issue(self.slug, route, agent_id=self.agent.agent_id, **body)
        return self.brain.wait_command(self.slug, issued["id"])

    def completed(self, route, **body):
        """Issue a command, assert that it succeeds, and return its result."""
        row = self.command(route, **body)
        assert row["status"] == "completed", row["error"]
        return row["result"]

    def depth(self, queue):
        """Return the number of messages that wait in a queue."""
        with self.producer.connection_for_read() as connection:
            declared = connection.default_channel.queue_declare(queue, passive=True)
            return declared.message_count

    def depth_in_brain(self):
        """Return the depth of the worker's queue in the brain; ``None`` if it has none."""
        rows = self.brain.stats(self.slug)["queue_depths"]
        depths = {row["name"]: row["pending_count"] for row in rows}
        return depths.get(self.home.name)

    def token(self, queue, depth):
        """Return the token that confirms a purge."""
        secret = decode_agent_hmac_secret(self.agent.hmac_secret)
        return compute_purge_confirm_token(secret=secret, queue_name=queue, queue_depth=depth)

    def hold(self, mark, count):
        """Send tasks that run until :meth:`release`, wait for the first start, return their ids."""
        sent = [self.send("holds", mark) for _ in range(count)]
        until((self.home / f"{mark}.started").exists, "the start of a task", timeout=40)
        return sent

    def release(self, mark):
        """Let the held tasks end."""
        (self.home / f"{mark}.end").touch()


def in_each(projects, work):
    """Call ``work(project)`` for all projects at once and return the results by pool."""
    with ThreadPoolExecutor(len(projects)) as executor:
        results = executor.map(work, projects)
        return {project.pool: result for project, result in zip(projects, results, strict=True)}


@contextmanager
def rabbit_projects(brain, redis_url, broker_url, homes, queue_type):
    """Yield a project for each pool, with a worker.

    :param homes: pytest's ``tmp_path_factory``.
    """
    with ExitStack() as stack:
        projects = [
            stack.enter_context(
                RabbitProject(brain, redis_url, homes.mktemp(pool), broker_url, pool, queue_type)
            )
            for pool in POOLS
        ]
        in_each(projects, RabbitProject.start)
        yield projects
        in_each(projects, RabbitProject.stop)
