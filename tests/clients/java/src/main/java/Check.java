import java.io.Closeable;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.apache.rocketmq.client.apis.ClientConfiguration;
import org.apache.rocketmq.client.apis.ClientException;
import org.apache.rocketmq.client.apis.ClientServiceProvider;
import org.apache.rocketmq.client.apis.consumer.ConsumeResult;
import org.apache.rocketmq.client.apis.consumer.FilterExpression;
import org.apache.rocketmq.client.apis.consumer.PushConsumer;
import org.apache.rocketmq.client.apis.consumer.SimpleConsumer;
import org.apache.rocketmq.client.apis.message.MessageBuilder;
import org.apache.rocketmq.client.apis.message.MessageView;
import org.apache.rocketmq.client.apis.producer.Producer;

/** The official Java client against a running access point: Check ENDPOINT PREFIX. */
final class Check {
    private static final Duration LEASE = Duration.ofSeconds(30);
    private static final Duration PATIENCE = Duration.ofSeconds(30);

    private final ClientServiceProvider provider = ClientServiceProvider.loadService();
    private final ClientConfiguration configuration;
    private final String prefix;

    private Check(String endpoint, String prefix) {
        this.configuration =
            ClientConfiguration.newBuilder().setEndpoints(endpoint).enableSsl(false).build();
        this.prefix = prefix;
    }

    public static void main(String[] arguments) {
        try {
            new Check(arguments[0], arguments[1]).all();
            System.exit(0);
        } catch (Throwable error) {
            System.out.println("FAILED " + error);
            error.printStackTrace(System.out);
            System.exit(1);
        }
    }

    private static void ok(String name) {
        System.out.println("ok " + name);
    }

    private static void check(boolean condition, String text) {
        if (!condition) {
            throw new AssertionError(text);
        }
    }

    private String topic(String of) {
        return prefix + "-" + of;
    }

    private Producer producer(String topic) throws ClientException {
        return provider.newProducerBuilder()
            .setClientConfiguration(configuration).setTopics(topic).build();
    }

    private SimpleConsumer consumer(String topic, String tags, Duration await)
        throws ClientException {
        return provider.newSimpleConsumerBuilder()
            .setClientConfiguration(configuration)
            .setConsumerGroup(topic + "-group")
            .setAwaitDuration(await)
            .setSubscriptionExpressions(Map.of(topic, new FilterExpression(tags)))
            .build();
    }

    private MessageBuilder message(String topic, String body) {
        return provider.newMessageBuilder()
            .setTopic(topic).setBody(body.getBytes(StandardCharsets.UTF_8));
    }

    private static String body(MessageView message) {
        return StandardCharsets.UTF_8.decode(message.getBody().duplicate()).toString();
    }

    /** Receives until {@code count} messages are there; fails when that takes too long. */
    private static List<MessageView> collect(SimpleConsumer consumer, int count)
        throws ClientException {
        List<MessageView> received = new ArrayList<>();
        long deadline = System.nanoTime() + PATIENCE.toNanos();
        while (received.size() < count) {
            check(System.nanoTime() < deadline, received.size() + " of " + count + " came");
            received.addAll(consumer.receive(32, LEASE));
        }
        check(received.size() == count, received.size() + " came instead of " + count);
        return received;
    }

    private static void ackAll(SimpleConsumer consumer, List<MessageView> messages)
        throws ClientException {
        for (MessageView message : messages) {
            consumer.ack(message);
        }
    }

    private void all() throws Exception {
        sendAndReceive();
        fifoSend();
        nack();
        tagFilter();
        longPoll();
        List<Closeable> consumers = new ArrayList<>();
        consumers.add(push("push", 50, 0));
        ok("push consumer");
        consumers.add(push("push-nack", 3, 2));
        ok("push nack and redelivery");
        // Each waits for its poll in flight; they may as well wait together.
        consumers.parallelStream().forEach(consumer -> {
            try {
                consumer.close();
            } catch (Exception error) {
                throw new AssertionError("a push consumer did not close", error);
            }
        });
        ok("push consumers shut down");
    }

    private void sendAndReceive() throws Exception {
        String topic = topic("plain");
        Map<String, String> sent = new HashMap<>();
        try (Producer producer = producer(topic)) {
            for (int at = 0; at < 20; at++) {
                var message = message(topic, "body " + at).setTag("t").setKeys("key-" + at)
                    .addProperty("colour", "blue").addProperty("nr", "" + at).build();
                sent.put(producer.send(message).getMessageId().toString(), "body " + at);
            }
        }
        check(sent.size() == 20, "message ids are not unique");
        ok("send");
        try (SimpleConsumer consumer = consumer(topic, "*", Duration.ofSeconds(5))) {
            for (MessageView got : collect(consumer, 20)) {
                String body = sent.remove(got.getMessageId().toString());
                check(body(got).equals(body), got.getMessageId() + " has another body");
                String at = body.substring("body ".length());
                check(got.getTopic().equals(topic), "topic is wrong");
                check(got.getTag().get().equals("t"), "tag is wrong");
                check(List.copyOf(got.getKeys()).equals(List.of("key-" + at)), "key is wrong");
                check(got.getProperties().get("colour").equals("blue"), "property is wrong");
                check(got.getProperties().get("nr").equals(at), "property is wrong");
                check(got.getDeliveryAttempt() == 1, "first is " + got.getDeliveryAttempt());
                consumer.ack(got);
            }
            ok("receive and ack");
        }
        try (SimpleConsumer consumer = consumer(topic, "*", Duration.ofSeconds(2))) {
            check(consumer.receive(32, LEASE).isEmpty(), "acked messages came back");
        }
        ok("nothing is left after acks");
    }

