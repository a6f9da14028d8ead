#!/usr/bin/env bash
# Measures softserve on a GPU and beside transformers, in one run of at most 8 minutes. See README.md.
#
#     benches/gpu/run.sh [PROGRAM] [RESULTS.json]
#
# PROGRAM is the program built with `--features cuda`, perhaps compressed (.xz), and is target/release/softserve unless
# said. The machine needs nvidia-smi, python3 with torch and transformers, and the libraries of CUDA 13, which may be
# those of PyTorch's wheels.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
program=${1:-$here/../../target/release/softserve} results=${2:-gpu.json}
case $program in
*.xz)
    unpacked=$(mktemp)
    trap 'rm -f "$unpacked"' EXIT
    python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$program" "$unpacked"
    chmod +x "$unpacked"
    program=$unpacked
    ;;
esac
# The driver's folder, and wherever CUDA's libraries are.
folders=/usr/local/nvidia/lib64
for library in libcublas.so.13 libcurand.so.10 libcudart.so.13; do
    found=$(find / -xdev -name "$library" -not -path '*/stubs/*' 2>/dev/null | head -1 || true)
    if [ -n "$found" ]; then folders=$folders:$(dirname "$found"); fi
done
export LD_LIBRARY_PATH=$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec python3 "$here/run.py" --program "$program" --json "$results"
