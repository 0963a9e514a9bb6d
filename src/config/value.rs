//! Values of keys: what text or TOML they are made of, and how they are shown.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use config::ValueKind;
use drumlin_proto::ids::BrokerGroupName;

use super::key::Key;

/// Something that a key can hold. Errors say what is wrong with the value, not where it is from.
pub(crate) trait Value: Sized {
    const KIND: &'static str;

    fn parse(raw: &ValueKind, key: &Key) -> Result<Self, String>;

    /// As it would be written in a file.
    fn show(&self) -> String;

    /// Whether it lies above `limit`, a value of the same kind.
    fn above(&self, limit: &Self) -> bool;
}

/// The text of a string, or of a number or bool written without quotes.
fn text(raw: &ValueKind) -> Result<String, String> {
    match raw {
        ValueKind::String(text) => Ok(text.trim().to_owned()),
        ValueKind::I64(number) => Ok(number.to_string()),
        ValueKind::U64(number) => Ok(number.to_string()),
        ValueKind::Float(number) => Ok(number.to_string()),
        ValueKind::Boolean(flag) => Ok(flag.to_string()),
        ValueKind::Array(_) => Err("is a list where one value is expected".into()),
        ValueKind::Table(_) => Err("is a section where one value is expected".into()),
        ValueKind::Nil | ValueKind::I128(_) | ValueKind::U128(_) => {
            Err("is no value that a file can hold".into())
        }
    }
}

fn quoted(text: &str) -> String {
    format!("{text:?}")
}

/// Splits `64MiB` into 64 and `MiB`.
fn number_and_unit(text: &str) -> Result<(u64, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let digits = digits.replace('_', "");
    let number = digits.parse().map_err(|_| match digits.is_empty() {
        true => format!("{text:?} does not begin with a whole number"),
        false => format!("{digits} is too large"),
    })?;
    Ok((number, unit.trim()))
}

/// A size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Bytes(pub(crate) u64);

const SIZES: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

impl Bytes {
    pub(crate) fn parse_text(text: &str) -> Result<Self, String> {
        let (number, unit) = number_and_unit(text)?;
        let factor =
            match unit {
                "" => 1,
                unit => SIZES.iter().find(|(name, _)| *name == unit).map(|(_, f)| *f).ok_or_else(
                    || format!("{unit:?} is no unit of size: use KiB, MiB, GiB, kB, MB, GB or B"),
                )?,
            };
        number.checked_mul(factor).map(Self).ok_or_else(|| format!("{text:?} is too large"))
    }
}

impl Value for Bytes {
    const KIND: &'static str = "size";

    fn parse(raw: &ValueKind, _key: &Key) -> Result<Self, String> {
        Self::parse_text(&text(raw)?)
    }

    fn show(&self) -> String {
        let binary = SIZES.iter().take(4).find(|(_, f)| self.0 >= *f && self.0.is_multiple_of(*f));
        match binary {
            Some((unit, factor)) => format!("\"{}{unit}\"", self.0 / factor),
            None => self.0.to_string(),
        }
    }

    fn above(&self, limit: &Self) -> bool {
        self > limit
    }
}

const TIMES: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// A duration out of text; `unit` is that of a bare number.
pub(crate) fn parse_duration(text: &str, unit: &str) -> Result<Duration, String> {
    let (number, given) = number_and_unit(text)?;
    let unit = if given.is_empty() { unit } else { given };
    let (_, factor_ms) = TIMES
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or_else(|| format!("{unit:?} is no unit of time: use ms, s, m, h or d"))?;
    let ms = number.checked_mul(*factor_ms).ok_or_else(|| format!("{text:?} is too long"))?;
    Ok(Duration::from_millis(ms))
}

impl Value for Duration {
    const KIND: &'static str = "duration";

    fn parse(raw: &ValueKind, key: &Key) -> Result<Self, String> {
        parse_duration(&text(raw)?, key.unit.unwrap_or("s"))
    }

    fn show(&self) -> String {
        let ms = self.as_millis();
        let largest = TIMES.iter().find(|(_, f)| ms > 0 && ms.is_multiple_of(u128::from(*f)));
        let (unit, factor_ms) = largest.copied().unwrap_or(("ms", 1));
        format!("\"{}{unit}\"", ms / u128::from(factor_ms))
    }

    fn above(&self, limit: &Self) -> bool {
        self > limit
    }
}

macro_rules! whole_number {
    ($($type:ty),*) => {$(
        impl Value for $type {
            const KIND: &'static str = "number";

            fn parse(raw: &ValueKind, _key: &Key) -> Result<Self, String> {
                let text = text(raw)?;
                text.replace('_', "").parse().map_err(|_| {
                    format!("{text:?} is no whole number from 0 to {}", Self::MAX)
                })
            }

            fn show(&self) -> String {
                self.to_string()
            }

            fn above(&self, limit: &Self) -> bool {
                self > limit
            }
        }
    )*};
}

whole_number!(u8, u32, u64);

impl Value for bool {
    const KIND: &'static str = "true or false";

