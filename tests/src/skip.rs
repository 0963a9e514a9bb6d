//! Tests that cannot run here.

use std::io::{self, Write as _};

/// Says so past the capture of a test's output: what was left out must not look as if it had passed.
pub fn skipped(test: &str, reason: &str) -> io::Result<()> {
    // On a line of its own, which scripts look for.
    writeln!(io::stderr(), "\nSKIPPED {test}: {reason}")
}
