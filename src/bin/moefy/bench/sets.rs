//! Sets of measurements that belong into a record.

use moefy::cuda::LayerShape;
use moefy::cuda::bench::{Routing, RunSpec};
use moefy::cuda::{Fallback, Path};
use moefy::{DType, Result};

use super::{Case, shapes, traces};

/// Sets by name.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub enum Set {
    /// Every shape from 1 to 8192 tokens
    B4,
    /// 1 to 256 tokens, the paths for few tokens also by name
    Few,
    /// 512 tokens and more
    Many,
}

const DENSITIES: [f64; 3] = [0.1, 0.2, 0.4];
const SHAPES: [&str; 4] = ["d768-e96", "d768-e24", "d1024-e64", "d4096-e112"];
/// Sparse, then dense.
const TRACES: [&str; 2] = ["minilm-e48-layer3", "minilm-e48-layer0"];
const TRACE_SHAPE: &str = "d768-e48";
/// Sparse paths that gather the tokens of an expert: for many tokens.
const MANY_PATHS: [Path; 1] = [Path::ExpertMajor];

impl Set {
    pub fn cases(self) -> Result<Vec<Case>> {
        let mut rows = Rows::default();
        match self {
            Self::B4 => rows.b4()?,
            Self::Few => rows.few()?,
            Self::Many => rows.many()?,
        }
        Ok(rows.0)
    }
}

/// Every sparse path but those for many tokens.
fn few_paths() -> impl Iterator<Item = Path> {
    let other = |path: &Path| {
        matches!(path, Path::DenseExact | Path::DenseMasked | Path::TokenTile)
            || MANY_PATHS.contains(path)
    };
    Path::ALL.into_iter().filter(move |path| !other(path))
}

fn shape(name: &str) -> LayerShape {
    shapes::named(name).expect("a name that exists")
}

fn random(densities: &[f64]) -> Vec<Routing> {
    densities.iter().map(|&density| Routing::Random { density }).collect()
}

fn both_traces() -> Result<Vec<Routing>> {
    TRACES.iter().map(|name| traces::trace(name, shape(TRACE_SHAPE).num_experts)).collect()
}

#[derive(Default)]
struct Rows(Vec<Case>);

impl Rows {
    fn add(&mut self, layer: LayerShape, run: RunSpec) {
        // A path that cannot do a case says so, and the set goes on.
        self.0.push(Case { layer, run, may_be_refused: true });
    }

    /// What the plan chooses, then these paths, for each routing.
    fn auto_and(
        &mut self,
        layer: LayerShape,
        tokens: usize,
        routings: &[Routing],
        paths: impl Iterator<Item = Path>,
    ) {
        let paths: Vec<Option<Path>> = std::iter::once(None).chain(paths.map(Some)).collect();
        for routing in routings {
            for &path in &paths {
                self.add(layer, run(tokens, routing, path));
            }
        }
    }

    fn masked(&mut self, layer: LayerShape, tokens: usize, routings: &[Routing]) {
        for routing in routings {
            let run = RunSpec { fallback: Fallback::Masked, ..run(tokens, routing, None) };
            self.add(layer, run);
        }
    }

    fn b4(&mut self) -> Result<()> {
        let random = random(&DENSITIES);
        let traces = both_traces()?;
        let shapes = SHAPES.iter().map(|name| (shape(name), &random));
        for (layer, routings) in shapes.chain([(shape(TRACE_SHAPE), &traces)]) {
            for tokens in [1, 8, 32, 128, 512, 2048, 8192] {
                match tokens {
                    1 | 8 => self.auto_and(layer, tokens, routings, few_paths()),
                    _ => self.auto_and(layer, tokens, routings, MANY_PATHS.into_iter()),
                }
            }
        }
        Ok(())
    }

    fn few(&mut self) -> Result<()> {
        let routings = random(&DENSITIES);
        let traces = both_traces()?;
        let all_tokens = [1, 2, 4, 8, 16, 32, 64, 128, 256];
        for name in ["d4096-e112", "d4096-e448", "d1024-e64", "d768-e96", "d768-e24"] {
            for tokens in all_tokens {
                self.auto_and(shape(name), tokens, &routings, few_paths());
                if tokens >= 16 {
                    self.masked(shape(name), tokens, &routings);
                }
            }
        }
        for tokens in all_tokens {
            self.auto_and(shape(TRACE_SHAPE), tokens, &traces, few_paths());
        }
        for name in ["d4096-e112", "d768-e96"] {
            let linear = LayerShape { router_hidden: 0, ..shape(name) };
            let half = LayerShape { dtype: DType::F16, ..shape(name) };
            for layer in [linear, half] {
                for tokens in [1, 4, 8] {
                    self.auto_and(layer, tokens, &routings, few_paths());
                }
            }
        }
        Ok(())
    }