    fn parse(raw: &ValueKind, _key: &Key) -> Result<Self, String> {
        let text = text(raw)?;
        text.parse().map_err(|_| format!("{text:?} is neither true nor false"))
    }

    fn show(&self) -> String {
        self.to_string()
    }

    fn above(&self, limit: &Self) -> bool {
        self > limit
    }
}

/// Values without an order, parsed from text and shown in quotes.
macro_rules! quoted_text {
    ($type:ty, $kind:literal, |$text:ident| $parse:expr, |$value:ident| $show:expr) => {
        impl Value for $type {
            const KIND: &'static str = $kind;

            fn parse(raw: &ValueKind, _key: &Key) -> Result<Self, String> {
                let $text = text(raw)?;
                $parse
            }

            fn show(&self) -> String {
                let $value = self;
                quoted(&$show)
            }

            fn above(&self, _limit: &Self) -> bool {
                false
            }
        }
    };
}

quoted_text!(
    String,
    "text",
    |text| match text.is_empty() {
        true => Err("must not be empty".into()),
        false => Ok(text),
    },
    |value| value
);
quoted_text!(
    PathBuf,
    "path",
    |text| match text.is_empty() {
        true => Err("must not be empty".into()),
        false => Ok(Self::from(text)),
    },
    |value| value.display().to_string()
);
quoted_text!(
    SocketAddr,
    "IP:port",
    |text| text.parse().map_err(|_| format!("{text:?} is no IP address with a port")),
    |value| value.to_string()
);
quoted_text!(
    BrokerGroupName,
    "name",
    |text| Self::parse(&text).map_err(|error| format!("{text:?}: {error}")),
    |value| value.as_str()
);

/// Where somebody else reaches us, or we them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl HostPort {
    pub(crate) fn parse_text(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is no host:port");
        let (host, port) = text.trim().rsplit_once(':').ok_or_else(fault)?;
        let port: u16 = port.parse().map_err(|_| fault())?;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if bare.is_empty() || !bare.chars().all(allowed) || (bare == host && host.contains(':')) {
            return Err(fault());
        }
        match port {
            0 => Err(format!("{text:?} has port 0, which nobody can dial")),
            port => Ok(Self { host: host.to_owned(), port }),
        }
    }
}

impl std::fmt::Display for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

quoted_text!(HostPort, "host:port", |text| Self::parse_text(&text), |value| value.to_string());

/// A node of the cluster and where its peers reach it: `name@host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeAddress {
    pub(crate) name: String,
    pub(crate) address: HostPort,
}

impl NodeAddress {
    fn parse_text(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is no name@host:port");
        let (name, address) = text.trim().split_once('@').ok_or_else(fault)?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if name.is_empty() || !name.chars().all(allowed) {
            return Err(fault());
        }
        Ok(Self { name: name.to_owned(), address: HostPort::parse_text(address)? })
    }
}

impl std::fmt::Display for NodeAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.name, self.address)
    }
}

quoted_text!(NodeAddress, "name@host:port", |text| Self::parse_text(&text), |value| value
    .to_string());

/// Items of a TOML list; in the environment and in flags separated by commas.
fn items<T>(raw: &ValueKind, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let texts = match raw {
        ValueKind::Array(items) => {
            items.iter().map(|item| text(&item.kind)).collect::<Result<Vec<_>, _>>()?
        }
        other => text(other)?.split([',', ';']).map(|t| t.trim().to_owned()).collect(),
    };
    texts.iter().filter(|t| !t.is_empty()).map(|t| parse(t)).collect()
}

fn show_items<T: Value>(items: &[T]) -> String {
    let items: Vec<_> = items.iter().map(Value::show).collect();
    format!("[{}]", items.join(", "))
}

impl Value for Vec<NodeAddress> {
    const KIND: &'static str = "list of name@host:port";

    fn parse(raw: &ValueKind, _key: &Key) -> Result<Self, String> {
        items(raw, NodeAddress::parse_text)
    }

    fn show(&self) -> String {
        show_items(self)
    }

    fn above(&self, _limit: &Self) -> bool {
        false
    }
}

impl Value for Vec<HostPort> {
    const KIND: &'static str = "list of host:port";

    fn parse(raw: &ValueKind, _key: &Key) -> Result<Self, String> {
        items(raw, HostPort::parse_text)
    }

    fn show(&self) -> String {
        show_items(self)
    }

    fn above(&self, _limit: &Self) -> bool {
        false
    }
}

/// May be left unset: by leaving it out, or by the word `off`.
impl<T: Value> Value for Option<T> {
    const KIND: &'static str = T::KIND;

    fn parse(raw: &ValueKind, key: &Key) -> Result<Self, String> {
        match raw {
            ValueKind::String(text) if matches!(text.trim(), "" | "off") => Ok(None),
            raw => T::parse(raw, key).map(Some),
        }
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(|| "\"off\"".into(), Value::show)
    }

    fn above(&self, limit: &Self) -> bool {
        match (self, limit) {
            (Some(value), Some(limit)) => value.above(limit),
            (None, _) | (_, None) => false,
        }
    }
}
