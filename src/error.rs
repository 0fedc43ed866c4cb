//! One error type for the whole crate: every variant reads as one sentence that says what went
//! wrong, where, what was expected, what was found, and what to do when that is not obvious.

use std::path::{Path, PathBuf};

/// Result of every fallible function of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Nothing in the crate panics on bad input.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument of a function or an option of a command has a value that cannot work.
    #[error("{op}: {argument} must be {expected}, got {got}")]
    Argument {
        /// The operation that refused.
        op: &'static str,
        /// The argument's name.
        argument: String,
        /// What it accepts.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A tensor in a file is missing, or is not what the model's config promises.
    #[error("{}: tensor `{tensor}`: expected {expected}, got {got}", shown(file))]
    Tensor {
        /// The file that holds, or should hold, the tensor.
        file: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What should be there.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A file or folder is not what it should be. `problem` is the rest of the sentence.
    #[error("{}: {problem}", shown(file))]
    File {
        /// The file or folder.
        file: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// The operating system refused.
    #[error("cannot {doing} {}: {source}", shown(file))]
    Io {
        /// Verb phrase: "read", "create", …
        doing: &'static str,
        /// The file or folder.
        file: PathBuf,
        /// The system's own word.
        source: std::io::Error,
    },
    /// There is no GPU that the crate can use: no driver, no device, one too old, or no kernels.
    #[error("no GPU can be used: {problem}")]
    NoGpu {
        /// Why, and what to do.
        problem: String,
    },
    /// The CUDA driver refused.
    #[error("cannot {doing}: the CUDA driver says {name} (error {code})")]
    Cuda {
        /// Verb phrase: "launch moefy_select", …
        doing: String,
        /// The driver's number for it.
        code: i32,
        /// The driver's name for it.
        name: String,
    },
    /// The user interrupted; nothing was left behind.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

impl Error {
    /// An [`Error::Argument`].
    pub fn argument(
        op: &'static str,
        argument: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Argument {
            op,
            argument: one_line(argument.into()),
            expected: one_line(expected.into()),
            got: one_line(got.to_string()),
        }
    }

    /// An [`Error::Tensor`].
    pub fn tensor(
        file: &Path,
        tensor: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Tensor {
            file: file.into(),
            tensor: one_line(tensor.into()),
            expected: one_line(expected.into()),
            got: one_line(got.to_string()),
        }
    }

    /// An [`Error::File`].
    pub fn file(file: &Path, problem: impl Into<String>) -> Self {
        Self::File { file: file.into(), problem: one_line(problem.into()) }
    }

    /// For `map_err`: an [`Error::Io`] about `file`.
    pub fn io(doing: &'static str, file: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let file = file.to_path_buf();
        move |source| Self::Io { doing, file, source }
    }
}

/// The sentence, for a `main` or an `unwrap` that shows an error so.
impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

fn shown(path: &Path) -> String {
    one_line(path.display().to_string())
}

/// Names and values that come from files may hold line breaks and other control characters; an
/// error is one line all the same.
fn one_line(text: String) -> String {
    if !text.contains(char::is_control) {
        return text;
    }
    let shown =
        |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line() {
        let error = Error::file(Path::new("config.json"), "unknown variant `mea\n`");
        assert_eq!(error.to_string(), "config.json: unknown variant `mea\\n`");
        let error = Error::io("read", Path::new("a\nb"))(std::io::ErrorKind::NotFound.into());
        assert!(error.to_string().starts_with("cannot read a\\nb: "), "{error}");
        assert_eq!(format!("{error:?}"), error.to_string());
    }
}
