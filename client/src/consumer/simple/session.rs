//! Sessions: what makes a consumer known to each broker it asks, and keeps it known.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::{
    self, ClientType, Settings, TelemetryCommand, settings, telemetry_command,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use super::{resource, wire_duration};
use crate::Client;
use crate::connection::{Address, Backoff};
use crate::consumer::Filter;
use crate::error::{Code, Error};

const HEARTBEAT: Duration = Duration::from_secs(10);
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// A request with the headers that RocketMQ brokers know clients by.
pub(super) fn call<T>(client_id: &str, request: T) -> tonic::Request<T> {
    let mut call = tonic::Request::new(request);
    call.set_timeout(CALL_TIMEOUT);
    identify(&mut call, client_id);
    call
}

fn identify<T>(call: &mut tonic::Request<T>, client_id: &str) {
    let headers = call.metadata_mut();
    if let Ok(client_id) = MetadataValue::try_from(client_id) {
        headers.insert("x-mq-client-id", client_id);
    }
    headers.insert("x-mq-language", MetadataValue::from_static("RUST"));
    let version = MetadataValue::from_static(concat!("drumlin-", env!("CARGO_PKG_VERSION")));
    headers.insert("x-mq-client-version", version);
    headers.insert("x-mq-protocol", MetadataValue::from_static("v2"));
}

/// Whether a broker knows the consumer.
type Known = watch::Receiver<Option<Result<(), Error>>>;

/// One session for each broker.
#[derive(Debug)]
pub(super) struct Sessions {
    client: Client,
    member: Arc<Member>,
    known: Mutex<HashMap<Address, Known>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Who the consumer is.
#[derive(Debug)]
struct Member {
    client_id: String,
    group: String,
    settings: Settings,
}

impl Sessions {
    pub(super) fn new(
        client: Client,
        group: &str,
        subscriptions: &BTreeMap<String, Filter>,
    ) -> Self {
        let entries = subscriptions.iter().map(|(topic, filter)| rocketmq::SubscriptionEntry {
            topic: Some(resource(topic)),
            expression: Some(filter.to_wire()),
        });
        let subscription = rocketmq::Subscription {
            group: Some(resource(group)),
            subscriptions: entries.collect(),
            ..rocketmq::Subscription::default()
        };
        let settings = Settings {
            client_type: Some(ClientType::SimpleConsumer.into()),
            request_timeout: Some(wire_duration(CALL_TIMEOUT)),
            user_agent: Some(rocketmq::Ua {
                language: rocketmq::Language::Rust.into(),
                version: env!("CARGO_PKG_VERSION").into(),
                platform: std::env::consts::OS.into(),
                hostname: String::new(),
            }),
            pub_sub: Some(settings::PubSub::Subscription(subscription)),
            ..Settings::default()
        };
        let (stop, client_id) = (client.stop().child_token(), client.id().to_owned());
        let member = Arc::new(Member { client_id, group: group.to_owned(), settings });
        Self { client, member, known: Mutex::default(), tasks: TaskTracker::new(), stop }
    }

    /// Waits until the broker knows the consumer; the first call for a broker begins a session.
    pub(super) async fn ready(&self, broker: &Address, until: Instant) -> Result<(), Error> {
        if self.stop.is_cancelled() {
            return Err(Error::Closed);
        }
        let mut known = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.entry(broker.clone()).or_insert_with(|| self.begin(broker)).clone()
        };
        let settled = tokio::time::timeout_at(until, known.wait_for(Option::is_some)).await;
        match settled {
            Ok(Ok(state)) => (*state).clone().unwrap_or(Err(Error::Closed)),
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => Err(Error::Refused {
                code: Code::Unavailable,
                message: format!("{broker} did not answer the consumer's settings"),
            }),
        }
    }

    fn begin(&self, broker: &Address) -> Known {
        let (told, known) = watch::channel(None);
        let session = Session {
            api: MessagingServiceClient::new(self.client.connections().channel(broker)),
            broker: broker.clone(),
            member: Arc::clone(&self.member),
            told,
        };
        // Tracked twice: the consumer joins its own, the client all.
        let task = self.tasks.track_future(session.run(self.stop.clone()));
        self.client.tasks().spawn(task);
        known
    }

    /// Ends all sessions, telling the brokers.
    pub(super) async fn close(&self, deadline: Duration) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_err() {
            tracing::warn!(group = self.member.group, "sessions left behind at shutdown");
        }
    }
}

struct Session {
    api: MessagingServiceClient<Channel>,
    broker: Address,
    member: Arc<Member>,
    told: watch::Sender<Option<Result<(), Error>>>,
}

impl Session {
    async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                error = self.serve(&mut backoff) => {
                    tracing::debug!(broker = %self.broker, %error, "session ended");
                    // A refusal stays; what may pass is tried again while callers wait.
                    self.told.send_replace((!error.is_retryable()).then_some(Err(error)));
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(backoff.pause(fastrand::f64())) => {}
            }
        }
        let group = Some(resource(&self.member.group));
        let leaving = rocketmq::NotifyClientTerminationRequest { group };
        let leaving = self.api.notify_client_termination(call(&self.member.client_id, leaving));
        if let Err(status) = leaving.await {
            tracing::debug!(broker = %self.broker, error = status.message(), "left without a word");
        }
    }

    /// Holds the Telemetry stream and sends heartbeats until one of them fails.
    async fn serve(&mut self, backoff: &mut Backoff) -> Error {
        let unreachable = |status: &tonic::Status| Error::of_call(self.broker.as_str(), status);
        let (commands, outbound) = mpsc::channel(4);
        let settings = telemetry_command::Command::Settings(self.member.settings.clone());
        let first = TelemetryCommand { status: None, command: Some(settings) };
        if commands.send(first).await.is_err() {
            return Error::Closed;
        }
        let mut stream = tonic::Request::new(ReceiverStream::new(outbound));
        identify(&mut stream, &self.member.client_id);
        let mut pushed = match self.api.telemetry(stream).await {
            Ok(response) => response.into_inner(),
            Err(status) => return unreachable(&status),
        };
        let mut beat = tokio::time::interval(HEARTBEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut api = self.api.clone();
        loop {
            tokio::select! {
                command = pushed.message() => match command {
                    Ok(Some(command)) => match Error::of_rocketmq(command.status.as_ref()) {
                        Some(error) if command.status.is_some() => return error,
                        _ => if let Some(telemetry_command::Command::Settings(_)) = command.command {
                            backoff.reset();
                            self.told.send_replace(Some(Ok(())));
                        }
                    },
                    Ok(None) => return Error::Unreachable {
                        address: self.broker.to_string(),
                        reason: "the session ended".into(),
                    },
                    Err(status) => return unreachable(&status),
                },
                _ = beat.tick() => {
                    let request = rocketmq::HeartbeatRequest {
                        group: Some(resource(&self.member.group)),
                        client_type: ClientType::SimpleConsumer.into(),
                    };
                    let beaten = api.heartbeat(call(&self.member.client_id, request)).await;
                    let answer = match beaten {
                        Ok(answer) => answer.into_inner(),
                        Err(status) => return unreachable(&status),
                    };
                    if let Some(error) = Error::of_rocketmq(answer.status.as_ref()) {
                        return error;
                    }
                }
            }
        }
    }
}
