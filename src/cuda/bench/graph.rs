//! Launches that are captured once, repeated, and timed by the device's own clock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaGraph, CudaStream, sys};

use crate::cuda::RawStream;
use crate::cuda::clock::Clock;
use crate::cuda::driver::cannot;
use crate::cuda::turns::median;
use crate::error::{Error, Result};

/// Pairs between two waits for the device.
const BATCH: usize = 7;
/// Pairs at most.
const MAX_PAIRS: usize = 9 * BATCH;
/// No more pairs after so long.
const MAX_TIME: Duration = Duration::from_millis(300);
/// Standard error of the median ratio that is good enough.
const SETTLED: f64 = 0.003;

/// A captured graph of several equal parts, one after another.
pub struct TimedGraph {
    graph: CudaGraph,
    stream: Arc<CudaStream>,
    parts: usize,
}

impl TimedGraph {
    /// Captures `launch`, called for part 0, 1, … Whatever the launches use must live as long as the graph.
    ///
    /// # Errors
    /// When `launch` fails, or no part launches anything.
    pub fn capture(
        stream: &Arc<CudaStream>,
        parts: usize,
        launch: impl Fn(RawStream, usize) -> Result<()>,
    ) -> Result<Self> {
        let doing = "capture a graph";
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(cannot(doing))?;
        let launched = (0..parts).try_for_each(|part| launch(stream.as_ref().into(), part));
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(cannot(doing));
        launched?;
        let nothing = || Error::argument("bench", "graph", "at least one launch", "none");
        Ok(Self { graph: graph?.ok_or_else(nothing)?, stream: stream.clone(), parts })
    }

    fn launch(&self) -> Result<()> {
        self.graph.launch().map_err(cannot("launch a graph"))
    }

    /// The device's time for so many parts: what criterion's `iter_custom` asks for.
    ///
    /// # Errors
    /// When the device fails.
    pub fn time(&self, parts: u64) -> Result<Duration> {
        let launches = parts.div_ceil(self.parts as u64).max(1);
        let clock = Clock::new(&self.stream, 2)?;
        self.launch()?;
        clock.stamp(0)?;
        (0..launches).try_for_each(|_| self.launch())?;
        clock.stamp(1)?;
        let us = clock.between(0, 1)? / (launches * self.parts as u64) as f64;
        Ok(Duration::from_secs_f64(us * parts as f64 / 1e6))
    }

    /// Microseconds of a part in each of so many launches in a row.
    pub(super) fn times(&self, launches: usize) -> Result<Vec<f64>> {
        times_by_turns(&vec![self; launches])
    }
}

/// Microseconds of a part of each graph, launched one after another.
pub(super) fn times_by_turns(graphs: &[&TimedGraph]) -> Result<Vec<f64>> {
    let Some(first) = graphs.first() else { return Ok(Vec::new()) };
    let clock = Clock::new(&first.stream, graphs.len() + 1)?;
    // The device is busy when the clock starts, so the way to the device is not counted.
    first.launch()?;
    clock.stamp(0)?;
    for (i, graph) in graphs.iter().enumerate() {
        graph.launch()?;
        clock.stamp(i + 1)?;
    }
    let us = |(i, graph): (usize, &&TimedGraph)| Ok(clock.between(i, i + 1)? / graph.parts as f64);
    graphs.iter().enumerate().map(us).collect()
}

/// Microseconds of a part of both graphs, by turns, until the median of their ratio has settled.
pub(super) fn pairs(graphs: [&TimedGraph; 2]) -> Result<Vec<[f64; 2]>> {
    let begin = Instant::now();
    let mut times: Vec<[f64; 2]> = Vec::new();
    loop {
        let batch = times_by_turns(&graphs.repeat(BATCH))?;
        times.extend(batch.as_chunks().0);
        let ratios: Vec<f64> = times.iter().map(|[a, b]| b / a).collect();
        let settled = spread(&ratios) / (ratios.len() as f64).sqrt() <= SETTLED;
        if settled || times.len() >= MAX_PAIRS || begin.elapsed() >= MAX_TIME {
            return Ok(times);
        }
    }
}

/// Distance between the quartiles, divided by the median.
pub(super) fn spread(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |quarter: usize| sorted.get(sorted.len() * quarter / 4).copied().unwrap_or(f64::NAN);
    (at(3) - at(1)) / median(values)
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn spread_is_that_of_the_middle_half() {
        assert_eq!(spread(&[1.0; 7]), 0.0);
        let with_outlier = [2.0, 2.0, 1.9, 2.1, 2.0, 2.0, 90.0];
        assert!(spread(&with_outlier) < 0.06, "{}", spread(&with_outlier));
    }
}
