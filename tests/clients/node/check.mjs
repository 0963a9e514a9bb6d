// The official Node client against a running access point: check.mjs ENDPOINT PREFIX.

import rocketmq from 'rocketmq-client-nodejs';

const { ConsumeResult, Producer, PushConsumer, SimpleConsumer } = rocketmq;
const [endpoints, prefix] = process.argv.slice(2);
const LEASE_MS = 30_000;
const PATIENCE_MS = 30_000;
const quiet = { debug() {}, info() {}, warn() {}, error() {} };
const common = { endpoints, namespace: '', logger: quiet };

const pause = ms => new Promise(resolve => setTimeout(resolve, ms));
const ok = name => console.log(`ok ${name}`);
const names = of => ({ topic: `${prefix}-${of}`, group: `${prefix}-${of}-group` });

function check(condition, text) {
  if (!condition) throw new Error(text);
}

async function started(client, use) {
  await client.startup();
  const result = await use(client);
  await client.shutdown();
  return result;
}

const withProducer = (topic, use) => started(new Producer({ ...common, topics: [topic] }), use);

function withConsumer({ topic, group }, use, { tags = '*', awaitDuration = 5_000 } = {}) {
  const subscriptions = new Map([[topic, tags]]);
  return started(
    new SimpleConsumer({ ...common, consumerGroup: group, subscriptions, awaitDuration }), use);
}

// Receives until `count` messages are there; fails when that takes too long.
async function collect(consumer, count, leaseMs = LEASE_MS) {
  const received = [];
  const deadline = Date.now() + PATIENCE_MS;
  while (received.length < count) {
    check(Date.now() < deadline, `${received.length} of ${count} messages came`);
    received.push(...await consumer.receive(32, leaseMs));
  }
  check(received.length === count, `${received.length} messages came instead of ${count}`);
  return received;
}

async function ackAll(consumer, messages) {
  for (const message of messages) await consumer.ack(message);
}

async function sendAndReceive() {
  const { topic, group } = names('plain');
  const sent = new Map();
  await withProducer(topic, async producer => {
    for (let at = 0; at < 20; at++) {
      const properties = new Map([['colour', 'blue'], ['nr', `${at}`]]);
      const receipt = await producer.send(
        { topic, body: Buffer.from(`body ${at}`), tag: 't', keys: [`key-${at}`], properties });
      sent.set(receipt.messageId, `body ${at}`);
    }
  });
  check(sent.size === 20, 'message ids are not unique');
  ok('send');
  await withConsumer({ topic, group }, async consumer => {
    for (const got of await collect(consumer, 20)) {
      check(sent.get(got.messageId) === got.body.toString(), `${got.messageId} has another body`);
      sent.delete(got.messageId);
      const at = got.body.toString().split(' ')[1];
      check(!got.corrupted && got.topic === topic, 'digest or topic is wrong');
      check(got.tag === 't' && got.keys.join() === `key-${at}`, 'tag or key is wrong');
      check(got.properties.get('colour') === 'blue' && got.properties.get('nr') === at,
        'properties are wrong');
      check(got.deliveryAttempt === 1, `first attempt is ${got.deliveryAttempt}`);
      await consumer.ack(got);
    }
    check(sent.size === 0, 'not every message came');
    ok('receive and ack');
  });
  await withConsumer({ topic, group }, async consumer => {
    check((await consumer.receive(32, LEASE_MS)).length === 0, 'acked messages came back');
  }, { awaitDuration: 2_000 });
  ok('nothing is left after acks');
}

async function fifoSend() {
  const { topic, group } = names('fifo');
  const offsets = await withProducer(topic, async producer => {
    const offsets = [];
    for (let at = 0; at < 10; at++) {
      const receipt = await producer.send({ topic, body: Buffer.from(`${at}`), messageGroup: 'g-1' });
      offsets.push(receipt.offset);
    }
    return offsets;
  });
  check(offsets.every((offset, at) => offset === offsets[0] + at), `not one queue: ${offsets}`);
  await withConsumer({ topic, group }, async consumer => {
    const received = await collect(consumer, 10);
    check(received.every(got => got.messageGroup === 'g-1'), 'message group is wrong');
    check(new Set(received.map(got => got.body.toString())).size === 10, 'bodies are wrong');
    await ackAll(consumer, received);
  });
  ok('FIFO send');
}

