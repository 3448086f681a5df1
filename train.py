"""Share and LoRA at work. The method itself is share.py; here it is only called.

In each layer all tasks share two bases, beta (n, k) and alpha (d, k). A task has coefficients in
them, eps_beta and eps_alpha (k, p), which give its change of the layer's weight (n, d):

    ΔW = B A  with  B = beta eps_beta  and  A = (alpha eps_alpha)^T

    phase 1  Share.from_adapters    the LoRA adapters of the first tasks make the bases
    phase 2  share.learn            each later task trains its coefficients alone
    phase 3  share.learn, phi > 0   each later task trains phi temporary columns beside each basis,
                                    too, which are then merged into the basis (with --all)

The bases are not the paper's, but ours ("updates", see Settings). Start with `compare`: it is the
experiment.

Share and LoRA learn twelve secret ciphers, one after another. A Vigenère cipher adds a key of three
letters, over and over, to a message of twelve: letter t of the answer is x_t + key[t % 3], modulo
16. The base model is pre-trained with the key in clear in front of the message. A task is one
secret key behind an opaque tag, so that an adapter must hold the key. Chance is 1/16.

Tokens 0 to 15 are the letters, 16 to 31 the same letters as a key in clear, 32 + t is the tag of
task t. A prompt for the key 3 0 15, in clear and as that of task 1, and the answer to both:

    in clear  19 16 31   5  1  0   2  2  2  15 15 15   7  8  9
    task 1    33 33 33   5  1  0   2  2  2  15 15 15   7  8  9
    answer               8  1 15   5  2  1   2 15 14  10  8  8

    python train.py              Share; a LoRA per task (rank 8 and 1); one LoRA through all tasks
    python train.py --all        all other rows of the README's table, and the claims about them
    python train.py --seeds 5    several seeds: mean ± standard deviation
    python train.py --sweep      the ablations: variance, stack and p; and what phi is for
    python train.py --scaling    what building and a merge cost
    python train.py --quick      a smoke run of all rows on a smaller model
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
from pathlib import Path
from statistics import mean, median, stdev

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from share import Adapter, Share, ToyTransformer, train_coefficients, write_whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
START = time.perf_counter()  # of the program
LETTERS, KEY, MESSAGE = 16, 3, 12
TARGETS = ("q", "k", "v", "o", "up", "down")  # layers that LoRA adapts


@dataclass
class Settings:
    seed: int = 0  # of the keys, the data and the models
    width: int = 128  # of the model's stream
    base_steps: int = 150  # of pre-training
    base_batch: int = 64  # prompts a step of it
    base_lr: float = 2e-3
    first: int = 4  # tasks whose LoRA adapters make the bases
    later: int = 8  # tasks learned after these
    batch: int = 16  # prompts a step
    joint_steps: int = 600  # of a training on all tasks at once
    test: int = 128  # prompts behind each accuracy
    # LoRA; its rate falls to 0
    r: int = 8  # rank
    lora_steps: int = 100  # per task; after these every LoRA has an accuracy of 1.000
    lora_lr: float = 5e-3
    lora_r1_lr: float = 2e-2  # of a LoRA of rank 1; the best of 5e-3, 1e-2, 2e-2 on seeds 0 to 4
    # Share; its rate does not fall
    # Phase 1 takes the main directions of a stack of columns, for beta (for alpha):
    # "factors"  the paper's: the columns of each B (of each A^T)
    # "updates"  ours: the columns of U S (of V S), where U S V^T is the SVD of each B A
    stack: str = "updates"
    variance: float = 0.95  # that the bases explain
    p: int = 1  # pseudo-rank: columns of a later task's coefficients
    general_p: int = 4  # columns of the one set of coefficients in share_general
    steps: int = 150  # per task
    lr: float = 4e-2


QUICK = dict(width=64, base_steps=100, first=2, later=2, lora_steps=40, steps=40, joint_steps=40)


# --- The data, the loss and the base model
# Streams of random numbers: 0, 1, … are for training on that task, the number of tasks is for
# training on all tasks at once, and these are for the rest:
PRETRAINING, TESTS = 98, 99  # TESTS has the keys, too


def new_generator(s, stream):
    return torch.Generator().manual_seed(100 * s.seed + stream)


def make_batch(generator, keys, tags=None):
    """Prompts for keys (b, 3), in clear or behind tags (b,): tokens (b, 15), answers (b, 12)."""
    message = torch.randint(LETTERS, (len(keys), MESSAGE), generator=generator)
    prefix = LETTERS + keys  # in clear
    if tags is not None:
        prefix = 2 * LETTERS + tags[:, None].expand(-1, KEY)
    answers = (message + keys.repeat(1, MESSAGE // KEY)) % LETTERS
    return torch.cat([prefix, message], 1).to(DEVICE), answers.to(DEVICE)


def loss_fn(model, batch):
    tokens, answers = batch
    logits = model(tokens)[:, KEY:, :LETTERS]  # the answer to a letter stands in its place
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten())


@torch.no_grad()
def accuracy(model, batch):
    """The part of the letters that is right."""
    tokens, answers = batch
    logits = model(tokens)[:, KEY:, :LETTERS]
    return (logits.argmax(-1) == answers).float().mean().item()


def fit(model, batches, lr, last_lr=0.0):
    """Train all that requires gradients with Adam; the rate goes linearly from lr to last_lr.

    Returns the last loss, and how many numbers were trained.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = list(batches)
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=last_lr / lr, total_iters=len(batches)
    )
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
    trained = sum(parameter.numel() for parameter in parameters)
    return loss.item(), trained


