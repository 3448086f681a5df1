"""The method at work: where adapters come from, who picks the task, and an experiment.

Twelve secret ciphers, learned one after another: Share against LoRA. A Vigenère cipher adds a key
of three letters, over and over, to a message of twelve: letter t of the answer is x_t + key[t % 3],
modulo 16. The base model is pre-trained with the key in clear in front of the message. A task is
one secret key behind an opaque tag, so that an adapter must hold the key. Chance is 1/16.

    python train.py              Share, one LoRA per task, one LoRA for all: a minute, with claims
    python train.py --all        all other rows of the README's table, and the claims about them
    python train.py --seeds 5    several seeds: mean ± standard deviation
    python train.py --sweep      the ablations: variance, stack and p; and what phi is for
    python train.py --scaling    what building and a merge cost
    python train.py --quick      a smoke run on a smaller model
"""

import argparse
import copy
import itertools
import json
import math
import re
import tempfile
import time
import timeit
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, mode, stdev

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from share import Adapter, Share, ToyTransformer, train_coefficients, write_whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --- 1. Adapters: a LoRA of our own, and PEFT's files


class LoRALinear(nn.Linear):
    """h = W0 x + B A x with W0 frozen (Hu et al. 2021): the baseline and the source of adapters."""

    def forward(self, input):
        out = super().forward(input)
        x = input.to(self.lora_A.dtype)
        return (out + F.linear(F.linear(x, self.lora_A), self.lora_B)).to(out.dtype)


def attach_lora(model, targets, r=8):
    """Make LoRALinear of the nn.Linear's whose names end in `targets`; freezes, returns `model`."""
    if type(r) is not int or r < 1:
        raise ValueError(f"r is {r!r}; it takes an integer, 1 or more")
    linears = {f".{name}": m for name, m in model.named_modules() if type(m) is nn.Linear}
    endings = tuple(f".{target}" for target in targets) or (".",)  # no target is an error, too
    for ending in endings:
        if not any(name.endswith(ending) for name in linears):
            raise ValueError(f"target {ending[1:]!r} ends the name of no nn.Linear in the model")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if name.endswith(endings):
            W0 = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
            linear.lora_A = nn.Parameter(W0.new_empty(r, linear.in_features))
            linear.lora_B = nn.Parameter(W0.new_zeros(linear.out_features, r))
            nn.init.kaiming_uniform_(linear.lora_A, a=5**0.5)
            linear.__class__ = LoRALinear
    return model


