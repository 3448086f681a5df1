# SPDX-License-Identifier: MIT. (c) 2026 the authors of this implementation; text: end of README.md.
"""Share: one low-rank subspace for the LoRA adapters of many tasks (arXiv 2602.06043).

LoRA adds ΔW = B A to a frozen weight W0, with a B and an A for each task. Share gives each layer
two bases, which all tasks have in common. A task then consists of its coefficients in them:

    h = W0 x + B A x  with  B = beta eps_beta  and  A = (alpha eps_alpha)^T

    W0                   n × d             frozen; n = out_features, d = in_features
    B, A                 n × p, p × d      one task's LoRA factors, every scaling folded in
    beta, alpha          n × kβ, d × kα    orthonormal bases; k differs by layer and side
    eps_beta, eps_alpha  kβ × p, kα × p    one task's coefficients; p, the pseudo-rank, may differ

Phase 1 makes the bases: they are the main directions of the factors of some finished adapters.
Phase 2 learns a new task: its coefficients are trained while the bases are frozen. With phi > 0,
for bases that are too narrow, phi temporary columns beside each basis are trained as well.
Phase 3 merges new adapters into the bases and projects every task onto them again.

    adapters = [Adapter({"head": (torch.randn(64, 4), torch.randn(4, 64))}) for _ in range(3)]
    share = Share.from_adapters({"a": adapters[0], "b": adapters[1]}, variance=1.0)
    model = share.attach(ToyTransformer())  # which has a layer "head"
    batches = torch.randint(64, (9, 8, 16))
    train_coefficients(share, model, "new", batches, lambda model, x: model(x).square().mean())
    share.merge({"c": adapters[2]})
    print(share.retained())  # the part of each ‖ΔW‖² that is left: with variance=1.0 all of it
    share.select("new")  # from now on model(tokens) answers as the task "new"

Part 1 is the paper, Part 2 all else. "Ours" marks what the paper lacks. Three of ours are default:
- Phases 1 and 3: the mean column is subtracted, but its direction added to the basis (with_mean).
- Phase 2 with phi > 0: the new task adds directions to the bases, in place of phase 3 (grow).
- Phase 3: at variance=0.6 a merge would often make a basis smaller. Then it takes as many as before
  of the first directions, found without subtracting a mean (keep_size).
For the paper alone pass grow=False, and delete the calls of with_mean and keep_size.
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
from torch.nn import functional as F

ROUNDING = 1e-6  # relative size below which a singular value or a column counts as 0


# --- Part 1, the paper. `share` is an object of class Share, see below. It has from_adapters, learn
# and merge as methods, and keeps this:
#
#     share.bases                     {layer: (beta, alpha)}
#     share.coefficients              {layer: {task: (eps_beta, eps_alpha)}}
#     share.variance, share.stacking  settings of phase 1, for phase 3
#     share.selected                  the task whose ΔW is added in forward
#
# Its methods with an underscore, see below, do the bookkeeping.
@dataclass
class Adapter:
    """One task's LoRA adapter: ΔW = B A in each of its layers.

    factors: layer name -> (B (n, r), A (r, d)), every scaling folded in. extras: other tensors,
    such as a head, which a share keeps but does not apply. config: adapter_config.json, or {}.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    def delta(self, layer):
        """ΔW (n, d) of one layer."""
        B, A = self.factors[layer]
        return matmul64(B, A)


class ShareLinear(nn.Linear):
    """h = W0 x + (beta eps_beta)(alpha eps_alpha)^T x; `Share.attach` makes it of an nn.Linear."""

    def forward(self, input):
        # attach has set self.share, the Share, and self.layer, the name of this layer in it.
        follow_weight(self)  # model.to(device) does not move the bases; this does it
        h = super().forward(input)  # W0 x, plus the layer's bias
        task = self.share.selected
        if isinstance(task, tuple):  # ours: a task for each sample
            return mixed_batch(self, task, input, h)
        factors = self.share.factors(self.layer, task)  # lora_factors; in learn learned_factors
        if factors is None:  # no task, or one that leaves this layer alone
            return h
        B, A = factors  # B = beta eps_beta, A = (alpha eps_alpha)^T
        BAx = F.linear(F.linear(input.to(A.dtype), A), B)
        return (h + BAx).to(h.dtype)


def lora_factors(bases, eps):
    """LoRA's B = beta eps_beta (n, p) and A = (alpha eps_alpha)^T (p, d)."""
    beta, alpha = bases
    eps_beta, eps_alpha = eps
    # Not in half precision, even under autocast: B and A are also exported and added to weights.
    with torch.autocast(beta.device.type, enabled=False):
        return beta @ eps_beta, (alpha @ eps_alpha).T


# --- Phase 1: bases from adapters
def from_adapters(cls, adapters, *, variance=0.6, k=None, stack="factors", p=None):
    """Phase 1: a share of {task: Adapter}, one or more.

    variance, k: see `build_basis`; the paper's 0.6 may keep little, see `retained`.
    stack: the paper's "factors", or "updates", ours, see `scaled_updates`.
    p, ours: the pseudo-rank to which each task is cut, see `best_rank`; None keeps its r.
    """
    check_numbers(variance, k=k, p=p)
    share = cls(variance, stack)  # cls is Share
    layers = {}
    for layer, pairs in share._pairs_by_layer(adapters).items():  # pairs: {task: (B, A^T)}
        bases, coefficients = build_layer(pairs, variance, k, stack)
        if p is not None:  # ours
            coefficients = {task: best_rank(eps, p) for task, eps in coefficients.items()}
        layers[layer] = bases, coefficients
    share._store(adapters, layers)
    return share


def build_layer(pairs, variance, k, stacking, least=(0, 0)):
    """Phase 1 for one layer: its (beta, alpha), and {task: (eps_beta, eps_alpha)}.

    pairs: {task: (B (n, r), A^T (d, r))}. A is transposed, so that both sides are columns.
    variance, k: see `build_basis`. stacking: the paper's "factors", or "updates", ours.
    least, ours: in a merge, the sizes that beta and alpha keep at least, see `keep_size`.
    """
    # 1. Put the B's of all tasks side by side, and their A^T's.
    if stacking == "factors":  # the paper's
        stacked = pairs
        centre = True
    else:  # ours: columns whose main directions depend on ΔW alone, not on its split into B and A
        stacked = scaled_updates(pairs)
        centre = False  # their mean would depend on their signs, which an SVD leaves open
    Bs = torch.cat([B for B, _ in stacked.values()], dim=1)
    A_Ts = torch.cat([A_T for _, A_T in stacked.values()], dim=1)
    # 2. Take the main directions of each.
    beta = build_basis(Bs, variance, k, centre=centre)
    alpha = build_basis(A_Ts, variance, k, centre=centre)
    beta = keep_size(beta, Bs, least[0])  # ours; in phase 1, least is 0 and nothing happens
    alpha = keep_size(alpha, A_Ts, least[1])
    # 3. Project the factors of each task onto the bases.
    coefficients = {task: project((beta, alpha), pair) for task, pair in pairs.items()}
    return (beta, alpha), coefficients


