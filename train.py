"""Twelve secret ciphers, learned one after another: Share against LoRA.

A Vigenère cipher adds a key of three letters, over and over, to a message of twelve: letter t of
the answer is x_t + key[t mod 3], modulo an alphabet of 16. The base model is pre-trained with the
key in clear in front of the message. A task is one secret key: its prompt shows an opaque tag
instead, which the base has never seen, so that an adapter must hold the key. Chance is 1/16.

    python train.py            the whole comparison
    python train.py --quick    a smoke run on a smaller model
"""

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from share import Share, ToyTransformer, attach_lora, lora_adapter, train_coefficients

LETTERS, KEY, MESSAGE = 16, 3, 12
TARGETS = ("q", "k", "v", "o", "up", "down")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Settings:
    seed: int = 0
    width: int = 128  # of the model's stream
    base_steps: int = 150  # of pre-training
    base_batch: int = 64  # prompts a step
    base_lr: float = 2e-3
    first: int = 4  # tasks whose LoRA adapters make the bases
    later: int = 8  # tasks learned by coefficients alone
    r: int = 8  # rank of each LoRA
    lora_lr: float = 5e-3
    variance: float = 0.95  # that the bases explain
    p: int = 1  # pseudo-rank
    lr: float = 4e-2  # of coefficients
    lora_steps: int = 100  # per task: every LoRA is then at 1.000
    steps: int = 150  # per task, of coefficients
    batch: int = 16  # prompts a step
    test: int = 128  # prompts behind each accuracy


QUICK = {"width": 64, "base_steps": 100, "first": 2, "later": 2, "lora_steps": 40, "steps": 40}