def lora_adapter(model):
    """The Adapter, a copy, that a model's LoRALinear layers hold."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    return Adapter({n: (m.lora_B.detach().clone(), m.lora_A.detach().clone()) for n, m in layers})


# What makes a PEFT adapter something else than W0 x + scaling B A x, if its config has it:
PEFT_VARIANTS = "peft_type use_dora lora_bias use_qalora use_bdlora layer_replication kasa_config "
PEFT_VARIANTS += "target_parameters trainable_token_indices alora_invocation_tokens arrow_config "
PEFT_VARIANTS += "monteclora_config"
PEFT_STARTS = (True, "gaussian", "eva", "orthogonal")  # initialisations that leave W0 as it is
PEFT_START_CONFIGS = ("eva_config", "corda_config", "loftq_config")


def load_peft(directory):
    """The Adapter in a PEFT directory, its scaling (lora_alpha / r, or / √r with use_rslora) folded
    into B; other tensors (heads, biases) become extras, the config is kept as read. Raises
    FileNotFoundError; ValueError, which names the directory, for damage and all but plain LoRA."""
    directory = Path(directory)
    text = (directory / "adapter_config.json").read_bytes()
    raw = (directory / "adapter_model.safetensors").read_bytes()
    try:
        config = dict(json.loads(text))
        tensors = safetensors.torch.load(raw)
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{directory} is damaged: {error}") from None
    says = {name: config[name] for name in PEFT_VARIANTS.split() if config.get(name)}
    start = config.get("init_lora_weights") or True
    if says != {"peft_type": "LORA"} or start not in PEFT_STARTS:
        says["init_lora_weights"] = start
        raise ValueError(f"{directory} is no plain LoRA on an unchanged model: {says}")
    extras = dict(tensors)
    factors = {}
    for name, A in tensors.items():
        factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_A(\.default)?\.weight", name)
        if factor:
            layer = factor[1]
            del extras[name]
            B = extras.pop(f"base_model.model.{layer}.lora_B{factor[2] or ''}.weight", None)
            if B is None or B.dim() != 2 or A.dim() != 2 or B.shape[1] != len(A) or len(A) == 0:
                raise ValueError(f"{directory}, layer {layer!r} has no B (n, r) for an A (r, d)")
            dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
            scaling = peft_scaling(config, layer, len(A), directory)
            factors[layer] = B.to(dtype) * scaling, A.to(dtype)
    heads = [f".{module}." for module in config.get("modules_to_save") or []]
    for name in extras:
        is_head = any(head in name and "lora_" not in name.split(head)[-1] for head in heads)
        if ".lora_" in name and not is_head:
            raise ValueError(f"{directory}: {name!r} is no base_model.model.LAYER.lora_A/B.weight")
    if not factors:
        raise ValueError(f"{directory} has no LoRA weights")
    return Adapter(factors, extras, config)


def peft_scaling(config, layer, r, directory):
    """What PEFT multiplies B A of a layer with; the first alpha_pattern that matches counts."""
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
    """Write an Adapter for PEFT. Its config is kept but for scaling and initialisation;
    target_modules, if missing, are the layers' full names in one pattern. ValueError, with nothing
    written, for a config that JSON cannot hold."""
    directory = Path(directory)
    names = {layer: re.escape(layer) for layer in adapter.factors}
    ranks = {layer: len(A) for layer, (_, A) in adapter.factors.items()}
    r = mode(ranks.values())
    # PEFT tries a layer's name against one pattern after another: the fewer, the better.
    other_ranks = {f"^{names[layer]}": rank for layer, rank in ranks.items() if rank != r}
    config = {"target_modules": "|".join(names.values()), **adapter.config, "peft_type": "LORA"}
    config |= {"r": r, "lora_alpha": r, "use_rslora": False, "init_lora_weights": True}
    config |= {"rank_pattern": other_ranks, "alpha_pattern": other_ranks}
    config = {key: value for key, value in config.items() if key not in PEFT_START_CONFIGS}
    if isinstance(config["target_modules"], set):  # as LoraConfig.to_dict() has it
        config["target_modules"] = sorted(config["target_modules"])
    tensors = dict(adapter.extras)
    for layer, (B, A) in adapter.factors.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B
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


def num_parameters(share, task=None):
    """How many numbers are stored: for one task (coefficients, extras), or in all."""
    if task is None:
        bases = sum(beta.numel() + alpha.numel() for beta, alpha in share.bases.values())
        return bases + sum(num_parameters(share, task) for task in share.tasks)
    tensors = list(share.reconstruct(task).extras.values())
    for held in share.coefficients.values():
        tensors += held.get(task, ())
    return sum(tensor.numel() for tensor in tensors)


# --- 2. When nobody names the task (ours; the paper takes it as known)


@dataclass
class Router:
    """Picks the task: the nearest class mean, or the base (None) when none is near (radius).

    Distances are Mahalanobis': features (N, f) @ scale (f, f) have covariance 1 within a task.
    """

    tasks: list[str]
    means: Tensor  # (t, f), scaled
    scale: Tensor
    radius: float

    @classmethod
    @torch.no_grad()
    def fit(cls, features):
        """From {task: features (N, f)}, of which none is kept; better many more than f in all.

        Near is half-way between where 98 % are to their own mean and where 2 % are to another
        task's; the former alone where these overlap or there is one task.
        """
        for task, x in features.items():
            if x.dim() != 2 or len(x) < 2 or not x.isfinite().all():
                raise ValueError(f"task {task!r}: features {tuple(x.shape)} are no (N >= 2, f)")
        # of each sample, from the mean of the others of its task
        residuals = [(x - x.mean(0)).double() * len(x) / (len(x) - 1) for x in features.values()]
        residuals = torch.cat(residuals)
        covariance = residuals.T @ residuals / len(residuals)
        diagonal = covariance.diagonal().clamp_min(1e-6 * covariance.max() + 1e-30)
        covariance = covariance.lerp(diagonal.diag(), 0.1)  # or directions seen by few look certain
        scale = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
        means = torch.stack([x.double().mean(0) @ scale for x in features.values()])
        radius = torch.quantile((residuals @ scale).norm(dim=1), 0.98)
        if len(features) > 1:
            x = torch.cat(list(features.values())).double() @ scale
            to_second = torch.cdist(x, means).sort(dim=1).values[:, 1]  # the nearest but its own
            radius = torch.maximum(radius, (radius + torch.quantile(to_second, 0.02)) / 2)
        return cls(list(features), means, scale, float(radius))

    def route(self, features):
        """features (N, f) -> for each sample its task or None, as `Share.select` takes them."""
        if features.shape[1:] != self.scale.shape[1:]:
            raise ValueError(f"features of {features.shape[-1]} numbers, not {len(self.scale)}")
        distances, nearest = torch.cdist(features.to(self.scale) @ self.scale, self.means).min(1)
        pairs = zip(distances, nearest, strict=True)
        return [self.tasks[i] if distance <= self.radius else None for distance, i in pairs]


def average(share, tasks, name, p=None):
    """A new task: the best rank-p fit to the mean of the tasks' ΔW (p None: all of it)."""
    # not of coefficients one by one: (B, A) and (-B, -A) are the same ΔW
    adapters = [share.reconstruct(task) for task in tasks]
    factors = {}
    for layer in share.layers:
        pairs = [adapter.factors[layer] for adapter in adapters if layer in adapter.factors]
        if pairs:
            B = torch.cat([B for B, _ in pairs], dim=1) / len(adapters)
            factors[layer] = B, torch.cat([A for _, A in pairs])
    if p is None:
        p = max((len(A) for _, A in factors.values()), default=1)
    share.add(name, Adapter(factors), p)


