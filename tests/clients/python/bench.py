"""Acknowledged sends per second of one official Python client, one after the other and 32 at a time."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from rocketmq import ClientConfiguration, Credentials, Message, Producer

SECONDS = 5
TOPIC = "python-bench"


def message():
    made = Message()
    made.topic = TOPIC
    made.body = b"x" * 1024
    return made


def main():
    producer = Producer(ClientConfiguration(sys.argv[1], Credentials()), (TOPIC,))
    producer.startup()
    producer.send(message())

    def send_for(_):
        sent, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            producer.send(message())
            sent += 1
        return sent

    for threads in (1, 32):
        with ThreadPoolExecutor(threads) as pool:
            sent = sum(pool.map(send_for, range(threads)))
        print(json.dumps({"client": "python", "threads": threads, "msgs_per_s": sent / SECONDS}))
    producer.shutdown()


main()
