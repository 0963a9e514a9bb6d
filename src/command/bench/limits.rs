//! What the disk gives at best: overwrites of prepared space, each with fdatasync.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Map, Value, json};

use super::{Latencies, duration, mb_rate, rate};
use crate::cli::Global;
use crate::failure::Failure;
use crate::output::{Column, Listing, column};

/// What is overwritten, round and round.
const PREPARED_BYTES: u64 = 64 << 20;
const BLOCK_BYTES: usize = 1 << 20;
const SIZES: [usize; 2] = [1 << 10, 1 << 20];

#[derive(Debug, Args)]
pub(crate) struct Limits {
    /// Folder on the disk to measure
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Of each size
    #[arg(long, default_value = "5s", value_parser = duration)]
    duration: Duration,
}

const COLUMNS: &[Column] = &[
    column("SIZE", "size_bytes"),
    column("WRITES/S", "writes_per_s"),
    column("MB/S", "mb_per_s"),
    column("P50-US", "p50_us"),
    column("P99-US", "p99_us"),
];

impl Limits {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let scratch = Scratch::create(&self.dir)?;
        let mut rows = Vec::new();
        for size in SIZES {
            rows.push(measure(&scratch.file, size, self.duration)?);
        }
        drop(scratch);
        let fields = Map::from_iter([
            ("dir".to_owned(), self.dir.display().to_string().into()),
            ("prepared_bytes".to_owned(), PREPARED_BYTES.into()),
        ]);
        let listing = Listing {
            schema: "drumlin/bench.limits/v1",
            rows_field: "results",
            rows,
            fields,
            columns: COLUMNS,
            name_field: "size_bytes",
        };
        Ok(listing.print(global)?)
    }
}

/// A file that goes when this does.
struct Scratch {
    path: PathBuf,
    file: File,
}

impl Scratch {
    /// Zero-filled and synced, so that what follows only overwrites.
    fn create(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!(".drumlin-bench-{}", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        let scratch = Self { path, file };
        let zeros = vec![0; BLOCK_BYTES];
        let mut at = 0;
        while at < PREPARED_BYTES {
            scratch.file.write_all_at(&zeros, at)?;
            at += BLOCK_BYTES as u64;
        }
        scratch.file.sync_all()?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            anstream::eprintln!("warning: {} is left behind: {error}", self.path.display());
        }
    }
}

fn measure(file: &File, size: usize, limit: Duration) -> io::Result<Value> {
    let block = vec![0xa5; size];
    let mut latencies = Latencies::new();
    let (mut at, mut count) = (0, 0_u64);
    let begun = Instant::now();
    while begun.elapsed() < limit {
        let write = Instant::now();
        file.write_all_at(&block, at)?;
        file.sync_data()?;
        latencies.record(write.elapsed());
        at = (at + size as u64) % PREPARED_BYTES;
        count += 1;
    }
    let took = begun.elapsed();
    Ok(json!({
        "size_bytes": size,
        "writes": count,
        "seconds": took.as_secs_f64(),
        "writes_per_s": rate(count, took),
        "mb_per_s": mb_rate(count * size as u64, took),
        "p50_us": latencies.p50(),
        "p99_us": latencies.p99(),
        "latency_us": latencies.json(),
    }))
}
