# SPDX-License-Identifier: MIT. (c) 2026 the authors of this implementation; text: end of README.md.
"""Share: one low-rank subspace for the LoRA adapters of many tasks, a few coefficients per task.

LoRA adds ΔW = B A to a frozen weight, one pair (B, A) a task. Share finds bases beta and alpha
that the pairs of all tasks have in common, and keeps of a task only its coefficients in them:

    h = W0 x + (beta eps_beta)(alpha eps_alpha)^T x

    in the code          symbol    shape             what it is
    weight               W0        n × d             frozen; n = out_features, d = in_features
    B, A                 B, A      n × r, r × d      one task's LoRA factors, scaling folded in
    beta, alpha          β, α      n × kβ, d × kα    orthonormal bases; k differs by layer and side
    eps_beta, eps_alpha  ε_β, ε_α  kβ × p, kα × p    one task's coefficients; p: pseudo-rank
    phi                  φ         integer           temporary columns while a task is learned

Phase 1, `Share.from_adapters`: the bases are the main directions of some adapters' stacked factors.
Phase 2, `Share.learn`: a new task trains its coefficients (with phi > 0, temporary columns too).
Phase 3, `Share.merge`: the bases take in new adapters; all coefficients follow by projection.

A layer's two sides, B with beta and A^T with alpha, are treated alike; comments speak of B's.
"Ours" marks what the paper (arXiv 2602.06043) lacks; see README.md. No convolutions, quantisation.
"""
import contextlib
import copy
import json
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path
import safetensors.torch
import torch
from torch import Tensor, nn

LARGE = 384  # if neither side of a stack is below it, build_basis tries few_directions first
NOISE = 1e-6  # below this part of the largest, a number counts as rounding (float32's: about 1e-7)
VERSION = "share, version 3"  # of the file's format; the key of its metadata
BUSY = "is being learned: learn, add, merge, remove, detach, a mixed batch with it have to wait"
UNREACHED = "the loss reached no coefficient, or no step moved one (no_grad? reentrant checkpoint?)"
not_inference = torch.inference_mode(False)  # a decorator: inference tensors can never be trained

def _require(holds, message):
    if not holds:
        raise ValueError(message)
def _check_numbers(variance=1.0, **counts):
    _require(0 < variance <= 1, f"variance is {variance!r}; it takes a number above 0, up to 1")
    for name, value in counts.items():
        fits = value is None or (type(value) is int and value >= 1)
        _require(fits, f"{name} is {value!r}; it takes an integer, 1 or more")

# --- Linear algebra: the basis of a stack of columns, the best coefficients of a given rank
def build_basis(stack, variance=0.6, k=None, center=True):
    """Orthonormal basis (n, k) of the main directions of the columns of `stack` (n, m).
    Paper, phase 1: subtract the mean column, take the SVD, keep the fewest left singular vectors
    that explain the part `variance` of the variance (there 0.6). Ours: the mean is one more
    direction, since every column contains it and the centred ones need not span it.
    `k` replaces variance and centring: the k heaviest directions, or all if there are fewer.
    Computed in float64, returned in float32 at least. ValueError: NaN, or out of range."""
    _check_numbers(variance, k=k)
    fits = stack.dim() == 2 and stack.shape[1] > 0 and stack.isfinite().all()
    _require(fits, f"the stack {tuple(stack.shape)} is not (n, m >= 1) with finite values")
    X = stack.to(torch.float64, copy=True)
    norm = X.norm()
    mean = X.mean(dim=1, keepdim=True)
    centred = center and k is None
    if centred:
        X -= mean  # in place: a large stack should not be held three times
    basis = few_directions(X, variance, k) if min(X.shape) >= LARGE else None
    if basis is None:
        basis = all_directions(X, variance, k)
    outside = mean - basis @ (basis.T @ mean)
    # `outside` is in all m columns; together they have sqrt(m) times its norm
    if centred and outside.norm() * X.shape[1] ** 0.5 > NOISE * norm:
        basis = torch.linalg.qr(torch.cat([basis, mean], dim=1)).Q
    return basis.to(torch.promote_types(stack.dtype, torch.float32)).contiguous()

