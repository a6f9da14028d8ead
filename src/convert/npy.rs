//! NumPy's `.npy`, versions 1 to 3 (numpy.lib.format): a magic, a Python literal that says shape and
//! number format, and the values.

use bytes::Bytes;
use safetensors::Dtype;

use super::{ConvertError, Format, RawTensor, tensor::View};

/// What every file begins with.
pub const MAGIC: &[u8] = b"\x93NUMPY";

/// The longest header; NumPy itself reads none of more than 10,000 characters.
const MAX_HEADER_BYTES: usize = 64 * 1024;

/// Reads one array under a name of the caller's. `V2` is KoboldAI's bf16, as NumPy has none. One in
/// Fortran order or of the other byte order is copied, of at most `limit` bytes.
pub fn read(name: &str, bytes: Bytes, limit: u64) -> Result<RawTensor, ConvertError> {
    array(name, &bytes, limit).map_err(|reason| ConvertError::Damaged { format: Format::Npy.name(), reason })
}

fn array(name: &str, bytes: &Bytes, limit: u64) -> Result<RawTensor, String> {
    let (header, start) = header(bytes)?;
    let header = Header::parse(header)?;
    let (dtype, item, swapped) = number_format(&header.descr)?;
    let view = if header.fortran_order { View::fortran(header.shape) } else { in_order(header.shape) };
    let mut data = bytes.slice(start..);
    let held = data.len() as u64;
    let needed = view.shape.iter().try_fold(item as u64, |all, n| all.checked_mul(*n));
    if needed != Some(held) {
        let needed = needed.map_or_else(|| "far more".to_owned(), |n| n.to_string());
        return Err(format!("its shape {:?} takes {needed} bytes and it has {held}", view.shape));
    }
    if held > limit {
        return Err(format!("it has {held} bytes; the maximum is {limit}"));
    }
    if swapped {
        data = data.chunks(item).flat_map(|value| value.iter().rev().copied()).collect::<Vec<u8>>().into();
    }
    let (shape, data) = view.cut(&data, item, limit)?;
    Ok(RawTensor { name: name.to_owned(), dtype, shape, data })
}

fn in_order(shape: Vec<u64>) -> View {
    let mut strides = View::fortran(shape.iter().rev().copied().collect()).strides;
    strides.reverse();
    View { offset: 0, shape, strides }
}

/// The header's text and where the values begin.
fn header(bytes: &[u8]) -> Result<(&str, usize), String> {
    let short = || format!("it ends within its header, after {} bytes", bytes.len());
    let version = *bytes.get(MAGIC.len()).ok_or_else(short)?;
    let at = MAGIC.len() + 2;
    let (len, start) = match version {
        1 => (bytes.get(at..at + 2).map(|n| usize::from(n[0]) | usize::from(n[1]) << 8), at + 2),
        2 | 3 => (bytes.get(at..).and_then(|n| n.first_chunk()).map(|n| u32::from_le_bytes(*n) as usize), at + 4),
        other => return Err(format!("it has version {other} of the format, expected 1, 2 or 3")),
    };
    let len = len.ok_or_else(short)?;
    if len > MAX_HEADER_BYTES {
        return Err(format!("its header has {len} bytes; the maximum is {MAX_HEADER_BYTES}"));
    }
    let text = bytes.get(start..start + len).ok_or_else(short)?;
    Ok((std::str::from_utf8(text).map_err(|_| "its header is not text".to_owned())?, start + len))
}

/// The number format, its bytes a value, and whether they are big-endian.
fn number_format(descr: &str) -> Result<(Dtype, usize, bool), String> {
    let (order, kind) = match descr.as_bytes().first() {
        Some(b'<' | b'>' | b'|' | b'=') => descr.split_at(1),
        _ => ("<", descr),
    };
    let (dtype, item) = match kind {
        "f2" => (Dtype::F16, 2),
        "V2" => (Dtype::BF16, 2),
        "f4" => (Dtype::F32, 4),
        "f8" => (Dtype::F64, 8),
        // Beside a prompt in an npz archive; never a prompt themselves.
        "b1" => (Dtype::BOOL, 1),
        "i1" => (Dtype::I8, 1),
        "u1" => (Dtype::U8, 1),
        "i2" => (Dtype::I16, 2),
        "i4" => (Dtype::I32, 4),
        "i8" => (Dtype::I64, 8),
        "O" => return Err("it holds Python objects, which are never loaded; save it as float32".to_owned()),
        _ => {
            let shown: String = descr.chars().take(40).collect();
            return Err(format!("its values are {shown:?}, expected f2, f4, f8 or V2 (bf16); save it as float32"));
        }
    };
    Ok((dtype, item, order == ">"))
}

/// What the header says.
struct Header {
    descr: String,
    fortran_order: bool,
    shape: Vec<u64>,
}

