//! A pickle machine that can build tensors and nothing else. It knows the few opcodes that
//! `torch.save` writes (pickletools.py documents them) and seven kinds of globals by name; whatever
//! else a pickle asks for is refused, by its name, before it is looked at. No code runs.
//!
//! Values lie in one list and refer to each other by index, so that neither sharing nor nesting nor
//! a cycle can cost more than the bytes that wrote it.

mod machine;

use safetensors::Dtype;

use super::tensor::View;

/// The most bytes of one pickle. The values of tensors lie beside it, not in it.
pub const MAX_BYTES: usize = 1024 * 1024;

/// The most bytes of a pickle that has the values of its tensors in it.
pub const MAX_BARE_BYTES: usize = 64 * 1024 * 1024;

/// Why a pickle is not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// It asks for a function or a class that is not one of a tensor's.
    #[error("it asks for {0}")]
    Global(String),
    #[error("{reason}, at byte {at} of its pickle")]
    Damaged { reason: String, at: usize },
}

/// Names a value in its [`Pickle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ref(usize);

/// A value.
#[derive(Debug, Clone)]
pub enum Node<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float,
    Text(&'a str),
    Bytes(&'a [u8]),
    Tuple(Vec<Ref>),
    List(Vec<Ref>),
    Dict(Vec<(Ref, Ref)>),
    Global(Global),
    Storage(Storage<'a>),
    /// A storage as a file of `torch.save` within the pickle.
    SavedStorage(&'a [u8]),
    Tensor(Ref, View),
}

/// What a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// In a bare pickle only: where `torch.save` wrote the pickle, storages lie beside it.
    LoadFromBytes,
    Storage(Dtype),
}

/// The flat values behind tensors, which lie elsewhere in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storage<'a> {
    pub key: &'a str,
    pub dtype: Dtype,
    /// In values.
    pub len: u64,
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch.storage", "_load_from_bytes") => Self::LoadFromBytes,
            ("torch", "FloatStorage") => Self::Storage(Dtype::F32),
            ("torch", "DoubleStorage") => Self::Storage(Dtype::F64),
            ("torch", "HalfStorage") => Self::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Dtype::BF16),
            ("torch", "LongStorage") => Self::Storage(Dtype::I64),
            ("torch", "IntStorage") => Self::Storage(Dtype::I32),
            ("torch", "ShortStorage") => Self::Storage(Dtype::I16),
            ("torch", "CharStorage") => Self::Storage(Dtype::I8),
            ("torch", "ByteStorage") => Self::Storage(Dtype::U8),
            ("torch", "BoolStorage") => Self::Storage(Dtype::BOOL),
            _ => return None,
        })
    }
}

/// What one pickle built.
#[derive(Debug)]
pub struct Pickle<'a> {
    nodes: Vec<Node<'a>>,
    root: Ref,
    /// The bytes it took.
    pub len: usize,
}

impl<'a> Pickle<'a> {
    /// Runs the pickle that `bytes` begin with, as `torch.save` writes it: the values of tensors lie elsewhere.
    pub fn read(bytes: &'a [u8]) -> Result<Self, PickleError> {
        machine::run(bytes, false)
    }

    /// Runs a pickle that Python's `pickle` made of tensors: their values lie in it.
    pub fn read_bare(bytes: &'a [u8]) -> Result<Self, PickleError> {
        machine::run(bytes, true)
    }

    /// The value that the pickle is.
    pub fn root(&self) -> Ref {
        self.root
    }

    /// A value.
    pub fn get(&self, at: Ref) -> &Node<'a> {
        self.nodes.get(at.0).unwrap_or(&Node::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_global_that_is_no_tensors_is_refused_by_its_name_however_it_is_asked_for() {
        let short = |text: &str| [&[0x8c, text.len() as u8], text.as_bytes()].concat();
        for (pickle, name) in [
            (b"cos\nsystem\n(S'true'\ntR.".to_vec(), "os.system"),
            (b"\x80\x02cposix\nsystem\nq\x00.".to_vec(), "posix.system"),
            (b"(S'true'\nios\nsystem\n.".to_vec(), ""),
            (b"(ios\nsystem\n.".to_vec(), "os.system"),
            ([&b"\x80\x04"[..], &short("builtins"), &short("eval"), b"\x93."].concat(), "builtins.eval"),
            (b"\x80\x02ctorch\nload\n.".to_vec(), "torch.load"),
            (b"\x80\x02ctorch.storage\n_load_from_bytes\n.".to_vec(), "torch.storage._load_from_bytes"),
        ] {
            match Pickle::read(&pickle) {
                Err(PickleError::Global(found)) => assert_eq!(found, name),
                Err(PickleError::Damaged { .. }) => assert_eq!(name, ""),
                Ok(found) => panic!("{found:?}"),
            }
        }
    }

    #[test]
    fn broken_and_endless_pickles_are_refused() {
        for bad in [
            &b""[..],
            b".",
            b"0.",
            b"((0.",
            b"K\x01(\x85.",
            b"t.",
            b"\x85.",
            b"}K\x01s.",
            b"](K\x01K\x02u.",
            b"}(K\x01u.",
            b"h\x00.",
            b"q\x00.",
            b"X\xff\xff\xff\xffa.",
            b"\x8a\x09123456789.",
            b"X\x01\x00\x00\x00\xff.",
            b"c\xff\n\n.",
            b"cos",
            b"NR.",
            b")Q.",
            b"ccollections\nOrderedDict\nK\x01\x85R.",
            b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x00)tR.",
            b"\x81.",
            b"\xff.",
        ] {
            assert!(matches!(Pickle::read(bad), Err(PickleError::Damaged { .. })), "{bad:?}");
        }
        let endless = vec![b'N'; MAX_BYTES + 8];
        assert!(Pickle::read(&endless).is_err());
        let long = [&b"X\xff\xff\x0f\x00"[..], &vec![b'a'; MAX_BYTES]].concat();
        assert!(Pickle::read(&long).expect_err("long").to_string().contains("longer than"));
    }

    #[test]
    fn sharing_nesting_and_cycles_cost_no_more_than_their_bytes() {
        // A tuple that holds the last one twice, 8,000 deep: 2 to the 8,000 leaves.
        let mut shared = b")q\x00".to_vec();
        for _ in 0..8_000 {
            shared.extend(b"0h\x00h\x00\x86q\x00");
        }
        shared.push(b'.');
        assert!(Pickle::read(&shared).is_ok());
        let nested = [&b")"[..], &[0x85].repeat(16_000), b"."].concat();
        assert!(Pickle::read(&nested).is_ok());
        assert!(Pickle::read(b"]q\x00h\x00a.").is_ok());
    }
}
