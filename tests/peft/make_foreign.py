#!/usr/bin/env python3
"""Make tests/fixtures/foreign: one prompt of llama-tied as other programs would have written it.

    pip install -r tests/peft/requirements.txt numpy
    python3 tests/peft/make_foreign.py            # rewrites tests/fixtures/foreign

All files hold the rows of tests/fixtures/llama-tied/prompts/prompt7, as the real writers lay them
out: numpy.save, torch.save, PEFT with safe_serialization=False. What KoboldAI, TGIS and NeMo wrap
around them is made by hand after their sources. The files in hostile/ are such that a careless
reader would run a command, or allocate without bound.
"""
import collections
import io
import json
import pathlib
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import torch
from numpy.lib import format as npy_format
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
MODEL = FIXTURES / "llama-tied"
PROMPT = MODEL / "prompts" / "prompt7"
OUT = FIXTURES / "foreign"


def rows():
    return load_file(PROMPT / "adapter_model.safetensors")["prompt_embeddings"]


def bf16_bytes(tensor):
    """NumPy has no bf16: KoboldAI keeps the raw bytes as V2."""
    return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view("V2")


def safetensors_files(t):
    save_file({"soft_prompt": t.clone()}, OUT / "soft_prompt.safetensors")
    save_file({"embedding.weight": t.to(torch.float16)}, OUT / "embedding.safetensors")
    save_file({"front": t.clone(), "back": t.clone(), "steps": torch.tensor([3])}, OUT / "two.safetensors")


def npy_files(t):
    a = t.numpy()
    np.save(OUT / "c.npy", a)
    np.save(OUT / "fortran.npy", np.asfortranarray(a))
    np.save(OUT / "f64.npy", a.astype("f8"))
    np.save(OUT / "f16.npy", a.astype("f2"))
    np.save(OUT / "big-endian.npy", a.astype(">f4"))
    np.save(OUT / "bf16.npy", bf16_bytes(t))
    np.save(OUT / "one-batch.npy", a[None])
    for version in (2, 3):
        with open(OUT / f"version{version}.npy", "wb") as file:
            npy_format.write_array(file, a, version=(version, 0))
    np.savez(OUT / "arrays.npz", soft_prompt=a, steps=np.arange(3))


def kobold(t):
    meta = {"name": "Cats", "author": "a tester", "supported": "Tiny", "description": "Stories\nof cats."}
    with zipfile.ZipFile(OUT / "kobold.zip", "w", zipfile.ZIP_DEFLATED) as z:
        tensor = io.BytesIO()
        np.save(tensor, t.numpy())
        z.writestr("tensor.npy", tensor.getvalue())
        z.writestr("meta.json", json.dumps(meta))


def torch_files(t):
    (OUT / "tgis").mkdir()
    torch.save(t, OUT / "tgis" / "decoder.pt")
    torch.save(t, OUT / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(t.t().contiguous().t(), OUT / "transposed.pt")
    torch.save({"soft_prompt": torch.nn.Parameter(t), "step": 3}, OUT / "parameter.pt")
    embedding = torch.nn.Embedding(*t.shape)
    embedding.weight.data = t
    torch.save(embedding.state_dict(), OUT / "state_dict.pt")
    # A slice of a larger storage.
    torch.save(torch.cat([t + 1, t, t + 2])[t.shape[0]:2 * t.shape[0]], OUT / "slice.pt")


def peft_pickle():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), PROMPT)
    model.save_pretrained(OUT / "peft-bin", safe_serialization=False)
    (OUT / "peft-bin" / "README.md").unlink()
    # It is the same adapter: only the path of the model that was loaded just now differs.
    shutil.copy(PROMPT / "adapter_config.json", OUT / "peft-bin")


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def nemo(t):
    def checkpoint(tables):
        out = io.BytesIO()
        torch.save({"prompt_table": {f"prompt_table.{k}.prompt_embeddings.weight": v for k, v in tables.items()}}, out)
        return out.getvalue()

    def config(template):
        return f"task_templates:\n- taskname: cats\n  prompt_template: '{template}'\n  total_virtual_tokens: 7\n".encode()

    with tarfile.open(OUT / "tasks.nemo", "w:gz") as tar:
        add(tar, "./model_config.yaml", config("<|VIRTUAL_PROMPT_0|>{text} is about:{label}"))
        add(tar, "./model_weights.ckpt", checkpoint({"cats": t, "dogs": t + 1}))
    with tarfile.open(OUT / "middle.nemo", "w") as tar:
        add(tar, "model_config.yaml", config("{text}<|VIRTUAL_PROMPT_0|> is about:{label}"))
        add(tar, "model_weights.ckpt", checkpoint({"cats": t}))


class Command:
    """Pickles to a call of os.system."""

    def __reduce__(self):
        import os
        return os.system, ("touch pwned",)


def hostile(t):
    folder = OUT / "hostile"
    folder.mkdir()
    torch.save({"prompt_embeddings": t, "x": Command()}, folder / "command.pt")
    torch.save({"prompt_embeddings": t, "x": Command()}, folder / "command-legacy.pt",
               _use_new_zipfile_serialization=False)
    (folder / "command-bare.pkl").write_bytes(pickle.dumps(Command()))
    np.save(folder / "object.npy", np.array([Command()], dtype=object), allow_pickle=True)
    torch.save(torch.zeros(1).expand(100_000, 100_000), folder / "expanded.pt")
    torch.save(torch.zeros(2, 2).to_sparse(), folder / "sparse.pt")
    torch.save(collections.OrderedDict(prompt=torch.zeros(2, 32, dtype=torch.int64)), folder / "integers.pt")
    t = t.clone()
    t[3, 5] = float("nan")
    np.save(folder / "nan.npy", t.numpy())
    with open(folder / "huge-shape.npy", "wb") as file:
        npy_format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": True, "shape": (1 << 40, 32)})
        file.write(b"\0" * 64)
    # An array of 4 GB, in 4 kB of zip by what its entry claims.
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("tensor.npy", b"\0" * 4_000_000)
    claimed = out.getvalue().replace((4_000_000).to_bytes(4, "little"), (4_000_000_000).to_bytes(4, "little"))
    (folder / "bomb.zip").write_bytes(claimed)
    # A pickle whose tuples hold each other twice: small, and endless if copied.
    shared = b"\x80\x02)q\x00" + b"0h\x00h\x00\x86q\x00" * 2000 + b"."
    with zipfile.ZipFile(folder / "shared.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", shared)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    t = rows()
    safetensors_files(t)
    npy_files(t)
    kobold(t)
    torch_files(t)
    peft_pickle()
    nemo(t)
    hostile(t)
    for path in sorted(OUT.rglob("*")):
        if path.is_file():
            print(f"{path.relative_to(OUT)}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
