# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this reference implementation. Licence text: end of README.md.
"""Share: one low-rank subspace for the LoRA adapters of many tasks, a few coefficients per task.

LoRA adds ΔW = B A to a frozen weight, one pair (B, A) a task. Share finds bases beta and alpha
that the pairs of all tasks have in common, and keeps of a task only its coefficients in them:

    h = W0 x + (beta eps_beta)(alpha eps_alpha)^T x

    in the code          symbol    shape             what it is
    weight               W0        n × d             frozen; n = out_features, d = in_features
    B, A                 B, A      n × r, r × d      one task's LoRA factors, scaling folded in
    beta, alpha          β, α      n × kβ, d × kα    bases, orthonormal columns; k by layer and side
    eps_beta, eps_alpha  ε_β, ε_α  kβ × p, kα × p    one task's coefficients; p = pseudo-rank, ~1
    phi                  φ         integer           temporary columns while a task is learned

Phase 1, `Share.from_adapters`: the bases are the main directions of some adapters' stacked factors.
Phase 2, `train_coefficients`: a new task trains its eps (with phi > 0, temporary columns as well).
Phase 3, `Share.merge`: the bases take in new adapters; all coefficients follow by projection.

Where this differs from the paper (arXiv 2602.06043), and why:
 1. The mean that centring subtracts stays, as one more direction: without it no adapter comes back.
 2. A task's best rank-p coefficients are an SVD of beta^T ΔW alpha, not the first p columns of it.
 3. A merge never shrinks a basis by itself: the variance rule, applied afresh, would let the newest
    task push out the others. It works in the span of old bases and new factors: nothing is rebuilt.
 4. `stack="updates"`, `merge(grow=True)` and the Router are ours.
Absent: convolutions, embeddings, quantised weights, training on several GPUs.
"""

import contextlib
import copy
import functools
import itertools
import json
import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOISE = 1e-6  # a singular value below this part of the largest is rounding, not a direction
CRC = re.compile(rb'"crc32":"([0-9a-f]{8})"')  # in a file's header; of the file with zeros there
PEFT_VARIANTS = (  # what makes a PEFT adapter something else than W0 x + scaling B A x
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)


def _require(holds, message):
    if not holds:
        raise ValueError(message)


def _check(variance=1.0, **counts):
    _require(0 < variance <= 1, f"variance is {variance!r}; it takes a number above 0, up to 1")
    for name, value in counts.items():
        fits = value is None or (type(value) is int and value >= 1)
        _require(fits, f"{name} is {value!r}; it takes an integer, 1 or more")


