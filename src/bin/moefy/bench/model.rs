//! `moefy bench model`

use std::path::PathBuf;
use std::sync::Arc;

use moefy::cuda::bench::{ModelBench, ModelRow};
use moefy::cuda::{Device, Fallback};
use moefy::model::{Encoder, EncoderShape, Folder};
use moefy::{DType, Error, Result};

use super::{fallback, shapes};
use crate::chart::{self, Axis, Panel, Series};
use crate::{Common, dtype, output};

const NAMED: [(&str, EncoderShape); 3] = [
    ("minilm", EncoderShape::MINILM),
    ("bert-base", EncoderShape::BERT_BASE),
    ("bert-large", EncoderShape::BERT_LARGE),
];

#[derive(clap::Args)]
pub struct Model {
    /// A converted model folder
    #[arg(required_unless_present = "named")]
    model: Option<PathBuf>,
    /// Instead, shapes with random weights and routing: minilm, bert-base, bert-large
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = named)]
    #[arg(conflicts_with = "model")]
    named: Vec<(&'static str, EncoderShape)>,
    /// Experts of each FFN of a shape
    #[arg(long, value_name = "E", default_value_t = 48)]
    experts: usize,
    /// Shares of the neurons that a token of a shape runs
    #[arg(long, value_name = "SHARE", value_delimiter = ',', value_parser = shapes::share)]
    #[arg(default_value = "0.1,0.2,0.4")]
    density: Vec<f64>,
    /// Sequences
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8,64,256")]
    batch: Vec<usize>,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "32,128,512")]
    length: Vec<usize>,
    /// f16, bf16, f32
    #[arg(long, value_name = "TYPE", value_delimiter = ',', value_parser = dtype, default_value = "f16")]
    dtype: Vec<DType>,
    /// What runs where dense products are faster: exact (the original layer), masked (the sparse layer's
    /// function)
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = fallback)]
    #[arg(default_value = "exact")]
    fallback: Vec<Fallback>,
    /// Rows of `benches/peers/bert.py`, a line of JSON each: their tokens/s go beside ours
    #[arg(long, value_name = "FILE")]
    peers: Option<PathBuf>,
    /// Plot tokens/s over the tokens of a batch
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn named(name: &str) -> Result<(&'static str, EncoderShape), String> {
    let found = NAMED.into_iter().find(|(known, _)| *known == name);
    found.ok_or_else(|| format!("expected {}", NAMED.map(|(name, _)| name).join(", ")))
}

#[derive(serde::Deserialize)]
struct Peer {
    model: String,
    dtype: DType,
    batch: usize,
    length: usize,
    torch_tokens_per_s: f64,
}

impl Model {
    pub fn run(self, common: &Common) -> Result<()> {
        let peers = self.read_peers()?;
        self.svg.as_deref().map_or(Ok(()), chart::check)?;
        let device = Arc::new(Device::open(0)?);
        let mut rows = Vec::new();
        let mut found = |mut row: ModelRow| {
            let same = |peer: &&Peer| {
                (&peer.model, peer.dtype, peer.batch, peer.length)
                    == (&row.model, row.dtype, row.batch, row.length)
            };
            row.torch_tokens_per_s = peers.iter().find(same).map(|peer| peer.torch_tokens_per_s);
            if common.json {
                output::line(&serde_json::to_string(&row).expect("numbers and strings"));
            }
            rows.push(row);
        };
        let dtypes = self.dtype.iter();
        let kinds = dtypes.flat_map(|&dtype| self.fallback.iter().map(move |&f| (dtype, f)));
        for (dtype, fallback) in kinds {
            if let Some(model) = &self.model {
                let folder = Folder::open(model)?;
                let name = model.display().to_string();
                let bench = ModelBench::new(&device, name, dtype, fallback)?;
                let layers = folder.moefy().map_or(&[][..], |moefy| &moefy.layers);
                let densities =
                    layers.iter().filter_map(|layer| Some(layer.statistics.as_ref()?.density));
                let dense = folder.num_layers() - layers.len();
                let density = (densities.sum::<f64>() + dense as f64) / folder.num_layers() as f64;
                let encoder = Encoder::load(bench.backend(), &folder)?;
                self.sizes(&bench, &encoder, density, &mut found)?;
            }
            for (name, shape) in &self.named {
                let bench = ModelBench::new(&device, name.to_string(), dtype, fallback)?;
                let mut encoder = Encoder::random(bench.backend(), shape, 0)?;
                for &density in &self.density {
                    let k = (density * self.experts as f64).round().max(1.0) as usize;
                    encoder.moefy_at_random(shape, self.experts, k, 1)?;
                    let density = k as f64 / self.experts as f64;
                    self.sizes(&bench, &encoder, density, &mut found)?;
                }
            }
        }
        if !common.json {
            output::line(&table(&rows));
        }
        match &self.svg {
            Some(file) => chart::write(file, &svg(&rows)),
            None => Ok(()),
        }
    }

