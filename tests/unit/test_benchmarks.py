"""The calculations of ``benchmarks``, without a brain and without processes."""

import argparse
import importlib
import json
import math
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest

from benchmarks import __main__, fleet
from benchmarks.figures import compare, paired_difference
from benchmarks.inside.bench_sink import Counts, Sentry
from benchmarks.trial import Trial
from z4j_bare.demo.process import HarnessError


def result(**fields):
    """Return the result of a host that recorded and delivered nothing."""
    nothing = {
        "produced": 0,
        "acks": [],
        "delays": [],
        "sessions": [],
        "cpu_ms_per_second": 0.0,
        "pss_mb": 0.0,
        "stats": {"lost": {}},
    }
    return fleet.Result(**{**nothing, **fields})


def options(*words):
    """Return the parsed options of the benchmark."""
    parser = argparse.ArgumentParser()
    fleet.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("moments", "expected"),
    [
        ([], (0.0, 0.0)),
        ([7.0], (0.0, 0.0)),
        ([0.0, 2.0], (0.0, 2.0)),
        ([0.0, 5.0, 6.0, 10.0], (5.0, 4.0)),
        ([0.0, 3.0, 9.0, 9.0, 9.0], (3.0, 6.0)),
    ],
    ids=str,
)
def test_pause_before_last_ack_is_separate(moments, expected):
    """The longest pause excludes the pause before the last ack; acks at one moment count as one."""
    assert fleet.pauses(moments) == expected


def test_pause_of_restart_does_not_count():
    """A pause that overlaps the restart is excluded; pauses before and after it count."""
    moments = [0.0, 3.0, 20.0, 24.0, 25.0]
    assert fleet.pauses(moments, restarted=(5.0, 18.0)) == (4.0, 1.0)
    assert fleet.pauses(moments) == (17.0, 1.0)


def test_spread_of_sorted_values():
    """The quantiles are values of the list; an empty list has none."""
    assert fleet.spread([]) == {}
    assert set(fleet.spread([3.0]).values()) == {3.0}
    assert fleet.spread(list(range(101))) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def test_summary_adds_up_all_hosts():
    """Events, losses and sessions are sums, costs are medians, seconds end with the last ack."""
    hosts = [
        result(
            produced=10,
            acks=[(101.0, 4), (103.0, 6)],
            delays=[1.0, 3.0],
            sessions=[(100.5, "s1", "ws")],
            cpu_ms_per_second=1.0,
            pss_mb=15.0,
        ),
        result(
            produced=10,
            acks=[(110.0, 7)],
            delays=[2.0],
            sessions=[(100.5, "s2", "longpoll"), (104.0, None, "")],
            cpu_ms_per_second=3.0,
            pss_mb=17.0,
            stats={"lost": {"ring": 2, "disk": 1}},
        ),
    ]
    figures = fleet.summary(hosts, began=100.0, restarted=None)
    assert figures["produced"] == 20
    assert figures["acknowledged"] == 17
    assert figures["lost"] == 3
    assert figures["sessions over long-poll"] == 1
    assert figures["seconds"] == 10.0
    assert (figures["longest pause"], figures["pause before last frame"]) == (2.0, 7.0)
    assert (figures["CPU ms/s"], figures["PSS MB"]) == (2.0, 16.0)
    assert figures["delay"]["max"] == 3.0
    assert "back after" not in figures


def test_summary_counts_return_from_readiness_of_brain():
    """An agent is back with its first session after the stop, in seconds since the brain's start.

    A session that the brain accepts before it counts as ready is back at once.
    """
    hosts = [
        result(sessions=[(1.0, "s1", "ws"), (10.2, None, ""), (16.0, "s2", "ws")]),
        result(sessions=[(1.0, "s3", "ws"), (13.5, "s4", "ws"), (30.0, "s5", "ws")]),
    ]
    figures = fleet.summary(hosts, began=0.0, restarted=(10.0, 14.0))
    assert figures["brain down"] == 4.0
    assert (figures["back after"]["p50"], figures["back after"]["max"]) == (0.0, 2.0)


def test_summary_without_acks_has_no_duration():
    """A run in which nothing arrived has a summary without a duration."""
    figures = fleet.summary([result(produced=5)], began=3.0, restarted=None)
    assert (figures["produced"], figures["acknowledged"], figures["seconds"]) == (5, 0, 0.0)
    assert figures["delay"] == {}


def test_board_is_shared_by_path(tmp_path):
    """A second object with the same path reads the numbers and the signs of the first object."""
    host = fleet.Board(tmp_path / "board", 3)
    reader = fleet.Board(tmp_path / "board", 3)
    host.write(1, 500, 250, True, 2)
    assert reader.read() == [(0, 0, False, 0), (500, 250, True, 2), (0, 0, False, 0)]
    assert not reader.exists("stop")
    host.touch("stop")
    assert reader.exists("stop")


class Agent:
    """An agent's credentials."""

    def __init__(self, name):
        self.name = name

    def env(self, home):
        return {"Z4J_TOKEN": self.name, "Z4J_HOME": str(home)}


