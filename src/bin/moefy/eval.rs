//! `moefy eval`

use std::path::{Path, PathBuf};

use moefy::convert::{NEEDS_REFERENCE, Progress};
use moefy::cpu::Cpu;
use moefy::eval::{
    FfnCost, FlopsSaved, LayerOutcome, Outcome, Variant, cosines, evaluate, spearman,
};
use moefy::ffn::{Selection, SelectionRule};
use moefy::model::format::MoefyConfig;
use moefy::model::{Backend, Encoder, FfnRun, Folder, Tokenizer};
use moefy::{Error, Result};
use serde::Serialize;

use crate::chart::{self, Axis, Panel, Series};
use crate::progress::Bar;
use crate::text::{SentencePairs, read_lines};
use crate::{Common, Device, Place, output};

/// τ of a sweep, from hardly any expert to all of them, where all layers share one.
const SWEEP: [f32; 14] = [0.95, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.2, 0.1, 0.0];
/// Elsewhere every layer's τ raised to these.
const EXPONENTS: [f32; 14] =
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, f32::INFINITY];

#[derive(clap::Args)]
pub struct Eval {
    /// Model folders, converted or not
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// The dense original [default: the dense FFNs that each MODEL holds, unless it was refined]
    #[arg(long, value_name = "DENSE")]
    reference: Option<PathBuf>,
    /// Text to compare hidden states and speed on, one text per line
    #[arg(long, value_name = "TEXT", required_unless_present = "sts")]
    text: Option<PathBuf>,
    /// Tokens of TEXT to use at most
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    max_tokens: usize,
    /// Sentence pairs with similarity scores (CSV: sentence, sentence, score) to rank
    #[arg(long, value_name = "CSV")]
    sts: Option<PathBuf>,
    /// Also evaluate a range of thresholds: the same for all layers where they share one, else the
    /// layers' own raised to a range of exponents
    #[arg(long)]
    sweep: bool,
    /// Draw quality against density, a line for each MODEL
    #[arg(long, value_name = "FILE", requires = "sweep")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    #[serde(serialize_with = "as_text")]
    model: PathBuf,
    reference: Option<String>,
    device: Device,
    threads: usize,
    num_tokens: Option<usize>,
    #[serde(flatten)]
    point: Point,
    /// The same model with its FFNs dense, and with nothing of them but b2.
    dense: Baseline,
    zero_ffn: Baseline,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    points: Vec<Point>,
}

/// JSON's strings are UTF-8.
fn as_text<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&output::path(path))
}

/// What is there before anything runs, so that what is wrong with it is said then.
struct Inputs {
    folders: Vec<Folder>,
    reference: Option<Folder>,
    text: Option<Vec<String>>,
    pairs: Option<SentencePairs>,
}

#[derive(Clone, Serialize)]
struct Point {
    /// Of a sweep; otherwise every layer has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    rel_threshold: Option<f32>,
    /// Of a sweep of layers that have their own; JSON has no infinity, and gives null.
    #[serde(skip_serializing_if = "Option::is_none")]
    threshold_exponent: Option<f32>,
    spearman: Option<f64>,
    sts_density: Option<f64>,
    density: Option<f64>,
    hidden_error: Option<f64>,
    embedding_cosine: Option<f64>,
    flops_saved: Option<FlopsSaved>,
    tokens_per_s: Option<Speed>,
    layers: Vec<LayerOutcome>,
}

#[derive(Clone, Serialize)]
struct Speed {
    model: f64,
    ffn: f64,
    dense_model: f64,
    dense_ffn: f64,
}

#[derive(Serialize)]
struct Baseline {
    spearman: Option<f64>,
    hidden_error: Option<f64>,
    embedding_cosine: Option<f64>,
}

impl Eval {
    pub fn run(self, common: &Common) -> Result<()> {
        self.place.check()?;
        let inputs = self.inputs()?;
        match self.place.device {
            Device::Cpu => self.run_on(&Cpu, &inputs, common),
            Device::Cuda => self.run_on(&self.place.gpu(common)?, &inputs, common),
        }
    }

