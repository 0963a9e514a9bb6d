//! The way of the tools to a cluster, and what its answers mean for an exit code.

use std::time::Duration;

use drumlin_client::{Admin, Client, Code, Error};

use crate::cli::Global;
use crate::config::nearest;
use crate::failure::{Failure, Kind};

/// Patience with what still runs in the background when a command is done.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(5);

/// Connects to the first endpoint that answers.
pub(super) async fn connect(global: &Global) -> Result<Client, Failure> {
    let endpoints = global.endpoints();
    let connecting = Client::builder().endpoints(endpoints.clone()).build();
    match tokio::time::timeout(global.timeout, connecting).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(Error::Configuration { faults })) => {
            Err(Failure::new(Kind::Usage, "the endpoints are invalid").details(faults))
        }
        Ok(Err(error)) => {
            let hint = "drumlin dev starts a node; -e HOST:PORT names another one";
            let asked = format!("asked: {}", endpoints.join(", "));
            Err(failure(&error).hint(hint).details([asked]))
        }
        Err(_) => Err(timeout(global)),
    }
}

pub(super) fn timeout(global: &Global) -> Failure {
    let limit_ms = global.timeout.as_millis();
    Failure::new(Kind::Timeout, format!("no answer within {limit_ms} ms (--timeout)"))
}

/// An answer within the time that the user allows.
pub(super) async fn answer<T>(
    global: &Global,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(global.timeout, call).await {
        Ok(answer) => answer.map_err(|error| failure(&error)),
        Err(_) => Err(timeout(global)),
    }
}

/// [`answer`] about one topic: if it does not exist, says which one is meant perhaps.
pub(super) async fn topic_answer<T>(
    global: &Global,
    admin: &Admin,
    topic: &str,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(global.timeout, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) if error.code() == Code::TopicNotFound => {
            Err(topic_not_found(admin, topic).await)
        }
        Ok(Err(error)) => Err(failure(&error)),
        Err(_) => Err(timeout(global)),
    }
}

/// With the name that is most like it, if the cluster tells its topics.
pub(super) async fn topic_not_found(admin: &Admin, topic: &str) -> Failure {
    let topics = admin.list_topics().await.unwrap_or_default();
    let near = nearest(topic, topics.iter().map(|topic| topic.name.as_str()));
    Failure::new(Kind::TopicNotFound, format!("topic {topic:?} does not exist"))
        .details(near.map(|near| format!("did you mean {near:?}?")))
        .hint(format!("drumlin topic create {topic} --queues 8"))
}

/// Ends what the client does in the background.
pub(super) async fn close(client: &Client) {
    client.shutdown(SHUTDOWN_WAIT).await;
}

pub(super) fn failure(error: &Error) -> Failure {
    let kind = match error.code() {
        Code::TopicNotFound => Kind::TopicNotFound,
        Code::GroupNotFound => Kind::GroupNotFound,
        Code::InvalidArgument => Kind::Usage,
        Code::AlreadyExists => Kind::Exists,
        Code::PreconditionFailed => Kind::Precondition,
        Code::Unsupported => Kind::NotSupported,
        Code::OffsetOutOfRange => Kind::MessageNotFound,
        Code::DeadlineExceeded => Kind::Timeout,
        Code::Unavailable => Kind::Connect,
        _ if matches!(error, Error::Unreachable { .. }) => Kind::Connect,
        _ => Kind::Failed,
    };
    Failure::new(kind, error.to_string())
}