async function nack() {
  const { topic, group } = names('nack');
  await withProducer(topic, producer => producer.send({ topic, body: Buffer.from('again') }));
  await withConsumer({ topic, group }, async consumer => {
    for (const attempt of [1, 2, 3]) {
      const [got] = await collect(consumer, 1);
      check(got.deliveryAttempt === attempt, `${got.deliveryAttempt} is not ${attempt}`);
      const handle = got.receiptHandle;
      if (attempt < 3) {
        await consumer.changeInvisibleDuration(got, 1_000);
        check(got.receiptHandle !== handle, 'the handle was not replaced');
      } else {
        await consumer.ack(got);
      }
    }
  });
  ok('nack and redelivery');
}

async function tagFilter() {
  const { topic, group } = names('tags');
  await withProducer(topic, async producer => {
    for (let at = 0; at < 12; at++) {
      await producer.send({ topic, body: Buffer.from(`${at}`), tag: 'abc'[at % 3] });
    }
  });
  await withConsumer({ topic, group }, async consumer => {
    const received = await collect(consumer, 8);
    check(received.every(got => got.tag !== 'b'), 'a filtered tag came');
    await ackAll(consumer, received);
  }, { tags: 'a||c' });
  ok('tag filter');
}

async function longPoll() {
  const { topic, group } = names('poll');
  await withProducer(topic, async producer => {
    await producer.send({ topic, body: Buffer.from('first') });
    await withConsumer({ topic, group }, async consumer => {
      await ackAll(consumer, await collect(consumer, 1));
      let ended = false;
      const poll = consumer.receive(1, LEASE_MS).then(messages => {
        ended = true;
        return { messages, at: Date.now() };
      });
      // Long enough for the poll to be waiting, far shorter than the poll.
      await pause(2_000);
      check(!ended, 'a poll of an empty topic ended early');
      const sentAt = Date.now();
      await producer.send({ topic, body: Buffer.from('wake') });
      const { messages, at } = await poll;
      check(messages.length === 1 && messages[0].body.toString() === 'wake', 'the wrong message');
      check(at - sentAt < 1_500, `a waiting poll took ${at - sentAt} ms to see a new message`);
      await ackAll(consumer, messages);
    }, { awaitDuration: 20_000 });
  });
  ok('long poll wakes');
}

// Consumes `count` messages, failing each one's first `fails` attempts.
async function push(of, count, fails) {
  const { topic, group } = names(of);
  await withProducer(topic, async producer => {
    for (let at = 0; at < count; at++) await producer.send({ topic, body: Buffer.from(`${at}`) });
  });
  const attempts = new Map();
  let missing = count;
  const messageListener = {
    async consume(got) {
      const body = got.body.toString();
      const seen = attempts.get(body) ?? [];
      attempts.set(body, [...seen, got.deliveryAttempt]);
      if (seen.length < fails) return ConsumeResult.FAILURE;
      missing -= 1;
      return ConsumeResult.SUCCESS;
    },
  };
  const subscriptions = new Map([[topic, '*']]);
  const consumer =
    new PushConsumer({ ...common, consumerGroup: group, subscriptions, messageListener });
  await consumer.startup();
  const deadline = Date.now() + PATIENCE_MS;
  while (missing > 0) {
    check(Date.now() < deadline, `came: ${JSON.stringify([...attempts])}`);
    await pause(50);
  }
  const expected = Array.from({ length: fails + 1 }, (_, at) => at + 1).join();
  for (const [body, seen] of attempts) {
    check(seen.join() === expected, `${body} came with attempts ${seen}`);
  }
  check(attempts.size === count, 'not every message came');
  // Its shutdown waits for the poll in flight; both are waited for together at the end.
  return consumer.shutdown.bind(consumer);
}

try {
  await sendAndReceive();
  await fifoSend();
  await nack();
  await tagFilter();
  await longPoll();
  const shutdowns = [await push('push', 50, 0)];
  ok('push consumer');
  shutdowns.push(await push('push-nack', 3, 2));
  ok('push nack and redelivery');
  await Promise.all(shutdowns.map(shutdown => shutdown()));
  ok('push consumers shut down');
  process.exit(0);
} catch (error) {
  console.log(`FAILED ${error.stack ?? error}`);
  process.exit(1);
}
