//! NumPy arrays.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use softserve::convert::npy;

fuzz_target!(|data: &[u8]| {
    if let Ok(tensor) = npy::read("x", Bytes::copy_from_slice(data), 1 << 20) {
        assert!(tensor.data.len() <= data.len());
    }
});
