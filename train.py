"""Twelve secret ciphers, learned one after another: Share against LoRA.

A Vigenère cipher adds a key of three letters, over and over, to a message of twelve: letter t of
the answer is x_t + key[t mod 3], modulo an alphabet of 16. The base model is pre-trained with the
key in clear in front of the message. A task is one secret key: its prompt shows an opaque tag
instead, which the base has never seen, so that an adapter must hold the key. Chance is 1/16.

    python train.py              the whole comparison, which asserts its claims
    python train.py --seeds 5    the same for several seeds: mean ± standard deviation
    python train.py --sweep      the ablation: variance, stack and p, beside random bases
    python train.py --scaling    what a merge and a training step cost
    python train.py --quick      a smoke run on a smaller model
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from share import Adapter, Router, Share, ToyTransformer, attach_lora, lora_adapter
from share import train_coefficients

LETTERS, KEY, MESSAGE = 16, 3, 12
TARGETS = ("q", "k", "v", "o", "up", "down")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
START = time.perf_counter()


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
    stack: str = "updates"
    p: int = 1  # pseudo-rank
    general_p: int = 4  # of the one set for all tasks
    lr: float = 4e-2  # of coefficients
    lora_steps: int = 100  # per task: every LoRA is then at 1.000
    steps: int = 150  # per task, of coefficients
    joint_steps: int = 600  # of what learns all tasks at once
    batch: int = 16  # prompts a step
    test: int = 128  # prompts behind each accuracy


QUICK = {"width": 64, "base_steps": 100, "first": 2, "later": 2}
QUICK |= {"lora_steps": 40, "steps": 40, "joint_steps": 40}


def say(method, text):
    print(f"{time.perf_counter() - START:6.1f} s  {method:16}{text}", flush=True)


def encipher(key, message):
    """key (b, 3) and message (b, 12) -> answer (b, 12)."""
    return (message + key.repeat(1, MESSAGE // KEY)) % LETTERS


def make_batch(generator, key, tag=None):
    """Keys (b, 3), shown in clear or each behind its tag (b,) -> tokens (b, 15), answer (b, 12).

    Tokens are 16 letters, 16 key letters, and tags.
    """
    message = torch.randint(LETTERS, (len(key), MESSAGE), generator=generator)
    shown = LETTERS + key if tag is None else 2 * LETTERS + tag[:, None].expand(-1, KEY)
    return torch.cat([shown, message], 1).to(DEVICE), encipher(key, message).to(DEVICE)


class Tasks:
    """The secret keys, their prompts for training, and a fixed set for testing each."""

    def __init__(self, s):
        self.s, generator = s, torch.Generator().manual_seed(1000 + s.seed)
        self.keys = torch.randint(LETTERS, (s.first + s.later, KEY), generator=generator)
        tags = [torch.full((s.test,), t) for t in range(len(self.keys))]
        self.tests = [make_batch(generator, self.keys[tag], tag) for tag in tags]

    def batches(self, task, steps):
        """Prompts of one task, or for None each of a task drawn at random."""
        number = len(self.keys) if task is None else task
        generator = torch.Generator().manual_seed(100 * self.s.seed + number)
        for _ in range(steps):
            tag = torch.full((self.s.batch,), number)
            if task is None:
                tag = torch.randint(number, (self.s.batch,), generator=generator)
            yield make_batch(generator, self.keys[tag], tag)


def logits(model, tokens):
    """The model answers each letter of the message in that letter's own place."""
    return model(tokens)[:, KEY:, :LETTERS]


def loss_fn(model, batch):
    tokens, answer = batch
    return F.cross_entropy(logits(model, tokens).flatten(0, 1), answer.flatten())


@torch.no_grad()
def letters(model, batch):
    """The part of its letters that is right, for each prompt (b,)."""
    tokens, answer = batch
    return (logits(model, tokens).argmax(-1) == answer).float().mean(1)


def accuracy(model, batch):
    return float(letters(model, batch).mean())


@torch.no_grad()
def mean_hidden(model, tokens):
    """Features for the Router: the base model's hidden state, averaged over the prompt (b, f)."""
    return model.hidden(tokens).mean(1)


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


