# SPDX-License-Identifier: MIT. (c) 2026 the authors of this implementation; text: end of README.md.
"""Share: one low-rank subspace for the LoRA adapters of many tasks (arXiv 2602.06043).

LoRA adds ΔW = B A to a frozen weight W0, one B and A for each task. Share keeps bases beta and
alpha that all tasks have in common, and of each task only its coefficients in them:

    h = W0 x + B A x  with  B = beta eps_beta  and  A = (alpha eps_alpha)^T

    W0                   n × d             frozen; n = out_features, d = in_features
    B, A                 n × r, r × d      one task's LoRA factors, scaling folded in
    beta, alpha          n × kβ, d × kα    orthonormal bases; k differs by layer and side
    eps_beta, eps_alpha  kβ × p, kα × p    one task's coefficients; p, the pseudo-rank, may be 1
    phi                  an integer        columns added to both bases while a task is learned

`factors` are LoRA's (B, A). A `pair` is (B, A^T): sides 0 and 1 of a layer, both as columns.
Phase 1: the bases are the main directions of some adapters' factors. Phase 2: a new task trains
its coefficients. Phase 3: new adapters join the bases; all coefficients follow by projection.

    adapters = {t: Adapter({"head": (torch.randn(64, 4), torch.randn(4, 64))}) for t in "abc"}
    share = Share.from_adapters({"a": adapters["a"], "b": adapters["b"]})
    model = share.attach(ToyTransformer())
    tokens = torch.randint(64, (8, 16))
    loss_fn = lambda model, tokens: model(tokens).square().mean()
    train_coefficients(share, model, "new", [tokens] * 9, loss_fn)
    share.merge({"c": adapters["c"]})
    share.select("new")  # from now on model(tokens) answers as the task "new"

"Ours" marks what the paper lacks. Absent: convolutions, quantised layers, routing to a task.
"""

import contextlib
import copy
import json
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch  # pip install "safetensors[torch]": it needs NumPy
import torch
from torch import Tensor, nn

ROUNDING = 1e-6  # what is smaller, relative to the whole, is taken for rounding (float32's: 1e-7)
FORMAT = "share 4"  # of the file that `Share.save` writes


@dataclass
class Adapter:
    """One task's LoRA adapter: ΔW = B A in each of its layers.

    factors: layer name -> (B (n, r), A (r, d)), every scaling folded in. extras: what travels with
    it: heads, biases. config: adapter_config.json as read, or {}. From a live PEFT model: B is
    lora_B.weight times the layer's scaling, A is lora_A.weight; drop "base_model.model." in names.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    def delta(self, layer):
        """ΔW (n, d) of one layer."""
        B, A = self.factors[layer]
        return exact_product(B, A)

    def energy(self):
        """‖ΔW‖² of all layers together."""
        energy = 0.0
        for factors in self.factors.values():
            B, A = [factor.detach().cpu().double() for factor in factors]
            # ‖B A‖² = trace(B^T B A A^T), the sum of all entries of (B^T B) * (A A^T)
            energy += float(((B.T @ B) * (A @ A.T)).sum())
        return energy


def exact_product(a, b):
    """a @ b in float64, which autocast does not touch; returned in a's dtype."""
    return (a.double() @ b.double()).to(a.dtype)


# --- The layer


def lora_factors(bases, eps):
    """LoRA's B = beta eps_beta (n, p) and A = (alpha eps_alpha)^T (p, d)."""
    beta, alpha = bases
    eps_beta, eps_alpha = eps
    # Autocast would round B and A, and could reuse an eps cached before the last optimizer step.
    with torch.autocast(beta.device.type, enabled=False):
        B = beta @ eps_beta.to(beta.dtype)
        A = eps_alpha.to(alpha.dtype).T @ alpha.T
    return B, A


def no_columns(bases):
    """The coefficients (kβ, 0) and (kα, 0) of a task that leaves the layer alone."""
    return tuple(basis.new_zeros(basis.shape[1], 0) for basis in bases)


def stack_padded(matrices):
    """[(k, p)] as (t, k, p), with columns of zeros where p is smaller than elsewhere."""
    widths = [matrix.shape[1] for matrix in matrices]
    if min(widths) < max(widths):
        matrices = [nn.functional.pad(m, (0, max(widths) - m.shape[1])) for m in matrices]
    return torch.stack(matrices)


