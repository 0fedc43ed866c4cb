//! A folder that appears complete or not at all.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};
use tempfile::TempDir;

use crate::error::{Error, Result};

/// Where a model goes.
///
/// It is written to a hidden temporary folder beside `path`, flushed to the disk, and renamed. On
/// any error the temporary folder is removed and what was at `path` is untouched.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// The folder to make. It may exist if it is empty; the folder it is in must exist.
    pub path: &'a Path,
    /// Whether to replace the model that `path` holds, once the new one is complete. It may be the
    /// source itself.
    pub overwrite: bool,
    /// Polled at least once per 4 MiB: raise it to stop with [`Error::Interrupted`].
    pub interrupted: &'a AtomicBool,
}

impl Output<'_> {
    /// Checks the place, and that what goes there from `source` can be read, before any work is done;
    /// writing checks it again.
    ///
    /// # Errors
    /// When `path` is a file, holds something that may not be replaced, overlaps with `source`, or is where
    /// nothing can be written.
    pub fn check(&self, source: &Path) -> Result<()> {
        Staging::new(source, *self)?;
        for_each_carried(source, Path::new(""), &mut |carried| match carried {
            Carried::Folder(_) => Ok(()),
            Carried::File(name) => {
                let path = source.join(name);
                File::open(&path).map_err(Error::io("read", &path)).map(drop)
            }
        })
    }

    /// The place without links, and whether there is a model to replace.
    fn target(&self, source: &Path) -> Result<(PathBuf, bool)> {
        let (target, replaces) = match fs::canonicalize(self.path) {
            Ok(target) => (target.clone(), self.replaces(&target)?),
            Err(_) if fs::symlink_metadata(self.path).is_ok() => {
                let problem = "is a link that leads nowhere: remove it, or choose another place";
                return Err(Error::file(self.path, problem));
            }
            Err(_) => {
                let (parent, name) = (self.path.parent(), self.path.file_name());
                let name = name.ok_or_else(|| Error::file(self.path, "not a name for a folder"))?;
                let parent = match parent {
                    Some(parent) if !parent.as_os_str().is_empty() => parent,
                    _ => Path::new("."),
                };
                let parent = fs::canonicalize(parent).map_err(Error::io("find", parent))?;
                (parent.join(name), false)
            }
        };
        if std::env::current_dir().is_ok_and(|here| here.starts_with(&target)) {
            let problem =
                "holds the current folder and cannot be replaced from there: change to another one";
            return Err(Error::file(self.path, problem));
        }
        if is_mounted(&target) {
            let problem = "is where a file system is mounted, which cannot be replaced: choose a folder in it";
            return Err(Error::file(self.path, problem));
        }
        let source = fs::canonicalize(source).map_err(Error::io("find", source))?;
        if target != source && (target.starts_with(&source) || source.starts_with(&target)) {
            let problem = format!("choose a place apart from the model {}", source.display());
            return Err(Error::file(self.path, problem));
        }
        Ok((target, replaces))
    }

    fn replaces(&self, target: &Path) -> Result<bool> {
        if !target.is_dir() {
            let problem = "exists and is not a folder: choose another place";
            return Err(Error::file(self.path, problem));
        }
        let mut entries = fs::read_dir(target).map_err(Error::io("read", self.path))?;
        let model = target.join("config.json").is_file();
        let problem = match (entries.next().is_none(), self.overwrite) {
            (true, _) => return Ok(false),
            (false, true) if model => return Ok(true),
            (false, true) => "is not overwritten, because it holds no config.json: not a model",
            (false, false) => {
                "exists already: choose another place, or allow overwriting (--overwrite)"
            }
        };
        Err(Error::file(self.path, problem))
    }
}

/// The temporary folder of an [`Output`].
pub(super) struct Staging<'a> {
    folder: TempDir,
    /// Where it goes: absolute, without links.
    target: PathBuf,
    replaces: bool,
    output: Output<'a>,
}

impl<'a> Staging<'a> {
    /// Begins the folder that will hold what becomes of the model in `source`.
    pub fn new(source: &Path, output: Output<'a>) -> Result<Self> {
        let (target, replaces) = output.target(source)?;
        let folder = sibling(&target).map_err(Error::io("create", output.path))?;
        Ok(Self { folder, target, replaces, output })
    }

