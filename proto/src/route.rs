//! Routes on the wire: what both nameservers and brokers answer, and where a message goes.

/// Which of a topic's `queue_count` queues, counted over all broker groups in route order, holds a
/// message group. Stable for ever: order within a message group depends on it.
///
/// CRC-32 of the UTF-8 message group, modulo the count.
pub fn queue_of_message_group(message_group: &str, queue_count: u32) -> u32 {
    crc32fast::hash(message_group.as_bytes()) % queue_count.max(1)
}