class ShareLinear(nn.Linear):
    """h = W0 x + (beta eps_beta)(alpha eps_alpha)^T x; `Share.attach` makes it of an nn.Linear."""

    share: "Share"
    layer: str  # its name in the share

    def forward(self, input):
        out = super().forward(input)  # W0 x, plus a bias
        selected = self.share.selected
        if selected is None:
            return out
        if isinstance(selected, tuple):
            return (out + self.mixed(input, selected)).to(out.dtype)
        factors = self.share.factors(self.layer, selected)
        if factors is None:  # the task leaves this layer alone
            return out
        B, A = factors  # formed once per call; then as cheap as a LoRA of rank p
        x = input.to(A.dtype)
        delta_x = nn.functional.linear(nn.functional.linear(x, A), B)
        return (out + delta_x).to(out.dtype)  # W0 x + (beta eps_beta)(alpha eps_alpha)^T x

    def mixed(self, x, tasks):
        """Each sample's own ΔW x, for x (s, ..., d) and s tasks, some of which may be None."""
        if len(tasks) != len(x):
            raise ValueError(f"{len(tasks)} tasks are selected for a batch of {len(x)} samples")
        beta, alpha = self.share.bases[self.layer]
        held = self.share.coefficients[self.layer]
        nothing = no_columns((beta, alpha))  # for None, and for a task without this layer
        eps_betas = [held.get(task, nothing)[0] for task in tasks]
        eps_alphas = [held.get(task, nothing)[1] for task in tasks]
        x_alpha = x.to(alpha.dtype) @ alpha
        # s is the sample, a is kα, b is kβ
        z = torch.einsum("s...a,sap->s...p", x_alpha, stack_padded(eps_alphas))
        return torch.einsum("s...p,sbp->s...b", z, stack_padded(eps_betas)) @ beta.T

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # model.to(), .cuda() and .half() call this
        self.share._move(self.layer, self.weight.device)
        return self


def learned_factors(bases, parameters):
    """LoRA's (B, A) of a task that is being learned.

    parameters: {"eps_beta", "eps_alpha": (k + phi, p)} and, if phi > 0, temporary columns next to
    the bases, {"columns_beta": (n, phi), "columns_alpha": (d, phi)}.
    """
    beta, alpha = bases
    if "columns_beta" in parameters:
        beta = torch.cat([beta, parameters["columns_beta"].to(beta.dtype)], dim=1)
        alpha = torch.cat([alpha, parameters["columns_alpha"].to(alpha.dtype)], dim=1)
    return lora_factors((beta, alpha), (parameters["eps_beta"], parameters["eps_alpha"]))


# --- Phases 1 and 3 for one layer


def build_basis(stack, variance=0.6, k=None):
    """Orthonormal basis (n, k) of the main directions of a stack of columns (n, m).

    The paper's phase 1: subtract the mean column, take the SVD, keep the fewest left singular
    vectors that explain the fraction `variance` (there 0.6). Ours: the mean, which centring has
    removed, is added as one more direction. With `k`: no centring, the k heaviest directions, fewer
    if the rank is less. Computed in float64; the result is float32 at least. ValueError: variance
    or k out of range; a stack that is not (n, m >= 1), or not finite.
    """
    check_numbers(variance, k=k)
    if stack.dim() != 2 or stack.shape[1] == 0 or not stack.isfinite().all():
        raise ValueError(f"the stack {tuple(stack.shape)} is not (n, m >= 1) with finite numbers")
    dtype = torch.promote_types(stack.dtype, torch.float32)
    return main_directions(stack, variance, k, centred=k is None).to(dtype).contiguous()


def main_directions(stack, variance, k, centred):
    """`build_basis` without its checks, in float64; whether to centre is for the caller to say."""
    X = stack.double()
    norm = X.norm()  # before centring, which may leave nothing but rounding
    if not centred:
        return heaviest(X, variance, k, norm)
    mean = X.mean(dim=1, keepdim=True)
    X = X - mean
    basis = heaviest(X, variance, k, norm)
    outside = mean - basis @ (basis.T @ mean)
    # The stack had the mean m times, once in each column: that is a norm of √m ‖outside‖.
    if X.shape[1] ** 0.5 * outside.norm() > ROUNDING * norm:
        basis = torch.linalg.qr(torch.cat([basis, mean], dim=1)).Q  # one more column, along outside
    return basis


def heaviest(X, variance, k, norm):
    """The heaviest left singular vectors of X (n, m): k, or the fewest that explain `variance`.

    Those whose singular value is rounding beside `norm` are left out. By the Gram matrix: faster
    than an SVD, and it resolves singular values down to 1e-8 of the heaviest.
    """
    tall = X.shape[0] > X.shape[1]
    if tall:
        squares, V = torch.linalg.eigh(X.T @ X)  # X = U S V^T: this is V S² V^T
    else:
        squares, U = torch.linalg.eigh(X @ X.T)  # U S² U^T
    squares = squares.flip(0)  # the heaviest first
    rank = int((squares > (ROUNDING * norm) ** 2).sum())
    if rank == 0:
        return X.new_zeros(len(X), 0)
    if k is None:
        explained = squares.cumsum(0) / squares.sum()  # by the first, the first two, …
        is_too_little = explained < variance - 1e-13  # the sums are rounded
        k = 1 + int(is_too_little.sum())
    k = min(k, rank)
    if tall:
        return torch.linalg.qr(X @ V.flip(1)[:, :k]).Q  # X V = U S: here QR only divides by S
    return U.flip(1)[:, :k]


def stack_of(pairs, side, kind):
    """The stack (n, m) of one side of {task: (B (n, r), A^T (d, r))}.

    kind: "factors", the paper's: the factors next to each other. "updates", ours: `thin_updates`
    next to each other: each ΔW counts the same, however it is scaled or split into B and A.
    """
    own = [pair[side] for pair in pairs.values()]
    other = [pair[1 - side] for pair in pairs.values()]
    if kind == "factors":
        return torch.cat(own, dim=1)
    return torch.cat(thin_updates(own, other).unbind(), dim=1)