    private void fifoSend() throws Exception {
        String topic = topic("fifo");
        try (Producer producer = producer(topic);
             SimpleConsumer consumer = consumer(topic, "*", Duration.ofSeconds(5))) {
            for (int at = 0; at < 10; at++) {
                producer.send(message(topic, "" + at).setMessageGroup("g-1").build());
            }
            List<MessageView> received = collect(consumer, 10);
            for (MessageView got : received) {
                check(got.getMessageGroup().get().equals("g-1"), "message group is wrong");
            }
            check(received.stream().map(Check::body).distinct().count() == 10, "bodies");
            ackAll(consumer, received);
        }
        ok("FIFO send");
    }

    private void nack() throws Exception {
        String topic = topic("nack");
        try (Producer producer = producer(topic);
             SimpleConsumer consumer = consumer(topic, "*", Duration.ofSeconds(5))) {
            producer.send(message(topic, "again").build());
            for (int attempt = 1; attempt <= 3; attempt++) {
                MessageView got = collect(consumer, 1).get(0);
                check(got.getDeliveryAttempt() == attempt,
                    got.getDeliveryAttempt() + " is not " + attempt);
                if (attempt < 3) {
                    consumer.changeInvisibleDuration(got, Duration.ofSeconds(1));
                } else {
                    consumer.ack(got);
                }
            }
        }
        ok("nack and redelivery");
    }

    private void tagFilter() throws Exception {
        String topic = topic("tags");
        try (Producer producer = producer(topic);
             SimpleConsumer consumer = consumer(topic, "a || c", Duration.ofSeconds(5))) {
            for (int at = 0; at < 12; at++) {
                String tag = List.of("a", "b", "c").get(at % 3);
                producer.send(message(topic, "" + at).setTag(tag).build());
            }
            List<MessageView> received = collect(consumer, 8);
            for (MessageView got : received) {
                check(!got.getTag().get().equals("b"), "a filtered tag came");
            }
            ackAll(consumer, received);
        }
        ok("tag filter");
    }

    private void longPoll() throws Exception {
        String topic = topic("poll");
        try (Producer producer = producer(topic);
             SimpleConsumer consumer = consumer(topic, "*", Duration.ofSeconds(20))) {
            producer.send(message(topic, "first").build());
            ackAll(consumer, collect(consumer, 1));
            CompletableFuture<List<MessageView>> poll = consumer.receiveAsync(1, LEASE);
            // Long enough for the poll to be waiting, far shorter than the poll.
            Thread.sleep(2000);
            check(!poll.isDone(), "a poll of an empty topic ended early");
            long sentAt = System.nanoTime();
            producer.send(message(topic, "wake").build());
            List<MessageView> received = poll.get(PATIENCE.toSeconds(), TimeUnit.SECONDS);
            long tookMs = TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - sentAt);
            check(received.size() == 1 && body(received.get(0)).equals("wake"), "wrong message");
            check(tookMs < 1500, "a waiting poll took " + tookMs + " ms to see a new message");
            ackAll(consumer, received);
        }
        ok("long poll wakes");
    }

    /** Consumes {@code count} messages, failing each one's first {@code fails} attempts. */
    private Closeable push(String of, int count, int fails) throws Exception {
        String topic = topic(of);
        try (Producer producer = producer(topic)) {
            for (int at = 0; at < count; at++) {
                producer.send(message(topic, "" + at).build());
            }
        }
        Map<String, List<Integer>> attempts = new ConcurrentHashMap<>();
        CountDownLatch missing = new CountDownLatch(count);
        PushConsumer consumer = provider.newPushConsumerBuilder()
            .setClientConfiguration(configuration)
            .setConsumerGroup(topic + "-group")
            .setSubscriptionExpressions(Map.of(topic, FilterExpression.SUB_ALL))
            .setMessageListener(got -> {
                var seen = attempts.computeIfAbsent(body(got), unused -> new ArrayList<>());
                seen.add(got.getDeliveryAttempt());
                if (seen.size() <= fails) {
                    return ConsumeResult.FAILURE;
                }
                missing.countDown();
                return ConsumeResult.SUCCESS;
            })
            .build();
        check(missing.await(PATIENCE.toSeconds(), TimeUnit.SECONDS), "came: " + attempts);
        List<Integer> expected = new ArrayList<>();
        for (int attempt = 1; attempt <= fails + 1; attempt++) {
            expected.add(attempt);
        }
        attempts.forEach((body, seen) ->
            check(seen.equals(expected), body + " came with attempts " + seen));
        check(attempts.size() == count, "not every message came");
        return consumer;
    }
}