def _directions(X, variance=1.0, k=None):
    """Main left singular vectors (n, q) and values (q,) of X (n, m), without those of rounding.

    They are the k heaviest, or else as many as explain the part `variance` of the squares of X.
    """
    needed = (variance - 1e-13) * X.norm() ** 2  # less what rounding may add
    count = lambda squares: k or int((squares.cumsum(0) < needed).sum()) + 1
    few, found = max(48, min(X.shape) // 20), False
    if min(X.shape) >= 8 * few:  # large: a third of the time if these are enough
        # the same start each time, and nobody's random numbers
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            U, S, _ = torch.svd_lowrank(X, few, niter=4)
        squares, q = S.square(), count(S.square())
        error = X @ (X.T @ U[:, :q]) - U[:, :q] * squares[:q]
        found = q <= few and error.norm() <= 1e-9 * squares[0]
    if not found:  # all of them, from the smaller Gram matrix: a third of the time of an SVD
        squares, U = torch.linalg.eigh(X.T @ X if len(X) > X.shape[1] else X @ X.T)
        squares, U = squares.flip(0), U.flip(1)
    q = min(count(squares), int((squares > NOISE**2 * squares[:1]).sum()))
    U = U[:, :q]  # (n, q), or from a tall X's Gram matrix (m, q), of its rows
    return U if len(U) == len(X) else torch.linalg.qr(X @ U).Q, squares[:q].sqrt()


def build_basis(stack, variance=0.6, k=None, center=True):
    """Orthonormal basis (n, k) of the main directions of the columns of `stack` (n, m) (phase 1).

    They explain the part `variance` of the variance; the paper's is 0.6. `center` subtracts the
    mean first and keeps it as one more direction, so that `variance=1.0` spans all columns, but for
    what is below 1e-6 of the heaviest direction. `k`: at most so many directions instead, the mean
    among them. A zero stack has none. ValueError: a stack without columns, or with NaN or infinity;
    `variance` or `k` out of range.
    """
    _check(variance, k=k)
    fits = stack.dim() == 2 and stack.shape[1] and stack.isfinite().all()
    _require(fits, f"the stack {tuple(stack.shape)} is not (n, m >= 1) with finite values")
    basis = _basis(stack.to(torch.float64, copy=True), variance, k, center)
    return basis.to(torch.promote_types(stack.dtype, torch.float32))


def _basis(X, variance, k, center):
    """`build_basis` in double; X (n, m) changes meanwhile, as a copy would double the memory."""
    if k is not None or not center:
        return _directions(X, variance, k)[0]
    mean = X.mean(1, keepdim=True)
    U, S = _directions(X.sub_(mean), variance)
    X += mean
    return _directions(torch.cat([U * S, mean], 1))[0]


def _best_rank(left, right, p):
    """The best rank-p fit to left (a, r) right^T (r, b), as (a, p) and (b, p)."""
    (Q1, R1), (Q2, R2) = torch.linalg.qr(left.double()), torch.linalg.qr(right.double())
    U, S, Vh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    root = S[:p].sqrt()
    none = 0, int(len(root) == 0)  # in an empty basis: one column, as rank 0 is no adapter's
    return [F.pad(Q * root, none).to(left.dtype) for Q in (Q1 @ U[:, :p], Q2 @ Vh[:p].T)]


def _by_task(sides, spans):
    """Of each side (k, m) the columns of the tasks with these spans [(first column, p)].

    As (t, k, max p), filled up with columns of zeros.
    """
    most, zeros = max((p for _, p in spans), default=0), sides[0].shape[1]
    index = [[*range(start, start + p), *[zeros] * (most - p)] for start, p in spans]
    index = torch.tensor(index, dtype=torch.long, device=sides[0].device).view(len(spans), most)
    return [F.pad(side.T, (0, 0, 0, 1))[index].mT for side in sides]


def _update_columns(left, right, spans):
    """Columns with each task's left singular vectors and values, of ΔW = left right^T at norm 1.

    With right = Q R they are left R^T: unlike left, they do not depend on how ΔW is split in two.
    """
    left, right = _by_task((left, right), spans)
    columns = left @ torch.linalg.qr(right, mode="r").R.mT
    norm = torch.linalg.matrix_norm(columns, keepdim=True)
    norm = norm.clamp_min(NOISE * norm.max() + 1e-300)  # what is only rounding must not become 1
    return (columns / norm).transpose(0, 1).flatten(1)


def _coordinates(basis, eps, factors):
    """All tasks' columns (q, m) in a frame (n, q): the basis, then what else the factors need.

    basis: (n, k). eps: (k, P), of the tasks so far. factors: [(n, r)], of new tasks. The frame is
    orthonormal, so nothing changes in it but the size. None: the layer's own axes, for no basis.
    """
    k, fresh = basis.shape[1], [factor.to(basis.device) for factor in factors]
    if k == 0:
        return None, torch.cat([F.pad(eps.double(), (0, 0, 0, len(basis))), *fresh], 1)
    fresh = torch.cat([basis.double(), *fresh], 1)
    frame = torch.cat([fresh[:, :k], torch.linalg.qr(fresh).Q[:, k:]], 1)
    columns = frame.T @ fresh[:, k:]
    columns[columns.abs() < NOISE * columns.norm(dim=0)] = 0  # rounding, of what is in the basis
    return frame, torch.cat([F.pad(eps, (0, 0, 0, len(columns) - k)), columns], 1)


def _merge(side, other, spans, new, stack, variance, k, center, grow):
    """Phase 3 for one side of a layer, phase 1 without a basis: its next basis, all coefficients.

    side, other: (basis, eps, factors) of this side and the other, as `_coordinates` takes them.
    spans: as `_by_task` takes them, of all tasks; the last `new` are new. But for `grow` it
    equals rebuilding every adapter and stacking all, at a cost that hardly grows with their number.
    """
    counted = spans[-new:] if grow else spans  # those whose columns make the next basis
    frame, columns = _coordinates(*side)
    X, k_old = columns[:, counted[0][0] :], side[0].shape[1]
    if stack == "updates":
        X = _update_columns(columns, _coordinates(*other)[1], counted)
    if grow:
        room = None if k is None else max(k - k_old, 0)
        fresh = _basis(X[k_old:], variance, k, center)[:, :room]
        small = torch.block_diag(torch.eye(k_old).to(fresh), fresh)
    else:
        small = _basis(X, variance, k, center)
        if k is None and small.shape[1] < k_old:  # at least the k_old heaviest, and where there
            spare = 10 * NOISE * float(X.norm()) or 1.0  # are fewer, more of the old basis
            X = torch.cat([X, spare * torch.eye(len(X), k_old).to(X)], 1)
            small = _directions(X, k=k_old)[0]
    basis = small if frame is None else frame @ small
    dtype = functools.reduce(torch.promote_types, [part.dtype for part in (side[0], *side[2])])
    return basis.to(dtype).contiguous(), (small.T @ columns).to(dtype)


@dataclass
class Adapter:
    """One task's LoRA adapter, ΔW = B A.

    factors: layer name -> (B (n, r), A (r, d)), every scaling folded in; r may differ by layer.
    extras: what travels with it untouched (heads, biases). config: adapter_config.json, {} if none.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    def delta(self, layer):
        """ΔW (n, d) of one layer."""
        B, A = self.factors[layer]
        return B @ A

    def energy(self):
        """‖ΔW‖², the squared Frobenius norms of all layers together, without forming any ΔW."""
        pairs = [(B.detach().double(), A.detach().double()) for B, A in self.factors.values()]
        return sum(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())) for B, A in pairs)


class UnknownTask(KeyError, ValueError):
    """A task that the share does not hold."""

    __str__ = ValueError.__str__  # KeyError's puts the message in quotes


class _Tasks(dict):
    def __missing__(self, task):
        raise UnknownTask(f"task {task!r} is unknown; the share has {list(self)}")


class Share:
    """All layers' bases and all tasks' coefficients, each kept in this one place only.

    bases: {layer: (beta, alpha)}. coefficients: {layer: (eps_beta, eps_alpha)}, with all tasks'
    columns side by side; spans: {layer: {task: (its first column, p)}}. about: {task: (‖ΔW‖² as it
    came in, extras, config)}. router: a Router to be saved along, or None.
    Methods raise ValueError for what is out of range or does not fit, UnknownTask for a task that
    is not there, and then change nothing.
    """

    def __init__(self, variance=0.6, center=True, stack="factors"):
        fits = stack in ("factors", "updates")
        _require(fits, f"stack is {stack!r}; it takes 'factors' or 'updates'")
        self.variance, self.stack, self.center = variance, stack, center and stack == "factors"
        self.bases, self.coefficients, self.spans = {}, {}, {}
        self.about, self.router = _Tasks(), None
        self.selected = None  # a task, a tuple with one per sample, or a function as `factors`

    @classmethod
    def from_adapters(cls, adapters, *, variance=0.6, k=None, center=True, stack="factors", p=None):
        """Phase 1: a share of {task: Adapter}, one or more.

        variance, k, center: see `build_basis`. stack: "factors" stacks the columns of B and the
        rows of A, as the paper does; "updates" (ours) both sides of each ΔW at norm 1, so that
        neither a task's size nor the split between B and A counts (nor a mean: never centred).
        p: pseudo-rank of the coefficients, None for each adapter's own rank.
        """
        _check(p=p)
        share = cls(variance, center, stack)
        share.merge(adapters, k=k)
        for layer in share.layers if p else ():
            pairs = share._pairs(layer).items()
            share._lay(layer, {task: _best_rank(*pair, p) for task, pair in pairs})
        return share

    tasks = property(lambda self: list(self.about), doc="The tasks' names, oldest first.")
    layers = property(lambda self: list(self.bases), doc="The layers' names.")

    def _check_new(self, task):
        fits = isinstance(task, str) and task not in self.about
        _require(fits, f"task {task!r} exists, or is no string; it takes a new name")

    def _check_adapters(self, adapters):
        """{layer: {task: (B, A^T)}} of {task: Adapter}, all of which fit."""
        _require(adapters, "adapters is empty; it takes one or more")
        shapes = {layer: (len(beta), len(alpha)) for layer, (beta, alpha) in self.bases.items()}
        layers = {}
        for task, adapter in adapters.items():
            self._check_new(task)
            _require(adapter.factors, f"task {task!r} has no LoRA factors")
            for layer, (B, A) in adapter.factors.items():
                where = f"task {task!r}, layer {layer!r}: B {tuple(B.shape)}, A {tuple(A.shape)}"
                fits = B.dim() == A.dim() == 2 and B.shape[1] == len(A) > 0
                _require(fits, f"{where} are not (n, r) and (r, d)")
                shape = shapes.setdefault(layer, (len(B), len(A.T)))
                _require(shape == (len(B), len(A.T)), f"{where} do not fit the layer, {shape}")
                fits = B.dtype == A.dtype and B.is_floating_point()
                fits = fits and B.isfinite().all() and A.isfinite().all()
                _require(fits, f"{where} are not real, or hold NaN or infinity")
                layers.setdefault(layer, {})[task] = B.detach(), A.detach().T
        return layers

    def add(self, task, adapter, p=None):
        """Project one more task onto the bases, which stay; p: pseudo-rank, None for its own rank.

        What lies outside is lost (`retained` tells how much); `merge` would take it in.
        """
        _check(p=p)
        for layer in adapter.factors.keys() - self.bases.keys():
            raise ValueError(f"task {task!r}, layer {layer!r}: no bases yet; merge() makes them")
        layers, about = self._check_adapters({task: adapter}), _about(adapter)
        for layer, new in layers.items():
            pair = [basis.T @ f.to(basis) for basis, f in zip(self.bases[layer], new[task])]
            pair = _best_rank(*pair, p) if p else pair
            self._lay(layer, self._pairs(layer) | {task: pair})
        self.about[task] = about

    @torch.no_grad()
    def merge(self, adapters, *, variance=None, k=None, grow=False):
        """Phase 3: take in {task: Adapter}; new bases and coefficients for the layers they have.

        By default the bases become the main directions of all tasks' factors, and no smaller than
        they were; earlier tasks may move. With `grow` (ours) they stay, directions of what the new
        adapters have outside are added, and earlier tasks keep their ΔW. variance: the part to
        explain, of all factors or of what is outside; None: the share's own. k: a cap instead, for
        this call; it alone, without `grow`, makes a basis smaller. `attach` again for a new layer.
        """
        variance = self.variance if variance is None else variance
        _check(variance, k=k)
        found = {}
        for layer, new in self._check_adapters(adapters).items():
            factors = [*zip(*new.values())]  # all B, all A^T
            none = [f[0].new_empty(len(f[0]), 0, dtype=torch.float32) for f in factors]
            bases = self.bases.get(layer, none)
            eps = self.coefficients.get(layer, [basis[:0] for basis in none])
            spans, end = dict(self.spans.get(layer, {})), eps[0].shape[1]
            for task, (B, _) in new.items():
                spans[task], end = (end, B.shape[1]), end + B.shape[1]
            sides = [*zip(bases, eps, factors)]
            rule = [*spans.values()], len(new), self.stack, variance, k, self.center, grow
            merged = [_merge(*pair, *rule) for pair in (sides, sides[::-1])]
            found[layer] = *zip(*merged), spans
        self.about.update({task: _about(adapter) for task, adapter in adapters.items()})
        for layer, state in found.items():
            self.bases[layer], self.coefficients[layer], self.spans[layer] = state

    def eps(self, layer, task):
        """The share's own eps_beta (kβ, p) and eps_alpha (kα, p); None where the task has none."""
        span = self.spans[layer].get(task)
        return span and [side.narrow(1, *span) for side in self.coefficients[layer]]

    def _pairs(self, layer):
        """{task: (eps_beta, eps_alpha)} of one layer."""
        return {task: self.eps(layer, task) for task in self.spans[layer]}

    def _lay(self, layer, pairs):
        """Lay {task: (eps_beta, eps_alpha)}, all there are in one layer, side by side."""
        widths = [pair[0].shape[1] for pair in pairs.values()]
        starts = itertools.accumulate([0, *widths])
        self.spans[layer] = dict(zip(pairs, zip(starts, widths)))
        none = [basis[:0].T for basis in self.bases[layer]]
        self.coefficients[layer] = [torch.cat(side, 1) for side in zip(none, *pairs.values())]

    def factors(self, layer, task):
        """beta eps_beta (n, p) and alpha eps_alpha (d, p); None where the task has none."""
        self.about[task]  # raises UnknownTask
        eps = self.eps(layer, task)  # transposed twice: a layout with faster products
        return eps and [(e.T @ basis.T).T for basis, e in zip(self.bases[layer], eps)]

    def reconstruct(self, task):
        """The Adapter that the share holds for a task, its extras and config included."""
        pairs = {layer: self.factors(layer, task) for layer in self.bases}
        factors = {layer: (pair[0], pair[1].T) for layer, pair in pairs.items() if pair}
        return Adapter(factors, *copy.deepcopy(self.about[task][1:]))

    def retained(self):
        """{task: ‖ΔW‖² as held now, as a part of what came in}, about 0 … 1, over all layers."""
        held = {task: self.reconstruct(task).energy() for task in self.tasks}
        return {t: held[t] / energy if energy else 1.0 for t, (energy, *_) in self.about.items()}

    def average(self, tasks, name, p=None):
        """A new task: the best rank-p fit to the mean of the tasks' ΔW (p None: all of it).

        Coefficients cannot be averaged one by one: (B, A) and (-B, -A) are the same ΔW.
        """
        _check(p=p)
        parts, factors = [self.reconstruct(task).factors for task in tasks], {}
        for layer in self.bases:
            if pairs := [part[layer] for part in parts if layer in part]:
                B, A = zip(*pairs)
                factors[layer] = torch.cat(B, 1) / len(parts), torch.cat(A)
        self.add(name, Adapter(factors), p or max([1, *(len(A) for _, A in factors.values())]))

    def remove(self, task):
        """Forget a task; the bases stay. If it is selected, None is then. Fit a Router anew."""
        self.about[task]  # raises UnknownTask
        del self.about[task]
        for layer in self.bases:
            others = {t: pair for t, pair in self._pairs(layer).items() if t != task}
            self._lay(layer, others)
        chosen = self.selected if isinstance(self.selected, tuple) else (self.selected,)
        self.selected = None if task in chosen else self.selected

    def num_parameters(self, task=None):
        """How many numbers are stored: for one task (coefficients, extras), or in all."""
        if task is None:
            stored = [basis for pair in self.bases.values() for basis in pair]
            stored += [self.router.means, self.router.scale] if self.router else []
            return sum(t.numel() for t in stored) + sum(map(self.num_parameters, self.tasks))
        extras = self.about[task][1].values()
        eps = [e for layer in self.bases for e in self.eps(layer, task) or ()]
        return sum(t.numel() for t in (*extras, *eps))

    def select(self, task):
        """What attached models add from now on: one task; nothing (None); or for a mixed batch a
        sequence, with one or the other for each sample along the first dimension."""
        task = task if task is None or isinstance(task, str) else tuple(task)
        for name in {*(task if isinstance(task, tuple) else [task])} - {None}:
            self.about[name]  # raises UnknownTask
        self.selected = task

    def attach(self, model):
        """Make each nn.Linear that has bases a ShareLinear, freeze all parameters; returns `model`.

        Heads and other extras are left to the caller; models with one share belong on one device,
        since bases and coefficients move along. ValueError, with nothing changed: a layer is
        missing, no plain nn.Linear (others may bypass forward), or has another shape.
        """
        linears, modules = {}, dict(model.named_modules(remove_duplicate=False))
        for layer, (beta, alpha) in self.bases.items():
            linear = modules.get(layer)
            if isinstance(linear, ShareLinear) and linear.share is self and linear.layer == layer:
                continue  # attached before
            plain = type(linear) is nn.Linear and isinstance(linear.weight, nn.Parameter)
            _require(plain, f"layer {layer!r} of the model is {linear}, no plain nn.Linear")
            shape, bases = tuple(linear.weight.shape), (len(beta), len(alpha))
            _require(shape == bases, f"layer {layer!r} is {shape}, its bases {bases}")
            _require(linear not in linears, f"layer {layer!r} has a second name in the share")
            linears[linear] = layer
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for linear, layer in linears.items():
            model.requires_grad_(False)
            linear.__class__, linear.share, linear.layer = ShareLinear, self, layer
            linear.handle = linear.register_forward_pre_hook(ShareLinear.hook)
            linear.frozen = frozen  # for detach
            linear._apply(lambda t: t)  # brings the layer's bases and coefficients to its device
        return model

    @torch.no_grad()
    def detach(self, model, task=None):
        """Make nn.Linear of them again, with a task's ΔW added to the weights if one is named."""
        layers = [m for m in model.modules() if isinstance(m, ShareLinear) and m.share is self]
        _require(layers, "the model has no layer of this share; attach(model) comes first")
        pairs = [task is not None and self.factors(m.layer, task) for m in layers]
        for m, pair in zip(layers, pairs):
            for parameter in m.frozen:
                parameter.requires_grad_(True)
            if pair:  # a new parameter: the old one may be another module's, too
                weight = (m.weight + pair[0] @ pair[1].T).to(m.weight.dtype)  # rounded once
                m.weight = nn.Parameter(weight, m.weight.requires_grad)
            m.handle.remove()
            del m.share, m.layer, m.frozen, m.handle
            m.__class__ = nn.Linear
        return model

    def save(self, path):
        """Write everything to one .safetensors file, which appears whole or not at all."""
        tensors = []
        def plain(value):  # what JSON has in the place of a Router or a tensor
            if isinstance(value, Router):
                return vars(value)
            tensors.append(value)
            return {"\0": len(tensors) - 1}
        text = json.dumps({"version": 2, **vars(self), "selected": None}, default=plain)
        raw = _serialize(dict(enumerate(tensors)), {"share": text, "crc32": "0" * 8})
        _write(path, CRC.sub(b'"crc32":"%08x"' % zlib.crc32(raw), raw, count=1))

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; ValueError for any other file, or if a single bit has changed."""
        raw = Path(path).read_bytes()
        found, zeroed = CRC.search(raw), CRC.sub(b'"crc32":"00000000"', raw, count=1)
        whole = found and int(found[1], 16) == zlib.crc32(zeroed)
        _require(whole, f"{path} is not a Share file, or is damaged")
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        tensors = safetensors.torch.load(raw)
        hook = lambda d: tensors.get(str(d.get("\0")), d)
        state = json.loads(header["share"], object_hook=hook)
        version, router, share = state.pop("version"), state["router"], cls()
        _require(version == 2, f"{path} is of version {version!r}, not 2")
        vars(share).update(state, about=_Tasks(state["about"]), router=router and Router(**router))
        return share


def _serialize(tensors, metadata):
    """A .safetensors file's bytes; safetensors.torch.save would need numpy."""
    tensors = {str(name): t.detach().cpu().contiguous() for name, t in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=str(t.dtype)[6:], shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes
        )
        for name, t in tensors.items()
    }
    return safetensors.serialize(specs, metadata)