def pretrain(s):
    """The base model, which deciphers with any key that it is shown, and prompts to test that."""
    vocabulary = 2 * LETTERS + s.first + s.later
    model = ToyTransformer(vocabulary, s.width, length=KEY + MESSAGE).to(DEVICE)
    generator = torch.Generator().manual_seed(s.seed)

    def clear(size):
        return make_batch(generator, torch.randint(LETTERS, (size, KEY), generator=generator))

    def batches():
        for step in range(s.base_steps):
            if step % 25 == 0:
                say("base", f"pre-training, step {step} of {s.base_steps}")
            yield clear(s.base_batch)

    fit(model, batches(), s.base_steps, s.base_lr)
    return model, clear(s.test)


def train_lora(s, base, tasks, task, steps, model=None):
    """A model with a LoRA, a new one unless it is given, trained on a task (None: on all)."""
    model = model or attach_lora(copy.deepcopy(base), TARGETS, s.r)
    return model, fit(model, tasks.batches(task, steps), steps, s.lora_lr)


def randomise(share):
    """Random orthonormal bases of the same sizes, and no task: no adapter fits into them."""
    share = copy.deepcopy(share)
    for layer, pair in share.bases.items():
        share.bases[layer] = tuple(torch.linalg.qr(torch.randn_like(basis)).Q for basis in pair)
    for name in share.tasks:
        share.remove(name)
    return share


def compare(s):
    """Every row of the table, for one seed: {name: {accuracy_matrix, acc, bwt, …}}."""
    torch.manual_seed(s.seed)
    tasks, methods, T = Tasks(s), {}, s.first + s.later

    def tell(method, t, loss, found, earlier):
        more = f"  earlier tasks {sum(earlier) / len(earlier):.3f}" if earlier else ""
        say(method, f"task {t:2d}  loss {loss:.3f}  accuracy {found:.3f}{more}")

    def evaluate(model):
        return [accuracy(model, test) for test in tasks.tests]

    def record(name, R, trained, stored, began):
        """R: an accuracy matrix, or only the accuracies of what is not learned task by task."""
        matrix = R if isinstance(R[0], list) else None
        scores = metrics(R) if matrix else {"acc": sum(R) / T, "bwt": None, "forgetting": None}
        row = {"accuracy_matrix": matrix, **scores, "trained_per_task": trained, "stored": stored}
        methods[name] = row | {"seconds": time.perf_counter() - began}

    base, clear = pretrain(s)
    began, unknown, skill = time.perf_counter(), evaluate(base), accuracy(base, clear)
    say("base", f"key in clear {skill:.3f}, behind a tag {sum(unknown) / T:.3f}")
    record("base", unknown, None, 0, began)

    adapters, own, began = {}, [], time.perf_counter()
    for t in range(T):
        model, loss = train_lora(s, base, tasks, t, s.lora_steps)
        adapters[f"task {t}"] = lora_adapter(model)
        own.append(accuracy(model, tasks.tests[t]))
        tell("lora_per_task", t, loss, own[t], None)
    lora = sum(B.numel() + A.numel() for B, A in adapters["task 0"].factors.values())
    # tasks still to come have no adapter yet: the base answers
    apart = [own[: i + 1] + unknown[i + 1 :] for i in range(T)]
    record("lora_per_task", apart, lora, T * lora, began)

    R, model, began = [], None, time.perf_counter()
    for t in range(T):
        model, loss = train_lora(s, base, tasks, t, s.lora_steps, model)
        R.append(evaluate(model))
        tell("lora_sequential", t, loss, R[t][t], R[t][:t])
    record("lora_sequential", R, lora, lora, began)

    began = time.perf_counter()
    model, loss = train_lora(s, base, tasks, None, s.joint_steps)
    record("lora_joint", evaluate(model), None, lora, began)
    say("lora_joint", f"all tasks  loss {loss:.3f}  accuracy {methods['lora_joint']['acc']:.3f}")

    names = list(adapters)
    first = {name: adapters[name] for name in names[: s.first]}
    built = Share.from_adapters(first, variance=s.variance, stack=s.stack)

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
            tell(method, t, losses[-1], R[t][t], R[t][:t])
        record(method, R, trained, share.num_parameters(), began)
        return model

    share = copy.deepcopy(built)
    model = learn("share", share)
    learn("share_merge", copy.deepcopy(built), phi=1)
    learn("share_grow", copy.deepcopy(built), phi=1, grow=True)
    learn("random_basis", randomise(built))

    began = time.perf_counter()
    prompts = {name: [batch[0] for batch in tasks.batches(t, 8)] for t, name in enumerate(names)}
    hidden = {name: mean_hidden(base, torch.cat(tokens)) for name, tokens in prompts.items()}
    share.router = Router.fit(hidden)
    tokens, answer = (torch.cat(parts) for parts in zip(*tasks.tests, clear))
    route = share.router.route(mean_hidden(base, tokens))
    share.select(route)  # prompts of all tasks and prompts with the key in clear, in one batch
    *found, kept = [float(part.mean()) for part in letters(model, (tokens, answer)).split(s.test)]
    record("share_routed", found, None, share.num_parameters(), began)
    wanted = [name for name in (*names, None) for _ in range(s.test)]
    right = sum(a == b for a, b in zip(route, wanted)) / len(wanted)
    methods["share_routed"] |= {"routed_right": right, "base_kept": kept / skill}
    say("share_routed", f"routed right {right:.3f}, key in clear {kept:.3f} (base {skill:.3f})")

    began = time.perf_counter()
    share.average(names, "average")
    share.select("average")
    record("share_average", evaluate(model), None, share.num_parameters("average"), began)

    began = time.perf_counter()
    mixture, p = tasks.batches(None, s.joint_steps), s.general_p
    losses = train_coefficients(share, model, "general", mixture, loss_fn, p=p, lr=s.lr)
    share.select("general")
    general = share.num_parameters("general")
    record("share_general", evaluate(model), general, general, began)
    found = methods["share_general"]["acc"]
    say("share_general", f"all tasks  loss {losses[-1]:.3f}  accuracy {found:.3f}")
    return methods


