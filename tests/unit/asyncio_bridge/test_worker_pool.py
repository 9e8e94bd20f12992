"""The worker pool: bounded, persistent, and no job runs after its caller gave up."""

import pytest

from z4j_bare.asyncio_bridge.future import as_exception
from z4j_bare.asyncio_bridge.worker_pool import Job, WorkerPool
from z4j_bare.errors import AgentError


@pytest.fixture
def pool(backend):
    made = WorkerPool(backend, "z4j-test", 3)
    yield made
    made.stop()


def test_call_returns_value_or_raises(pool):
    """A call returns the function's value or raises its exception."""
    assert pool.call(divmod, 7, 2, timeout=5, description="divmod") == (3, 1)
    with pytest.raises(ZeroDivisionError):
        pool.call(divmod, 7, 0, timeout=5, description="divmod")


def test_sequential_calls_share_two_workers(pool):
    """Calls made one after another use at most two workers."""
    for _ in range(50):
        pool.call(int, timeout=5, description="int")
    assert pool.size <= 2


def test_hung_call_blocks_only_its_own_worker(pool, backend, until):
    """The third of three workers still runs; with all hung a call times out and never runs."""
    release = backend.event()
    ran = []
    hung = Job(release.wait, (20,), lambda *_: None, lambda: True)
    pool.start()
    for _ in range(2):
        pool.submit(hung)
    assert pool.call(int, timeout=10, description="int") == 0
    pool.submit(hung)
    until(lambda: pool.busy == 3 and not pool._jobs)
    with pytest.raises(TimeoutError):
        pool.call(ran.append, 1, timeout=0.02, description="never")
    release.set()
    until(lambda: not pool.busy)
    assert pool.call(int, timeout=5, description="int") == 0
    assert ran == []


def test_each_job_of_a_burst_runs_once(pool, until):
    """Of 500 jobs on three workers each runs once."""
    done = []
    pool.start()
    for number in range(500):
        pool.submit(Job(int, (number,), lambda _ok, value: done.append(value), lambda: True))
    until(lambda: len(done) == 500)
    assert sorted(done) == list(range(500))


def test_stop_fails_queued_and_later_jobs(pool, backend, until):
    """After stop queued and later jobs fail at once, and running ones finish."""
    release = backend.event()
    done = []
    pool.start()
    for _ in range(4):
        pool.submit(
            Job(release.wait, (20,), lambda ok, value: done.append((ok, value)), lambda: True)
        )
    until(lambda: pool.size == 3 and not pool._idle and len(pool._jobs) == 1)
    pool.stop()
    pool.stop()
    assert [ok for ok, _ in done] == [False]
    with pytest.raises(AgentError):
        pool.call(int, timeout=5, description="int")
    release.set()
    until(lambda: pool.size == 0)
    assert [ok for ok, _ in done] == [False, True, True, True]


def test_call_runs_inline_when_no_thread_starts(pool, backend, monkeypatch):
    """During interpreter shutdown, when no thread can start, a call runs inline."""

    def refuse(*_args, **_kwargs):
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(backend, "spawn", refuse)
    assert pool.call(int, timeout=5, description="int") == 0
    assert pool.size == 0


@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt(), StopIteration(), BaseException("x")]
)
def test_base_exception_is_wrapped(error, pool):
    """Exceptions that futures refuse or that end loops become AgentError; workers survive them."""
    assert as_exception(error).__cause__ is error

    def raises():
        raise error

    with pytest.raises(AgentError):
        pool.call(raises, timeout=5, description="raises")
    assert pool.call(int, timeout=5, description="int") == 0