def _write(path, content):
    """Write beside the file and move over it, so that a crash leaves the old one."""
    beside = Path(f"{path}.part")
    beside.write_bytes(content)
    beside.replace(path)


def _about(adapter):
    """What a share notes of an adapter: (‖ΔW‖², extras, config), the latter two copied."""
    extras = {name: extra.detach().clone() for name, extra in adapter.extras.items()}
    return adapter.energy(), extras, copy.deepcopy(adapter.config)


class ShareLinear(nn.Linear):
    """h = W0 x + (beta eps_beta)(alpha eps_alpha)^T x for the selected task; (..., d) -> (..., n).

    `Share.attach` makes it by changing the class of an nn.Linear, whose parameters, hooks and names
    in the state_dict stay. Bases and coefficients live in the share and move along.
    """

    def hook(self, inputs):
        """Does nothing: but with it nn.TransformerEncoderLayer takes no path around `forward`."""

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        share, layer, device = self.share, self.layer, self.weight.device
        for state in (share.bases, share.coefficients):  # but no half(): that would round
            state[layer] = [side.to(device) for side in state[layer]]
        return self

    def forward(self, x):
        out, task = super().forward(x), self.share.selected
        if task is None:
            return out
        if isinstance(task, tuple):
            return out.add_(self.mixed(x, task))  # rounds once, if out is in half precision
        pair = task(self.layer) if callable(task) else self.share.factors(self.layer, task)
        if not pair:
            return out
        left, right = pair  # formed first: a token then costs what a rank-p LoRA costs, for any k
        return out.add_(x.to(right.dtype) @ right @ left.T)

    def mixed(self, x, tasks):
        """Each sample's own update of x (b, ..., d), with one product with alpha, one with beta."""
        sizes = f"{len(tasks)} tasks are selected; the batch has {len(x)} samples"
        _require(len(x) == len(tasks), sizes)
        beta, alpha = self.share.bases[self.layer]
        spans = [self.share.spans[self.layer].get(task, (0, 0)) for task in tasks]
        left, right = _by_task(self.share.coefficients[self.layer], spans)  # (b, k, p)
        z = torch.einsum("b...k,bkp->b...p", x.to(alpha.dtype) @ alpha, right)
        return torch.einsum("b...p,bkp->b...k", z, left) @ beta.T


