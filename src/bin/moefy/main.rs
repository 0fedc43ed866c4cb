//! The `moefy` command. Exit codes: 0 success, 1 something went wrong (one sentence on standard
//! error), 2 wrong usage.

#[cfg(feature = "cuda")]
mod bench;
mod chart;
#[cfg(feature = "cuda")]
mod check;
mod convert;
mod embed;
mod eval;
mod explain;
mod inspect;
mod output;
mod progress;
mod restore;
mod retune;
mod text;
#[cfg(feature = "cuda")]
mod tune;
mod tuning;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Turn the dense feed-forward layers of a Transformer into mixtures of experts.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, args_override_self = true)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Args)]
#[command(next_help_heading = "Options of every command")]
struct Common {
    /// Threads to use, at most 1024 [default: one per core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// No progress bars
    #[arg(long, global = true)]
    quiet: bool,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
}

/// Where a model runs.
#[derive(clap::Args)]
struct Place {
    /// Where to run
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    /// Type of weights and activations on a GPU: f16, bf16, f32 [default: f16]; the CPU computes in f32
    #[arg(long, value_name = "TYPE", value_parser = dtype)]
    dtype: Option<moefy::DType>,
    /// Leave what `moefy tune` measured on this GPU aside
    #[arg(long)]
    no_tuning: bool,
}

#[derive(Clone, Copy, Default, PartialEq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Device {
    #[default]
    Cpu,
    Cuda,
}

fn dtype(name: &str) -> Result<moefy::DType, String> {
    serde_json::from_value(name.into()).map_err(|error| error.to_string())
}

impl Place {
    /// What only a GPU knows is refused elsewhere.
    fn check(&self) -> moefy::Result<()> {
        let given = [("--dtype", self.dtype.is_some()), ("--no-tuning", self.no_tuning)];
        match given.into_iter().find(|(_, is_given)| *is_given && self.device == Device::Cpu) {
            Some((option, _)) => {
                let expected = "given together with --device cuda";
                Err(moefy::Error::argument("moefy", option, expected, "the CPU"))
            }
            None => Ok(()),
        }
    }

    /// The GPU as a backend, with the function that the model has on a CPU.
    fn gpu(&self, common: &Common) -> moefy::Result<moefy::cuda::Gpu> {
        use moefy::cuda::{Fallback, Gpu, GpuOptions};
        let mut device = moefy::cuda::Device::open(0)?;
        if !self.no_tuning {
            tuning::apply(&mut device, common);
        }
        let options = GpuOptions { fallback: Fallback::Masked, ..GpuOptions::default() };
        let dtype = self.dtype.unwrap_or(moefy::DType::F16);
        Gpu::new(&std::sync::Arc::new(device), dtype, options)
    }
}

#[derive(Subcommand)]
enum Command {
    /// Convert a model: split its FFNs into experts, train routers, calibrate the threshold
    Convert(convert::Convert),
    /// Change the threshold of a converted model without converting again, or the type of its weights
    Retune(retune::Retune),
    /// Write the dense model again, every tensor bit-identical
    Restore(restore::Restore),
    /// Show what a model folder holds, layer by layer
    Inspect(inspect::Inspect),
    /// Compare a converted model with its dense original: quality, density, cost, speed
    Eval(eval::Eval),
    /// Embed texts
    Embed(embed::Embed),
    /// Compare what the kernels give on the GPU of this machine with the reference
    #[cfg(feature = "cuda")]
    Check(check::Check),
    /// Measure on a GPU
    #[cfg(feature = "cuda")]
    Bench(bench::Bench),
    /// Measure the paths of a layer on this GPU once, so that plans choose by what they take here
    #[cfg(feature = "cuda")]
    Tune(tune::Tune),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(Cli { common, command }: Cli) -> moefy::Result<()> {
    if let Some(threads) = common.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global().map_err(
            |error| {
                let got = format!("{threads} ({error})");
                moefy::Error::argument("moefy", "--threads", "what the system can start", got)
            },
        )?;
    }
    match command {
        Command::Convert(command) => command.run(&common),
        Command::Retune(command) => command.run(&common),
        Command::Restore(command) => command.run(&common),
        Command::Inspect(command) => command.run(&common),
        Command::Eval(command) => command.run(&common),
        Command::Embed(command) => command.run(&common),
        #[cfg(feature = "cuda")]
        Command::Check(command) => command.run(&common),
        #[cfg(feature = "cuda")]
        Command::Bench(command) => command.run(&common),
        #[cfg(feature = "cuda")]
        Command::Tune(command) => command.run(&common),
    }
}
