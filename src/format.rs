//! How a message is printed: kcat's tokens and ours, or JSON.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::str::FromStr;

use serde_json::json;

use crate::moment::rfc3339;

/// A message as it is printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Printed {
    pub(crate) topic: String,
    pub(crate) broker_group: String,
    pub(crate) queue_id: u32,
    pub(crate) offset: u64,
    pub(crate) message_id: String,
    pub(crate) keys: Vec<String>,
    pub(crate) tag: Option<String>,
    pub(crate) message_group: Option<String>,
    pub(crate) properties: BTreeMap<String, String>,
    pub(crate) born_ms: i64,
    pub(crate) store_ms: i64,
    /// Deliveries so far, where it was received through a group.
    pub(crate) attempt: Option<u32>,
    pub(crate) body: Vec<u8>,
}

impl Printed {
    /// `TOPIC/BROKERGROUP/ID`
    pub(crate) fn queue(&self) -> String {
        format!("{}/{}/{}", self.topic, self.broker_group, self.queue_id)
    }

    /// Everything; the body as text where it is UTF-8, else in base64.
    pub(crate) fn json(&self) -> serde_json::Value {
        let body = std::str::from_utf8(&self.body).ok();
        let mut json = json!({
            "schema": "drumlin/message/v1",
            "topic": self.topic,
            "broker_group": self.broker_group,
            "queue_id": self.queue_id,
            "offset": self.offset,
            "message_id": self.message_id,
            "keys": self.keys,
            "tag": self.tag,
            "message_group": self.message_group,
            "properties": self.properties,
            "born": rfc3339(self.born_ms),
            "born_ms": self.born_ms,
            "store_time": rfc3339(self.store_ms),
            "store_time_ms": self.store_ms,
            "attempt": self.attempt,
            "body_bytes": self.body.len(),
            "body": body,
        });
        if body.is_none() {
            json["body_base64"] = base64(&self.body).into();
        }
        json
    }
}

/// A parsed format string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Format(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Bytes(Vec<u8>),
    Token(Token),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Body,
    BodyBytes,
    /// As 4 bytes, big-endian.
    BodyBytesBinary,
    Key,
    KeyBytes,
    StoreMs,
    Properties,
    Topic,
    QueueId,
    Offset,
    Queue,
    MessageId,
    Tag,
}

