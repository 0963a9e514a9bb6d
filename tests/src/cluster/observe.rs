//! What a node says of itself on its HTTP port.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A node that takes longer is taken as silent.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// One look at a broker.
#[derive(Clone, Debug)]
pub struct Seen {
    pub leads: bool,
    pub term: u64,
    /// Last indexes.
    pub appended: u64,
    pub applied: u64,
    /// Unset where the node has no say in it.
    pub paired: Option<bool>,
    metrics: BTreeMap<String, f64>,
}

impl Seen {
    /// A series as `/metrics` names it, labels and all.
    pub fn metric(&self, series: &str) -> Option<f64> {
        self.metrics.get(series).copied()
    }
}

pub async fn look(http: &str) -> Result<Seen> {
    let (status, body) = get(http, "/metrics").await?;
    ensure!(status == 200, "status {status}");
    let metrics = parse(&body);
    // Metrics may be from a second ago: too old for who asks what can be lost now. But who leads no
    // more by then does not say that it is alone, so that they count as well.
    let (_, readiness) = get(http, "/readyz").await?;
    let alone = readiness.lines().any(|line| line.starts_with("alone:"));
    let whole = |series: &str| {
        let number = metrics.get(series).with_context(|| format!("no {series}"))?;
        // Counters of a test are far below 2^53.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Ok::<u64, anyhow::Error>(*number as u64)
    };
    Ok(Seen {
        leads: whole("drumlin_raft_leader")? == 1,
        term: whole("drumlin_raft_term")?,
        appended: whole("drumlin_commitlog_index{kind=\"appended\"}")?,
        applied: whole("drumlin_commitlog_index{kind=\"applied\"}")?,
        paired: metrics.get("drumlin_replica_paired").map(|paired| *paired > 0.5 && !alone),
        metrics,
    })
}

/// Series by name and labels, without those labels that every series of a node has.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let series = lines.filter_map(|line| line.rsplit_once(' '));
    series
        .filter_map(|(series, value)| Some((without_common(series), value.parse().ok()?)))
        .collect()
}

fn without_common(series: &str) -> String {
    let Some((name, labels)) = series.split_once('{') else { return series.to_owned() };
    let common = ["cluster=", "node_type=", "node_id=", "replica="];
    let labels = labels.trim_end_matches('}').split(',');
    let own: Vec<_> =
        labels.filter(|label| !common.iter().any(|common| label.starts_with(common))).collect();
    if own.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", own.join(",")) }
}

/// Status code and body of one GET.
pub(super) async fn get(address: &str, path: &str) -> Result<(u16, String)> {
    let asked = async {
        let mut socket = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await?;
        let status = answer.split(' ').nth(1).context("no status line")?.parse()?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        Ok((status, body.to_owned()))
    };
    tokio::time::timeout(LOOK_TIMEOUT, asked).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_found_without_the_labels_that_all_have() {
        let text = "# TYPE a gauge\na{cluster=\"c\",replica=\"r\"} 1\n\
                    b{cluster=\"c\",kind=\"k\"} 2.5\nc 3\n";
        let series = [("a", 1.0), ("b{kind=\"k\"}", 2.5), ("c", 3.0)];
        let expected = series.map(|(name, value)| (name.to_owned(), value));
        assert_eq!(parse(text), BTreeMap::from(expected));
    }
}
