"""Share and LoRA at work. The method itself is share.py; here it is only called.

In each layer all tasks share two bases, beta (n, kβ) and alpha (d, kα), of orthonormal columns. A
task has coefficients in them, eps_beta (kβ, p) and eps_alpha (kα, p), which give its change of the
layer's weight (n, d), of rank p. The first tasks keep LoRA's rank, each later one has p = 1:

    ΔW = B A  with  B = beta eps_beta  and  A = (alpha eps_alpha)^T

    phase 1  Share.from_adapters  the LoRA adapters of the first tasks make the bases and get
                                  coefficients by projection: beta^T B and alpha^T A^T
    phase 2  share.learn          each later task trains its coefficients and, with phi > 0, phi
                                  temporary columns beside each basis; the bases are frozen
    phase 3  the end of it        with phi > 0 the task's ΔW is merged into the bases, as
                                  share.merge does with finished adapters

Phase 1 puts columns of the first tasks side by side, and keeps the leading left singular vectors:
the fewest whose squared singular values add up to a given fraction, `variance`, of those of all.

    stack="factors"  the paper's: [B1 B2 …] for beta and [A1^T A2^T …] for alpha, minus the mean
                     column; its direction is added afterwards (ours), as columns are projected
                     whole.
    stack="updates"  ours, and the default here: [ΔW1 ΔW2 …] and [ΔW1^T ΔW2^T …], each ΔW divided by
                     its norm, no mean subtracted. These are the same however ΔW is split into B A.

To read the method alone, read `compare`, which calls `Experiment.learn_tasks`, which calls
`Experiment.learn_task`. All that stands below the comment "Here the method ends" can be left out.
The SVD and the projections are in share.py.

Share and LoRA learn twelve secret ciphers, one after another. A Vigenère cipher adds a key of three
letters, over and over, to a message of twelve: letter t of the answer is x_t + key[t % 3], modulo
16. The base model is pre-trained with the key in clear in front of the message. A task is one
secret key. Its prompts show no key, but in its place a tag of the task, which pre-training never
saw: only the adapter can know the key. (With an adapter for each task the tag tells nothing. It
matters where one adapter serves all tasks, and to the Router.) Chance is 1/16.

Tokens 0 to 15 are the letters, 16 to 31 the same letters as a key in clear, 32 + t is the tag of
task t. A prompt for the key 3 0 15, in clear and as that of task 1, and the answer to both:

    in clear  19 16 31   5  1  0   2  2  2  15 15 15   7  8  9
    task 1    33 33 33   5  1  0   2  2  2  15 15 15   7  8  9
    answer               8  1 15   5  2  1   2 15 14  10  8  8

    python train.py              phases 1 and 2; LoRA per task (rank 8 and 1); one LoRA for all
    python train.py --all        phase 3, too, and all other rows of the README's table
    python train.py --seeds 5    several seeds: mean ± standard deviation
    python train.py --sweep      the ablations: variance, stack and p; and what phi is for
    python train.py --scaling    what building and a merge cost
    python train.py --quick      a smoke run of all rows on a smaller model, which claims nothing
"""

