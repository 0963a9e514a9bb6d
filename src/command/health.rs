//! `drumlin health`: asks a node's HTTP port, so that images need no other tool.

use std::time::Duration;

use clap::Args;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;

use crate::cli::{Global, Shape};
use crate::failure::{Failure, Kind};
use crate::output;

/// Broker, then nameserver.
const DEFAULT_ADDRESSES: [&str; 2] = ["127.0.0.1:8082", "127.0.0.1:9877"];
const BODY_BYTES_MAX: usize = 64 << 10;

#[derive(Debug, Args)]
pub(crate) struct Health {
    /// Whether it can serve, not only whether it is alive
    #[arg(long)]
    ready: bool,
    /// HTTP port to ask [default: 127.0.0.1:8082, else 127.0.0.1:9877]
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
}

impl Health {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let addresses = match &self.http {
            Some(address) => vec![address.as_str()],
            None => DEFAULT_ADDRESSES.to_vec(),
        };
        let path = if self.ready { "/readyz" } else { "/livez" };
        let (address, answer) = super::runtime()?.block_on(first(&addresses, path, global))?;
        let healthy = answer.status == 200;
        match global.output {
            Shape::Json | Shape::Jsonl => output::print_document(
                "drumlin/health/v1",
                json!({"http": address, "path": path, "status": answer.status, "ok": healthy,
                       "body": answer.body.trim_end()}),
            )?,
            Shape::Table | Shape::Wide | Shape::Csv | Shape::Name => {
                output::print_line(answer.body.trim_end())?;
            }
        }
        match healthy {
            true => Ok(()),
            false => Err(Failure::new(
                Kind::NotReady,
                format!("{address}{path} answered {}", answer.status),
            )),
        }
    }
}

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: String,
}

/// The answer of the first address where somebody listens.
async fn first<'a>(
    addresses: &[&'a str],
    path: &str,
    global: &Global,
) -> Result<(&'a str, Answer), Failure> {
    let mut faults = Vec::new();
    for address in addresses {
        match tokio::time::timeout(global.timeout, get(address, path)).await {
            Ok(Ok(answer)) => return Ok((address, answer)),
            Ok(Err(fault)) => faults.push(format!("{address}: {fault}")),
            Err(_) => faults.push(format!("{address}: no answer within {}", shown(global.timeout))),
        }
    }
    Err(Failure::new(Kind::Connect, "nobody answers").details(faults))
}

fn shown(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}

pub(super) async fn get(address: &str, path: &str) -> Result<Answer, String> {
    let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let request = hyper::Request::get(path)
        .header(hyper::header::HOST, address)
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok(Answer { status, body: String::from_utf8_lossy(&body).into_owned() })
    };
    // The connection makes progress only while it is polled; the exchange ends first.
    tokio::pin!(exchange);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        answer = &mut exchange => answer,
        ended = &mut connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(error.to_string()),
        },
    }
}
