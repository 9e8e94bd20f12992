"""``z4j-bare metrics``: output, remembered workers, the file for node_exporter, and the server."""

import json
import sys
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.metrics_answers import answer, task
from z4j_bare import control
from z4j_bare.cli import main, metrics

SILENT = {"adapter": "bare", "pid": 7, "error": "timed out"}


@pytest.fixture
def set_answers(monkeypatch):
    """``set_answers(*answers)``: what all agents answer from now on."""

    def script(*answers):
        metrics.configuration.home().mkdir(mode=0o700, exist_ok=True)
        monkeypatch.setattr(
            control,
            "query",
            lambda verb, *_: [dict(each) for each in answers if verb == control.METRICS],
        )

    return script


@pytest.fixture
def clock(monkeypatch):
    """The time of the command, in seconds since the epoch: ``clock.now``."""
    made = SimpleNamespace(now=2000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(time=lambda: made.now))
    return made


def values(text, name):
    """Return the values of a sample by worker."""
    return {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def printed(capsys, code, *options):
    """Run the command; return what it printed."""
    assert main(["metrics", *options]) == code
    return capsys.readouterr()


def test_metrics_of_all_agents_are_printed(set_answers, capsys):
    """The text has the series of every agent; the exit code says whether all answered."""
    other = answer(pid=9, worker="celery@web-2", tasks=[task(worker="celery@web-2", started=2)])
    set_answers(answer(tasks=[task(started=1)]), other)
    out = printed(capsys, 0).out
    assert out.endswith("# EOF\n")
    assert values(out, "celery_task_started_total") == {"celery@web-1": 1, "celery@web-2": 2}
    out = printed(capsys, 0, "--json").out
    assert (json.loads(out)["schema"], len(json.loads(out)["agents"])) == (1, 2)
    out = printed(capsys, 1, "--adapter", "django")
    assert (out.out, "no agent of adapter django" in out.err) == ("# EOF\n", True)


def test_agent_without_answer_keeps_its_last_series(set_answers, clock, capsys):
    """A worker whose hub is held stays up, however long; its agent is shown as not answering."""
    set_answers(answer(tasks=[task(started=1)]))
    printed(capsys, 0)
    set_answers(SILENT)
    for _ in range(3):
        clock.now += 200
        out = printed(capsys, 1)
        assert "timed out" in out.err
        assert values(out.out, "celery_task_started_total") == {"celery@web-1": 1}
        assert values(out.out, "celery_worker_up") == {"celery@web-1": 1}
        assert values(out.out, "z4j_agent_up") == {"celery@web-1": 0}


def test_agent_that_never_answered_is_shown(set_answers, capsys):
    """An agent without any answer has one series, and a line on stderr."""
    set_answers(answer(), {**SILENT, "pid": 8})
    out = printed(capsys, 1)
    assert values(out.out, "z4j_agent_up") == {"celery@web-1": 1, "bare-8": 0}
    assert "process 8" in out.err


def test_ended_worker_is_shown_for_five_minutes(set_answers, clock, capsys):
    """The series of an ended worker stay for five minutes, with ``celery_worker_up`` 0."""
    set_answers(answer(tasks=[task(started=1)]))
    printed(capsys, 0)
    set_answers()
    clock.now += 299
    out = printed(capsys, 1)
    assert values(out.out, "celery_task_started_total") == {"celery@web-1": 1}
    assert values(out.out, "celery_worker_up") == {"celery@web-1": 0}
    assert "no agent" in out.err
    clock.now += 2
    assert printed(capsys, 1).out == "# EOF\n"


def test_last_counts_of_stopped_worker_replace_remembered_ones(set_answers, clock, capsys):
    """The values at a worker's end are shown, also if no earlier scrape has seen them."""
    set_answers(answer(tasks=[task(started=1)]))
    collector = metrics.Collector(None)
    registry = CollectorRegistry()
    registry.register(collector)
    generate_openmetrics(registry)
    printed(capsys, 0)
    home = metrics.configuration.home()
    for pid, started in ((7, 5), (8, 9)):  # the second worker was never scraped
        name = f"celery@web-{pid}"
        last = answer(pid=pid, worker=name, tasks=[task(worker=name, started=started)])
        file = home / f"metrics-ended-{pid}-abc.json"
        file.write_text(json.dumps({"schema": 1, "at": clock.now, "answer": last}))
    set_answers()
    for text in (printed(capsys, 1).out, generate_openmetrics(registry).decode()):
        assert values(text, "celery_task_started_total") == {"celery@web-7": 5, "celery@web-8": 9}
        assert values(text, "celery_worker_up") == {"celery@web-7": 0, "celery@web-8": 0}
    clock.now += metrics.KEEP_SECONDS + 1
    assert printed(capsys, 1).out == "# EOF\n"


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 9}', '{"schema": 1, "answers": [1]}'])
def test_damaged_memory_is_ignored(set_answers, capsys, content):
    """A file of earlier answers that cannot be read is replaced."""
    path = metrics.configuration.home() / metrics.MEMORY_FILE
    path.parent.mkdir(mode=0o700)
    path.write_text(content)
    set_answers(answer())
    assert values(printed(capsys, 0).out, "celery_worker_up") == {"celery@web-1": 1}
    assert json.loads(path.read_text())["schema"] == 1
    assert path.stat().st_mode & 0o777 == 0o600


