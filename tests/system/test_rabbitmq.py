"""Workers on RabbitMQ, in gevent, threads and prefork, on classic and on quorum queues."""

import shlex
import time
from contextlib import ExitStack

import pytest

from tests.support.demo_run import assert_figures_agree, run_demo
from tests.support.rabbit_project import POOLS, RabbitProject, in_each, rabbit_projects
from tests.support.standalone import standalone_agent, start_standalone_agent
from z4j_bare.demo import broker
from z4j_bare.demo.process import until
from z4j_bare.demo.worker import Worker

pytestmark = pytest.mark.timeout(240)

ALL = dict.fromkeys


@pytest.fixture(scope="module", params=["classic", "quorum"])
def projects(request, brain, redis_url, rabbit, tmp_path_factory):
    """A project for each pool, each with one worker."""
    with rabbit_projects(
        brain, redis_url, rabbit.url(), tmp_path_factory, request.param
    ) as projects:
        yield projects


@pytest.mark.parametrize("pool", POOLS)
def test_demo_figures_agree_on_rabbitmq(pool, rabbit, tmp_path):
    """The day of the demo agrees, and leaves no queue or exchange behind."""
    url = rabbit.add_vhost(f"demo-{pool}")
    assert_figures_agree(pool, tmp_path, "--broker", url)
    for kind in ("queues", "exchanges"):
        left = rabbit.control("-q", f"list_{kind}", "-p", f"demo-{pool}", "name")
        assert "z4j-demo" not in left


def test_brain_shows_true_states(projects):
    """Success, failure, retry, a task with a countdown and a chain have their true rows."""

    def run(project):
        sent = {
            "success": [project.send("add", 1, 2)],
            "failure": [project.send("fails", "broken")],
        }
        # On a quorum queue Celery rejects a retry whose countdown is shorter than a second.
        rejected = project.queue_type == "quorum"
        sent["failure" if rejected else "success"].append(project.send("retries"))
        later = project.producer.send_task("e2e.add", args=(1, 1), countdown=1)
        link = project.producer.signature("e2e.add", args=(10,))
        second = (project.producer.signature("e2e.add", args=(1, 2)) | link).apply_async()
        sent["success"] += [later.id, second.id, second.parent.id]
        rows = [project.row(each, state) for state, ids in sent.items() for each in ids]
        return {row["queue"] == project.home.name for row in rows}

    assert in_each(projects, run) == ALL(POOLS, {True})


@pytest.mark.parametrize("projects", ["quorum"], indirect=True)
def test_brain_shows_depth_of_queue(projects):
    """The brain shows how many messages wait, as RabbitMQ counts them."""

    def run(project):
        sent = project.hold("depth", 12)

        def shown():
            depth = project.depth(project.home.name)
            return depth and depth == project.depth_in_brain()

        until(shown, "the depth", timeout=60, interval=0.5)
        project.release("depth")
        return project.states(sent)

    assert in_each(projects, run) == ALL(POOLS, {"success"})


def test_consumer_commands_take_effect(projects):
    """A worker consumes another queue, and then no longer."""

    def run(project):
        queue = f"{project.home.name}-extra"
        project.completed("add-consumer", worker_name="w1@e2e", queue=queue)
        project.row(project.send("add", 4, 4, queue=queue), "success")
        project.completed("cancel-consumer", worker_name="w1@e2e", queue=queue)
        project.send("add", 1, 1, queue=queue)
        project.row(project.send("add", 2, 2), "success")
        return project.depth(queue)

    assert in_each(projects, run) == ALL(POOLS, 1)


def test_purge_command_takes_effect(projects):
    """A queue is purged only with a token of its depth, and tasks that run go on.

    The brain accepts ten purges a minute.
    """

    def run(project):
        queue = project.home.name
        sent = project.hold("purge", 12)
        project.row(sent[0], "started")
        depth = until(lambda: project.depth(queue), "the depth", timeout=20)
        wrong = project.command("purge-queue", queue=queue, confirm_token=project.token(queue, 1))
        assert "confirm_token mismatch" in wrong["error"]
        token = project.token(queue, depth)
        assert project.completed("purge-queue", queue=queue, confirm_token=token)["purged"] == depth
        if project.pool == "gevent":
            absent = project.command("purge-queue", queue="no-such-queue", observed_depth=0)
            assert "cannot measure" in absent["error"]
            project.completed("purge-queue", queue=queue, force=True)
        project.release("purge")
        project.row(sent[0], "success")
        return project.depth(queue)

    assert in_each(projects, run) == ALL(POOLS, 0)