    fn many(&mut self) -> Result<()> {
        let most = random(&[0.05, 0.1, 0.2, 0.4, 0.7, 1.0]);
        let traces = both_traces()?;
        let shapes = SHAPES.iter().map(|name| (shape(name), &most));
        for (layer, routings) in shapes.chain([(shape(TRACE_SHAPE), &traces)]) {
            for tokens in [512, 1024, 2048, 4096, 8192, 16384] {
                let by_name = matches!(tokens, 2048 | 8192).then_some(MANY_PATHS);
                self.auto_and(layer, tokens, routings, by_name.into_iter().flatten());
                self.masked(layer, tokens, routings);
            }
        }
        // As models are routed that know no threshold.
        for name in ["d768-e48", "d768-e24", "d1024-e64"] {
            for tokens in [2048, 8192] {
                let layer = shape(name);
                let routings = [0.1, 0.2].map(|density| traces::top_k(density, layer.num_experts));
                self.auto_and(layer, tokens, &routings, MANY_PATHS.into_iter());
            }
        }
        // Tokens that are alike, side by side.
        for routing in traces.iter().chain(&random(&[0.1])) {
            self.add(shape(TRACE_SHAPE), run(8192, routing, Some(Path::TokenTile)));
        }
        // The plan expects little and gets much.
        for name in SHAPES {
            for routing in random(&[0.6, 1.0]) {
                let run = run(8192, &routing, None);
                self.add(shape(name), RunSpec { calibrated_density: Some(0.1), ..run });
            }
        }
        // In turns, so that the workspace is bounded.
        for name in ["d4096-e112", "d768-e24"] {
            for tokens in [32768, 65536] {
                self.auto_and(shape(name), tokens, &random(&[0.1]), MANY_PATHS.into_iter());
            }
        }
        Ok(())
    }
}

fn run(tokens: usize, routing: &Routing, path: Option<Path>) -> RunSpec {
    RunSpec {
        tokens,
        routing: routing.clone(),
        path,
        fallback: Fallback::Exact,
        calibrated_density: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(set: Set, is: impl Fn(&Case) -> bool) -> usize {
        let cases = set.cases().unwrap();
        assert!(cases.iter().all(|case| case.layer.expert_width().is_ok()));
        cases.iter().filter(|case| is(case)).count()
    }

    fn is_random(case: &Case) -> bool {
        matches!(case.run.routing, Routing::Random { .. })
    }

    #[test]
    fn b4_has_every_shape_with_all_tokens_and_densities() {
        let chosen = |case: &Case| case.run.path.is_none() && case.run.tokens <= 8192;
        assert_eq!(count(Set::B4, |case| chosen(case) && is_random(case)), 4 * 7 * 3);
        assert_eq!(count(Set::B4, |case| chosen(case) && !is_random(case)), 7 * 2);
    }

    #[test]
    fn few_has_every_path_for_few_tokens_by_name() {
        for path in few_paths() {
            let forced = |case: &Case| case.run.path == Some(path) && case.run.tokens == 256;
            assert_eq!(count(Set::Few, forced), 5 * 3 + 2, "{}", path.name());
        }
        assert!(few_paths().any(|path| path == Path::Few));
        let is_many = |path| matches!(path, Path::ExpertMajor | Path::TokenTile);
        assert!(!few_paths().any(is_many));
        let masked = |case: &Case| case.run.fallback == Fallback::Masked;
        assert_eq!(count(Set::Few, masked), 5 * 5 * 3);
    }

    #[test]
    fn many_begins_where_few_tokens_end() {
        assert_eq!(count(Set::Many, |case| case.run.tokens < 512), 0);
        assert_eq!(count(Set::Many, |case| case.run.calibrated_density.is_some()), 8);
        assert_eq!(count(Set::Many, |case| case.run.path == Some(Path::TokenTile)), 3);
        let is_top_k = |case: &Case| matches!(case.run.routing, Routing::TopK { .. });
        assert_eq!(count(Set::Many, is_top_k), 3 * 2 * 2 * 2);
    }
}