import copy
import itertools
import json
import math
import re
import tempfile
import time
import timeit
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from share import (
    Adapter,
    Share,
    ToyTransformer,
    check_adapter,
    merge_layer,
    no_fast_path,
    train_coefficients,
    write_whole,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LETTERS, KEY, MESSAGE = 16, 3, 12
TARGETS = ("q", "k", "v", "o", "up", "down")  # layers that LoRA adapts


@dataclass
class Settings:
    seed: int = 0  # of the keys, the data and the models
    width: int = 128  # of the model's hidden states
    base_steps: int = 150  # training steps of the base model
    base_batch: int = 64  # prompts in each of them
    base_lr: float = 2e-3
    first: int = 4  # tasks whose LoRA adapters make the bases
    later: int = 8  # tasks learned after these
    batch: int = 16  # prompts in a training step
    joint_steps: int = 600  # of a training on all tasks at once
    test: int = 128  # prompts behind each accuracy
    # LoRA; its learning rate falls to 0
    r: int = 8  # rank
    lora_steps: int = 100  # per task; after these every LoRA has an accuracy of 1.000
    lora_lr: float = 5e-3
    lora_r1_lr: float = 2e-2  # of a LoRA of rank 1; the best of 5e-3, 1e-2, 2e-2 on seeds 0 to 4
    # Share; its learning rate is constant
    stack: str = "updates"  # what phase 1 stacks: "updates", ours, or "factors", the paper's
    variance: float = 0.95  # the fraction of a stack's variance that its basis explains
    p: int = 1  # pseudo-rank: columns of a later task's coefficients
    general_p: int = 4  # with --all: p of one set of coefficients for all tasks, share_general
    steps: int = 150  # per task
    lr: float = 4e-2


QUICK = dict(width=64, base_steps=100, first=2, later=2, lora_steps=40, steps=40, joint_steps=40)


# --- The data, the loss and the base model
# Each stream of prompts has a generator of its own, with the seed 100 * seed + stream:
#     0, 1, …    training on task 0, 1, …; the next number: on all tasks at once
#     98         pre-training, and a test of it
#     99         the keys and the tests of the tasks
PRETRAINING = 98
KEYS_AND_TESTS = 99


def new_generator(s, stream):
    return torch.Generator().manual_seed(100 * s.seed + stream)


def make_batch(generator, keys, tags=None):
    """Prompts for keys (b, 3), in clear or behind tags (b,): tokens (b, 15), answers (b, 12)."""
    message = torch.randint(LETTERS, (len(keys), MESSAGE), generator=generator)
    prefix = LETTERS + keys  # in clear
    if tags is not None:
        prefix = (2 * LETTERS + tags)[:, None].expand(-1, KEY)  # the tag, three times
    answers = (message + keys.repeat(1, MESSAGE // KEY)) % LETTERS
    return torch.cat([prefix, message], 1).to(DEVICE), answers.to(DEVICE)


def loss_fn(model, batch):
    tokens, answers = batch
    logits = model(tokens)[:, KEY:, :LETTERS]  # the answer to a letter stands where it does
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten())


@torch.no_grad()
def accuracy(model, batch):
    """The part of the letters that is right."""
    tokens, answers = batch
    logits = model(tokens)[:, KEY:, :LETTERS]
    return (logits.argmax(-1) == answers).float().mean().item()


def fit(model, batches, lr, last_lr=0.0):
    """Train, with Adam, the parameters that require gradients; returns how many numbers these are.

    The rate goes linearly from lr to last_lr.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = list(batches)  # the schedule needs their number
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=last_lr / lr, total_iters=len(batches)
    )
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        schedule.step()
    return sum(parameter.numel() for parameter in parameters)


def pretrain(s):
    """The base model, which deciphers with any key in clear, and prompts to test that."""
    torch.manual_seed(s.seed)
    vocabulary = 2 * LETTERS + s.first + s.later  # letters, keys in clear, tags
    model = ToyTransformer(vocabulary, s.width, length=KEY + MESSAGE)
    generator = new_generator(s, PRETRAINING)

    def batch_in_clear(size):
        keys = torch.randint(LETTERS, (size, KEY), generator=generator)
        return make_batch(generator, keys)

    batches = [batch_in_clear(s.base_batch) for _ in range(s.base_steps)]
    clear_test = batch_in_clear(s.test)
    fit(model.to(DEVICE), batches, s.base_lr)
    return model, clear_test


# --- LoRA: the baseline, and the source of adapters
class LoRALinear(nn.Linear):
    """h = W0 x + B A x with W0 frozen (Hu et al. 2021), no scaling; `add_lora` makes A and B."""

    def forward(self, input):
        h = super().forward(input)  # W0 x, plus the layer's bias
        x = input.to(self.lora_A.dtype)  # float32 even if W0 is in half
        BAx = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return (h + BAx).to(h.dtype)


def attach_lora(model, targets, r=8):
    """Make LoRALinear of the nn.Linear's whose names end in `targets`; freezes, returns `model`."""
    if type(r) is not int or r < 1:
        raise ValueError(f"r is {r!r}; it takes an integer, 1 or more")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = set()
    for target in targets:
        # A target is the last parts of a dotted name: "0.q" ends in "q", but "0.eq" does not.
        found = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"target {target!r} ends the name of no nn.Linear in the model")
        chosen.update(found)
    if not chosen:
        raise ValueError("targets is empty, and so ends the name of no nn.Linear")
    model.requires_grad_(False)
    for name, linear in linears.items():  # not the set: the order fixes whose random A is whose
        if name in chosen:
            add_lora(linear, r)
    return model


def add_lora(linear, r):
    W0 = linear.weight
    dtype = torch.promote_types(W0.dtype, torch.float32)  # float32 factors beside a W0 in half
    A = W0.new_empty(r, linear.in_features, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=5**0.5)
    linear.lora_A = nn.Parameter(A)
    linear.lora_B = nn.Parameter(W0.new_zeros(linear.out_features, r, dtype=dtype))  # so ΔW is 0
    linear.register_forward_pre_hook(no_fast_path)  # nn.TransformerEncoderLayer may only read W0
    linear.__class__ = LoRALinear  # the same object: its name, weight and place in the model stay


def lora_adapter(model):
    """The Adapter, a copy, that a model's LoRALinear layers hold."""
    factors = {}
    for layer, linear in model.named_modules():
        if isinstance(linear, LoRALinear):
            factors[layer] = linear.lora_B.detach().clone(), linear.lora_A.detach().clone()
    return Adapter(factors)


# --- The experiment
class Experiment:
    """One seed: keys, tests, the pre-trained base, and how LoRA and Share learn the tasks."""

    def __init__(self, s):
        self.s = s
        generator = new_generator(s, KEYS_AND_TESTS)
        self.keys = torch.randint(LETTERS, (s.first + s.later, KEY), generator=generator)
        self.names = [f"task {t}" for t in range(len(self.keys))]
        self.tests = []  # a batch for each task
        for t in range(len(self.keys)):
            tags = torch.full((s.test,), t)  # all prompts are of this task
            self.tests.append(make_batch(generator, self.keys[tags], tags))
        self.base, self.clear_test = pretrain(s)
        self.base_accuracies = self.accuracies(self.base)
        print(f"{'base':16}key in clear: {accuracy(self.base, self.clear_test):.3f}", flush=True)

    def batches(self, t, steps):
        """Training prompts of task t."""
        generator = new_generator(self.s, t)
        tags = torch.full((self.s.batch,), t)
        for _ in range(steps):
            yield make_batch(generator, self.keys[tags], tags)

    def mixed_batches(self, steps):
        """Training prompts, each of a task drawn at random."""
        tasks = len(self.keys)
        generator = new_generator(self.s, tasks)
        for _ in range(steps):
            tags = torch.randint(tasks, (self.s.batch,), generator=generator)
            yield make_batch(generator, self.keys[tags], tags)

    def accuracies(self, model):
        """The accuracies of a model, as it is, on all tasks."""
        return [accuracy(model, test) for test in self.tests]

    def matrix_row(self, method, learned):
        """Print a line on task t, the last one learned; return its row of the accuracy matrix.

        learned: the accuracies on tasks 0 to t. Later tasks get the accuracies of the base.
        """
        t = len(learned) - 1
        so_far = mean(learned)
        print(f"{method:16}task {t:2}  accuracy {learned[t]:.3f}  mean so far {so_far:.3f}")
        return learned + self.base_accuracies[t + 1 :]

    def new_lora(self, start_name, r):
        """A copy of the base with a new LoRA, whose start depends on seed and name alone."""
        torch.manual_seed(self.s.seed + zlib.crc32(start_name.encode()))  # hash() varies by run
        return attach_lora(copy.deepcopy(self.base), TARGETS, r)

    def train_lora(self, method, t, r, lr):
        """A new LoRA, trained on task t: the model, and how many numbers were trained."""
        model = self.new_lora(f"{method} {t}", r)
        trained = fit(model, self.batches(t, self.s.lora_steps), lr)
        return model, trained

    def lora_per_task(self, method, r, lr):
        """A LoRA for each task: {task: Adapter}, and their row of the table."""
        adapters = {}
        learned = []  # accuracy of each task with its LoRA, which later tasks do not change
        matrix = []
        for t, name in enumerate(self.names):
            model, trained = self.train_lora(method, t, r, lr)
            adapters[name] = lora_adapter(model)
            learned.append(accuracy(model, self.tests[t]))
            matrix.append(self.matrix_row(method, learned))
        return adapters, metrics(matrix, trained, stored=len(adapters) * trained)

    def lora_sequential(self):
        """One LoRA, trained through the tasks."""
        s = self.s
        model = self.new_lora("lora_sequential", s.r)
        matrix = []
        for t in range(len(self.names)):
            trained = fit(model, self.batches(t, s.lora_steps), s.lora_lr)
            learned = [accuracy(model, test) for test in self.tests[: t + 1]]
            matrix.append(self.matrix_row("lora_sequential", learned))
        return metrics(matrix, trained, stored=trained)  # one LoRA for all

    def learn_task(self, share, model, t, p, phi=0, grow=True):
        """Phase 2 for task t and, with phi > 0, phase 3. Returns how many numbers were trained.

        Trained are, in each layer of `model` (the base with the share attached), from a random
        start, where ΔW is small, but not 0:

            eps_beta (kβ + phi, p), eps_alpha (kα + phi, p)  the coefficients
            T_beta (n, phi), T_alpha (d, phi)                temporary columns beside the bases

            ΔW = B A  with  B = [beta T_beta] eps_beta  and  A = ([alpha T_alpha] eps_alpha)^T
        """
        s = self.s
        seed = 100 * s.seed + t  # of the random start
        with share.learn(model, self.names[t], p=p, phi=phi, grow=grow, seed=seed):
            # In this block these numbers alone, as parameters of the model, require gradients.
            trained = fit(model, self.batches(t, s.steps), s.lr, last_lr=s.lr)
        # Leaving the block has stored the coefficients or, with phi > 0, done phase 3:
        #     grow=True   ours: each basis gets the directions of ΔW that it lacks; other ΔW stay
        #     grow=False  the paper's: phase 1 again, in which B and A of all tasks, this one, too,
        #                 are stacked as the share's `stack` says; all ΔW may change
        return trained

    def selected_accuracies(self, share, model, tasks):
        """The accuracies of tasks, given by their numbers, each with its coefficients."""
        accuracies = []
        for t in tasks:
            share.select(self.names[t])  # from now on `model` computes with W0 + ΔW of task t
            accuracies.append(accuracy(model, self.tests[t]))
        return accuracies

    def learn_tasks(self, method, share, lora_matrix, phi=0, grow=True):
        """Learn the tasks that the share lacks, one by one. Returns the attached model and the row.

        The tasks that it has were learned by LoRA. So the first rows of the accuracy matrix, one
        for each of them, are those of lora_matrix, and what phase 1 loses counts as forgetting.
        """
        model = share.attach(copy.deepcopy(self.base))
        known = len(share.tasks)
        matrix = lora_matrix[:known]
        for t in range(known, len(self.names)):
            trained = self.learn_task(share, model, t, self.s.p, phi, grow)
            learned = self.selected_accuracies(share, model, range(t + 1))
            matrix.append(self.matrix_row(method, learned))
        return model, metrics(matrix, trained, num_parameters(share))


# --- Rows of the table
def metrics(matrix, trained, stored):
    """The row of a method that learns tasks one by one.

    matrix[i][j] is the accuracy on task j after learning tasks 0 to i; for j > i, the base's.

    acc         the accuracies at the end
    bwt         at the end minus just after learning the task (Lopez-Paz and Ranzato 2017)
    forgetting  the best before the last task minus at the end (Chaudhry et al. 2018)

    All are means over the tasks; bwt and forgetting leave out the last one.

    trained: how many numbers were trained for the last task. stored: how many, for all tasks.
    """
    last = len(matrix) - 1
    end = matrix[last]
    bwt = [end[j] - matrix[j][j] for j in range(last)]
    # The best of all earlier rows, even of those before task j was learned
    forgetting = [max(matrix[i][j] for i in range(last)) - end[j] for j in range(last)]
    return {
        "accuracy_matrix": matrix,
        "acc": mean(end),
        "bwt": mean(bwt),
        "forgetting": mean(forgetting),
        "trained_per_task": trained,
        "stored": stored,
    }


def row_of_accuracies(accuracies, stored):
    """The row of tasks that are not learned one by one, so that none can be forgotten."""
    missing = dict.fromkeys(("accuracy_matrix", "bwt", "forgetting", "trained_per_task"))
    return {"acc": mean(accuracies), "stored": stored, **missing}


def num_basis_parameters(share):
    return sum(beta.numel() + alpha.numel() for beta, alpha in share.bases.values())


def num_parameters(share, task=None):
    """How many numbers are stored: for one task (coefficients, extras), or in all, bases too."""
    if task is None:
        return num_basis_parameters(share) + sum(num_parameters(share, x) for x in share.tasks)
    extras = share.reconstruct(task).extras.values()  # such as a head; here there are none
    total = sum(extra.numel() for extra in extras)
    for by_task in share.coefficients.values():  # of a layer
        if task in by_task:
            eps_beta, eps_alpha = by_task[task]
            total += eps_beta.numel() + eps_alpha.numel()
    return total


# --- The story
def compare(s, everything=False):
    """One seed of the experiment: {method: row of the table}."""
    e = Experiment(s)
    rows = {"base": row_of_accuracies(e.base_accuracies, stored=0)}
    # For comparison: a LoRA for each task, at rank r and at the least rank; one LoRA through all.
    adapters, rows["lora_per_task"] = e.lora_per_task("lora_per_task", s.r, s.lora_lr)
    _, rows["lora_r1"] = e.lora_per_task("lora_r1", 1, s.lora_r1_lr)
    rows["lora_sequential"] = e.lora_sequential()
    # Phase 1: bases from the first tasks' LoRA adapters. These tasks keep rank r.
    first_adapters = {name: adapters[name] for name in e.names[: s.first]}
    built = Share.from_adapters(first_adapters, variance=s.variance, stack=s.stack)
    lora_matrix = rows["lora_per_task"]["accuracy_matrix"]
    # Phase 2, for each later task: coefficients of s.p columns.
    share = copy.deepcopy(built)  # a copy, as `built` is needed again
    model, rows["share"] = e.learn_tasks("share", share, lora_matrix, phi=0)
    if not everything:
        return rows
    # Phases 2 and 3, for each later task: with a temporary column beside each basis, then merged,
    # first in the paper's way, then in ours.
    for method, grow in (("share_merge", False), ("share_grow", True)):
        merging = copy.deepcopy(built)
        _, rows[method] = e.learn_tasks(method, merging, lora_matrix, phi=1, grow=grow)
    # Here the method ends.
    return rows | other_rows(e, built, share, model)


# --- The claims and the table
def check(methods):
    """The claims about the rows that are there: AssertionError, with numbers, if one is wrong."""

    def claim(text, value, least=-math.inf, most=math.inf):
        print(f"  {text:36}{value:8.3f}   from {least} to {most}")
        assert least <= value <= most, f"{text}: {value:.4f} is not between {least} and {most}"

    share_row = methods["share"]
    lora_row = methods["lora_per_task"]
    ratio = lora_row["trained_per_task"] / share_row["trained_per_task"]
    claim("LoRA's trained numbers / share's", ratio, least=100)
    claim("lora_sequential: forgetting", methods["lora_sequential"]["forgetting"], least=0.5)
    for name, most in (("share", 0.01), ("share_merge", 0.02), ("share_grow", 0.02)):
        if name in methods:  # the latter two with --all
            ratio = methods[name]["acc"] / lora_row["acc"]
            claim(f"{name}: ACC / lora_per_task's", ratio, least=0.98)
            claim(f"{name}: forgetting", methods[name]["forgetting"], most=most)
    if "random_basis" in methods:
        difference = methods["random_basis"]["acc"] - share_row["acc"]
        claim("random_basis: ACC - share's", difference, most=0)
    if "share_routed" in methods:
        routed = methods["share_routed"]
        claim("share_routed: ACC - share's", routed["acc"] - share_row["acc"], least=-0.01)
        claim("share_routed: base accuracy kept", routed["base_kept"], least=0.95)


def break_even(methods, other, first):
    """The least number of tasks, from `first` on, for which Share stores less than LoRAs do.

    For n tasks LoRAs store n lora_each, Share fixed + n share_each: `fixed` are the bases, and what
    the first tasks, of rank r, store more than later ones. None: never.
    """
    share_row = methods["share"]
    share_each = share_row["trained_per_task"]  # a later task stores what it trains
    lora_each = methods[other]["trained_per_task"]
    if share_each >= lora_each:
        return None
    learned = len(share_row["accuracy_matrix"])  # how many tasks "stored" is for
    fixed = share_row["stored"] - learned * share_each
    tasks = first
    while fixed + tasks * share_each >= tasks * lora_each:
        tasks += 1
    return tasks


def spread(values, digits):
    """'mean', or of several values 'mean ± standard deviation'; nothing where one is None."""
    if None in values:
        return ""
    rounded = round(mean(values), digits) or 0.0  # never -0.0
    text = f"{rounded:.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def print_table(runs, first):
    """The rows of one run, or mean ± standard deviation of several."""
    columns = {"acc": 3, "bwt": 3, "forgetting": 3, "trained_per_task": 0, "stored": 0}  # digits
    print(f"\nchance {1 / LETTERS:.3f}; trained: numbers for the last task; stored: for all tasks")
    print(f"{'':16}" + "".join(f"{key.split('_')[0]:>17}" for key in columns))
    for name in runs[0]["methods"]:
        line = f"{name:16}"
        for key, digits in columns.items():
            values = [run["methods"][name][key] for run in runs]
            line += f"{spread(values, digits):>17}"
        print(line)
    for other in ("lora_per_task", "lora_r1"):
        tasks = [break_even(run["methods"], other, first) for run in runs]
        if None not in tasks:
            print(f"from {spread(tasks, 0)} tasks on share stores less than {other}")


# --- Ours, when nobody names the task: a Router, or the average of all tasks
@dataclass
class Router:
    """Picks the task: the nearest class mean, or the base (None) when none is near (radius).

    Distances are Mahalanobis': features (N, f) times scale (f, f), see `whitening`, are compared.
    """

    tasks: list[str]
    means: Tensor  # (t, f), scaled
    scale: Tensor
    radius: float

    @classmethod
    @torch.no_grad()
    def fit(cls, features):
        """From {task: features (N, f)}, none of which is kept. All N together should be >> f.

        The radius shall take in nearly all samples of a task, and nothing as far away as another:

        own     98th percentile of a sample's distance to its task's mean, made without the sample
        other   2nd percentile of a sample's distance to the nearest mean of another task
        radius  (own + other) / 2 if tasks are apart, so own < other; if not, own
        """
        check_features(features)
        samples = [x.double() for x in features.values()]
        residuals = torch.cat([leave_one_out_residuals(x) for x in samples])
        scale = whitening(residuals)
        scaled = [x @ scale for x in samples]
        means = torch.stack([x.mean(0) for x in scaled])
        to_own = (residuals @ scale).norm(dim=1)
        own = torch.quantile(to_own, 0.98)
        radius = own
        if len(samples) > 1:
            other = torch.quantile(distances_to_others(scaled, means), 0.02)
            if own < other:
                radius = (own + other) / 2
        return cls(list(features), means, scale, float(radius))

    def route(self, features):
        """features (N, f) -> for each sample its task or None, as `Share.select` takes them."""
        if features.dim() != 2 or features.shape[1] != len(self.scale):
            raise ValueError(f"features {tuple(features.shape)} are not (N, {len(self.scale)})")
        scaled = features.to(self.scale) @ self.scale
        distances, nearest = distances_between(scaled, self.means).min(dim=1)
        pairs = zip(distances.tolist(), nearest.tolist(), strict=True)
        return [self.tasks[i] if distance <= self.radius else None for distance, i in pairs]


def check_features(features):
    """ValueError unless {task: features (N, f)} is as `Router.fit` needs it."""
    if not features:
        raise ValueError("features is empty; it takes {task: features (N, f)}, one or more")
    first = next(iter(features.values()))
    for task, x in features.items():
        same_width = x.shape[1:] == first.shape[1:]
        if x.dim() != 2 or len(x) < 2 or not same_width or not x.isfinite().all():
            what = f"task {task!r}: features {tuple(x.shape)}"
            raise ValueError(f"{what}; it takes finite (N, f), N from 2 on, f equal for all tasks")


def whitening(residuals):
    """A matrix M (f, f) with which ‖r M‖ is the Mahalanobis distance √(r C^-1 r^T), for rows r.

    C = 0.9 covariance + 0.1 its diagonal, of residuals (N, f): with few samples, some directions of
    the covariance have almost no variance.
    """
    # No mean is subtracted: the residuals of each task add up to 0.
    covariance = residuals.T @ residuals / len(residuals)
    variances = covariance.diagonal()
    C = 0.9 * covariance + 0.1 * variances.diag()
    least = 1e-7 * variances.max() + 1e-30  # so that C has an inverse if a feature is constant
    C.diagonal().add_(least)
    # Cholesky: C^-1 = M M^T, and so r C^-1 r^T = (r M) (r M)^T = ‖r M‖².
    return torch.linalg.cholesky(torch.linalg.inv(C))


def leave_one_out_residuals(x):
    """Each row of x (N, f) minus the mean of the N - 1 other rows."""
    means_of_others = (x.sum(0) - x) / (len(x) - 1)  # (N, f)
    return x - means_of_others


def distances_to_others(samples, means):
    """For each sample of each task the distance to the nearest mean of another task."""
    nearest = []
    for i, x in enumerate(samples):
        others = torch.cat([means[:i], means[i + 1 :]])  # (t - 1, f)
        nearest.append(distances_between(x, others).min(dim=1).values)
    return torch.cat(nearest)


def distances_between(x, means):
    """The distances (N, t) of rows x (N, f) to means (t, f)."""
    # By default, from 26 rows on, cdist multiplies matrices, which is inexact far from the origin.
    return torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist")


def average(share, tasks, name, p=None):
    """Add a task: the mean of the tasks' ΔW, cut to the best fit of rank p; p None does not cut.

    Coefficients cannot be averaged, as (B, A) and (-B, -A) are the same ΔW. But the mean of ΔW is

        (B1 A1 + B2 A2 + … + Bn An) / n = ([B1 B2 … Bn] / n) [A1; A2; …; An]
    """
    adapters = [share.reconstruct(task) for task in tasks]
    factors = {}
    for layer in share.layers:
        # A task without this layer has ΔW = 0 in it: no factors, but it counts in n.
        pairs = [adapter.factors[layer] for adapter in adapters if layer in adapter.factors]
        if pairs:
            B = torch.cat([B for B, _ in pairs], dim=1) / len(adapters)
            factors[layer] = B, torch.cat([A for _, A in pairs])
    if p is None:  # as many columns as the largest basis has: no ΔW has a higher rank
        sizes = [basis.shape[1] for bases in share.bases.values() for basis in bases]
        p = max([1] + sizes)  # 1, if all are empty
    share.add(name, Adapter(factors), p)  # all ΔW lie in the bases: projection loses nothing


# --- The other rows, of --all
def other_rows(e, built, share, model):
    """Rows for comparison: {method: row}.

    built: a share of the first tasks. share: of all tasks, attached to model; it gets two more.
    """
    s = e.s
    rows = {}
    # all tasks, the first ones, too, learned in random bases
    _, rows["random_basis"] = e.learn_tasks("random_basis", random_bases(built, s.seed), [])
    # one LoRA, trained on all tasks at once
    lora = e.new_lora("lora_joint", s.r)
    trained = fit(lora, e.mixed_batches(s.joint_steps), s.lora_lr)
    rows["lora_joint"] = row_of_accuracies(e.accuracies(lora), stored=trained)
    # the share if nobody names the task; before it gets more tasks, as their numbers are counted
    rows["share_routed"] = share_routed(e, share, model)
    # the mean of all tasks' ΔW, as one more task
    average(share, e.names, "average")
    # One set of coefficients for all tasks: phase 2 on a mixture of their prompts.
    # train_coefficients is share.learn and a loop in one call.
    mixture = e.mixed_batches(s.joint_steps)
    settings = dict(p=s.general_p, lr=s.lr, seed=s.seed)
    train_coefficients(share, model, "general", mixture, loss_fn, **settings)
    for name in ("average", "general"):  # the two are tried on the prompts of all tasks
        share.select(name)
        stored = num_basis_parameters(share) + num_parameters(share, name)
        rows[f"share_{name}"] = row_of_accuracies(e.accuracies(model), stored)
    return rows


def random_bases(share, seed):
    """A share without tasks, with random orthonormal bases of the same sizes."""
    share = copy.deepcopy(share)
    for name in list(share.tasks):
        share.remove(name)
    torch.manual_seed(seed)
    for layer, bases in share.bases.items():
        share.bases[layer] = tuple(torch.linalg.qr(torch.randn_like(basis)).Q for basis in bases)
    return share


@torch.no_grad()
def share_routed(e, share, model):
    """The `Router` picks the task of each prompt; for a key in clear the base."""
    body = copy.deepcopy(e.base)
    body.head = nn.Identity()  # so that body(tokens) are the base's hidden states (b, 15, width)

    def hidden(tokens):
        return body(tokens).mean(1)  # (b, width), the mean over the prompt

    features = {}
    for t, name in enumerate(e.names):
        features[name] = hidden(torch.cat([tokens for tokens, _ in e.batches(t, steps=8)]))
    router = Router.fit(features)

    def routed_accuracy(batch):
        tokens, _ = batch
        names = router.route(hidden(tokens))  # for each prompt a task's name, or None: the base
        share.select(names)  # a mixed batch
        return accuracy(model, batch)

    of_tasks = [routed_accuracy(test) for test in e.tests]
    stored = num_parameters(share) + router.means.numel() + router.scale.numel()
    row = row_of_accuracies(of_tasks, stored)
    row["base_kept"] = routed_accuracy(e.clear_test) / accuracy(e.base, e.clear_test)
    return row


# --- Ablations, costs, the picture
SWEEP_LEGEND = """
from   how many tasks made the bases; random: random bases, of the sizes in the line before
k      directions of a basis, on average, before the new tasks
new    accuracy of two new tasks, learned at p
first  accuracy afterwards of the tasks that made the bases, at rank r; nan: there are none
grow   how phi columns are merged: by ours (True), by the paper's phase 3 (False)

from    variance  stack       k  p  phi   grow     new   first  trained   stored"""


def sweep(s):
    """The ablations: two new tasks, learned in bases of several kinds and in several ways."""
    e = Experiment(s)
    adapters = {}  # of the first tasks; the same as in `compare`
    for t, name in enumerate(e.names[: s.first]):
        lora, _ = e.train_lora("lora_per_task", t, s.r, s.lora_lr)
        adapters[name] = lora_adapter(lora)
    print(SWEEP_LEGEND)
    # Which variance, stack and p, beside random bases of the same sizes?
    for variance, stack in itertools.product((0.6, 0.9), ("factors", "updates")):
        built = Share.from_adapters(adapters, variance=variance, stack=stack)
        for p in (1, 4):
            ablation(e, built, p)
            ablation(e, random_bases(built, s.seed), p)
    # From how many first tasks on do bases do without temporary columns?
    for count in sorted({1, 2, s.first}):
        some = {name: adapters[name] for name in e.names[:count]}
        built = Share.from_adapters(some, variance=s.variance, stack=s.stack)
        ablation(e, built, s.p)
        for phi, grow in itertools.product((1, 2, 4), (False, True)):
            ablation(e, built, s.p, phi, grow)


def ablation(e, built, p, phi=0, grow=True):
    """Learn two new tasks in a copy of a share, and print a line."""
    share = copy.deepcopy(built)
    model = share.attach(copy.deepcopy(e.base))
    k = mean([basis.shape[1] for bases in share.bases.values() for basis in bases])
    new_tasks = range(e.s.first, e.s.first + 2)
    for t in new_tasks:
        trained = e.learn_task(share, model, t, p, phi, grow)
    of_new = mean(e.selected_accuracies(share, model, new_tasks))
    if built.tasks:
        made_of = str(len(built.tasks))
        of_first = mean(e.selected_accuracies(share, model, range(len(built.tasks))))
    else:
        made_of = "random"
        of_first = math.nan
    how = str(grow) if phi > 0 else "-"
    line = f"{made_of:6} {share.variance:9}  {share.stacking:7} {k:5.1f} {p:2} {phi:4} {how:>6}"
    line += f" {of_new:7.3f} {of_first:7.3f} {trained:8} {num_parameters(share):8}"
    print(line, flush=True)


def scaling(seed, counts, n=1024, r=8):
    """The costs of building and merging, by the number of tasks: one layer, made-up adapters."""
    build_share = partial(Share.from_adapters, variance=0.6, stack="factors")
    torch.manual_seed(seed)
    B_span = torch.linalg.qr(torch.randn(n, 32)).Q  # 32 directions that all tasks share
    A_span = torch.linalg.qr(torch.randn(n, 32)).Q

    def new_adapter():
        """Of one layer, "0"; its factors are in these directions but for a little noise."""
        B = B_span @ torch.randn(32, r) + 0.02 * torch.randn(n, r)
        A_T = A_span @ torch.randn(32, r) + 0.02 * torch.randn(n, r)
        return Adapter({"0": (B, A_T.T)})

    print(f"one layer of {n} × {n}, adapters of rank {r}, variance 0.6, stack 'factors'")
    print("build      seconds of phase 1")
    print("merge      milliseconds to load a share and merge one adapter by the paper's phase 3")
    print("plainly    the same on whole columns, which `Share.merge` shortens first")
    print("stored     numbers of a share at p = 1 (the times are of one at rank r)")
    print("apart      numbers of the adapters")
    print("tasks   build   merge    plainly   ratio   stored       apart")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "share.safetensors"
        for tasks in counts:
            adapters = {f"task {i}": new_adapter() for i in range(tasks)}
            build = seconds(build_share, adapters)
            build_share(adapters).save(path)
            merge = 1000 * seconds(load_and_merge, path, new_adapter())
            plainly = 1000 * seconds(load_and_merge_plainly, path, new_adapter())
            stored = num_parameters(build_share(adapters, p=1))
            apart = tasks * 2 * n * r
            line = f"{tasks:5} {build:7.2f} {merge:7.1f} {plainly:10.1f} {plainly / merge:7.1f}"
            print(f"{line} {stored:8,} {apart:11,}", flush=True)


def seconds(function, *arguments):
    """The median time of three calls."""
    times = timeit.repeat(partial(function, *arguments), number=1, repeat=3)
    return median(times)


def load_and_merge(path, adapter):
    Share.load(path).merge({"new": adapter}, grow=False)


def load_and_merge_plainly(path, adapter):
    """The same on whole columns, of n numbers, which `Share.merge` makes shorter."""
    share = Share.load(path)
    B, A = adapter.factors["0"]
    new = {"new": (B, A.T)}  # merge_layer takes columns on both sides
    settings = dict(variance=share.variance, k=None, stacking=share.stacking)  # k=None: by variance
    merge_layer(share.bases["0"], share.coefficients["0"], new, **settings)


def svg(methods, seed):
    """The accuracy matrices of lora_sequential and share side by side, as heat maps.

    Each is 240 wide, and has 60 above and on its left for words.
    """
    style = "text { font: 14px sans-serif; fill: #1f2328 } rect { fill: #2f7fd8; stroke: #8888 } "
    style += "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #58a6ff } }"
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 340">']
    lines.append(f"<style>{style}</style>")
    for left, title, method in ((60, "One LoRA", "lora_sequential"), (380, "Share", "share")):
        row = methods[method]
        matrix = row["accuracy_matrix"]
        cell = 240 // len(matrix)
        scores = f"ACC {row['acc']:.2f}, forgetting {spread([row['forgetting']], 2)}"
        lines.append(f'<g transform="translate({left} 60)">')
        lines.append(f'<text y="-32">{title}, seed {seed}</text>')
        lines.append(f'<text y="-12">{scores}</text>')
        lines.append('<text y="262">accuracy on task 0, 1, … →</text>')
        turn = 'transform="translate(-22 0) rotate(90)"'
        lines.append(f"<text {turn}>after learning task 0, 1, … →</text>")
        for i, accuracies in enumerate(matrix):
            for j, part in enumerate(accuracies):
                place = f'x="{cell * j}" y="{cell * i}" width="{cell}" height="{cell}"'
                lines.append(f'<rect {place} fill-opacity="{part:.2f}"/>')  # 0 shows the page
        lines.append("</g>")
    lines.append("</svg>\n")
    return "\n".join(lines)


# --- PEFT's files
# Options of LoraConfig (PEFT 0.21) with which a layer is not W0 x + scaling B A x:
PEFT_VARIANTS = ["use_dora", "lora_bias", "use_qalora", "use_bdlora"]  # another forward pass
PEFT_VARIANTS += ["arrow_config", "kasa_config", "monteclora_config"]  # another forward pass
PEFT_VARIANTS += ["target_parameters", "trainable_token_indices"]  # weights of no nn.Linear
PEFT_VARIANTS += ["alora_invocation_tokens"]  # it adapts some tokens only
PEFT_VARIANTS += ["layer_replication"]  # it adds layers to the model
# Values of init_lora_weights that leave W0 as it is; pissa, for one, changes it:
PEFT_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Options that `save_peft` leaves out:
PEFT_DROPPED = ["eva_config", "corda_config", "loftq_config"]  # of the start of training
PEFT_DROPPED += ["rank_pattern", "alpha_pattern"]  # all layers get one rank, and scaling 1
PEFT_DROPPED += ["exclude_modules", "layers_to_transform", "layers_pattern"]  # all are named
PEFT_NAME = r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>A|B)(?:\.default)?\.weight"


