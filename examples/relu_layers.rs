//! Converts the FFNs of a real ReLU model from their tensors (`make annalog`), and prints how far each
//! converted FFN's outputs are from the dense one's, on tokens that the conversion did not see.

use moefy::convert::{ConvertOptions, PartitionMethod, convert_ffn};
use moefy::cpu::{self, Workspace};
use moefy::ffn::{Activation, DenseFfn, FfnTensors};
use moefy::{DType, Result, TensorRef};
use safetensors::SafeTensors;

const EXPERTS: usize = 64;
const DENSITIES: [f64; 3] = [0.05, 0.1, 0.2];
const METHODS: [PartitionMethod; 3] =
    [PartitionMethod::Random, PartitionMethod::Kmeans, PartitionMethod::Joint];
const SEEDS: u64 = 3;

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: relu_layers FFNS.safetensors")?;
    let bytes = std::fs::read(&path)?;
    let file = SafeTensors::deserialize(&bytes)?;
    println!("relative output error, mean of {SEEDS} seeds; {EXPERTS} experts, D2DMoE router");
    println!("{:<11} {:>8} {:>8} {:>8} {:>8}", "layer", "density", "random", "kmeans", "joint");
    for side in ["encoder", "decoder"] {
        for layer in 0..3 {
            let name = format!("{side}.{layer}");
            let tensor = |part: &str| -> Result<TensorRef<'_>> {
                let tensor = file.tensor(&format!("{name}.{part}")).map_err(|problem| {
                    moefy::Error::file(path.as_ref(), format!("{name}.{part}: {problem}"))
                })?;
                let shape = match *tensor.shape() {
                    [rows, cols] => [rows, cols],
                    _ => [1, tensor.shape().iter().product()],
                };
                TensorRef::from_bytes(DType::F32, tensor.data(), shape)
            };
            let ffn = DenseFfn::new(
                Activation::Relu,
                FfnTensors {
                    input_bias: Some(tensor("b1")?),
                    output_bias: Some(tensor("b2")?),
                    ..FfnTensors::plain(tensor("w1")?, tensor("w2")?)
                },
            )?;
            let inputs = tensor("inputs")?.to_owned().to_f32().into_owned();
            let d_model = ffn.d_model();
            let (seen, new) = inputs.split_at(inputs.len() / d_model * 4 / 5 * d_model);
            for density in DENSITIES {
                let mut row = format!("{name:<11} {density:>8}");
                for partition in METHODS {
                    let errors =
                        (0..SEEDS).map(|seed| error(&ffn, seen, new, partition, density, seed));
                    let errors = errors.collect::<Result<Vec<f64>>>()?;
                    row += &format!(" {:>8.3}", errors.iter().sum::<f64>() / SEEDS as f64);
                }
                println!("{row}");
            }
        }
    }
    Ok(())
}

/// ‖y − y₀‖ / ‖y₀‖ over all `new` tokens.
fn error(
    ffn: &DenseFfn,
    seen: &[f32],
    new: &[f32],
    partition: PartitionMethod,
    density: f64,
    seed: u64,
) -> Result<f64> {
    let options = ConvertOptions {
        num_experts: EXPERTS,
        partition,
        density,
        seed,
        ..ConvertOptions::default()
    };
    let (moe, _) = convert_ffn(ffn, seen, &options)?;
    let (mut y, mut dense) = (vec![0.0; new.len()], vec![0.0; new.len()]);
    let mut workspace = Workspace::default();
    cpu::MoeFfn::new(&moe).run(new, &mut y, &mut workspace)?;
    cpu::DenseFfn::new(ffn).run(new, &mut dense, &mut workspace)?;
    let square =
        |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let difference = square(&mut y.iter().zip(&dense).map(|(y, dense)| y - dense));
    Ok((difference / square(&mut dense.iter().copied())).sqrt())
}
