//! Compiles the CUDA kernels, where the feature `cuda` asks for them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda();
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