    /// Begins a file of the folder.
    pub fn create(&self, name: impl AsRef<Path>) -> Result<Writer<'a>> {
        let shown = self.output.path.join(&name);
        let created = File::create(self.folder.path().join(&name));
        let file = created.map_err(Error::io("create", &shown))?;
        Ok(Writer { file, shown, interrupted: self.output.interrupted })
    }

    /// Copies a file of the source to the same place in the folder.
    pub fn copy(&self, source: &Path, name: &Path) -> Result<()> {
        let path = source.join(name);
        let mut file = File::open(&path).map_err(Error::io("read", &path))?;
        let mut writer = self.create(name)?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer).map_err(Error::io("read", &path))? {
                0 => return writer.finish(),
                len => writer.write(&buffer[..len])?,
            }
        }
    }

    /// Copies everything that is neither `config.json` nor weights nor hidden nor temporary:
    /// tokenizer, licence, model card, folders such as `1_Pooling`. Links to files become files;
    /// links to folders are left out, because they can be circular.
    pub fn carry_over(&self, source: &Path) -> Result<()> {
        for_each_carried(source, Path::new(""), &mut |carried| match carried {
            Carried::Folder(name) => fs::create_dir(self.folder.path().join(name))
                .map_err(Error::io("create", &self.output.path.join(name))),
            Carried::File(name) => self.copy(source, name),
        })
    }

    /// Puts the complete folder in its place.
    pub fn commit(self) -> Result<()> {
        poll(self.output.interrupted)?;
        let Self { folder, target, replaces, output } = self;
        let failed = || Error::io("create", output.path);
        sync_folder(folder.path()).map_err(failed())?;
        if replaces {
            let old = sibling(&target).map_err(failed())?;
            fs::rename(&target, old.path()).map_err(failed())?;
            if let Err(error) = fs::rename(folder.path(), &target) {
                let restored = fs::rename(old.path(), &target);
                if restored.is_err() {
                    let kept = old.keep();
                    let problem = format!("{error}; the old model is at {}", kept.display());
                    return Err(Error::file(output.path, problem));
                }
                return Err(failed()(error));
            }
            let _ = folder.keep();
            old.close().map_err(Error::io("remove the old", output.path))?;
        } else {
            fs::rename(folder.path(), &target).map_err(failed())?;
            let _ = folder.keep();
        }
        let parent = target.parent().unwrap_or(&target);
        sync_folder(parent).map_err(failed())
    }
}

/// What a model brings along, by its path below the folder.
enum Carried<'a> {
    /// Before what is in it.
    Folder(&'a Path),
    File(&'a Path),
}

fn for_each_carried(
    source: &Path,
    below: &Path,
    visit: &mut impl FnMut(Carried<'_>) -> Result<()>,
) -> Result<()> {
    let top = below.as_os_str().is_empty();
    let folder = source.join(below);
    for entry in fs::read_dir(&folder).map_err(Error::io("read", &folder))? {
        let entry = entry.map_err(Error::io("read", &folder))?;
        let (path, name) = (entry.path(), below.join(entry.file_name()));
        if is_clutter(&entry.file_name()) || (top && is_model_file(&path)) {
            continue;
        }
        if entry.file_type().map_err(Error::io("read", &path))?.is_dir() {
            if top && OTHER_EXPORTS.iter().any(|export| *export == entry.file_name()) {
                continue;
            }
            visit(Carried::Folder(&name))?;
            for_each_carried(source, &name, visit)?;
        } else if path.metadata().map_err(Error::io("read", &path))?.is_file() {
            visit(Carried::File(&name))?;
        }
    }
    Ok(())
}

/// One file under way.
pub(super) struct Writer<'a> {
    file: File,
    /// Its path once the folder is in place, for errors.
    shown: PathBuf,
    interrupted: &'a AtomicBool,
}

impl Writer<'_> {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(4 << 20) {
            poll(self.interrupted)?;
            self.file.write_all(chunk).map_err(Error::io("write", &self.shown))?;
        }
        Ok(())
    }

    /// Writes a whole file, laid out as `transformers` does.
    pub fn write_json(mut self, value: &Map<String, Value>) -> Result<()> {
        let text = serde_json::to_string_pretty(value).expect("a JSON object");
        self.write(text.as_bytes())?;
        self.write(b"\n")?;
        self.finish()
    }

    /// Waits until the disk has the file.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("write", &self.shown))
    }
}

fn poll(interrupted: &AtomicBool) -> Result<()> {
    match interrupted.load(Ordering::Relaxed) {
        true => Err(Error::Interrupted),
        false => Ok(()),
    }
}

/// An empty hidden folder beside `target`, with the permissions of an ordinary new folder.
fn sibling(target: &Path) -> std::io::Result<TempDir> {
    let mut prefix = OsStr::new(".").to_os_string();
    prefix.push(target.file_name().unwrap_or_default());
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(target.parent().unwrap_or(target))
}

/// Whether another file system than its parent's is there.
fn is_mounted(folder: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.dev());
        let parent = folder.parent().and_then(device);
        device(folder).zip(parent).is_some_and(|(own, parent)| own != parent)
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        false
    }
}

/// Makes the names in a folder durable, where the system can.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Folders that hold the same model for other programs.
const OTHER_EXPORTS: [&str; 4] = ["coreml", "onnx", "openvino", "original"];

/// Endings of weight files; `bin` is PyTorch's and OpenVINO's, `ot` rust-bert's.
const WEIGHTS: [&str; 12] = [
    "bin",
    "ckpt",
    "gguf",
    "h5",
    "msgpack",
    "onnx",
    "ot",
    "pb",
    "pt",
    "pth",
    "safetensors",
    "tflite",
];

/// Whether a file at the top of a folder is written anew or is another form of the weights.
fn is_model_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default();
    name == "config.json"
        || name.ends_with(".index.json")
        || WEIGHTS.iter().any(|weights| *weights == extension)
}

fn is_clutter(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with('.')
        || name == "__pycache__"
        || [".tmp", ".part", ".lock", "~"].iter().any(|ending| name.ends_with(ending))
}