    fn read_peers(&self) -> Result<Vec<Peer>> {
        let Some(file) = &self.peers else { return Ok(Vec::new()) };
        let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
        let peer = |(number, line)| {
            serde_json::from_str(line).map_err(|error| {
                Error::file(file, format!("line {} is no row: {error}", number + 1))
            })
        };
        text.lines().enumerate().map(peer).collect()
    }

    fn sizes(
        &self,
        bench: &ModelBench,
        encoder: &Encoder<moefy::cuda::Gpu>,
        density: f64,
        found: &mut impl FnMut(ModelRow),
    ) -> Result<()> {
        for &batch in &self.batch {
            for &length in &self.length {
                found(bench.run(encoder, [batch, length], density)?);
            }
        }
        Ok(())
    }
}

fn table(rows: &[ModelRow]) -> String {
    let header = [
        "model",
        "type",
        "batch",
        "length",
        "density",
        "fallback",
        "tokens/s",
        "dense",
        "PyTorch",
        "FFN share",
        "dense FFN share",
    ];
    let number = |value: f64| format!("{value:.0}");
    output::table(
        header,
        rows.iter().map(|row| {
            [
                row.model.clone(),
                row.dtype.to_string(),
                row.batch.to_string(),
                row.length.to_string(),
                output::percent(row.density),
                row.fallback.into(),
                number(row.tokens_per_s),
                number(row.dense_tokens_per_s),
                row.torch_tokens_per_s.map_or("-".into(), number),
                output::percent(row.share_ffn),
                output::percent(row.dense_share_ffn),
            ]
        }),
    )
}

/// Tokens per second over the tokens of a batch, a line for each model, length and density, and one for the
/// dense model.
fn svg(rows: &[ModelRow]) -> String {
    let mut series: Vec<Series> = Vec::new();
    let mut add = |name: String, tokens: usize, value: f64| {
        let point = ((tokens as f64).log2(), value / 1e6);
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name, points: vec![point] }),
        }
    };
    for row in rows {
        let (tokens, model) = (row.batch * row.length, format!("{}, {}", row.model, row.length));
        add(format!("{model}, dense"), tokens, row.dense_tokens_per_s);
        let masked = if row.fallback == "masked" { ", masked" } else { "" };
        let name = format!("{model}, {}{masked}", output::percent(row.density));
        add(name, tokens, row.tokens_per_s);
    }
    for series in &mut series {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        series.points.dedup_by(|b, a| a.0 == b.0);
    }
    let points = || series.iter().flat_map(|series| &series.points);
    let (start, end) =
        points().fold((f64::INFINITY, 0.0f64), |(a, b), point| (a.min(point.0), b.max(point.0)));
    let most = points().map(|point| point.1).fold(0.0, f64::max);
    let log2 = |x: f64| format!("{:.0}", x.exp2());
    let range = start..end.max(start + 1.0);
    chart::svg(&[Panel {
        x: Axis { name: "tokens of a batch".into(), range, labels: 12, label: log2 },
        y: Axis {
            name: "million tokens/s".into(),
            range: 0.0..1.08 * most,
            labels: 10,
            label: |y| format!("{y:.1}"),
        },
        level: None,
        series,
    }])
}
