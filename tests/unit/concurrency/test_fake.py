"""The backend with virtual time."""

from z4j_bare.concurrency.fake import FakeConcurrency


def test_fake_runs_an_hour_without_waiting():
    """A loop runs for an hour of virtual time, and both clocks show it."""
    fake, wakes = FakeConcurrency(start=1000.0), []

    def loop():
        while True:
            fake.sleep(60)
            wakes.append(fake.now())

    fake.spawn(loop, name="loop")
    fake.advance(3600)
    assert wakes == [60.0 * turn for turn in range(1, 61)]
    assert (fake.now(), fake.wall()) == (3600.0, 4600.0)


def test_fake_runs_tasks_in_fixed_order():
    """Tasks run in the order in which they were spawned and woken."""
    fake, order = FakeConcurrency(), []

    def work(name, seconds):
        fake.sleep(seconds)
        order.append(name)

    for name, seconds in (("late", 3), ("early", 1), ("also-early", 1), ("middle", 2)):
        fake.spawn(work, name, seconds, name=name)
    fake.advance(10)
    assert order == ["early", "also-early", "middle", "late"]


def test_fake_waits_in_virtual_time():
    """Events, locks, joins and timeouts use virtual time, in tasks and in the test."""
    fake, results = FakeConcurrency(), []
    event, lock = fake.event(), fake.lock()

    def waiter():
        results.append(("timeout", fake.wait(event, 5), fake.now()))
        results.append(("set", fake.wait(event, 100), fake.now()))
        with lock:
            results.append(("lock", True, fake.now()))

    def setter():
        with lock:
            fake.sleep(8)
            event.set()
            fake.sleep(4)

    task = fake.spawn(waiter, name="w")
    fake.spawn(setter, name="s")
    assert task.join(3) is False
    assert fake.run_until(lambda: len(results) == 3, 60)
    assert results == [("timeout", False, 5.0), ("set", True, 8.0), ("lock", True, 12.0)]
    assert task.join(1) is True
    assert fake.event().wait(2) is False
    assert fake.run_until(lambda: False, 1) is False


def test_fake_logs_errors_and_offloads(caplog):
    """The fake logs the error of a task and returns offloaded results as values."""
    fake = FakeConcurrency()

    def fail():
        fake.sleep(1)
        raise ValueError("on purpose")

    assert fake.spawn(fail, name="failing").join(5)
    assert "on purpose" in caplog.text
    assert fake.offload(int, "x")[0] is False
    assert fake.offload(int, "7") == (True, 7)
    assert fake.name == "fake"