def pretrain(s):
    """The base model, which deciphers with any key in clear, and prompts to test that."""
    torch.manual_seed(s.seed)
    model = ToyTransformer(2 * LETTERS + s.first + s.later, s.width, length=KEY + MESSAGE)
    model.to(DEVICE)
    generator = new_generator(s, PRETRAINING)

    def batch_in_clear(size):
        keys = torch.randint(LETTERS, (size, KEY), generator=generator)
        return make_batch(generator, keys)

    batches = [batch_in_clear(s.base_batch) for _ in range(s.base_steps)]
    clear_test = batch_in_clear(s.test)
    fit(model, batches, s.base_lr)
    return model, clear_test


# --- LoRA: the baseline, and the source of adapters
class LoRALinear(nn.Linear):
    """h = W0 x + B A x with W0 frozen (Hu et al. 2021), no scaling; `attach_lora` makes A and B."""

    def forward(self, input):
        h = super().forward(input)
        x = input.to(self.lora_A.dtype)
        return (h + F.linear(F.linear(x, self.lora_A), self.lora_B)).to(h.dtype)


def attach_lora(model, targets, r=8):
    """Make LoRALinear of the nn.Linear's whose names end in `targets`; freezes, returns `model`."""
    if type(r) is not int or r < 1:
        raise ValueError(f"r is {r!r}; it takes an integer, 1 or more")
    if not targets:
        raise ValueError("targets is empty, and so ends the name of no nn.Linear")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = set()
    for target in targets:
        found = {name for name in linears if f".{name}".endswith(f".{target}")}  # whole parts of it
        if not found:
            raise ValueError(f"target {target!r} ends the name of no nn.Linear in the model")
        chosen |= found
    model.requires_grad_(False)
    for name, linear in linears.items():  # in the model's order, so that a seed fixes the start
        if name in chosen:
            W0 = linear.weight
            dtype = torch.promote_types(W0.dtype, torch.float32)  # of factors, if W0 is in half
            linear.lora_A = nn.Parameter(W0.new_empty(r, linear.in_features, dtype=dtype))
            linear.lora_B = nn.Parameter(W0.new_zeros(linear.out_features, r, dtype=dtype))
            nn.init.kaiming_uniform_(linear.lora_A, a=5**0.5)
            linear.__class__ = LoRALinear  # the same object under the same name
    return model


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
        generator = new_generator(s, TESTS)
        self.keys = torch.randint(LETTERS, (s.first + s.later, KEY), generator=generator)
        self.names = [f"task {t}" for t in range(len(self.keys))]
        self.tests = []  # a batch for each task
        for t in range(len(self.keys)):
            tags = torch.full((s.test,), t)
            self.tests.append(make_batch(generator, self.keys[tags], tags))
        self.base, self.clear_test = pretrain(s)
        self.base_accuracies = self.accuracies(self.base)
        print_progress("base", f"key in clear: {accuracy(self.base, self.clear_test):.3f}")

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

    def accuracies(self, model, count=None):
        """The accuracies on the first `count` tasks; None stands for all."""
        return [accuracy(model, test) for test in self.tests[:count]]

    def matrix_row(self, learned):
        """Accuracies on all tasks: on those learned so far, and the base's on the rest."""
        return learned + self.base_accuracies[len(learned) :]

    def new_lora(self, start_name, r):
        """A copy of the base with a new LoRA.

        The name is part of the seed, so that the start does not depend on which rows ran before.
        """
        torch.manual_seed(self.s.seed + zlib.crc32(start_name.encode()))  # hash() varies by run
        return attach_lora(copy.deepcopy(self.base), TARGETS, r)

    def lora_per_task(self, method, r, lr, count=None):
        """One LoRA for each task, or each of the first `count`: the adapters and their row."""
        adapters = {}
        learned = []  # accuracy of each task with its LoRA, which later tasks do not change
        matrix = []
        for t, name in enumerate(self.names[:count]):
            model = self.new_lora(f"{method} {t}", r)
            loss, trained = fit(model, self.batches(t, self.s.lora_steps), lr)
            adapters[name] = lora_adapter(model)
            learned.append(accuracy(model, self.tests[t]))
            matrix.append(self.matrix_row(learned))
            report(method, t, loss, [learned[t]])
        return adapters, row_of_matrix(matrix, trained, stored=len(matrix) * trained)

    def lora_sequential(self):
        """One LoRA, trained through the tasks."""
        s = self.s
        model = self.new_lora("lora_sequential", s.r)
        matrix = []
        for t in range(len(self.names)):
            loss, trained = fit(model, self.batches(t, s.lora_steps), s.lora_lr)
            learned = self.accuracies(model, t + 1)
            matrix.append(self.matrix_row(learned))
            report("lora_sequential", t, loss, learned)
        return row_of_matrix(matrix, trained, stored=trained)  # one LoRA for all

    def learn_task(self, share, model, t, p, phi=0, grow=True):
        """Learn task t: the last loss, and how many numbers were trained.

        phi = 0  phase 2. The bases are frozen. Trained are eps_beta and eps_alpha, (k, p) each:
                     B = beta eps_beta  and  A = (alpha eps_alpha)^T
        phi > 0  phase 2. Trained are, too, phi temporary columns C beside each basis:
                     B = [beta, C] eps_beta  with  eps_beta (k + phi, p);  A likewise.
                 Then phase 3 replaces [beta, C] by one basis:
          grow=True   ours: beta stays, and columns are appended until it holds C; earlier ΔW stay
          grow=False  the paper's: a new beta from the B of all tasks; earlier ΔW may change
        """
        s = self.s
        seed = 100 * s.seed + t
        with share.learn(model, self.names[t], p=p, phi=phi, grow=grow, seed=seed):
            # In this block only the coefficients, and C, require gradients.
            loss, trained = fit(model, self.batches(t, s.steps), s.lr, last_lr=s.lr)
        # At the end of the block the share has taken the task in.
        return loss, trained

    def selected_accuracies(self, share, model, tasks):
        """The accuracies of tasks, given by their numbers, each with its coefficients."""
        accuracies = []
        for t in tasks:
            share.select(self.names[t])  # from now on `model` computes with W0 + ΔW of task t
            accuracies.append(accuracy(model, self.tests[t]))
        return accuracies

    def learn_tasks(self, method, share, first_rows, phi=0, grow=True):
        """Learn the tasks from number len(first_rows) on. Returns the attached model and the row.

        first_rows: rows of the accuracy matrix, one for each task that the share has.
        """
        model = share.attach(copy.deepcopy(self.base))
        matrix = list(first_rows)
        for t in range(len(first_rows), len(self.names)):
            loss, trained = self.learn_task(share, model, t, self.s.p, phi, grow)
            learned = self.selected_accuracies(share, model, range(t + 1))
            matrix.append(self.matrix_row(learned))
            report(method, t, loss, learned)
        return model, row_of_matrix(matrix, trained, num_parameters(share))


