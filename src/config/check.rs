//! Checks that both roles need: addresses that clash, addresses that are open to everyone.

use std::net::{IpAddr, SocketAddr};

use super::reader::Reader;
use super::value::HostPort;

/// An address that the process will listen on, and the key that says so.
pub(crate) type Bound = (&'static str, SocketAddr);

/// No two on one port; none beyond loopback unless that was allowed.
pub(crate) fn binds(reader: &mut Reader, binds: &[Bound], allow_insecure: bool) {
    for (nth, (path, address)) in binds.iter().enumerate() {
        let clash = binds[..nth].iter().find(|(_, other)| clashes(*other, *address));
        if let Some((other, _)) = clash {
            reader.fault(path, format!("is {address}, which clashes with {other}"));
        }
        if address.ip().is_loopback() {
            continue;
        }
        if allow_insecure {
            reader.warn(format!(
                "{path} = {address} is open to the network without TLS and authentication"
            ));
        } else {
            reader.fault(
                path,
                format!(
                    "is {address}, not a loopback address: without TLS and authentication \
                     this needs listeners.allow_insecure = true"
                ),
            );
        }
    }
}

fn clashes(a: SocketAddr, b: SocketAddr) -> bool {
    let same_host = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() != 0 && a.port() == b.port() && same_host
}

/// What others are told to dial must be something that they can dial.
pub(crate) fn advertised(
    reader: &mut Reader,
    bind_path: &'static str,
    bind: SocketAddr,
    advertised_path: &'static str,
    advertised: Option<&HostPort>,
) {
    match advertised {
        None if bind.ip().is_unspecified() => reader.fault(
            bind_path,
            format!("is {bind}, which nobody can dial: set {advertised_path} too"),
        ),
        Some(address) if unspecified(&address.host) => {
            reader.fault(advertised_path, format!("is {address}, which nobody can dial"));
        }
        None | Some(_) => {}
    }
}

fn unspecified(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified())
}