def build_basis(stack, variance=0.6, k=None, *, centre=True):
    """Orthonormal basis (n, k) of the main directions of a stack of columns (n, m).

    The paper: subtract the mean column, and take the fewest directions that explain the fraction
    `variance` of the rest. Ours:
    - add the direction of the mean, see `with_mean`;
    - centre=False: subtract no mean, and add none;
    - k, in place of variance: take the first k directions, or fewer; subtract no mean, as then
      they keep the most of the stack (Eckart and Young).

    Computed in float64, returned as float32 at least. ValueError: an argument out of range.
    """
    check_stack(stack, variance, k)
    X = stack.double()
    rounding = ROUNDING * X.norm()  # what is smaller counts as 0
    if centre and k is None:  # the paper's
        mean = X.mean(dim=1, keepdim=True)
        X = X - mean
        basis = main_directions(X, rounding, variance)
        basis = with_mean(basis, mean, X.shape[1], rounding)  # ours
    else:  # ours
        basis = main_directions(X, rounding, variance, k)
    return basis.to(torch.promote_types(stack.dtype, torch.float32))


def main_directions(X, rounding, variance, k=None):
    """The first left singular vectors (n, k) of X (n, m): the fewest that explain `variance`, or k.

    Singular values up to rounding count as 0: there may be fewer vectors, and none if X is 0.
    """
    if X.shape[0] < X.shape[1]:
        # For speed: X^T = Q R, so X = R^T Q^T. If R^T (n, n) is U S V^T, then X is U S (Q V)^T.
        X = torch.linalg.qr(X.T, mode="r").R.T
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    rank = int(S.gt(rounding).sum())
    if k is None:
        energy = S[:rank] ** 2
        explained = energy.cumsum(0) / energy.sum()  # say [0.5, 0.8, 1.0], by the first 1, 2, 3
        # For 0.6: [True, False, False], so k = 2. 1e-12: a sum of 0.6 may come out as 0.59999….
        too_few = explained < variance - 1e-12
        k = 1 + int(too_few.sum())
    return U[:, : min(k, rank)]


def project(bases, pair):
    """beta^T B and alpha^T A^T: the paper's (beta^T beta)^-1 beta^T B, as beta^T beta = 1."""
    beta, alpha = bases
    B, A_T = pair
    return matmul64(beta.T, B), matmul64(alpha.T, A_T)


# --- Phase 2: train the coefficients of a new task
def train_coefficients(share, model, task, batches, loss_fn, *, lr=1e-2, **settings):
    """Phase 2 with Adam. Returns the losses, loss_fn(model, batch). settings: those of `learn`."""
    losses = []
    with share.learn(model, task, **settings) as parameters:
        optimizer = torch.optim.Adam(parameters, lr=lr)
        for batch in batches:
            loss = loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@contextlib.contextmanager
def learn(share, model, task, *, p=1, phi=0, sigma=0.03, seed=0, finetune=False, grow=True):
    """Phase 2 for any training loop: what the block trains becomes the task's coefficients.

        with share.learn(model, "three") as parameters:
            my_loop(model)  # as in `train_coefficients`, or a Trainer, …
        share.select("three")

    In the block the task is selected, and only its parameters require gradients. Make the optimizer
    (with a rate near 1e-2), a Trainer and any wrapper inside the block.
    ValueError if nothing has moved; then, as after any exception, nothing is kept.

    p: columns of the coefficients, so the rank of ΔW. sigma, seed: of their random start.
    phi: temporary columns beside each basis: 0, or less than the largest k.
    grow: how, with phi > 0, the task is merged afterwards. False: by the paper's phase 3, which may
    lose much of it, see `retained`. True (ours): the bases gain the directions of the task's ΔW
    that they lack, and nothing is lost.
    finetune (ours): go on training a task that exists. Its p stays, phi has to be 0, and
    `retained` starts at 1 again.
    """
    # 1. Start with random parameters, see start_layer. Ours, finetune: with those of the task.
    start = share._resume(task, phi) if finetune else share._start(task, p, phi, sigma, seed)
    trained = copy.deepcopy(start)  # {layer: nn.ParameterDict}; start stays, for step 3
    # 2. The caller's loop, the body of its `with`, trains the copy, while all else is frozen. Until
    #    its end, `training` makes forward use learned_factors(share.bases[layer], trained[layer]).
    with training(share, model, task, trained):
        yield [tensor for parameters in trained.values() for tensor in parameters.values()]
    # 3. Take the layers that have moved. The others, which the loss has not reached, hold random
    #    numbers.
    ends = moved_layers(task, start, trained)
    # 4. Keep the task.
    if phi == 0:  # the bases stay, only the coefficients are new
        share._keep(task, ends)
    else:  # the temporary columns are in no basis, so phase 3 merges B and A
        factors = {layer: learned_factors(share.bases[layer], end) for layer, end in ends.items()}
        variance = 1.0 if grow else None  # grow, ours: all directions that the bases lack
        share.merge({task: Adapter(factors)}, variance=variance, grow=grow)


def start_layer(bases, p, phi, sigma, generator):
    """The parameters of a new task in one layer, at their start, as `learned_factors` takes them.

    Coefficients are N(0, sigma²) on both sides, as in the paper: ΔW is small, but not 0 as LoRA's.
    Temporary columns are N(0, 1 / rows), of norm near 1; the paper leaves it open.
    """
    beta, alpha = bases
    random = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    parameters = nn.ParameterDict()  # it makes a Parameter of each tensor
    for name, basis in (("beta", beta), ("alpha", alpha)):
        rows, k = basis.shape
        eps = sigma * torch.randn(k + phi, p, **random)
        parameters[f"eps_{name}"] = eps.to(basis)
        if phi > 0:
            columns = torch.randn(rows, phi, **random) / rows**0.5
            parameters[f"columns_{name}"] = columns.to(basis)
    return parameters


