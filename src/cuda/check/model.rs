//! Whether a model gives on this card what the reference and the CPU give.

use std::ops::Range;
use std::slice::from_ref;
use std::sync::Arc;

use rayon::prelude::*;

use super::{Checked, Verdict};
use crate::cpu::Cpu;
use crate::cuda::{Device, Fallback, Gpu, GpuOptions};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::eval::{cosines, spearman};
use crate::ffn::{ExpertMask, Selection, SelectionRule};
use crate::model::{Backend, Batch, Encoder, Ffn, FfnRun, Folder, Workspace, embed};
use crate::reference::{self, Reference};
use crate::tensor::Tensor;

/// 1 − the mean cosine between embeddings and the reference's.
const COSINE_BAR: f64 = 5e-4;
/// Between Spearman's correlation here and on the CPU.
const SPEARMAN_BAR: f64 = 1e-3;
/// Scores may be off by this share of a token's largest, and so may decide otherwise when they are that close
/// to what selects them.
const BAND: f64 = 1e-4;

/// What a model is checked on, as tokens.
pub struct ModelTexts<'a> {
    /// For embeddings and masks, at least one. The reference takes its time for each.
    pub sentences: &'a [Vec<u32>],
    /// For the ranking: all first sentences, then all second ones, and their scores.
    pub pairs: Option<(&'a [Vec<u32>], &'a [f64])>,
}

/// Checks a folder's model in each element type, as it is stored and with its FFNs dense; each finding goes to
/// `found`:
///
/// - embeddings of the sentences, all in one batch and one by one, against those of the f64 reference: 1 − the
///   mean cosine is at most 5e-4. The reference runs the experts that were selected here: a type rounds the inputs
///   of routers, and an expert more or less is no error of arithmetic. What the mean is with the reference's own
///   experts is said beside it;
/// - Spearman's correlation over the pairs against the CPU's: at most 1e-3 apart;
/// - masks against exact scores. Layer by layer, each on the CPU's input of that layer, because roundings of the
///   layers before would decide otherwise where scores are close: not one bit may differ where the exact score
///   is further from the threshold than 1e-4 of the token's largest.
///
/// # Errors
/// When there is no sentence, one does not fit the model, the model does not fit the device, or the device
/// fails.
pub fn check_model(
    device: &Arc<Device>,
    folder: &Folder,
    dtypes: &[DType],
    texts: &ModelTexts<'_>,
    mut found: impl FnMut(Checked),
) -> Result<()> {
    if texts.sentences.is_empty() {
        return Err(Error::argument("check", "sentences", "at least one", "none"));
    }
    let reference = Encoder::load(Reference, folder)?;
    let cpu = Encoder::load(Cpu, folder)?;
    let stored = folder.moefy().map(|_| ("as stored", FfnRun::Stored));
    let mut runs = Vec::new();
    for (name, run) in stored.into_iter().chain([("dense", FfnRun::Dense)]) {
        let one = |sentence| embed(&reference, from_ref(sentence), run, None);
        let embeddings = texts.sentences.par_iter().map(one).collect::<Result<Vec<_>>>()?;
        let correlation = texts.pairs.map(|pairs| rank(&cpu, pairs, run)).transpose()?;
        runs.push(Expected { name, run, embeddings, correlation });
    }
    for &dtype in dtypes {
        let options = GpuOptions { fallback: Fallback::Masked, ..GpuOptions::default() };
        let on_gpu = Encoder::load(Gpu::new(device, dtype, options)?, folder)?;
        for expected in &runs {
            check_run(&on_gpu, &reference, dtype, texts, expected, &mut found)?;
        }
        if stored.is_some() {
            found(check_masks(&on_gpu, &cpu, &reference, dtype, texts.sentences)?);
        }
    }
    Ok(())
}

/// A way to run the model, and what it should give.
struct Expected {
    name: &'static str,
    run: FfnRun,
    /// Of each sentence, with the reference's own experts.
    embeddings: Vec<Vec<f32>>,
    correlation: Option<f64>,
}

/// S(t) of each layer that selects.
type Masks = Vec<Option<ExpertMask>>;