class LoRALinear(nn.Linear):
    """h = W0 x + B A x with W0 frozen (Hu et al. 2021): the baseline and the source of adapters."""

    def forward(self, x):
        out = super().forward(x)
        return out.add_(x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T)


def attach_lora(model, targets, r=8):
    """Make LoRALinear of each nn.Linear whose name ends in one of `targets`, freeze all else.

    Returns `model`. Raises ValueError for a target that ends no nn.Linear's name.
    """
    _check(r=r)
    linears = {f".{name}": m for name, m in model.named_modules() if type(m) is nn.Linear}
    for target in targets:
        found = any(name.endswith(f".{target}") for name in linears)
        _require(found, f"target {target!r} ends the name of no nn.Linear in the model")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if name.endswith(tuple(f".{target}" for target in targets)):
            W0 = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
            A, B = W0.new_empty(r, linear.in_features), W0.new_zeros(linear.out_features, r)
            linear.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=5**0.5))
            linear.lora_B, linear.__class__ = nn.Parameter(B), LoRALinear
    return model


def lora_adapter(model):
    """The Adapter, a copy, that a model's LoRALinear layers hold."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    return Adapter({n: (m.lora_B.detach().clone(), m.lora_A.detach().clone()) for n, m in layers})


@contextlib.contextmanager
def _restoring(share, model, extra):
    """Restores selection, buffers, requires_grad, .grad; after a failure the values of `extra`."""
    before = [(q, q.requires_grad, q.grad, q.detach().clone()) for q in extra]
    buffers, selected = [(t, t.clone()) for t in model.buffers()], share.selected
    try:
        yield
    except BaseException:  # Ctrl-C is one
        for q, _, _, value in before:
            q.data.copy_(value)
        raise
    finally:
        for q, requires_grad, grad, _ in before:
            q.requires_grad_(requires_grad).grad = grad
        for t, value in buffers:  # statistics of BatchNorm, which all tasks share
            t.copy_(value)
        share.selected = selected


def train_coefficients(
    share, model, task, batches, loss_fn, *, p=1, phi=0, lr=1e-2, sigma=0.03,
    extra_parameters=(), finetune=False, grow=False, on_step=None,
):
    """Phase 2: learn a task by coefficients alone; returns each step's loss (before any merge).

    model: `share.attach` was called on it; it stays in its mode (model.train() gives dropout).
    batches: whatever loss_fn(model, batch) -> scalar takes, each a step of Adam at rate lr. p:
    pseudo-rank. sigma: coefficients start as N(0, sigma²) on both sides; with both zero every
    gradient would be zero. phi: temporary columns, fewer than the largest basis has, trained too;
    phi > 0 ends in `Share.merge` (with `grow`: of all the residual). extra_parameters: what else to
    train, as an optimizer takes it (tensors, or groups with an lr). finetune: go on with a task
    that exists, at its p. on_step(step, loss): called after each step.

    Afterwards selection, buffers (what is changed in place), requires_grad and .grad are as before,
    and after a failure or Ctrl-C so are share and extra parameters. Raises ValueError for an
    argument out of range, a model that is not attached, no batch, or a number that becomes NaN or
    infinite.
    """
    attached = {m.layer for m in model.modules() if isinstance(m, ShareLinear) and m.share is share}
    missing = sorted(share.bases.keys() - attached)
    _require(not missing, f"layers {missing} are not attached; share.attach(model) does it")
    _check(p=p)
    largest = max((basis.shape[1] for pair in share.bases.values() for basis in pair), default=1)
    fits = phi == 0 or (type(phi) is int and 0 < phi < largest and not finetune)
    _require(fits, f"phi is {phi!r}; it takes 0, or less than {largest} unless finetune")
    _require(sigma > 0, f"sigma is {sigma!r}; it takes a number above 0")
    learned, columns, rest = {}, {}, ()  # of each layer, for each side: (k + phi, p) and (n, phi)
    for layer, bases in share.bases.items():
        learned[layer] = [sigma * torch.randn(b.shape[1] + phi, p).to(b) for b in bases]
        columns[layer] = [torch.randn(len(b), phi).to(b) / math.sqrt(len(b)) for b in bases]
    if finetune:
        rest = share.about[task][1:]
        held = {layer: share.eps(layer, task) for layer in share.bases}
        learned = {layer: [e.clone() for e in pair] for layer, pair in held.items() if pair}
    else:
        share._check_new(task)

    def factors(layer):  # as Share.factors
        sides = zip(share.bases[layer], learned.get(layer, ()), columns[layer])
        parts = [(b, new, e.split([b.shape[1], phi])) for b, e, new in sides]
        return [(e.T @ b.T + temporary.T @ new.T).T for b, new, (e, temporary) in parts]

    own = [t.requires_grad_() for ts in (*learned.values(), *columns.values()) for t in ts]
    extra = list(extra_parameters)
    copies = [dict(group) for group in extra if isinstance(group, dict)]  # Adam adds to them
    groups = copies or [{"params": extra}]
    optimizer, losses = torch.optim.Adam([{"params": own}, *groups], lr=lr), []
    trained = [q for group in optimizer.param_groups for q in group["params"]]
    with _restoring(share, model, trained[len(own) :]):
        for q in trained:
            q.requires_grad_()
        for step, batch in enumerate(batches):
            share.selected = factors  # each time: on_step may select, to look at other tasks
            loss = loss_fn(model, batch)
            _require(loss.isfinite(), f"step {step}: the loss is {loss.item()}")
            optimizer.zero_grad()
            loss.backward(inputs=trained)  # whatever else requires gradients gets none
            optimizer.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(step, losses[-1])
        _require(losses, "batches is empty; it takes one or more")
        finite = all(q.isfinite().all() for q in trained)
        _require(finite, f"step {step}: a trained number is NaN or infinite")
        with torch.no_grad():
            pairs = {layer: factors(layer) for layer in learned}
        adapter = Adapter({n: (left, right.T) for n, (left, right) in pairs.items()}, *rest)
        if phi:
            share.merge({task: adapter}, variance=1.0 if grow else None, grow=grow)
        else:
            share.about[task] = _about(adapter)
            for layer, pair in learned.items():
                share._lay(layer, share._pairs(layer) | {task: [e.detach() for e in pair]})
    return losses


def load_peft(directory):
    """The Adapter in a PEFT directory: adapter_config.json and adapter_model.safetensors.

    PEFT's scaling is folded into B: lora_alpha / r, or / √r with use_rslora. Other tensors (heads,
    biases) become extras under their names in the file; the config is kept as read. Raises
    FileNotFoundError; ValueError, which names the directory, for damage and all but plain LoRA.
    """
    directory, pairs, factors, extras = Path(directory), {}, {}, {}
    text = (directory / "adapter_config.json").read_bytes()
    raw = (directory / "adapter_model.safetensors").read_bytes()
    try:
        config, tensors = dict(json.loads(text)), safetensors.torch.load(raw)
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{directory} is damaged: {error}") from None
    names = ("peft_type", "init_lora_weights", *PEFT_VARIANTS)
    found = {name: config[name] for name in names if config.get(name)}
    start = found.get("init_lora_weights", True) in (True, "gaussian", "eva", "orthogonal")
    plain = found.get("peft_type") == "LORA" and start and found.keys().isdisjoint(PEFT_VARIANTS)
    _require(plain, f"{directory} is no plain LoRA on an unchanged model: {found}")
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        else:
            _require(".lora_" not in name, f"{directory}: {name!r} is no factor of a linear layer")
            extras[name] = tensor
    _require(pairs, f"{directory} has no LoRA weights")
    for layer, pair in pairs.items():
        shapes = {side: tuple(tensor.shape) for side, tensor in pair.items()}
        B, A = (pair.get(side, torch.empty(0)) for side in "BA")
        fits = B.dim() == A.dim() == 2 and B.shape[1] == len(A) > 0
        _require(fits, f"{directory}, layer {layer!r}: {shapes} are not A (r, d) and B (n, r)")
        try:
            patterns = (config.get("alpha_pattern") or {}).items()  # PEFT takes the first to match
            matching = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", layer))
            scale = next(matching, config.get("lora_alpha", 8))
            scale /= math.sqrt(len(A)) if config.get("use_rslora") else len(A)
        except (AttributeError, TypeError, re.error) as error:
            raise ValueError(f"{directory}, layer {layer!r}: no scaling, {error}") from None
        dtype = torch.promote_types(A.dtype, torch.float32)
        factors[layer] = B.to(dtype) * scale, A.to(dtype)
    return Adapter(factors, extras, config)


def save_peft(adapter, directory):
    """Write an Adapter as a directory for PEFT and what serves PEFT adapters.

    Its config is kept, but for how ΔW is scaled; without one, target_modules are its layers.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ranks = {f"^{re.escape(layer)}": len(A) for layer, (_, A) in adapter.factors.items()}
    r = max(ranks.values())
    config = {"target_modules": list(adapter.factors), **adapter.config, "peft_type": "LORA"}
    config |= {"r": r, "lora_alpha": r, "use_rslora": False}
    config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    tensors = dict(adapter.extras)
    for layer, pair in adapter.factors.items():
        tensors |= {f"base_model.model.{layer}.lora_{s}.weight": t for s, t in zip("BA", pair)}
    _write(directory / "adapter_model.safetensors", _serialize(tensors, {"format": "pt"}))
    _write(directory / "adapter_config.json", json.dumps(config, indent=2).encode())


