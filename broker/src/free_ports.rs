//! Ports for tests whose nodes are stopped and started again.

use std::collections::BTreeSet;
use std::net::TcpListener;

use parking_lot::Mutex;

/// Below what the kernel gives to outgoing connections, so that nobody takes a port while its node
/// is down.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

/// An address on loopback that no other test of this process is given.
pub(crate) fn free_address() -> String {
    static TAKEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut taken = TAKEN.lock();
    loop {
        let port = fastrand::u16(PORTS);
        let address = format!("127.0.0.1:{port}");
        if !taken.contains(&port) && TcpListener::bind(&address).is_ok() {
            taken.insert(port);
            return address;
        }
    }
}
