"""The persistent workers: bounded, persistent, honest about what never began."""

import pytest

from z4j_bare.asyncio_bridge.future import as_exception
from z4j_bare.asyncio_bridge.worker_pool import Job, WorkerPool
from z4j_bare.errors import AgentError


@pytest.fixture
def workers(backend):
    made = WorkerPool(backend, "z4j-test", 3)
    yield made
    made.stop()


def test_values_and_errors_come_back(workers):
    """A call returns what the function returns and raises what it raises."""
    assert workers.call(divmod, 7, 2, timeout=5, what="divmod") == (3, 1)
    with pytest.raises(ZeroDivisionError):
        workers.call(divmod, 7, 0, timeout=5, what="divmod")


def test_sequential_calls_share_one_or_two_workers(workers):
    """Calls one after the other do not open a worker each."""
    for _ in range(50):
        workers.call(int, timeout=5, what="int")
    assert workers.size <= 2


def test_a_hung_call_occupies_its_own_worker_only(workers, backend, until):
    """With two of three workers hung the third still answers; with all hung a call times out, and never runs later."""
    release = backend.event()
    ran = []
    hung = Job(release.wait, (20,), lambda *_: None, lambda: True)
    workers.start()
    for _ in range(2):
        workers.submit(hung)
    assert workers.call(int, timeout=10, what="int") == 0
    workers.submit(hung)
    until(lambda: workers.busy == 3 and not workers._jobs)
    with pytest.raises(TimeoutError):
        workers.call(ran.append, 1, timeout=0.02, what="never")
    release.set()
    until(lambda: not workers.busy)
    assert workers.call(int, timeout=5, what="int") == 0
    assert ran == []


def test_every_job_of_a_burst_runs_once(workers, until):
    """A burst beyond the number of workers is worked off completely."""
    done = []
    workers.start()
    for number in range(500):
        workers.submit(Job(int, (number,), lambda _ok, value: done.append(value), lambda: True))
    until(lambda: len(done) == 500)
    assert sorted(done) == list(range(500))


def test_stop_fails_what_is_queued_and_what_comes_later(workers, backend, until):
    """After stop nothing waits for ever: queued and later jobs fail at once, running ones finish."""
    release = backend.event()
    done = []
    workers.start()
    for _ in range(4):
        workers.submit(
            Job(release.wait, (20,), lambda ok, value: done.append((ok, value)), lambda: True)
        )
    until(lambda: workers.size == 3 and not workers._idle and len(workers._jobs) == 1)
    workers.stop()
    workers.stop()
    assert [ok for ok, _ in done] == [False]
    with pytest.raises(AgentError):
        workers.call(int, timeout=5, what="int")
    release.set()
    until(lambda: workers.size == 0)
    assert [ok for ok, _ in done] == [False, True, True, True]


def test_without_threads_a_call_runs_inline(workers, backend, monkeypatch):
    """When the interpreter starts no more threads, a call still happens."""

    def refuse(*_args, **_kwargs):
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(backend, "spawn", refuse)
    assert workers.call(int, timeout=5, what="int") == 0
    assert workers.size == 0


@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt(), StopIteration(), BaseException("x")]
)
def test_what_would_kill_a_loop_is_wrapped(error, workers):
    """Exceptions that futures refuse or that end loops arrive as AgentError, cause attached; workers survive them."""
    assert as_exception(error).__cause__ is error

    def raises():
        raise error

    with pytest.raises(AgentError):
        workers.call(raises, timeout=5, what="raises")
    assert workers.call(int, timeout=5, what="int") == 0