# --- Rows of the table
def metrics(matrix):
    """Three numbers of matrix[i][j], the accuracy on task j after learning tasks 0 to i.

    acc         the mean of the last row, which are the accuracies at the end
    bwt         at the end, minus just after task j was learned (Lopez-Paz and Ranzato 2017)
    forgetting  the best ever before the end, minus at the end (Chaudhry et al. 2018)

    The latter two are means over all tasks j but the last. Before task j is learned (i < j),
    matrix[i][j] is the base's accuracy.
    """
    *earlier, last = matrix
    tasks = range(len(earlier))
    best = [max(row[j] for row in earlier) for j in tasks]
    bwt = mean([last[j] - matrix[j][j] for j in tasks])
    forgetting = mean([best[j] - last[j] for j in tasks])
    return {"accuracy_matrix": matrix, "acc": mean(last), "bwt": bwt, "forgetting": forgetting}


def row_of_matrix(matrix, trained, stored):
    """A row of the table for tasks learned one by one, see `metrics`.

    trained: how many numbers were trained for the last task. stored: how many, for all tasks.
    """
    return {**metrics(matrix), "trained_per_task": trained, "stored": stored}


def row_of_accuracies(accuracies, stored):
    """A row of the table for tasks without an order, of which none can be forgotten."""
    missing = dict.fromkeys(("accuracy_matrix", "bwt", "forgetting", "trained_per_task"))
    return {"acc": mean(accuracies), "stored": stored, **missing}


def report(method, t, loss, learned):
    """Print a line after task t. learned: accuracies up to that of task t, or this one alone."""
    line = f"task {t:2d}  loss {loss:.3f}  accuracy {learned[-1]:.3f}"
    if len(learned) > 1:
        line += f"  earlier tasks {mean(learned[:-1]):.3f}"
    print_progress(method, line)


def print_progress(method, text):
    print(f"{time.perf_counter() - START:6.1f} s  {method:16}{text}", flush=True)


def num_basis_parameters(share):
    return sum(beta.numel() + alpha.numel() for beta, alpha in share.bases.values())


def num_parameters(share, task=None):
    """How many numbers are stored: for one task (coefficients, extras), or in all, bases too."""
    if task is None:
        return num_basis_parameters(share) + sum(num_parameters(share, x) for x in share.tasks)
    tensors = list(share.reconstruct(task).extras.values())  # such as a head; here there are none
    for by_task in share.coefficients.values():  # of a layer: {task: (eps_beta, eps_alpha)}
        tensors += by_task.get(task, ())
    return sum(tensor.numel() for tensor in tensors)