def thin_updates(own, other):
    """For each M = own other^T (ΔW or ΔW^T) a thin T that stands for it: (t, n, r), float64.

    T has M's left singular vectors, and its singular values at norm 1: T T^T = M M^T / ‖M‖².
    """
    # other = Q R with Q^T Q = 1, so M = own R^T Q^T, and M M^T = (own R^T) (own R^T)^T.
    R = torch.linalg.qr(stack_padded(other).double(), mode="r").R
    thin = stack_padded(own).double() @ R.mT
    norms = torch.linalg.matrix_norm(thin, keepdim=True)  # ‖M‖
    if norms.max() == 0:
        return thin
    # An M below ROUNDING of the largest may be pure rounding: do not scale it up to norm 1.
    return thin / norms.clamp_min(ROUNDING * norms.max())


def project(bases, pair):
    """A pair's coefficients in orthonormal bases, beta^T B and alpha^T A^T, each (k, r)."""
    beta, alpha = bases
    B, A_T = pair
    return exact_product(beta.T, B), exact_product(alpha.T, A_T)


def best_rank(eps, p):
    """Coefficients with at most p columns, with the least change of ΔW.

    ΔW = beta (eps_beta eps_alpha^T) alpha^T. As the bases are orthonormal, the truncated SVD of
    the middle is best (Eckart and Young). Each side gets the root of its singular values.
    """
    eps_beta, eps_alpha = eps
    p = min(p, eps_beta.shape[1])
    middle = eps_beta.double() @ eps_alpha.double().T  # (kβ, kα)
    if 0 in middle.shape:  # ΔW is 0. The SVD would give no columns, which mean: not in this layer
        return eps_beta[:, :p], eps_alpha[:, :p]
    U, S, Vh = torch.linalg.svd(middle, full_matrices=False)
    root = S[:p].sqrt()
    best_beta = U[:, :p] * root
    best_alpha = Vh[:p].T * root
    return best_beta.to(eps_beta.dtype), best_alpha.to(eps_alpha.dtype)


def build_layer(pairs, kind, variance, k, at_least=(0, 0)):
    """Phase 1, from {task: (B, A^T)}: a layer's bases (beta, alpha) and {task: coefficients}.

    at_least: for each side, the k to take where `variance` asks for fewer directions.
    """
    dtype = next(iter(pairs.values()))[0].dtype
    # The signs of thin updates' columns are arbitrary, as QR leaves them: their mean says nothing.
    centred = kind == "factors" and k is None
    bases = []
    for side in (0, 1):
        stack = stack_of(pairs, side, kind)
        basis = main_directions(stack, variance, k, centred)
        if k is None and basis.shape[1] < at_least[side]:
            basis = main_directions(stack, variance, at_least[side], centred=False)
        bases.append(basis.to(dtype).contiguous())
        del stack, basis  # they may be large: freed before the other side's are made
    coefficients = {task: project(bases, pair) for task, pair in pairs.items()}
    return tuple(bases), coefficients


def merge_layer(bases, old, new, kind, variance, k):
    """Phase 3, from old {task: coefficients} and new {task: (B, A^T)}: bases, all coefficients.

    As published: rebuild the old factors, beta eps_beta; put the new ones beside them; phase 1.
    Here, only for speed, in the coordinates of a frame: orthonormal columns (n, q) that span the
    old basis and the new factors, q mostly much smaller than n. Ours: without `k`, no basis gets
    smaller while the stack has directions for it.
    """
    frames = []
    for side in (0, 1):
        columns = [bases[side].double()] + [pair[side].double() for pair in new.values()]
        frame = torch.linalg.qr(torch.cat(columns, dim=1)).Q
        frames.append(frame.to(bases[side].dtype))

    pairs_in_frame = {}
    beta_in_frame = exact_product(frames[0].T, bases[0])
    alpha_in_frame = exact_product(frames[1].T, bases[1])
    for task, (eps_beta, eps_alpha) in old.items():
        B = exact_product(beta_in_frame, eps_beta)
        A_T = exact_product(alpha_in_frame, eps_alpha)
        pairs_in_frame[task] = B, A_T
    for task, pair in new.items():
        pairs_in_frame[task] = project(frames, pair)

    sizes = [basis.shape[1] for basis in bases]
    next_in_frame, coefficients = build_layer(pairs_in_frame, kind, variance, k, at_least=sizes)
    next_beta = exact_product(frames[0], next_in_frame[0])
    next_alpha = exact_product(frames[1], next_in_frame[1])
    return (next_beta, next_alpha), coefficients


def grow_layer(bases, old, new, kind, variance, k):
    """Phase 3, ours: the bases stay, what the new stack has outside them adds directions.

    variance: the fraction to explain of what is outside (uncentred). k: instead, the columns up to
    which a basis may grow.
    """
    grown = []
    for side in (0, 1):
        basis = bases[side]
        outside = outside_of(basis, stack_of(new, side, kind))
        room = None if k is None else max(0, k - basis.shape[1])
        added = main_directions(outside, variance, room, centred=False)
        # Rounding in eigh tilts faint directions slightly into the basis: take that out.
        added = torch.linalg.qr(outside_of(basis, added)).Q
        grown.append(torch.cat([basis, added.to(basis.dtype)], dim=1))

    coefficients = {}
    beta, alpha = grown
    for task, (eps_beta, eps_alpha) in old.items():
        coefficients[task] = pad_rows(eps_beta, beta.shape[1]), pad_rows(eps_alpha, alpha.shape[1])
    for task, pair in new.items():
        coefficients[task] = project(grown, pair)
    return (beta, alpha), coefficients


