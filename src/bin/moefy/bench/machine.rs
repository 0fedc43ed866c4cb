//! What a benchmark ran on.

use std::process::Command;

use moefy::DType;
use moefy::cuda::Device;
use moefy::cuda::bench::Limits;

/// One line: device, driver, clocks while it is still busy, and what it can do at best.
pub fn describe(device: &Device, dtype: DType, limits: &Limits) -> String {
    let properties = device.properties();
    let [driver, clocks] = system().unwrap_or_default();
    let (major, minor) = properties.driver;
    format!(
        "{}, {driver}CUDA {major}.{minor}, {clocks}reads {:.2} TB/s, copies {:.2} TB/s, {dtype} \
         products {:.0} TFLOP/s",
        properties.name,
        limits.read_bytes_per_second / 1e12,
        limits.copy_bytes_per_second / 1e12,
        limits.flops_per_second / 1e12,
    )
}

/// What the CUDA driver does not tell, if the system's own tool is there and sees one GPU.
fn system() -> Option<[String; 2]> {
    let query = "--query-gpu=driver_version,clocks.sm,clocks.mem";
    let output = Command::new("nvidia-smi").args([query, "--format=csv,noheader"]).output().ok()?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

/// "580.1, 1980 MHz, 2619 MHz"
fn parse(text: &str) -> Option<[String; 2]> {
    let mut lines = text.lines();
    let (line, None) = (lines.next()?, lines.next()) else { return None };
    let [driver, sm, memory] = line.split(", ").collect::<Vec<_>>()[..] else { return None };
    Some([format!("driver {driver}, "), format!("clocks {sm} and {memory} (memory), ")])
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn only_one_gpu_is_described() {
        let one = "580.159.04, 1980 MHz, 2619 MHz\n";
        assert_eq!(parse(one).unwrap()[1], "clocks 1980 MHz and 2619 MHz (memory), ");
        assert_eq!(parse(&one.repeat(2)), None);
        assert_eq!(parse("No devices were found"), None);
    }
}
