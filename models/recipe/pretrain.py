"""Makes the demo model: trains the tokenizer, then the network, and writes a Hugging Face folder.

    python pretrain.py --out ../demo --work build

One run from scratch: the curriculum (copying and word lists first, long passages later) is part of the data,
and the learning rate is constant and then falls to zero over the last part. Stop it at any time; the same
command goes on from the last checkpoint in ``--work``. A progress line every 25 steps gives the loss, and every
``--check`` steps the exact-match accuracy on held-out inputs under a written instruction.
"""

import argparse
import pathlib
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer

from corpus import PROSE
from network import CONFIG, Network, initialise, save
from tasks import TASKS, Scenes, answer
from tokens import EOS, Packer, save_tokenizer, train_tokenizer

TOLD = {
    "topic": "Topic\n",
    "sentiment": "Sentiment\n",
    "translation": "Translate to French\n",
    "question-answering": "Answer the question\n",
    "story": "Write a story\n",
}


class Muon:
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration, for the matrices of the blocks."""

    def __init__(self, params, momentum=0.95, decay=0.02):
        self.params, self.momentum, self.decay = params, momentum, decay
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr):
        groups = {}
        for p, buf in zip(self.params, self.buffers):
            buf.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(buf, self.momentum)
            groups.setdefault(p.shape, []).append((p, update))
        for shape, members in groups.items():
            updates = orthogonal(torch.stack([u for _, u in members]))
            scale = max(1, shape[0] / shape[1]) ** 0.5
            for (p, _), update in zip(members, updates):
                p.mul_(1 - lr * self.decay).add_(update, alpha=-lr * scale)


def orthogonal(g, steps=5):
    """The nearest orthogonal matrices, roughly, of a stack."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


def loss_of(net, ids, weights):
    """Weighted cross-entropy of the next token, at the third of the positions that weigh most (the others weigh
    nothing, or little). Also the summed loss and the number of the answer tokens, for the progress line."""
    hidden, target = net.hidden(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
    weight, chosen = weights[:, 1:].flatten().topk(target.numel() // 3, sorted=False)
    losses = F.cross_entropy(net.logits(hidden[chosen]), target[chosen], reduction="none")
    strong = weight > PROSE
    return (losses * weight).sum(), losses[strong].sum().item(), int(strong.sum())


@torch.no_grad()
def accuracy(net, tokenizer, task, count, length, micro):
    """Greedy exact match under an instruction. Right at every position given the truth is right when generated."""
    source, rows = Scenes(999 + len(task), held=True), []
    while len(rows) < count:
        scene = source.scene(task, facts=(2, 3))
        prompt = tokenizer.encode(TOLD[task] + scene.text + "\n").ids
        full = prompt + tokenizer.encode(answer(task, scene, source)).ids + [EOS]
        if len(full) < length:
            rows.append((full, len(prompt)))
    ids = torch.tensor([full + [0] * (length - len(full)) for full, _ in rows])
    best = torch.cat([net.logits(net.hidden(part)).argmax(-1) for part in ids.split(micro)])
    return (
        sum(
            bool((best[i, start - 1 : len(full) - 1] == ids[i, start : len(full)]).all())
            for i, (full, start) in enumerate(rows)
        )
        / count
    )


def schedule(step, args):
    """Warm-up, constant, then a straight fall to zero."""
    fall = (args.steps - step) / (args.steps * args.fall)
    return min(1.0, (step + 1) / 100, max(0.0, fall))


def average(net, workers):
    """Averages the gradients of the workers."""
    flat = torch.cat([p.grad.flatten() for p in net.parameters()])
    dist.all_reduce(flat)
    flat /= workers
    for p, piece in zip(net.parameters(), flat.split([p.numel() for p in net.parameters()])):
        p.grad.copy_(piece.view_as(p))


def train(rank, args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    if args.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{args.meet}", rank=rank, world_size=args.workers)
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    net = Network(compiled=not args.eager)
    initialise(net, tokenizer)
    muon = Muon(net.matrices())
    adam = torch.optim.AdamW(net.vectors(), lr=args.embed_lr, betas=(0.9, 0.98), weight_decay=0.0)
    start, checkpoint = 0, args.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        net.load_state_dict(saved["net"])
        muon.buffers = saved["muon"]
        adam.load_state_dict(saved["adam"])
        start = saved["step"]
    packer = Packer(tokenizer, (args.seed * 100 + rank) * 100_000 + start, args.length + 1)
    clock, tokens, mean = time.time(), 0, None
    for step in range(start, args.steps):
        rows = (args.rows if step < args.halve else args.rows // 2) // args.workers
        ids, weights = packer.batch(rows, step / args.steps)
        lr = schedule(step, args)
        total, answers, count = float(weights[:, 1:].sum()), 0.0, 0
        for part in range(0, rows, args.micro):
            loss, a, c = loss_of(
                net,
                torch.from_numpy(ids[part : part + args.micro]),
                torch.from_numpy(weights[part : part + args.micro]),
            )
            (loss / total).backward()
            answers, count = answers + a, count + c
        if args.workers > 1:
            average(net, args.workers)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        muon.step(args.lr * lr)
        for group in adam.param_groups:
            group["lr"] = args.embed_lr * lr
        adam.step()
        net.zero_grad(set_to_none=True)
        tokens += rows * args.workers * args.length
        mean = answers / count if mean is None else 0.95 * mean + 0.05 * answers / count
        if rank:
            continue
        if (step + 1) % 25 == 0:
            print(
                f"step {step + 1}/{args.steps}  answer loss {mean:.3f}  lr {lr:.2f}  {tokens / (time.time() - clock):.0f} tok/s",
                flush=True,
            )
        if (step + 1) % args.check == 0 or step + 1 == args.steps:
            print(
                "  exact match  "
                + "  ".join(f"{t} {accuracy(net, tokenizer, t, 48, args.length, args.micro):.2f}" for t in TASKS),
                flush=True,
            )
            torch.save(
                {"net": net.state_dict(), "muon": muon.buffers, "adam": adam.state_dict(), "step": step + 1}, checkpoint
            )
            save(net, args.out)
            save_tokenizer(tokenizer, args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo"), help="the model folder")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build"), help="checkpoint and tokenizer")
    parser.add_argument("--steps", type=int, default=5150)
    parser.add_argument("--rows", type=int, default=32, help="rows per step")
    parser.add_argument("--halve", type=int, default=1200, help="step from which a step has half as many rows")
    parser.add_argument("--micro", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--length", type=int, default=192, help="tokens per row")
    parser.add_argument("--lr", type=float, default=0.02, help="of the matrices (Muon)")
    parser.add_argument("--embed-lr", type=float, default=0.004, help="of the embedding and norms (AdamW)")
    parser.add_argument("--fall", type=float, default=0.55, help="last part of the run over which the rate falls")
    parser.add_argument("--check", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--eager", action="store_true", help="do not compile (no C++ compiler needed)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.work / "tokenizer.json").exists():
        train_tokenizer(CONFIG["vocab_size"]).save(str(args.work / "tokenizer.json"))
    args.meet = tempfile.mktemp()
    if args.workers > 1:
        mp.spawn(train, (args,), args.workers)
    else:
        train(0, args)


if __name__ == "__main__":
    main()
