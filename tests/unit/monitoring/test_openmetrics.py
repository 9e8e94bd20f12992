"""The text of the metrics, and which agent reports a worker."""

from collections import Counter

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from tests.support.metrics_answers import answer, task
from z4j_bare.monitoring.openmetrics import (
    FAMILIES,
    GONE,
    LIVE,
    SILENT,
    Snapshot,
    families_of,
    render,
)


def parse(*snapshots):
    """Render the snapshots; return the samples by name, and check that both formats are valid."""
    text = render(families_of(list(snapshots)))
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    classic = Counter(sample.name for family in parse_classic(text) for sample in family.samples)
    assert classic == Counter({name: len(samples) for name, samples in found.items()})
    return found


def by_worker(samples):
    """Return the values by the label ``worker``."""
    return {labels["worker"]: value for labels, value in samples}


def test_worker_has_series_of_celery_exporter():
    """Counters, histogram, worker and queue have the names and labels of celery-exporter."""
    row = task(succeeded=3, failed={"KeyError": 2}, runtimes={0.5: 3}, runtime_seconds=1.2)
    found = parse(Snapshot(answer(tasks=[row]), LIVE))
    labels = {
        "name": "shop.pay",
        "queue_name": "orders",
        "hostname": "web-1",
        "worker": "celery@web-1",
        "project": "shop",
    }
    assert found["celery_task_succeeded_total"] == [(labels, 3)]
    assert found["celery_task_succeeded_created"] == [(labels, 1000.5)]
    assert found["celery_task_failed_total"] == [
        ({**labels, "exception": ""}, 0),
        ({**labels, "exception": "KeyError"}, 2),
    ]
    buckets = {each["le"]: value for each, value in found["celery_task_runtime_bucket"]}
    assert (buckets["0.25"], buckets["0.5"], buckets["+Inf"]) == (0, 3, 3)
    assert found["celery_task_runtime_sum"] == [(labels, 1.2)]
    worker = {"hostname": "web-1", "worker": "celery@web-1", "project": "shop"}
    assert found["celery_worker_up"] == [(worker, 1)]
    assert found["celery_worker_tasks_active"] == [(worker, 2)]
    queue = {"queue_name": "orders", "project": "shop"}
    assert found["celery_queue_length"] == [(queue, 7)]
    assert found["celery_active_worker_count"] == [(queue, 1)]
    assert found["z4j_agent_hub_lag_seconds_count"][0][1] == 4


def test_every_family_is_described_and_has_samples():
    """The answers of a Celery worker and of another engine have a sample of every family."""
    row = task(delays={0.5: 1}, delay_seconds=0.4)
    jobs = answer(
        engine="rq", worker="rq-1", pid=8, tasks=[task(engine="rq", worker="rq-1", queue=None)]
    )
    families = families_of(
        [Snapshot(answer(tasks=[row]), LIVE), Snapshot({**jobs, "queues": {"rq": {"q": 1}}}, LIVE)]
    )
    assert [family.name for family in families] == list(FAMILIES)
    assert all(family.samples for family in families)


def test_label_with_special_characters_is_escaped():
    """Quotes, backslashes, line ends and lone surrogates in a name do not break the text."""
    name = 'a"b\\c\nd\ud800é'
    found = parse(Snapshot(answer(tasks=[task(name=name)]), LIVE))
    assert found["celery_task_started_total"][0][0]["name"] == 'a"b\\c\nd?é'


def test_successor_replaces_ended_worker():
    """The counts of an ended process are shown until a process with the same worker name runs."""
    old = Snapshot(answer(pid=1, created=10.0, tasks=[task(started=100)]), GONE)
    found = parse(old)
    assert found["celery_task_started_total"][0][1] == 100
    assert by_worker(found["celery_worker_up"]) == {"celery@web-1": 0}
    assert by_worker(found["celery_worker_tasks_active"]) == {"celery@web-1": 0}
    assert "celery_queue_length" not in found
    new = Snapshot(answer(pid=2, created=20.0, tasks=[task(started=1)]), LIVE)
    for snapshots in ((old, new), (new, old)):
        found = parse(*snapshots)
        assert [value for _, value in found["celery_task_started_total"]] == [1]
        assert by_worker(found["celery_worker_up"]) == {"celery@web-1": 1}
        assert [value for _, value in found["z4j_agent_up"]] == [1]


