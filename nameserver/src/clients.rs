//! What of a client's settings goes with the calls that are sent on for it: brokers get the settings
//! themselves only where its Telemetry stream ends.

use std::collections::HashMap;
use std::time::Duration;

use drumlin_proto::forward::{CLIENT_TYPE, Call, REQUEST_TIMEOUT_MS};
use drumlin_proto::rocketmq::telemetry_command::Command;
use drumlin_proto::rocketmq::{Settings, TelemetryCommand};
use parking_lot::Mutex;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Noted {
    client_type: Option<i32>,
    request_timeout: Option<Duration>,
    /// Open Telemetry streams.
    streams: usize,
}

impl Noted {
    fn read(&mut self, settings: &Settings) {
        self.client_type = settings.client_type;
        let timeout = settings.request_timeout.as_ref();
        self.request_timeout = timeout.and_then(|timeout| {
            let seconds = u64::try_from(timeout.seconds).ok()?;
            Some(Duration::new(seconds, u32::try_from(timeout.nanos).ok()?))
        });
    }
}

/// Clients with a Telemetry stream here, by client id.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    noted: Mutex<HashMap<String, Noted>>,
}

impl Clients {
    /// A stream of this client begins; it is forgotten with its last.
    pub(crate) fn enter(&self, client_id: &str) -> Presence<'_> {
        self.noted.lock().entry(client_id.to_owned()).or_default().streams += 1;
        Presence { clients: self, client_id: client_id.to_owned() }
    }

    /// The call with what is known of its client.
    pub(crate) fn complete(&self, call: &Call) -> Call {
        let mut call = call.clone();
        let noted = self.noted.lock().get(call.client_id()).copied();
        if let Some(client_type) = noted.and_then(|noted| noted.client_type) {
            call.set(CLIENT_TYPE, &client_type.to_string());
        }
        if let Some(timeout) = noted.and_then(|noted| noted.request_timeout) {
            call.set(REQUEST_TIMEOUT_MS, &timeout.as_millis().to_string());
        }
        call
    }
}

/// One Telemetry stream of a client.
#[derive(Debug)]
pub(crate) struct Presence<'a> {
    clients: &'a Clients,
    client_id: String,
}

impl Presence<'_> {
    /// Takes note of settings that pass.
    pub(crate) fn passes(&self, command: &TelemetryCommand) {
        if let Some(Command::Settings(settings)) = &command.command
            && let Some(noted) = self.clients.noted.lock().get_mut(&self.client_id)
        {
            noted.read(settings);
        }
    }
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        let mut all = self.clients.noted.lock();
        let Some(noted) = all.get_mut(&self.client_id) else { return };
        noted.streams -= 1;
        if noted.streams == 0 {
            all.remove(&self.client_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Request;

    use super::*;

    #[test]
    fn settings_go_with_calls_while_a_stream_is_open() {
        let clients = Clients::default();
        let mut request = Request::new(());
        request.metadata_mut().insert("x-mq-client-id", "me".parse().unwrap());
        let (call, ()) = Call::split(request);
        let sent = |clients: &Clients, name: &str| {
            let request = clients.complete(&call).request(()).unwrap();
            request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(sent(&clients, CLIENT_TYPE), None);
        let first = clients.enter("me");
        let second = clients.enter("me");
        let request_timeout = Some(prost_types::Duration { seconds: 2, nanos: 500_000_000 });
        let settings = Settings { client_type: Some(3), request_timeout, ..Settings::default() };
        let command = Some(Command::Settings(settings));
        first.passes(&TelemetryCommand { status: None, command });
        drop(first);
        assert_eq!(sent(&clients, CLIENT_TYPE).as_deref(), Some("3"));
        assert_eq!(sent(&clients, REQUEST_TIMEOUT_MS).as_deref(), Some("2500"));
        drop(second);
        assert_eq!(sent(&clients, CLIENT_TYPE), None);
    }
}
