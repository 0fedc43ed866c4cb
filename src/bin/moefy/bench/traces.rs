//! Where routing comes from: random, a recorded trace, or a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moefy::cuda::bench::Routing;
use moefy::ffn::ExpertMask;
use moefy::{Error, Result};

use super::npy::Bytes;

/// Name and content of the traces that come with moefy.
const TRACES: [(&str, &[u8]); 2] = [
    ("minilm-e48-layer0", include_bytes!("../../../../benches/traces/minilm-e48-layer0.npy")),
    ("minilm-e48-layer3", include_bytes!("../../../../benches/traces/minilm-e48-layer3.npy")),
];

/// What `--routing` names.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    Random,
    TopK,
    Trace(&'static str),
    File(PathBuf),
}

impl Source {
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "random" => return Ok(Self::Random),
            "top-k" => return Ok(Self::TopK),
            _ => {}
        }
        if text.ends_with(".npy") {
            return Ok(Self::File(text.into()));
        }
        let name = text.strip_prefix("trace:").unwrap_or_default();
        let known = TRACES.iter().find(|(known, _)| *known == name);
        known.map(|(name, _)| Self::Trace(name)).ok_or_else(|| {
            let names = TRACES.map(|(name, _)| format!("trace:{name}")).join(", ");
            format!("expected random, top-k, FILE.npy or one of {names}")
        })
    }

    /// The routings: random ones at each density, of whole experts for top-k, or the one trace.
    pub fn routings(&self, num_experts: usize, densities: &[f64]) -> Result<Vec<Routing>> {
        match self {
            Self::Random => {
                Ok(densities.iter().map(|&density| Routing::Random { density }).collect())
            }
            Self::TopK => {
                Ok(densities.iter().map(|&density| top_k(density, num_experts)).collect())
            }
            Self::Trace(name) => Ok(vec![trace(name, num_experts)?]),
            Self::File(file) => {
                let bytes = std::fs::read(file).map_err(Error::io("read", file))?;
                let name = crate::text::file_name_of(file);
                let name = name.trim_end_matches(".npy");
                Ok(vec![routing(name, file, &bytes, num_experts)?])
            }
        }
    }
}

/// Top-k of a share of the experts.
pub fn top_k(density: f64, num_experts: usize) -> Routing {
    Routing::TopK { k: ((density * num_experts as f64).round() as usize).clamp(1, num_experts) }
}

/// A trace that comes with moefy.
pub fn trace(name: &str, num_experts: usize) -> Result<Routing> {
    let found = TRACES.iter().find(|(known, _)| *known == name);
    let (name, bytes) = found.expect("the name of a trace");
    routing(name, Path::new(name), bytes, num_experts)
}

/// `file` is for errors.
fn routing(name: &str, file: &Path, bytes: &[u8], num_experts: usize) -> Result<Routing> {
    let array = Bytes::parse(bytes).map_err(|problem| Error::file(file, problem))?;
    let [tokens, row_bytes] = array.shape;
    let mut masks = ExpertMask::none(tokens, num_experts);
    let fits = tokens > 0 && row_bytes == num_experts.div_ceil(8);
    let rows = array.data.chunks_exact(row_bytes.max(1));
    for (token, row) in rows.enumerate().filter(|_| fits) {
        let selects = |e: &usize| row[e / 8] << (e % 8) & 0x80 != 0;
        (0..num_experts).filter(selects).for_each(|expert| masks.insert(token, expert));
    }
    let bits: usize = array.data.iter().map(|byte| byte.count_ones() as usize).sum();
    if !fits || bits != masks.num_pairs() {
        let problem = format!(
            "expected masks of {num_experts} experts, one bit each, first expert highest, got \
             [{tokens}, {row_bytes}] bytes with {bits} bits set"
        );
        return Err(Error::file(file, problem));
    }
    Ok(Routing::Trace { name: name.into(), masks: Arc::new(masks) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masks(routing: Routing) -> Arc<ExpertMask> {
        match routing {
            Routing::Trace { masks, .. } => masks,
            _ => panic!("not a trace"),
        }
    }

    #[test]
    fn the_traces_have_the_density_that_was_measured() {
        for (name, density) in [("minilm-e48-layer0", 0.3670), ("minilm-e48-layer3", 0.0351)] {
            let masks = masks(trace(name, 48).unwrap());
            assert_eq!(masks.num_tokens(), 22_213);
            let measured = masks.num_pairs() as f64 / (22_213.0 * 48.0);
            assert!((measured - density).abs() < 1e-4, "{name}: {measured}");
        }
        let error = trace("minilm-e48-layer0", 96).unwrap_err().to_string();
        assert!(error.contains("96") && error.contains("[22213, 6]"), "{error}");
    }

    #[test]
    fn the_first_expert_is_the_highest_bit() {
        let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2), }";
        let len = [header.len() as u8, 0];
        let file =
            |data: [u8; 2]| [b"\x93NUMPY\x01\x00", &len[..], header.as_bytes(), &data].concat();
        let read = |data, experts| routing("t", Path::new("t.npy"), &file(data), experts);
        let routed = masks(read([0b1000_0001, 0b0100_0000], 10).unwrap());
        assert_eq!(routed.experts(0).collect::<Vec<_>>(), [0, 7, 9]);
        let error = read([0, 0b0010_0000], 10).unwrap_err().to_string();
        assert!(error.contains("10 experts") && error.contains("1 bits"), "{error}");
    }

    #[test]
    fn names_are_checked() {
        assert_eq!(Source::parse("random"), Ok(Source::Random));
        let routings = Source::parse("top-k").unwrap().routings(48, &[0.0, 0.1, 0.2, 1.0]).unwrap();
        let k = |routing: &Routing| match routing {
            Routing::TopK { k } => *k,
            _ => panic!("not top-k"),
        };
        assert_eq!(routings.iter().map(k).collect::<Vec<_>>(), [1, 5, 10, 48]);
        assert_eq!(Source::parse("a/b.npy"), Ok(Source::File("a/b.npy".into())));
        assert!(Source::parse("trace:minilm-e48-layer3").is_ok());
        assert!(Source::parse("trace:other").unwrap_err().contains("minilm-e48-layer0"));
    }
}
