//! Points in time and in queues, as they are typed.

use std::str::FromStr;

use jiff::Timestamp;

use crate::config::parse_duration;

/// RFC 3339, a distance back (`-10m`) or `@` and milliseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    At(Timestamp),
    Back(std::time::Duration),
}

impl Moment {
    /// Milliseconds since the epoch.
    pub(crate) fn ms(self, now: Timestamp) -> i64 {
        match self {
            Self::At(timestamp) => timestamp.as_millisecond(),
            Self::Back(distance) => {
                let back_ms = i64::try_from(distance.as_millis()).unwrap_or(i64::MAX);
                now.as_millisecond().saturating_sub(back_ms)
            }
        }
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(back) = text.strip_prefix('-') {
            return parse_duration(back, "").map(Self::Back);
        }
        if let Some(ms) = text.strip_prefix('@') {
            let ms = ms.parse().map_err(|_| format!("{ms:?} is no number of milliseconds"))?;
            let timestamp = Timestamp::from_millisecond(ms);
            return timestamp.map(Self::At).map_err(|_| format!("{ms} ms lie beyond all time"));
        }
        text.parse().map(Self::At).map_err(|_| {
            format!("{text:?} is no time: use RFC 3339, a distance back (-10m) or @ and epoch ms")
        })
    }
}

/// Where to begin in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    Earliest,
    Latest,
    At(Moment),
    Offset(u64),
}

impl FromStr for Start {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "earliest" => Ok(Self::Earliest),
            "latest" => Ok(Self::Latest),
            text => match text.parse() {
                Ok(offset) => Ok(Self::Offset(offset)),
                Err(_) => text.parse().map(Self::At),
            },
        }
    }
}

/// `TOPIC/BROKERGROUP/ID`; the broker group may be left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QueueName {
    pub(crate) topic: String,
    pub(crate) broker_group: Option<String>,
    pub(crate) queue_id: u32,
}

impl FromStr for QueueName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is no queue: write TOPIC/BROKERGROUP/ID or TOPIC/ID");
        let parts: Vec<&str> = text.split('/').collect();
        let (topic, broker_group, id) = match parts.as_slice() {
            [topic, id] => (topic, None, id),
            [topic, group, id] => (topic, Some((*group).to_owned()), id),
            _ => return Err(fault()),
        };
        let queue_id = id.parse().map_err(|_| fault())?;
        if topic.is_empty() || broker_group.as_deref() == Some("") {
            return Err(fault());
        }
        Ok(Self { topic: (*topic).to_owned(), broker_group, queue_id })
    }
}

/// `QUEUE:OFFSET`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) queue: QueueName,
    pub(crate) offset: u64,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is no place: write TOPIC/BROKERGROUP/ID:OFFSET");
        let (queue, offset) = text.rsplit_once(':').ok_or_else(fault)?;
        let offset = offset.parse().map_err(|_| fault())?;
        Ok(Self { queue: queue.parse()?, offset })
    }
}

/// `TOPIC@TIME`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TopicMoment {
    pub(crate) topic: String,
    pub(crate) moment: Moment,
}

impl FromStr for TopicMoment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (topic, time) =
            text.split_once('@').ok_or_else(|| format!("{text:?} is not TOPIC@TIME"))?;
        match topic {
            "" => Err(format!("{text:?} is not TOPIC@TIME")),
            topic => Ok(Self { topic: topic.to_owned(), moment: time.parse()? }),
        }
    }
}

/// RFC 3339 in UTC, with milliseconds.
pub(crate) fn rfc3339(ms: i64) -> Option<String> {
    Timestamp::from_millisecond(ms).ok().map(|timestamp| format!("{timestamp:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_three_ways() {
        let now = Timestamp::from_millisecond(1_000_000).expect("in range");
        let ms = |text: &str| text.parse::<Moment>().map(|moment| moment.ms(now));
        assert_eq!(ms("@12345"), Ok(12_345));
        assert_eq!(ms("-10m"), Ok(400_000));
        assert_eq!(ms("1970-01-01T00:00:02.5Z"), Ok(2_500));
        assert_eq!(ms("1970-01-01T01:00:00+01:00"), Ok(0));
        assert!(ms("-10").is_err(), "a bare number has no unit");
        assert!(ms("yesterday").is_err());
    }

    #[test]
    fn a_bare_number_is_an_offset() {
        assert_eq!("17".parse(), Ok(Start::Offset(17)));
        assert_eq!("earliest".parse(), Ok(Start::Earliest));
        assert!(matches!("@17".parse(), Ok(Start::At(_))));
        assert!("someday".parse::<Start>().is_err());
    }

    #[test]
    fn a_queue_may_leave_out_its_broker_group() {
        let queue = |text: &str| text.parse::<QueueName>();
        let place: Place = "orders/a/3:1204".parse().expect("valid");
        assert_eq!(place.offset, 1204);
        assert_eq!(place.queue.broker_group.as_deref(), Some("a"));
        assert_eq!(place.queue.queue_id, 3);
        assert_eq!(queue("orders/3").expect("valid").broker_group, None);
        assert!(queue("orders").is_err());
        assert!(queue("orders//3").is_err());
        assert!("orders/3".parse::<Place>().is_err());
    }

    #[test]
    fn a_time_may_itself_hold_an_at_sign() {
        let asked: TopicMoment = "orders@@5".parse().expect("valid");
        assert_eq!(asked.topic, "orders");
        assert_eq!(asked.moment.ms(Timestamp::UNIX_EPOCH), 5);
    }
}
