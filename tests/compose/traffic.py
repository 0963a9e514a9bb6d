"""Producer and consumer of the official Python client that live through what is done to a cluster.

traffic.py ENDPOINTS TOPIC [GROUP] reads commands on stdin: `phase NAME` answers once new messages were
acknowledged and received after it; `end` stops sending and answers once all that was acknowledged
has been received, byte by byte. A slow consumer may take its time for that, as long as more comes.
"""

import os
import sys
import threading
import time

from rocketmq import (ClientConfiguration, Credentials, FilterExpression, Message, Producer,
                      SimpleConsumer)

ENDPOINTS, TOPIC = sys.argv[1], sys.argv[2]
GROUP = sys.argv[3] if len(sys.argv) > 3 else f"{TOPIC}-group"
PHASE_MESSAGES = 30
# Official clients refresh their routes every 30 s, and each failed call takes time of its own.
PATIENCE_S = 120
# Ids that are named when messages are missing.
TOLD_MAX = 50
# What came in an answer that got lost comes again behind it.
LEASE_S = int(os.environ.get("LEASE_S", "60"))


class Traffic:
    def __init__(self):
        self.lock = threading.Lock()
        self.acked, self.received = {}, {}
        self.errors = {"send": 0, "receive": 0, "ack": 0}
        self.longest_gap_s, self.last_ack = 0.0, time.monotonic()
        self.sending = self.receiving = True

    def failed(self, what, error):
        with self.lock:
            self.errors[what] += 1
        print(f"{what}: {error!r}", file=sys.stderr, flush=True)
        time.sleep(0.2)

    def send(self, producer):
        at = 0
        while self.sending:
            message = Message()
            message.topic, message.body = TOPIC, f"body {at}".encode()
            at += 1
            try:
                receipt = producer.send(message)
            except Exception as error:
                self.failed("send", error)
                continue
            now = time.monotonic()
            with self.lock:
                self.acked[receipt.message_id] = message.body
                self.longest_gap_s = max(self.longest_gap_s, now - self.last_ack)
                self.last_ack = now
            time.sleep(0.01)

    def receive(self, consumer):
        while self.receiving:
            try:
                messages = consumer.receive(32, LEASE_S) or []
            except Exception as error:
                self.failed("receive", error)
                continue
            for message in messages:
                with self.lock:
                    self.received[message.message_id] = message.body
                try:
                    consumer.ack(message)
                except Exception as error:
                    self.failed("ack", error)

    def counts(self):
        with self.lock:
            return len(self.acked), len(self.received)

    def missing(self):
        with self.lock:
            return {key for key, body in self.acked.items() if self.received.get(key) != body}

    def told(self):
        acked, received = self.counts()
        with self.lock:
            errors = " ".join(f"{what} errors {count}" for what, count in self.errors.items())
            gap_s, self.longest_gap_s = self.longest_gap_s, 0.0
        return f"acked {acked} received {received} {errors} longest gap {gap_s:.1f} s"


def until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE_S} s")
        time.sleep(0.1)


def until_all_received(traffic):
    missing = len(traffic.missing())
    while missing > 0:
        until(lambda: len(traffic.missing()) < missing, "more of what was acknowledged")
        missing = len(traffic.missing())


def main():
    configuration = ClientConfiguration(ENDPOINTS, Credentials())
    producer = Producer(configuration, (TOPIC,))
    producer.startup()
    subscription = {TOPIC: FilterExpression("*")}
    consumer = SimpleConsumer(configuration, GROUP, subscription, await_duration=3)
    consumer.startup()
    traffic = Traffic()
    threads = [threading.Thread(target=traffic.send, args=(producer,), daemon=True),
               threading.Thread(target=traffic.receive, args=(consumer,), daemon=True)]
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        command, *name = line.split()
        try:
            if command == "phase":
                acked, received = (count + PHASE_MESSAGES for count in traffic.counts())
                until(lambda: traffic.counts()[0] >= acked, "sends")
                until(lambda: traffic.counts()[1] >= received, "receipts")
                print("ok", *name, traffic.told(), flush=True)
            else:
                traffic.sending = False
                threads[0].join(PATIENCE_S)
                until_all_received(traffic)
                traffic.receiving = False
                print("ok end", traffic.told(), flush=True)
                return 0
        except TimeoutError as error:
            missing = sorted(traffic.missing())
            print("FAILED", *name, error, traffic.told(), f"missing {len(missing)}:",
                  *missing[:TOLD_MAX], flush=True)
            return 1
    return 1


code = main()
sys.stdout.flush()
# The client's own threads may hang on connections to containers that are gone.
os._exit(code)