def test_agents_share_tokens_evenly(tmp_path, monkeypatch):
    """Each agent has its own home, and the tokens are assigned in turn."""
    monkeypatch.setattr(fleet, "Fleet", lambda home, plans: SimpleNamespace(home=home, plans=plans))
    trial = fleet.Trial(None, tmp_path, options("--rate", "2", "--seconds", "30"))
    made = trial._fleet([Agent("a"), Agent("b")], 5, 100, 2.0)
    assert [plan.environment["Z4J_TOKEN"] for plan in made.plans] == ["a", "b", "a", "b", "a"]
    assert len({plan.environment["Z4J_HOME"] for plan in made.plans}) == 5
    assert {(plan.backlog, plan.rate, plan.seconds) for plan in made.plans} == {(100, 2.0, 30.0)}
    other = trial._fleet([Agent("a")], 1, 100, 0.0)
    assert other.plans[0].seconds == 0.0
    assert other.home != made.home


def test_rows_and_tasks_are_counted_on_sqlite(tmp_path):
    """The number of rows exceeds the number of tasks by the doubled events."""
    path = tmp_path / "brain.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE events (task_id TEXT)")
        connection.executemany("INSERT INTO events VALUES (?)", [("a",), ("b",), ("b",)])
    brain = SimpleNamespace(database_url=f"sqlite+aiosqlite:///{path}?x=1")
    assert fleet.Trial(brain, tmp_path, None)._rows() == (3, 2)


def test_time_is_compared_with_mean_rate_of_one_agent():
    """1000 events in 15 s, which one agent sends at 100 events/s, take 1.5 times as long."""
    found = fleet._compare([90.0, 110.0], {"seconds": 15.0, "produced": 1000})
    assert found["time relative to one agent"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rate", "1", "--tokens", "0"], "--tokens"),
        (["--rate", "1", "--agents", "2", "--tokens", "3"], "--tokens"),
        (["--rate", "1", "--agents", "0"], "--tokens"),
        (["--rate", "-1"], "negative"),
        (["--backlog", "-1"], "negative"),
        (["--rate", "1", "--seconds", "0"], "--seconds"),
        ([], "no events"),
        (["--backlog", "5", "--restart"], "--restart needs --rate"),
    ],
    ids=str,
)
def test_options_that_measure_nothing_are_refused(words, reason):
    """A wrong combination of options is an error before a process is started."""
    with pytest.raises(HarnessError, match=reason):
        fleet.check_options(options(*words))


def test_options_of_documentation_are_accepted():
    """The commands of the README are valid."""
    fleet.check_options(options("--agents", "10", "--backlog", "500", "--tokens", "1"))
    fleet.check_options(options("--agents", "50", "--rate", "1", "--tokens", "10", "--restart"))


def trial(name, cpu, rss, rows=10):
    """Return a trial of ten tasks."""
    return Trial(name, "gevent", tasks=10, cpu=cpu, rss=rss, pss=rss, rows=rows)


def test_comparison_is_paired_by_round():
    """Ratios and differences compare the workers of one round, whatever the machine's speed."""
    rounds = [
        {"off": trial("off", 1.0, 50e6, None), "ours": trial("ours", 1.1, 60e6)},
        {"off": trial("off", 3.0, 51e6, None), "ours": trial("ours", 3.3, 61e6, 9)},
    ]
    found = compare(rounds, ("off", "ours"))
    ours = found["ours"]
    assert (ours.tasks, ours.arrived) == (20, 19)
    for ratio in (ours.to_base.mean, ours.to_base.low, ours.to_base.high):
        assert ratio == pytest.approx(1.1)
    assert str(ours.added_rss_mb) == "+10.0 [10.0, 10.0]"
    assert ours.to_ours is None
    assert found["off"].to_base is None
    assert found["off"].arrived is None
    assert found["off"].to_ours.mean == pytest.approx(1 / 1.1)


def test_difference_of_one_round_has_no_interval():
    """The interval of a single round is infinite."""
    assert paired_difference([3.0], [1.0]).low == -math.inf
    assert paired_difference([3.0], [1.0]).high == math.inf


def envelope(*items):
    """Return a Sentry envelope with items of (type, payload)."""
    lines = [b'{"event_id": "e"}']
    for kind, payload in items:
        text = json.dumps(payload).encode()
        lines += [json.dumps({"type": kind, "length": len(text)}).encode(), text]
    return b"\n".join(lines) + b"\n"


def test_sink_counts_each_run_of_sentry_once():
    """A failed run counts by its event, a successful run by its transaction, no other task."""
    counts = Counts()
    answer, _ = Sentry(counts).receive(
        "/api/1/envelope/",
        envelope(
            ("event", {"transaction": "bench.fails"}),
            ("transaction", {"transaction": "bench.fails"}),
            ("transaction", {"transaction": "bench.nap"}),
            ("transaction", {"transaction": "celery.ping"}),
            ("client_report", {}),
            ("event", {}),
        ),
    )
    assert json.loads(answer) == {"id": "e"}
    assert json.loads(counts.to_json()) == {"succeeded": 1, "failed": 1}


@pytest.mark.parametrize("name", __main__.NAMES)
def test_every_benchmark_has_options_and_a_title(name):
    """Each benchmark module can be imported, and has the options and title for the command line."""
    module = importlib.import_module(f"benchmarks.{name}")
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run)
    assert module.__doc__
