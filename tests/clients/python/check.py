"""The official Python client against a running access point: check.py ENDPOINT PREFIX."""

import os
import sys
import threading
import time

from rocketmq import (ClientConfiguration, ConsumeResult, Credentials, FilterExpression, Message,
                      MessageListener, Producer, PushConsumer, SimpleConsumer)

ENDPOINT, PREFIX = sys.argv[1], sys.argv[2]
LEASE_S = 30
PATIENCE_S = 30
INVALID_RECEIPT_HANDLE = 40013


def configuration():
    return ClientConfiguration(ENDPOINT, Credentials())


def check(condition, text):
    if not condition:
        raise AssertionError(text)


def names(of):
    return f"{PREFIX}-{of}", f"{PREFIX}-{of}-group"


def message(topic, body, tag=None, key=None, group=None, properties=()):
    made = Message()
    made.topic, made.body = topic, body.encode()
    if tag:
        made.tag = tag
    if key:
        made.keys = key
    if group:
        made.message_group = group
    for name, value in properties:
        made.add_property(name, value)
    return made


class Started:
    """A client that is started on entry and shut down on exit."""

    def __init__(self, client):
        self.client = client

    def __enter__(self):
        self.client.startup()
        return self.client

    def __exit__(self, *_):
        self.client.shutdown()


def producer(topic):
    return Started(Producer(configuration(), (topic,)))


def simple_consumer(group, topic, expression="*", await_s=5):
    subscription = {topic: FilterExpression(expression)}
    return Started(SimpleConsumer(configuration(), group, subscription, await_duration=await_s))


def collect(consumer, count, lease_s=LEASE_S):
    """Receives until `count` messages are there; fails when that takes too long."""
    received, deadline = [], time.monotonic() + PATIENCE_S
    while len(received) < count:
        check(time.monotonic() < deadline, f"{len(received)} of {count} messages came")
        received += consumer.receive(32, lease_s)
    check(len(received) == count, f"{len(received)} messages came instead of {count}")
    return received


def send_and_receive():
    topic, group = names("plain")
    with producer(topic) as sender:
        sent = {}
        for at in range(20):
            properties = (("colour", "blue"), ("nr", str(at)))
            receipt = sender.send(message(topic, f"body {at}", "t", f"key-{at}", None, properties))
            sent[receipt.message_id] = f"body {at}".encode()
        check(len(sent) == 20, "message ids are not unique")
        ok("send")
    with simple_consumer(group, topic) as consumer:
        for got in collect(consumer, 20):
            check(sent.pop(got.message_id) == got.body, f"{got.message_id} has another body")
            at = got.body.decode().split()[1]
            check(not got.corrupted and got.topic == topic, "digest or topic is wrong")
            check(got.tag == "t" and got.keys == {f"key-{at}"}, "tag or key is wrong")
            check(got.properties["colour"] == "blue" and got.properties["nr"] == at, "properties")
            check(got.delivery_attempt == 1, f"first attempt is {got.delivery_attempt}")
            consumer.ack(got)
        ok("receive and ack")
        consumer.await_duration = 2
        check(consumer.receive(32, LEASE_S) == [], "acked messages came back")
        ok("nothing is left after acks")


def fifo_send():
    topic, group = names("fifo")
    with producer(topic) as sender:
        receipts = [sender.send(message(topic, f"{at}", group="g-1")) for at in range(10)]
        offsets = [receipt.offset for receipt in receipts]
        first = offsets[0]
        check(offsets == list(range(first, first + 10)), f"not one queue in order: {offsets}")
    with simple_consumer(group, topic) as consumer:
        received = collect(consumer, 10)
        check({got.message_group for got in received} == {"g-1"}, "message group is wrong")
        check({got.body for got in received} == {b"%d" % at for at in range(10)}, "bodies")
        for got in received:
            consumer.ack(got)
    ok("FIFO send")


def nack():
    topic, group = names("nack")
    with producer(topic) as sender, simple_consumer(group, topic) as consumer:
        sender.send(message(topic, "again"))
        for attempt in (1, 2, 3):
            got = collect(consumer, 1)[0]
            check(got.delivery_attempt == attempt, f"{got.delivery_attempt} is not {attempt}")
            handle = got.receipt_handle
            if attempt < 3:
                consumer.change_invisible_duration(got, 1)
                check(got.receipt_handle != handle, "the handle was not replaced")
        consumer.ack(got)
    ok("nack and redelivery")