# --- 3. The experiment: its settings, its rows, its claims

LETTERS, KEY, MESSAGE = 16, 3, 12
TARGETS = ("q", "k", "v", "o", "up", "down")
START = time.perf_counter()


@dataclass
class Settings:
    seed: int = 0  # of the keys, the data and the models
    width: int = 128  # of the model's stream
    base_steps: int = 150  # of pre-training
    base_batch: int = 64  # prompts a step
    base_lr: float = 2e-3
    first: int = 4  # tasks whose LoRA adapters make the bases
    later: int = 8  # tasks learned by coefficients alone
    r: int = 8  # rank of each LoRA
    lora_lr: float = 5e-3
    lora_r1_lr: float = 2e-2  # of a LoRA of rank 1; the best of 5e-3, 1e-2, 2e-2 on seeds 0 to 4
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


QUICK = dict(width=64, base_steps=100, first=2, later=2, lora_steps=40, steps=40, joint_steps=40)


def compare(s, everything=False):
    """The table of one seed: {row: {accuracy_matrix, acc, bwt, forgetting, trained, stored}}."""
    e = Experiment(s)
    rows = {"base": row(e.unknown, None, 0)}
    adapters, rows["lora_per_task"] = e.lora_per_task("lora_per_task", s.r, s.lora_lr)
    _, rows["lora_r1"] = e.lora_per_task("lora_r1", 1, s.lora_r1_lr)
    rows["lora_sequential"] = e.lora_sequential()
    first = {name: adapters[name] for name in e.names[: s.first]}
    built = Share.from_adapters(first, variance=s.variance, stack=s.stack)
    R = rows["lora_per_task"]["accuracy_matrix"][: s.first]
    share = copy.deepcopy(built)
    model, rows["share"] = e.learn_tasks("share", share, R)
    if not everything:
        return rows
    rows["lora_joint"] = e.lora_joint()
    _, rows["share_merge"] = e.learn_tasks("share_merge", copy.deepcopy(built), R, 1, grow=False)
    _, rows["share_grow"] = e.learn_tasks("share_grow", copy.deepcopy(built), R, 1)
    _, rows["random_basis"] = e.learn_tasks("random_basis", randomise(built, s.seed), [])
    rows["share_routed"] = e.share_routed(share, model)
    average(share, e.names, "average")
    share.select("average")
    rows["share_average"] = row(e.accuracies(model), None, num_parameters(share, "average"))
    rows["share_general"] = e.share_general(share, model)
    return rows


