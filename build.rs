//! Compiles the CUDA kernels, where the feature `cuda` asks for them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    {
        cuda();
        driver();
    }
}

/// `src/kernels/cuda/cu/all.cu` to PTX, which the driver compiles for the GPU at hand when the program starts. One file
/// of compute capability 8.0 runs on all that is newer.
#[cfg(feature = "cuda")]
fn cuda() {
    const FOLDER: &str = "src/kernels/cuda/cu";
    println!("cargo::rerun-if-changed={FOLDER}");
    // By name: of a folder, only headers are looked at.
    let files = std::fs::read_dir(FOLDER).into_iter().flatten().flatten().map(|file| file.path());
    let built = cudaforge::KernelBuilder::new()
        .compute_cap(80)
        .source_files([format!("{FOLDER}/all.cu")])
        .watch(files)
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx();
    if let Err(error) = built {
        println!(
            "cargo::error=the CUDA kernels were not compiled: {error}. CUDA 12.4 or newer has to be on PATH (nvcc), or \
             `source .ci/cuda-env` fetches it; a build without `--features cuda` needs none of it."
        );
    }
}

/// The functions of the driver's library, as `src/kernels/cuda/driver.rs` includes them: their names, a table of as many
/// addresses, and for each name a jump to where its entry points.
#[cfg(feature = "cuda")]
fn driver() {
    use std::{collections::BTreeSet, env, fmt::Write as _, fs, path::Path};

    let of_target = |key: &str| env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    let jump = |entry: usize| match of_target("ARCH").as_str() {
        "x86_64" => Some(format!("jmp qword ptr [rip + softserve_driver_table + {}]", 8 * entry)),
        "aarch64" => Some(format!(
            "adrp x16, softserve_driver_table + {at}\nldr x16, [x16, :lo12:softserve_driver_table + {at}]\nbr x16",
            at = 8 * entry
        )),
        _ => None,
    };
    // A function is what the headers name so: its versions and variants, and the macros that choose one.
    let is_function = |word: &&str| word.strip_prefix("cu").is_some_and(|rest| rest.starts_with(char::is_uppercase));
    let mut names = BTreeSet::new();
    let toolkit = cudaforge::CudaToolkit::detect();
    let is_known = of_target("OS") == "linux" && jump(0).is_some();
    if let Some(folder) = toolkit.ok().map(|toolkit| toolkit.include_dir).filter(|_| is_known) {
        for header in ["cuda.h", "cudaProfiler.h"] {
            let text = fs::read_to_string(folder.join(header)).unwrap_or_default();
            let words = text.split(|c: char| c != '_' && !c.is_ascii_alphanumeric());
            names.extend(words.filter(is_function).map(str::to_owned));
        }
    }
    let mut assembly = String::new();
    for (entry, name) in names.iter().enumerate() {
        let jump = jump(entry).unwrap_or_default();
        let _ = writeln!(assembly, ".globl {name}\n.hidden {name}\n.type {name}, %function\n{name}:\n{jump}");
    }
    let listed: String = names.iter().map(|name| format!("c\"{name}\", ")).collect();
    let count = names.len();
    let text = format!(
        "const NAMES: [&CStr; {count}] = [{listed}];\n\
         std::arch::global_asm!(r#\"\n.data\n.balign 8\n.globl softserve_driver_table\n.hidden softserve_driver_table\n\
         softserve_driver_table:\n.rept {count}\n.quad {{is_missing}}\n.endr\n.text\n{assembly}\"#, is_missing = sym is_missing);\n"
    );
    let folder = env::var("OUT_DIR").unwrap_or_default();
    if let Err(error) = fs::write(Path::new(&folder).join("driver.rs"), text) {
        println!("cargo::error=the driver's functions cannot be written to {folder}: {error}");
    }
}
