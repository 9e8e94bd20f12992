"""The queue of a message, by exchange and routing key."""

from types import SimpleNamespace

from kombu import Exchange, Queue, binding

from z4j_bare.engines.celery.queue_names import QueueNames, routing_key

TOPIC, DIRECT, FANOUT = Exchange("t", "topic"), Exchange("d", "direct"), Exchange("f", "fanout")
QUEUES = [
    Queue("orders", DIRECT, routing_key="order.new"),
    Queue("logs", TOPIC, routing_key="*.log.#"),
    Queue("two", bindings=[binding(DIRECT, "a"), binding(DIRECT, "b")]),
    Queue("all", FANOUT),
]


def names(queues):
    return QueueNames(SimpleNamespace(task_consumer=SimpleNamespace(queues=queues)))


def of(exchange, key, queues=QUEUES):
    """The queue of a message, by an empty cache and by a full one."""
    found = names(queues)
    info = {"exchange": exchange, "routing_key": key}
    first = found.of(info)
    assert found.of(info) == first
    return first


def test_bindings_give_queue():
    """Direct, topic and fanout exchanges route by their own rules, also by several bindings."""
    assert of("", "anything") == "anything"
    assert of(None, "q") == "q"
    assert of("d", "order.new") == "orders"
    assert (of("d", "a"), of("d", "b")) == ("two", "two")
    assert (of("t", "app.log"), of("t", "app.log.error")) == ("logs", "logs")
    assert of("f", "whatever") == "all"


def test_unbound_message_has_only_queue_or_none():
    """A message that no binding explains is from the only queue, or from the one of that name."""
    assert of("x", "key", QUEUES[:1]) == "orders"
    assert of("x", "logs") == "logs"
    assert of("x", "key") is None
    assert of("d", "order.new", [*QUEUES, Queue("copy", DIRECT, routing_key="order.new")]) is None


def test_message_that_waited_in_rabbitmq_has_original_queue():
    """Kombu's delayed delivery puts the countdown's bits before the routing key."""
    delay = "0." * 27 + "1."
    assert of("celery_delayed_delivery", f"{delay}app.log.error") == "logs"
    assert (
        of(
            "celery_delayed_delivery",
            f"{delay}x",
            [Queue("x", TOPIC, routing_key="x"), *QUEUES[:2]],
        )
        == "x"
    )
    assert of("celery_delayed_delivery", f"{delay}unknown", QUEUES[:2]) is None
    assert routing_key({"routing_key": f"{delay}app.log"}) == "app.log"
    assert routing_key({"routing_key": "0.1.app"}) == "0.1.app"


def test_process_without_consumer_uses_routing_key():
    """Without queues the routing key is the best guess."""
    assert routing_key({"routing_key": "q"}) == "q"
    assert routing_key(None) is None
    assert names([]).of(None) is None
    assert QueueNames(SimpleNamespace()).of({"exchange": "x", "routing_key": "k"}) is None
