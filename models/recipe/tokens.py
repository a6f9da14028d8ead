"""The tokenizer (byte-level BPE over the demo vocabulary) and the packing of documents into rows."""

import json
import random

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import grammar as g
import lexicon as lex
from corpus import LABELS, Corpus

SPECIALS = ["<pad>", "<s>", "</s>"]
PAD, EOS = 0, 2


def word_forms():
    """Every form that should be one token, with and without the space before it."""
    forms = set()
    for n in g.NOUNS:
        forms |= {n.en, " " + n.en} | {x for w in n.fr.split() for x in ((w, " " + w) if g.vowel(w) else (" " + w,))}
    for en, m, f in g.GOOD + g.POOR + g.COLOURS:
        forms |= {en, " " + en, " " + m, " " + f}
    for verbs in [g.VERBS, *g.TOPIC_VERBS.values()]:
        for past, base, part in verbs:
            forms |= {" " + past, " " + base, " " + part, past, part}
    for name in lex.NAMES:
        forms |= {name, " " + name}
    for en, fr in g.CITIES:
        forms |= {en, " " + en, " " + fr}
    for label in LABELS:
        forms |= {label, label.capitalize()}
    return sorted(forms)


def train_tokenizer(size):
    """Byte-level BPE. The lexicon is given with a large weight, the sampled corpus adds everything else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = Corpus(7)
    text = ["".join(piece for piece, _ in corpus.document()).replace("</s>", "") for _ in range(3000)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(word_forms() * 60 + text, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Packer:
    """An endless stream of rows of ``length`` tokens with their loss weights; documents are never cut."""

    def __init__(self, tokenizer, seed, length):
        self.tokenizer, self.length = tokenizer, length
        self.corpus = Corpus(seed)
        self.rng = random.Random(seed)
        self.cache, self.waiting = {}, []

    def encode(self, text):
        ids = self.cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(text) < 40 and len(self.cache) < 200_000:
                self.cache[text] = ids
        return ids

    def document(self):
        while True:
            ids, weights = [], []
            for text, weight in self.corpus.document():
                piece = self.encode(text)
                ids += piece
                weights += [weight] * len(piece)
            if len(ids) <= self.length:
                return ids, weights

    def row(self):
        """The best-fitting documents of a small pool, so that little of the row is padding."""
        ids, weights = [], []
        while True:
            while len(self.waiting) < 24:
                self.waiting.append(self.document())
            room = self.length - len(ids)
            fits = [i for i, d in enumerate(self.waiting) if len(d[0]) <= room]
            if not fits:
                break
            index = self.rng.choice(fits) if room > 100 else max(fits, key=lambda i: len(self.waiting[i][0]))
            more, w = self.waiting.pop(index)
            weights += w if ids else [0.0] + w[1:]
            ids += more
        pad = self.length - len(ids)
        return ids + [PAD] * pad, weights + [0.0] * pad

    def batch(self, rows, progress):
        self.corpus.progress = progress
        pairs = [self.row() for _ in range(rows)]
        return np.array([p[0] for p in pairs], dtype=np.int64), np.array([p[1] for p in pairs], dtype=np.float32)
