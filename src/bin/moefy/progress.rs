//! Progress bars and Ctrl-C.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use moefy::convert::Progress;

/// One bar on standard error, shown once a step has taken a second.
pub struct Bar {
    quiet: bool,
    state: Mutex<Option<Step>>,
}

struct Step {
    what: String,
    bar: ProgressBar,
}

impl Bar {
    pub fn new(quiet: bool) -> Self {
        Self { quiet, state: Mutex::new(None) }
    }
}

impl Progress for Bar {
    /// Another `what` starts the next bar.
    fn step(&self, what: &str, done: usize, total: usize) {
        if self.quiet {
            return;
        }
        let mut state = self.state.lock().expect("no step panics");
        if state.as_ref().is_none_or(|step| step.what != what) {
            if let Some(last) = state.take() {
                last.bar.finish_and_clear();
            }
            *state = Some(Step { what: what.to_string(), bar: new_bar(what) });
        }
        if let Some(Step { bar, .. }) = &*state {
            if bar.is_hidden() && bar.elapsed() >= Duration::from_secs(1) {
                bar.set_draw_target(ProgressDrawTarget::stderr());
            }
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Ok(Some(step)) = self.state.get_mut().map(Option::take) {
            step.bar.finish_and_clear();
        }
    }
}

fn new_bar(what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    let style = ProgressStyle::with_template("{msg:32} {wide_bar} {percent:>3}% {eta:>5}");
    bar.set_style(style.expect("a constant template"));
    bar.set_message(what.to_string());
    bar
}

/// A flag that Ctrl-C (and SIGTERM) raises. Writers poll it and clean up; a second signal ends the
/// process at once.
pub fn interrupted() -> &'static AtomicBool {
    static FLAG: AtomicBool = AtomicBool::new(false);
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // Without a handler the signal ends the process, which is the system's default anyway.
        let _ = ctrlc::set_handler(|| {
            if FLAG.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
    });
    &FLAG
}