def pad_rows(eps, k):
    """eps with rows of zeros below, k rows in all."""
    return nn.functional.pad(eps, (0, 0, 0, k - len(eps)))


def outside_of(basis, stack):
    """What the columns of a stack (n, m) have outside a basis, where that is not just rounding."""
    stack = stack.double()
    Q = torch.linalg.qr(basis.double()).Q  # a float32 basis is orthonormal only to 1e-7
    outside = stack - Q @ (Q.T @ stack)
    lengths = stack.norm(dim=0)
    is_inside = outside.norm(dim=0) <= ROUNDING * lengths
    is_rounding = lengths <= 1e-12 * lengths.norm()  # so short beside the others
    # Both kinds leave only rounding outside, which would be taken for directions.
    return outside[:, ~(is_inside | is_rounding)]


# --- The share: phases 1, 2 and 3


class Share:
    """The bases of all layers and the coefficients of all tasks, each in this one place only.

    bases: {layer: (beta (n, k), alpha (d, k))}.
    coefficients: {layer: {task: (eps_beta (k, p), eps_alpha (k, p))}}.
    records: {task: what else is kept of its adapter, see `_record`}.
    selected: a task, None, or a tuple of these, one for each sample of a batch.
    learning: the task that a block of `learn` trains, else None.
    trained: {layer: nn.ParameterDict} of that task, else {}.
    A method that raises ValueError has changed nothing in the share.
    """

    def __init__(self, variance=0.6, stack="factors"):
        check_numbers(variance)
        if stack not in ("factors", "updates"):
            raise ValueError(f"stack is {stack!r}; it takes 'factors' or 'updates'")
        self.variance = float(variance)
        self.stack = stack
        self.bases = {}
        self.coefficients = {}
        self.records = {}
        self.selected = None
        self.learning = None
        self.trained = {}

    @property
    def tasks(self):
        """The tasks' names, oldest first."""
        return list(self.records)

    @property
    def layers(self):
        """The layers' names."""
        return list(self.bases)

    @classmethod
    def from_adapters(cls, adapters, *, variance=0.6, k=None, stack="factors", p=None):
        """Phase 1: a share of {task: Adapter}, one or more. p: pseudo-rank, None: each task's own.

        variance, k: see `build_basis`. The paper's 0.6 may keep little of unrelated adapters: look
        at `retained()`. stack: "factors" (the paper's) or "updates" (ours), see `stack_of`.
        """
        check_numbers(k=k, p=p)
        share = cls(variance, stack)
        for layer, pairs in share._pairs_by_layer(adapters).items():
            bases, coefficients = build_layer(pairs, share.stack, variance, k)
            if p is not None:
                coefficients = {task: best_rank(eps, p) for task, eps in coefficients.items()}
            share.bases[layer] = bases
            share.coefficients[layer] = coefficients
        share.records = {task: share._record(adapter) for task, adapter in adapters.items()}
        return share

    def attach(self, model):
        """Make each nn.Linear that has bases a ShareLinear, in place; returns the model.

        Layers are named as in `model.named_modules()`. Attach again when a merge brings a new
        layer, or when you replace one in the model. Code that reads a weight instead of calling the
        layer sees W0 only: TRL with lm_head, diffusers after fuse_qkv_projections, some blocks of
        timm and Mamba.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        attached = self._attached(model)
        linears = {}
        for layer, (beta, alpha) in self.bases.items():
            if layer in attached:
                continue
            if layer not in modules:
                raise ValueError(f"the model has no layer {layer!r}")
            linear = modules[layer]
            if linear in linears.values() or linear in attached.values():
                raise ValueError(f"layer {layer!r} has a second name in the share")
            if isinstance(linear, ShareLinear):
                raise ValueError(f"layer {layer!r} {ANOTHER_SHARE}")
            check_linear(layer, linear, nn.Linear)
            if linear.weight.shape != (len(beta), len(alpha)):
                shape = f"({len(beta)}, {len(alpha)})"
                raise ValueError(f"layer {layer!r} is {linear}; its bases take (n, d) = {shape}")
            linears[layer] = linear
        for layer, linear in linears.items():
            linear.__class__ = ShareLinear  # the same object: names, hooks and sharing all stay
            linear.share = self
            linear.layer = layer
            # An encoder layer's fast path would go around forward, but not where there is a hook.
            linear.hook = linear.register_forward_pre_hook(keep_forward_called)
            self._move(layer, linear.weight.device)
        return model

    def select(self, task):
        """What attached models add from now on: a task's ΔW, none, or one for each sample.

        task: a name, None, or for a mixed batch a sequence of these, one for each entry along the
        first dimension (with beams, each beam is one). There is one selection, for all threads;
        with gradient checkpointing it has to stay until `backward` has run.
        """
        if task is None or isinstance(task, str):
            if task is not None and task != self.learning:  # a task being learned may be a new one
                self._check_task(task)
            self.selected = task
            return
        tasks = tuple(task)
        if self.learning is not None and self.learning in tasks:
            raise ValueError(f"task {self.learning!r} is being learned: not in a mixed batch")
        for name in tasks:
            if name is not None:
                self._check_task(name)
        self.selected = tasks

    @contextlib.contextmanager
    def learn(self, model, task, *, p=1, phi=0, sigma=0.03, seed=0, finetune=False, grow=True):
        """Phase 2, for any training loop: what the block trains becomes the task's coefficients.

            with share.learn(model, "three", p=1) as parameters:
                my_loop(model)  # AdamW(parameters, lr=1e-2), a Trainer, ...
            share.select("three")

        In the block the task is selected, and its parameters are all of the model that requires
        gradients. Create inside the block whatever has to know them:
        - the optimizer, with a rate near 1e-2 (5e-5 does nothing);
        - DistributedDataParallel;
        - fully_shard, once for a model: it makes new parameters, so give the optimizer
          model.parameters();
        - moving averages or a best state_dict(), copied into the model before the block ends.
        To train a head, too, unfreeze it inside. The share does not keep it: copy it for each task,
        and put it back yourself, as other tasks and the bare model would use it as well.

        p: pseudo-rank, the columns of the coefficients.
        phi: trained temporary columns beside each basis, fewer than the largest k; at the end of
            the block the task is merged.
        sigma, seed: coefficients start as N(0, sigma²), alike in every process.
        finetune: train an existing task on, from what it has; phi must be 0, p, sigma, seed and
            grow play no part.
        grow: the merge after phi > 0 is merge(grow=True, variance=1), which loses nothing. False:
            the paper's, after which little of the task may be left; look at `retained()`.

        A layer is part of the task only if its parameters changed, even if just by weight decay or
        a cast to half and back. ValueError if none did; then, as after any exception, nothing is
        kept. Gradients are cleared at the start; requires_grad and the buffers of state_dict() are
        put back at the end.
        """
        self._check_idle()
        start = self._resume(task, phi) if finetune else self._start(task, p, phi, sigma, seed)
        attached = self._attached(model, needed=start)
        for layer, linear in attached.items():
            if hasattr(linear.weight, "full_tensor"):  # new parameters would not be synchronised
                raise ValueError(f"layer {layer!r} is sharded; call fully_shard inside the block")
        trained = copy.deepcopy(start)
        with frozen(model), self._training(task, trained, attached):
            yield [parameter for module in trained.values() for parameter in module.values()]
        moved = moved_layers(start, trained)
        if not moved:
            reasons = "an optimizer made before the block, no step, no layer reached, or all was 0"
            raise ValueError(f"task {task!r}: no parameter has moved; likely {reasons}")
        self._keep(task, moved, phi, grow)

    @contextlib.contextmanager
    def _training(self, task, trained, attached):
        """For a block, select a task whose factors come from {layer: nn.ParameterDict}."""
        selected = self.selected
        self.selected = task
        self.learning = task
        self.trained = trained
        for layer, module in trained.items():
            attached[layer].learned = module  # a submodule: model.parameters() has its parameters
        try:
            yield
        finally:
            self.selected = selected
            self.learning = None
            self.trained = {}
            for layer in trained:
                del attached[layer].learned

    def _start(self, task, p, phi, sigma, seed):
        """Where a new task starts: {layer: nn.ParameterDict}, see `learned_factors`."""
        self._check_new_task(task)
        if type(p) is not int or p < 1:
            raise ValueError(f"p is {p!r}; it takes an integer, 1 or more")
        # The paper has phi < k. Here k differs by layer and side: the largest counts.
        sizes = [basis.shape[1] for bases in self.bases.values() for basis in bases]
        largest = max(sizes, default=0)
        if type(phi) is not int or not 0 <= phi < max(1, largest):
            raise ValueError(f"phi is {phi!r}; it takes 0, or less than the largest k, {largest}")
        generator = torch.Generator().manual_seed(seed)
        start = {}
        for layer, (beta, alpha) in self.bases.items():
            start[layer] = nn.ParameterDict()
            for name, basis in (("beta", beta), ("alpha", alpha)):
                rows, k = basis.shape
                eps = sigma * torch.randn(k + phi, p, generator=generator, device="cpu")
                start[layer][f"eps_{name}"] = eps.to(basis)
                if phi > 0:  # of norm 1, about
                    columns = torch.randn(rows, phi, generator=generator, device="cpu")
                    start[layer][f"columns_{name}"] = columns.to(basis) / rows**0.5
        return start

    def _resume(self, task, phi):
        """Where fine-tuning starts: at the task's coefficients."""
        self._check_task(task)
        if phi != 0:
            raise ValueError(f"phi is {phi!r}; with finetune it takes 0")
        start = {}
        for layer, held in self.coefficients.items():
            if task in held:
                start[layer] = nn.ParameterDict()  # made of a dict it would sort: alpha before beta
                start[layer]["eps_beta"], start[layer]["eps_alpha"] = held[task]
        return start

    def _keep(self, task, moved, phi, grow):
        """The end of phase 2: {layer: {name: tensor}} become a task of the share."""
        adapter = Adapter({})
        if task in self.records:  # fine-tuned: layers that did not move, extras and config stay
            adapter = self.reconstruct(task)
        for layer, end in moved.items():
            adapter.factors[layer] = learned_factors(self.bases[layer], end)
        check_adapter(task, adapter, {})  # training may have ended in NaN
        if phi > 0:
            self.merge({task: adapter}, variance=1.0 if grow else None, grow=grow)
            return
        self.records[task] = self._record(adapter)
        for layer, end in moved.items():
            beta, alpha = self.bases[layer]
            self.coefficients[layer][task] = end["eps_beta"].to(beta), end["eps_alpha"].to(alpha)

    def merge(self, adapters, *, variance=None, k=None, grow=False):
        """Phase 3: take in {task: Adapter}; new bases and coefficients for the layers they have.

        The bases become the main directions of all tasks together, and earlier tasks may move; see
        `merge_layer`. Directions that no task uses are lost: with p = 1 one for each task stays.
        With `grow` bases and earlier tasks stay, and directions are added; see `grow_layer`.

        variance: None is `self.variance`. k, instead of variance: the size of each basis, with
        `grow` the most it may have. k and p of `from_adapters` are not remembered.
        """
        self._check_idle()
        variance = self.variance if variance is None else variance
        check_numbers(variance, k=k)
        bases = {}
        coefficients = {}
        for layer, new in self._pairs_by_layer(adapters).items():
            if layer not in self.bases:
                found = build_layer(new, self.stack, variance, k)
            else:
                merge_one = grow_layer if grow else merge_layer
                old = self.coefficients[layer]
                found = merge_one(self.bases[layer], old, new, self.stack, variance, k)
            bases[layer], coefficients[layer] = found
        records = {task: self._record(adapter) for task, adapter in adapters.items()}
        self.bases.update(bases)
        self.coefficients.update(coefficients)
        self.records.update(records)

    # --- The rest of the share

    def add(self, task, adapter, p=None):
        """Project one more task onto the bases; what is outside is lost. p: see `from_adapters`."""
        self._check_idle()
        check_numbers(p=p)
        for layer in adapter.factors:
            if layer not in self.bases:
                raise ValueError(f"task {task!r}, layer {layer!r}: no bases yet; merge makes them")
        found = {}
        for layer, pairs in self._pairs_by_layer({task: adapter}).items():
            eps = project(self.bases[layer], pairs[task])
            found[layer] = eps if p is None else best_rank(eps, p)
        self.records[task] = self._record(adapter)
        for layer, eps in found.items():
            self.coefficients[layer][task] = eps

    def remove(self, task):
        """Forget a task; the bases stay. A selection that names it becomes None."""
        self._check_idle()
        self._check_task(task)
        del self.records[task]
        for held in self.coefficients.values():
            held.pop(task, None)
        if self.selected == task or (isinstance(self.selected, tuple) and task in self.selected):
            self.selected = None

    def factors(self, layer, task):
        """LoRA's (B (n, p), A (p, d)) of a task; None where it leaves the layer alone."""
        if task == self.learning and layer in self.trained:  # finetune: in the task's layers only
            return learned_factors(self.bases[layer], self.trained[layer])
        self._check_task(task)
        eps = self.coefficients[layer].get(task)
        return None if eps is None else lora_factors(self.bases[layer], eps)

    def reconstruct(self, task):
        """The Adapter that the share holds for a task, a copy, with its extras and config."""
        self._check_task(task)
        factors = {}
        for layer, held in self.coefficients.items():
            if task in held:
                factors[layer] = lora_factors(self.bases[layer], held[task])
        record = copy.deepcopy(self.records[task])
        return Adapter(factors, record["extras"], record["config"])

    def retained(self):
        """{task: ‖ΔW now‖² / ‖ΔW when it was added or learned‖²}, over all layers, 0 … 1."""
        parts = {}
        for task, record in self.records.items():
            energy = self.reconstruct(task).energy()
            parts[task] = energy / record["energy"] if record["energy"] > 0 else 1.0
        return parts

    def detach(self, model, task=None):
        """Undo `attach`; with `task`, its ΔW is added to the weights.

        If memory runs out half-way, some layers have it and some not: load the weights anew.
        """
        self._check_idle()
        adapter = Adapter({}) if task is None else self.reconstruct(task)
        attached = self._attached(model, needed=adapter.factors)
        if not attached:
            raise ValueError(f"no layer of the model is attached, or each {ANOTHER_SHARE}")
        for layer, linear in attached.items():
            check_linear(layer, linear, ShareLinear)
            plain = type(linear.weight) is nn.Parameter and linear.weight.is_floating_point()
            if layer in adapter.factors and not plain:
                raise ValueError(f"layer {layer!r}: its weight is no plain Parameter of floats")
        for layer, linear in attached.items():
            if layer in adapter.factors:
                weight = (linear.weight + adapter.delta(layer)).to(linear.weight.dtype)
                # a new Parameter: the old one may be another layer's as well
                linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
            linear.hook.remove()
            del linear.share, linear.layer, linear.hook
            linear.__class__ = nn.Linear
        return model

    def save(self, path):
        """Write one .safetensors file, whole or not at all; selection and open block stay out."""
        # One tensor per task would overflow the header, so a layer's coefficients are side by side.
        # widths[j]: the columns of task j, 0 if it leaves the layer alone.
        tensors = {}
        for i, (layer, bases) in enumerate(self.bases.items()):
            held = self.coefficients[layer]
            nothing = no_columns(bases)
            all_eps = [held.get(task, nothing) for task in self.tasks]
            widths = [eps_beta.shape[1] for eps_beta, _ in all_eps]
            all_eps.append(nothing)  # torch.cat fails on an empty list
            tensors[f"{i}.beta"], tensors[f"{i}.alpha"] = bases
            tensors[f"{i}.eps_beta"] = torch.cat([eps_beta for eps_beta, _ in all_eps], dim=1)
            tensors[f"{i}.eps_alpha"] = torch.cat([eps_alpha for _, eps_alpha in all_eps], dim=1)
            tensors[f"{i}.widths"] = torch.tensor(widths, dtype=torch.int32, device="cpu")
        records = {}
        for j, (task, record) in enumerate(self.records.items()):
            try:
                json.dumps(record["config"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"task {task!r}: JSON cannot hold its config: {error}") from None
            records[task] = record | {"extras": list(record["extras"])}
            for name, extra in record["extras"].items():
                tensors[f"extras.{j}.{name}"] = extra
        for name, tensor in tensors.items():  # safetensors takes no views
            tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        state = {"variance": self.variance, "stack": self.stack}
        text = json.dumps(state | {"layers": self.layers, "records": records})
        metadata = {"format": FORMAT, "state": text, "checksum": checksum(text, tensors)}
        write_whole(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. ValueError for another file, or where one bit has changed."""
        tensors, metadata = read_safetensors(path)
        text = metadata.get("state", "")
        if metadata.get("format") != FORMAT or metadata.get("checksum") != checksum(text, tensors):
            raise ValueError(f"{path} is not a Share file ({FORMAT}), or is damaged")
        state = json.loads(text)
        share = cls(state["variance"], state["stack"])
        for i, layer in enumerate(state["layers"]):
            share.bases[layer] = tensors[f"{i}.beta"], tensors[f"{i}.alpha"]
            widths = tensors[f"{i}.widths"].tolist()
            eps_betas = tensors[f"{i}.eps_beta"].split(widths, dim=1)
            eps_alphas = tensors[f"{i}.eps_alpha"].split(widths, dim=1)
            held = {}
            for j, task in enumerate(state["records"]):
                if widths[j] > 0:
                    held[task] = eps_betas[j].clone(), eps_alphas[j].clone()
            share.coefficients[layer] = held
        for j, (task, record) in enumerate(state["records"].items()):
            extras = {name: tensors[f"extras.{j}.{name}"] for name in record["extras"]}
            share.records[task] = record | {"extras": extras}
        return share

    # --- Private

    def _record(self, adapter):
        """What is kept of an adapter beside its coefficients."""
        extras = {name: extra.detach().clone() for name, extra in adapter.extras.items()}
        config = copy.deepcopy(adapter.config)
        return {"energy": adapter.energy(), "extras": extras, "config": config}

    def _attached(self, model, needed=()):
        """{layer: ShareLinear} of this share in a model; ValueError if a needed one is missing."""
        linears = [module for module in model.modules() if isinstance(module, ShareLinear)]
        attached = {linear.layer: linear for linear in linears if linear.share is self}
        for layer in needed:
            if layer in attached:
                continue
            if any(linear.layer == layer for linear in linears):
                raise ValueError(f"layer {layer!r} {ANOTHER_SHARE}")
            raise ValueError(f"layer {layer!r} is not attached; share.attach(model) does it")
        return attached

    def _move(self, layer, device):
        """All of a layer's numbers go to the device of its weight, together, but not to meta."""
        beta, alpha = self.bases[layer]
        if beta.device == device or device.type == "meta":
            return
        self.bases[layer] = beta.to(device), alpha.to(device)
        held = self.coefficients[layer]
        for task, (eps_beta, eps_alpha) in held.items():
            held[task] = eps_beta.to(device), eps_alpha.to(device)

    def _pairs_by_layer(self, adapters):
        """{layer: {task: (B, A^T)}} of new {task: Adapter}, checked, in float32 at least."""
        if not adapters:
            raise ValueError("adapters is empty; it takes one or more")
        shapes = {layer: (len(beta), len(alpha)) for layer, (beta, alpha) in self.bases.items()}
        for task, adapter in adapters.items():
            self._check_new_task(task)
            check_adapter(task, adapter, shapes)
        layers = {}
        for task, adapter in adapters.items():
            for layer, (B, A) in adapter.factors.items():
                device = self.bases[layer][0].device if layer in self.bases else B.device
                dtype = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
                B = B.detach().to(device, dtype)
                A = A.detach().to(device, dtype)
                layers.setdefault(layer, {})[task] = B, A.T
        return layers

    def _check_idle(self):
        if self.learning is not None:
            raise ValueError(f"task {self.learning!r} is being learned; this has to wait for it")

    def _check_task(self, task):
        if task not in self.records:
            raise ValueError(f"task {task!r} is unknown; the share has {self.tasks}")

    def _check_new_task(self, task):
        if not isinstance(task, str) or task in self.records:
            raise ValueError(f"task {task!r} exists, or is no string; it takes a new name")


def train_coefficients(
    share, model, task, batches, loss_fn, *, lr=1e-2, extra_parameters=(), **settings
):
    """Phase 2 with Adam: a step for each batch in a block of `Share.learn`. Returns the losses.

    loss_fn(model, batch) gives a scalar. extra_parameters: tensors that train along at the same
    rate; their changes stay, even after an error. settings: of `learn`. ValueError: a loss that is
    not finite.
    """
    extra = list(extra_parameters)
    losses = []
    with share.learn(model, task, **settings) as parameters:
        for tensor in extra:
            tensor.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters + extra, lr=lr)
        for step, batch in enumerate(batches):
            loss = loss_fn(model, batch)
            if not loss.isfinite():
                raise ValueError(f"task {task!r}, step {step}: the loss is {loss.item()}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.clear_autocast_cache()  # or autocast around this call would reuse the old `extra`
            losses.append(loss.item())
    return losses


class ToyTransformer(nn.Module):
    """A causal transformer: tokens (batch, T <= length) -> logits (batch, T, vocabulary)."""

    def __init__(self, vocabulary=64, width=64, depth=2, heads=4, length=16):
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.ModuleDict({name: nn.Linear(width, width) for name in "qkvo"})
            block["up"] = nn.Linear(width, 4 * width)
            block["down"] = nn.Linear(4 * width, width)
            self.blocks.append(block)
        self.head = nn.Linear(width, vocabulary)

    def hidden(self, tokens):
        """What the head sees, (batch, T, width)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            y = self.norm(x)
            heads = [block[name](y).unflatten(-1, (self.heads, -1)) for name in "qkv"]
            q, k, v = [head.transpose(1, 2) for head in heads]  # (batch, heads, T, width / heads)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["o"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](nn.functional.gelu(block["up"](self.norm(x))))
        return self.norm(x)

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


# --- Housekeeping


ANOTHER_SHARE = "carries another share, see its `.share`: copying a model copies the share as well"


def check_numbers(variance=1.0, **counts):
    """ValueError unless 0 < variance <= 1 and each count is None or an integer from 1 on."""
    if not 0 < variance <= 1:
        raise ValueError(f"variance is {variance!r}; it takes a number above 0, up to 1")
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; it takes an integer, 1 or more")


def check_adapter(task, adapter, shapes):
    """ValueError unless all factors fit. A new layer is added to shapes, {layer: (n, d)}."""
    if not adapter.factors:
        raise ValueError(f"task {task!r}: its adapter has no layers")
    for layer, (B, A) in adapter.factors.items():
        what = f"task {task!r}, layer {layer!r}: B {tuple(B.shape)}, A {tuple(A.shape)}"
        if B.dim() != 2 or A.dim() != 2 or B.shape[1] != len(A) or len(A) == 0:
            raise ValueError(f"{what}; it takes (n, r) and (r, d)")
        n, d = shapes.setdefault(layer, (len(B), A.shape[1]))
        if len(B) != n or A.shape[1] != d:
            raise ValueError(f"{what}; the layer takes ({n}, r) and (r, {d})")
        for factor in (B, A):
            if not factor.is_floating_point() or not factor.isfinite().all():
                raise ValueError(f"{what}; one is not of floats, or holds NaN or infinity")


def check_linear(layer, linear, cls):
    """ValueError unless a layer is just a `cls`, with a stored weight and an unpatched forward."""
    weight = linear._parameters.get("weight")  # None where weight_norm or prune computes it
    is_plain = type(linear) is cls and weight is not None and not weight.is_meta
    if not is_plain or "forward" in vars(linear):
        takes = f"a plain {cls.__name__}, its weight a Parameter, not on meta, forward unpatched"
        raise ValueError(f"layer {layer!r} is {linear}; it takes {takes}")


def moved_layers(start, trained):
    """{layer: {name: tensor}}, copies, where a parameter is no longer what it was at the start."""
    moved = {}
    for layer, module in trained.items():
        end = {}
        for name, parameter in module.items():
            now = parameter.detach()
            if hasattr(now, "full_tensor"):  # `fully_shard` has split it
                now = now.full_tensor()
            end[name] = now.clone()
        # .to: the block may have moved the model to another device, or cast it
        if any(not torch.equal(start[layer][name].to(now), now) for name, now in end.items()):
            moved[layer] = end
    return moved


@contextlib.contextmanager
def frozen(model):
    """Freeze a model, clear its gradients; put back requires_grad and buffers like BatchNorm's."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    saved = model.state_dict().keys()  # buffers that are not in it are caches: not ours to put back
    buffers = {name: b.clone() for name, b in model.named_buffers() if name in saved}
    model.requires_grad_(False)
    model.zero_grad()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # by name: fully_shard makes new ones
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])


def keep_forward_called(module, inputs):
    """Does nothing; it is there, see `Share.attach`."""


def checksum(text, tensors):
    """CRC-32, in hexadecimal, of the text and of all tensors' names, types, shapes and bytes."""
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def read_safetensors(path):
    """(tensors, metadata) of a file; both are empty if it is damaged."""
    raw = Path(path).read_bytes()  # in one go: another process may replace the file
    try:
        tensors = safetensors.torch.load(raw)  # which drops the metadata
    except safetensors.SafetensorError:
        return {}, {}
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    return tensors, json.loads(header).get("__metadata__") or {}


def write_whole(path, content):
    """A file that appears whole or not at all, whoever else writes or reads it."""
    beside = Path(f"{path}.{uuid.uuid4().hex}")  # a name that no other process has
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
