//! `drumlin.v1.Catalog`: takes over what the catalog group's leader tells of definitions.

use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::catalog_server::{Catalog, CatalogServer};
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{PushRequest, PushResponse, Status as NativeStatus};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::native::{Fault, REQUEST_BYTES_MAX};
use crate::broker::Context;
use crate::command::{self, CatalogChange, CatalogDelta, Command, Refusal};
use crate::replica::{Item, ProposeError};

/// How long a delta may wait for its turn.
const COPY_TIMEOUT: Duration = Duration::from_secs(5);

/// Clones share everything.
#[derive(Clone, Debug)]
pub struct CatalogService {
    context: Arc<Context>,
}

impl CatalogService {
    pub fn server(context: Arc<Context>) -> CatalogServer<Self> {
        CatalogServer::new(Self { context }).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    fn version(&self) -> u64 {
        self.context.replica.view().state.catalog().version()
    }

    async fn copy(&self, request: &PushRequest) -> Result<(), Fault> {
        let config = &self.context.config;
        let told = (request.cluster.as_str(), request.catalog_group.as_str());
        if told != (config.cluster.as_str(), config.catalog_group.as_str()) {
            let text = format!(
                "broker group {} of cluster {} copies the catalog of broker group {}",
                config.broker_group, config.cluster, config.catalog_group
            );
            return Err(Fault::new(Code::PreconditionFailed, text));
        }
        if self.context.owns_catalog() {
            return Err(Fault::invalid("this broker group owns the catalog"));
        }
        if !self.context.replica.raft_status().borrow().serving {
            return Err(Fault::new(Code::NotLeader, "this node does not lead its broker group"));
        }
        let delta = decode(request)?;
        if delta.from == delta.to {
            // Only a question. Nothing may be pending from before this node led.
            return Ok(self.context.replica.read_barrier().await?);
        }
        if delta.from != self.version() {
            return Ok(());
        }
        let changes_queues = delta.topics.iter().any(|topic| topic.next.is_some());
        let to = delta.to;
        self.propose(delta).await?;
        if changes_queues {
            // Sends that were placed by the old list are proposed by now, and decided before this.
            self.propose(CatalogDelta { from: to, to, ..CatalogDelta::default() }).await?;
        }
        Ok(())
    }

    async fn propose(&self, delta: CatalogDelta) -> Result<(), Fault> {
        let deadline = Some(Instant::now() + COPY_TIMEOUT);
        let item = Item::Command(Command::Catalog(CatalogChange::Copy(delta)));
        match self.context.replica.propose(item, deadline).await {
            // Another push was first: the answer tells how far it came.
            Ok(_) | Err(ProposeError::Refused(Refusal::CopyElsewhere { .. })) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn decode(request: &PushRequest) -> Result<CatalogDelta, Fault> {
    let version = u16::try_from(request.command_version).map_err(Fault::invalid)?;
    let decoded = command::decode_copy(version, &request.delta);
    decoded.map_err(|error| Fault::new(Code::Unsupported, error.to_string()))
}

#[tonic::async_trait]
impl Catalog for CatalogService {
    async fn push(&self, request: Request<PushRequest>) -> Result<Response<PushResponse>, Status> {
        let copied = self.copy(&request.into_inner()).await;
        let status = match copied {
            Ok(()) => NativeStatus { code: Code::Ok.into(), ..NativeStatus::default() },
            Err(Fault { code, message, .. }) => {
                NativeStatus { code: code.into(), message, ..NativeStatus::default() }
            }
        };
        Ok(Response::new(PushResponse { status: Some(status), version: self.version() }))
    }
}
