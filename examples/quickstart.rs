//! Turns one FFN into a mixture of experts, runs it, and compares it with the dense FFN.

use moefy::convert::{ConvertOptions, convert_ffn};
use moefy::cpu::{self, Workspace};
use moefy::ffn::{Activation, DenseFfn, FfnTensors};
use moefy::{Result, TensorRef};
use rand::{RngExt, SeedableRng};

const D_MODEL: usize = 64;
const D_FF: usize = 256;

fn main() -> Result<()> {
    // Stand-ins for an engine's weights, and for inputs that this FFN saw on a calibration text.
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let mut random = |len| (0..len).map(|_| rng.random_range(-0.2f32..0.2)).collect::<Vec<_>>();
    let (w1, w2, inputs) = (random(D_FF * D_MODEL), random(D_MODEL * D_FF), random(4096 * D_MODEL));

    let w1 = TensorRef::matrix(&w1, [D_FF, D_MODEL])?;
    let w2 = TensorRef::matrix(&w2, [D_MODEL, D_FF])?;
    let dense = DenseFfn::new(Activation::Gelu, FfnTensors::plain(w1, w2))?;
    let options = ConvertOptions { num_experts: 16, density: 0.5, ..ConvertOptions::default() };
    let (moe, report) = convert_ffn(&dense, &inputs, &options)?;

    let (mut y, mut y_dense) = (vec![0.0; inputs.len()], vec![0.0; inputs.len()]);
    let mut workspace = Workspace::default();
    cpu::MoeFfn::new(&moe).run(&inputs, &mut y, &mut workspace)?;
    cpu::DenseFfn::new(&dense).run(&inputs, &mut y_dense, &mut workspace)?;

    let norm = |values: &[f32]| values.iter().map(|v| v * v).sum::<f32>().sqrt();
    let difference: Vec<f32> = y.iter().zip(&y_dense).map(|(y, dense)| y - dense).collect();
    println!("density {:.3}", report.statistics.density);
    println!("relative error {:.3}", norm(&difference) / norm(&y_dense));
    Ok(())
}