def test_cancel_and_retry_commands_take_effect(projects):
    """A running task is cancelled where the pool can, a waiting one everywhere, and one retried."""

    def run(project):
        if project.pool != "threads":
            running = project.send("wait", 60)
            project.row(running, "started")
            project.completed("cancel-task", engine="celery", task_id=running)
            project.row(running, "revoked")
        failed = project.send("fails_once", "again")
        project.row(failed, "failure")
        again = project.completed("retry-task", engine="celery", task_id=failed)["new_task_id"]
        return project.row(again, "success")["name"]

    assert in_each(projects, run) == ALL(POOLS, "e2e.fails_once")


def test_killed_broker_loses_no_end(projects, rabbit):
    """Tasks that end after RabbitMQ was killed are successes, as are those that wait or follow."""

    def outage(release):
        rabbit.kill()
        release()
        time.sleep(1)  # the running tasks end
        rabbit.start()

    assert states_after_outage(projects, "kill", outage) == ALL(POOLS, {"success"})


@pytest.mark.parametrize("projects", ["classic"], indirect=True)
def test_restarted_broker_loses_no_end(projects, rabbit):
    """The same if RabbitMQ is stopped, so that it closes the connections itself."""

    def outage(release):
        rabbit.restart()
        release()

    assert states_after_outage(projects, "restart", outage) == ALL(POOLS, {"success"})


def states_after_outage(projects, mark, outage):
    """Return the final states of tasks that run and wait during an outage, and of later ones.

    An operator retries a task after the outage, in which the agent's connection was lost.

    :param outage: called with a function that lets the running tasks end.
    """

    def before(project):
        # With Celery 5.7, a worker of another pool may run no more tasks if some waited in the pool
        # during the outage, with or without an agent.
        return project.hold(mark, 6 if project.pool == "prefork" else 2)

    def after(project):
        failed = project.send("fails_once", mark)
        project.row(failed, "failure")
        again = project.completed("retry-task", engine="celery", task_id=failed)["new_task_id"]
        return project.states([*sent[project.pool], again])

    sent = in_each(projects, before)
    outage(lambda: in_each(projects, lambda project: project.release(mark)))
    states = in_each(projects, after)
    logs = in_each(projects, lambda project: (project.home / "w1@e2e.log").read_text())
    for error in ("died and runs again", "please report", "cannot switch"):
        assert [pool for pool, log in logs.items() if error in log] == [], error
    return states


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "refuses the virtual host 'absent': NOT_ALLOWED - vhost absent not found"),
        ("closed", "refuses the virtual host 'closed': NOT_ALLOWED - access to vhost"),
        ("a b/c'd", "refuses the virtual host \"a b/c'd\": NOT_ALLOWED - vhost a b/c'd not found"),
    ],
)
def test_refused_vhost_is_reported_in_one_line(rabbit, tmp_path, name, message):
    """A virtual host that does not exist or is not allowed is reported with the fix."""
    if name == "closed":
        rabbit.control("add_vhost", name)
    code, out, err = run_demo(tmp_path, "--broker", rabbit.url(name))
    assert (code, out) == (1, "")
    assert err.startswith("z4j-bare demo: --broker: the broker at amqp://z4j:**@127.0.0.1:")
    assert message in err
    command = err.partition("rabbitmqctl set_permissions ")[2]
    assert shlex.split(command) == ["-p", name, "z4j", ".*", ".*", ".*"]
    assert len(err.splitlines()) == 1


def test_limit_of_connections_is_reported_in_one_line(rabbit, tmp_path):
    """If a virtual host's limit is reached, the fix is not to create the virtual host."""
    url = rabbit.add_vhost("limited")
    rabbit.control("set_vhost_limits", "-p", "limited", '{"max-connections": 0}')
    code, _out, err = run_demo(tmp_path, "--broker", url)
    assert code == 1
    assert "refuses another connection: NOT_ALLOWED - " in err
    assert "raise the limit: rabbitmqctl list_vhost_limits" in err
    assert len(err.splitlines()) == 1