/// The reference's embedding of a sentence whose tokens run these experts.
fn embedding(encoder: &Encoder<Reference>, sentence: &[u32], masks: &Masks) -> Result<Vec<f32>> {
    let (num_tokens, d_model) = (sentence.len(), encoder.d_model());
    let batch = encoder.batch(&Batch::pack([sentence])?)?;
    let mut workspace = encoder.workspace(num_tokens)?;
    let mut x = encoder.activations(num_tokens)?;
    encoder.embed_tokens(&mut x, &batch)?;
    for (layer, mask) in masks.iter().enumerate() {
        encoder.attention_block(layer, &mut x, &batch, &mut workspace)?;
        let (Ffn::Moe(moe), Some(mask)) = (encoder.ffn(layer), mask) else {
            encoder.ffn_block(layer, FfnRun::Dense, &mut x, &batch, &mut workspace)?;
            continue;
        };
        let scores = reference::router_scores(moe.router(), &x, d_model);
        let y = reference::experts(moe, &x, mask, Some(&scores));
        let norm = encoder.surroundings(layer).ffn_norm;
        encoder.backend().layer_norm(&mut x, Some(&y), norm, num_tokens)?;
    }
    encoder.pool(&x, &batch)
}

/// An encoder, and memory for all sentences at once.
struct Passes<'a, B: Backend> {
    encoder: &'a Encoder<B>,
    x: B::Tensor,
    workspace: Workspace<B>,
}

impl<'a, B: Backend> Passes<'a, B> {
    fn new(encoder: &'a Encoder<B>, sentences: &[Vec<u32>]) -> Result<Self> {
        let max_tokens = sentences.iter().map(Vec::len).sum();
        let (x, workspace) = (encoder.activations(max_tokens)?, encoder.workspace(max_tokens)?);
        Ok(Self { encoder, x, workspace })
    }

    /// The embedding of each sentence, and the experts that its tokens ran.
    fn embeddings(
        &mut self,
        sentences: &[Vec<u32>],
        run: FfnRun,
    ) -> Result<Vec<(Vec<f32>, Masks)>> {
        let Self { encoder, x, workspace } = self;
        let packed = Batch::pack(sentences)?;
        let batch = encoder.batch(&packed)?;
        let mut masks: Masks = vec![None; encoder.num_layers()];
        let mut observe = |layer: usize, mask: &ExpertMask| masks[layer] = Some(mask.clone());
        encoder.forward(run, x, &batch, workspace, Some(&mut observe))?;
        let embeddings = encoder.pool(x, &batch)?;
        let bounds = packed.sequence_offsets().windows(2);
        let of_sentence = bounds.zip(embeddings.chunks_exact(encoder.d_model()));
        let split = of_sentence.map(|(pair, embedding)| {
            let tokens = pair[0] as usize..pair[1] as usize;
            let masks = masks
                .iter()
                .map(|mask| mask.as_ref().map(|mask| rows(mask, tokens.clone())).transpose());
            Ok((embedding.to_vec(), masks.collect::<Result<Masks>>()?))
        });
        split.collect()
    }
}

/// The masks of some of the tokens.
fn rows(mask: &ExpertMask, tokens: Range<usize>) -> Result<ExpertMask> {
    let words = tokens.clone().flat_map(|token| mask.row(token).iter().copied()).collect();
    ExpertMask::from_words(tokens.len(), mask.num_experts(), words)
}

/// Spearman's correlation of the cosines of the pairs with their scores.
fn rank<B: Backend>(
    encoder: &Encoder<B>,
    (sequences, scores): (&[Vec<u32>], &[f64]),
    run: FfnRun,
) -> Result<f64> {
    let embeddings = embed(encoder, sequences, run, None)?;
    let (first, second) = embeddings.split_at(embeddings.len() / 2);
    spearman(&cosines(first, second, encoder.d_model()), scores)
}

