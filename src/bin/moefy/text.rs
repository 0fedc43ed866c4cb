//! Text files: one text per line for the commands, sentence pairs for `eval --sts`.

use std::path::Path;

use moefy::model::{Folder, Tokenizer};
use moefy::{Error, Result};

/// The lines that are not blank.
pub fn read_lines(file: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(file).map_err(Error::io("read", file))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::file(file, format!("expected UTF-8 text, got a byte that is none at offset {at}"))
    })?;
    let lines: Vec<String> =
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect();
    if lines.is_empty() {
        return Err(Error::file(file, "expected text, got nothing but blank lines"));
    }
    Ok(lines)
}

/// The token sequences of a text to calibrate on: every line, and behind it its sentences one by one,
/// so that half of the tokens are in short texts. What holds of long ones alone does not of short ones.
pub fn tokenise_calibration(folder: &Folder, file: &Path) -> Result<Vec<Vec<u32>>> {
    let lines = read_lines(file)?;
    let texts: Vec<&str> = lines.iter().flat_map(|line| with_sentences(line)).collect();
    Tokenizer::open(folder, None)?.encode(&texts)
}

/// A line, and its sentences where there are several. A sentence ends at a full stop, a question mark
/// or an exclamation mark before a space; a short one stays with the next.
fn with_sentences(line: &str) -> Vec<&str> {
    const MIN_BYTES: usize = 24;
    let mut texts = vec![line];
    let mut start = 0;
    for (space, _) in line.match_indices(' ') {
        if line[..space].ends_with(['.', '?', '!']) && space - start >= MIN_BYTES {
            texts.push(&line[start..space]);
            start = space + 1;
        }
    }
    if start > 0 && start < line.len() {
        texts.push(&line[start..]);
    }
    texts
}

/// The last part of a path, for the record.
pub fn file_name_of(file: &Path) -> String {
    file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Pairs of sentences with a similarity score.
#[derive(Debug, Default, PartialEq)]
pub struct SentencePairs {
    pub first: Vec<String>,
    pub second: Vec<String>,
    pub scores: Vec<f64>,
}

impl SentencePairs {
    /// A CSV file of three columns: sentence, sentence, score; a header is skipped.
    pub fn read(file: &Path) -> Result<Self> {
        let bytes = std::fs::read(file).map_err(Error::io("read", file))?;
        Self::parse(&bytes).map_err(|problem| Error::file(file, problem))
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut pairs = Self::default();
        let mut reader =
            csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(bytes);
        for (row, record) in reader.records().enumerate() {
            let record = record.map_err(|error| error.to_string())?;
            let line = record.position().map_or(row as u64 + 1, |at| {
                // It is before blank lines that are skipped.
                let blank = bytes[at.byte() as usize..].iter().take_while(|b| b"\r\n".contains(b));
                at.line() + blank.filter(|&&b| b == b'\n').count() as u64
            });
            let [first, second, score] = record.iter().collect::<Vec<_>>()[..] else {
                let got = record.len();
                return Err(format!(
                    "line {line}: expected 3 columns (sentence, sentence, score), got {got}"
                ));
            };
            match score.trim().parse::<f64>() {
                Ok(score) if score.is_finite() => pairs.scores.push(score),
                // A header names the column.
                Err(_) if row == 0 && !score.contains(|c: char| c.is_ascii_digit()) => continue,
                _ => {
                    return Err(format!("line {line}: expected a number as score, got `{score}`"));
                }
            }
            pairs.first.push(first.to_string());
            pairs.second.push(second.to_string());
        }
        if pairs.scores.len() < 2 {
            return Err(format!("expected at least 2 pairs, got {}", pairs.scores.len()));
        }
        if pairs.scores.iter().all(|&score| score == pairs.scores[0]) {
            return Err(format!("expected scores that differ, got {} for all", pairs.scores[0]));
        }
        Ok(pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_with_and_without_header() {
        let rows = "\"a, b\",c,1.5\nd,e,0\n";
        let expected = SentencePairs {
            first: vec!["a, b".into(), "d".into()],
            second: vec!["c".into(), "e".into()],
            scores: vec![1.5, 0.0],
        };
        assert_eq!(SentencePairs::parse(rows.as_bytes()).unwrap(), expected);
        let with_header = format!("sentence1,sentence2,score\n{rows}");
        assert_eq!(SentencePairs::parse(with_header.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn sentences_follow_their_line() {
        let line = "The first one is quite long. Dr. No wrote the second one! Third?";
        let expected =
            [line, "The first one is quite long.", "Dr. No wrote the second one!", "Third?"];
        assert_eq!(with_sentences(line), expected);
        for single in ["", "One sentence only, without an end", "A long sentence with its end. "] {
            let single = single.trim();
            assert_eq!(with_sentences(single), [single]);
        }
    }

    #[test]
    fn errors_name_the_line() {
        let error = |text: &str| SentencePairs::parse(text.as_bytes()).unwrap_err();
        assert!(error("a,b,1\nc,d\n").contains("line 2"));
        assert!(error("a,b,1\n\nc,d,x\n").contains("line 3"));
        assert!(error("a,b,\"1,5\"\nc,d,2\n").contains("`1,5`"));
        assert!(error("a,b,1\nc,d,1\n").contains("got 1 for all"));
        assert!(error("a,b,1\nc,d,nan\n").contains("`nan`"));
        assert!(error("a,b,1\n").contains("at least 2"));
        assert!(error("").contains("got 0"));
    }

    #[test]
    fn any_bytes_are_an_error_or_pairs() {
        bolero::check!().with_test_time(fuzz_time()).for_each(|bytes: &[u8]| {
            if let Ok(pairs) = SentencePairs::parse(bytes) {
                assert_eq!(pairs.first.len(), pairs.scores.len());
                assert_eq!(pairs.second.len(), pairs.scores.len());
            }
        });
    }

    /// A tenth of the time that all parsers are fuzzed.
    fn fuzz_time() -> std::time::Duration {
        let seconds = std::env::var("MOEFY_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
        std::time::Duration::from_secs_f64(seconds.unwrap_or(2.0) / 10.0)
    }
}