def test_output_file_is_replaced_in_one_step(set_answers, capsys, tmp_path):
    """The file is complete and readable for node_exporter; no temporary file is left."""
    set_answers(answer())
    path = tmp_path / "textfiles" / "z4j.prom"
    path.parent.mkdir()
    path.write_text("old")
    assert printed(capsys, 0, "--output", str(path)).out == ""
    assert path.read_text().endswith("# EOF\n")
    assert path.stat().st_mode & 0o444 == 0o444
    assert list(path.parent.iterdir()) == [path]
    out = printed(capsys, 2, "--output", str(tmp_path / "missing" / "z4j.prom"))
    assert "cannot write --output" in out.err


def test_server_has_both_formats(set_answers):
    """``prometheus_client`` writes what the agents answer, as OpenMetrics and in the old format."""
    collector = metrics.Collector(None)
    registry = CollectorRegistry()
    set_answers()
    registry.register(collector)
    set_answers(answer(tasks=[task(started=1, name="a\ud800")]))
    text = generate_openmetrics(registry).decode()
    assert values(text, "celery_task_started_total") == {"celery@web-1": 1}
    assert values(text, "celery_task_started_created") == {"celery@web-1": 1000.5}
    assert b"# TYPE celery_task_started_total counter" in generate_latest(registry)
    set_answers()
    assert values(generate_openmetrics(registry).decode(), "celery_worker_up") == {
        "celery@web-1": 0
    }


def test_missing_package_is_named(capsys, monkeypatch):
    """Without ``prometheus_client`` the error names the extra to install."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    out = printed(capsys, 2, "--listen", "127.0.0.1:0")
    assert "pip install 'z4j-bare[metrics]'" in out.err


def test_used_address_is_an_error(capsys, monkeypatch):
    """An address that another process uses is a usage error that names it."""

    def refuse(*_args, **_options):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("prometheus_client.start_http_server", refuse)
    out = printed(capsys, 2, "--listen", "[::1]:9464")
    assert "cannot listen on --listen ::1:9464: Address already in use" in out.err


@pytest.mark.parametrize("address", ["9464", "host:", "host:70000", "host:http"])
def test_wrong_address_is_usage_error(capsys, address):
    """``--listen`` needs a host and a port."""
    with pytest.raises(SystemExit) as caught:
        main(["metrics", "--listen", address])
    assert caught.value.code == 2
    assert "HOST:PORT" in capsys.readouterr().err
