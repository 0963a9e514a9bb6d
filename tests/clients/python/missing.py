"""Where messages are that a consumer group lacks: lost, handed out, or not yet.

missing.py ENDPOINT TOPIC GROUP MESSAGE_ID... reads what the topic holds from stdin, as `drumlin consume -J`
prints it, and asks an access point how far the group is.
"""

import json
import pathlib
import sys

import grpc

sys.path.append(str(pathlib.Path(__file__).resolve().parents[3] / "proto"))
ADMIN, SERVICES = grpc.protos_and_services("drumlin/v1/admin.proto")
TIMEOUT_S = 10


def group_queues(endpoint, topic, group):
    with grpc.insecure_channel(endpoint) as channel:
        listed = SERVICES.AdminStub(channel).ListGroups(ADMIN.ListGroupsRequest(), timeout=TIMEOUT_S)
    queues = (queue for known in listed.groups if known.name == group for queue in known.queues)
    return {(queue.broker_group, queue.queue_id): queue for queue in queues if queue.topic == topic}


def standing(offset, queue):
    if queue is None:
        return "the group has not begun with its queue"
    if offset < queue.committed_offset:
        what = "CONSUMED without having been received"
    elif offset < queue.pulled_offset:
        what = "handed out"
    else:
        what = "not handed out yet"
    return (f"{what}; consumed below {queue.committed_offset}, handed out below {queue.pulled_offset} "
            f"of {queue.max_offset}, {queue.in_flight} leased, {queue.in_retry} due again")


def main():
    endpoint, topic, group, *missing = sys.argv[1:]
    places = {}
    for line in sys.stdin:
        message = json.loads(line)
        place = message["broker_group"], message["queue_id"], message["offset"]
        places.setdefault(message["message_id"], []).append(place)
    queues = group_queues(endpoint, topic, group)
    for message_id in missing:
        for broker_group, queue_id, offset in places.get(message_id, []):
            told = standing(offset, queues.get((broker_group, queue_id)))
            print(f"{message_id} {broker_group}/{queue_id}:{offset} {told}")
        if message_id not in places:
            print(message_id, "LOST: it is not stored")


main()
