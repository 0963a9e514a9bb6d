//! Filter by tag: one tag per record, compared exactly.

use std::collections::BTreeMap;

/// Longest expression, in bytes.
const EXPRESSION_BYTES_MAX: usize = 16 << 10;
/// Most tags in one expression.
const TAGS_MAX: usize = 256;

/// The tags that a consumer asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TagFilter {
    /// Every record, also those without a tag.
    All,
    /// Tags by their CRC-32, so that most records are judged by a number.
    AnyOf(BTreeMap<u32, Vec<String>>),
}

/// Why a text is not a list of tags.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTags {
    #[error("{bytes} bytes of tags are more than the {bytes_max} allowed")]
    TooLong { bytes: usize, bytes_max: usize },
    #[error("{tags} tags are more than the {tags_max} allowed")]
    TooMany { tags: usize, tags_max: usize },
    #[error("the expression names no tag")]
    Empty,
    #[error("tag {0:?} holds a vertical bar or a control character")]
    Character(String),
}

impl TagFilter {
    /// Parses `a || b`; an empty text or `*` means every record.
    pub fn parse(expression: &str) -> Result<Self, InvalidTags> {
        let bytes = expression.len();
        if bytes > EXPRESSION_BYTES_MAX {
            return Err(InvalidTags::TooLong { bytes, bytes_max: EXPRESSION_BYTES_MAX });
        }
        let expression = expression.trim();
        if expression.is_empty() || expression == "*" {
            return Ok(Self::All);
        }
        let tags: Vec<&str> =
            expression.split("||").map(str::trim).filter(|tag| !tag.is_empty()).collect();
        if tags.is_empty() {
            return Err(InvalidTags::Empty);
        }
        if tags.len() > TAGS_MAX {
            return Err(InvalidTags::TooMany { tags: tags.len(), tags_max: TAGS_MAX });
        }
        let mut wanted: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        for tag in tags {
            if tag.contains(|c: char| c == '|' || c.is_control()) {
                return Err(InvalidTags::Character(tag.to_owned()));
            }
            let same_hash = wanted.entry(crc32fast::hash(tag.as_bytes())).or_default();
            if !same_hash.iter().any(|known| known == tag) {
                same_hash.push(tag.to_owned());
            }
        }
        Ok(Self::AnyOf(wanted))
    }

    /// Whether a record with this tag is wanted; `tag_hash` is the CRC-32 of its UTF-8 tag.
    pub fn wants(&self, tag_hash: u32, tag: Option<&str>) -> bool {
        match (self, tag) {
            (Self::All, _) => true,
            (Self::AnyOf(_), None) => false,
            (Self::AnyOf(wanted), Some(tag)) => wanted
                .get(&tag_hash)
                .is_some_and(|same_hash| same_hash.iter().any(|known| known == tag)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(expression: &str, tag: Option<&str>) -> bool {
        let hash = tag.map_or(0, |tag| crc32fast::hash(tag.as_bytes()));
        TagFilter::parse(expression).unwrap().wants(hash, tag)
    }

    #[test]
    fn star_or_nothing_means_every_record() {
        for expression in ["", "*", "  ", " * "] {
            assert!(wants(expression, None), "{expression:?}");
            assert!(wants(expression, Some("a")), "{expression:?}");
        }
    }

    #[test]
    fn tags_are_trimmed_and_compared_exactly() {
        assert!(wants("a||b", Some("b")));
        assert!(wants("  a  ||  b ", Some("a")));
        assert!(wants("a||||b", Some("b")));
        assert!(!wants("a||b", Some("B")));
        assert!(!wants("a||b", Some("ab")));
        assert!(!wants("a||b", None));
        assert!(!wants("a || *", Some("c")));
    }

    #[test]
    fn tags_with_equal_hashes_are_told_apart() {
        let filter = TagFilter::parse("a").unwrap();
        assert!(!filter.wants(crc32fast::hash(b"a"), Some("other")));
    }

    #[test]
    fn malformed_expressions_are_refused() {
        assert_eq!(TagFilter::parse("||"), Err(InvalidTags::Empty));
        assert_eq!(TagFilter::parse("a|b"), Err(InvalidTags::Character("a|b".into())));
        assert_eq!(TagFilter::parse("a||b\u{7}"), Err(InvalidTags::Character("b\u{7}".into())));
        let long = "x".repeat(EXPRESSION_BYTES_MAX + 1);
        assert!(matches!(TagFilter::parse(&long), Err(InvalidTags::TooLong { .. })));
        let many = vec!["t"; TAGS_MAX + 1].join("||");
        assert!(matches!(TagFilter::parse(&many), Err(InvalidTags::TooMany { .. })));
    }
}