def learned_factors(bases, parameters):
    """LoRA's B = [beta, columns_beta] eps_beta of a task that is being learned, and A likewise.

    parameters: eps_beta (kβ + phi, p), eps_alpha (kα + phi, p); if phi > 0 the temporary columns
    columns_beta (n, phi) and columns_alpha (d, phi). The bases are frozen.
    """
    beta, alpha = bases
    # .to: in the block of `learn` the caller may have cast or moved the model
    eps = parameters["eps_beta"].to(beta), parameters["eps_alpha"].to(alpha)
    if "columns_beta" in parameters:
        beta = torch.cat([beta, parameters["columns_beta"].to(beta)], dim=1)
        alpha = torch.cat([alpha, parameters["columns_alpha"].to(alpha)], dim=1)
    return lora_factors((beta, alpha), eps)


# --- Phase 3: merge
def merge(share, adapters, *, variance=None, k=None, grow=False):
    """Phase 3: take in {task: Adapter}. The layers that they have get new bases and coefficients.

    Earlier tasks may lose a part, see `retained`.
    variance: see `build_basis`; None is the share's. Ours: no basis gets smaller, see `keep_size`.
    k, ours: in place of variance, the new size at most. Later merges by variance may enlarge it.
    grow=True, ours: bases and earlier tasks stay, and directions of the new ΔW are added: with
    variance=1.0 all that the bases lack, see `grow_layer`.
    """
    variance = share.variance if variance is None else variance
    check_numbers(variance, k=k)
    layers = {}
    for layer, new in share._pairs_by_layer(adapters).items():
        bases = share.bases.get(layer)
        old = share.coefficients.get(layer)
        if bases is None:  # a new layer: phase 1
            layers[layer] = build_layer(new, variance, k, share.stacking)
        elif grow:  # ours
            layers[layer] = grow_layer(bases, old, new, variance, k)
        else:  # phase 3: the result is that of merge_layer, the next function
            layers[layer] = merge_layer_fast(bases, old, new, variance, k, share.stacking)
    share._store(adapters, layers)


def merge_layer(bases, old, new, variance, k, stacking):
    """Phase 3 for one layer: its new bases, and the coefficients of all tasks in them, in float64.

    old: {task: (eps_beta, eps_alpha)} in the bases. new: {task: (B, A^T)}.
    """
    beta, alpha = bases
    # 1. Rebuild the factors of the old tasks.
    pairs = {}
    for task, (eps_beta, eps_alpha) in old.items():
        B = beta.double() @ eps_beta.double()
        A_T = alpha.double() @ eps_alpha.double()
        pairs[task] = B, A_T
    # 2. Put the new ones beside them.
    pairs.update(new)
    # 3. Phase 1 again, for all.
    least = 0, 0
    if k is None:  # ours: no basis gets smaller, unless k asks for it, see keep_size
        least = beta.shape[1], alpha.shape[1]
    return build_layer(pairs, variance, k, stacking, least)


# --- Part 2, everything else. For the method alone you can stop here.


# --- Behind phases 1 and 3
def orthonormal(matrices):
    """Orthonormal columns whose span contains all columns of the matrices, in float64."""
    return torch.linalg.qr(torch.cat(matrices, dim=1).double()).Q


def with_mean(basis, mean, m, rounding):
    """Ours: a basis and, beside it, the direction of the part of the mean that lies outside of it.

    The basis was made without the mean. But `project` gets the m columns with their mean left in,
    and each of them would lose that part.
    """
    outside = mean - basis @ (basis.T @ mean)
    lost = m**0.5 * outside.norm()  # the norm of m copies of it
    if lost <= rounding:
        return basis
    return torch.cat([basis, outside / outside.norm()], dim=1)


def keep_size(basis, stack, least):
    """Ours: in a merge by variance, a basis keeps at least its size from before, `least`.

    Why: the old tasks are rebuilt from the last basis. If each merge kept 60 % of what the one
    before has left, the basis would shrink: in a layer of 128 × 128, of ten random adapters of rank
    4 and one more in each merge, from 16 directions to 10, 8, 7.
    How: a basis that is too small is replaced by the first `least` directions of the stack, with no
    mean subtracted. No basis of this size keeps more of the stack (Eckart and Young). It is smaller
    all the same if the stack has a lower rank, as after `remove`.
    """
    if basis.shape[1] < least:  # never in phase 1, where least is 0
        return build_basis(stack, k=least)
    return basis


def merge_layer_fast(bases, old, new, variance, k, stacking):
    """merge_layer on short columns: faster, and the same but for the signs of directions.

    Let Q (n, q) be an orthonormal basis of all columns of beta and of the new B's: q is small, 40
    for kβ = 32 and one new adapter of rank 8. So the stack X that merge_layer makes is X = Q Y with
    a short Y = Q^T X (q, m), and its mean is Q times that of Y. If Y = U S V^T, then X = (Q U) S
    V^T: the directions of X are Q times those of Y. Coefficients stay as they are, as beta eps =
    Q (Q^T beta) eps. A^T likewise.
    """
    # 1. Make the bases and the new columns short.
    beta, alpha = bases
    Q_beta = orthonormal([beta] + [B for B, _ in new.values()])
    Q_alpha = orthonormal([alpha] + [A_T for _, A_T in new.values()])
    short_bases = Q_beta.T @ beta.double(), Q_alpha.T @ alpha.double()
    short_new = {}
    for task, (B, A_T) in new.items():
        short_new[task] = matmul64(Q_beta.T, B), matmul64(Q_alpha.T, A_T)
    # 2. Merge.
    merged = merge_layer(short_bases, old, short_new, variance, k, stacking)
    # 3. Make the new bases long.
    (short_beta, short_alpha), coefficients = merged
    return ((Q_beta @ short_beta).to(beta), (Q_alpha @ short_alpha).to(alpha)), coefficients