def test_starting_worker_names_fix_of_refused_vhost(rabbit, agent_credentials, tmp_path):
    """Celery never makes such a worker ready; the agent's line beside Celery's names the fix."""
    credentials = agent_credentials()
    line = "rabbitmqctl set_permissions -p 'absent' 'z4j' '.*' '.*' '.*' (setting: broker_url)"
    with ExitStack() as stack:
        workers = []
        for pool in POOLS:
            home = tmp_path / pool
            home.mkdir()
            variables = {
                **broker.environment(home, rabbit.url("absent")),
                **credentials.env(home / "agent"),
            }
            app, log = "z4j_bare.demo.app", home / "worker.log"
            started = stack.enter_context(Worker(app, pool=pool, log=log, environment=variables))
            stack.callback(started.kill)  # it would wait for the broker
            started.spawn(lambda: True, 10)
            workers.append(started)
        for each in workers:
            until(lambda each=each: line in each.output(), line, timeout=40)
    for each in workers:
        assert each.output().count("z4j: no task can arrive: the broker at amqp://z4j:**@") == 1
        assert "please report" not in each.output()


def test_standalone_agent_reports_all_and_executes_commands(rabbit, brain, redis_url, tmp_path):
    """``z4j-bare run --celery-app`` beside a worker without an agent, also after a restart of
    RabbitMQ: each event is there once, and commands take effect.
    """
    url = rabbit.add_vhost("standalone")
    with RabbitProject(brain, redis_url, tmp_path, url, "prefork", "classic") as project:
        project.worker("sample_tasks", pool="prefork", name="w1@e2e", agent=False)
        with standalone_agent(project, "sample_tasks:app") as agent:
            start_standalone_agent(agent, project)
            assert_day_is_complete(project)
            failed = project.send("fails_once", "again")
            project.row(failed, "failure")
            again = project.completed("retry-task", engine="celery", task_id=failed)
            project.row(again["new_task_id"], "success")
            running = project.send("wait", 60)
            project.row(running, "started")
            project.completed("cancel-task", engine="celery", task_id=running)
            project.row(running, "revoked")
            rabbit.restart()
            project.warm_up()
            assert_day_is_complete(project)
            queue = f"{project.home.name}-extra"
            project.completed("add-consumer", worker_name="w1@e2e", queue=queue)
            project.row(project.send("add", 4, 4, queue=queue), "success")
            assert agent.stop() == 0
        assert "Traceback" not in agent.output()


def assert_day_is_complete(project):
    """Run tasks of each kind, and assert that the brain has each of their events once."""
    link = project.producer.signature("e2e.add", args=(10,))
    chain = (project.producer.signature("e2e.add", args=(1, 2)) | link).apply_async()
    complete = {
        **{project.send("add", number, 1): "succeeded" for number in range(20)},
        **{project.send("fails", "broken"): "failed" for _ in range(3)},
        chain.id: "succeeded",
        chain.parent.id: "succeeded",
    }
    retried = project.send("retries")
    for task_id, end in complete.items():
        assert project.row(task_id)["worker_name"] == "w1@e2e"
        assert project.kinds(task_id) == sorted(["task.received", "task.started", f"task.{end}"])
    assert project.row(retried, "success")["retry_count"] == 2


def test_deleted_vhost_is_logged_once(rabbit, brain, redis_url, tmp_path):
    """A running worker whose virtual host is deleted names the fix, and works when it is back."""
    url = rabbit.add_vhost("deleted")
    with RabbitProject(brain, redis_url, tmp_path, url, "threads", "classic") as project:
        project.start()
        rabbit.control("delete_vhost", "deleted")
        line = "refuses the virtual host 'deleted': NOT_ALLOWED"
        until(lambda: "no task can arrive" in project.host.output(), line, timeout=60)
        assert line in project.host.output()
        rabbit.add_vhost("deleted")
        project.row(project.send("add", 1, 2), "success")
        assert project.host.output().count("z4j: no task can arrive") == 1


def test_refused_password_is_reported_in_one_line(rabbit, tmp_path):
    """A wrong password is reported, but not shown."""
    code, out, err = run_demo(tmp_path, "--broker", rabbit.url(password="wrong-password"))
    assert (code, out) == (1, "")
    assert "refuses the user: ACCESS_REFUSED" in err
    assert "wrong-password" not in err
    assert len(err.splitlines()) == 1
