//! What the README shows is what is compiled and run.

#[test]
fn the_quickstart_is_the_example() {
    let example = include_str!("../examples/quickstart.rs");
    assert!(include_str!("../README.md").contains(&format!("```rust\n{example}```")));
}