# --- The share, which the phases fill
class Share:
    """The bases of all layers, the coefficients of all tasks. A ValueError changes nothing."""

    # Functions of Part 1 (right) become methods (left): share.learn(…) is learn(share, …).
    from_adapters = classmethod(from_adapters)
    learn = learn
    merge = merge

    def __init__(self, variance=0.6, stack="factors"):
        check_numbers(variance)
        if stack not in ("factors", "updates"):
            raise ValueError(f"stack is {stack!r}; it takes 'factors' or 'updates'")
        self.variance = float(variance)  # see `build_basis`
        self.stacking = stack  # "factors", the paper's, or "updates", ours
        # held = (bases, coefficients, records), see the properties. A change replaces all of it, so
        # that another thread sees the whole change or nothing.
        self.held = {}, {}, {}
        self.selected = None  # a task, None, or a tuple of these, one for each sample of a batch
        self.learning = None  # the task that is being learned, inside a block of `learn`
        self.trained = {}  # its parameters in that block: {layer: nn.ParameterDict}

    @property
    def bases(self):
        """{layer: (beta (n, kβ), alpha (d, kα))}."""
        return self.held[0]

    @property
    def coefficients(self):
        """{layer: {task: (eps_beta (kβ, p), eps_alpha (kα, p))}}."""
        return self.held[1]

    @property
    def records(self):
        """{task: {"energy": ‖ΔW‖² when it was added or learned, "extras": …, "config": …}}."""
        return self.held[2]

    @property
    def tasks(self):
        """The tasks' names, oldest first."""
        return list(self.records)

    @property
    def layers(self):
        """The layers' names."""
        return list(self.bases)

    def attach(self, model):
        """Make each nn.Linear that has bases a ShareLinear, in place; returns the model.

        Layers are named as in `model.named_modules()`. Attach again after a merge with new layers.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        attached = [linear.layer for linear in self._attached(model)]
        linears = {}
        new_layers = [layer for layer in self.bases if layer not in attached]
        for layer in new_layers:
            if layer not in modules:
                raise ValueError(f"the model has no layer {layer!r}")
            linear = modules[layer]
            if linear in linears.values():
                raise ValueError(f"layer {layer!r} is another layer of the share as well")
            check_linear(layer, linear, nn.Linear, self.bases[layer])
            linears[layer] = linear
        for layer, linear in linears.items():
            linear.__class__ = ShareLinear  # the same object: names, hooks and sharing all stay
            linear.share = self
            linear.layer = layer
            linear.hook = linear.register_forward_pre_hook(no_fast_path)
            follow_weight(linear)
        return model

    def select(self, task):
        """Choose what attached models add from now on: a task's ΔW, nothing, or a mixture.

        task: a name, None, or a sequence of these, one for each sample (x's first dimension).
        """
        if isinstance(task, str) or not hasattr(task, "__iter__"):  # a name or None
            names = (task,)
        else:
            names = tuple(task)
            task = names
        for name in names:
            # The task that is being learned may be new, and then has no record yet.
            if name is not None and name != self.learning:
                self._check_task(name)
        self.selected = task

    def factors(self, layer, task):
        """LoRA's (B (n, p), A (p, d)) of a task in a layer; None for no task, or no ΔW there."""
        if task is None:
            return None
        if task == self.learning:  # in a block of learn: of the parameters that are being trained
            if layer not in self.trained:
                return None
            return learned_factors(self.bases[layer], self.trained[layer])
        self._check_task(task)
        bases, coefficients, _ = self.held
        if task not in coefficients[layer]:
            return None
        return lora_factors(bases[layer], coefficients[layer][task])

    def reconstruct(self, task):
        """The Adapter that the share holds for a task, a copy, with its extras and config."""
        self._check_task(task)
        bases, coefficients, records = self.held
        factors = {}
        for layer, by_task in coefficients.items():
            if task in by_task:
                factors[layer] = lora_factors(bases[layer], by_task[task])
        record = copy.deepcopy(records[task])
        return Adapter(factors, record["extras"], record["config"])

    def retained(self):
        """{task: ‖ΔW now‖² / ‖ΔW when it was added or learned‖²}, over all layers: 0 to about 1.

        Bases turn ΔW into its orthogonal projection, beta beta^T ΔW alpha alpha^T. After one
        projection this is 1 - (relative error)². Several projections, onto different bases, are
        together not orthogonal: after several merges the error may be larger or smaller. To be
        sure, compare `reconstruct` with the adapter.
        """
        parts = {}
        now = copy.copy(self)  # another thread may change self
        for task, record in now.records.items():
            energy = squared_norm(now.reconstruct(task))
            parts[task] = energy / record["energy"] if record["energy"] > 0 else 1.0
        return parts

    @torch.inference_mode(False)  # see _store
    def detach(self, model, task=None):
        """Undo `attach`; with `task`, its ΔW is added to the weights. Returns the model."""
        self._check_idle()
        adapter = Adapter({}) if task is None else self.reconstruct(task)
        attached = self._attached(model, needed=adapter.factors)
        if not attached:
            raise ValueError("no layer of the model is attached, or each carries another share")
        for linear in attached:
            layer = linear.layer
            check_linear(layer, linear, ShareLinear, self.bases[layer])
            weight = linear.weight
            is_quantized = type(weight) is not nn.Parameter or weight.dtype not in FLOATS
            if layer in adapter.factors and is_quantized:
                kind = f"{type(weight).__name__} of {weight.dtype}"
                raise ValueError(f"layer {layer!r}: ΔW cannot be added to a {kind}")
        for linear in attached:
            weight = linear.weight
            if linear.layer in adapter.factors:
                folded = weight.detach() + adapter.delta(linear.layer).to(weight.device)
                # a new Parameter: the old one may be another layer's as well
                linear.weight = nn.Parameter(folded.to(weight.dtype), weight.requires_grad)
            linear.hook.remove()
            del linear.share, linear.layer, linear.hook
            linear.__class__ = nn.Linear
        return model

    # --- Ours: a task more, a task less
    def add(self, task, adapter, p=None):
        """Project one more task onto the bases; what is outside is lost. p: see `from_adapters`."""
        check_numbers(p=p)
        layers = {}
        for layer, pairs in self._pairs_by_layer({task: adapter}).items():
            if layer not in self.bases:
                raise ValueError(f"task {task!r}, layer {layer!r}: no bases yet; merge makes them")
            bases = self.bases[layer]
            layers[layer] = bases, {task: best_rank(project(bases, pairs[task]), p)}
        self._store({task: adapter}, layers)

    def remove(self, task):
        """Forget a task; the bases stay. A selection that names it becomes None."""
        self._check_idle()
        self._check_task(task)
        if self.selected == task or (isinstance(self.selected, tuple) and task in self.selected):
            self.selected = None
        records = {name: record for name, record in self.records.items() if name != task}
        coefficients = {}
        for layer, by_task in self.coefficients.items():
            coefficients[layer] = {name: eps for name, eps in by_task.items() if name != task}
        self.held = self.bases, coefficients, records

    # --- Behind learn
    def _start(self, task, p, phi, sigma, seed):
        """Where a new task starts: {layer: nn.ParameterDict} of the layers that can be trained."""
        self._check_new_task(task)
        if type(p) is not int or p < 1:
            raise ValueError(f"p is {p!r}; it takes an integer, 1 or more")
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma is {sigma!r}; it takes a number above 0")
        # The paper asks for phi < k. Here k differs by layer and side. The largest one counts: one
        # narrow layer is no reason to refuse phi in all others.
        sizes = [basis.shape[1] for bases in self.bases.values() for basis in bases]
        max_k = max(sizes, default=0)
        if type(phi) is not int or phi < 0 or (phi > 0 and phi >= max_k):
            raise ValueError(f"phi is {phi!r}; it takes 0 or integers below the largest k, {max_k}")
        generator = torch.Generator().manual_seed(seed)  # its own: the same in every process
        start = {}
        for layer, (beta, alpha) in self.bases.items():
            narrowest = min(beta.shape[1], alpha.shape[1])  # 0 if all B's or all A's were 0
            if narrowest + phi > 0:
                start[layer] = start_layer((beta, alpha), p, phi, sigma, generator)
        return start

    def _resume(self, task, phi):
        """Where fine-tuning starts: {layer: nn.ParameterDict} of the task's coefficients."""
        self._check_task(task)
        if phi != 0:
            raise ValueError(f"phi is {phi!r}; with finetune it takes 0")
        start = {}
        for layer, by_task in self.coefficients.items():
            if task not in by_task:
                continue
            eps_beta, eps_alpha = by_task[task]
            if len(eps_beta) > 0 and len(eps_alpha) > 0:  # neither basis is empty
                start[layer] = nn.ParameterDict()  # of these tensors; learn trains copies
                start[layer]["eps_beta"] = eps_beta
                start[layer]["eps_alpha"] = eps_alpha
        return start

    def _keep(self, task, ends):
        """Take in trained coefficients: {layer: {"eps_beta": tensor, "eps_alpha": tensor}}."""
        adapter = Adapter({})  # of the task as it is now, for its record
        if task in self.records:  # finetune: layers that have not moved, extras and config stay
            adapter = self.reconstruct(task)
        layers = {}
        for layer, end in ends.items():
            adapter.factors[layer] = learned_factors(self.bases[layer], end)
            layers[layer] = self.bases[layer], {task: (end["eps_beta"], end["eps_alpha"])}
        check_adapter(task, adapter, {})  # training may have ended in NaN
        self._store({task: adapter}, layers)

    # --- The share's file
    def save(self, path):
        """Write one .safetensors file, whole or not at all. What is selected is not saved.

        i.basis.0, i.basis.1   beta and alpha of layer i
        i.eps.0, i.eps.1       in layer i the coefficients of all tasks, side by side
        j.extra.NAME           extras of task j
        state                  all else, as JSON: in safetensors' own header 100 MB is the limit
        checksum               see the function
        """
        all_bases, all_coefficients, all_records = self.held
        tensors = {}
        layers = []
        for i, (layer, bases) in enumerate(all_bases.items()):
            by_task = all_coefficients[layer]
            widths = {task: eps_beta.shape[1] for task, (eps_beta, _) in by_task.items()}
            layers.append((layer, widths))  # by each task's p `load` splits i.eps
            for side in (0, 1):
                # In front stands a matrix of no columns, as cat refuses an empty list.
                no_columns = bases[side].new_zeros(bases[side].shape[1], 0)
                columns = [eps[side] for eps in by_task.values()]
                tensors[f"{i}.basis.{side}"] = bases[side]
                tensors[f"{i}.eps.{side}"] = torch.cat([no_columns] + columns, dim=1)
        records = {}
        for j, (task, record) in enumerate(all_records.items()):
            records[task] = record | {"extras": list(record["extras"])}
            for name, extra in record["extras"].items():
                tensors[f"{j}.extra.{name}"] = extra
        state = {"variance": self.variance, "stacking": self.stacking}
        text = json.dumps(state | {"layers": layers, "records": records}).encode()
        tensors["state"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        for name, tensor in tensors.items():  # safetensors takes no views
            tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        tensors["checksum"] = torch.tensor(checksum(tensors), device="cpu")
        write_whole(path, safetensors.torch.save(tensors))

    @classmethod
    @torch.inference_mode(False)  # see _store
    def load(cls, path):
        """Read what `save` wrote. ValueError for another file, or where one bit has changed."""
        raw = Path(path).read_bytes()  # in one go: another process may replace the file
        try:
            tensors = safetensors.torch.load(raw)
        except safetensors.SafetensorError:
            tensors = {}  # and so no checksum
        found = tensors.pop("checksum", None)
        if found is None or found.tolist() != checksum(tensors):
            raise ValueError(f"{path} is not a Share file ({FORMAT}), or is damaged")
        state = json.loads(bytes(tensors["state"].numpy()))
        share = cls(state["variance"], state["stacking"])
        bases, coefficients, records = {}, {}, {}
        for i, (layer, widths) in enumerate(state["layers"]):
            bases[layer] = tensors[f"{i}.basis.0"], tensors[f"{i}.basis.1"]
            eps_betas = tensors[f"{i}.eps.0"].split(list(widths.values()), dim=1)
            eps_alphas = tensors[f"{i}.eps.1"].split(list(widths.values()), dim=1)
            coefficients[layer] = {}
            for task, eps_beta, eps_alpha in zip(widths, eps_betas, eps_alphas, strict=True):
                coefficients[layer][task] = eps_beta.clone(), eps_alpha.clone()
        for j, (task, record) in enumerate(state["records"].items()):
            extras = {name: tensors[f"{j}.extra.{name}"] for name in record["extras"]}
            records[task] = record | {"extras": extras}
        share.held = bases, coefficients, records
        return share

    # --- Private
    def _pairs_by_layer(self, adapters):
        """{layer: {task: (B, A^T)}} of new {task: Adapter}, checked, in float32 at least."""
        self._check_idle()
        if not isinstance(adapters, dict) or not adapters:
            raise ValueError("adapters is empty or no dict; it takes {task: Adapter}, one or more")
        like = dict(self.bases)  # {layer: two matrices of n and d rows, on its device}
        by_layer = {}
        for task, adapter in adapters.items():
            self._check_new_task(task)
            check_adapter(task, adapter, like)
            for layer, (B, A) in adapter.factors.items():
                if layer not in like:  # a new layer: its first adapter sets n, d and device
                    like[layer] = B, A.T
                device = like[layer][0].device
                dtype = torch.float64 if torch.float64 in (B.dtype, A.dtype) else torch.float32
                pair = B.detach().to(device, dtype), A.detach().to(device, dtype).T
                by_layer.setdefault(layer, {})[task] = pair
        return by_layer

    @torch.inference_mode(False)  # a tensor that is made in inference mode could never be trained
    def _store(self, adapters, layers):
        """Take in copies of results; all that neither argument names stays.

        adapters: {task: Adapter} of the tasks that are new, or newly trained: for their records.
        layers: {layer: ((beta, alpha), {task: eps})}, all that has changed.
        So a merge changes coefficients of old tasks, but not the ‖ΔW‖² that they had at first.
        """
        bases, coefficients, records = [dict(part) for part in self.held]
        for layer, ((beta, alpha), changed) in layers.items():
            bases[layer] = beta.clone(), alpha.clone()
            by_task = dict(coefficients.get(layer, {}))
            for task, (eps_beta, eps_alpha) in changed.items():
                by_task[task] = eps_beta.to(beta, copy=True), eps_alpha.to(alpha, copy=True)
            coefficients[layer] = by_task
        for task, adapter in adapters.items():
            extras = {name: extra.detach().clone() for name, extra in adapter.extras.items()}
            config = copy.deepcopy(adapter.config)
            records[task] = {"energy": squared_norm(adapter), "extras": extras, "config": config}
        self.held = bases, coefficients, records

    def _attached(self, model, needed=()):
        """All ShareLinear of this share in a model; ValueError if a needed layer is missing."""
        modules = model.modules()
        attached = [m for m in modules if isinstance(m, ShareLinear) and m.share is self]
        names = [linear.layer for linear in attached]
        for layer in needed:
            if layer not in names:
                raise ValueError(f"layer {layer!r} is not attached, or carries another share")
        return attached

    def _check_idle(self):
        if self.learning is not None:
            raise ValueError(f"task {self.learning!r} is being learned; this has to wait for it")

    def _check_task(self, task):
        if not isinstance(task, str) or task not in self.records:
            raise ValueError(f"task {task!r} is unknown; the share has {self.tasks}")

    def _check_new_task(self, task):
        if not isinstance(task, str) or task in self.records:
            raise ValueError(f"task {task!r} exists, or is no string; it takes a new name")


# --- Numbers
def matmul64(a, b):
    """a @ b computed in float64, which autocast does not touch; returned in a's dtype."""
    return (a.double() @ b.double()).to(a.dtype)


def squared_norm(adapter):
    """‖ΔW‖² of all layers together."""
    total = 0.0
    for factors in adapter.factors.values():
        B, A = [factor.detach().cpu().double() for factor in factors]
        # ‖B A‖² = trace(A^T B^T B A) = trace((B^T B) (A A^T)): these matrices are only r × r.
        total += float(torch.trace(B.T @ B @ (A @ A.T)))
    return total


def best_rank(eps, p):
    """Ours: coefficients cut to at most p columns, with the least change of ΔW.

    ΔW = beta (eps_beta eps_alpha^T) alpha^T. As the bases are orthonormal, the truncated SVD of
    the middle is best (Eckart and Young). Each side gets the root of its singular values.
    """
    if p is None:
        return eps
    eps_beta, eps_alpha = eps
    p = min(p, eps_beta.shape[1])
    middle = eps_beta.double() @ eps_alpha.double().T  # (kβ, kα)
    if 0 in middle.shape:  # a basis is empty, so ΔW is 0, and any p columns do
        return eps_beta[:, :p], eps_alpha[:, :p]
    U, S, Vh = torch.linalg.svd(middle, full_matrices=False)
    # An S that is only rounding, say 1e-8, has a root of 1e-4, which a later merge would take for a
    # direction. So it becomes 0.
    S = torch.where(S.gt(ROUNDING * S.norm()), S, 0.0)
    # The SVD leaves open the sign of each pair u, v, and machines differ. ΔW does not depend on it,
    # but phase 3's mean of all columns does. So turn u to the side of the sum of the old columns.
    signs = torch.where(U.T @ eps_beta.double().sum(dim=1) < 0, -1.0, 1.0)
    scale = (signs * S.sqrt())[:p]  # the same on both sides, so that the signs cancel in ΔW
    return U[:, :p] * scale, Vh.T[:, :p] * scale


# --- Ours
def update_columns(B, A_T):
    """Ours: left = U S (n, r) and right = V S (d, r) of the SVD ΔW = U S V^T, in float64.

    ΔW has many splits into B and A, such as 2 B and A / 2, with other main directions of B. U S and
    V S are the same for every split, but for the signs of their columns.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A_T.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)  # ΔW = Q_B (…) Q_A^T
    return (Q_B @ U) * S, (Q_A @ Vh.T) * S


def scaled_updates(pairs):
    """Ours, for "updates": {task: (left, right)}, its `update_columns` divided by ‖ΔW‖.

    So all tasks weigh the same, but for a ΔW below ROUNDING times the largest, which stays small.
    """
    updates = {task: update_columns(B, A_T) for task, (B, A_T) in pairs.items()}
    norms = {task: float(left.norm()) for task, (left, _) in updates.items()}  # ‖U S‖ = ‖ΔW‖
    floor = max(ROUNDING * max(norms.values()), 1e-300)  # 1e-300: all ΔW may be 0
    scaled = {}
    for task, (left, right) in updates.items():
        norm = max(norms[task], floor)
        B, A_T = pairs[task]
        scaled[task] = (left / norm).to(B.dtype), (right / norm).to(A_T.dtype)
    return scaled


def grow_layer(bases, old, new, variance, k):
    """Phase 3, ours: the bases stay, and get what the ΔW of each new adapter has outside of them.

    variance: the fraction of that to explain, for each adapter by itself. k: in its place, the size
    up to which a smaller basis grows; earlier adapters take the room first.
    """
    # 1. Add directions of each ΔW, one after the other.
    beta, alpha = bases
    for B, A_T in new.values():
        left, right = update_columns(B, A_T)
        beta = grow_basis(beta, left, variance, k)
        alpha = grow_basis(alpha, right, variance, k)
    # 2. Earlier tasks have coefficients of 0 for the added directions.
    coefficients = {}
    for task, (eps_beta, eps_alpha) in old.items():
        coefficients[task] = with_rows(eps_beta, beta), with_rows(eps_alpha, alpha)
    # 3. Project B and A^T of the new tasks. Their product becomes beta beta^T ΔW alpha alpha^T.
    #    With variance 1, beta spans the columns of ΔW and alpha its rows, so this is ΔW. B may
    #    change all the same: with B = [b1 b2] and A = [a1; 0], ΔW = b1 a1, and b2 may be lost.
    for task, pair in new.items():
        coefficients[task] = project((beta, alpha), pair)
    return (beta, alpha), coefficients


def with_rows(eps, basis):
    """Coefficients, and below them a row of zeros for each direction that the basis has gained."""
    return torch.cat([eps, eps.new_zeros(basis.shape[1] - len(eps), eps.shape[1])])


def grow_basis(basis, columns, variance, k):
    """A basis, and beside it the main directions of what columns (n, m) have outside of it.

    k: the size up to which it grows; None: by variance. No mean is subtracted.
    """
    X = columns.double()
    b = basis.double()
    # Subtract the part inside of b, twice (re-orthogonalisation): b is rounded to float32 and not
    # quite orthonormal, and the second time takes away what the first one has left.
    outside = X - b @ (b.T @ X)
    outside = outside - b @ (b.T @ outside)
    rounding = ROUNDING * X.norm()  # of X, as all that is outside may be errors of rounding
    room = None if k is None else max(0, k - basis.shape[1])
    added = main_directions(outside, rounding, variance, room)
    return torch.cat([basis, added.to(basis.dtype)], dim=1)


# --- Mixed batches
def mixed_batch(linear, tasks, x, h):
    """h + ΔW x for x (s, ..., d), with another task, or None, for each of the s samples."""
    if len(tasks) != len(x):
        raise ValueError(f"{len(tasks)} tasks are selected for a batch of {len(x)} samples")
    for task in set(tasks):
        factors = linear.share.factors(linear.layer, task)
        if factors is not None:
            B, A = factors
            rows = [i for i, name in enumerate(tasks) if name == task]
            BAx = F.linear(F.linear(x[rows].to(A.dtype), A), B)
            h[rows] = (h[rows] + BAx).to(h.dtype)
    return h


# --- Behind attach and learn
@contextlib.contextmanager
def training(share, model, task, trained):
    """For a block, the task is selected and its {layer: nn.ParameterDict} alone can train.

    Each ParameterDict is put in two places: linear.learned, a submodule, where model.to() and
    model.parameters() see it; and share.trained, where `Share.factors`, and so forward, looks.
    """
    share._check_idle()
    check_unwrapped(model)
    if not trained:
        raise ValueError(f"task {task!r} has nothing to train: no bases, or empty ones and phi = 0")
    attached = share._attached(model, needed=trained)
    learning = [linear for linear in attached if linear.layer in trained]
    selected = share.selected
    # 1. Freeze all that the model has now.
    with frozen(model):
        try:
            # 2. Add the parameters, which can train.
            for linear in learning:
                follow_weight(linear)  # so that bases and parameters are where the weight is
                beta, _ = share.bases[linear.layer]
                linear.learned = trained[linear.layer].to(beta.device)
            # 3. Have forward use them.
            share.trained = trained
            share.learning = task
            share.selected = task
            yield
        finally:
            # 4. Undo 3 and 2, and then `frozen` undoes 1.
            share.selected = selected
            share.learning = None
            share.trained = {}
            for linear in learning:
                linear._modules.pop("learned", None)  # if 2 has failed, it is not there


def moved_layers(task, start, trained):
    """{layer: {name: tensor}} of the layers in which a parameter has another value now."""
    moved = {}
    for layer, parameters in trained.items():
        end = {}
        for name, parameter in parameters.items():
            value = parameter.detach()
            if hasattr(value, "full_tensor"):  # fully_shard, called in the block, has split it
                value = value.full_tensor()  # a collective call: every process has to make it
            end[name] = value
        for name, value in end.items():
            # .to: the caller may have moved the model to another device, or cast it
            if not torch.equal(start[layer][name].to(value), value):
                moved[layer] = end
    if not moved:
        raise ValueError(f"task {task!r}: no parameter has moved; is the optimizer from the block?")
    return moved


@contextlib.contextmanager
def frozen(model):
    """For a block no parameter of a model can train. Gradients from before are dropped.

    Afterwards requires_grad is as before, and so are the buffers that state_dict() has, such as
    BatchNorm's statistics. Other buffers are caches and stay as the block has left them: a rotary
    table that has been rescaled for long inputs has its new length in a Python int.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    saved = model.state_dict().keys()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved}
    model.requires_grad_(False)
    model.zero_grad()  # an optimizer steps all parameters that have a gradient, even frozen ones
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # by name: fully_shard makes new ones
            if name in flags:
                parameter.requires_grad_(flags[name])
        for name, buffer in model.named_buffers():
            # Not one that has grown in the block, such as a table of positions.
            if name in buffers and buffer.shape == buffers[name].shape:
                # A buffer that cannot be written, such as an expanded one, is left as it is.
                with contextlib.suppress(RuntimeError):
                    buffer.copy_(buffers[name])


def no_fast_path(linear, inputs):
    """A hook that does nothing, but has to be there.

    In eval mode nn.TransformerEncoderLayer may read the weights of its nn.Linear's and not call
    them (its fast path), and ΔW would be lost. If one of them has a hook, it calls them.
    """


def follow_weight(linear):
    """Move a layer's bases and coefficients to where its weight is: model.to() does not."""
    device = linear.weight.device
    bases, coefficients, _ = linear.share.held
    beta, alpha = bases[linear.layer]
    # An offloaded weight is on "meta", except in forward: there is nothing to follow until then.
    if beta.device != device and device.type != "meta":
        moved = beta.to(device), alpha.to(device)
        by_task = coefficients[linear.layer]  # _store moves them to where the bases are
        linear.share._store({}, {linear.layer: (moved, by_task)})


# --- Refusals and files
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # ΔW can be added to these
FORMAT = "share 6"  # of the file that `Share.save` writes
WRAPPERS = ("DataParallel", "FSDPModule", "DeepSpeedEngine")  # ends of names of classes


def check_numbers(variance=1.0, **counts):
    """ValueError unless 0 < variance <= 1 and each count is None or an integer from 1 on."""
    if not hasattr(variance, "__float__") or not 0 < variance <= 1:
        raise ValueError(f"variance is {variance!r}; it takes a number above 0, up to 1")
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; it takes an integer, 1 or more")


def check_stack(stack, variance, k):
    """ValueError for an argument of `build_basis` out of range."""
    check_numbers(variance, k=k)
    is_real = not stack.is_complex() and stack.double().isfinite().all()
    if stack.dim() != 2 or stack.shape[1] == 0 or not is_real:
        raise ValueError(f"the stack {tuple(stack.shape)} is not (n, m >= 1) with finite numbers")


def check_adapter(task, adapter, bases):
    """ValueError unless each layer has finite B (n, r) and A (r, d), n and d as in its bases."""
    if not adapter.factors:
        raise ValueError(f"task {task!r}: its adapter has no layers")
    for layer, (B, A) in adapter.factors.items():
        where = f"task {task!r}, layer {layer!r}: B {tuple(B.shape)}, A {tuple(A.shape)}"
        if B.dim() != 2 or A.dim() != 2 or B.shape[1] != len(A) or len(A) == 0:
            raise ValueError(f"{where}; it takes (n, r) and (r, d)")
        beta, alpha = bases.get(layer, (B, A.T))  # a layer without bases takes any n and d
        n, d = len(beta), len(alpha)
        if len(B) != n or A.shape[1] != d:
            raise ValueError(f"{where}; the layer takes ({n}, r) and (r, {d})")
        for factor in (B, A):  # double, as isfinite knows no float8; cpu, as MPS has no float64
            if not factor.is_floating_point() or not factor.cpu().double().isfinite().all():
                raise ValueError(f"{where}; one is not of floats, or holds NaN or infinity")


def check_linear(layer, linear, cls, bases):
    """ValueError for a layer that is not just a `cls` of the bases' shape."""
    weight = linear._parameters.get("weight")  # None: pruning or the like has replaced it
    is_patched = "forward" in vars(linear)
    if type(linear) is not cls or weight is None or weight.is_meta or is_patched:
        raise ValueError(
            f"layer {layer!r} is {type(linear).__name__}; it takes {cls.__name__} itself, with its "
            "weights loaded, and without pruning or a patched forward: attach first, offload later"
        )
    shape = tuple(len(basis) for basis in bases)
    if weight.shape != shape:
        raise ValueError(f"layer {layer!r}: its weight is {tuple(weight.shape)}, not {shape}")


def check_unwrapped(model):
    """ValueError if a wrapper is in the model: it would not know what a block of `learn` adds."""
    for module in model.modules():
        for cls in type(module).__mro__:  # fully_shard makes a class of its own
            if cls.__name__.endswith(WRAPPERS):
                raise ValueError(f"the model is in {cls.__name__}: wrap it inside the block")


def checksum(tensors):
    """CRC-32 of FORMAT and of all tensors' names, types, shapes and bytes."""
    crc = zlib.crc32(FORMAT.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def write_whole(path, content):
    """A file that appears whole or not at all, whoever else writes or reads it."""
    beside = Path(f"{path}.{uuid.uuid4().hex}")  # a name that no other process has
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# --- Using it with other tools: traps, for those who use them
#
# Weights
# - state_dict() and save_pretrained() hold W0 only, whatever is selected. Save the share, too.
# - ΔW is lost where code reads a layer's weight and does not call the layer (fused losses and
#   attention blocks), or puts a new layer in its place (quantizers, resize_token_embeddings). Fold
#   the task in before: detach(model, task). It makes new Parameters: make the optimizer after it.
# - A deep copy of a model has a deep copy of the share: model.get_submodule(layer).share.
# - Apple's MPS has no float64: to build, add, merge, learn with phi > 0 or detach(model, task),
#   move the model, and so the share, to the CPU first.
# - torch.set_float32_matmul_precision("high"), on CUDA, rounds B = beta eps_beta to TF32. Reset it
#   to "highest" for reconstruct, detach(model, task) and the end of a block with phi > 0.
# - PEFT: of a live model with plain LoRA take B = lora_B.weight * layer.scaling[name] and
#   A = lora_A.weight. Attach to the model that unload() returns, not to the PeftModel.
# Selecting
# - There is one selection, for all threads. With gradient checkpointing keep it until backward has
#   run.
# - torch.compile compiles once for each selection: increase torch._dynamo.config.recompile_limit. A
#   traced or exported model keeps the selection that it was made with.
# - In a mixed batch the i-th task is that of the i-th sample as layers see it. Sort or repeat the
#   tasks as the samples: encode() of sentence-transformers and length-grouped loaders sort them,
#   beam search repeats each one for its beams. For an encoder-decoder: 1. select(tasks), 2. e =
#   encoder(…), 3. select(each task num_beams times), 4. generate(encoder_outputs=e).
# Learning
# - Make moving averages in the block of learn, too, and load the best checkpoint before it ends. To
#   keep one, copy state_dict(): a deep copy of the model would stay in the block forever.
# - fully_shard: call it in the block of learn. It replaces the parameters, so in place of the list
#   that learn has yielded train [q for q in model.parameters() if q.requires_grad]. A model that is
#   sharded already cannot take new parameters: learn refuses it. Tensor parallelism and
#   nn.DataParallel do not work.
# - A head that trains along is yours: unfreeze it in the block, copy it for each task, put it back.
# - Coefficients that are 0 on both sides, as of a layer with ΔW = 0 that was cut to p, have no
#   gradient: finetune leaves them at 0.
# - To give a learned task extras: reconstruct it, set them, remove it, add it.
# - Call eval() on BatchNorm layers: in training mode a task would adapt to the statistics of each
#   batch, and afterwards the model has its running statistics of before.
# - A layer is part of a task if its parameters have moved. So the loss has to reach it; but weight
#   decay moves them, too, where a gradient is 0 and not None, and so does a cast to half and back.
# - Learn in one thread at a time. To serve meanwhile, learn on copies, made in one call so that
#   they stay connected: model2, share2 = copy.deepcopy((model, share)). Then share.add(task,
#   share2.reconstruct(task)) or, with phi > 0, share.merge({task: …}, variance=1.0, grow=True).
# - Try phi > 0 on such a copy, too: the columns of a trial stay in the bases even after remove.
# - While one thread changes a share, others may use and save it, but not change it. The first
#   forward on another device changes it, too, as its numbers move.


# --- A toy
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
            block.update({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)})
            self.blocks.append(block)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            y = self.norm(x)
            heads = [block[name](y).unflatten(-1, (self.heads, -1)) for name in "qkv"]
            q, k, v = [head.transpose(1, 2) for head in heads]  # (batch, heads, T, width / heads)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["o"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](self.norm(x))))
        return self.head(self.norm(x))
