#!/usr/bin/env python3
"""Make tests/gguf: tiny models in GGUF files, and what transformers and PEFT answer with the same weights.

    pip install -r tests/peft/requirements.txt gguf sentencepiece
    python3 tests/peft/make_gguf.py            # rewrites tests/gguf
    python3 tests/peft/make_gguf.py parts      # only what it has in parts, from what is there

A file is written the way llama.cpp's convert_hf_to_gguf.py does: its tensor names, its order of the rows
of queries and keys, its norms. The reference gets what the `gguf` package dequantises. K-quants, which
that package can read but not write, are random blocks with a fitting scale. `parts` has one of them again, in
parts as that package writes them. `NAME.json` beside each
file has the answers, as tests/peft/make_fixtures.py makes them, and the tokens of a page of texts, by
the tokenizer that the vocabulary comes from: tokenizers, transformers or sentencepiece.
"""
import io
import json
import math
import pathlib
import shutil
import sys

import gguf
import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Q
from peft import PromptTuningConfig, TaskType, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM, BloomConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config, GPTNeoXConfig, LlamaConfig,
    LlamaForCausalLM, Olmo2Config, Phi3Config, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, SmolLM3Config,
)

from make_fixtures import INPUTS, MARGIN, NEW_TOKENS, TEXT, answer