def check(methods):
    """The claims: raises AssertionError, with the numbers, if one does not hold."""
    acc = {name: m["acc"] for name, m in methods.items()}
    apart, share, inf = acc["lora_per_task"], acc["share"], math.inf
    ratio = methods["lora_per_task"]["trained_per_task"] / methods["share"]["trained_per_task"]
    claims = [
        ("LoRA's trained numbers / share's", ratio, 100, inf),
        ("lora_sequential: forgetting", methods["lora_sequential"]["forgetting"], 0.5, inf),
        ("random_basis: ACC - share's", acc["random_basis"] - share, -inf, 0),
        ("share_routed: ACC - share's", acc["share_routed"] - share, -0.01, inf),
        ("share_routed: base accuracy kept", methods["share_routed"]["base_kept"], 0.95, inf),
    ]
    for name, most in (("share", 0.01), ("share_merge", 0.02), ("share_grow", 0.02)):
        claims += [(f"{name}: ACC / lora_per_task's", acc[name] / apart, 0.98, inf)]
        claims += [(f"{name}: forgetting", methods[name]["forgetting"], -inf, most)]
    for text, value, least, most in claims:
        print(f"  {text:36}{value:8.3f}   from {least} to {most}")
        assert least <= value <= most, f"{text}: {value:.4f} is not between {least} and {most}"


def spread(values, digits):
    """'mean', or of several values 'mean ± standard deviation'; nothing where one is None."""
    if None in values:
        return ""
    text = f"{statistics.mean(values) + 0.0:.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def show(runs):
    """The table: of one run, or mean ± standard deviation of several."""
    columns = {"acc": 3, "bwt": 3, "forgetting": 3}  # and their digits
    columns |= {"trained_per_task": 0, "stored": 0, "seconds": 1}
    print(f"\nchance {1 / LETTERS:.3f}; trained: numbers for the last task; stored: for all tasks")
    print(f"{'':16}" + "".join(f"{key.split('_')[0]:>17}" for key in columns))
    for name in runs[0]["methods"]:
        rows = [run["methods"][name] for run in runs]
        cells = [spread([row[key] for row in rows], digits) for key, digits in columns.items()]
        print(f"{name:16}" + "".join(f"{cell:>17}" for cell in cells))


