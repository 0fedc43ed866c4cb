//! Conversion of a whole model: a random little BERT.

mod common;
mod support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{LAYERS, POSITIONS, TinyBert, VOCAB};
use moefy::convert::{
    CalibrationText, ConvertOptions, ErrorBudget, Progress, RouterMethod, ThresholdScope,
    ThresholdTarget, convert_model, density_for_error, refine_model, retune_model,
};
use moefy::cpu::Cpu;
use moefy::eval::{FfnCost, Variant, evaluate};
use moefy::ffn::{ExpertMask, Gate, Selection, SelectionRule};
use moefy::model::{
    Conversion, Encoder, Ffn, FfnRun, Folder, Output, embed, retune, write_moefied,
};
use moefy::{DType, Error, Result};
use support::{Random, on_threads};

fn options(scope: ThresholdScope) -> ConvertOptions {
    ConvertOptions {
        num_experts: 8,
        density: 0.4,
        router: RouterMethod::D2dMoe { hidden: 16, epochs: 2 },
        rel_threshold_scope: scope,
        ..ConvertOptions::default()
    }
}

fn open(model: &TinyBert) -> Folder {
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path());
    // The files stay mapped when their folder is gone.
    Folder::open(dir.path()).unwrap()
}

/// A folder with the model `dense`, and that.
fn on_disk() -> (tempfile::TempDir, Folder) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dense");
    TinyBert::new(0, DType::F32).write(&path);
    (dir, Folder::open(&path).unwrap())
}

fn sequences(num_sequences: usize) -> Vec<Vec<u32>> {
    let mut random = Random::new(3);
    let sequence = |_| {
        let length = 1 + random.below(POSITIONS);
        (0..length).map(|_| random.below(VOCAB.len()) as u32).collect()
    };
    (0..num_sequences).map(sequence).collect()
}

fn convert(
    folder: &Folder,
    sequences: &[Vec<u32>],
    options: &ConvertOptions,
    progress: &dyn Progress,
    interrupted: &AtomicBool,
) -> Result<Conversion> {
    let text = CalibrationText { name: "text.txt", sequences };
    convert_model(Encoder::load(Cpu, folder)?, folder, text, options, progress, interrupted)
}

#[test]
fn the_converted_model_executes_the_density_that_it_was_given() {
    let folder = open(&TinyBert::new(0, DType::F32));
    let sequences = sequences(120);
    let num_tokens: usize = sequences.iter().map(Vec::len).sum();
    for scope in ThresholdScope::ALL {
        let options = options(scope);
        let conversion =
            convert(&folder, &sequences, &options, &(), &AtomicBool::new(false)).unwrap();
        assert_eq!(conversion.method.calibration.as_ref().unwrap().num_tokens, num_tokens);
        assert_eq!(conversion.method.rel_threshold_scope, scope.name());

        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("dense");
        TinyBert::new(0, DType::F32).write(&source);
        let path = dir.path().join("moe");
        let output = Output { path: &path, overwrite: false, interrupted: &AtomicBool::new(false) };
        write_moefied(&Folder::open(&source).unwrap(), &conversion, output).unwrap();
        let converted = Folder::open(&path).unwrap();
        let encoder = Encoder::load(Cpu, &converted).unwrap();
        let mut pairs = [0; LAYERS];
        let mut observe = |layer: usize, mask: &ExpertMask| pairs[layer] += mask.num_pairs();
        embed(&encoder, &sequences, FfnRun::Stored, Some(&mut observe)).unwrap();

        let executed: Vec<f64> =
            pairs.iter().map(|&pairs| pairs as f64 / (num_tokens * 8) as f64).collect();
        for (converted, executed) in conversion.layers.iter().zip(&executed) {
            let statistics = converted.statistics.as_ref().unwrap();
            // The sample is the whole of this short text.
            assert_eq!(statistics.num_tokens, num_tokens);
            assert!((statistics.density - executed).abs() < 1e-3, "{statistics:?} {executed}");
            if scope == ThresholdScope::Layer {
                assert!((executed - 0.4).abs() < 2e-3, "{executed}");
            }
        }
        let mean = executed.iter().sum::<f64>() / LAYERS as f64;
        assert!((mean - 0.4).abs() < 2e-3, "{mean}");
        let threshold = |layer: usize| conversion.layers[layer].selection.rule;
        assert_eq!(threshold(0) == threshold(1), scope == ThresholdScope::Global);
        assert!(matches!(threshold(0), SelectionRule::DynamicK { .. }));
    }
}

