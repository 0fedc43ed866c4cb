//! Every kernel on the GPU of this machine, against the reference. Without a GPU each test is
//! skipped, and counted; with MOEFY_REQUIRE_GPU=1 a skip is a failure. MOEFY_TEST_SMALL=1 keeps the
//! shapes small, for tools that slow the device down, and MOEFY_TEST_SEED draws the inputs of an
//! earlier run again.

mod abi;
mod bad_input;
mod body;
#[path = "../common/mod.rs"]
mod common;
mod dense;
mod emulation;
mod experts;
mod ffn_few;
mod harness;
mod interop;
mod layers;
mod plan;
mod random_layers;
mod route_index;
mod router_select;
mod select;
mod steady;
#[path = "../support/mod.rs"]
mod support;
mod token_tiles;
mod transformer;

use std::process::ExitCode;
use std::sync::Arc;

use harness::Gpu;
use libtest_mimic::{Arguments, Failed, Trial};

/// Name and body of each test.
type Tests = Vec<(&'static str, fn(&Gpu))>;

fn main() -> ExitCode {
    let tests: Tests = [
        abi::tests(),
        body::tests(),
        bad_input::tests(),
        experts::tests(),
        ffn_few::tests(),
        layers::tests(),
        plan::tests(),
        dense::tests(),
        interop::tests(),
        route_index::tests(),
        router_select::tests(),
        select::tests(),
        steady::tests(),
        token_tiles::tests(),
        transformer::tests(),
    ]
    .concat();
    let mut arguments = Arguments::from_args();
    // They would wait for each other's captures and see each other's memory.
    arguments.test_threads = Some(1);

    let required = std::env::var_os("MOEFY_REQUIRE_GPU").is_some_and(|value| value == "1");
    let trials = match Gpu::open() {
        Ok(gpu) => {
            println!("{gpu}");
            let gpu = Arc::new(gpu);
            let trial = |(name, body): (&'static str, fn(&Gpu))| {
                let gpu = gpu.clone();
                Trial::test(name, move || {
                    body(&gpu);
                    Ok(())
                })
            };
            tests.into_iter().map(trial).collect()
        }
        Err(error) if required => {
            let fail = |(name, _)| {
                let reason = format!("MOEFY_REQUIRE_GPU=1, but {error}");
                Trial::test(name, || Err(Failed::from(reason)))
            };
            tests.into_iter().map(fail).collect::<Vec<_>>()
        }
        Err(error) => {
            println!("SKIPPED no GPU: {error}");
            let skip = |(name, _)| Trial::test(name, || Ok(())).with_ignored_flag(true);
            tests.into_iter().map(skip).collect()
        }
    };
    let conclusion = libtest_mimic::run(&arguments, trials);
    let (passed, failed) = (conclusion.num_passed, conclusion.num_failed);
    println!("{passed} passed, {failed} failed, {} skipped", conclusion.num_ignored);
    conclusion.exit_code()
}