# --- The story
def compare(s, everything=False):
    """One seed of the experiment: {method: row of the table}."""
    e = Experiment(s)
    rows = {"base": row_of_accuracies(e.base_accuracies, stored=0)}
    # For comparison: a LoRA for each task, at rank r and at the least rank; one LoRA through all.
    adapters, rows["lora_per_task"] = e.lora_per_task("lora_per_task", s.r, s.lora_lr)
    _, rows["lora_r1"] = e.lora_per_task("lora_r1", 1, s.lora_r1_lr)
    rows["lora_sequential"] = e.lora_sequential()
    # Phase 1: bases from the first tasks' LoRA adapters. Their coefficients keep the rank r.
    first_adapters = {name: adapters[name] for name in e.names[: s.first]}
    built = Share.from_adapters(first_adapters, variance=s.variance, stack=s.stack)
    # Phase 2: coefficients of s.p columns for each later task. Share's accuracy matrix begins with
    # the rows of those LoRAs: if phase 1 makes a first task worse, this counts as forgetting.
    first_rows = rows["lora_per_task"]["accuracy_matrix"][: s.first]
    share = copy.deepcopy(built)  # phase 3 begins with `built` again
    model, rows["share"] = e.learn_tasks("share", share, first_rows)
    if not everything:
        return rows
    # Phase 3: the same with temporary columns, merged after each task, by the paper's way or ours.
    for method, grow in (("share_merge", False), ("share_grow", True)):
        merging = copy.deepcopy(built)
        _, rows[method] = e.learn_tasks(method, merging, first_rows, phi=1, grow=grow)
    return rows | other_rows(e, built, share, model)


# --- The claims and the table
def check(methods):
    """The claims about the rows that are there: AssertionError, with numbers, if one is wrong."""

    def claim(text, value, least=-math.inf, most=math.inf):
        print(f"  {text:36}{value:8.3f}   from {least} to {most}")
        assert least <= value <= most, f"{text}: {value:.4f} is not between {least} and {most}"

    share = methods["share"]
    lora = methods["lora_per_task"]
    ratio = lora["trained_per_task"] / share["trained_per_task"]
    claim("LoRA's trained numbers / share's", ratio, least=100)
    claim("lora_sequential: forgetting", methods["lora_sequential"]["forgetting"], least=0.5)
    for name, most in (("share", 0.01), ("share_merge", 0.02), ("share_grow", 0.02)):
        if name in methods:  # the latter two with --all
            claim(f"{name}: ACC / lora_per_task's", methods[name]["acc"] / lora["acc"], least=0.98)
            claim(f"{name}: forgetting", methods[name]["forgetting"], most=most)
    if "random_basis" in methods:
        claim("random_basis: ACC - share's", methods["random_basis"]["acc"] - share["acc"], most=0)
    if "share_routed" in methods:
        routed = methods["share_routed"]
        claim("share_routed: ACC - share's", routed["acc"] - share["acc"], least=-0.01)
        claim("share_routed: base accuracy kept", routed["base_kept"], least=0.95)


def break_even(methods, other, first):
    """Least number of tasks, at least `first`, for which Share stores less than LoRAs, or None."""
    share = methods["share"]
    later_each = share["trained_per_task"]  # a later task stores what it trains
    lora_each = methods[other]["trained_per_task"]
    if later_each >= lora_each:
        return None
    later = len(share["accuracy_matrix"]) - first
    at_first = share["stored"] - later * later_each  # the bases, and the first tasks
    tasks = first
    while at_first + (tasks - first) * later_each >= tasks * lora_each:
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
            line += f"{spread([run['methods'][name][key] for run in runs], digits):>17}"
        print(line)
    for other in ("lora_per_task", "lora_r1"):
        tasks = [break_even(run["methods"], other, first) for run in runs]
        if None not in tasks:
            print(f"from {spread(tasks, 0)} tasks on share stores less than {other}")


# --- The other rows, of --all
def other_rows(e, built, share, model):
    """Rows for comparison: {method: row}.

    built: a share of the first tasks. share: of all tasks, attached to model.
    """
    rows = {}
    # all tasks, the first ones, too, learned in random bases
    _, rows["random_basis"] = e.learn_tasks("random_basis", random_bases(built, e.s.seed), [])
    # one LoRA, trained on all tasks at once
    rows["lora_joint"] = lora_joint(e)
    # the share if nobody names the task; the last two add a task to it, so routing is first
    rows["share_routed"] = share_routed(e, share, model)
    rows["share_average"] = share_average(e, share, model)
    rows["share_general"] = share_general(e, share, model)
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


def lora_joint(e):
    """One LoRA on all tasks at once."""
    model = e.new_lora("lora_joint", e.s.r)
    _, trained = fit(model, e.mixed_batches(e.s.joint_steps), e.s.lora_lr)
    return row_of_accuracies(e.accuracies(model), stored=trained)


