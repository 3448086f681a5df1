"""The method at work: where adapters come from, who picks the task, and an experiment.

Twelve secret ciphers, learned one after another: Share against LoRA. A Vigenère cipher adds a key
of three letters, over and over, to a message of twelve: letter t of the answer is x_t + key[t % 3],
modulo 16. The base model is pre-trained with the key in clear in front of the message. A task is
one secret key behind an opaque tag, so that an adapter must hold the key. Chance is 1/16.

    python train.py              the whole comparison, which asserts its claims
    python train.py --seeds 5    the same for several seeds: mean ± standard deviation
    python train.py --sweep      the ablations: variance, stack and p; and what phi is for
    python train.py --scaling    what building, a merge and a training step cost
    python train.py --quick      a smoke run on a smaller model
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from share import Adapter, Share, ToyTransformer, from_set, train_coefficients, write_whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# --- 1. Adapters: a LoRA of our own, and PEFT's files
class LoRALinear(nn.Linear):
    """h = W0 x + B A x with W0 frozen (Hu et al. 2021): the baseline and the source of adapters."""
    def forward(self, input):
        out = super().forward(input)
        update = input.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T
        return (out + update).to(out.dtype)

def attach_lora(model, targets, r=8):
    """Make LoRALinear of the nn.Linear's whose names end in `targets`; freezes, returns `model`."""
    if type(r) is not int or r < 1:
        raise ValueError(f"r is {r!r}; it takes an integer, 1 or more")
    linears = {f".{name}": m for name, m in model.named_modules() if type(m) is nn.Linear}
    endings = tuple(f".{target}" for target in targets)
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

PEFT_VARIANTS = (  # what makes a PEFT adapter something else than W0 x + scaling B A x
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config",
)
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
    says = {name: config[name] for name in ("peft_type", *PEFT_VARIANTS) if config.get(name)}
    says["init_lora_weights"] = config.get("init_lora_weights") or True
    plain = says.keys() == {"peft_type", "init_lora_weights"} and says["peft_type"] == "LORA"
    if not plain or says["init_lora_weights"] not in PEFT_STARTS:
        raise ValueError(f"{directory} is no plain LoRA on an unchanged model: {says}")
    pairs, extras = {}, {}
    for name, tensor in tensors.items():
        factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(\.default)?\.weight", name)
        if factor:
            pairs.setdefault(factor[1], {})[factor[2]] = tensor
        elif ".lora_" in name:
            raise ValueError(f"{directory}: {name!r} is no base_model.model.LAYER.lora_A/B.weight")
        else:
            extras[name] = tensor
    if not pairs:
        raise ValueError(f"{directory} has no LoRA weights")
    factors = {}
    for layer, pair in pairs.items():
        B, A = pair.get("B", torch.empty(0)), pair.get("A", torch.empty(0))
        if not (B.dim() == A.dim() == 2 and B.shape[1] == len(A) > 0):
            shapes = {side: tuple(tensor.shape) for side, tensor in pair.items()}
            raise ValueError(f"{directory}, layer {layer!r}: {shapes}, not A (r, d) and B (n, r)")
        try:
            scaling = peft_scaling(config, layer, len(A))
        except (AttributeError, TypeError, re.error) as error:
            raise ValueError(f"{directory}, layer {layer!r}: no scaling, {error}") from None
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        factors[layer] = B.to(dtype) * scaling, A.to(dtype)
    return Adapter(factors, extras, config)