def load_peft(directory):
    """The Adapter in a PEFT directory, its scaling folded into B; heads and biases become extras.

    FileNotFoundError. ValueError, which names the directory, if it is damaged or no plain LoRA.
    """
    directory = Path(directory)
    text = (directory / "adapter_config.json").read_bytes()
    raw = (directory / "adapter_model.safetensors").read_bytes()
    try:
        config = dict(json.loads(text))
        tensors = safetensors.torch.load(raw)
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{directory} is damaged: {error}") from None
    check_plain_lora(config, directory)
    by_layer = {}  # {layer: {"A": tensor, "B": tensor}}
    extras = {}
    for name, tensor in sorted(tensors.items()):  # safetensors gives them in any order
        match = re.fullmatch(PEFT_NAME, name)
        if match is None:
            extras[name] = tensor
        else:
            by_layer.setdefault(match["layer"], {})[match["side"]] = tensor
    check_extras(extras, config, directory)
    factors = {}
    for layer, sides in by_layer.items():
        A, B = sides.get("A"), sides.get("B")
        are_matrices = A is not None and B is not None and A.dim() == B.dim() == 2
        if not are_matrices or len(A) == 0 or B.shape[1] != len(A):
            raise ValueError(f"{directory}, layer {layer!r} has no A (r, d) with a B (n, r)")
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        scaling = peft_scaling(config, layer, len(A), directory)
        factors[layer] = B.to(dtype) * scaling, A.to(dtype)
    if not factors:
        raise ValueError(f"{directory} has no LoRA weights")
    return Adapter(factors, extras, config)