@dataclass
class Router:
    """Picks the task when nobody names it: the nearest class mean, the base when none is near.

    Distances are Mahalanobis': features (N, f) @ scale (f, f) are uncorrelated and of variance 1
    within a task. means: (t, f), scaled, in the order of tasks; radius: how far is near. Kept as
    `share.router` it is saved along. (Ours; the paper takes the task as known.)
    """

    tasks: list[str]
    means: Tensor
    scale: Tensor
    radius: float

    @classmethod
    def fit(cls, features):
        """From {task: features (N, f)}, of which none is kept; better many more than f in all.

        Near is half-way between where 98 % are to their own mean and where 2 % are to another
        task's; the former alone where these overlap or there is one task.
        """
        for task, x in features.items():
            fits = x.dim() == 2 and len(x) > 1 and x.isfinite().all()
            _require(fits, f"task {task!r}: features {tuple(x.shape)} are not finite (N >= 2, f)")
        own = [(x - x.mean(0)) * (len(x) / (len(x) - 1)) for x in features.values()]
        own = torch.cat(own).double()  # of each sample, from the mean of the others of its task
        covariance = own.T @ own / len(own)
        spread = covariance.diagonal().clamp_min(NOISE * covariance.max() + 1e-30)
        covariance = covariance.lerp(spread.diag(), 0.1)  # or directions seen by few look certain
        scale = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
        means = torch.stack([x.double().mean(0) @ scale for x in features.values()])
        radius = torch.quantile((own @ scale).norm(dim=1), 0.98)
        if len(features) > 1:
            x = torch.cat([*features.values()]).double() @ scale
            second = torch.cdist(x, means).sort(1).values[:, 1]  # the nearest, but for its own
            radius = torch.maximum(radius, (radius + torch.quantile(second, 0.02)) / 2)
        return cls(list(features), means, scale, float(radius))

    def route(self, features):
        """features (N, f) -> for each sample its task or None, as `Share.select` takes them."""
        widths = f"features of {features.shape[-1]} numbers; the router takes {len(self.scale)}"
        _require(features.shape[1:] == self.scale.shape[1:], widths)
        distances, nearest = torch.cdist(features.to(self.scale) @ self.scale, self.means).min(1)
        return [self.tasks[i] if d <= self.radius else None for d, i in zip(distances, nearest)]


class ToyTransformer(nn.Module):
    """A causal transformer: tokens (batch, T <= length) -> logits (batch, T, vocabulary)."""

    def __init__(self, vocabulary=64, width=64, depth=2, heads=4, length=16):
        super().__init__()
        sizes = dict.fromkeys("qkvo", (width, width))
        sizes |= {"up": (width, 4 * width), "down": (4 * width, width)}
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        block = lambda: nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.heads, self.head = heads, nn.Linear(width, vocabulary)

    def hidden(self, tokens):
        """What the head sees, (batch, T, width): features for a Router, averaged over T."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            y = F.layer_norm(x, x.shape[-1:])
            qkv = (block[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
            y = F.scaled_dot_product_attention(*qkv, is_causal=True)  # (batch, heads, T, head size)
            x = x + block["o"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](F.layer_norm(x, x.shape[-1:]))))
        return F.layer_norm(x, x.shape[-1:])

    def forward(self, tokens):
        return self.head(self.hidden(tokens))
