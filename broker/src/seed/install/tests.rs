use std::collections::BTreeMap;

use super::*;
use crate::disk::faulty::FaultyDisk;

const ROOT: &str = "/data";
const HINT: &str = "committed";

fn put(disk: &FaultyDisk, path: &str, content: &[u8]) {
    let file = disk.create(&Path::new(ROOT).join(path)).unwrap();
    file.write_at(content, 0).unwrap();
    file.sync().unwrap();
    disk.sync_dir(Path::new(ROOT)).unwrap();
}

fn contents(disk: &FaultyDisk) -> BTreeMap<PathBuf, Vec<u8>> {
    let read = |path: PathBuf| {
        let bytes = read_file(disk, &path).unwrap().unwrap();
        (path, bytes)
    };
    disk.files().into_iter().map(read).collect()
}

/// A used directory and a complete re-seed; two names are in both.
fn gathered() -> FaultyDisk {
    let disk = FaultyDisk::default();
    let own = [
        "identity",
        "committed",
        "log/0000000001-00000000000000000000.log",
        "log/0000000002-00000000000000000050.log",
        "log/0000000003-00000000000000000070.log.pool",
        "log/prepared.tmp",
        "log/vote",
        "log/local",
        "log/reserve",
        "index/0000000001-00000.idx",
        "checkpoint/checkpoint-00000000000000000004",
        "checkpoint/checkpoint-00000000000000000005",
    ];
    own.iter().for_each(|path| put(&disk, path, b"own"));
    let copied = [
        "reseed/source",
        "reseed/complete",
        "reseed/log/0000000002-00000000000000000050.log",
        "reseed/log/0000000008-00000000000000000090.log",
        "reseed/log/0000000009-00000000000000000120.log",
        "reseed/checkpoint/checkpoint-00000000000000000005",
    ];
    copied.iter().for_each(|path| put(&disk, path, b"copied"));
    disk
}

fn expected() -> BTreeMap<PathBuf, Vec<u8>> {
    let own = ["identity", "log/vote", "log/local", "log/reserve"];
    let copied = [
        "log/0000000002-00000000000000000050.log",
        "log/0000000008-00000000000000000090.log",
        "log/0000000009-00000000000000000120.log",
        "checkpoint/checkpoint-00000000000000000005",
    ];
    let of = |paths: &[&str], content: &[u8]| -> Vec<(PathBuf, Vec<u8>)> {
        paths.iter().map(|path| (Path::new(ROOT).join(path), content.to_vec())).collect()
    };
    of(&own, b"own").into_iter().chain(of(&copied, b"copied")).collect()
}

/// What a start does, given that the re-seed may be used.
fn start(disk: &FaultyDisk) -> io::Result<()> {
    let left = disk.list(&Path::new(ROOT).join(FOLDER))?;
    if left.iter().any(|name| name == COMPLETE_FILE || name == CLEARED_FILE) {
        put_in_place(disk, Path::new(ROOT), HINT)?;
    }
    Ok(())
}

#[test]
fn the_copied_files_take_the_place_of_the_own_ones_and_node_local_ones_stay() {
    let disk = gathered();
    start(&disk).unwrap();
    assert_eq!(contents(&disk), expected());
    start(&disk).unwrap();
    assert_eq!(contents(&disk), expected());
}

#[test]
fn a_crash_after_any_step_leaves_what_the_next_start_completes() {
    let whole = gathered();
    let before = whole.changes();
    start(&whole).unwrap();
    let steps = whole.changes() - before;
    assert!(steps > 20, "{steps} steps are too few to be all of them");
    let mut random = fastrand::Rng::with_seed(11);
    for after in 0..steps {
        let disk = gathered();
        disk.fail_after(after, io::ErrorKind::Other);
        start(&disk).unwrap_err();
        for _ in 0..10 {
            let mut disk = disk.crash(&mut random);
            // It may fail once more on the way.
            disk.fail_after(random.u64(..steps), io::ErrorKind::Other);
            if start(&disk).is_err() {
                disk = disk.crash(&mut random);
            }
            disk.fail_after(u64::from(u32::MAX), io::ErrorKind::Other);
            start(&disk).unwrap();
            assert_eq!(contents(&disk), expected(), "failed after {after}");
        }
    }
}
