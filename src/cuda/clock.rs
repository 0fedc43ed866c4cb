//! The device's own clock.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, sys};

use super::driver::cannot;
use crate::error::Result;

/// Moments on a stream.
pub(super) struct Clock {
    stream: Arc<CudaStream>,
    events: Vec<CudaEvent>,
}

impl Clock {
    pub(super) fn new(stream: &Arc<CudaStream>, moments: usize) -> Result<Self> {
        let context = stream.context();
        let event = |_| context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let events = (0..moments).map(event).collect::<Result<_, _>>();
        Ok(Self { stream: stream.clone(), events: events.map_err(cannot("create an event"))? })
    }

    pub(super) fn stamp(&self, moment: usize) -> Result<()> {
        self.events[moment].record(&self.stream).map_err(cannot("record an event"))
    }

    /// Microseconds. Waits for the later moment.
    pub(super) fn between(&self, start: usize, end: usize) -> Result<f64> {
        let ms =
            self.events[start].elapsed_ms(&self.events[end]).map_err(cannot("read a clock"))?;
        Ok(1e3 * f64::from(ms))
    }
}
