//! A file system of its own in a file, that can lose power.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// How long a dead file system may still be held by what is ending.
const REMOUNT_LIMIT: Duration = Duration::from_secs(10);

/// An ext4 file system in an image, mounted below a temporary folder; unmounted when dropped.
#[derive(Debug)]
pub struct LoopDisk {
    image: PathBuf,
    mount_point: PathBuf,
    mounted: bool,
}

/// Asks file systems to shut down without writing anything more, not even their journals: what was
/// not synced is gone, as after a loss of power. `_IOR('X', 125, u32)` with flag 2 (no log flush).
const SHUTDOWN: &str = "import fcntl, os, struct, sys
for fd in [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]:
    fcntl.ioctl(fd, 0x8004587D, struct.pack('I', 2))";

impl LoopDisk {
    /// Why loop devices cannot be used here, if so.
    pub fn unavailable(dir: &Path) -> Option<String> {
        match Self::create(&dir.join("probe"), 16) {
            Ok(_) => None,
            Err(error) => Some(format!("{error:#}")),
        }
    }

    pub fn create(dir: &Path, mebibytes: u64) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let (image, mount_point) = (dir.join("image"), dir.join("disk"));
        std::fs::File::create(&image)?.set_len(mebibytes << 20)?;
        std::fs::create_dir_all(&mount_point)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        let mut disk = Self { image, mount_point, mounted: false };
        disk.mount()?;
        Ok(disk)
    }

    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// Shuts the file system mounted at `mount_point` down: from now on every write and sync fails,
    /// and what was not synced before is lost.
    pub fn cut_power(mount_point: &Path) -> Result<()> {
        Self::cut_power_of_all(&[mount_point])
    }

    /// The same for several file systems, within a fraction of a sync.
    pub fn cut_power_of_all(mount_points: &[&Path]) -> Result<()> {
        run(Command::new("python3").args(["-c", SHUTDOWN]).args(mount_points))?;
        Ok(())
    }

    /// Writes and syncs wait from now on, until what this returns is dropped.
    pub fn freeze(&self) -> Result<Frozen> {
        run(Command::new("fsfreeze").arg("-f").arg(&self.mount_point))?;
        Ok(Frozen { mount_point: self.mount_point.clone() })
    }

    /// Mounts what is left after [`LoopDisk::cut_power`]. Nothing may run on it any more; but the
    /// mount namespace of what did may go a moment later than its process, and until then the same
    /// dead file system would be mounted again.
    pub fn remount(&mut self) -> Result<()> {
        let deadline = Instant::now() + REMOUNT_LIMIT;
        loop {
            self.unmount()?;
            self.mount()?;
            let probe = self.mount_point.join("probe");
            match std::fs::File::create(&probe).and_then(|_| std::fs::remove_file(&probe)) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn mount(&mut self) -> Result<()> {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.mount_point))?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        run(Command::new("umount").arg(&self.mount_point))?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = self.unmount()
        {
            eprintln!("{} stays mounted: {error:#}", self.mount_point.display());
        }
    }
}

/// Thaws what it froze, whatever happens: a process that waits for a frozen disk cannot be killed.
#[derive(Debug)]
pub struct Frozen {
    mount_point: PathBuf,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("fsfreeze").arg("-u").arg(&self.mount_point)) {
            eprintln!("{} stays frozen: {error:#}", self.mount_point.display());
        }
    }
}

fn run(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("{command:?} does not start"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", said.trim());
    Ok(output)
}