    fn inputs(&self) -> Result<Inputs> {
        let folders = self.models.iter().map(|model| Folder::open(model));
        let folders = folders.collect::<Result<Vec<_>>>()?;
        let is_refined = |folder: &&Folder| folder.moefy().is_some_and(MoefyConfig::is_refined);
        if self.reference.is_none()
            && let Some(folder) = folders.iter().find(is_refined)
        {
            return Err(Error::file(folder.path(), NEEDS_REFERENCE));
        }
        let inputs = Inputs {
            folders,
            reference: self.reference.as_deref().map(open_reference).transpose()?,
            text: self.text.as_deref().map(read_lines).transpose()?,
            pairs: self.sts.as_deref().map(SentencePairs::read).transpose()?,
        };
        self.svg.as_deref().map_or(Ok(()), chart::check)?;
        Ok(inputs)
    }

    fn run_on(
        &self,
        backend: &(impl Backend + Clone),
        inputs: &Inputs,
        common: &Common,
    ) -> Result<()> {
        let mut reports = Vec::new();
        for folder in &inputs.folders {
            let report = self.evaluate(backend, folder, inputs, common)?;
            if !common.json {
                report.print(self.models.len() > 1);
            }
            reports.push(report);
        }
        match &reports[..] {
            [report] if common.json => output::json(report),
            reports if common.json => output::json(&reports),
            _ => {}
        }
        match &self.svg {
            Some(file) => chart::write(file, &svg(&reports)),
            None => Ok(()),
        }
    }

    fn evaluate(
        &self,
        backend: &(impl Backend + Clone),
        folder: &Folder,
        inputs: &Inputs,
        common: &Common,
    ) -> Result<Report> {
        let load = |folder: &Folder| Encoder::load(backend.clone(), folder);
        let encoder = load(folder)?;
        let reference = inputs.reference.as_ref().map(load).transpose()?;
        let costs = (0..folder.num_layers())
            .map(|layer| Ok(FfnCost::from(&folder.ffn(layer)?)))
            .collect::<Result<Vec<_>>>()?;
        let tokenizer = Tokenizer::open(folder, None)?;

        let dense = Variant {
            encoder: reference.as_ref().unwrap_or(&encoder),
            run: FfnRun::Dense,
            costs: &costs,
        };
        let sweep = if self.sweep { sweep(folder) } else { Vec::new() };
        let runs = [FfnRun::Stored, FfnRun::Zero].into_iter().chain(sweep.iter().copied());
        let runs: Vec<FfnRun> = runs.collect();
        let variants: Vec<_> =
            runs.iter().map(|&run| Variant { encoder: &encoder, run, costs: &costs }).collect();

        let bar = Bar::new(common.quiet);
        let text = inputs.text.as_deref().map(|lines| {
            let sequences = self.sequences(lines, &tokenizer)?;
            compare("evaluate the text", &dense, &variants, &sequences, &bar)
        });
        let text = text.transpose()?;
        let sts = inputs.pairs.as_ref().map(|pairs| {
            let sentences: Vec<_> = pairs.first.iter().chain(&pairs.second).collect();
            let sequences = tokenizer.encode(&sentences)?;
            let ranked = compare("rank the sentence pairs", &dense, &variants, &sequences, &bar)?;
            let sts = |outcome| Sts::new(outcome, pairs, encoder.d_model());
            ranked.outcomes.iter().map(sts).collect()
        });
        let sts: Option<Vec<Sts>> = sts.transpose()?;
        drop(bar);

        let report = self.report(folder, &sweep, text, sts);
        match report.point.hidden_error.is_none_or(f64::is_finite) {
            true => Ok(report),
            false => Err(Error::file(
                folder.path(),
                "gives hidden states that are not finite: its weights are too large",
            )),
        }
    }

    /// As many lines as fit into `max_tokens`.
    fn sequences(&self, lines: &[String], tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
        let mut sequences = tokenizer.encode(lines)?;
        let mut room = self.max_tokens;
        let texts = sequences.iter().take_while(|tokens| {
            let fits = tokens.len() <= room;
            room = room.saturating_sub(tokens.len());
            fits
        });
        let texts = texts.count();
        if texts == 0 {
            let expected = format!("at least {}, the length of the first text", sequences[0].len());
            return Err(Error::argument("eval", "--max-tokens", expected, self.max_tokens));
        }
        sequences.truncate(texts);
        Ok(sequences)
    }