fn check_run(
    on_gpu: &Encoder<Gpu>,
    reference: &Encoder<Reference>,
    dtype: DType,
    texts: &ModelTexts<'_>,
    Expected { name, run, embeddings, correlation }: &Expected,
    found: &mut impl FnMut(Checked),
) -> Result<()> {
    let mut passes = Passes::new(on_gpu, texts.sentences)?;
    let together = passes.embeddings(texts.sentences, *run)?;
    let alone = texts.sentences.iter().map(|sentence| passes.embeddings(from_ref(sentence), *run));
    let alone = alone.collect::<Result<Vec<_>>>()?.concat();
    for (how, got) in [("in one batch", together), ("one by one", alone)] {
        let expected = texts.sentences.par_iter().zip(&got);
        let expected = expected.map(|(sentence, (_, masks))| embedding(reference, sentence, masks));
        let expected = expected.collect::<Result<Vec<_>>>()?;
        let mean_and_worst = |expected: &[Vec<f32>]| {
            let distances = got.iter().zip(expected).map(|((got, _), e)| distance(got, e));
            let (sum, worst) =
                distances.fold((0.0, 0.0f64), |(sum, worst), d| (sum + d, worst.max(d)));
            [sum / got.len() as f64, worst]
        };
        let ([error, worst], [own, _]) = (mean_and_worst(&expected), mean_and_worst(embeddings));
        let mut shape = format!("{} sentences, at worst {worst:.1e}", got.len());
        if *run == FfnRun::Stored {
            shape += &format!("; {own:.1e} with the reference's own experts");
        }
        let name = format!("{name}: 1 - cosine, {how}");
        found(Checked::number(name, shape, dtype, error, COSINE_BAR));
    }
    if let (Some(pairs), Some(expected)) = (texts.pairs, correlation) {
        let got = rank(on_gpu, pairs, *run)?;
        let shape = format!("{} pairs, {got:.4}, CPU {expected:.4}", pairs.1.len());
        let name = format!("{name}: Spearman");
        found(Checked::number(name, shape, dtype, (got - expected).abs(), SPEARMAN_BAR));
    }
    Ok(())
}

/// 1 − the cosine.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Bits of all layers' masks that differ although they are not close.
fn check_masks(
    on_gpu: &Encoder<Gpu>,
    cpu: &Encoder<Cpu>,
    reference: &Encoder<Reference>,
    dtype: DType,
    sentences: &[Vec<u32>],
) -> Result<Checked> {
    let (mut here, mut there) = (Passes::new(on_gpu, sentences)?, Passes::new(cpu, sentences)?);
    let (mut bits, mut close, mut wrong) = (0, 0, 0);
    // Many tokens and few take different paths.
    for sentences in [sentences].into_iter().chain(sentences.iter().map(from_ref)) {
        let batch = Batch::pack(sentences)?;
        let [num_tokens, d_model] = [batch.num_tokens(), cpu.d_model()];
        let (batch_here, batch_there) = (on_gpu.batch(&batch)?, cpu.batch(&batch)?);
        cpu.embed_tokens(&mut there.x, &batch_there)?;
        for layer in 0..cpu.num_layers() {
            cpu.attention_block(layer, &mut there.x, &batch_there, &mut there.workspace)?;
            let input = cpu.to_host(&there.x, &batch_there)?;
            cpu.ffn_block(layer, FfnRun::Stored, &mut there.x, &batch_there, &mut there.workspace)?;
            let Ffn::Moe(moe) = reference.ffn(layer) else { continue };
            let input = Tensor::matrix(input, [num_tokens, d_model])?.to_dtype(dtype);
            let mut x = on_gpu.backend().tensor(input.view())?;
            on_gpu.ffn_block(layer, FfnRun::Stored, &mut x, &batch_here, &mut here.workspace)?;
            let none = || Error::argument("check", "masks", "one of each layer", "none");
            let got = on_gpu.mask(&here.workspace)?.ok_or_else(none)?;
            let router = moe.router().to_dtype(dtype);
            let scores = reference::router_scores(&router, &input.to_f64(), d_model);
            let [close_here, wrong_here] = differences(&moe.selection(), &scores, &got);
            (close, wrong) = (close + close_here, wrong + wrong_here);
            bits += num_tokens * moe.num_experts();
        }
    }
    let shape = format!("{bits} bits, {close} differ within the band");
    Ok(Checked::number("masks, outside the band".into(), shape, dtype, wrong as f64, 0.0))
}