@torch.no_grad()
def share_routed(e, share, model):
    """The `Router`, below, picks the task of each prompt; for a key in clear the base."""
    body = copy.deepcopy(e.base)
    body.head = nn.Identity()

    def hidden(tokens):  # (b, width): the base's hidden state, averaged over the prompt
        return body(tokens).mean(1)

    features = {}
    for t, name in enumerate(e.names):
        prompts = torch.cat([tokens for tokens, _ in e.batches(t, steps=8)])
        features[name] = hidden(prompts)
    router = Router.fit(features)  # from the base's hidden states of training prompts alone

    def routed_accuracy(batch):
        tokens, _ = batch
        names = router.route(hidden(tokens))  # for each prompt a task's, or None: the base
        share.select(names)  # a mixed batch
        return accuracy(model, batch)

    stored = num_parameters(share) + router.means.numel() + router.scale.numel()
    row = row_of_accuracies([routed_accuracy(test) for test in e.tests], stored)
    base_kept = routed_accuracy(e.clear_test) / accuracy(e.base, e.clear_test)
    return row | {"base_kept": base_kept}


def share_average(e, share, model):
    """The mean of all tasks' ΔW, by `average`."""
    average(share, e.names, "average")
    return row_of_one_task(e, share, model, "average")


def share_general(e, share, model):
    """One set of coefficients, trained on all tasks at once."""
    s = e.s
    mixture = e.mixed_batches(s.joint_steps)
    settings = dict(p=s.general_p, lr=s.lr, seed=s.seed)
    # Phase 2 as in learn_task, by the call that has a loop of Adam in it.
    train_coefficients(share, model, "general", mixture, loss_fn, **settings)
    return row_of_one_task(e, share, model, "general")


def row_of_one_task(e, share, model, name):
    """The row of one of the share's tasks, tried on the prompts of all tasks."""
    share.select(name)
    stored = num_basis_parameters(share) + num_parameters(share, name)
    return row_of_accuracies(e.accuracies(model), stored)


# --- Ablations, costs, the picture
def sweep(s):
    """The ablations."""
    e = Experiment(s)
    adapters, _ = e.lora_per_task("lora_per_task", s.r, s.lora_lr, s.first)
    new = range(s.first, s.first + 2)
    sweep_bases(e, adapters, new)
    sweep_phi(e, adapters, new)


def sweep_bases(e, adapters, new):
    """How the bases are made (variance, stack), and how many columns p a new task has."""
    print("\nk       directions of a basis, on average")
    print("first   accuracy of the first tasks, at rank r in the bases")
    print("new     accuracy of two more tasks, learned at p")
    print("random  accuracy of the same two, learned in random bases")
    print("variance  stack       k  p  trained  first    new  random")
    for variance, stack in itertools.product((0.6, 0.9), ("factors", "updates")):
        built = Share.from_adapters(adapters, variance=variance, stack=stack)
        k = mean([basis.shape[1] for bases in built.bases.values() for basis in bases])
        tried = copy.deepcopy(built)
        model = tried.attach(copy.deepcopy(e.base))
        of_first = mean(e.selected_accuracies(tried, model, range(len(adapters))))
        for p in (1, 4):
            of_new, trained = learn_new(e, copy.deepcopy(built), new, p)
            of_random, _ = learn_new(e, random_bases(built, e.s.seed), new, p)
            line = f"{variance:8}  {stack:7}{k:6.1f} {p:2} {trained:8} {of_first:6.3f}"
            print(f"{line} {of_new:6.3f} {of_random:7.3f}", flush=True)


def sweep_phi(e, adapters, new):
    """What phi is for: bases from few tasks, then two new tasks with and without a merge."""
    print("\nfrom    how many tasks made the bases")
    print("new     accuracy of two new tasks")
    print("from  phi  merge       new  trained   stored")
    ways = [(0, True, "none")]  # without temporary columns nothing is merged, whatever grow is
    for phi in (1, 2, 4):
        ways += [(phi, False, "paper's"), (phi, True, "grow")]
    for count in (1, 2, 4):
        if count > len(adapters):  # as with --quick
            break
        some = {name: adapters[name] for name in e.names[:count]}
        built = Share.from_adapters(some, variance=e.s.variance, stack=e.s.stack)
        for phi, grow, merge in ways:
            share = copy.deepcopy(built)
            of_new, trained = learn_new(e, share, new, e.s.p, phi, grow)
            line = f"{count:4} {phi:4}  {merge:8} {of_new:6.3f} {trained:8}"
            print(f"{line} {num_parameters(share):8}", flush=True)


def learn_new(e, share, tasks, p, phi=0, grow=True):
    """Learn some tasks: their mean accuracy, and how many numbers were trained for the last."""
    model = share.attach(copy.deepcopy(e.base))
    for t in tasks:
        _, trained = e.learn_task(share, model, t, p, phi, grow)
    return mean(e.selected_accuracies(share, model, tasks)), trained