def sweep(s):
    """The ablation: what variance, stack and p make of the first tasks and of two new ones."""
    torch.manual_seed(s.seed)
    tasks, (base, _), first = Tasks(s), pretrain(s), {}
    for t in range(s.first):
        model, loss = train_lora(s, base, tasks, t, s.lora_steps)
        first[f"task {t}"] = lora_adapter(model)
        say("lora_per_task", f"task {t:2d}  loss {loss:.3f}")

    def found(share, names, p):
        model, right = share.attach(copy.deepcopy(base)), []
        for name, t in names.items():
            if name not in share.tasks:
                batches, settings = tasks.batches(t, s.steps), {"p": p, "lr": s.lr}
                train_coefficients(share, model, name, batches, loss_fn, **settings)
            share.select(name)
            right.append(accuracy(model, tasks.tests[t]))
        return sum(right) / len(right)

    old, new = {name: t for t, name in enumerate(first)}, {"x": s.first, "y": s.first + 1}
    print("k: mean directions per layer and side; first: accuracy of the first tasks, compressed;")
    print("new: of two new tasks by coefficients alone; random: in random bases of these sizes")
    print("variance  stack       k  p  trained  first    new  random  new - random")
    for variance in (0.6, 0.8, 0.9, 0.99):
        for stack in ("factors", "updates"):
            built = Share.from_adapters(first, variance=variance, stack=stack)
            sizes = [basis.shape[1] for pair in built.bases.values() for basis in pair]
            k, kept = sum(sizes) / len(sizes), found(copy.deepcopy(built), old, None)
            for p in (1, 2, 4):
                a, b = found(copy.deepcopy(built), new, p), found(randomise(built), new, p)
                row = f"{variance:8}  {stack:7}{k:6.1f} {p:2} {p * sum(sizes):8} {kept:6.3f}"
                print(f"{row} {a:6.3f} {b:7.3f} {a - b:13.3f}", flush=True)


def seconds(function, times=3):
    """The median of so many runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def peak_memory(function):
    """The most bytes that its tensors have at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(changes))


def merge_long_way(share, new):
    """Phase 3 as published: rebuild every adapter, stack them, SVD, project."""
    everything = [share.reconstruct(task) for task in share.tasks] + [new]
    for layer in share.layers:
        pairs = [adapter.factors[layer] for adapter in everything]
        for X in (torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs]).T):
            U, S, _ = torch.linalg.svd(X - X.mean(1, keepdim=True), full_matrices=False)
            explained = S.square().cumsum(0)
            basis = U[:, : int((explained < share.variance * explained[-1]).sum()) + 1]
            basis.T @ X


def merge_costs():
    """What building and merging cost as tasks are many, beside the long way."""
    n, r, layers = 1024, 8, [f"layer {i}" for i in range(4)]
    spans = {layer: [torch.linalg.qr(torch.randn(n, 32)).Q for _ in "BA"] for layer in layers}

    def adapter():  # rank 8, in 32 directions that all tasks share, and noise
        def factor(span):
            return span @ torch.randn(32, r) + 0.02 * torch.randn(n, r)

        return Adapter({layer: (factor(B), factor(A).T) for layer, (B, A) in spans.items()})

    print(f"{len(layers)} layers of {n} × {n}, adapters of rank {r}; numbers stored with p = 1")
    print("memory: while building, of what the largest stack takes in float32")
    heads = ("tasks", "build s", "memory", "load+merge ms", "long way ms", "ratio")
    heads += ("stored", "apart", "ratio")
    print("".join(f"{head:>14}" for head in heads))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "share.safetensors"
        for t in (8, 50, 200, 500):
            adapters, new = {f"task {i}": adapter() for i in range(t)}, adapter()
            build = seconds(lambda: Share.from_adapters(adapters).save(path), 1)
            memory = peak_memory(lambda: Share.from_adapters(adapters)) / (4 * n * t * r)
            merge = seconds(lambda: Share.load(path).merge({"new": new}), 5)
            long = seconds(lambda: merge_long_way(Share.load(path), new), 1)
            shapes = [basis.shape for pair in Share.load(path).bases.values() for basis in pair]
            stored, apart = sum(m * k + t * k for m, k in shapes), 2 * t * len(layers) * n * r
            row = (f"{t}", f"{build:.2f}", f"{memory:.2f}", f"{1000 * merge:.1f}")
            row += (f"{1000 * long:.1f}", f"{long / merge:.1f}")
            row += (f"{stored:,}", f"{apart:,}", f"{apart / stored:.1f}")
            print("".join(f"{cell:>14}" for cell in row), flush=True)


