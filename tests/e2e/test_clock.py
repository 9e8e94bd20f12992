"""A worker on a host whose clock is set during a session with the real brain."""

import re

import pytest

from z4j_bare import control
from z4j_bare.demo.process import until

pytestmark = pytest.mark.timeout(120)

#: Timeout of each awaited condition, in seconds.
TIMEOUT = 40.0

#: The pools, in workers of one project.
POOLS = ("gevent", "prefork")

NO_SESSION = re.compile(r"WARNING\S* z4j: no session \(auth\): (.*?), which allows 60 s")


class Clock:
    """The wall clock of the workers, in a file."""

    def __init__(self, path):
        self.path = path
        self.set_by(0)

    def set_by(self, seconds):
        """Set the workers' clock to the real time plus ``seconds``."""
        new = self.path.with_suffix(".new")
        new.write_text(str(seconds))
        new.rename(self.path)  # no worker reads an empty file


@pytest.fixture
def clock(fresh_project):
    """The clock of the workers of the project."""
    return Clock(fresh_project.home / "shift")


def test_steps_of_clock_lose_nothing(fresh_project, clock, monkeypatch):
    """Each wrong time is logged at once. The events of that time arrive when the clock is right."""
    project = fresh_project
    monkeypatch.setenv("Z4J_HOME", str(project.home / "agent"))
    workers = {
        pool: project.worker(
            "shifting",
            pool=pool,
            name=f"{pool}@e2e",
            environment={"SHIFT": str(clock.path)},
            options=("--queues", f"{project.home.name}-{pool}"),
        )
        for pool in POOLS
    }
    queues = [f"{project.home.name}-{pool}" for pool in POOLS]
    for queue in queues:
        project.warm_up(queue=queue)
    sent = [project.send("ticks", "all", queue=queue) for queue in queues]
    for task_id in sent:
        project.row(task_id, "started")
    said = []
    for seconds, difference in ((7200, "7200 s ahead of"), (-5400, "5400 s behind")):
        clock.set_by(seconds)
        said.append(f"this host's clock is {difference} the brain's")
        # The events of these tasks are sent at once, and rejected because of the wrong time.
        ran = [project.send("fails", difference, queue=queue) for queue in queues]
        for task_id in ran:
            assert project.outcome(task_id)[0] == "FAILURE"
        for worker in workers.values():
            until(lambda worker=worker: said[-1] in worker.output(), said[-1], timeout=TIMEOUT)
            assert "Z4J_HMAC_SECRET" not in worker.output()
        sent += ran
    (project.home / "all.end").touch()
    for task_id in sent[: len(queues)]:
        project.outcome(task_id)
    assert all("connected again" not in worker.output() for worker in workers.values())
    clock.set_by(0)
    states = [project.row(task_id)["state"] for task_id in sent]
    assert states == ["success"] * 2 + ["failure"] * 4
    assert [project.kinds(task_id) for task_id in sent[2:]] == [
        ["task.failed", "task.received", "task.started"]
    ] * 4
    for worker in workers.values():
        assert NO_SESSION.findall(worker.output()) == said
        until(lambda worker=worker: "connected again" in worker.output(), "a session", timeout=60)
        assert worker.output().count("connected again") == 1
    assert [agent["lost"] for agent in control.status()] == [{}, {}]