def scaling(seed, counts, n=1024, r=8):
    """Costs by the number of tasks.

    build      seconds of phase 1
    merge      milliseconds to load a share and merge one adapter by the paper's phase 3
    published  the same by the paper's steps: rebuild all adapters, stack, SVD, project
    stored     numbers of the share at p = 1; apart: those of the adapters
    """
    torch.manual_seed(seed)
    B_span, A_span = [torch.linalg.qr(torch.randn(n, 32)).Q for _ in range(2)]

    def noisy(span):  # r directions in the 32 that all tasks share, and noise
        return span @ torch.randn(32, r) + 0.02 * torch.randn(n, r)

    def new_adapter():
        return Adapter({"0": (noisy(B_span), noisy(A_span).T)})

    print(f"one layer of {n} × {n}, adapters of rank {r}; stored: with p = 1; apart: the adapters")
    print("tasks   build s  load+merge ms  published ms   ratio   stored       apart")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "share.safetensors"
        for tasks in counts:
            adapters = {f"task {i}": new_adapter() for i in range(tasks)}
            build = seconds(3, Share.from_adapters, adapters)
            Share.from_adapters(adapters).save(path)
            merge = 1000 * seconds(5, load_and_merge, path, new_adapter())
            published = 1000 * seconds(1, load_and_merge_as_published, path, new_adapter())
            stored = num_parameters(Share.from_adapters(adapters, p=1))
            apart = tasks * 2 * n * r
            print(f"{tasks:5} {build:9.2f} {merge:14.1f} {published:13.1f}", end="")
            print(f" {published / merge:7.1f} {stored:8,} {apart:11,}", flush=True)


def seconds(times, function, *arguments):
    """The median time of so many calls."""
    return median(timeit.repeat(lambda: function(*arguments), number=1, repeat=times))


def load_and_merge(path, adapter):
    """Load a share and merge an adapter by the paper's phase 3, as share.py computes it."""
    Share.load(path).merge({"new": adapter}, grow=False)


def load_and_merge_as_published(path, adapter):
    """The same by the paper's steps; only their time is of interest."""
    share = Share.load(path)
    pairs = [share.factors("0", task) for task in share.tasks] + [adapter.factors["0"]]
    B_stack = torch.cat([B for B, _ in pairs], dim=1)  # (n, columns of all tasks)
    A_stack = torch.cat([A.T for _, A in pairs], dim=1)
    return [new_coefficients(stack, share.variance) for stack in (B_stack, A_stack)]


def new_coefficients(columns, variance):
    """The coefficients (k, m) of columns (n, m) in the paper's new basis of them."""
    centred = columns - columns.mean(1, keepdim=True)
    U, S, _ = torch.linalg.svd(centred, full_matrices=False)
    explained = S.square().cumsum(0) / S.square().sum()  # by one direction, by two, …
    k = int((explained < variance).sum()) + 1  # all that fall short, and the one that reaches it
    # As in the paper the mean is subtracted to find the basis, but not before projecting.
    return U[:, :k].T @ columns


def svg(methods, seed):
    """The accuracy matrices of lora_sequential and share side by side, as heat maps."""
    cell = 20
    left, top = 60, 60  # room for the words beside and above a matrix
    side = cell * len(methods["share"]["accuracy_matrix"])
    right = left + max(side, 240) + 80  # where Share's matrix begins: its words need 240
    size = f"{right + max(side, 240) + cell} {top + max(side, 200) + 40}"
    style = "text { font: 14px sans-serif; fill: #1f2328 } rect { fill: #2f7fd8; stroke: #8888 } "
    style += "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #58a6ff } }"
    page = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">']
    page.append(f"<style>{style}</style>")
    page += heat_map(methods["lora_sequential"], f"One LoRA, seed {seed}", left, top, cell)
    page += heat_map(methods["share"], f"Share, seed {seed}", right, top, cell)
    return "\n".join([*page, "</svg>\n"])


def heat_map(row, title, left, top, cell):
    """Lines of SVG: the accuracy matrix of a row, with its upper left corner at (left, top)."""
    matrix = row["accuracy_matrix"]
    below = cell * len(matrix) + 22
    scores = f"ACC {row['acc']:.2f}, forgetting {spread([row['forgetting']], 2)}"
    lines = [f'<g transform="translate({left} {top})">']
    lines.append(f'<text y="-32">{title}</text>')
    lines.append(f'<text y="-12">{scores}</text>')
    lines.append(f'<text y="{below}">accuracy on task 0, 1, … →</text>')
    turn = 'transform="translate(-22 0) rotate(90)"'
    lines.append(f"<text {turn}>after learning task 0, 1, … →</text>")
    for i, accuracies in enumerate(matrix):
        for j, part in enumerate(accuracies):
            place = f'x="{cell * j}" y="{cell * i}" width="{cell}" height="{cell}"'
            shade = f'fill-opacity="{part:.2f}"'  # so that 0 is the page, light or dark
            lines.append(f"<rect {place} {shade}><title>{part:.2f}</title></rect>")
    return [*lines, "</g>"]