class Experiment:
    """Of one seed: the secret keys, their prompts, the pre-trained base, and a method per row."""

    def __init__(self, s):
        self.s = s
        generator = torch.Generator().manual_seed(100 * s.seed + 99)  # `batches` has 0, 1, …
        self.keys = torch.randint(LETTERS, (s.first + s.later, KEY), generator=generator)
        self.names = [f"task {t}" for t in range(len(self.keys))]
        tags = [torch.full((s.test,), t) for t in range(len(self.keys))]
        self.tests = [make_batch(generator, self.keys[tag], tag) for tag in tags]
        self.base, self.clear = pretrain(s)
        self.unknown = self.accuracies(self.base)  # of tasks that are still to come
        shown = accuracy(self.base, self.clear)
        say("base", f"key in clear {shown:.3f}, behind a tag {mean(self.unknown):.3f}")

    def batches(self, t, steps):
        """Prompts of task t, or for None each of a task drawn at random."""
        number = len(self.keys) if t is None else t
        generator = torch.Generator().manual_seed(100 * self.s.seed + number)
        for _ in range(steps):
            tag = torch.full((self.s.batch,), number)
            if t is None:
                tag = torch.randint(number, (self.s.batch,), generator=generator)
            yield make_batch(generator, self.keys[tag], tag)

    def accuracies(self, model):
        return [accuracy(model, test) for test in self.tests]

    def new_lora(self, row_name, r):
        """A copy of the base with a LoRA, whose start depends on the row and the seed alone."""
        torch.manual_seed(self.s.seed + zlib.crc32(row_name.encode()))
        return attach_lora(copy.deepcopy(self.base), TARGETS, r)

    def lora_per_task(self, row_name, r, lr, count=None):
        """One LoRA for each of the first `count` tasks: the adapters and their row."""
        adapters = {}
        R = []
        for t, name in enumerate(self.names[:count]):
            model = self.new_lora(f"{row_name} {t}", r)
            loss = fit(model, self.batches(t, self.s.lora_steps), self.s.lora_steps, lr)
            adapters[name] = lora_adapter(model)
            known = R[-1][:t] if R else []
            R.append(known + [accuracy(model, self.tests[t])] + self.unknown[t + 1 :])
            tell(row_name, t, loss, R[t][t : t + 1])
        one = size(adapters[name])
        return adapters, row(R[-1], one, len(R) * one, R)

    def lora_sequential(self):
        """One LoRA, trained through the tasks."""
        s = self.s
        model = self.new_lora("lora_sequential", s.r)
        R = []
        for t in range(len(self.names)):
            loss = fit(model, self.batches(t, s.lora_steps), s.lora_steps, s.lora_lr)
            seen = [accuracy(model, test) for test in self.tests[: t + 1]]
            R.append(seen + self.unknown[t + 1 :])
            tell("lora_sequential", t, loss, seen)
        one = size(lora_adapter(model))
        return row(R[-1], one, one, R)

    def lora_joint(self):
        """One LoRA on all tasks at once."""
        s = self.s
        model = self.new_lora("lora_joint", s.r)
        loss = fit(model, self.batches(None, s.joint_steps), s.joint_steps, s.lora_lr)
        accuracies = self.accuracies(model)
        tell("lora_joint", len(accuracies) - 1, loss, accuracies)
        return row(accuracies, None, size(lora_adapter(model)))

    def learn_tasks(self, row_name, share, R, phi=0, grow=True):
        """Learn what the share lacks: the model, the row. R: of the first tasks, by their LoRAs."""
        model = share.attach(copy.deepcopy(self.base))
        R = list(R)
        for t in range(len(R), len(self.names)):
            loss, trained = self.learn_task(share, model, t, phi=phi, grow=grow)
            R.append(list(self.unknown))
            for j in range(t + 1):
                share.select(self.names[j])
                R[t][j] = accuracy(model, self.tests[j])
            tell(row_name, t, loss, R[t][: t + 1])
        return model, row(R[-1], trained, num_parameters(share), R)

    def learn_task(self, share, model, t, **settings):
        """Learn task t: the last loss, and how many numbers were trained."""
        settings = dict(p=self.s.p, lr=self.s.lr, seed=100 * self.s.seed + t) | settings
        p, phi = settings["p"], settings["phi"]
        shapes = [basis.shape for pair in share.bases.values() for basis in pair]
        batches = self.batches(t, self.s.steps)
        losses = train_coefficients(share, model, self.names[t], batches, loss_fn, **settings)
        return losses[-1], sum(p * (k + phi) + phi * n for n, k in shapes)

    @torch.no_grad()
    def share_routed(self, share, model):
        """The Router picks the task of each prompt: all tasks' and some with the key in clear."""
        features = {}  # the base's hidden state, averaged over the prompt
        for t, name in enumerate(self.names):
            prompts = torch.cat([tokens for tokens, _ in self.batches(t, 8)])
            features[name] = self.base.hidden(prompts).mean(1)
        router = Router.fit(features)
        tokens = torch.cat([tokens for tokens, _ in self.tests + [self.clear]])
        answer = torch.cat([answer for _, answer in self.tests + [self.clear]])
        route = router.route(self.base.hidden(tokens).mean(1))
        share.select(route)  # in one mixed batch
        parts = letters_right(model, (tokens, answer)).split(self.s.test)
        *routed, clear = [float(part.mean()) for part in parts]
        wanted = [name for name in self.names + [None] for _ in range(self.s.test)]
        right = mean(found == name for found, name in zip(route, wanted, strict=True))
        say("share_routed", f"routed right {right:.3f}, key in clear {clear:.3f}")
        stored = num_parameters(share) + router.means.numel() + router.scale.numel()
        more = {"routed_right": right, "base_kept": clear / accuracy(self.base, self.clear)}
        return row(routed, None, stored) | more

    def share_general(self, share, model):
        """One set of coefficients, trained on the mixture of all tasks."""
        s = self.s
        mixture = self.batches(None, s.joint_steps)
        settings = dict(p=s.general_p, lr=s.lr, seed=s.seed)
        losses = train_coefficients(share, model, "general", mixture, loss_fn, **settings)
        share.select("general")
        accuracies = self.accuracies(model)
        tell("share_general", len(accuracies) - 1, losses[-1], accuracies)
        trained = num_parameters(share, "general")
        return row(accuracies, trained, trained)