def few_directions(X, variance, k):
    """As `all_directions`, for a large X by a randomised search; None where that may not suffice.
    Taken only if (1) q < few: with q = few the search may have ended before `variance` or k is met;
    and (2) X X^T U = U S², to 1e-9 S[0]²: the search has converged. Not checked: that no heavier
    direction was missed; after four iterations that is most unlikely."""
    few = max(48, min(X.shape) // 20)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        U, S, _ = torch.svd_lowrank(X, few, niter=4)  # U (n, few), S (few): the heaviest first
    q = count_directions(S**2, X.norm() ** 2, variance, k)
    error = X @ (X.T @ U[:, :q]) - U[:, :q] * S[:q] ** 2
    return U[:, :q] if q < few and error.norm() <= 1e-9 * S[0] ** 2 else None

def all_directions(X, variance, k):
    """The heaviest left singular vectors (n, q) of X (n, m): k, or enough to explain `variance`.
    By eigh, faster than an SVD; squaring leaves 8 of float64's 16 digits, NOISE needs 6."""
    # of the smaller Gram matrix: X X^T = U S² U^T if X is wide, else X^T X = V S² V^T
    wide = X.shape[0] <= X.shape[1]
    squares, vectors = torch.linalg.eigh(X @ X.T if wide else X.T @ X)  # S² and U, or S² and V
    squares, vectors = squares.flip(0), vectors.flip(1)  # the heaviest first
    vectors = vectors[:, : count_directions(squares, squares.sum(), variance, k)]
    return vectors if wide else torch.linalg.qr(X @ vectors).Q  # X V = U S; Q is U, up to signs

def count_directions(squares, energy, variance, k):
    """At most k, or the fewest directions that explain `variance`; never what is only rounding.
    squares: singular values squared, falling, maybe not all of them; energy: the sum of all."""
    if k is None:
        # 1 + how many running sums miss variance; 1e-13: one that equals it may be rounded down
        k = 1 + int((squares.cumsum(0) / energy < variance - 1e-13).sum())
    return min(k, int((squares > NOISE**2 * squares[:1]).sum()))  # 0 if X is 0 or has no rows

def best_rank(eps_beta, eps_alpha, p):
    """The coefficients (kβ, p), (kα, p) nearest in ΔW to the (kβ, r), (kα, r) given; p None: these.
    As the bases are orthonormal, nearest in ΔW is nearest in eps_beta eps_alpha^T: a truncated SVD
    (Eckart and Young), min(p, kβ, kα, r) columns. If a basis is empty, any p do: ΔW is 0."""
    if p is None or 0 in (len(eps_beta), len(eps_alpha)):  # [:, :None] is all of them
        return eps_beta[:, :p], eps_alpha[:, :p]
    # eps_beta eps_alpha^T = Q_beta (R_beta R_alpha^T) Q_alpha^T, its middle small for any k
    Q_beta, R_beta = torch.linalg.qr(eps_beta.double())
    Q_alpha, R_alpha = torch.linalg.qr(eps_alpha.double())
    U, S, Vh = torch.linalg.svd(R_beta @ R_alpha.T, full_matrices=False)
    root = S[:p].sqrt()  # S is split evenly
    best = Q_beta @ (U[:, :p] * root), Q_alpha @ (Vh[:p].T * root)
    return tuple(eps.to(eps_beta.dtype) for eps in best)

# --- One side of a layer: phases 1 and 3
def stack_padded(matrices):
    """[(k, p)] as (t, k, p), filled up with columns of zeros where p differs."""
    p = max(matrix.shape[1] for matrix in matrices)
    pad = nn.functional.pad
    return torch.stack([m if m.shape[1] == p else pad(m, (0, p - m.shape[1])) for m in matrices])

def split_columns(columns, widths):
    """(k, Σp) as [(k, p)], copies."""
    return [part.clone(memory_format=torch.contiguous_format) for part in columns.split(widths, 1)]

def stack_factors(own, other):  # other: only stack_updates needs it
    """The paper's stack (n, Σr): all tasks' factors [(n, r)] of this side, next to each other."""
    return torch.cat(own, dim=1)

def stack_updates(own, other):
    """Ours: for each ΔW = own other^T, scaled to norm 1, a thin X with X X^T = ΔW ΔW^T, and so
    with its left singular vectors and values: a task's size and how ΔW is split play no part. own:
    [(n, r)]; other: [(d, r)]. With other = Q R, X = own R^T, as ΔW = own R^T Q^T and Q^T Q = 1."""
    left = stack_padded([factor.double() for factor in own])  # (t, n, r)
    right = stack_padded([factor.double() for factor in other])  # (t, d, r)
    updates = left @ torch.linalg.qr(right, mode="r").R.mT  # (t, n, min(d, r))
    norms = torch.linalg.matrix_norm(updates, keepdim=True)
    # below NOISE of the largest it may be rounding, not to be blown up; 1e-300: all may be 0
    norms = norms.clamp_min(NOISE * norms.max() + 1e-300)
    return (updates / norms).to(own[0].dtype).transpose(0, 1).flatten(1)  # (n, t min(d, r))
STACKS = {"factors": stack_factors, "updates": stack_updates}

def project(bases, factors, p):
    """A task's coefficients eps_beta = beta^T B (kβ, r) and eps_alpha = alpha^T A^T (kα, r), or the
    best of rank p. bases: orthonormal, (n, kβ) and (d, kα). factors: B (n, r) and A^T (d, r)."""
    eps_beta, eps_alpha = [
        (basis.double().T @ factor.to(basis.device, torch.float64)).to(basis.dtype)
        for basis, factor in zip(bases, factors)
    ]
    return best_rank(eps_beta, eps_alpha, p)

def to_frame(basis, eps, factors):
    """For phase 3, one side: an orthonormal frame (n, q) that spans the basis and all factors.
    Its first k columns are the basis (n, k); the others hold what new factors [(n, r)] add to it.
    Returns it and coordinates (q, Σp), the old tasks' (eps) first: factor = frame @ coordinates."""
    k = basis.shape[1]
    basis = basis.double()
    factors = torch.cat(factors, dim=1).to(basis)
    Q = torch.linalg.qr(torch.cat([basis, factors], dim=1)).Q
    # not Q's own first k columns, whose signs may differ: eps are coordinates in the basis
    frame = torch.cat([basis, Q[:, k:]], dim=1)
    new = frame.T @ factors  # (q, Σr)
    inside = new[k:].norm(dim=0) < NOISE * new.norm(dim=0)  # columns in the basis, but for rounding
    new[k:, inside] = 0  # else `grow` would take rounding in rows k: for new directions
    old = torch.cat([basis.new_zeros(k, 0), *eps], dim=1)
    old = nn.functional.pad(old, (0, 0, 0, len(new) - k))  # rows k: are 0: old lie in the basis
    return frame, torch.cat([old, new], dim=1)

def next_basis(stacked, k_old, variance, k, center, grow):
    """The next basis (q, k) in a frame whose first k_old axes are the old one: phase 1 once more.
    Ours: without `k` it is no smaller than the old one. By the variance rule alone it could shrink
    from merge to merge, until only the newest tasks are left. With `grow` (ours, too) the old axes
    stay, all of them, and what is outside adds to them, up to `k` in all (never below the old)."""
    if grow:
        added = build_basis(stacked[k_old:], variance, k, center)  # the part outside the old basis
        room = None if k is None else max(k - k_old, 0)  # build_basis takes no k = 0: cut instead
        return torch.block_diag(torch.eye(k_old).to(stacked), added[:, :room])
    basis = build_basis(stacked, variance, k, center)
    if k is None and basis.shape[1] < k_old:
        basis = build_basis(stacked, k=k_old)  # so many instead, whatever variance they explain
        missing = k_old - basis.shape[1]
        if missing > 0:  # the stack has not so many (tasks removed, p small): old axes fill up
            old = torch.eye(len(stacked), k_old).to(stacked)
            unused = old - basis @ (basis.T @ old)  # rank >= k_old - (k_old - missing): enough
            basis = torch.cat([basis, build_basis(unused, k=missing)], dim=1)
    return basis

def merge_side(basis, frame, coordinates, widths, stacked, **rule):
    """Phase 3 for one side: the next basis (n, k), and all tasks' coefficients [(k, p)].
    As published: (1) rebuild the old tasks' factors, beta eps; (2) stack them with the new ones;
    (3) SVD: the next basis; (4) all new coefficients, (new basis)^T factor. Here the same in the
    coordinates of `to_frame`: q rows (at most k + the new tasks' Σr), not n.
    coordinates: (q, Σp), of all tasks' factors, task i's in widths[i] columns. stacked: (q, m), the
    stack to take directions from (with grow, of the new tasks alone). rule: `next_basis`'s."""
    next_in_frame = next_basis(stacked, basis.shape[1], **rule)  # (q, next k)
    next_eps = (next_in_frame.T @ coordinates).to(basis.dtype)  # (next k, Σp)
    return (frame @ next_in_frame).to(basis.dtype), split_columns(next_eps, widths)

@dataclass
class Adapter:
    """One task's LoRA adapter. factors: layer name -> (B (n, r), A (r, d)), ΔW = B A, every scaling
    folded in. extras: what travels along untouched (heads, biases). config: adapter_config.json."""
    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    def delta(self, layer):
        """ΔW (n, d) of one layer, multiplied in float64, which autocast leaves alone."""
        B, A = self.factors[layer]
        return (B.double() @ A.double()).to(B.dtype)
    def energy(self):
        """‖ΔW‖² of all layers, without a ΔW: ‖B A‖² = trace(B^T B A A^T) = Σ (B^T B) * (A A^T)."""
        pairs = [[f.detach().cpu().double() for f in pair] for pair in self.factors.values()]
        return sum(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())) for B, A in pairs)
    def record(self):
        """What a share keeps of it as it is, copied; the factors it keeps only as coefficients."""
        extras = {name: extra.detach().clone() for name, extra in self.extras.items()}
        return {"energy": self.energy(), "extras": extras, "config": copy.deepcopy(self.config)}