#[test]
fn an_error_budget_gets_the_smallest_density_that_keeps_within_it() {
    let (dir, source) = on_disk();
    let path = dir.path().join("moe");
    let sequences = sequences(60);
    let never = AtomicBool::new(false);
    let conversion =
        convert(&source, &sequences, &options(ThresholdScope::Layer), &(), &never).unwrap();
    let output = Output { path: &path, overwrite: false, interrupted: &never };
    write_moefied(&source, &conversion, output).unwrap();
    let folder = Folder::open(&path).unwrap();
    let [encoder, dense] = [&folder, &source].map(|folder| Encoder::load(Cpu, folder).unwrap());
    let text = CalibrationText { name: "text.txt", sequences: &sequences };
    let density_for = |max_error, scope, reference| {
        let budget = ErrorBudget { max_error, scope, reference };
        density_for_error(&encoder, &folder, text, budget, &(), &never)
    };
    let error_at = |density, scope| {
        let target = ThresholdTarget::Density { density, scope };
        let moefy = retune_model(&encoder, &folder, Some(text), target, &(), &never).unwrap();
        let path = dir.path().join("retuned");
        retune(&folder, &moefy, Output { path: &path, overwrite: true, interrupted: &never })
            .unwrap();
        let retuned = Encoder::load(Cpu, &Folder::open(&path).unwrap()).unwrap();
        let costs: Vec<_> =
            (0..LAYERS).map(|layer| FfnCost::from(&folder.ffn(layer).unwrap())).collect();
        let variant = |encoder| Variant { encoder, run: FfnRun::Stored, costs: &costs };
        let outcomes = evaluate(&variant(&dense), &[variant(&retuned)], &sequences, |_| ());
        outcomes.unwrap()[1].hidden_error
    };
    for scope in ThresholdScope::ALL {
        let max_error = 0.6 * error_at(0.3, scope);
        let density = density_for(max_error, scope, None).unwrap();
        assert_eq!(density_for(max_error, scope, Some(&dense)).unwrap(), density);
        assert!((0.3..1.0).contains(&density), "{density}");
        assert!(error_at(density, scope) <= max_error);
        assert!(error_at(density - 0.005, scope) > max_error, "{density} is not the smallest");
    }
    let least = density_for(1e9, ThresholdScope::Layer, None).unwrap();
    assert_eq!(least, 1.0 / 8.0);
    let refusal = density_for(-1.0, ThresholdScope::Layer, None).unwrap_err().to_string();
    assert!(refusal.contains("max_error must be at least 0.0"), "{refusal}");
}

#[test]
fn threads_do_not_change_a_bit() {
    let folder = open(&TinyBert::new(1, DType::F32));
    let sequences = sequences(60);
    let run = |threads| {
        let never = AtomicBool::new(false);
        let options = options(ThresholdScope::Global);
        on_threads(threads, || convert(&folder, &sequences, &options, &(), &never).unwrap())
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

/// Hears everything, and raises the flag after some steps.
struct Impatient<'a> {
    steps: Mutex<Vec<(String, usize, usize)>>,
    patience: usize,
    interrupted: &'a AtomicBool,
}

impl Progress for Impatient<'_> {
    fn step(&self, what: &str, done: usize, total: usize) {
        let mut steps = self.steps.lock().unwrap();
        steps.push((what.into(), done, total));
        self.interrupted.store(steps.len() >= self.patience, Ordering::Relaxed);
    }
}

#[test]
fn every_part_is_heard_of_and_can_be_the_last() {
    let folder = open(&TinyBert::new(2, DType::F32));
    let sequences = sequences(40);
    let mut patience = usize::MAX;
    loop {
        let interrupted = AtomicBool::new(false);
        let listener = Impatient { steps: Mutex::default(), patience, interrupted: &interrupted };
        let options = options(ThresholdScope::Global);
        let result = convert(&folder, &sequences, &options, &listener, &interrupted);
        let steps = listener.steps.into_inner().unwrap();
        if patience == usize::MAX {
            result.unwrap();
            assert!(steps.iter().all(|(_, done, total)| done <= total), "{steps:?}");
            for what in ["layer 1 of 2: attention", "layer 2 of 2: router", "threshold"] {
                assert!(steps.iter().any(|(heard, ..)| heard == what), "{what}: {steps:?}");
            }
            patience = steps.len() - 1;
        } else {
            assert!(matches!(result, Err(Error::Interrupted)), "{patience}");
            assert_eq!(steps.len(), patience);
            patience -= 1;
        }
        if patience == 0 {
            break;
        }
    }
}

