//! Uploads: zip, tar, tar.gz and single files.
#![no_main]
#[path = "fit.rs"]
#[allow(dead_code)]
mod fit;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use softserve::registry::package::{self, Packing};

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::copy_from_slice(data);
    for packing in [Packing::Safetensors, Packing::Zip, Packing::Tar, Packing::TarGz] {
        if let Ok(package::Upload { files, .. }) = package::unpack(packing, bytes.clone(), fit::LIMIT) {
            assert!(files.num_bytes() <= fit::LIMIT);
            fit::read(&files);
        }
    }
});
