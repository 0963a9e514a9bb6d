import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.function.BooleanSupplier;
import java.util.stream.Collectors;
import org.apache.rocketmq.client.apis.ClientConfiguration;
import org.apache.rocketmq.client.apis.ClientServiceProvider;
import org.apache.rocketmq.client.apis.consumer.FilterExpression;
import org.apache.rocketmq.client.apis.consumer.SimpleConsumer;
import org.apache.rocketmq.client.apis.message.MessageView;
import org.apache.rocketmq.client.apis.producer.Producer;

/**
 * Producer and consumer of the official Java client that live through what is done to a cluster:
 * Traffic ENDPOINTS TOPIC GROUP, with the commands and answers of tests/compose/traffic.py.
 */
final class Traffic {
    private static final int PHASE_MESSAGES = 30;
    private static final Duration PATIENCE = Duration.ofSeconds(120);
    /** Ids that are named when messages are missing. */
    private static final int TOLD_MAX = 50;
    /** What came in an answer that got lost comes again behind it. */
    private static final Duration LEASE =
        Duration.ofSeconds(Integer.parseInt(System.getenv().getOrDefault("LEASE_S", "60")));

    private final ClientServiceProvider provider = ClientServiceProvider.loadService();
    private final String topic;
    private final Producer producer;
    private final SimpleConsumer consumer;
    private final Map<String, String> acked = new ConcurrentHashMap<>();
    private final Map<String, String> received = new ConcurrentHashMap<>();
    private final AtomicInteger sendErrors = new AtomicInteger();
    private final AtomicInteger receiveErrors = new AtomicInteger();
    private final AtomicInteger ackErrors = new AtomicInteger();
    private volatile boolean sending = true;
    private volatile boolean receiving = true;
    private long lastAckNanos = System.nanoTime();
    private long longestGapNanos;

    private Traffic(String endpoints, String topic, String group) throws Exception {
        this.topic = topic;
        var configuration =
            ClientConfiguration.newBuilder().setEndpoints(endpoints).enableSsl(false).build();
        producer = provider.newProducerBuilder()
            .setClientConfiguration(configuration).setTopics(topic).build();
        consumer = provider.newSimpleConsumerBuilder()
            .setClientConfiguration(configuration).setConsumerGroup(group)
            .setAwaitDuration(Duration.ofSeconds(3))
            .setSubscriptionExpressions(Map.of(topic, new FilterExpression("*"))).build();
    }

    public static void main(String[] arguments) {
        int status = 1;
        try {
            status = new Traffic(arguments[0], arguments[1], arguments[2]).obey();
        } catch (Throwable error) {
            System.out.println("FAILED " + error);
            error.printStackTrace();
        }
        System.out.flush();
        // Threads of the client may hang on connections to processes that are gone.
        Runtime.getRuntime().halt(status);
    }

    private static void failed(String what, AtomicInteger count, Throwable error) {
        count.incrementAndGet();
        System.err.println(what + ": " + error);
        pause(200);
    }

    private static void pause(long millis) {
        try {
            Thread.sleep(millis);
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    private void send() {
        for (int at = 0; sending; at++) {
            String body = "body " + at;
            try {
                var message = provider.newMessageBuilder().setTopic(topic)
                    .setBody(body.getBytes(StandardCharsets.UTF_8)).build();
                acked.put(producer.send(message).getMessageId().toString(), body);
            } catch (Throwable error) {
                failed("send", sendErrors, error);
                continue;
            }
            long now = System.nanoTime();
            synchronized (this) {
                longestGapNanos = Math.max(longestGapNanos, now - lastAckNanos);
                lastAckNanos = now;
            }
            pause(10);
        }
    }

    private void receive() {
        while (receiving) {
            try {
                for (MessageView message : consumer.receive(32, LEASE)) {
                    String body = StandardCharsets.UTF_8.decode(message.getBody()).toString();
                    received.put(message.getMessageId().toString(), body);
                    acknowledge(message);
                }
            } catch (Throwable error) {
                failed("receive", receiveErrors, error);
            }
        }
    }

    private void acknowledge(MessageView message) {
        try {
            consumer.ack(message);
        } catch (Throwable error) {
            failed("ack", ackErrors, error);
        }
    }

    private List<String> missing() {
        return acked.entrySet().stream()
            .filter(sent -> !sent.getValue().equals(received.get(sent.getKey())))
            .map(Map.Entry::getKey).sorted().collect(Collectors.toList());
    }

    private synchronized String told() {
        double gap = longestGapNanos / 1e9;
        longestGapNanos = 0;
        return String.format(
            "acked %d received %d send errors %d receive errors %d ack errors %d longest gap %.1f s",
            acked.size(), received.size(), sendErrors.get(), receiveErrors.get(), ackErrors.get(),
            gap);
    }

    private static boolean until(BooleanSupplier condition) {
        long deadline = System.nanoTime() + PATIENCE.toNanos();
        while (!condition.getAsBoolean()) {
            if (System.nanoTime() > deadline) {
                return false;
            }
            pause(50);
        }
        return true;
    }

    /** Slow consumers may take their time, as long as more comes. */
    private boolean untilAllReceived() {
        for (int count = missing().size(); count > 0; count = missing().size()) {
            int before = count;
            if (!until(() -> missing().size() < before)) {
                return false;
            }
        }
        return true;
    }

    private int obey() throws Exception {
        Thread sender = new Thread(this::send);
        sender.start();
        new Thread(this::receive).start();
        var commands = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = commands.readLine()) != null;) {
            String name = line.replaceFirst("^phase ", "");
            boolean done;
            if (!name.equals(line)) {
                int ackedMin = acked.size() + PHASE_MESSAGES;
                int receivedMin = received.size() + PHASE_MESSAGES;
                done = until(() -> acked.size() >= ackedMin)
                    && until(() -> received.size() >= receivedMin);
            } else {
                sending = false;
                sender.join(PATIENCE.toMillis());
                done = untilAllReceived();
                receiving = false;
            }
            String missing = done ? "" : " missing " + missing().size() + ": "
                + missing().stream().limit(TOLD_MAX).collect(Collectors.joining(" "));
            System.out.println((done ? "ok " : "FAILED ") + name + " " + told() + missing);
            if (!done || name.equals(line)) {
                return done ? 0 : 1;
            }
        }
        return 1;
    }
}