def step_costs(n=1024, r=8):
    """What a training step of a layer costs beside LoRA's."""
    x, models = torch.randn(512, n, requires_grad=True), {}
    models["frozen layer"] = nn.Sequential(nn.Linear(n, n)).requires_grad_(False)
    models[f"LoRA r={r}"] = attach_lora(nn.Sequential(nn.Linear(n, n)), ["0"], r)
    one = {"task": Adapter({"0": (torch.randn(n, 32), torch.randn(32, n))})}
    for p in (1, 8):
        share = Share.from_adapters(one, k=32, p=p)
        models[f"Share p={p}"] = share.attach(nn.Sequential(nn.Linear(n, n)))
        share.select("task")
        for eps in share.coefficients["0"]:
            eps.requires_grad_(True)
    taken = {name: [] for name in models}
    for _ in range(60):  # in turns, so that a busy machine slows all of them down alike
        for name, model in models.items():
            taken[name].append(seconds(lambda: model(x).sum().backward(), 1))
    median = {name: 1000 * statistics.median(times) for name, times in taken.items()}
    frozen, lora = median["frozen layer"], median[f"LoRA r={r}"]
    print(f"\nforward and backward of one {n} × {n} layer, {len(x)} tokens, k = 32")
    print("                   ms   added to the frozen layer   of what LoRA adds")
    for name, ms in median.items():
        added = ms - frozen
        print(f"{name:14}{ms:7.2f} {added:27.2f} {added / (lora - frozen):19.2f}")


def svg(methods):
    """The accuracy matrices of lora_sequential and share side by side, as heat maps."""
    cell, top, shapes = 20, 60, []

    def text(x, y, words, more=""):
        shapes.append(f'<text x="{x}" y="{y}" {more}>{words}</text>')

    for left, name, title in ((60, "lora_sequential", "One LoRA"), (390, "share", "Share")):
        m, middle = methods[name], 'text-anchor="middle"'
        side = len(m["accuracy_matrix"]) * cell
        text(left, top - 32, title, 'font-weight="bold"')
        text(left, top - 12, f"ACC {m['acc']:.2f}, forgetting {abs(m['forgetting']):.2f}")
        text(left + side / 2, top + side + 32, "accuracy on task", middle)
        x, y = left - 32, top + side / 2
        text(x, y, "after learning task", f'{middle} transform="rotate(-90 {x} {y})"')
        for i, row in enumerate(m["accuracy_matrix"]):
            text(left - 6, top + i * cell + 14, i, 'class="small" text-anchor="end"')
            text(left + i * cell + 10, top + side + 14, i, f'class="small" {middle}')
            for j, value in enumerate(row):
                place = f'x="{left + j * cell}" y="{top + i * cell}" width="{cell}" height="{cell}"'
                shade = f'fill-opacity="{value:.2f}"'  # so that 0 is the page, light or dark
                shapes.append(f"<rect {place} {shade}><title>{value:.2f}</title></rect>")
    width, height = left + side + 20, top + side + 50
    style = "text { font: 14px sans-serif; fill: #1f2328 } .small { font-size: 11px }"
    style += " rect { fill: #2f7fd8; stroke: #8888; stroke-width: 0.5 }"
    dark = "text { fill: #e6edf3 } rect { fill: #58a6ff }"
    style += f" @media (prefers-color-scheme: dark) {{ {dark} }}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return "\n".join([head, f"<style>{style}</style>", *shapes, "</svg>\n"])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Share against LoRA on a sequence of ciphers.")
    parser.add_argument("--seed", type=int, default=0, help="of the keys, the data and the models")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--svg", type=Path, help="draw the first seed's matrices into this file")
    for flag, text in (
        ("--quick", "a smoke run on a smaller model"),
        ("--sweep", "the ablation instead"),
        ("--scaling", "the table of costs instead"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    args = parser.parse_args(argv)
    for path in filter(None, (args.json, args.svg)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: it takes 1 or more")
    torch.set_num_threads(1)  # these matrices are too small for more; a busy machine punishes it
    s = replace(Settings(seed=args.seed), **QUICK if args.quick else {})
    if args.sweep:
        return sweep(s)
    if args.scaling:
        torch.manual_seed(0)
        merge_costs()
        return step_costs()
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        began = time.perf_counter()
        methods = compare(replace(s, seed=seed))
        runs.append({"seed": seed, "seconds": time.perf_counter() - began, "methods": methods})
    show(runs)
    if args.json:
        args.json.write_text(json.dumps(runs[0] if args.seeds == 1 else {"runs": runs}))
    if args.svg:
        args.svg.write_text(svg(runs[0]["methods"]))
    if args.quick:
        return print("\nA smoke run, which claims nothing.")
    for run in runs:
        print(f"\nSeed {run['seed']}, after {run['seconds']:.0f} s, the claims:")
        check(run["methods"])


if __name__ == "__main__":
    main()
