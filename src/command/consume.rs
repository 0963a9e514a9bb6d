//! `drumlin consume`: prints messages, from anywhere or as a member of a consumer group.

use std::collections::BTreeSet;
use std::io::{self, BufWriter, StdoutLock, Write};
use std::time::Duration;

use clap::Args;
use drumlin_client::{Client, Delivery, Filter, Queues, SimpleConsumer};
use futures::FutureExt;
use tokio_util::sync::CancellationToken;

use super::{access, server, topic};
use crate::cli::{Global, Shape};
use crate::failure::Failure;
use crate::format::{Format, Printed};
use crate::moment::Start;

/// Messages that one call may bring.
const BATCH_MAX: usize = 32;
/// How long a member of a group waits for messages in one call.
const POLL: Duration = Duration::from_secs(15);
/// Without a message for so long, a member that is to exit at the end has reached it.
const END_WAIT: Duration = Duration::from_secs(2);
const LEAVE_WAIT: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(crate) struct Consume {
    topic: String,
    /// Receive as a member of this consumer group, and acknowledge what was printed
    #[arg(long, conflicts_with = "from")]
    group: Option<String>,
    /// earliest, latest, a time, or an offset in every queue [default: latest, with
    /// --exit-at-end earliest]
    #[arg(long, value_name = "WHERE", allow_hyphen_values = true)]
    from: Option<Start>,
    /// Exit after so many messages
    #[arg(short = 'n', long, value_name = "N")]
    count: Option<u64>,
    /// Exit where the topic ended when the command began; with --group, when nothing is left
    #[arg(long)]
    exit_at_end: bool,
    /// Only messages with this tag: `a`, `a||b` or `*`
    #[arg(long, default_value = "*")]
    tag: String,
    /// kcat's tokens: %s body, %k key, %t topic, %p queue id, %o offset, %T time, %h properties,
    /// %S %K %R lengths; and %q queue, %i message id, %g tag
    #[arg(long, default_value = "%s\\n")]
    format: Format,
    /// JSON lines with everything
    #[arg(short = 'J', conflicts_with = "format")]
    json: bool,
}

impl Consume {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        super::runtime()?.block_on(async {
            let client = access::connect(global).await?;
            let mut printer = self.printer(global);
            let stop = server::stop_token();
            let done = match &self.group {
                None => self.pull(&client, global, &mut printer, &stop).await,
                Some(group) => self.receive(&client, global, group, &mut printer, &stop).await,
            };
            access::close(&client).await;
            done?;
            if !global.quiet && global.verbose > 0 {
                anstream::eprintln!("{} messages", printer.count);
            }
            Ok(())
        })
    }

    fn printer(&self, global: &Global) -> Printer {
        let json = self.json || matches!(global.output, Shape::Json | Shape::Jsonl);
        Printer {
            out: BufWriter::new(io::stdout().lock()),
            format: (!json).then(|| self.format.clone()),
            count: 0,
            count_max: self.count,
        }
    }

    /// Reads every queue by offset.
    async fn pull(
        &self,
        client: &Client,
        global: &Global,
        printer: &mut Printer,
        stop: &CancellationToken,
    ) -> Result<(), Failure> {
        let admin = client.admin();
        let exists = admin.describe_topic(&self.topic);
        access::topic_answer(global, &admin, &self.topic, exists).await?;
        let from = self.from.unwrap_or(match self.exit_at_end {
            true => Start::Earliest,
            false => Start::Latest,
        });
        let mut plan =
            client.pull_consumer().assign(&self.topic, Queues::All).seek(topic::at(from));
        if self.exit_at_end {
            plan = plan.stop_at_end();
        }
        let mut stream = plan.into_stream();
        let tags = tags(&self.tag);
        while !printer.is_done() && !stop.is_cancelled() {
            let next = match stream.next().now_or_never() {
                Some(next) => next,
                None => {
                    printer.out.flush()?;
                    tokio::select! {
                        next = stream.next() => next,
                        () = stop.cancelled() => break,
                    }
                }
            };
            match next {
                None => break,
                Some(Ok(delivery)) if wanted(tags.as_ref(), &delivery) => {
                    printer.print(&delivery, false)?;
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    printer.out.flush()?;
                    return Err(access::failure(&error));
                }
            }
        }
        Ok(printer.out.flush()?)
    }

    /// Takes part in a consumer group by leases.
    async fn receive(
        &self,
        client: &Client,
        global: &Global,
        group: &str,
        printer: &mut Printer,
        stop: &CancellationToken,
    ) -> Result<(), Failure> {
        let filter = match self.tag.trim() {
            "*" | "" => Filter::All,
            tag => Filter::tag(tag),
        };
        let admin = client.admin();
        let consumer = client.simple_consumer(group).subscribe(&self.topic, filter).build();
        let consumer = access::topic_answer(global, &admin, &self.topic, consumer).await?;
        let wait = if self.exit_at_end { END_WAIT } else { POLL };
        let mut done = Ok(());
        while done.is_ok() && !printer.is_done() {
            let batch = printer.left(BATCH_MAX);
            // A call that is given up leaves its messages to their lease, which is short.
            let received = tokio::select! {
                received = consumer.receive(batch, wait) => received,
                () = stop.cancelled() => break,
            };
            match received {
                Ok(deliveries) if deliveries.is_empty() && self.exit_at_end => break,
                Ok(deliveries) => done = hand_out(&consumer, printer, deliveries).await,
                Err(error) => done = Err(access::failure(&error)),
            }
        }
        consumer.shutdown(LEAVE_WAIT).await;
        done
    }
}