/// Bits that differ from what exact scores select, within the band and outside.
fn differences(selection: &Selection, scores: &[f64], got: &ExpertMask) -> [usize; 2] {
    let num_experts = got.num_experts();
    let rounded: Vec<f32> = scores.iter().map(|&score| score as f32).collect();
    let expected = reference::select(selection, &rounded, num_experts).mask;
    let mut found = [0; 2];
    for (token, row) in scores.chunks_exact(num_experts).enumerate() {
        let max = row.iter().copied().fold(0.0, f64::max);
        let threshold = match *selection {
            Selection { rule: SelectionRule::DynamicK { rel_threshold }, max_experts: None } => {
                f64::from(rel_threshold) * max
            }
            // Where experts are counted, the last that came in decides.
            _ => expected.experts(token).map(|e| row[e]).fold(max, f64::min),
        };
        let differ = |e: &usize| expected.contains(token, *e) != got.contains(token, *e);
        for expert in (0..num_experts).filter(differ) {
            found[usize::from((row[expert] - threshold).abs() > BAND * max)] += 1;
        }
    }
    found
}

impl Checked {
    /// A number that may be at most `bar`; a NaN is no pass.
    fn number(name: String, shape: String, dtype: DType, error: f64, bar: f64) -> Self {
        let verdict = if error <= bar { Verdict::Passed } else { Verdict::Failed };
        Self { name, shape, dtype: Some(dtype), error, bar, verdict }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::EncoderShape;

    #[test]
    fn only_close_scores_may_decide_otherwise() {
        let scores = [1.0, 0.5, 0.500_04, 0.4, 0.499_97];
        let mut exact = ExpertMask::none(1, 5);
        [0, 1, 2].into_iter().for_each(|expert| exact.insert(0, expert));
        let mut close = ExpertMask::none(1, 5);
        [0, 1, 4].into_iter().for_each(|expert| close.insert(0, expert));
        let mut wrong = exact.clone();
        wrong.insert(0, 3);
        for selection in [Selection::dynamic_k(0.5), Selection::top_k(3)] {
            assert_eq!(differences(&selection, &scores, &exact), [0, 0]);
            assert_eq!(differences(&selection, &scores, &close), [2, 0]);
            assert_eq!(differences(&selection, &scores, &wrong), [0, 1]);
        }
    }

    #[test]
    fn distances_do_not_depend_on_length() {
        approx::assert_relative_eq!(distance(&[3.0, 4.0], &[6.0, 8.0]), 0.0, epsilon = 1e-12);
        approx::assert_relative_eq!(distance(&[1.0, 0.0], &[0.0, 2.0]), 1.0, epsilon = 1e-12);
    }

    #[test]
    fn with_its_own_experts_the_reference_is_itself() {
        let shape = EncoderShape {
            num_layers: 2,
            d_model: 16,
            num_heads: 2,
            d_ff: 24,
            vocab_size: 9,
            max_length: 7,
        };
        let mut encoder = Encoder::random(Reference, &shape, 0).unwrap();
        encoder.moefy_at_random(&shape, 6, 2, 1).unwrap();
        let sentences = [vec![1, 2, 3], vec![8], vec![0, 5, 5, 5, 4]];
        let mut passes = Passes::new(&encoder, &sentences).unwrap();
        for run in [FfnRun::Stored, FfnRun::Dense] {
            for (i, (own, masks)) in
                passes.embeddings(&sentences, run).unwrap().into_iter().enumerate()
            {
                let again = embedding(&encoder, &sentences[i], &masks).unwrap();
                assert!(distance(&own, &again) < 1e-12, "{run:?}, sentence {i}");
                assert_eq!(masks.iter().all(Option::is_some), run == FfnRun::Stored);
            }
        }
    }

    #[test]
    fn masks_are_split_by_sentence() {
        let mut mask = ExpertMask::none(5, 40);
        [(0, 1), (2, 39), (3, 7), (4, 0)].into_iter().for_each(|(t, e)| mask.insert(t, e));
        let some = rows(&mask, 2..4).unwrap();
        assert_eq!((some.num_tokens(), some.num_pairs()), (2, 2));
        assert!(some.contains(0, 39) && some.contains(1, 7));
    }
}
