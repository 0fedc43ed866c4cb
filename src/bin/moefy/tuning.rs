//! Where measurements of this device's paths are kept between commands.

use std::ffi::OsString;
use std::path::PathBuf;

use moefy::cuda::{Device, Tuning};

use crate::Common;

/// The file of a device, in the folder that the system has for such files; none where it has no such folder.
pub fn default_file(device: &str) -> Option<PathBuf> {
    Some(cache_folder(|name| std::env::var_os(name))?.join("moefy").join(file_name(device)))
}

fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    // One that is not absolute does not count.
    let folder = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let system = if cfg!(windows) { "LOCALAPPDATA" } else { "XDG_CACHE_HOME" };
    folder(system).or_else(|| Some(folder("HOME")?.join(".cache")))
}

fn file_name(device: &str) -> String {
    let name = device.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    format!("tuning-{name}.json")
}

/// Lets plans choose by what `moefy tune` measured on the device, if it did. What is wrong with the file is said
/// and hinders nothing.
pub fn apply(device: &mut Device, common: &Common) {
    let file = default_file(&device.properties().name);
    let Some(file) = file.filter(|file| file.exists()) else { return };
    match Tuning::load(&file).and_then(|tuning| device.set_tuning(tuning)) {
        Ok(()) if common.quiet => {}
        Ok(()) => eprintln!("paths are chosen by {}", file.display()),
        Err(error) => eprintln!("{} is not used: {error}", file.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn the_folder_is_that_of_the_system() {
        let of = |cache: Option<&'static str>, home: Option<&'static str>| {
            let variable = move |name: &str| match name {
                "XDG_CACHE_HOME" => cache.map(OsString::from),
                "HOME" => home.map(OsString::from),
                _ => None,
            };
            cache_folder(variable)
        };
        assert_eq!(of(Some("/c"), Some("/h")), Some("/c".into()));
        assert_eq!(of(Some("c"), Some("/h")), Some("/h/.cache".into()));
        assert_eq!(of(Some(""), Some("/h")), Some("/h/.cache".into()));
        assert_eq!(of(None, None), None);
    }

    #[test]
    fn a_device_has_a_file() {
        let file = file_name("NVIDIA H100 80GB HBM3");
        assert_eq!(file, "tuning-NVIDIA-H100-80GB-HBM3.json");
    }
}