OUT = pathlib.Path(__file__).resolve().parent.parent / "gguf"
VOCAB = 352
PAGE = [
    "", " ", "a", "the cat sat on the mat", " the cat", "the  cat   sat", "the cat ", "\n", "a\nb", "a\n\n b\t\tc", "\r\n x",
    "Zürich, 25 °C: naïve prompts!", "1234567 and 12 and 3.14159", "I'll say it's DON'T we've", "日本語のテキスト、はい。",
    "😀 emoji 👩‍👩‍👧 🇨🇭", "e\u0301 is two characters, é is one", "x = [1, 2, {'a': \"b\"}];  // code",
    "many prompts, one frozen model." * 3, "<s> in a text </s> and so on", "tab\tand   spaces\u00a0end\u3000",
    "ÀÉÎõü ß ſ ﬁ Ω", "https://example.org/a_b-c?d=e&f=%20", "3 000,50 €/m²; ½ + ¼", "مرحبا بالعالم", "ok…—–«»",
]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def byte_level(pre, bos, normalizer=None, whole_words=False):
    """A trained byte-level BPE, and its vocabulary as metadata."""
    tok = Tokenizer(models.BPE())
    if normalizer:
        tok.normalizer = normalizer
    tok.pre_tokenizer = pre
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator([TEXT * 4, "12 34 1234 I'll it's"] + PAGE, trainers.BpeTrainer(
        vocab_size=VOCAB - 3, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    data = json.loads(tok.to_str())
    data["model"]["ignore_merges"] = whole_words
    tok = Tokenizer.from_str(json.dumps(data))
    tok.add_tokens([AddedToken("<note>", normalized=False)])
    if bos:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    size = tok.get_vocab_size()
    tokens = [tok.id_to_token(i) for i in range(size)]
    types = [3] * 3 + [1] * (size - 4) + [4]
    merges = [" ".join(m) if isinstance(m, list) else m for m in data["model"]["merges"]]
    return tok, dict(model="gpt2", tokens=tokens, types=types, merges=merges)


def sentence_pieces():
    """A trained SentencePiece BPE, and its vocabulary as metadata."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Other characters than these are bytes.
        sentence_iterator=iter([TEXT, "the cat", "12 34 1234 I'll", "  two  spaces"]), model_writer=model, vocab_size=VOCAB,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, pad_id=-1, unk_id=0, bos_id=1, eos_id=2, minloglevel=2, hard_vocab_limit=False)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
    ids = range(sp.get_piece_size())
    return sp, dict(model="llama", tokens=[sp.id_to_piece(i) for i in ids], types=[kind(i) for i in ids],
                    scores=[sp.get_score(i) for i in ids])


class SentencePieceEncoder:
    """SentencePiece in the shape that `answer` calls."""

    def __init__(self, sp):
        self.sp = sp

    def encode(self, text):
        # Control symbols have no text in SentencePiece; in a model's tokenizer they have.
        ids, rest = [1], text
        while rest:
            at, found = min((rest.find(s), s) for s in ("<s>", "</s>") if s in rest) if any(
                s in rest for s in ("<s>", "</s>")) else (len(rest), "")
            ids += self.sp.encode(rest[:at]) if at else []
            ids += [self.sp.piece_to_id(found)] if found else []
            rest = rest[at + len(found):]
        return ids

    def __call__(self, text, return_tensors="pt"):
        return type("Encoding", (), dict(input_ids=torch.tensor([self.encode(text)])))


class Encoder(SentencePieceEncoder):
    def encode(self, text):
        return self.sp.encode(text).ids


SIZES = {Q.Q2_K: 84, Q.Q3_K: 110, Q.Q4_K: 144, Q.Q5_K: 176, Q.Q6_K: 210}
SCALES = {Q.Q2_K: (80, 82, 1.5), Q.Q3_K: (108, None, 0), Q.Q4_K: (0, 2, 7.5), Q.Q5_K: (0, 2, 15.5), Q.Q6_K: (208, None, 0)}


def blocks(shape, kind, std, rng):
    """Random K-quant blocks of a matrix whose values have about this deviation."""
    n, k = shape
    raw = rng.integers(0, 256, (n, k // 256, SIZES[kind]), dtype=np.uint8)
    at, least, ratio = SCALES[kind]

    def scaled(d):
        for place, value in ((at, d), (least, ratio * d)):
            if place is not None:
                raw[:, :, place:place + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        return raw.reshape(n, -1)

    d = 2.0 ** -10
    d *= std / gguf.quants.dequantize(scaled(d), kind).std()
    return scaled(d)


def permuted(w, heads):
    """Rows as llama.cpp's rotation wants them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def by_part(w, heads):
    """Queries, keys and values of all heads one after another, not head by head."""
    return w.reshape(heads, 3, -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)


def as_converted(arch, config, name, raw):
    """Rows as the converter orders them."""
    A, part = gguf.MODEL_ARCH, name.split(".")[-2]
    if arch in (A.LLAMA, A.SMOLLM3) and part in ("q_proj", "k_proj"):
        return permuted(raw, config.num_attention_heads if part == "q_proj" else config.num_key_value_heads)
    if arch in (A.GPTNEOX, A.BLOOM) and part == "query_key_value":
        return by_part(raw, config.num_attention_heads)
    return raw


def shape_of(out, arch, config):
    """The keys that the converter writes for each architecture."""
    A, heads = gguf.MODEL_ARCH, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_head_count(heads)
    inner = 4 * config.hidden_size if arch in (A.GPT2, A.BLOOM) else config.intermediate_size
    out.add_feed_forward_length(inner)
    out.add_context_length(getattr(config, "max_position_embeddings", config.hidden_size))
    if arch in (A.GPT2, A.GPTNEOX, A.BLOOM):
        out.add_layer_norm_eps(config.layer_norm_eps if arch == A.GPTNEOX else config.layer_norm_epsilon)
        if arch == A.GPTNEOX:
            out.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * head_dim))
            out.add_parallel_residual(config.use_parallel_residual)
        return
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    if arch not in (A.GEMMA, A.GEMMA2):
        out.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch in (A.LLAMA, A.SMOLLM3, A.PHI3):
        out.add_rope_dimension_count(head_dim)
    if head_dim != config.hidden_size // heads:
        out.add_key_length(head_dim)
        out.add_value_length(head_dim)
    if arch in (A.GEMMA2, A.GEMMA3, A.PHI3):
        out.add_sliding_window(config.sliding_window or 0)
    if arch == A.GEMMA2:
        out.add_attn_logit_softcapping(config.attn_logit_softcapping)
        out.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == A.PHI3:
        original = rope["original_max_position_embeddings"]
        out.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        out.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def write(path, arch, model, kinds, vocabulary, pre, bos, extra=()):
    """Writes the model, and gives it the values that the file has."""
    config, name = model.config, gguf.MODEL_ARCH_NAMES[arch]
    rng = np.random.default_rng(7)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    out = gguf.GGUFWriter(path, name)
    shape_of(out, arch, config)
    out.add_tokenizer_model(vocabulary["model"])
    out.add_tokenizer_pre(pre)
    out.add_token_list(vocabulary["tokens"])
    out.add_token_types(vocabulary["types"])
    if "merges" in vocabulary:
        out.add_token_merges(vocabulary["merges"])
    if "scores" in vocabulary:
        out.add_token_scores(vocabulary["scores"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(bos)
    out.add_chat_template("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    for tensor, values in extra:
        out.add_tensor(tensor, values)
    for i, (hf, p) in enumerate(model.named_parameters()):
        if hf == "lm_head.weight" and config.tie_word_embeddings:
            continue
        w = p.data.numpy()
        if name.startswith("gemma") and hf.endswith("norm.weight"):
            w = w + 1
        turned = name == "gpt2" and w.ndim == 2 and ".h." in hf
        w = np.ascontiguousarray(w.T if turned else w)
        kind = Q.F32 if w.ndim == 1 else kinds[i % len(kinds)]
        if kind in SIZES and w.shape[1] % 256:
            kind = Q.Q8_0
        raw = blocks(w.shape, kind, 0.12, rng) if kind in SIZES else gguf.quants.quantize(w, kind)
        if kind != Q.F32:
            values = gguf.quants.dequantize(raw, kind)
            p.data = torch.from_numpy(np.ascontiguousarray(values.T if turned else values)).float()
        raw = np.ascontiguousarray(as_converted(arch, config, hf, raw))
        known = [hf, hf.removeprefix("transformer.")]
        to = next(to for to in (names.get_name(n, (".weight", ".bias")) for n in known) if to)
        out.add_tensor(to, raw, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def llama3_factors(config):
    """As the converter writes them: the plain frequencies over the scaled ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    dim = config.hidden_size // config.num_attention_heads
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (plain / scaled).numpy().astype(np.float32)


def shape(hidden, layers, inner, **more):
    return dict(vocab_size=VOCAB, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                bos_token_id=1, eos_token_id=2, pad_token_id=0, **more)


def build():
    plain = dict(rope_type="default", rope_theta=10000.0)
    split = lambda regex: pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    scaled = LlamaForCausalLM(LlamaConfig(**shape(32, 2, 96), tie_word_embeddings=False, rope_parameters=dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64)))
    yield "llama-f16", gguf.MODEL_ARCH.LLAMA, scaled, [Q.F16, Q.BF16], "llama-bpe", True, byte_level(
        split(LLAMA3), True, whole_words=True)
    yield "qwen2-q8_0", gguf.MODEL_ARCH.QWEN2, Qwen2ForCausalLM(Qwen2Config(
        **shape(32, 2, 96), tie_word_embeddings=True, rope_parameters=plain)), [Q.Q8_0], "qwen2", False, byte_level(
        split(QWEN2), False, normalizers.NFC())
    yield "llama-q4_0", gguf.MODEL_ARCH.LLAMA, LlamaForCausalLM(LlamaConfig(
        **shape(64, 2, 96), tie_word_embeddings=False, rope_parameters=plain)), [
        Q.Q4_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1], "default", True, sentence_pieces()
    yield "llama-k", gguf.MODEL_ARCH.LLAMA, LlamaForCausalLM(LlamaConfig(
        **shape(256, 1, 256), head_dim=16, tie_word_embeddings=True, rope_parameters=plain)), [
        Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q3_K, Q.Q2_K], "smollm", False, byte_level(digits, False)
    small = shape(32, 2, 32)
    long = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=256,
                short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[2.0, 3.0, 4.0, 8.0])
    local = dict(full_attention=dict(rope_type="default", rope_theta=1e6), sliding_attention=plain)
    gpt = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
    A = gguf.MODEL_ARCH
    for arch, config in (
        (A.QWEN3, Qwen3Config(**small, head_dim=16, rope_parameters=plain)),
        (A.GEMMA, GemmaConfig(**small, head_dim=16, rope_parameters=plain)),
        (A.GEMMA2, Gemma2Config(**small, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, rope_parameters=plain)),
        (A.GEMMA3, Gemma3TextConfig(**(small | dict(num_hidden_layers=6)), head_dim=16, query_pre_attn_scalar=16,
                                    sliding_window=8, rope_parameters=local)),
        (A.PHI3, Phi3Config(**small, sliding_window=8, original_max_position_embeddings=256, rope_parameters=long)),
        (A.SMOLLM3, SmolLM3Config(**(small | dict(num_hidden_layers=4)), tie_word_embeddings=True, rope_parameters=plain)),
        (A.OLMO2, Olmo2Config(**small, tie_word_embeddings=False, rope_parameters=plain)),
        (A.GPT2, GPT2Config(**gpt, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
        (A.GPTNEOX, GPTNeoXConfig(**small, rope_parameters=plain | dict(partial_rotary_factor=0.5))),
        (A.BLOOM, BloomConfig(**gpt, hidden_size=32, n_layer=2, n_head=4)),
    ):
        yield f"family-{gguf.MODEL_ARCH_NAMES[arch]}", arch, AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"), [Q.Q8_0, Q.Q4_0], "gpt-2", False, byte_level(gpt2, False)
    # For their tokenizers only.
    for pre, made in (("gpt-2", byte_level(gpt2, True)), ("olmo", byte_level(gpt2, False, normalizers.NFC())),
                      ("bloom", byte_level(split(BLOOM), False))):
        yield f"tokens-{pre}", gguf.MODEL_ARCH.QWEN2, Qwen2ForCausalLM(Qwen2Config(
            **shape(32, 1, 32), tie_word_embeddings=True, rope_parameters=plain)), [Q.Q4_0], pre, pre == "gpt-2", made


def write_parts(name, tensors):
    """NAME.gguf again, in parts of so many tensors."""
    source = gguf.GGUFReader(OUT / f"{name}.gguf")
    folder = OUT / "parts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    architecture = source.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", architecture, split_max_tensors=tensors)
    for field in source.fields.values():
        # What describes the file itself is written anew.
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, *of = field.types
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of[-1] if of else None)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{name}: {len(list(folder.iterdir()))} parts")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for seed, (name, arch, model, kinds, pre, bos, (tok, vocabulary)) in enumerate(build()):
        torch.manual_seed(seed)
        hidden = model.config.hidden_size
        for p in model.parameters():
            p.data = torch.randn_like(p) * 0.2 + (1.0 if p.dim() == 1 and p.shape[0] == hidden else 0.0)
        model.eval()
        rope = getattr(model.config, "rope_parameters", None) or {}
        extra = []
        if rope.get("rope_type") == "llama3":
            extra = [("rope_freqs.weight", llama3_factors(model.config))]
        if rope.get("rope_type") == "longrope":
            extra = [(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32)) for kind in ("long", "short")]
        write(OUT / f"{name}.gguf", arch, model, kinds, vocabulary, pre, bos, extra)
        tok = Encoder(tok) if isinstance(tok, Tokenizer) else SentencePieceEncoder(tok)
        cases, prompt = [], None

        def ask(asked, tuned):
            for text in INPUTS:
                ids, greedy, logits, margin = answer(asked, tok, text, NEW_TOKENS)
                if margin < MARGIN:
                    print(f"{name}: left out, margin {margin:.4f}")
                    continue
                top = logits.topk(5)
                cases.append(dict(tuned=tuned, text=text, input_ids=ids, greedy_ids=greedy, top=[
                    [i, round(v, 5)] for i, v in zip(top.indices.tolist(), top.values.tolist())]))

        if not name.startswith("tokens"):
            ask(model, False)
            if hidden < 100 and not name.startswith("family"):
                tuned = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=7, task_type=TaskType.CAUSAL_LM))
                # In f16 as it is saved.
                rows = tuned.prompt_encoder.default.embedding.weight
                rows.data = torch.randn_like(rows).mul(0.2).half().float()
                prompt = rows.data.tolist()
                ask(tuned.eval(), True)
        page = [] if name.startswith("family") else [dict(text=text, ids=tok.encode(text)) for text in PAGE]
        (OUT / f"{name}.json").write_text(json.dumps(dict(cases=cases, prompt=prompt, page=page), ensure_ascii=False) + "\n")
        print(f"{name}: {len(cases)} cases")


if __name__ == "__main__":
    if sys.argv[1:] != ["parts"]:
        main()
    write_parts("qwen2-q8_0", 10)