def peft_scaling(config, layer, r):
    """What PEFT multiplies B A of a layer with; the first alpha_pattern that matches counts."""
    patterns = (config.get("alpha_pattern") or {}).items()
    matching = (alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", layer))
    alpha = next(matching, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)

def save_peft(adapter, directory):
    """Write an Adapter for PEFT. Its config is kept but for scaling and initialisation, of which
    finished weights know nothing; target_modules, if missing, are the layers' full names in one
    pattern. ValueError, with nothing written, for a config that JSON cannot hold."""
    directory = Path(directory)
    names = {layer: re.escape(layer) for layer in adapter.factors}
    ranks = {f"^{names[layer]}": len(A) for layer, (_, A) in adapter.factors.items()}
    r = max(ranks.values())
    config = {"target_modules": "|".join(names.values()), **adapter.config, "peft_type": "LORA"}
    config |= {"r": r, "lora_alpha": r, "use_rslora": False, "init_lora_weights": True}
    config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    config = {key: value for key, value in config.items() if key not in PEFT_START_CONFIGS}
    tensors = dict(adapter.extras)
    for layer, (B, A) in adapter.factors.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B
    for name, tensor in tensors.items():  # safetensors takes no views
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    text = json.dumps(config, indent=2, default=from_set)
    raw = safetensors.torch.save(tensors, {"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "adapter_model.safetensors", raw)
    write_whole(directory / "adapter_config.json", text.encode())

# --- 2. When nobody names the task (ours; the paper takes it as known)
@dataclass
class Router:
    """Picks the task: the nearest class mean, or the base (None) when none is near.
    Distances are Mahalanobis': features (N, f) @ scale (f, f) are uncorrelated and of variance 1
    within a task. means: (t, f), scaled, in the order of tasks; radius: how far is near."""
    tasks: list[str]
    means: Tensor
    scale: Tensor
    radius: float

    @classmethod
    @torch.no_grad()
    def fit(cls, features):
        """From {task: features (N, f)}, of which none is kept; better many more than f in all.
        Near is half-way between where 98 % are to their own mean and where 2 % are to another
        task's; the former alone where these overlap or there is one task."""
        for task, x in features.items():
            if not (x.dim() == 2 and len(x) > 1 and x.isfinite().all()):
                raise ValueError(f"task {task!r}: features {tuple(x.shape)} are no (N >= 2, f)")
        own = [(x - x.mean(0)).double() * (len(x) / (len(x) - 1)) for x in features.values()]
        own = torch.cat(own)  # of each sample, from the mean of the others of its task
        covariance = own.T @ own / len(own)
        spread = covariance.diagonal().clamp_min(1e-6 * covariance.max() + 1e-30)
        covariance = covariance.lerp(spread.diag(), 0.1)  # or directions seen by few look certain
        scale = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
        means = torch.stack([samples.double().mean(0) @ scale for samples in features.values()])
        radius = torch.quantile((own @ scale).norm(dim=1), 0.98)
        if len(features) > 1:
            x = torch.cat(list(features.values())).double() @ scale
            second = torch.cdist(x, means).sort(1).values[:, 1]  # the nearest but its own
            radius = torch.maximum(radius, (radius + torch.quantile(second, 0.02)) / 2)
        return cls(list(features), means, scale, float(radius))

    def route(self, features):
        """features (N, f) -> for each sample its task or None, as `Share.select` takes them."""
        if features.shape[1:] != self.scale.shape[1:]:
            given = features.shape[-1]
            raise ValueError(f"features of {given} numbers; the router takes {len(self.scale)}")
        distances, nearest = torch.cdist(features.to(self.scale) @ self.scale, self.means).min(1)
        return [self.tasks[i] if d <= self.radius else None for d, i in zip(distances, nearest)]

def average(share, tasks, name, p=None):
    """A new task: the best rank-p fit to the mean of the tasks' ΔW (p None: all of it).
    Coefficients cannot be averaged one by one: (B, A) and (-B, -A) are the same ΔW."""
    parts = [share.reconstruct(task).factors for task in tasks]
    factors = {}
    for layer in share.layers:
        pairs = [part[layer] for part in parts if layer in part]
        if pairs:
            B = torch.cat([B for B, _ in pairs], dim=1) / len(parts)
            factors[layer] = B, torch.cat([A for _, A in pairs])
    full = max((len(A) for _, A in factors.values()), default=1)
    share.add(name, Adapter(factors), full if p is None else p)

# --- 3. The experiment: settings, data and measures
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

def say(method, text):
    print(f"{time.perf_counter() - START:6.1f} s  {method:16}{text}", flush=True)

def encipher(key, message):
    """key (b, 3) and message (b, 12) -> answer (b, 12)."""
    return (message + key.repeat(1, MESSAGE // KEY)) % LETTERS

def make_batch(generator, key, tag=None):
    """Keys (b, 3), in clear or behind their tags (b,) -> tokens (b, 15), answer (b, 12)."""
    message = torch.randint(LETTERS, (len(key), MESSAGE), generator=generator)
    shown = LETTERS + key if tag is None else 2 * LETTERS + tag[:, None].expand(-1, KEY)
    return torch.cat([shown, message], 1).to(DEVICE), encipher(key, message).to(DEVICE)

class Tasks:
    """The secret keys, their prompts for training, and a fixed set for testing each."""
    def __init__(self, s):
        self.s = s
        generator = torch.Generator().manual_seed(1000 + s.seed)
        self.keys = torch.randint(LETTERS, (s.first + s.later, KEY), generator=generator)
        self.names = [f"task {t}" for t in range(len(self.keys))]
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

    def accuracies(self, model):
        return [accuracy(model, test) for test in self.tests]

def logits(model, tokens):
    """The model answers each letter of the message in that letter's own place."""
    return model(tokens)[:, KEY:, :LETTERS]

def loss_fn(model, batch):
    tokens, answer = batch
    return F.cross_entropy(logits(model, tokens).flatten(0, 1), answer.flatten())

@torch.no_grad()
def letters_right(model, batch):
    """The part of its letters that is right, for each prompt (b,)."""
    tokens, answer = batch
    return (logits(model, tokens).argmax(-1) == answer).float().mean(1)

def accuracy(model, batch):
    return float(letters_right(model, batch).mean())

def metrics(R):
    """ACC, BWT (Lopez-Paz and Ranzato 2017) and forgetting (Chaudhry et al. 2018).
    R[i][j] is the accuracy on task j after task i was learned."""
    T, earlier = len(R), range(len(R) - 1)
    bwt = sum(R[-1][j] - R[j][j] for j in earlier) / (T - 1)
    forgetting = sum(max(R[i][j] for i in earlier) - R[-1][j] for j in earlier) / (T - 1)
    return {"acc": sum(R[-1]) / T, "bwt": bwt, "forgetting": forgetting}

def row(accuracies, trained, stored, matrix=None):
    """A row of the table. matrix: R, of a method that learns task by task."""
    alone = {"acc": sum(accuracies) / len(accuracies), "bwt": None, "forgetting": None}
    scores = alone if matrix is None else metrics(matrix)
    return {"accuracy_matrix": matrix, **scores, "trained_per_task": trained, "stored": stored}

# --- The experiment: its methods, of which each returns its row
def pretrain(s):
    """The base model, which deciphers with any key that it is shown, and prompts to test that."""
    model = ToyTransformer(2 * LETTERS + s.first + s.later, s.width, length=KEY + MESSAGE)
    generator = torch.Generator().manual_seed(s.seed)
    def clear(size):
        return make_batch(generator, torch.randint(LETTERS, (size, KEY), generator=generator))

    say("base", f"pre-training for {s.base_steps} steps")
    batches = (clear(s.base_batch) for _ in range(s.base_steps))
    fit(model.to(DEVICE), batches, s.base_steps, s.base_lr)
    return model, clear(s.test)

def fit(model, batches, steps, lr):
    """Adam on what is not frozen, the rate falling to zero in a straight line; the last loss."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()

def tell(method, t, loss, accuracies):
    """A line of progress. accuracies: on tasks 0 to t, after task t was learned."""
    *earlier, own = accuracies
    more = f"  earlier tasks {sum(earlier) / len(earlier):.3f}" if earlier else ""
    say(method, f"task {t:2d}  loss {loss:.3f}  accuracy {own:.3f}{more}")

def lora_per_task(s, base, tasks, unknown, method, r, lr, count=None):
    """One LoRA for each of the first `count` tasks: the adapters and their row.
    unknown: the base's accuracies, which stand for tasks still to come."""
    adapters, R = {}, []
    for t, name in enumerate(tasks.names[:count]):
        model = attach_lora(copy.deepcopy(base), TARGETS, r)
        loss = fit(model, tasks.batches(t, s.lora_steps), s.lora_steps, lr)
        adapters[name] = lora_adapter(model)
        R.append([R[-1][j] if j < t else unknown[j] for j in range(len(unknown))])
        R[t][t] = accuracy(model, tasks.tests[t])
        tell(method, t, loss, R[t][t : t + 1])
    one = size(adapters[name])
    return adapters, row(R[-1], one, len(R) * one, R)

def size(adapter):
    return sum(B.numel() + A.numel() for B, A in adapter.factors.values())

def lora_sequential(s, base, tasks):
    """One LoRA, trained through the tasks."""
    model, R = attach_lora(copy.deepcopy(base), TARGETS, s.r), []
    for t in range(len(tasks.names)):
        loss = fit(model, tasks.batches(t, s.lora_steps), s.lora_steps, s.lora_lr)
        R.append(tasks.accuracies(model))
        tell("lora_sequential", t, loss, R[t][: t + 1])
    return row(R[-1], size(lora_adapter(model)), size(lora_adapter(model)), R)

def lora_joint(s, base, tasks):
    """One LoRA on all tasks at once."""
    model = attach_lora(copy.deepcopy(base), TARGETS, s.r)
    loss = fit(model, tasks.batches(None, s.joint_steps), s.joint_steps, s.lora_lr)
    joint_accuracies = tasks.accuracies(model)
    tell("lora_joint", len(joint_accuracies) - 1, loss, joint_accuracies)
    return row(joint_accuracies, None, size(lora_adapter(model)))

def learn_tasks(s, base, tasks, unknown, lora_matrix, method, share, phi=0, grow=False):
    """Learn the tasks that the share lacks by coefficients: the model and the row. lora_matrix: of
    the first tasks with their own LoRAs: what the bases lose of them counts as forgetting."""
    model = share.attach(copy.deepcopy(base))
    R = lora_matrix[: len(share.tasks)]
    for t in range(len(R), len(tasks.names)):
        shapes = [basis.shape for pair in share.bases.values() for basis in pair]
        trained = sum(s.p * (k + phi) + phi * n for n, k in shapes)
        task = (share, model, tasks.names[t], tasks.batches(t, s.steps), loss_fn)
        losses = train_coefficients(*task, p=s.p, phi=phi, grow=grow, lr=s.lr)
        R.append(list(unknown))
        for j in range(t + 1):
            share.select(tasks.names[j])
            R[t][j] = accuracy(model, tasks.tests[j])
        tell(method, t, losses[-1], R[t][: t + 1])
    return model, row(R[-1], trained, share.num_parameters(), R)

def randomise(share):
    """Random orthonormal bases of the same sizes, and no task: no adapter fits into them."""
    share = copy.deepcopy(share)
    for layer, pair in share.bases.items():
        share.bases[layer] = tuple(torch.linalg.qr(torch.randn_like(basis)).Q for basis in pair)
    for name in share.tasks:
        share.remove(name)
    return share

@torch.no_grad()
def share_routed(s, base, tasks, share, model, clear):
    """The Router picks the task of each prompt: all tasks' and some with the key in clear."""
    features = {}  # the base's hidden state, averaged over the prompt
    for t, name in enumerate(tasks.names):
        prompts = torch.cat([tokens for tokens, _ in tasks.batches(t, 8)])
        features[name] = base.hidden(prompts).mean(1)
    router = Router.fit(features)
    tokens = torch.cat([tokens for tokens, _ in (*tasks.tests, clear)])
    answer = torch.cat([answer for _, answer in (*tasks.tests, clear)])
    route = router.route(base.hidden(tokens).mean(1))
    share.select(route)  # in one mixed batch
    parts = letters_right(model, (tokens, answer)).split(s.test)
    *routed_accuracies, clear_accuracy = [float(part.mean()) for part in parts]
    wanted = [name for name in (*tasks.names, None) for _ in range(s.test)]
    right = sum(a == b for a, b in zip(route, wanted)) / len(wanted)
    say("share_routed", f"routed right {right:.3f}, key in clear {clear_accuracy:.3f}")
    stored = share.num_parameters() + router.means.numel() + router.scale.numel()
    more = {"routed_right": right, "base_kept": clear_accuracy / accuracy(base, clear)}
    return row(routed_accuracies, None, stored) | more

def share_general(s, tasks, share, model):
    """One set of coefficients, trained on the mixture of all tasks."""
    mixture = tasks.batches(None, s.joint_steps)
    losses = train_coefficients(share, model, "general", mixture, loss_fn, p=s.general_p, lr=s.lr)
    share.select("general")
    general_accuracies = tasks.accuracies(model)
    tell("share_general", len(general_accuracies) - 1, losses[-1], general_accuracies)
    return row(general_accuracies, share.num_parameters("general"), share.num_parameters("general"))

def compare(s):
    """Every row of the table, for one seed: {name: {accuracy_matrix, acc, bwt, …}}."""
    torch.manual_seed(s.seed)
    tasks = Tasks(s)
    base, clear = pretrain(s)
    unknown = tasks.accuracies(base)
    rows = {"base": row(unknown, None, 0)}
    say("base", f"key in clear {accuracy(base, clear):.3f}, behind a tag {rows['base']['acc']:.3f}")
    learn = functools.partial(lora_per_task, s, base, tasks, unknown)
    adapters, rows["lora_per_task"] = learn("lora_per_task", s.r, s.lora_lr)
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # the others draw as without it
        _, rows["lora_r1"] = learn("lora_r1", 1, s.lora_r1_lr)
    rows["lora_sequential"] = lora_sequential(s, base, tasks)
    rows["lora_joint"] = lora_joint(s, base, tasks)
    first = {name: adapters[name] for name in tasks.names[: s.first]}
    built = Share.from_adapters(first, variance=s.variance, stack=s.stack)
    lora_matrix = rows["lora_per_task"]["accuracy_matrix"]
    learn = functools.partial(learn_tasks, s, base, tasks, unknown, lora_matrix)
    share = copy.deepcopy(built)
    model, rows["share"] = learn("share", share)
    _, rows["share_merge"] = learn("share_merge", copy.deepcopy(built), phi=1)
    _, rows["share_grow"] = learn("share_grow", copy.deepcopy(built), phi=1, grow=True)
    _, rows["random_basis"] = learn("random_basis", randomise(built))
    rows["share_routed"] = share_routed(s, base, tasks, share, model, clear)
    average(share, tasks.names, "average")
    share.select("average")
    rows["share_average"] = row(tasks.accuracies(model), None, share.num_parameters("average"))
    rows["share_general"] = share_general(s, tasks, share, model)
    return rows

def check(methods):
    """The claims: raises AssertionError, with the numbers, if one does not hold."""
    acc = {name: m["acc"] for name, m in methods.items()}
    forgetting = {name: m["forgetting"] for name, m in methods.items()}
    lora = methods["lora_per_task"]
    ratio = lora["trained_per_task"] / methods["share"]["trained_per_task"]
    claims = [  # what, its value, from, to
        ("LoRA's trained numbers / share's", ratio, 100, math.inf),
        ("lora_sequential: forgetting", forgetting["lora_sequential"], 0.5, math.inf),
        ("random_basis: ACC - share's", acc["random_basis"] - acc["share"], -math.inf, 0),
        ("share_routed: ACC - share's", acc["share_routed"] - acc["share"], -0.01, math.inf),
        ("share_routed: base accuracy kept", methods["share_routed"]["base_kept"], 0.95, math.inf),
    ]
    for name, most in (("share", 0.01), ("share_merge", 0.02), ("share_grow", 0.02)):
        claims.append((f"{name}: ACC / lora_per_task's", acc[name] / lora["acc"], 0.98, math.inf))
        claims.append((f"{name}: forgetting", forgetting[name], -math.inf, most))
    for text, value, least, most in claims:
        print(f"  {text:36}{value:8.3f}   from {least} to {most}")
        assert least <= value <= most, f"{text}: {value:.4f} is not between {least} and {most}"

def spread(values, digits):
    """'mean', or of several values 'mean ± standard deviation'; nothing where one is None."""
    if None in values:
        return ""
    text = f"{statistics.mean(values) + 0.0:.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"

def break_even(methods, other, first):
    """From how many tasks on Share, learning on by coefficients, stores less than one LoRA each."""
    share, lora = methods["share"], methods[other]["trained_per_task"]
    bases = share["stored"] - share["trained_per_task"] * len(share["accuracy_matrix"])
    return max(first, bases // (lora - share["trained_per_task"]) + 1)

def show(runs, first):
    """The table: of one run, or mean ± standard deviation of several."""
    columns = {"acc": 3, "bwt": 3, "forgetting": 3, "trained_per_task": 0, "stored": 0}  # digits
    print(f"\nchance {1 / LETTERS:.3f}; trained: numbers for the last task; stored: for all tasks")
    print(f"{'':16}" + "".join(f"{key.split('_')[0]:>17}" for key in columns))
    for name in runs[0]["methods"]:
        rows = [run["methods"][name] for run in runs]
        cells = [spread([row[key] for row in rows], digits) for key, digits in columns.items()]
        print(f"{name:16}" + "".join(f"{cell:>17}" for cell in cells))
    for other in ("lora_per_task", "lora_r1"):
        tasks = [break_even(run["methods"], other, first) for run in runs]
        print(f"from {spread(tasks, 0)} tasks on share stores less than {other}")

# --- The ablations
def sweep(s):
    """What variance, stack and p make of the first tasks and of two new ones; what phi is for."""
    torch.manual_seed(s.seed)
    tasks = Tasks(s)
    base, _ = pretrain(s)
    lora = ("lora_per_task", s.r, s.lora_lr, s.first)
    adapters, _ = lora_per_task(s, base, tasks, tasks.accuracies(base), *lora)
    old, new = range(s.first), range(s.first, s.first + 2)
    print("\nfirst, new: accuracy of the first tasks, compressed; of two new ones by coefficients")
    print("variance  stack       k  p  trained  first    new  random")
    for variance, stack, p in itertools.product((0.6, 0.9), ("factors", "updates"), (1, 4)):
        built = Share.from_adapters(adapters, variance=variance, stack=stack)
        sizes = [basis.shape[1] for pair in built.bases.values() for basis in pair]
        kept, _ = learn_new(s, base, tasks, copy.deepcopy(built), old, p)
        found, trained = learn_new(s, base, tasks, copy.deepcopy(built), new, p)
        control, _ = learn_new(s, base, tasks, randomise(built), new, p)
        print(f"{variance:8}  {stack:7}{sum(sizes) / len(sizes):6.1f} {p:2} {trained:8}", end="")
        print(f" {kept:6.3f} {found:6.3f} {control:7.3f}", flush=True)
    print("\nnew: accuracy of two new tasks, with bases from some; start: of temporary columns")
    print("from  phi  start   merge      new  trained   stored")
    ways = itertools.product((1, 2, 4), ("random", "copies"), ("default", "grow"))
    for count, (phi, start, merge) in itertools.product((1, 2, 4), [(0, "", ""), *ways]):
        first = {name: adapters[name] for name in tasks.names[:count]}
        share = Share.from_adapters(first, variance=s.variance, stack=s.stack)
        options = {"phi": phi, "grow": merge == "grow", "copies": start == "copies"}
        found, trained = learn_new(s, base, tasks, share, new, s.p, **options)
        print(f"{count:4} {phi:4}  {start:7} {merge:8} {found:6.3f}", end="")
        print(f" {trained:8} {share.num_parameters():8}", flush=True)

def learn_new(s, base, tasks, share, numbers, p, phi=0, grow=False, copies=False):
    """Learn what the share lacks of the tasks `numbers`: their mean accuracy, numbers trained.
    copies: temporary columns start as copies of the strongest directions, not at random."""
    model, trained, accuracies = share.attach(copy.deepcopy(base)), None, []
    for t in [t for t in numbers if tasks.names[t] not in share.tasks]:
        with share.learn(model, tasks.names[t], p=p, phi=phi, grow=grow) as parameters:
            for layer in share.layers if copies else ():
                columns = model.get_submodule(layer).learned[2:]  # of beta, of alpha
                for column, basis in zip(columns, share.bases[layer]):
                    column.data[:, : basis.shape[1]] = basis[:, :phi]
            optimizer = torch.optim.Adam(parameters, lr=s.lr)
            for batch in tasks.batches(t, s.steps):
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
        trained = sum(parameter.numel() for parameter in parameters)
    for t in numbers:
        share.select(tasks.names[t])
        accuracies.append(accuracy(model, tasks.tests[t]))
    return sum(accuracies) / len(accuracies), trained

# --- What it costs
def seconds(function, times):
    """The median of so many runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)

def merge_as_published(share, new):
    """Phase 3: rebuild every adapter, stack them, SVD, project."""
    everything = [share.reconstruct(task) for task in share.tasks] + [new]
    for layer in share.layers:
        pairs = [adapter.factors[layer] for adapter in everything]
        for X in (torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs]).T):
            U, S, _ = torch.linalg.svd(X - X.mean(1, keepdim=True), full_matrices=False)
            explained = S.square().cumsum(0)
            basis = U[:, : int((explained < share.variance * explained[-1]).sum()) + 1]
            basis.T @ X

def scaling(n=1024, r=8):
    """What building and merging cost as tasks are many, and a training step beside LoRA's."""
    torch.manual_seed(0)
    layers = [f"layer {i}" for i in range(4)]
    spans = {layer: [torch.linalg.qr(torch.randn(n, 32)).Q for _ in "BA"] for layer in layers}
    def factor(span):  # in 32 directions that all tasks share, and noise
        return span @ torch.randn(32, r) + 0.02 * torch.randn(n, r)
    def adapter():
        return Adapter({layer: (factor(B), factor(A).T) for layer, (B, A) in spans.items()})
    print(f"{len(layers)} layers of {n} × {n}, adapters of rank {r}; numbers stored with p = 1")
    print("tasks   build s  load+merge ms  published ms   ratio     stored       apart   ratio")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "share.safetensors"
        for t in (8, 50, 200, 500):
            adapters, new = {f"task {i}": adapter() for i in range(t)}, adapter()
            build = seconds(lambda: Share.from_adapters(adapters).save(path), 1)
            merge = 1000 * seconds(lambda: Share.load(path).merge({"new": new}), 5)
            published = 1000 * seconds(lambda: merge_as_published(Share.load(path), new), 1)
            shapes = [basis.shape for pair in Share.load(path).bases.values() for basis in pair]
            stored, apart = sum(m * k + t * k for m, k in shapes), 2 * t * len(layers) * n * r
            times = f"{t:5} {build:9.2f} {merge:14.1f} {published:13.1f} {published / merge:7.1f}"
            print(f"{times} {stored:10,} {apart:11,} {apart / stored:7.1f}", flush=True)
    x = torch.randn(512, n, requires_grad=True)
    models = {"frozen layer": nn.Sequential(nn.Linear(n, n)).requires_grad_(False)}
    models[f"LoRA r={r}"] = attach_lora(nn.Sequential(nn.Linear(n, n)), ["0"], r)
    with contextlib.ExitStack() as stack:
        for p in (1, 8):
            one = {"task": Adapter({"0": (torch.randn(n, 32), torch.randn(32, n))})}
            share = Share.from_adapters(one, k=32)
            models[f"Share p={p}"] = model = share.attach(nn.Sequential(nn.Linear(n, n)))
            stack.enter_context(share.learn(model, "new", p=p))
        taken = {name: [] for name in models}
        for _ in range(60):  # in turns, so that a busy machine slows all of them down alike
            for name, model in models.items():
                taken[name].append(1000 * seconds(lambda: model(x).sum().backward(), 1))
    frozen, lora, *_ = [statistics.median(times) for times in taken.values()]
    print(f"\nforward and backward of one {n} × {n} layer, {len(x)} tokens, k = 32")
    print("                   ms   added to the frozen layer   of what LoRA adds")
    for name, times in taken.items():
        added = statistics.median(times) - frozen
        print(f"{name:14}{added + frozen:7.2f} {added:27.2f} {added / (lora - frozen):19.2f}")

# --- The picture, and the command
def svg(methods):
    """The accuracy matrices of lora_sequential and share side by side, as heat maps."""
    cell, top, shapes = 20, 60, []
    style = "text { font: 14px sans-serif; fill: #1f2328 } .small { font-size: 11px } "
    style += "rect { fill: #2f7fd8; stroke: #8888; stroke-width: 0.5 } "
    style += "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #58a6ff } }"

    def text(x, y, words, more=""):
        shapes.append(f'<text x="{x}" y="{y}" {more}>{words}</text>')
    for left, name, title in ((60, "lora_sequential", "One LoRA"), (390, "share", "Share")):
        m, middle = methods[name], 'text-anchor="middle"'
        side = len(m["accuracy_matrix"]) * cell
        turned = f'{middle} transform="rotate(-90 {left - 32} {top + side / 2})"'
        text(left, top - 32, title, 'font-weight="bold"')
        text(left, top - 12, f"ACC {m['acc']:.2f}, forgetting {abs(m['forgetting']):.2f}")
        text(left + side / 2, top + side + 32, "accuracy on task", middle)
        text(left - 32, top + side / 2, "after learning task", turned)
        for i, values in enumerate(m["accuracy_matrix"]):
            text(left - 6, top + i * cell + 14, i, 'class="small" text-anchor="end"')
            text(left + i * cell + 10, top + side + 14, i, f'class="small" {middle}')
            for j, value in enumerate(values):
                place = f'x="{left + j * cell}" y="{top + i * cell}" width="{cell}" height="{cell}"'
                shade = f'fill-opacity="{value:.2f}"'  # so that 0 is the page, light or dark
                shapes.append(f"<rect {place} {shade}><title>{value:.2f}</title></rect>")
    box = f'viewBox="0 0 {left + side + 20} {top + side + 50}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join([head, f"<style>{style}</style>", *shapes, "</svg>\n"])

def main(argv=None):
    parser = argparse.ArgumentParser(description="Share against LoRA on a sequence of ciphers.")
    parser.add_argument("--seed", type=int, default=0, help="of the keys, the data and the models")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--svg", type=Path, help="draw the first seed's matrices into this file")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a smaller model")
    parser.add_argument("--sweep", action="store_true", help="the ablations instead")
    parser.add_argument("--scaling", action="store_true", help="the tables of costs instead")
    args = parser.parse_args(argv)
    for path in (args.json, args.svg):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: it takes 1 or more")
    if (args.sweep or args.scaling) and (args.json or args.svg or args.seeds > 1):
        parser.error("--json, --svg and --seeds go with neither --sweep nor --scaling")
    torch.set_num_threads(1)  # these matrices are too small for more; a busy machine punishes it
    s = replace(Settings(seed=args.seed), **QUICK if args.quick else {})
    if args.sweep:
        return sweep(s)
    if args.scaling:
        return scaling()
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        began = time.perf_counter()
        methods = compare(replace(s, seed=seed))
        runs.append({"seed": seed, "seconds": time.perf_counter() - began, "methods": methods})
    show(runs, s.first)
    if args.json:
        args.json.write_text(json.dumps(runs[0] if args.seeds == 1 else {"runs": runs}))
    if args.svg:
        args.svg.write_text(svg(runs[0]["methods"]))
    for run in runs:
        more = " A smoke run, too short to learn the tasks: it claims nothing." * args.quick
        print(f"\nSeed {run['seed']} took {run['seconds']:.0f} s.{more}")
        if not args.quick:
            check(run["methods"])

if __name__ == "__main__":
    main()