class Share:
    """All layers' bases and all tasks' coefficients, each kept in this one place only.
    bases: {layer: (beta, alpha)}. coefficients: {layer: {task: (eps_beta, eps_alpha)}}. records:
    {task: Adapter.record()}, its energy ‖ΔW‖² as the task came in or was trained. selected: a task,
    None, or a tuple with one for each sample. learned: {task: {layer: parameters}}, during `learn`.
    A method that raises ValueError (a name unknown, a number out of range) changes nothing."""
    def __init__(self, variance=0.6, center=True, stack="factors"):
        _check_numbers(variance)
        _require(stack in STACKS, f"stack is {stack!r}; it takes one of {list(STACKS)}")
        self.variance, self.stack = variance, stack
        self.center = center and stack == "factors"  # signs of updates' columns mean nothing
        self.bases, self.coefficients = {}, {}
        self.records, self.learned = {}, {}
        self.selected = None
    tasks = property(lambda self: list(self.records), doc="The tasks' names, oldest first.")
    layers = property(lambda self: list(self.bases), doc="The layers' names.")

    @classmethod
    @not_inference
    def from_adapters(cls, adapters, *, variance=0.6, k=None, center=True, stack="factors", p=None):
        """Phase 1: a share of {task: Adapter}, one or more. variance, k, center: see build_basis.
        stack: "factors" or "updates" (not centred), see stack_*. p: pseudo-rank, None: as it is."""
        _check_numbers(p=p)
        share = cls(variance, center, stack)
        for layer, new in share._check_adapters(adapters).items():  # new: {task: (B, A^T)}
            lefts, rights = [B for B, _ in new.values()], [A_T for _, A_T in new.values()]
            beta = build_basis(STACKS[stack](lefts, rights), variance, k, share.center)
            alpha = build_basis(STACKS[stack](rights, lefts), variance, k, share.center)
            share.bases[layer] = beta, alpha
            share.coefficients[layer] = {t: project((beta, alpha), new[t], p) for t in new}
        share.records = {task: adapter.record() for task, adapter in adapters.items()}
        return share

    @not_inference
    def add(self, task, adapter, p=None):
        """Project one more task onto the bases, which stay; p: pseudo-rank, None for its own rank.
        What lies outside is lost (`retained` tells how much); `merge` would take it in."""
        _require(not self.learned, f"task {list(self.learned)} {BUSY}")
        _check_numbers(p=p)
        unknown = [layer for layer in adapter.factors if layer not in self.bases]
        _require(not unknown, f"task {task!r}, layer {unknown}: no bases yet; merge() makes them")
        checked = self._check_adapters({task: adapter})
        pairs = {layer: project(self.bases[layer], new[task], p) for layer, new in checked.items()}
        self.records[task] = adapter.record()
        for layer, pair in pairs.items():  # all is computed: nothing can be left half-done
            self.coefficients[layer][task] = pair

    @not_inference
    def merge(self, adapters, *, variance=None, k=None, grow=False):
        """Phase 3: take in {task: Adapter}; new bases and coefficients for the layers they have.
        The bases become the main directions of all tasks' stack, without `k` no smaller than they
        were; earlier tasks may move. With `grow` (ours) they stay, earlier tasks' ΔW as well, and
        what the new adapters have outside adds directions. variance: the part to explain (with
        grow, of what is outside); None: the share's, even if it was made with a k.
        k: instead of variance, at most k a side, maybe fewer than now; grow keeps all old ones."""
        _require(not self.learned, f"task {list(self.learned)} {BUSY}")
        variance = self.variance if variance is None else variance
        rule = {"variance": variance, "k": k, "center": self.center, "grow": grow}
        bases, coefficients = {}, {}
        for layer, new in self._check_adapters(adapters).items():  # new: {task: (B, A^T)}
            lefts, rights = [B for B, _ in new.values()], [A_T for _, A_T in new.values()]
            beta, alpha = self.bases.get(layer, (lefts[0][:, :0], rights[0][:, :0]))  # or empty
            old = self.coefficients.get(layer, {})
            frame_b, all_b = to_frame(beta, [pair[0] for pair in old.values()], lefts)
            frame_a, all_a = to_frame(alpha, [pair[1] for pair in old.values()], rights)
            widths = [pair[0].shape[1] for pair in (*old.values(), *new.values())]
            counted = slice(len(old) if grow else 0, None)  # growing looks at the new tasks alone
            left_parts = all_b.split(widths, dim=1)[counted]
            right_parts = all_a.split(widths, dim=1)[counted]
            left_stack = STACKS[self.stack](left_parts, right_parts)
            right_stack = STACKS[self.stack](right_parts, left_parts)
            next_beta, eps_betas = merge_side(beta, frame_b, all_b, widths, left_stack, **rule)
            next_alpha, eps_alphas = merge_side(alpha, frame_a, all_a, widths, right_stack, **rule)
            bases[layer] = next_beta, next_alpha
            coefficients[layer] = dict(zip([*old, *new], zip(eps_betas, eps_alphas)))
        self.records = self.records | {t: adapter.record() for t, adapter in adapters.items()}
        self.bases = self.bases | bases
        self.coefficients = self.coefficients | coefficients

    def factors(self, layer, task):
        """LoRA's B = beta eps_beta (n, p) and A = (alpha eps_alpha)^T (p, d), laid out as LoRA's.
        None where the task has none. Of a task that is being learned they carry gradients."""
        if task not in self.learned:
            self._check_task(task)
        beta, alpha = self.bases[layer]
        pair = self.learned.get(task, {}).get(layer, self.coefficients[layer].get(task))
        if pair is None:
            return None
        eps_beta, eps_alpha, *temporary = pair
        if temporary:  # columns (n, phi) and (d, phi); eps_beta has k + phi rows then
            beta = torch.cat([beta, temporary[0].to(beta)], dim=1)
            alpha = torch.cat([alpha, temporary[1].to(alpha)], dim=1)
        # autocast would round B and A, and its cache would hold eps from before the last step
        with torch.autocast(beta.device.type, enabled=False):
            return beta @ eps_beta.to(beta.dtype), eps_alpha.to(alpha.dtype).T @ alpha.T

    def reconstruct(self, task):
        """The Adapter held for a task, with extras and config (while it is learned, without)."""
        pairs = {layer: self.factors(layer, task) for layer in self.layers}
        factors = {layer: pair for layer, pair in pairs.items() if pair is not None}
        record = copy.deepcopy(self.records.get(task, {"extras": {}, "config": {}}))
        return Adapter(factors, record["extras"], record["config"])

    def retained(self):
        """{task: its ‖ΔW‖² now, of all layers, over what came in or was trained}, about 0 … 1."""
        held = {task: self.reconstruct(task).energy() for task in self.tasks}
        return {t: held[t] / r["energy"] if r["energy"] else 1.0 for t, r in self.records.items()}

    def remove(self, task):
        """Forget a task; the bases stay. A selection that names it becomes None."""
        _require(not self.learned, f"task {list(self.learned)} {BUSY}")
        self._check_task(task)
        for held in (self.records, *self.coefficients.values()):
            held.pop(task, None)
        chosen = self.selected if isinstance(self.selected, tuple) else (self.selected,)
        self.selected = None if task in chosen else self.selected

    def num_parameters(self, task=None):
        """How many numbers are stored: for one task (coefficients, extras), or in all."""
        if task is None:
            bases = [basis.numel() for pair in self.bases.values() for basis in pair]
            return sum(bases) + sum(self.num_parameters(task) for task in self.tasks)
        self._check_task(task)
        eps = [e for held in self.coefficients.values() for e in held.get(task, ())]
        return sum(tensor.numel() for tensor in (*eps, *self.records[task]["extras"].values()))

    def select(self, task):
        """What attached models add from now on: one task; nothing (None); or for a mixed batch a
        sequence, with one or the other for each sample along the first dimension."""
        single = task is None or isinstance(task, str)
        names = (task,) if single else tuple(task)
        for name in set(names) - {None, *self.learned}:
            self._check_task(name)
        allowed = single or self.learned.keys().isdisjoint(names)  # `mixed` reads stored ones only
        _require(allowed, f"task {list(self.learned)} {BUSY}")
        self.selected = task if single else names

    def attach(self, model):
        """Make each nn.Linear that has bases a ShareLinear, in place, and return `model`; a layer's
        bases and coefficients move to its device. Call again after a merge that brings layers."""
        modules = dict(model.named_modules(remove_duplicate=False))
        attached = self._attached(model)
        linears = {}
        for layer in [layer for layer in self.layers if layer not in attached]:
            linear, shape = modules.get(layer), tuple(len(basis) for basis in self.bases[layer])
            plain = type(linear) is nn.Linear and isinstance(linear.weight, nn.Parameter)
            plain = plain and "forward" not in vars(linear) and not linear.weight.is_meta
            what = f"layer {layer!r} is {linear or 'missing'}"
            _require(plain, f"{what}; it takes a plain nn.Linear, forward unpatched, not on meta")
            _require(linear.weight.shape == shape, f"{what}; its bases take {shape}")
            _require(linear not in linears, f"layer {layer!r} has a second name in the share")
            linears[linear] = layer
        for linear, layer in linears.items():
            linear.__class__ = ShareLinear  # the same object: names, hooks and sharing all stay
            linear.share, linear.layer = self, layer
            linear.hook = linear.register_forward_pre_hook(no_shortcut)  # see there: or be bypassed
            self._move(layer, linear.weight.device)
        return model

    @not_inference
    def detach(self, model, task=None):
        """Make the layers nn.Linear again, a task's ΔW added to the weights if one is named."""
        _require(not self.learned, f"task {list(self.learned)} {BUSY}")
        folded = Adapter({}) if task is None else self.reconstruct(task)  # {}: nothing to add
        attached = self._attached(model, folded.factors)
        _require(attached, "the model has no layer of this share; attach(model) comes first")
        unfit = [name for name, m in attached.items() if "forward" in vars(m) or m.weight.is_meta]
        _require(not unfit, f"layers {unfit}: another forward, or on meta; undo that first")
        for layer, linear in attached.items():
            if layer in folded.factors:  # a new Parameter: the old one may be tied elsewhere
                weight = (linear.weight + folded.delta(layer)).to(linear.weight.dtype)
                linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
            linear.hook.remove()
            del linear.share, linear.layer, linear.hook
            linear.__class__ = nn.Linear
        return model

    @contextlib.contextmanager
    def learn(self, model, task, *, p=1, phi=0, sigma=0.03, finetune=False, grow=False, extra=()):
        """Phase 2, for any training loop: what the block trains becomes the task's coefficients.
            with share.learn(model, "three", p=1) as parameters:
                my_loop(model)  # AdamW(parameters), a Trainer, DistributedDataParallel(model), ...
            share.select("three")
        In the block the task is selected, and its coefficients, nn.Parameters on the layers of
        `model`, are all that requires gradients, but for `extra`: tensors to train along, such as a
        head; they stay the caller's. Afterwards requires_grad, .grad, selection and buffers (as
        BatchNorm's, which all tasks share) are as before; after an exception or Ctrl-C the share
        and `extra` as well. p: pseudo-rank. sigma: coefficients start as the paper's N(0, sigma²)
        (zero on both sides would give no gradient at all). phi: temporary columns a side, fewer
        than the largest basis has (the paper's bound), trained too; with them the block ends in
        `merge`, at the share's variance, or if `grow` is set by merge(grow=True, variance=1).
        finetune: train an existing task on; p and sigma play no part, phi has to be 0."""
        _require(not self.learned, f"task {list(self.learned)} {BUSY}")
        attached = self._attached(model, self.layers)
        learned = self._start(task, p, phi, sigma, finetune)
        parameters = [parameter for own in learned.values() for parameter in own]
        extra = list(extra)
        _require(all(q._base is None for q in extra), "extra: a view (row?) gets no grad; pass all")
        trained = parameters + extra
        start = [tensor.detach().clone() for tensor in trained]
        before = dict(vars(self))  # `_keep`, `merge` replace these; `_move` changes devices only
        with frozen(model, extra):  # before the coefficients join the model: they are to be trained
            try:
                for layer, own in learned.items():
                    attached[layer].learned = own
                self.learned, self.selected = {task: learned}, task
                yield parameters
                _require(all(q.isfinite().all() for q in trained), f"task {task!r} is NaN or inf")
                # only extra moved: a mistake; nothing moved: fine, no step was taken
                moved = [not torch.equal(q, old.to(q)) for q, old in zip(trained, start)]
                only_extra = any(moved) and not any(moved[: len(parameters)])
                _require(not only_extra, UNREACHED)
                self._keep(task, phi, grow)
            except BaseException:  # Ctrl-C is one
                vars(self).update(before)
                for tensor, value in zip(extra, start[len(parameters) :]):
                    tensor.data.copy_(value)
                raise
            finally:
                self.learned = {}
                self.selected = before["selected"]
                for layer in learned:
                    attached[layer]._modules.pop("learned", None)  # None: maybe never set

    def _start(self, task, p, phi, sigma, finetune):
        """Where training starts: {layer: [eps_beta, eps_alpha, with phi > 0 temporary columns]}."""
        if finetune:
            self._check_task(task)
            _require(phi == 0, f"phi is {phi!r}; with finetune it takes 0")
            held = {name: pairs[task] for name, pairs in self.coefficients.items() if task in pairs}
            return {name: nn.ParameterList(e.clone() for e in pair) for name, pair in held.items()}
        self._check_new_task(task)
        _require(type(p) is int and p >= 1, f"p is {p!r}; it takes an integer, 1 or more")
        _require(sigma > 0, f"sigma is {sigma!r}; it takes a number above 0")
        sizes = [(beta.shape[1], alpha.shape[1]) for beta, alpha in self.bases.values()]
        _require(any(min(pair) > 0 for pair in sizes), "the bases are empty: nothing to learn")
        k = max(max(pair) for pair in sizes)
        _require(type(phi) is int and 0 <= phi < k, f"phi is {phi!r}; it takes 0, or less than {k}")
        learned = {}
        for layer, bases in self.bases.items():
            eps = [sigma * torch.randn(basis.shape[1] + phi, p).to(basis) for basis in bases]
            columns = [torch.randn(len(b), phi).to(b) / len(b) ** 0.5 for b in bases]  # ~ norm 1
            learned[layer] = nn.ParameterList(eps + columns if phi > 0 else eps)
        return learned

    def _keep(self, task, phi, grow):
        """The end of phase 2: what is learned becomes a task of the share."""
        adapter = self.reconstruct(task)  # while `learned` holds it
        learned, self.learned = self.learned[task], {}  # emptied, or merge would refuse
        if phi > 0:
            return self.merge({task: adapter}, variance=1.0 if grow else None, grow=grow)
        self.records = self.records | {task: adapter.record()}
        self.coefficients = {layer: dict(held) for layer, held in self.coefficients.items()}
        for layer, own in learned.items():
            pair = [e.detach().to(b, copy=True) for e, b in zip(own, self.bases[layer])]
            self.coefficients[layer][task] = tuple(pair)

    def save(self, path):
        """All but the selection and what `learn` holds; the file appears whole or not at all."""
        tensors, widths = {}, {}
        records = {task: dict(record) for task, record in self.records.items()}
        for i, (layer, held) in enumerate(self.coefficients.items()):
            beta, alpha = self.bases[layer]
            empty = beta.new_zeros(beta.shape[1] + alpha.shape[1], 0)  # if no task has the layer
            eps = torch.cat([empty, *map(torch.cat, held.values())], dim=1)  # ε_β over ε_α, Σp wide
            tensors |= {f"{i}.beta": beta, f"{i}.alpha": alpha, f"{i}.eps": eps}
            widths[layer] = {task: pair[0].shape[1] for task, pair in held.items()}
        for j, record in enumerate(records.values()):
            tensors |= {f"extras.{j}.{name}": extra for name, extra in record["extras"].items()}
            record["extras"] = list(record["extras"])
        state = {"variance": self.variance, "center": self.center, "stack": self.stack}
        text = json.dumps(state | {"widths": widths, "records": records}, default=from_set)
        for name, tensor in tensors.items():  # safetensors takes no views
            tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        metadata = {VERSION: text, "checksum": checksum(text, tensors)}
        write_whole(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    @not_inference
    def load(cls, path):
        """Read what `save` wrote, copied off the file; ValueError for another, or a changed bit."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).to("cpu", copy=True) for name in file.keys()}
        except safetensors.SafetensorError:
            metadata = tensors = {}
        text = metadata.get(VERSION, "")
        whole = metadata.get("checksum") == checksum(text, tensors)
        _require(whole, f"{path} is not a Share file ({VERSION}), or is damaged")
        state = json.loads(text)
        share = cls(state["variance"], state["center"], state["stack"])
        for i, (layer, widths) in enumerate(state["widths"].items()):
            share.bases[layer] = tensors[f"{i}.beta"], tensors[f"{i}.alpha"]
            sides = tensors[f"{i}.eps"].split([basis.shape[1] for basis in share.bases[layer]])
            eps_betas, eps_alphas = [split_columns(side, list(widths.values())) for side in sides]
            share.coefficients[layer] = dict(zip(widths, zip(eps_betas, eps_alphas)))
        for j, (task, record) in enumerate(state["records"].items()):
            extras = {name: tensors[f"extras.{j}.{name}"] for name in record["extras"]}
            share.records[task] = record | {"extras": extras}
        return share

    def _attached(self, model, needed=()):
        """{layer: ShareLinear} of this share in a model; ValueError where a needed one is not."""
        linears = [module for module in model.modules() if isinstance(module, ShareLinear)]
        attached = {linear.layer: linear for linear in linears if linear.share is self}
        missing = [layer for layer in needed if layer not in attached]
        _require(not missing, f"layers {missing} are not attached; share.attach(model) does it")
        return attached

    @not_inference
    def _move(self, layer, device):
        """A layer's bases and coefficients go to the device of its weight, never to its dtype."""
        self.bases[layer] = tuple(basis.to(device) for basis in self.bases[layer])
        for task, pair in self.coefficients[layer].items():
            self.coefficients[layer][task] = tuple(eps.to(device) for eps in pair)

    def _check_task(self, task):
        if task not in self.records:
            raise ValueError(f"task {task!r} is unknown; the share has {self.tasks}")
    def _check_new_task(self, task):
        fits = isinstance(task, str) and task not in self.records and task not in self.learned
        _require(fits, f"task {task!r} exists, or is no string; it takes a new name")

    def _check_adapters(self, adapters):
        """{task: Adapter}, all checked, by layer: {layer: {task: (B (n, r), A^T (d, r))}}."""
        _require(adapters, "adapters is empty; it takes one or more")
        shapes = {layer: (len(beta), len(alpha)) for layer, (beta, alpha) in self.bases.items()}
        layers = {}
        for task, adapter in adapters.items():
            self._check_new_task(task)
            named = adapter.factors and all(isinstance(layer, str) for layer in adapter.factors)
            _require(named, f"task {task!r}: its layers are {list(adapter.factors)}, not names")
            for layer, (B, A) in adapter.factors.items():
                what = f"task {task!r}, layer {layer!r}: B {tuple(B.shape)}, A {tuple(A.shape)}"
                shape = (*B.shape[:1], *A.shape[1:])  # (n, d); slices, as B or A may not be 2-D
                n_d = shapes.setdefault(layer, shape)  # for a new layer its first adapter decides
                fits = shape == n_d and B.dim() == A.dim() == 2 and B.shape[1] == len(A) > 0
                _require(fits, f"{what}; it takes (n, r) and (r, d), here with (n, d) = {n_d}")
                _require(B.is_floating_point() and A.is_floating_point(), f"{what} are not floats")
                dtype = torch.float64 if torch.float64 in (B.dtype, A.dtype) else torch.float32
                B, A = B.detach().to(dtype), A.detach().to(dtype)
                _require(B.isfinite().all() and A.isfinite().all(), f"{what} hold NaN or infinity")
                layers.setdefault(layer, {})[task] = B, A.T
        return layers

def from_set(value):
    """For json.dumps: a set in a config becomes a sorted list."""
    _require(isinstance(value, set), f"{value!r} in a config has no form in JSON")
    return sorted(value, key=str)

def checksum(text, tensors):
    """CRC-32, in hexadecimal, of the text and of all tensors' names, types, shapes and bytes."""
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"

def write_whole(path, content):
    """A file that appears whole or not at all, whoever else writes or reads it."""
    beside = Path(f"{path}.{uuid.uuid4().hex}")  # a name that no other process has
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

class ShareLinear(nn.Linear):
    """h = W0 x + (beta eps_beta)(alpha eps_alpha)^T x for the selected task; (..., d) -> (..., n).
    An nn.Linear whose class `Share.attach` has changed; parameters, hooks and names stay."""
    def forward(self, input):
        out = super().forward(input)
        task = self.share.selected
        if isinstance(task, tuple):
            return (out + self.mixed(input, task)).to(out.dtype)
        factors = None if task is None else self.share.factors(self.layer, task)
        if factors is None:
            return out
        B, A = factors  # formed first: a token then costs what a rank-p LoRA costs, for any k
        return (out + input.to(A.dtype) @ A.T @ B.T).to(out.dtype)  # in the model's dtype

    def mixed(self, x, tasks):
        """Each sample's own ΔW x, for x (b, ..., d): one product with alpha and one with beta."""
        _require(len(tasks) == len(x), f"{len(tasks)} tasks for a batch of {len(x)} samples")
        beta, alpha = self.share.bases[self.layer]
        empty = beta.new_zeros(beta.shape[1], 0), alpha.new_zeros(alpha.shape[1], 0)
        held = self.share.coefficients[self.layer]
        pairs = [held.get(task, empty) for task in tasks] or [empty]  # b = 0: one, broadcast
        eps_beta = stack_padded([eps for eps, _ in pairs])  # (b, kβ, p)
        eps_alpha = stack_padded([eps for _, eps in pairs])  # (b, kα, p); einsum: a is kα, k is kβ
        z = torch.einsum("b...a,bap->b...p", x.to(alpha.dtype) @ alpha, eps_alpha)  # (b, ..., p)
        return torch.einsum("b...p,bkp->b...k", z, eps_beta) @ beta.T
    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # model.to(device) and its like
        if not self.weight.is_meta:  # on meta the share's numbers would be lost
            self.share._move(self.layer, self.weight.device)
        return self

def no_shortcut(module, inputs):
    """An empty hook: without one, nn.TransformerEncoderLayer may read weights, not call layers."""

@contextlib.contextmanager
def frozen(model, extra):
    """Freeze a model but `extra`; at the end restore requires_grad, .grad, same-shape buffers."""
    flags = [(q, q.requires_grad, q.grad) for q in (*model.parameters(), *extra)]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for tensor, _, _ in flags:
            tensor.requires_grad_(False).grad = None
        for tensor in extra:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor, requires_grad, grad in flags:
            tensor.requires_grad_(requires_grad)
            tensor.grad = None if grad is None else grad.to(tensor)  # the model may have moved
        for name, buffer in model.named_buffers():
            before = buffers.get(name, buffer).to(buffer)  # a buffer new in the block is left alone
            if buffer.shape == before.shape and not (buffer.is_meta or buffer.equal(before)):
                buffer.copy_(before)  # only if it must: a buffer made by expand() cannot be written

def train_coefficients(share, model, task, batches, loss_fn, *, p=1, phi=0, lr=1e-2, sigma=0.03,
                       extra_parameters=(), finetune=False, grow=False, on_step=None):
    """Phase 2 with a loop of Adam: `Share.learn`, a step for each batch; returns the losses.
    loss_fn(model, batch) gives a scalar. lr: Adam's rate. extra_parameters: tensors to train along,
    or groups with rates of their own. on_step(step, loss): called after each; may select a task."""
    groups = [dict(g) if isinstance(g, dict) else {"params": g} for g in extra_parameters]  # copies
    # Adam wants a group at once (an empty one), and makes generators the lists that `learn` needs
    optimizer = torch.optim.Adam([{"params": []}, *groups], lr=lr)
    extra = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    settings = {"p": p, "phi": phi, "sigma": sigma, "finetune": finetune, "grow": grow}
    losses = []
    with share.learn(model, task, extra=extra, **settings) as parameters:
        optimizer.add_param_group({"params": parameters})
        for step, batch in enumerate(batches):
            share.select(task)  # on_step may have selected another
            loss = loss_fn(model, batch)
            _require(loss.isfinite(), f"step {step}: the loss is {loss.item()}")
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            _require(any(q.grad is not None for q in parameters), f"step {step}: {UNREACHED}")
            optimizer.step()
            torch.clear_autocast_cache()  # else autocast around the loop reuses a head's old cast
            losses.append(loss.item())
            if on_step is not None:
                on_step(step, losses[-1])
        _require(losses, "batches is empty; it takes one or more")
    return losses

class ToyTransformer(nn.Module):
    """A causal transformer: tokens (batch, T <= length) -> logits (batch, T, vocabulary)."""
    def __init__(self, vocabulary=64, width=64, depth=2, heads=4, length=16):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(nn.ModuleDict() for _ in range(depth))
        for block in self.blocks:
            block.update({name: nn.Linear(width, width) for name in "qkvo"})
            block.update({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)})
        self.heads, self.head = heads, nn.Linear(width, vocabulary)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def hidden(self, tokens):  # what the head sees, (batch, T, width)
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            y = self.norm(x)
            split = [block[name](y).unflatten(-1, (self.heads, -1)) for name in "qkv"]
            q, k, v = [part.transpose(1, 2) for part in split]  # (batch, heads, T, head size)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["o"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](nn.functional.gelu(block["up"](self.norm(x))))
        return self.norm(x)
    def forward(self, tokens):
        return self.head(self.hidden(tokens))
