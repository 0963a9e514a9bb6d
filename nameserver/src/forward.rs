//! Client calls sent on to the broker group that owns what they are about.

pub(crate) use drumlin_proto::forward::{
    Call, Forwarder, IfLost, MESSAGE_BYTES_MAX, administration, messaging,
};
use drumlin_proto::forward::{CarryError, INTERNAL_LISTENER, NO_DEADLINE_HOLD, carry};
use drumlin_proto::native::Address;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::route_table::RouteTable;
use crate::shared::Shared;

/// Sends a call to the process that answers for a broker group now.
pub(crate) async fn forward<T, R, F>(
    shared: &Shared,
    broker_group: &str,
    call: &Call,
    message: T,
    if_lost: IfLost,
    send: impl Fn(Channel, Request<T>) -> F,
) -> Result<R, Status>
where
    T: Clone,
    F: Future<Output = Result<Response<R>, Status>>,
{
    let look = |table: &RouteTable| table.address(broker_group, INTERNAL_LISTENER);
    let find = |until| shared.directory.wait_for(until, look);
    let hold_until = call.hold_until(NO_DEADLINE_HOLD);
    let call = shared.clients.complete(call);
    let carried = carry(&shared.forwarder, &call, message, if_lost, hold_until, find, send).await;
    carried.map(Response::into_inner).map_err(|error| match error {
        CarryError::Failed(status) => status,
        CarryError::Nobody => {
            Status::unavailable(format!("no process of broker group {broker_group} took the call"))
        }
    })
}

/// Any broker group, for calls that every broker answers the same way.
pub(crate) fn any_group(shared: &Shared) -> Result<String, Status> {
    let first = shared.directory.read(|table| {
        let catalog = table.catalog_group().map(str::to_owned);
        catalog.or_else(|| table.live_groups().into_iter().next())
    });
    first.ok_or_else(|| Status::unavailable("no broker has registered yet"))
}

/// Where a stream that outlives single brokers begins: any live broker group, the catalog's first.
pub(crate) fn any_address(table: &RouteTable) -> Option<Address> {
    let catalog = table.catalog_group().map(str::to_owned);
    let groups = catalog.into_iter().chain(table.live_groups());
    groups.filter_map(|group| table.address(&group, INTERNAL_LISTENER)).next()
}