def lease_expiry():
    topic, group = names("expiry")
    with producer(topic) as sender, simple_consumer(group, topic, await_s=15) as consumer:
        sender.send(message(topic, "left alone"))
        first = collect(consumer, 1, lease_s=10)[0]
        began = time.monotonic()
        second = collect(consumer, 1, lease_s=10)[0]
        took_s = time.monotonic() - began
        check(second.message_id == first.message_id, "another message came")
        check(second.delivery_attempt == 2, f"attempt {second.delivery_attempt} is not 2")
        check(8 < took_s < 13, f"a lease of 10 s ended after {took_s:.1f} s")
        try:
            consumer.ack(first)
        except Exception as error:
            check(getattr(error, "code", None) == INVALID_RECEIPT_HANDLE, f"{error!r}")
        else:
            raise AssertionError("an expired handle was acked")
        consumer.ack(second)
    ok("lease expiry")


def tag_filter():
    topic, group = names("tags")
    with producer(topic) as sender:
        for at in range(12):
            sender.send(message(topic, f"{at}", tag="abc"[at % 3]))
    with simple_consumer(group, topic, "a || c") as consumer:
        received = collect(consumer, 8)
        check(sorted({got.tag for got in received}) == ["a", "c"], "a filtered tag came")
        for got in received:
            consumer.ack(got)
    ok("tag filter")


def long_poll():
    topic, group = names("poll")
    with producer(topic) as sender, simple_consumer(group, topic, await_s=20) as consumer:
        sender.send(message(topic, "first"))
        consumer.ack(collect(consumer, 1)[0])
        arrived = {}

        def poll():
            arrived["messages"] = consumer.receive(1, LEASE_S)
            arrived["at"] = time.monotonic()

        polling = threading.Thread(target=poll)
        polling.start()
        # Long enough for the poll to be waiting, far shorter than the poll.
        polling.join(2)
        check(polling.is_alive(), "a poll of an empty topic ended early")
        sent_at = time.monotonic()
        sender.send(message(topic, "wake"))
        polling.join(PATIENCE_S)
        check([got.body for got in arrived["messages"]] == [b"wake"], "the wrong message woke it")
        took_s = arrived["at"] - sent_at
        check(took_s < 1.5, f"a waiting poll took {took_s:.1f} s to see a new message")
        consumer.ack(arrived["messages"][0])
    ok("long poll wakes")


class Listener(MessageListener):
    """Fails each message until its `fails` are used up; notes every attempt."""

    def __init__(self, fails, count):
        self.fails, self.missing = fails, count
        self.attempts, self.lock = {}, threading.Lock()
        self.done = threading.Event()

    def consume(self, got):
        with self.lock:
            attempts = self.attempts.setdefault(got.body, [])
            attempts.append(got.delivery_attempt)
            if len(attempts) <= self.fails:
                return ConsumeResult.FAILURE
            self.missing -= 1
            if self.missing == 0:
                self.done.set()
            return ConsumeResult.SUCCESS


def push(of, count, fails):
    topic, group = names(of)
    listener = Listener(fails, count)
    with producer(topic) as sender:
        for at in range(count):
            sender.send(message(topic, f"{at}"))
    subscription = {topic: FilterExpression()}
    with Started(PushConsumer(configuration(), group, listener, subscription)):
        check(listener.done.wait(PATIENCE_S), f"came: {listener.attempts}")
    expected = list(range(1, fails + 2))
    for body, attempts in listener.attempts.items():
        check(attempts == expected, f"{body} came with attempts {attempts}")
    check(len(listener.attempts) == count, "not every message came")


def ok(name):
    print(f"ok {name}", flush=True)


def main():
    send_and_receive()
    fifo_send()
    nack()
    lease_expiry()
    tag_filter()
    long_poll()
    push("push", 50, 0)
    ok("push consumer")
    push("push-nack", 3, 2)
    ok("push nack and redelivery")


try:
    main()
except BaseException as error:
    print(f"FAILED {type(error).__name__}: {error}", flush=True)
    # Clients leave threads behind that would keep a failed check from ending.
    os._exit(1)
os._exit(0)