# --- PEFT's files
# Options of LoraConfig (PEFT 0.21) with which a layer is not W0 x + scaling B A x, and why.
PEFT_VARIANTS = {
    "use_dora": "it has another forward pass",
    "lora_bias": "it has another forward pass",
    "use_qalora": "it has another forward pass",
    "use_bdlora": "it has another forward pass",
    "arrow_config": "it has another forward pass",
    "kasa_config": "it has another forward pass",
    "monteclora_config": "it has another forward pass",
    "target_parameters": "it adapts weights that are not of an nn.Linear",
    "trainable_token_indices": "it adapts weights that are not of an nn.Linear",
    "alora_invocation_tokens": "it adapts some tokens only",
    "layer_replication": "it adds layers to the model",
}
# Values of init_lora_weights that leave W0 as it is; pissa, for one, changes it:
PEFT_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Options that `save_peft` leaves out:
PEFT_DROPPED = ["eva_config", "corda_config", "loftq_config"]  # they are for the start of training
PEFT_DROPPED += ["rank_pattern", "alpha_pattern"]  # all layers get one rank, and scaling 1
PEFT_DROPPED += ["exclude_modules", "layers_to_transform", "layers_pattern"]  # see peft_targets
PEFT_NAME = r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight"


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
    sides = {"A": {}, "B": {}}  # {layer: tensor} of each
    extras = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(PEFT_NAME, name)
        if match:
            layer, side = match.groups()
            sides[side][layer] = tensor
        else:
            extras[name] = tensor
    check_extras(extras, config, directory)
    factors = {}
    for layer in sides["A"] | sides["B"]:
        A, B = sides["A"].get(layer), sides["B"].get(layer)
        are_matrices = A is not None and B is not None and A.dim() == B.dim() == 2
        if not are_matrices or len(A) == 0 or B.shape[1] != len(A):
            raise ValueError(f"{directory}, layer {layer!r} has no A (r, d) with a B (n, r)")
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        scaling = peft_scaling(config, layer, len(A), directory)
        factors[layer] = B.to(dtype) * scaling, A.to(dtype)
    if not factors:
        raise ValueError(f"{directory} has no LoRA weights")
    return Adapter(factors, extras, config)


def check_extras(extras, config, directory):
    """ValueError for a LoRA tensor other than A and B, such as DoRA's lora_magnitude_vector.

    Among the extras it would be stored, but never applied. A head called, say, lora_head is fine:
    modules_to_save lists it.
    """
    heads = {module.split(".")[-1] for module in config.get("modules_to_save") or []}
    for name in extras:
        for part in name.split("."):
            if part.startswith("lora_") and part not in heads:
                known = "base_model.model.LAYER.lora_A/B.weight"
                raise ValueError(f"{directory}: {name!r} is no {known}")