def check_plain_lora(config, directory):
    """ValueError, with the options at fault, unless ΔW = scaling * B A beside an unchanged W0."""
    at_fault = {name: config[name] for name in PEFT_VARIANTS if config.get(name)}
    if config.get("peft_type") != "LORA":
        at_fault["peft_type"] = config.get("peft_type")
    if config.get("init_lora_weights") not in PEFT_STARTS:
        at_fault["init_lora_weights"] = config["init_lora_weights"]
    if at_fault:
        raise ValueError(f"{directory} is no plain LoRA on an unchanged model: {at_fault}")


def check_extras(extras, config, directory):
    """ValueError for a LoRA tensor that is no A or B of a layer, such as DoRA's magnitudes.

    Extras are stored, but never applied: such a tensor would be ignored in silence. A head called,
    say, lora_head is fine: modules_to_save lists it.
    """
    heads = {module.split(".")[-1] for module in config.get("modules_to_save") or []}
    for name in extras:
        for part in name.split("."):
            if part.startswith("lora_") and part not in heads:
                message = f"{name!r} is no base_model.model.LAYER.lora_A/B.weight"
                raise ValueError(f"{directory}: {message}")


def peft_scaling(config, layer, r, directory):
    """The factor that PEFT gives to B A of a layer; the first alpha_pattern that matches counts."""
    try:
        alpha = config.get("lora_alpha", 8)
        for pattern, own_alpha in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = own_alpha
                break
        return alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    except (AttributeError, TypeError, re.error) as error:
        raise ValueError(f"{directory}, layer {layer!r}: no scaling, {error}") from None