/// Prints, then acknowledges what was printed; gives back what was not.
async fn hand_out(
    consumer: &SimpleConsumer,
    printer: &mut Printer,
    deliveries: Vec<Delivery>,
) -> Result<(), Failure> {
    let mut printed = Vec::new();
    let mut fault = None;
    for delivery in deliveries {
        if fault.is_none() && !printer.is_done() {
            match printer.print(&delivery, true) {
                Ok(()) => {
                    printed.push(delivery);
                    continue;
                }
                Err(error) => fault = Some(error),
            }
        }
        consumer.nack(&delivery).await.map_err(|error| access::failure(&error))?;
    }
    if let Err(error) = printer.out.flush() {
        for delivery in &printed {
            consumer.nack(delivery).await.map_err(|error| access::failure(&error))?;
        }
        return Err(error.into());
    }
    for delivery in &printed {
        consumer.ack(delivery).await.map_err(|error| access::failure(&error))?;
    }
    fault.map_or(Ok(()), |error| Err(error.into()))
}

struct Printer {
    out: BufWriter<StdoutLock<'static>>,
    /// `None`: JSON lines.
    format: Option<Format>,
    count: u64,
    count_max: Option<u64>,
}

impl Printer {
    fn is_done(&self) -> bool {
        self.count_max.is_some_and(|max| self.count >= max)
    }

    /// How many of `batch` may still be printed.
    fn left(&self, batch: usize) -> usize {
        let left = self.count_max.map_or(u64::MAX, |max| max.saturating_sub(self.count));
        usize::try_from(left).unwrap_or(usize::MAX).min(batch)
    }

    fn print(&mut self, delivery: &Delivery, leased: bool) -> io::Result<()> {
        let message = printed(delivery, leased);
        match &self.format {
            Some(format) => format.write(&message, &mut self.out)?,
            None => writeln!(self.out, "{}", message.json())?,
        }
        self.count += 1;
        Ok(())
    }
}

/// A message as it is printed; `leased`: it was received through a group.
pub(super) fn printed(delivery: &Delivery, leased: bool) -> Printed {
    Printed {
        topic: delivery.topic.to_string(),
        broker_group: delivery.broker_group.to_string(),
        queue_id: delivery.queue_id,
        offset: delivery.offset.get(),
        message_id: delivery.message_id.clone(),
        keys: delivery.keys.clone(),
        tag: delivery.tag.clone(),
        message_group: delivery.message_group.clone(),
        properties: delivery.properties.clone(),
        born_ms: delivery.born_ms,
        store_ms: delivery.store_time_ms,
        attempt: leased.then_some(delivery.attempt),
        body: delivery.body.to_vec(),
    }
}

/// `None`: all of them.
fn tags(expression: &str) -> Option<BTreeSet<&str>> {
    let tags: BTreeSet<_> =
        expression.split("||").map(str::trim).filter(|tag| !tag.is_empty()).collect();
    (!tags.is_empty() && !tags.contains("*")).then_some(tags)
}

fn wanted(tags: Option<&BTreeSet<&str>>, delivery: &Delivery) -> bool {
    let of = |tags: &BTreeSet<&str>| delivery.tag.as_deref().is_some_and(|tag| tags.contains(tag));
    tags.is_none_or(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_expressions_name_tags_or_all() {
        assert_eq!(tags("*"), None);
        assert_eq!(tags(""), None);
        assert_eq!(tags("a||*"), None);
        assert_eq!(tags(" a || b "), Some(BTreeSet::from(["a", "b"])));
    }
}
