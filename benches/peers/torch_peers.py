"""What users of transformers and PEFT can do, in one process with softserve's client."""

import time
import warnings

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Torch:
    """The model in one dtype, with every prompt as a PEFT adapter of it."""

    def __init__(self, setting, dtype):
        # PEFT says each time that it counts positions itself, which is what is wanted.
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(setting.threads)
        self.setting = setting
        self.base = AutoModelForCausalLM.from_pretrained(setting.model, dtype=DTYPES[dtype]).eval()
        # Answers have the length that is asked for.
        self.base.generation_config.eos_token_id = None
        self.base.generation_config.pad_token_id = 0
        self.rows = [load_file(p / "adapter_model.safetensors")["prompt_embeddings"] for p in setting.prompts]
        self.rows = [rows.to(DTYPES[dtype]) for rows in self.rows]
        self.peft = None
        for i, path in enumerate(setting.prompts):
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.base, path, adapter_name="0").eval()
            else:
                self.peft.load_adapter(path, adapter_name=str(i))

    def _peft_one(self, request, new_tokens):
        self.peft.set_adapter(str(request.task))
        ids = torch.tensor([request.ids])
        out = self.peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        return out[0, len(request.ids):].tolist()

    @torch.inference_mode()
    def one_after_another(self, requests):
        """PeftModel.generate for each request."""
        return timed(lambda: [self._peft_one(r, self.setting.output_tokens) for r in requests])

    @torch.inference_mode()
    def first_token(self, request):
        """PeftModel.generate until there is one token."""
        return timed(lambda: self._peft_one(request, 1))

    @torch.inference_mode()
    def by_hand(self, requests):
        """All requests in one left-padded batch of embeddings, each with its own prompt in front."""
        def run():
            embed = self.base.get_input_embeddings()
            rows = [torch.cat([self.rows[r.task], embed(torch.tensor(r.ids))]) for r in requests]
            longest = max(map(len, rows))
            x = torch.zeros(len(rows), longest, rows[0].shape[1], dtype=rows[0].dtype)
            mask = torch.zeros(len(rows), longest, dtype=torch.long)
            for i, row in enumerate(rows):
                x[i, longest - len(row):] = row
                mask[i, longest - len(row):] = 1
            # generate() takes positions from the mask, so that padding moves nothing.
            new = self.setting.output_tokens
            return self.base.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=new, do_sample=False).tolist()
        return timed(run)


def timed(run):
    """Seconds, and what came out."""
    begun = time.perf_counter()
    out = run()
    return time.perf_counter() - begun, out