def save_peft(adapter, directory):
    """Write an Adapter for PEFT. Every layer gets the largest rank r, padded with zeros.

    Its config is kept, but for PEFT_DROPPED and for what has to describe these factors.
    ValueError if the adapter is malformed or JSON cannot hold its config; then nothing is written.
    """
    directory = Path(directory)
    check_adapter(directory.name, adapter, bases={})  # {}: no layer has to have a known shape
    r = max(len(A) for _, A in adapter.factors.values())
    config = {key: adapter.config[key] for key in adapter.config if key not in PEFT_DROPPED}
    config |= {"peft_type": "LORA", "r": r}
    config |= {"lora_alpha": r, "use_rslora": False}  # scaling 1: B has the true one already
    config["init_lora_weights"] = True  # the start of training does not matter any more
    pattern = "|".join(re.escape(layer) for layer in adapter.factors)
    config["target_modules"] = pattern  # PEFT compares it with whole names
    try:
        text = json.dumps(config, indent=2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory}: JSON cannot hold the config: {error}") from None
    tensors = dict(adapter.extras)
    for layer, (B, A) in adapter.factors.items():  # readers that know one rank need it everywhere
        missing = r - len(A)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing))  # rows
        tensors[f"base_model.model.{layer}.lora_B.weight"] = F.pad(B, (0, missing))  # columns
    for name, tensor in tensors.items():  # safetensors takes no views
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    raw = safetensors.torch.save(tensors, {"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "adapter_model.safetensors", raw)
    write_whole(directory / "adapter_config.json", text.encode())


# --- The command
def main(argv=None):
    args = parse_args(argv)
    # Matrices this small gain nothing from more threads. Costs (--scaling) are those of one core.
    torch.set_num_threads(1 if args.quick or args.scaling else 2)
    s = Settings(seed=args.seed)
    if args.quick:
        s = replace(s, **QUICK)
    if args.sweep:
        return sweep(s)
    if args.scaling:
        return scaling(args.seed, (8, 50) if args.quick else (8, 50, 200, 500))
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        began = time.perf_counter()
        methods = compare(replace(s, seed=seed), everything=args.all or args.quick)
        runs.append({"seed": seed, "seconds": time.perf_counter() - began, "methods": methods})
    if args.json:
        text = json.dumps(runs[0] if args.seeds == 1 else {"runs": runs})
        args.json.write_text(text, encoding="utf-8")
    if args.svg:
        args.svg.write_text(svg(runs[0]["methods"], args.seed), encoding="utf-8")
    print_table(runs, s.first)
    for run in runs:
        print(f"\nSeed {run['seed']} took {run['seconds']:.0f} s.")
        if not args.quick:  # a smoke run is too short for the claims
            check(run["methods"])


def parse_args(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the keys, the data and the models")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--svg", type=Path, help="draw the first seed's matrices into this file")
    for flag in ("--all", "--sweep", "--scaling", "--quick"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args(argv)
    for path in (args.json, args.svg):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{path} is a folder, or there is no folder {path.parent}")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: it takes 1 or more")
    for_the_table = args.all or args.seeds > 1 or args.json or args.svg
    if (for_the_table and (args.sweep or args.scaling)) or (args.sweep and args.scaling):
        parser.error("--sweep and --scaling go with --seed and --quick alone")
    return args


if __name__ == "__main__":
    main()
