//! The driver's library, found when a GPU is first asked for.
//!
//! candle links to `libcuda.so.1`, which comes with the driver: where there is none, the system's loader would not start the
//! program at all, not even on the CPU. So `build.rs` defines the library's functions here, each as a jump through a table,
//! and the program needs no such library to start. [`load`] opens it and fills the table.

use std::{
    ffi::{CStr, c_int, c_void},
    sync::{
        OnceLock,
        atomic::{AtomicPtr, Ordering},
    },
};

use candle_core::{Result, bail};

// `NAMES`, the functions' names, and in the same order `softserve_driver_table`, the addresses that they jump to. There are
// none for a processor whose jump build.rs does not know: then the library is linked to as usual.
include!(concat!(env!("OUT_DIR"), "/driver.rs"));

unsafe extern "C" {
    static softserve_driver_table: [AtomicPtr<c_void>; NAMES.len()];
}

/// What a function of the driver returns where it is not there: `CUDA_ERROR_STUB_LIBRARY`.
extern "C" fn is_missing() -> c_int {
    34
}

/// Opens the driver's library, once.
///
/// # Errors
/// There is no such library, or the system's loader refuses it.
pub fn load() -> Result<()> {
    static LOADED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    match LOADED.get_or_init(|| if NAMES.is_empty() { Ok(()) } else { fill() }) {
        Ok(()) => Ok(()),
        Err(reason) => bail!("{reason}"),
    }
}

fn fill() -> std::result::Result<(), String> {
    // SAFETY: the name is a C string; the library's initialisers are those of the driver that the user installed.
    let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if library.is_null() {
        // SAFETY: after a failure dlerror gives a C string, which this thread's next call would replace.
        let error = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
        return Err(format!(
            "NVIDIA's driver is not installed, or not given to this container (docker run --gpus all): {error}"
        ));
    }
    // SAFETY: the table is a static of this program, defined by build.rs with as many entries as there are names.
    let table = unsafe { &softserve_driver_table };
    for (entry, name) in table.iter().zip(NAMES) {
        // SAFETY: the library is open and never closed, and the name is a C string.
        let function = unsafe { libc::dlsym(library, name.as_ptr()) };
        if !function.is_null() {
            entry.store(function, Ordering::Release);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_there_is_an_error_that_names_its_library() {
        if !NAMES.is_empty() {
            assert!(NAMES.contains(&c"cuInit") && NAMES.contains(&c"cuMemAllocAsync"));
        }
        if let Err(error) = load() {
            assert!(error.to_string().contains("libcuda.so.1"), "{error}");
        }
        // Whether there is a driver or not, asking for a GPU that no machine has does not end the process.
        assert!(super::super::device(4096).is_err());
    }
}