impl Token {
    fn of(letter: char) -> Option<Self> {
        Some(match letter {
            's' => Self::Body,
            'S' => Self::BodyBytes,
            'R' => Self::BodyBytesBinary,
            'k' => Self::Key,
            'K' => Self::KeyBytes,
            'T' => Self::StoreMs,
            'h' => Self::Properties,
            't' => Self::Topic,
            'p' => Self::QueueId,
            'o' => Self::Offset,
            'q' => Self::Queue,
            'i' => Self::MessageId,
            'g' => Self::Tag,
            _ => return None,
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut plain = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match c {
                '\\' => plain.push(escape(&mut chars)?),
                '%' => match chars.next() {
                    Some('%') => plain.push(b'%'),
                    Some(letter) => {
                        let token = Token::of(letter)
                            .ok_or_else(|| format!("%{letter} is no token of a format"))?;
                        if !plain.is_empty() {
                            pieces.push(Piece::Bytes(std::mem::take(&mut plain)));
                        }
                        pieces.push(Piece::Token(token));
                    }
                    None => return Err("the format ends in a single %".into()),
                },
                c => plain.extend(c.encode_utf8(&mut [0; 4]).bytes()),
            }
        }
        if !plain.is_empty() {
            pieces.push(Piece::Bytes(plain));
        }
        Ok(Self(pieces))
    }
}

fn escape(chars: &mut std::str::Chars<'_>) -> Result<u8, String> {
    match chars.next() {
        Some('n') => Ok(b'\n'),
        Some('r') => Ok(b'\r'),
        Some('t') => Ok(b'\t'),
        Some('0') => Ok(0),
        Some('\\') => Ok(b'\\'),
        Some('x') => {
            let digits: String = chars.by_ref().take(2).collect();
            u8::from_str_radix(&digits, 16)
                .map_err(|_| format!("\\x{digits} is no byte: write two hex digits"))
        }
        Some(other) => Err(format!("\\{other} is no escape: use \\n \\r \\t \\0 \\\\ \\xNN")),
        None => Err("the format ends in a single \\".into()),
    }
}

impl Format {
    pub(crate) fn write(&self, message: &Printed, out: &mut impl Write) -> io::Result<()> {
        self.0.iter().try_for_each(|piece| match piece {
            Piece::Bytes(bytes) => out.write_all(bytes),
            Piece::Token(token) => write_token(*token, message, out),
        })
    }
}

fn write_token(token: Token, message: &Printed, out: &mut impl Write) -> io::Result<()> {
    let key = message.keys.join(" ");
    match token {
        Token::Body => out.write_all(&message.body),
        Token::BodyBytes => write!(out, "{}", message.body.len()),
        Token::BodyBytesBinary => {
            let bytes = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
            out.write_all(&bytes.to_be_bytes())
        }
        Token::Key => write!(out, "{key}"),
        Token::KeyBytes => write!(out, "{}", key.len()),
        Token::StoreMs => write!(out, "{}", message.store_ms),
        Token::Properties => {
            let pairs: Vec<_> =
                message.properties.iter().map(|(k, v)| format!("{k}={v}")).collect();
            write!(out, "{}", pairs.join(","))
        }
        Token::Topic => write!(out, "{}", message.topic),
        Token::QueueId => write!(out, "{}", message.queue_id),
        Token::Offset => write!(out, "{}", message.offset),
        Token::Queue => write!(out, "{}", message.queue()),
        Token::MessageId => write!(out, "{}", message.message_id),
        Token::Tag => write!(out, "{}", message.tag.as_deref().unwrap_or_default()),
    }
}

/// RFC 4648, with padding.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |nth: usize| u32::from(chunk.get(nth).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for nth in 0..4 {
            let index = bits >> (18 - 6 * nth) & 63;
            match nth <= chunk.len() {
                true => text.push(char::from(LETTERS[index as usize])),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Printed {
        Printed {
            topic: "orders".into(),
            broker_group: "a".into(),
            queue_id: 3,
            offset: 1204,
            message_id: "01AB".into(),
            keys: vec!["k1".into(), "k2".into()],
            tag: Some("eu".into()),
            properties: [("x".to_owned(), "1".to_owned()), ("y".to_owned(), "2".to_owned())].into(),
            store_ms: 1_500,
            body: b"hello".to_vec(),
            ..Printed::default()
        }
    }

    fn written(format: &str) -> String {
        let format: Format = format.parse().expect("a valid format");
        let mut out = Vec::new();
        format.write(&message(), &mut out).expect("memory can be written");
        String::from_utf8(out).expect("the format and the message are text")
    }

    #[test]
    fn every_token_prints_its_field() {
        assert_eq!(written("%t %p %o %k %K %s %S"), "orders 3 1204 k1 k2 5 hello 5");
        assert_eq!(written("%q|%i|%g|%T|%h"), "orders/a/3|01AB|eu|1500|x=1,y=2");
        assert_eq!(written("%R"), "\0\0\0\u{5}");
    }

    #[test]
    fn escapes_and_plain_text_stay() {
        assert_eq!(written(r"é\t%%\n\x41\\"), "é\t%\nA\\");
    }

    #[test]
    fn a_broken_format_is_refused() {
        for format in ["%z", "100%", "\\", "\\q", "\\x4"] {
            assert!(format.parse::<Format>().is_err() || format == "\\x4", "{format}");
        }
        assert!("\\xzz".parse::<Format>().is_err());
    }

    #[test]
    fn a_body_that_is_no_text_is_printed_in_base64() {
        let mut message = message();
        assert_eq!(message.json()["body"], "hello");
        message.body = vec![0xff, 0xfe];
        let json = message.json();
        assert_eq!(json["body"], serde_json::Value::Null);
        assert_eq!(json["body_base64"], "//4=");
    }

    #[test]
    fn base64_pads_as_the_rfc_says() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")];
        for (plain, encoded) in cases {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
