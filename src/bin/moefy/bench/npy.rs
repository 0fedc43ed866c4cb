//! Arrays as numpy saves them, as far as masks need it: two dimensions of bytes.

/// A row-major matrix of bytes.
#[derive(Debug, PartialEq)]
pub struct Bytes {
    pub shape: [usize; 2],
    pub data: Vec<u8>,
}

impl Bytes {
    /// Reads the content of a `.npy` file. The error is the rest of a sentence about it.
    pub fn parse(file: &[u8]) -> Result<Self, String> {
        let cut = || "expected an .npy file, got the beginning of one".to_string();
        let rest = file.strip_prefix(b"\x93NUMPY").ok_or("expected an .npy file, got another")?;
        let (version, rest) = rest.split_at_checked(2).ok_or_else(cut)?;
        // Version 1 counts its header in 2 bytes, later ones in 4.
        let digits = if version[0] == 1 { 2 } else { 4 };
        let (len, rest) = rest.split_at_checked(digits).ok_or_else(cut)?;
        let len = len.iter().rev().fold(0, |len, &byte| len << 8 | usize::from(byte));
        let (header, data) = rest.split_at_checked(len).ok_or_else(cut)?;
        let mut header = String::from_utf8_lossy(header).into_owned();
        header.retain(|c| !c.is_whitespace());

        if !header.contains("'descr':'|u1'") || !header.contains("'fortran_order':False") {
            return Err(format!("expected rows of u8, got {header}"));
        }
        let shape =
            parse_shape(&header).filter(|[rows, cols]| rows.checked_mul(*cols) == Some(data.len()));
        let shape = shape.ok_or_else(|| {
            format!("expected two sizes that multiply to its {} bytes, got {header}", data.len())
        })?;
        Ok(Self { shape, data: data.to_vec() })
    }
}

fn parse_shape(header: &str) -> Option<[usize; 2]> {
    let (sizes, _) = header.split_once("'shape':(")?.1.split_once(')')?;
    let (rows, cols) = sizes.split_once(',')?;
    Some([rows.parse().ok()?, cols.parse().ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let len = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", &len[..], header.as_bytes(), data].concat()
    }

    #[test]
    fn a_matrix_of_bytes() {
        let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }  \n";
        let read = Bytes::parse(&file(header, &[1, 2, 3, 4, 5, 6])).unwrap();
        assert_eq!(read, Bytes { shape: [2, 3], data: vec![1, 2, 3, 4, 5, 6] });
        // Version 2.
        let mut other = file(header, &[1, 2, 3, 4, 5, 6]);
        other[6] = 2;
        other.splice(10..10, [0, 0]);
        assert_eq!(Bytes::parse(&other).unwrap(), read);
    }

    #[test]
    fn anything_else_is_refused() {
        let refused = |file: &[u8]| Bytes::parse(file).unwrap_err();
        let header = |descr, order, shape: &str| {
            format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}")
        };
        assert!(refused(b"text").contains("got another"));
        assert!(refused(b"\x93NUMPY\x01\x00\xff\xff{}").contains("beginning"));
        assert!(refused(&file(&header("<f4", "False", "(1, 1)"), &[0; 4])).contains("<f4"));
        assert!(refused(&file(&header("|u1", "True", "(2, 3)"), &[0; 6])).contains("True"));
        assert!(refused(&file(&header("|u1", "False", "(2, 3)"), &[0; 5])).contains("5 bytes"));
        assert!(refused(&file(&header("|u1", "False", "(6,)"), &[0; 6])).contains("(6,)"));
        let huge = format!("({}, {})", usize::MAX, 2);
        assert!(refused(&file(&header("|u1", "False", &huge), &[0; 6])).contains("6 bytes"));
    }
}
