#!/usr/bin/env python3
"""What transformers + PEFT answer with the demo's prompts: writes tests/fixtures/demo.json.

    pip install -r tests/peft/requirements.txt
    python3 tests/peft/demo_answers.py          # again after models/demo or prompts/ changed

The prompts were tuned by `softserve tune`, so this is PEFT reading what softserve wrote. Each input is
one unpadded greedy request in f32. A case whose two best logits are ever closer than MARGIN is left out.
"""
import json
import pathlib

import jinja2
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASES = 12
MARGIN = 5e-3


@torch.no_grad()
def main():
    tokenizer = Tokenizer.from_file(str(ROOT / "models/demo/tokenizer.json"))
    cases = []
    for folder in sorted(p for p in (ROOT / "prompts").iterdir() if p.is_dir()):
        base = AutoModelForCausalLM.from_pretrained(ROOT / "models/demo", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
        task = json.loads((folder / "task.json").read_text())
        template = jinja2.Environment(keep_trailing_newline=True).from_string(task["template"])
        eos = base.generation_config.eos_token_id
        for line in (ROOT / "examples/data" / folder.name / "test.jsonl").read_text().splitlines()[:CASES]:
            text = json.loads(line)["input"]
            ids = torch.tensor([tokenizer.encode(template.render(input=text)).ids])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=task["defaults"]["max_tokens"], output_logits=True,
                                 return_dict_in_generate=True)
            top = torch.stack(out.logits)[:, 0].topk(2).values
            if (top[:, 0] - top[:, 1]).min() < MARGIN:
                continue
            new = [i for i in out.sequences[0, ids.shape[1]:].tolist() if i != eos]
            cases.append(dict(task=folder.name, input=text, ids=new, output=tokenizer.decode(new)))
    path = ROOT / "tests/fixtures/demo.json"
    path.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
    print(f"{path}: {len(cases)} cases")


if __name__ == "__main__":
    main()