def test_two_running_workers_with_one_name_are_told_apart():
    """The process that started last has the plain name, and the label of the other its pid."""
    first = Snapshot(answer(pid=1, created=10.0, tasks=[task(started=100)]), LIVE)
    second = Snapshot(answer(pid=2, created=20.0, tasks=[task(started=1)]), LIVE)
    found = parse(first, second)
    assert by_worker(found["celery_task_started_total"]) == {
        "celery@web-1": 1,
        "celery@web-1 (pid 1 on web-1)": 100,
    }
    assert len(found["celery_worker_up"]) == 2
    assert {labels["hostname"] for labels, _ in found["celery_worker_up"]} == {"web-1"}


def test_projects_of_one_host_are_told_apart():
    """Two projects may use the same worker and queue names."""
    shop = Snapshot(answer(pid=1, tasks=[task(started=1)]), LIVE)
    blog = Snapshot(answer(pid=2, project="blog", tasks=[task(started=2)]), LIVE)
    found = parse(shop, blog)
    assert {labels["project"]: value for labels, value in found["celery_task_started_total"]} == {
        "shop": 1,
        "blog": 2,
    }
    assert len(found["celery_queue_length"]) == 2


@pytest.mark.parametrize("state", [LIVE, SILENT, GONE])
def test_own_agent_precedes_agents_that_read_events(state):
    """Tasks that a standalone agent reads from the broker are not counted a second time."""
    own = Snapshot(answer(pid=1, tasks=[task(started=5)]), state)
    standalone = answer(pid=2, worker=None, workers=["celery@web-1", "celery@web-2"])
    standalone["tasks"] = [task(started=4), task(started=3, worker="celery@web-2")]
    found = parse(Snapshot(standalone, LIVE), own)
    assert by_worker(found["celery_task_started_total"]) == {"celery@web-1": 5, "celery@web-2": 3}
    assert by_worker(found["celery_worker_up"]) == {
        "celery@web-1": 0 if state == GONE else 1,
        "celery@web-2": 1,
    }
    assert set(by_worker(found["z4j_agent_up"])) == {"celery@web-1", "bare@web-1-2"}


def test_eager_tasks_have_name_of_process():
    """A process that is no worker has a name of its own, and its eager tasks have this name."""
    web = answer(adapter="django", pid=3, worker=None, tasks=[task(worker=None, started=1)])
    found = parse(Snapshot(web, LIVE))
    assert by_worker(found["celery_task_started_total"]) == {"django@web-1-3": 1}
    assert found["celery_task_started_total"][0][0]["hostname"] == "web-1"
    assert found["z4j_agent_up"][0][0]["hostname"] == "web-1"
    assert "celery_worker_up" not in found


def test_runs_of_killed_worker_are_added_to_reporting_worker():
    """What an agent reports for a dead process is added to the counts of its own worker."""
    own = task(started=5, failed={"KeyError": 1}, runtimes={0.5: 2}, runtime_seconds=0.8)
    reported = task(worker=None, started=1, failed={"KeyError": 1, "WorkerLostError": 2})
    found = parse(Snapshot(answer(tasks=[own, reported]), LIVE))
    assert by_worker(found["celery_task_started_total"]) == {"celery@web-1": 6}
    failed = {labels["exception"]: value for labels, value in found["celery_task_failed_total"]}
    assert failed == {"": 0, "KeyError": 2, "WorkerLostError": 2}
    assert found["celery_task_runtime_count"][0][1] == 2


def test_losses_are_shown_by_reason_and_from_zero():
    """Each reason has a series, the common ones before the first loss."""
    found = parse(Snapshot(answer(lost={"ring": 3, "capacity": 1}), LIVE))
    assert {labels["reason"]: value for labels, value in found["z4j_agent_events_lost_total"]} == {
        "ring": 3,
        "channel": 0,
        "unencodable": 0,
        "uncaptured": 0,
        "capacity": 1,
    }