#[test]
fn what_cannot_work_is_refused() {
    let folder = open(&TinyBert::new(0, DType::F32));
    let never = AtomicBool::new(false);
    let good = options(ThresholdScope::Global);
    let refusal = |folder: &Folder, sequences: &[Vec<u32>], options: &ConvertOptions| {
        convert(folder, sequences, options, &(), &never).unwrap_err().to_string()
    };
    let nothing = refusal(&folder, &[], &good);
    assert!(nothing.contains("at least 320 tokens, got 0"), "{nothing}");
    let short = refusal(&folder, &vec![vec![1; 10]; 31], &good);
    assert!(short.contains("at least 320 tokens, got 310"), "{short}");
    let unknown = refusal(&folder, &vec![vec![99; 10]; 40], &good);
    assert!(unknown.contains("vocab_size"), "{unknown}");
    let uneven =
        refusal(&folder, &sequences(40), &ConvertOptions { num_experts: 7, ..good.clone() });
    assert!(uneven.contains("num_experts must be a divisor of the 48"), "{uneven}");
    let few = ConvertOptions { calibration_tokens: 100, ..good.clone() };
    let few = refusal(&folder, &sequences(40), &few);
    assert!(few.contains("at least 320 tokens"), "{few}");

    let (dir, source) = on_disk();
    let path = dir.path().join("moe");
    let conversion = convert(&source, &sequences(40), &good, &(), &never).unwrap();
    let output = Output { path: &path, overwrite: false, interrupted: &never };
    write_moefied(&source, &conversion, output).unwrap();
    let converted = Folder::open(&path).unwrap();
    assert!(matches!(converted.ffn(0), Ok(Ffn::Moe(_))));
    let again = refusal(&converted, &sequences(40), &good);
    assert!(again.contains("is converted already"), "{again}");
}

#[test]
fn what_cannot_be_fitted_again_is_refused() {
    let (dir, source) = on_disk();
    let path = dir.path().join("moe");
    let (never, sequences) = (AtomicBool::new(false), sequences(40));
    let good = options(ThresholdScope::Global);
    let conversion = convert(&source, &sequences, &good, &(), &never).unwrap();
    let [text, empty] =
        [&sequences[..], &[]].map(|sequences| CalibrationText { name: "text.txt", sequences });
    let retuned = |conversion: &Conversion, text| {
        let output = Output { path: &path, overwrite: true, interrupted: &never };
        write_moefied(&source, conversion, output).unwrap();
        let folder = Folder::open(&path).unwrap();
        let encoder = Encoder::load(Cpu, &folder).unwrap();
        let target = ThresholdTarget::Density { density: 0.5, scope: ThresholdScope::Global };
        retune_model(&encoder, &folder, Some(text), target, &(), &never)
    };
    assert!(retuned(&conversion, text).is_ok());
    let refusal = |conversion, text| retuned(conversion, text).unwrap_err().to_string();
    let nothing = refusal(&conversion, empty);
    assert!(nothing.contains("text must be of at least one token"), "{nothing}");
    let mut other = conversion.clone();
    other.layers[1].selection = Selection::top_k(2);
    let other = refusal(&other, text);
    assert!(other.contains("differ in their experts or in the kind of their rule"), "{other}");
    let none = Conversion { layers: Vec::new(), ..conversion.clone() };
    let none = refusal(&none, text);
    assert!(none.contains("no converted layer"), "{none}");

    let options = ConvertOptions { refine_tokens: 64, ..good };
    let refined = |conversion: &Conversion, text| {
        let encoder = Encoder::load(Cpu, &source).unwrap();
        refine_model(encoder, &source, &mut conversion.clone(), text, &options, &(), &never)
    };
    assert!(refined(&conversion, text).is_ok());
    let encoder = Encoder::load(Cpu, &source).unwrap();
    let budget = ErrorBudget { max_error: 0.5, scope: ThresholdScope::Layer, reference: None };
    let nothing = density_for_error(&encoder, &source, empty, budget, &(), &never).unwrap_err();
    assert!(nothing.to_string().contains("text must be of at least one token"), "{nothing}");
    let nothing = refined(&conversion, empty).unwrap_err().to_string();
    assert!(nothing.contains("text must be of at least one token"), "{nothing}");
    let mut gated = conversion.clone();
    gated.layers[0].gate = Gate::Softmax;
    let gated = refined(&gated, text).unwrap_err().to_string();
    assert!(gated.contains("gate must be 1 for every expert, got Softmax"), "{gated}");
}