    fn report(
        &self,
        folder: &Folder,
        sweep: &[FfnRun],
        text: Option<Comparison>,
        sts: Option<Vec<Sts>>,
    ) -> Report {
        // Outcomes come as: dense, as stored, zero FFN, then the sweep.
        let outcome = |i: usize| text.as_ref().map(|text| &text.outcomes[i]);
        let sts = |i: usize| sts.as_ref().map(|sts| &sts[i]);
        let baseline = |i: usize| Baseline {
            spearman: sts(i).map(|s| s.spearman),
            hidden_error: outcome(i).map(|o| o.hidden_error),
            embedding_cosine: outcome(i).map(|o| o.embedding_cosine),
        };
        let point = |i: usize, run: FfnRun| Point {
            rel_threshold: match run {
                FfnRun::Selection(Selection {
                    rule: SelectionRule::DynamicK { rel_threshold },
                    ..
                }) => Some(rel_threshold),
                _ => None,
            },
            threshold_exponent: match run {
                FfnRun::Raised(exponent) => Some(exponent),
                _ => None,
            },
            spearman: sts(i).map(|s| s.spearman),
            sts_density: sts(i).map(|s| s.density),
            density: outcome(i).map(|o| o.density),
            hidden_error: outcome(i).map(|o| o.hidden_error),
            embedding_cosine: outcome(i).map(|o| o.embedding_cosine),
            flops_saved: outcome(i).map(|o| o.flops_saved),
            tokens_per_s: outcome(i).zip(outcome(0)).map(|(o, dense)| Speed {
                model: o.tokens_per_s.model,
                ffn: o.tokens_per_s.ffn,
                dense_model: dense.tokens_per_s.model,
                dense_ffn: dense.tokens_per_s.ffn,
            }),
            layers: outcome(i).map(|o| o.layers.clone()).unwrap_or_default(),
        };
        let points = sweep.iter().enumerate().map(|(i, &run)| point(3 + i, run));
        Report {
            device: self.place.device,
            threads: rayon::current_num_threads(),
            num_tokens: text.as_ref().map(|text| text.num_tokens),
            point: point(1, FfnRun::Stored),
            dense: baseline(0),
            zero_ffn: baseline(2),
            points: points.collect(),
            model: folder.path().to_path_buf(),
            reference: self.reference.as_deref().map(output::path),
        }
    }
}

/// A dense original.
pub fn open_reference(path: &Path) -> Result<Folder> {
    let folder = Folder::open(path)?;
    match folder.moefy().is_some_and(MoefyConfig::is_refined) {
        true => Err(Error::file(
            path,
            "was refined, so it is no dense original: name the model that it was converted from",
        )),
        false => Ok(folder),
    }
}

/// How the layers of a converted model run in a sweep.
fn sweep(folder: &Folder) -> Vec<FfnRun> {
    let layers = folder.moefy().map_or(&[][..], |moefy| &moefy.layers);
    let dynamic = |rule| matches!(rule, SelectionRule::DynamicK { .. });
    let rules: Vec<_> = layers.iter().map(|layer| layer.selection.rule).collect();
    if rules.is_empty() {
        Vec::new()
    } else if rules.iter().all(|&rule| dynamic(rule) && rule == rules[0]) {
        SWEEP.map(|tau| FfnRun::Selection(Selection::dynamic_k(tau))).into()
    } else {
        EXPONENTS.map(FfnRun::Raised).into()
    }
}

/// Hidden error, and where pairs were ranked Spearman, over density.
fn svg(reports: &[Report]) -> String {
    let panel = |name: &str,
                 density: fn(&Point) -> Option<f64>,
                 value: fn(&Point) -> Option<f64>| {
        let line = |report: &Report| {
            let points = report.points.iter().chain([&report.point]);
            let points = points.filter_map(|p| Some((100.0 * density(p)?, value(p)?)));
            let mut points: Vec<(f64, f64)> = points.collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let name = report.model.file_name().unwrap_or(report.model.as_os_str());
            Series { name: name.to_string_lossy().into_owned(), points }
        };
        let series: Vec<Series> = reports.iter().map(line).collect();
        let values = || series.iter().flat_map(|series| &series.points).map(|point| point.1);
        let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
        let percent = "executed density, %".into();
        let range = if name == "hidden error" { 0.0..1.05 * most } else { least..most + 0.005 };
        Panel {
            x: Axis { name: percent, range: 0.0..100.0, labels: 10, label: |x| format!("{x:.0}") },
            y: Axis { name: name.into(), range, labels: 10, label: |y| format!("{y:.2}") },
            level: None,
            series,
        }
    };
    let panels = [
        panel("hidden error", |p| p.density, |p| p.hidden_error),
        panel("STS Spearman", |p| p.sts_density, |p| p.spearman),
    ];
    let drawn = panels.into_iter().filter(|p| p.series.iter().any(|s| !s.points.is_empty()));
    chart::svg(&drawn.collect::<Vec<_>>())
}