def size(adapter):
    return sum(B.numel() + A.numel() for B, A in adapter.factors.values())


def randomise(share, seed):
    """Random orthonormal bases of the same sizes, and no task: no adapter fits into them."""
    share = copy.deepcopy(share)
    torch.manual_seed(seed)
    for layer, pair in share.bases.items():
        share.bases[layer] = tuple(torch.linalg.qr(torch.randn_like(basis)).Q for basis in pair)
    for name in share.tasks:
        share.remove(name)
    return share


def make_batch(generator, key, tag=None):
    """Keys (b, 3), in clear or behind their tags (b,) -> tokens (b, 15), answer (b, 12)."""
    message = torch.randint(LETTERS, (len(key), MESSAGE), generator=generator)
    shown = LETTERS + key if tag is None else 2 * LETTERS + tag[:, None].expand(-1, KEY)
    answer = (message + key.repeat(1, MESSAGE // KEY)) % LETTERS
    return torch.cat([shown, message], 1).to(DEVICE), answer.to(DEVICE)


def pretrain(s):
    """The base model, which deciphers with any key that it is shown, and prompts to test that."""
    torch.manual_seed(s.seed)
    model = ToyTransformer(2 * LETTERS + s.first + s.later, s.width, length=KEY + MESSAGE)
    generator = torch.Generator().manual_seed(s.seed)
    batches = []
    for size in [s.base_batch] * s.base_steps + [s.test]:
        key = torch.randint(LETTERS, (size, KEY), generator=generator)
        batches.append(make_batch(generator, key))
    fit(model.to(DEVICE), batches[:-1], s.base_steps, s.base_lr)
    return model, batches[-1]


def fit(model, batches, steps, lr):
    """Adam on what is not frozen, the rate falling to zero in a straight line; the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def loss_fn(model, batch):
    tokens, answer = batch
    logits = model(tokens)[:, KEY:, :LETTERS]  # it answers a letter in that letter's own place
    return F.cross_entropy(logits.flatten(0, 1), answer.flatten())


@torch.no_grad()
def letters_right(model, batch):
    """The part of its letters that is right, for each prompt (b,)."""
    tokens, answer = batch
    logits = model(tokens)[:, KEY:, :LETTERS]
    return (logits.argmax(-1) == answer).float().mean(1)


def accuracy(model, batch):
    return float(letters_right(model, batch).mean())


def metrics(R):
    """ACC, BWT (Lopez-Paz and Ranzato 2017), forgetting (Chaudhry et al. 2018), see README."""
    earlier = range(len(R) - 1)
    bwt = mean([R[-1][j] - R[j][j] for j in earlier])
    forgetting = mean([max(R[i][j] for i in earlier) - R[-1][j] for j in earlier])
    return {"acc": mean(R[-1]), "bwt": bwt, "forgetting": forgetting}


def row(accuracies, trained, stored, matrix=None):
    """A row of the table. matrix: R, of a method that learns task by task."""
    alone = {"acc": mean(accuracies), "bwt": None, "forgetting": None}
    scores = alone if matrix is None else metrics(matrix)
    return {"accuracy_matrix": matrix, **scores, "trained_per_task": trained, "stored": stored}


def say(method, text):
    print(f"{time.perf_counter() - START:6.1f} s  {method:16}{text}", flush=True)


def tell(method, t, loss, accuracies):
    """A line of progress. accuracies: on tasks 0 to t, after task t was learned."""
    *earlier, own = accuracies
    more = f"  earlier tasks {mean(earlier):.3f}" if earlier else ""
    say(method, f"task {t:2d}  loss {loss:.3f}  accuracy {own:.3f}{more}")


def check(methods):
    """The claims about the rows that are there: AssertionError, with numbers, if one is wrong."""
    share = methods["share"]
    lora = methods["lora_per_task"]
    ratio = lora["trained_per_task"] / share["trained_per_task"]
    claims = [  # what, its value, from, to
        ("LoRA's trained numbers / share's", ratio, 100, math.inf),
        ("lora_sequential: forgetting", methods["lora_sequential"]["forgetting"], 0.5, math.inf),
    ]
    for name, m in methods.items():
        above = m["acc"] - share["acc"]
        if name in ("share", "share_merge", "share_grow"):
            most = 0.01 if name == "share" else 0.02
            part = m["acc"] / lora["acc"]
            claims.append((f"{name}: ACC / lora_per_task's", part, 0.98, math.inf))
            claims.append((f"{name}: forgetting", m["forgetting"], -math.inf, most))
        if name == "random_basis":
            claims.append((f"{name}: ACC - share's", above, -math.inf, 0))
        if name == "share_routed":
            claims.append((f"{name}: ACC - share's", above, -0.01, math.inf))
            claims.append((f"{name}: base accuracy kept", m["base_kept"], 0.95, math.inf))
    for text, value, least, most in claims:
        print(f"  {text:36}{value:8.3f}   from {least} to {most}")
        assert least <= value <= most, f"{text}: {value:.4f} is not between {least} and {most}"


def break_even(methods, other, first):
    """From how many tasks on Share, learning on by coefficients, stores less than one LoRA each."""
    share = methods["share"]
    bases = share["stored"] - share["trained_per_task"] * len(share["accuracy_matrix"])
    saved = methods[other]["trained_per_task"] - share["trained_per_task"]  # by each task
    return max(first, bases // saved + 1)


def spread(values, digits):
    """'mean', or of several values 'mean ± standard deviation'; nothing where one is None."""
    if None in values:
        return ""
    text = f"{mean(values) + 0.0:.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def show(runs, first):
    """The table: of one run, or mean ± standard deviation of several."""
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
        print(f"from {spread(tasks, 0)} tasks on share stores less than {other}")


# --- 4. Ablations, costs, the picture, the command


def sweep(s):
    """What variance, stack and p make of the first tasks and of two new ones; what phi is for."""
    e = Experiment(s)
    adapters, _ = e.lora_per_task("lora_per_task", s.r, s.lora_lr, s.first)
    new = range(s.first, s.first + 2)
    print("\nfirst: accuracy of the first tasks, at rank r in the bases; new: of two learned at p")
    print("variance  stack       k  p  trained  first    new  random")
    for variance, stack, p in itertools.product((0.6, 0.9), ("factors", "updates"), (1, 4)):
        share = Share.from_adapters(adapters, variance=variance, stack=stack)
        random = randomise(share, s.seed)
        k = mean([basis.shape[1] for pair in share.bases.values() for basis in pair])
        kept, _ = learn_new(e, share, range(s.first), p)
        found, trained = learn_new(e, share, new, p)
        control, _ = learn_new(e, random, new, p)
        line = f"{variance:8}  {stack:7}{k:6.1f} {p:2} {trained:8} {kept:6.3f}"
        print(f"{line} {found:6.3f} {control:7.3f}", flush=True)
    print("\nnew: accuracy of two new tasks, with bases from some")
    print("from  phi  merge       new  trained   stored")
    ways = [(0, False), *itertools.product((1, 2, 4), (False, True))]
    for count, (phi, grow) in itertools.product((1, 2, 4), ways):
        first = {name: adapters[name] for name in e.names[:count]}
        share = Share.from_adapters(first, variance=s.variance, stack=s.stack)
        found, trained = learn_new(e, share, new, s.p, phi, grow)
        merge = "grow" if grow else "paper's"
        print(f"{count:4} {phi:4}  {merge:8} {found:6.3f} {trained:8} {num_parameters(share):8}")


def learn_new(e, share, numbers, p, phi=0, grow=True):
    """Learn what the share lacks of the tasks `numbers`: their mean accuracy, numbers trained."""
    model = share.attach(copy.deepcopy(e.base))
    trained = None
    for t in numbers:
        if e.names[t] not in share.tasks:
            _, trained = e.learn_task(share, model, t, p=p, phi=phi, grow=grow)
    accuracies = []
    for t in numbers:
        share.select(e.names[t])
        accuracies.append(accuracy(model, e.tests[t]))
    return mean(accuracies), trained


def scaling(n=1024, r=8):
    """What building and a merge cost as tasks are many, beside the published way."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    spans = [torch.linalg.qr(torch.randn(n, 32)).Q for _ in "BA"]

    def adapter():  # in 32 directions that all tasks share, and noise
        B, A_T = [span @ torch.randn(32, r) + 0.02 * torch.randn(n, r) for span in spans]
        return Adapter({"0": (B, A_T.T)})

    def load_and(merge, path, adapter):
        merge(Share.load(path), {"new": adapter})

    print(f"one layer of {n} × {n}, adapters of rank {r}; numbers stored with p = 1")
    print("tasks   build s  load+merge ms  published ms   ratio   stored       apart")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "share.safetensors"
        for t in (8, 50, 200, 500):
            adapters = {f"task {i}": adapter() for i in range(t)}
            built = seconds(1, Share.from_adapters, adapters)
            share = Share.from_adapters(adapters, p=1)
            stored = num_parameters(share)
            Share.from_adapters(adapters).save(path)
            merged = 1000 * seconds(5, load_and, Share.merge, path, adapter())
            published = 1000 * seconds(1, load_and, merge_as_published, path, adapter())
            print(f"{t:5} {built:9.2f} {merged:14.1f} {published:13.1f}", end="")
            print(f" {published / merged:7.1f} {stored:8,} {2 * t * n * r:11,}", flush=True)


def seconds(times, function, *arguments):
    """The median of so many runs."""
    return median(timeit.repeat(lambda: function(*arguments), number=1, repeat=times))


def merge_as_published(share, adapters):
    """Phase 3: rebuild every adapter, stack them, SVD, project."""
    everything = [share.reconstruct(task) for task in share.tasks] + list(adapters.values())
    for layer in share.layers:
        pairs = [adapter.factors[layer] for adapter in everything]
        for X in (torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs]).T):
            U, S, _ = torch.linalg.svd(X - X.mean(1, keepdim=True), full_matrices=False)
            explained = S.square().cumsum(0)
            basis = U[:, : int((explained < share.variance * explained[-1]).sum()) + 1]
            basis.T @ X


