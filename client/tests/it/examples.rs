//! Each example as it is shipped.

use crate::{Node, within};

#[allow(dead_code, reason = "the example's own main")]
#[path = "../../examples/produce.rs"]
mod produce;
#[allow(dead_code, reason = "the example's own main")]
#[path = "../../examples/pull.rs"]
mod pull;
#[allow(dead_code, reason = "the example's own main")]
#[path = "../../examples/simple_consumer.rs"]
mod simple_consumer;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_example_sends_the_others_read() {
    let node = Node::start().await;
    within(produce::run(&node.address())).await.unwrap();
    assert_eq!(within(pull::run(&node.address())).await.unwrap(), 5);
    assert_eq!(within(simple_consumer::run(&node.address())).await.unwrap(), 5);
}