def encipher(key, message):
    """key (b, 3) and message (b, 12) -> answer (b, 12)."""
    return (message + key.repeat(1, MESSAGE // KEY)) % LETTERS


def make_batch(size, generator, key=None, tag=None):
    """tokens (size, 15), answer (size, 12): random keys in clear, or a secret key behind a tag.

    Tokens are 16 letters, 16 key letters, and tags.
    """
    message = torch.randint(LETTERS, (size, MESSAGE), generator=generator)
    if tag is None:
        key = torch.randint(LETTERS, (size, KEY), generator=generator)
        shown = LETTERS + key
    else:
        key = key.expand(size, KEY)
        shown = torch.full((size, KEY), 2 * LETTERS + tag)
    return torch.cat([shown, message], 1).to(DEVICE), encipher(key, message).to(DEVICE)


def logits(model, tokens):
    """The model answers each letter of the message in that letter's own place."""
    return model(tokens)[:, KEY:, :LETTERS]


def loss_fn(model, batch):
    tokens, answer = batch
    return F.cross_entropy(logits(model, tokens).flatten(0, 1), answer.flatten())


@torch.no_grad()
def accuracy(model, batch):
    tokens, answer = batch
    return float((logits(model, tokens).argmax(-1) == answer).float().mean())


def metrics(R):
    """ACC, BWT (Lopez-Paz and Ranzato 2017) and forgetting (Chaudhry et al. 2018).

    R[i][j] is the accuracy on task j after task i was learned.
    """
    T = len(R)
    earlier = range(T - 1)
    return {
        "acc": sum(R[-1]) / T,
        "bwt": sum(R[-1][j] - R[j][j] for j in earlier) / (T - 1),
        "forgetting": sum(max(R[i][j] for i in earlier) - R[-1][j] for j in earlier) / (T - 1),
    }


def fit(model, batches, steps, lr):
    """Adam on what is not frozen, the rate falling to zero in a straight line."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


class Tasks:
    """The secret keys, their prompts for training, and a fixed set for testing each."""

    def __init__(self, s):
        self.s, generator = s, torch.Generator().manual_seed(1000 + s.seed)
        self.keys = torch.randint(LETTERS, (s.first + s.later, KEY), generator=generator)
        self.tests = [make_batch(s.test, generator, key, t) for t, key in enumerate(self.keys)]

    def batches(self, task, steps):
        generator = torch.Generator().manual_seed(100 * self.s.seed + task)
        for _ in range(steps):
            yield make_batch(self.s.batch, generator, self.keys[task], task)


def pretrain(s, say):
    """The base model, which deciphers with any key that it is shown; and how well it does."""
    vocabulary = 2 * LETTERS + s.first + s.later
    model = ToyTransformer(vocabulary, s.width, length=KEY + MESSAGE).to(DEVICE)
    generator = torch.Generator().manual_seed(s.seed)

    def batches():
        for step in range(s.base_steps):
            if step % 25 == 0:
                say("base", f"pre-training, step {step} of {s.base_steps}")
            yield make_batch(s.base_batch, generator)

    fit(model, batches(), s.base_steps, s.base_lr)
    return model, accuracy(model, make_batch(s.test, generator))


def show(methods, chance=1 / LETTERS):
    for name in ("lora_sequential", "share"):
        print(f"\n{name}: accuracy on task j (across) after task i was learned (down)")
        matrix = methods[name]["accuracy_matrix"]
        print("      " + "".join(f"{j:5d}" for j in range(len(matrix))))
        for i, row in enumerate(matrix):
            print(f"{i:5d} " + "".join(f"{value:5.2f}" for value in row))
    print(f"\nchance {chance:.3f}; trained: numbers for a task learned after the bases exist")
    print(f"{'':16}       ACC       BWT forgetting  trained   stored  seconds")
    for name, m in methods.items():
        scores = "".join(f"{round(m[key], 3) + 0.0:10.3f}" for key in ("acc", "bwt", "forgetting"))
        trained = m["trained_per_task"] or ""
        print(f"{name:16}{scores} {trained:9} {m['stored']:8} {m['seconds']:8.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Share against LoRA on a sequence of ciphers.")
    parser.add_argument("--seed", type=int, default=0, help="of the keys, the data and the models")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a smaller model")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    s = replace(Settings(seed=args.seed), **QUICK if args.quick else {})
    torch.set_num_threads(1)  # these matrices are too small for more; a busy machine punishes it
    start = time.perf_counter()
    torch.manual_seed(s.seed)
    tasks, methods, T = Tasks(s), {}, s.first + s.later

    def say(method, text):
        print(f"{time.perf_counter() - start:6.1f} s  {method:16}{text}", flush=True)

    def tell(method, t, loss, found, earlier=None):
        more = "" if not t or earlier is None else f"  earlier tasks {earlier:.3f}"
        say(method, f"task {t:2d}  loss {loss:.3f}  accuracy {found:.3f}{more}")

    def evaluate(model):
        return [accuracy(model, test) for test in tasks.tests]

    def record(name, R, trained, stored, began):
        seconds = time.perf_counter() - began
        row = {"accuracy_matrix": R, **metrics(R), "trained_per_task": trained, "stored": stored}
        methods[name] = row | {"seconds": seconds}

    base, skill = pretrain(s, say)
    began = time.perf_counter()
    unknown = evaluate(base)
    say("base", f"key in clear {skill:.3f}, behind a tag {sum(unknown) / T:.3f}")
    record("base", [unknown] * T, None, 0, began)

    adapters, own, began = {}, [], time.perf_counter()
    for t in range(T):
        model = attach_lora(copy.deepcopy(base), TARGETS, s.r)
        loss = fit(model, tasks.batches(t, s.lora_steps), s.lora_steps, s.lora_lr)
        adapters[f"task {t}"] = lora_adapter(model)
        own.append(accuracy(model, tasks.tests[t]))
        tell("lora_per_task", t, loss, own[t])
    lora = sum(B.numel() + A.numel() for B, A in adapters["task 0"].factors.values())
    # tasks still to come have no adapter yet: the base answers
    apart = [own[: i + 1] + unknown[i + 1 :] for i in range(T)]
    record("lora_per_task", apart, lora, T * lora, began)

    R, began = [], time.perf_counter()
    model = attach_lora(copy.deepcopy(base), TARGETS, s.r)
    for t in range(T):
        loss = fit(model, tasks.batches(t, s.lora_steps), s.lora_steps, s.lora_lr)
        R.append(evaluate(model))
        tell("lora_sequential", t, loss, R[t][t], sum(R[t][:t]) / max(t, 1))
    record("lora_sequential", R, lora, lora, began)

    names = list(adapters)
    first = {name: adapters[name] for name in names[: s.first]}

    def learn(method, share, phi=0, grow=False):
        """Learn the tasks that the share does not have yet by coefficients, one after another."""
        began, model = time.perf_counter(), share.attach(copy.deepcopy(base))
        R = apart[: len(share.tasks)]  # measured with the adapters, before there was a basis
        for t in range(len(R), T):
            shapes = [basis.shape for pair in share.bases.values() for basis in pair]
            trained = sum(s.p * (k + phi) + phi * n for n, k in shapes)
            batches, settings = tasks.batches(t, s.steps), {"phi": phi, "grow": grow, "lr": s.lr}
            losses = train_coefficients(share, model, names[t], batches, loss_fn, p=s.p, **settings)
            R.append(list(unknown))
            for j in range(t + 1):
                share.select(names[j])
                R[t][j] = accuracy(model, tasks.tests[j])
            earlier = sum(R[t][:t]) / max(t, 1)
            tell(method, t, losses[-1], R[t][t], earlier)
        record(method, R, trained, share.num_parameters(), began)

    def build():
        return Share.from_adapters(first, variance=s.variance, stack="updates")

    learn("share", build())
    learn("share_merge", build(), phi=1)
    learn("share_grow", build(), phi=1, grow=True)
    control = build()
    for layer, pair in control.bases.items():
        control.bases[layer] = tuple(torch.linalg.qr(torch.randn_like(basis)).Q for basis in pair)
    for name in first:
        control.remove(name)  # to be learned by coefficients as well: no adapter fits random bases
    learn("random_basis", control)

    show(methods)
    seconds = time.perf_counter() - start
    if args.json:
        args.json.write_text(json.dumps({"seed": s.seed, "seconds": seconds, "methods": methods}))
    if args.quick:
        return print(f"\nAfter {seconds:.0f} s: a smoke run, which claims nothing.")
    print(f"\nAfter {seconds:.0f} s, the claims:")
    apart, ratio = methods["lora_per_task"]["acc"], lora / methods["share"]["trained_per_task"]
    forgets = methods["lora_sequential"]["forgetting"]
    claims = [("LoRA's trained numbers / share's", ratio, 100, math.inf)]
    claims += [("lora_sequential: forgetting", forgets, 0.5, math.inf)]
    for name, most in (("share", 0.01), ("share_merge", 0.02), ("share_grow", 0.02)):
        claims += [(f"{name}: ACC / lora_per_task's", methods[name]["acc"] / apart, 0.98, math.inf)]
        claims += [(f"{name}: forgetting", methods[name]["forgetting"], -math.inf, most)]
    for text, value, least, most in claims:
        print(f"  {text:36}{value:8.3f}   from {least} to {most}")
        assert least <= value <= most, f"{text}: {value:.4f} is not between {least} and {most}"


if __name__ == "__main__":
    main()