def check_plain_lora(config, directory):
    """ValueError, with what the config says, unless ΔW = scaling * B A beside an unchanged W0."""
    says = {}
    for name, why in PEFT_VARIANTS.items():
        if config.get(name):
            says[name] = f"{config[name]}, {why}"
    if config.get("peft_type") != "LORA":
        says["peft_type"] = config.get("peft_type")
    if config.get("init_lora_weights") not in PEFT_STARTS:
        says["init_lora_weights"] = config["init_lora_weights"]
    if says:
        raise ValueError(f"{directory} is no plain LoRA on an unchanged model: {says}")


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
    """Write an Adapter for PEFT. Every layer gets the largest rank, padded with zeros.

    Of its config the options in PEFT_DROPPED are left out. Overwritten are peft_type, r,
    init_lora_weights, lora_alpha and use_rslora (so that the scaling is 1, as B has it already),
    and target_modules, see `peft_targets`. The rest is kept. If JSON cannot hold it: ValueError,
    and nothing is written.
    """
    directory = Path(directory)
    r = max(len(A) for _, A in adapter.factors.values())
    config = {key: adapter.config[key] for key in adapter.config if key not in PEFT_DROPPED}
    config |= {"peft_type": "LORA", "r": r, "lora_alpha": r, "use_rslora": False}
    config |= {"init_lora_weights": True, "target_modules": peft_targets(adapter)}
    tensors = dict(adapter.extras)
    for layer, (B, A) in adapter.factors.items():  # readers that know one rank need it everywhere
        missing = r - len(A)  # rows of A, columns of B
        tensors[f"base_model.model.{layer}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing))
        tensors[f"base_model.model.{layer}.lora_B.weight"] = F.pad(B, (0, missing))
    for name, tensor in tensors.items():  # safetensors takes no views
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        text = json.dumps(config, indent=2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory}: JSON cannot hold the config: {error}") from None
    raw = safetensors.torch.save(tensors, {"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "adapter_model.safetensors", raw)
    write_whole(directory / "adapter_config.json", text.encode())


def peft_targets(adapter):
    """target_modules to save: the old value if it still fits, else a pattern of the layers.

    It does not fit if it does not name all layers, or if exclude_modules or layers_to_transform
    narrowed it: `save_peft` drops both, as PEFT refuses the latter beside a pattern.
    """
    layers = list(adapter.factors)
    old = adapter.config.get("target_modules") or []
    if isinstance(old, set):
        old = sorted(old)  # JSON has no set
    narrowing = [adapter.config.get(key) for key in ("exclude_modules", "layers_to_transform")]
    is_narrowed = any(value not in (None, [], "") for value in narrowing)  # layer 0 narrows, too
    if names_all(old, layers) and not is_narrowed:
        return old
    return "|".join(map(re.escape, layers))


def names_all(targets, layers):
    """Whether targets, a regular expression or endings of names, name all layers."""
    if isinstance(targets, str):
        return all(re.fullmatch(targets, layer) for layer in layers)
    endings = tuple(f".{target}" for target in targets)
    return all(f".{layer}".endswith(endings) for layer in layers)


# --- When nobody names the task (ours; the paper takes it as known)
@dataclass
class Router:
    """Picks the task: the nearest class mean, or the base (None) when none is near (radius).

    Features (N, f) are multiplied by scale (f, f), see `whitening`, before distances are taken.
    """

    tasks: list[str]
    means: Tensor  # (t, f), scaled
    scale: Tensor
    radius: float

    @classmethod
    @torch.no_grad()
    def fit(cls, features):
        """From {task: features (N, f)}, of which none is kept; better many more than f in all.

        own     98 % of the samples are nearer than this to the mean of the others of their task
        other   98 % are farther than this from the nearest mean of another task

        The radius is half-way between own and other, but never less than own: tasks that overlap
        (other < own) get own, and so does a single task, which has no other.
        """
        for task, x in features.items():
            if x.dim() != 2 or len(x) < 2 or not x.isfinite().all():
                size = tuple(x.shape)
                raise ValueError(f"task {task!r}: features {size} are not finite, (N >= 2, f)")
        samples = [x.double() for x in features.values()]
        residuals = torch.cat([leave_one_out(x) for x in samples])
        scale = whitening(residuals)
        means = torch.stack([x.mean(0) for x in samples]) @ scale
        own = torch.quantile((residuals @ scale).norm(dim=1), 0.98)  # 98 % are nearer
        if len(samples) == 1:
            return cls(list(features), means, scale, float(own))
        to_nearest = []
        for i, x in enumerate(samples):
            other_means = torch.cat([means[:i], means[i + 1 :]])
            to_nearest.append(torch.cdist(x @ scale, other_means).min(dim=1).values)
        other = torch.quantile(torch.cat(to_nearest), 0.02)  # 98 % are farther
        radius = torch.maximum(own, (own + other) / 2)  # half-way, but own if tasks overlap
        return cls(list(features), means, scale, float(radius))

    def route(self, features):
        """features (N, f) -> for each sample its task or None, as `Share.select` takes them."""
        if features.dim() != 2 or features.shape[1] != len(self.scale):
            raise ValueError(f"features {tuple(features.shape)} are not (N, {len(self.scale)})")
        scaled = features.to(self.scale) @ self.scale
        distances, nearest = torch.cdist(scaled, self.means).min(dim=1)
        pairs = zip(distances, nearest, strict=True)
        return [self.tasks[i] if distance <= self.radius else None for distance, i in pairs]


def leave_one_out(x):
    """Each sample of x (N, f) minus the mean of the other N - 1.

    The mean of all N would be nearer, as the sample is one of them.
    """
    mean_of_others = (x.sum(0) - x) / (len(x) - 1)
    return x - mean_of_others


def whitening(residuals):
    """scale (f, f), with which lengths are Mahalanobis distances: ‖r scale‖² = r C^-1 r^T.

    C is the covariance of the residuals. The Cholesky factor M of its inverse does it: with
    C^-1 = M M^T, ‖r M‖² = r M M^T r^T.
    """
    C = residuals.T @ residuals / len(residuals)
    # Few samples make some directions look too certain: shrink a tenth towards the diagonal.
    variances = C.diagonal()
    least = 1e-6 * variances.max() + 1e-30  # for a constant feature, whose variance is 0
    C = 0.9 * C + 0.1 * variances.clamp_min(least).diag()
    return torch.linalg.cholesky(torch.linalg.inv(C))


def average(share, tasks, name, p=None):
    """A new task: the best rank-p fit to the mean of the tasks' ΔW (p None: all of it).

    Coefficients cannot be averaged, as (B, A) and (-B, -A) are the same ΔW. But the mean of ΔW is

        (B1 A1 + B2 A2 + … + Bn An) / n = [B1 B2 … Bn] / n times [A1; A2; …; An]

    """
    adapters = [share.reconstruct(task) for task in tasks]
    n = len(adapters)  # also in a layer that a task lacks: its ΔW is 0 there
    factors = {}
    for layer in share.layers:
        pairs = [adapter.factors[layer] for adapter in adapters if layer in adapter.factors]
        if pairs:
            B = torch.cat([B for B, _ in pairs], dim=1) / n
            factors[layer] = B, torch.cat([A for _, A in pairs])
    if p is None:
        # `add` cuts to p columns. This is how many there are, so it cuts nothing.
        p = max((len(A) for _, A in factors.values()), default=1)
    share.add(name, Adapter(factors), p)


# --- The command
def main(argv=None):
    args = parse_args(argv)
    # More threads are of no use to matrices this small, or smaller. Costs are those of one core.
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
        if args.quick:
            print("A smoke run, too short to learn the tasks: it claims nothing.")
        else:
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
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: it takes 1 or more")
    for_the_table = bool(args.all or args.seeds > 1 or args.json or args.svg)
    if (for_the_table and (args.sweep or args.scaling)) or (args.sweep and args.scaling):
        parser.error("--sweep and --scaling go with --seed and --quick alone")
    return args


if __name__ == "__main__":
    main()
