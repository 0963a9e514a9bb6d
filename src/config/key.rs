//! One key, one section: the rows of the tables.

/// One configuration key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    pub(crate) section: &'static str,
    pub(crate) name: &'static str,
    /// What it holds, for people: "size", "duration", ...
    pub(crate) kind: &'static str,
    /// Unit of a bare number.
    pub(crate) unit: Option<&'static str>,
    /// As in a file, without quotes; empty: unset.
    pub(crate) default: &'static str,
    pub(crate) min: Option<&'static str>,
    pub(crate) max: Option<&'static str>,
    pub(crate) doc: &'static [&'static str],
}

impl Key {
    /// `section.key`
    pub(crate) fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// Name in the environment.
    pub(crate) fn variable(&self) -> String {
        format!("{PREFIX}{}_{}", self.section.replace('.', "_"), self.name).to_ascii_uppercase()
    }
}

/// Every environment variable that begins so is ours.
pub(crate) const PREFIX: &str = "DRUMLIN_";

/// One section with its keys.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) section: &'static str,
    pub(crate) about: &'static [&'static str],
    pub(crate) keys: &'static [Key],
}

/// Declares a section: its struct, its table and how it is read.
///
/// `key: Type = "default", unit "ms", min "1", max "10";` with the doc lines that become comments.
macro_rules! section {
    (
        $(#[doc = $about:literal])*
        $name:ident($section:literal) {
            $(
                $(#[doc = $doc:literal])*
                $key:ident: $type:ty = $default:literal
                    $(, unit $unit:literal)? $(, min $min:literal)? $(, max $max:literal)?;
            )*
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug)]
        pub(crate) struct $name {
            $($(#[doc = $doc])* pub(crate) $key: $type,)*
        }

        impl $name {
            pub(crate) const TABLE: $crate::config::key::Table = $crate::config::key::Table {
                section: $section,
                about: &[$($about),*],
                keys: &[$($crate::config::key::Key {
                    section: $section,
                    name: stringify!($key),
                    kind: <$type as $crate::config::value::Value>::KIND,
                    unit: $crate::config::key::optional!($($unit)?),
                    default: $default,
                    min: $crate::config::key::optional!($($min)?),
                    max: $crate::config::key::optional!($($max)?),
                    doc: &[$($doc),*],
                }),*],
            };

            fn read(reader: &mut $crate::config::reader::Reader) -> Self {
                let mut keys = Self::TABLE.keys.iter();
                // Fields are initialised in the order of the table.
                Self { $($key: reader.read(keys.next().expect(stringify!($key))),)* }
            }
        }
    };
}

macro_rules! optional {
    () => {
        None
    };
    ($text:literal) => {
        Some($text)
    };
}

/// Declares a role: the sections that it is configured by, in the order of its file.
macro_rules! role {
    ($(#[doc = $about:literal])* $name:ident { $($field:ident: $section:ident),* $(,)? }) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug)]
        pub(crate) struct $name {
            $(pub(crate) $field: $section,)*
        }

        impl $crate::config::reader::Keys for $name {
            const TABLES: &'static [&'static $crate::config::key::Table] =
                &[$(&$section::TABLE),*];

            fn read(reader: &mut $crate::config::reader::Reader) -> Self {
                Self { $($field: $section::read(reader),)* }
            }

            fn check(&self, reader: &mut $crate::config::reader::Reader) {
                self.check_together(reader);
            }
        }
    };
}

pub(crate) use {optional, role, section};
