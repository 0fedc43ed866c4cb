//! `moefy bench ffn`

use std::path::PathBuf;
use std::time::Instant;

use moefy::cuda::LayerShape;
use moefy::cuda::bench::{FfnBench, FfnRow, Limits, RunSpec};
use moefy::cuda::{Device, Fallback, Path};
use moefy::{DType, Error, Result};

use super::sets::Set;
use super::traces::Source;
use super::{Case, fallback, machine, plot, shapes, table};
use crate::{Common, chart, dtype, output};

#[derive(clap::Args)]
pub struct Ffn {
    #[command(flatten)]
    layers: shapes::Layers,
    /// f32, f16, bf16
    #[arg(long, value_name = "TYPE", value_delimiter = ',', value_parser = dtype, default_value = "bf16")]
    dtype: Vec<DType>,
    /// Numbers of tokens
    #[arg(long, value_name = "T", value_delimiter = ',', value_parser = shapes::tokens)]
    #[arg(default_value = "1,8,32,128,512,2048,8192")]
    tokens: Vec<usize>,
    /// Shares of the routed neurons that a token runs, of random routing
    #[arg(long, value_name = "SHARE", value_delimiter = ',', value_parser = shapes::share)]
    #[arg(default_value = "0.1,0.2,0.4")]
    density: Vec<f64>,
    /// random, top-k (random, selected by that rule), trace:NAME of a trace that comes with moefy, or
    /// FILE.npy: u8 [tokens, experts/8], first expert in the highest bit
    #[arg(long, value_name = "WHAT", value_delimiter = ',', value_parser = Source::parse)]
    #[arg(default_value = "random")]
    routing: Vec<Source>,
    /// auto, or paths by name
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = Choice::parse)]
    #[arg(default_value = "auto")]
    path: Vec<Choice>,
    /// What auto may fall back to: exact (the original layer), masked (the sparse layer's function)
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = fallback)]
    #[arg(default_value = "exact")]
    fallback: Vec<Fallback>,
    /// The density that the plan is told [default: the one that it gets]
    #[arg(long, value_name = "SHARE", value_parser = shapes::share)]
    calibrated_density: Option<f64>,
    /// Rows that belong into a record, instead of those of the options above
    #[arg(long, value_enum, value_delimiter = ',')]
    #[arg(required_unless_present_any = ["named", "d_model"], conflicts_with_all = ["named", "d_model"])]
    set: Vec<Set>,
    /// Plot the speed-up: over density where there are several, else over tokens
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What `--path` names: `None` is auto.
#[derive(Clone, Copy)]
struct Choice(Option<Path>);

impl Choice {
    fn parse(name: &str) -> Result<Self, String> {
        let path = Path::ALL.into_iter().find(|path| path.name() == name);
        if path.is_some() || name == "auto" {
            return Ok(Self(path));
        }
        Err(format!("expected auto, {}", Path::ALL.map(Path::name).join(", ")))
    }
}

impl Ffn {
    pub fn run(self, common: &Common) -> Result<()> {
        // What is wrong with the arguments is said before a GPU is looked for.
        let cases = self.cases()?;
        self.svg.as_deref().map_or(Ok(()), chart::check)?;
        let device = std::sync::Arc::new(Device::open(0)?);
        let mut rows = Vec::new();
        let measured = measure(&device, &cases, common, |row| {
            if common.json {
                output::line(&serde_json::to_string(&row).expect("numbers and strings"));
            }
            rows.push(row);
        });
        if !common.json && !rows.is_empty() {
            output::line(&table::table(&rows));
        }
        measured?;
        match &self.svg {
            Some(file) => chart::write(
                file,
                &plot::svg(&rows.iter().map(plot::Row::from).collect::<Vec<_>>()),
            ),
            None => Ok(()),
        }
    }

    fn cases(&self) -> Result<Vec<Case>> {
        let mut cases = Vec::new();
        for set in &self.set {
            cases.extend(set.cases()?);
        }
        for layer in self.layers.shapes(&self.dtype)? {
            for source in &self.routing {
                let routings = source.routings(layer.num_experts, &self.density)?;
                for (&tokens, routing) in
                    self.tokens.iter().flat_map(|tokens| routings.iter().map(move |r| (tokens, r)))
                {
                    for (path, fallback) in self.choices() {
                        let calibrated_density = self.calibrated_density;
                        let routing = routing.clone();
                        let run = RunSpec { tokens, routing, path, fallback, calibrated_density };
                        cases.push(Case { layer, run, may_be_refused: false });
                    }
                }
            }
        }
        in_groups(&mut cases);
        Ok(cases)
    }

    /// A path by name does not fall back.
    fn choices(&self) -> Vec<(Option<Path>, Fallback)> {
        let of_path = |&Choice(path)| {
            let fallbacks = if path.is_some() { &self.fallback[..1] } else { &self.fallback[..] };
            fallbacks.iter().map(move |&fallback| (path, fallback)).collect::<Vec<_>>()
        };
        self.path.iter().flat_map(of_path).collect()
    }
}

/// Rows of one layer together, and among them those with the same number of tokens: they share weights
/// and what was timed.
fn in_groups(cases: &mut [Case]) {
    let mut layers: Vec<LayerShape> = Vec::new();
    for case in cases.iter() {
        if !layers.contains(&case.layer) {
            layers.push(case.layer);
        }
    }
    let group = |case: &Case| {
        let layer = layers.iter().position(|layer| *layer == case.layer);
        (layer, case.run.tokens)
    };
    cases.sort_by_key(group);
}

fn measure(
    device: &std::sync::Arc<Device>,
    cases: &[Case],
    common: &Common,
    mut found: impl FnMut(FfnRow),
) -> Result<()> {
    let begin = Instant::now();
    let note = |text: String| {
        if !common.quiet {
            eprintln!("{:6.1} s  {text}", begin.elapsed().as_secs_f64());
        }
    };
    let mut limits: Vec<(DType, Limits)> = Vec::new();
    let mut bench: Option<FfnBench> = None;
    let mut last_tokens = 0;
    for (index, Case { layer, run, may_be_refused }) in cases.iter().enumerate() {
        if limits.iter().all(|(dtype, _)| *dtype != layer.dtype) {
            let measured = Limits::measure(device, layer.dtype)?;
            let header = machine::describe(device, layer.dtype, &measured);
            if common.json {
                note(header)
            } else {
                output::line(&header)
            }
            limits.push((layer.dtype, measured));
        }
        if bench.as_ref().is_none_or(|bench| bench.layer() != layer) {
            // Its memory first.
            drop(bench.take());
            let (_, limits) =
                limits.iter().find(|(dtype, _)| *dtype == layer.dtype).expect("measured");
            bench = Some(FfnBench::new(device, *layer, *limits)?);
            last_tokens = 0;
        }
        if run.tokens != last_tokens {
            last_tokens = run.tokens;
            let LayerShape { d_model, d_ff, glu, num_experts, dtype, .. } = *layer;
            let name = shapes::label(d_model, d_ff, glu, num_experts);
            note(format!("row {} of {}: {name} {dtype}, T {}", index + 1, cases.len(), run.tokens));
        }
        match bench.as_mut().expect("just made").run(run) {
            Ok(row) => found(row),
            Err(refused @ Error::Argument { .. }) if *may_be_refused => {
                note(format!("left out: {refused}"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