impl Header {
    /// Parses `{'descr': '<f4', 'fortran_order': False, 'shape': (5, 64), }`.
    fn parse(text: &str) -> Result<Self, String> {
        let mut literal = Literal { rest: text };
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        literal.expect('{')?;
        while !literal.eat('}') {
            let key = literal.text()?;
            literal.expect(':')?;
            match key {
                "descr" => descr = Some(literal.text()?.to_owned()),
                "fortran_order" => fortran_order = Some(literal.truth()?),
                "shape" => shape = Some(literal.counts()?),
                other => return Err(format!("its header has the unknown key {:?}", short(other))),
            }
            if !literal.eat(',') {
                literal.expect('}')?;
                break;
            }
        }
        match (descr, fortran_order, shape) {
            (Some(descr), Some(fortran_order), Some(shape)) => Ok(Self { descr, fortran_order, shape }),
            _ => Err("its header lacks descr, fortran_order or shape".to_owned()),
        }
    }
}

/// The few Python literals that a header is made of.
struct Literal<'a> {
    rest: &'a str,
}

impl<'a> Literal<'a> {
    fn eat(&mut self, what: char) -> bool {
        self.rest = self.rest.trim_start();
        self.rest.strip_prefix(what).is_some_and(|rest| {
            self.rest = rest;
            true
        })
    }

    fn expect(&mut self, what: char) -> Result<(), String> {
        if self.eat(what) { Ok(()) } else { Err(format!("its header has {:?} where {what} belongs", short(self.rest))) }
    }

    fn text(&mut self) -> Result<&'a str, String> {
        let quote = if self.eat('"') { '"' } else { self.expect('\'').map(|()| '\'')? };
        let (text, rest) = self.rest.split_once(quote).ok_or("its header has a text without an end")?;
        self.rest = rest;
        Ok(text)
    }

    fn truth(&mut self) -> Result<bool, String> {
        self.rest = self.rest.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.rest.strip_prefix(word) {
                self.rest = rest;
                return Ok(value);
            }
        }
        Err(format!("its header has {:?} where True or False belongs", short(self.rest)))
    }

    fn counts(&mut self) -> Result<Vec<u64>, String> {
        const MOST: usize = 32;
        let mut counts = Vec::new();
        self.expect('(')?;
        while !self.eat(')') {
            let digits = self.rest.len() - self.rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, rest) = self.rest.split_at(digits);
            let number = number.parse().map_err(|_| format!("its shape has {:?}", short(self.rest)))?;
            // Python 2 wrote 5L.
            self.rest = rest.strip_prefix('L').unwrap_or(rest);
            counts.push(number);
            if counts.len() > MOST {
                return Err(format!("its shape has more than {MOST} dimensions"));
            }
            if !self.eat(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(counts)
    }
}

fn short(text: &str) -> String {
    text.chars().take(20).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(version: u8, header: &str, data: &[u8]) -> Bytes {
        let mut bytes = [MAGIC, &[version, 0]].concat();
        match version {
            1 => bytes.extend((header.len() as u16).to_le_bytes()),
            _ => bytes.extend((header.len() as u32).to_le_bytes()),
        }
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes.into()
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn both_orders_and_all_versions_give_the_same_values() {
        let (c, fortran) = (floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), floats(&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
        let big: Vec<u8> = [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_be_bytes()).collect();
        for version in 1..=3 {
            for (descr, order, data) in
                [("<f4", "False", &c), ("<f4", "True", &fortran), (">f4", "False", &big), ("f4", "False", &c)]
            {
                let header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': (2, 3), }}   \n");
                let tensor = read("x", npy(version, &header, data), 1000).expect(&header);
                assert_eq!((tensor.shape.as_slice(), tensor.values()), (&[2, 3][..], vec![1., 2., 3., 4., 5., 6.]));
            }
        }
    }

    #[test]
    fn what_is_not_a_matrix_of_floats_is_refused_with_the_reason() {
        let shape = |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}");
        let descr = |descr: &str| format!("{{'descr': {descr}, 'fortran_order': False, 'shape': (1,)}}");
        for (header, words) in [
            (shape("(2, 3)"), "takes 24 bytes and it has 4"),
            (shape("(18446744073709551615, 8)"), "far more"),
            (shape("(18446744073709551616,)"), "its shape has"),
            (shape("(-1, 2)"), "its shape has"),
            (shape("(1"), "where ) belongs"),
            (descr("'|O'"), "Python objects"),
            (descr("'<c8'"), "\"<c8\""),
            (descr("[('a', '<f4')]"), "where ' belongs"),
            ("{'descr': '<f4'}".to_owned(), "lacks"),
            ("{'evil': '<f4'}".to_owned(), "evil"),
            (String::new(), "where { belongs"),
        ] {
            let error = read("x", npy(1, &header, &[0; 4]), 1000).expect_err(&header).to_string();
            assert!(error.contains(words), "{header}: {error}");
        }
        let error = read("x", npy(9, "", &[]), 1000).expect_err("version 9").to_string();
        assert!(error.contains("version 9"), "{error}");
    }
}