def svg(methods, seed):
    """The accuracy matrices of lora_sequential and share side by side, as heat maps."""
    cell, top = 20, 60
    style = "text { font: 14px sans-serif; fill: #1f2328 } rect { fill: #2f7fd8; stroke: #8888 } "
    style += "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #58a6ff } }"
    shapes = [f"<style>{style}</style>"]
    for left, name, title in ((60, "lora_sequential", "One LoRA"), (380, "share", "Share")):
        R = methods[name]["accuracy_matrix"]
        side = len(R) * cell
        acc, forgetting = methods[name]["acc"], abs(methods[name]["forgetting"])
        for x, y, turn, words in (
            (left, top - 32, 0, f"{title}, seed {seed}"),
            (left, top - 12, 0, f"ACC {acc:.2f}, forgetting {forgetting:.2f}"),
            (left, top + side + 22, 0, "accuracy on task 0, 1, … →"),
            (left - 22, top, 90, "after learning task 0, 1, … →"),
        ):
            shapes.append(f'<text transform="translate({x} {y}) rotate({turn})">{words}</text>')
        for i, j in itertools.product(range(len(R)), repeat=2):
            place = f'x="{left + j * cell}" y="{top + i * cell}" width="{cell}" height="{cell}"'
            shade = f'fill-opacity="{R[i][j]:.2f}"'  # so that 0 is the page, light or dark
            shapes.append(f"<rect {place} {shade}><title>{R[i][j]:.2f}</title></rect>")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + side + 20} {side + 100}">'
    return "\n".join([head, *shapes, "</svg>\n"])


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
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
    if args.sweep + args.scaling + bool(args.json or args.svg or args.all or args.seeds > 1) > 1:
        parser.error("--sweep, --scaling and (--json, --svg, --all, --seeds) exclude each other")
    torch.set_num_threads(1 if args.quick else 2)  # more are of no use to matrices this small
    s = replace(Settings(seed=args.seed), **QUICK if args.quick else {})
    if args.sweep:
        return sweep(s)
    if args.scaling:
        return scaling()
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        began = time.perf_counter()
        methods = compare(replace(s, seed=seed), everything=args.all or args.quick)
        runs.append({"seed": seed, "seconds": time.perf_counter() - began, "methods": methods})
    show(runs, s.first)
    if args.json:
        args.json.write_text(json.dumps(runs[0] if args.seeds == 1 else {"runs": runs}))
    if args.svg:
        args.svg.write_text(svg(runs[0]["methods"], args.seed))
    for run in runs:
        print(f"\nSeed {run['seed']} took {run['seconds']:.0f} s.")
        if args.quick:
            print("A smoke run, too short to learn the tasks: it claims nothing.")
        else:
            check(run["methods"])


if __name__ == "__main__":
    main()