/// Outcomes over one set of texts: dense first, then one per variant.
struct Comparison {
    num_tokens: usize,
    outcomes: Vec<Outcome>,
}

fn compare<B: Backend>(
    what: &str,
    dense: &Variant<'_, B>,
    variants: &[Variant<'_, B>],
    sequences: &[Vec<u32>],
    bar: &Bar,
) -> Result<Comparison> {
    let num_tokens = sequences.iter().map(Vec::len).sum();
    let mut done = 0;
    let outcomes = evaluate(dense, variants, sequences, |tokens| {
        done += tokens;
        bar.step(what, done, num_tokens);
    })?;
    Ok(Comparison { num_tokens, outcomes })
}

/// How well the cosines of a variant's embeddings rank sentence pairs.
struct Sts {
    spearman: f64,
    density: f64,
}

impl Sts {
    /// The embeddings hold all first sentences, then all second ones.
    fn new(outcome: &Outcome, pairs: &SentencePairs, d_model: usize) -> Result<Self> {
        let (first, second) = outcome.embeddings.split_at(outcome.embeddings.len() / 2);
        let spearman = spearman(&cosines(first, second, d_model), &pairs.scores)?;
        Ok(Self { spearman, density: outcome.density })
    }
}

impl Report {
    fn print(&self, one_of_several: bool) {
        if one_of_several {
            output::line(&format!("\n{}", self.model.display()));
        }
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.4}"));
        let share = |value: Option<f64>| value.map_or("-".into(), output::percent);
        let per_second =
            |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.0}"));
        let Self { point, dense, zero_ffn: zero, .. } = self;
        let saved = |pick: fn(FlopsSaved) -> f64| share(point.flops_saved.map(pick));
        let speed = |pick: fn(&Speed) -> f64| per_second(point.tokens_per_s.as_ref().map(pick));
        let none = || "-".to_string();
        let rows = [
            (
                "hidden error",
                [dense, zero].map(|b| number(b.hidden_error)),
                number(point.hidden_error),
            ),
            (
                "embedding cosine",
                [dense, zero].map(|b| number(b.embedding_cosine)),
                number(point.embedding_cosine),
            ),
            ("STS Spearman", [dense, zero].map(|b| number(b.spearman)), number(point.spearman)),
            ("density", ["100.0 %".into(), "0.0 %".into()], share(point.density)),
            ("density on STS", ["100.0 %".into(), "0.0 %".into()], share(point.sts_density)),
            ("FLOPs saved, model", [none(), none()], saved(|s| s.model)),
            ("FLOPs saved, FFNs", [none(), none()], saved(|s| s.ffn)),
            ("tokens/s, model", [speed(|s| s.dense_model), none()], speed(|s| s.model)),
            ("tokens/s, FFNs", [speed(|s| s.dense_ffn), none()], speed(|s| s.ffn)),
        ];
        let rows = rows.map(|(name, [dense, zero], value)| [name.into(), dense, value, zero]);
        output::line(&output::table(["", "dense", "this model", "no FFN"], rows));

        if !point.layers.is_empty() {
            let rows = point.layers.iter().map(|layer| {
                [
                    layer.layer.to_string(),
                    output::percent(layer.density),
                    number(Some(layer.hidden_error)),
                    layer.mean_k.map_or("-".into(), |k| format!("{k:.1}")),
                    layer.max_k.map_or("-".into(), |k| k.to_string()),
                ]
            });
            let header = ["layer", "density", "hidden error", "mean k", "max k"];
            output::line(&format!("\n{}", output::table(header, rows)));
        }
        if !self.points.is_empty() {
            let rows = self.points.iter().map(|point| {
                let threshold = point.rel_threshold.map(|tau| tau.to_string());
                let exponent = point.threshold_exponent.map(|e| format!("^ {e}"));
                [
                    threshold.or(exponent).unwrap_or("-".into()),
                    share(point.density),
                    number(point.hidden_error),
                    share(point.sts_density),
                    number(point.spearman),
                    share(point.flops_saved.map(|saved| saved.ffn)),
                ]
            });
            let header = [
                "threshold",
                "density",
                "hidden error",
                "density on STS",
                "STS Spearman",
                "FFN FLOPs saved",
            ];
            output::line(&format!("\n{}", output::table(header, rows)));
        }
    }
}
