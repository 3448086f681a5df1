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
    task push out the others. Directions that no task uses any more stay for the tasks to come.
 4. A merge works in the span of old bases and new factors: the same result, nothing rebuilt.
 5. `stack="updates"` and `merge(grow=True)` are ours.
Absent: convolutions, embeddings, quantised weights, training on several GPUs.
"""

import copy
import json
import math
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOISE = 1e-6  # a singular value below this part of the largest is rounding, not a direction
CRC = re.compile(rb'"crc32":"([0-9a-f]{8})"')  # in a file's header; of the file with zeros there


def _check(variance=1.0, **counts):
    if not 0 < variance <= 1:
        raise ValueError(f"variance is {variance!r}; it takes a number above 0, up to 1")
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; it takes an integer, 1 or more")


def _directions(X, scale=None):
    """Left singular vectors (n, q), values (q,) of X (n, m), without those below NOISE * scale."""
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    q = int((S > NOISE * (S[:1].sum() if scale is None else scale)).sum())
    return U[:, :q], S[:q]


def build_basis(stack, variance=0.6, k=None, center=True):
    """Orthonormal basis (n, k) of the main directions of the columns of `stack` (n, m) (phase 1).

    Without `k`: as many directions as explain the part `variance` of the variance (0.6 is the
    paper's); with it, k at most. `center` subtracts the mean first and keeps it as one more, so
    that `variance=1.0` spans all columns down to NOISE. A zero stack has no direction. ValueError:
    a stack without columns, or with NaN or infinity; `variance` or `k` out of range.
    """
    _check(variance, k=k)
    if stack.dim() != 2 or not stack.shape[1] or not stack.isfinite().all():
        raise ValueError(f"the stack {tuple(stack.shape)} is not (n, m >= 1) with finite values")
    X = stack.double()
    mean = X.mean(1, keepdim=True) * center
    U, S = _directions(X - mean)
    explained = S.square().cumsum(0)
    needed = (variance - 1e-13) * explained[-1:]  # less what rounding may add
    count = int((explained < needed).sum()) + 1 if k is None else k
    U, S = U[:, :count], S[:count]
    if center:  # m columns have the mean in common, so it weighs sqrt(m); k keeps the heaviest
        U, S = _directions(torch.cat([U * S, mean * math.sqrt(X.shape[1])], 1))
    return U[:, :k].to(torch.promote_types(stack.dtype, torch.float32))


def _best_rank(left, right, p=None):
    """The best rank-p fit to left (a, r) right^T (r, b), as (a, p) and (b, p); None: all of it."""
    (Q1, R1), (Q2, R2) = torch.linalg.qr(left.double()), torch.linalg.qr(right.double())
    U, S, Vh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    root = S[:p].sqrt()
    return (Q1 @ U[:, :p] * root).to(left.dtype), (Q2 @ Vh[:p].T * root).to(right.dtype)


def _extend(basis, eps, new):
    """A frame (n, q), `basis` (n, k) then what `new` (n, m) has outside, and coordinates in it.

    These, (q, s + m), are of `eps` (k, s) and `new`. With no basis the frame is None: identity.
    """
    basis, eps, new = basis.double(), eps.double(), new.double()
    if not len(eps):
        return None, torch.cat([new.new_zeros(len(new), eps.shape[1]), new], 1)
    residual = new - basis @ (basis.T @ new)
    residual = residual - basis @ (basis.T @ residual)  # what rounding of the basis had left inside
    frame = torch.cat([basis, _directions(residual, scale=new.norm())[0]], 1)
    return frame, torch.cat([F.pad(eps, (0, 0, 0, frame.shape[1] - len(eps))), frame.T @ new], 1)


def _update_columns(left, right, ranks):
    """Columns with the left singular vectors and values of each task's ΔW = left right^T / ‖ΔW‖.

    With right = Q R they are left R^T: unlike left, they do not depend on how ΔW is split in two.
    """
    left, right = (
        nn.utils.rnn.pad_sequence([part.T for part in side.split(ranks, 1)], batch_first=True).mT
        for side in (left, right)
    )  # (t, n, p) and (t, d, p), the narrower ones filled up with columns of zeros
    columns = left @ torch.linalg.qr(right, mode="r").R.mT
    norm = torch.linalg.matrix_norm(columns, keepdim=True)
    norm = norm.clamp_min(NOISE * norm.max() + 1e-300)  # what is only rounding must not become 1
    return (columns / norm).transpose(0, 1).flatten(1)


def _choose(columns, k_old, variance, k, center, grow):
    """Phase 3's basis (q, k) of `columns` (q, m), in a frame whose first k_old are the old basis.

    By the variance rule; at least the k_old heaviest; where there are fewer, more of the old basis.
    """
    if grow:
        added = build_basis(columns[k_old:], variance, k, center)
        added = added if k is None else added[:, : max(k - k_old, 0)]
        return torch.block_diag(torch.eye(k_old).to(added), added)
    basis = build_basis(columns, variance, k, center)
    if k is None and basis.shape[1] < k_old:
        basis = build_basis(columns, k=k_old, center=center)
        old = torch.eye(len(columns), k_old).to(basis)
        unused, _ = _directions(old - basis @ (basis.T @ old))
        basis = torch.cat([basis, unused[:, : k_old - basis.shape[1]]], 1)
    return basis


def _merge(bases, old, new, variance, k, center, stack, grow):
    """Phase 3 for one layer, phase 1 where the bases are empty: next bases, all coefficients.

    bases: (beta, alpha). old: {task: (eps_beta, eps_alpha)}. new: {task: (B, A^T)}. All happens in
    the frames of `_extend`. They are orthonormal, so the result is that of the reconstructed
    adapters, at a cost that hardly depends on how many there are.
    """
    ranks = [pair[0].shape[1] for pair in (*old.values(), *new.values())]
    seen = sum(ranks[: len(old)]) if grow else 0  # columns that do not count for the next bases
    parts, stacks, dtype = [], [], torch.promote_types(bases[0].dtype, torch.float32)
    for side, basis in enumerate(bases):
        before = torch.cat([basis[:0].T, *(pair[side] for pair in old.values())], 1)
        added = torch.cat([pair[side].to(basis.device) for pair in new.values()], 1)
        frame, coordinates = _extend(basis, before, added)
        parts.append((basis.shape[1], frame, coordinates))
        stacks.append(coordinates[:, seen:])
        dtype = torch.promote_types(dtype, added.dtype)
    if stack == "updates":  # its columns have no sign or order, so their mean says nothing
        some = ranks[len(old) :] if grow else ranks
        center, stacks = False, [_update_columns(*s, some) for s in (stacks, stacks[::-1])]
    merged, eps = [], []
    for (k_old, frame, coordinates), columns in zip(parts, stacks):
        small = _choose(columns, k_old, variance, k, center, grow)
        merged.append((small if frame is None else frame @ small).to(dtype))
        eps.append((small.T @ coordinates).to(dtype).split(ranks, 1))
    return tuple(merged), dict(zip((*old, *new), zip(*eps)))


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

    bases: {layer: (beta, alpha)}. coefficients: {task: {layer: (eps_beta, eps_alpha)}}. about:
    {task: (‖ΔW‖² as it came in, extras, config)}. Methods raise ValueError for what is out of range
    or does not fit, UnknownTask for a task that is not there, and then change nothing.
    """

    def __init__(self, variance=0.6, center=True, stack="factors"):
        if stack not in ("factors", "updates"):
            raise ValueError(f"stack is {stack!r}; it takes 'factors' or 'updates'")
        self.variance, self.center, self.stack = variance, center, stack
        self.bases, self.coefficients, self.about = {}, _Tasks(), {}
        self.selected = None  # a task's name; while one is learned, layer -> its factors so far

    @classmethod
    def from_adapters(cls, adapters, *, variance=0.6, k=None, center=True, stack="factors", p=None):
        """Phase 1: a share of {task: Adapter}, one or more.

        variance, k, center: see `build_basis`. stack: "factors" stacks the columns of B and the
        rows of A, as the paper does; "updates" (ours) both sides of each ΔW at norm 1, so that
        neither a task's size nor the split between B and A counts; it is never centred.
        p: pseudo-rank of the coefficients, None for each adapter's own rank.
        """
        _check(p=p)
        share = cls(variance, center, stack)
        share.merge(adapters, k=k)  # nothing is there yet, so this is phase 1
        for eps in share.coefficients.values() if p else ():
            eps |= {layer: _best_rank(*pair, p) for layer, pair in eps.items()}
        return share

    tasks = property(lambda self: list(self.coefficients), doc="The tasks' names, oldest first.")
    layers = property(lambda self: list(self.bases), doc="The layers' names.")

    def _check_new(self, task):
        if not isinstance(task, str) or task in self.coefficients:
            raise ValueError(f"task {task!r} exists, or is no string; it takes a new name")

    def _check_fit(self, adapters):
        """Refuse what of {task: Adapter} the share cannot take in."""
        if not adapters:
            raise ValueError("adapters is empty; it takes one or more")
        shapes = {layer: (len(beta), len(alpha)) for layer, (beta, alpha) in self.bases.items()}
        for task, adapter in adapters.items():
            self._check_new(task)
            if not adapter.factors:
                raise ValueError(f"task {task!r} has no LoRA factors")
            for layer, (B, A) in adapter.factors.items():
                where = f"task {task!r}, layer {layer!r}: B {tuple(B.shape)}, A {tuple(A.shape)}"
                if B.dim() != 2 or A.dim() != 2 or B.shape[1] != len(A) or not len(A):
                    raise ValueError(f"{where} are not (n, r) and (r, d)")
                if shapes.setdefault(layer, (len(B), len(A.T))) != (len(B), len(A.T)):
                    raise ValueError(f"{where} do not fit the layer, which is {shapes[layer]}")
                if not all(t.is_floating_point() and t.isfinite().all() for t in (B, A)):
                    raise ValueError(f"{where} are not real numbers, or hold NaN or infinity")

    @torch.no_grad()
    def add(self, task, adapter, p=None):
        """Project one more task onto the bases, which stay; p: pseudo-rank, None for its own rank.

        What lies outside the bases is lost (`retained` tells how much); `merge` would take it in.
        """
        _check(p=p)
        self._check_fit({task: adapter})
        for layer in adapter.factors.keys() - self.bases.keys():
            raise ValueError(f"task {task!r}, layer {layer!r}: no bases yet; merge() makes them")
        eps, about = {}, _about(adapter)
        for layer, (B, A) in adapter.factors.items():
            beta, alpha = self.bases[layer]
            pair = beta.T @ B.to(beta), alpha.T @ A.T.to(alpha)
            eps[layer] = pair if p is None else _best_rank(*pair, p)
        self.coefficients[task], self.about[task] = eps, about

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
        self._check_fit(adapters)
        bases, eps = dict(self.bases), {t: dict(pairs) for t, pairs in self.coefficients.items()}
        eps |= {task: {} for task in adapters}
        for layer in dict.fromkeys(layer for a in adapters.values() for layer in a.factors):
            pairs = {t: a.factors[layer] for t, a in adapters.items() if layer in a.factors}
            new = {task: (B, A.T) for task, (B, A) in pairs.items()}
            old = {task: pairs[layer] for task, pairs in eps.items() if layer in pairs}
            before = bases.get(layer) or tuple(side[:, :0] for side in [*new.values()][0])
            settings = variance, k, self.center, self.stack, grow
            bases[layer], merged = _merge(before, old, new, *settings)
            for task, pair in merged.items():
                eps[task][layer] = pair
        about = self.about | {task: _about(adapter) for task, adapter in adapters.items()}
        self.bases, self.coefficients, self.about = bases, _Tasks(eps), about

    def factors(self, layer, task):
        """beta eps_beta (n, p) and alpha eps_alpha (d, p); None where the task has none."""
        (beta, alpha), eps = self.bases[layer], self.coefficients[task].get(layer)
        return eps and (beta @ eps[0], alpha @ eps[1])

    def move(self, layer, device):
        """Move one layer's bases and coefficients to a device."""
        self.bases[layer] = tuple(basis.to(device) for basis in self.bases[layer])
        for eps in self.coefficients.values():
            if layer in eps:
                eps[layer] = tuple(e.to(device) for e in eps[layer])

    def reconstruct(self, task):
        """The Adapter that the share holds for a task, its extras and config included."""
        pairs = {layer: self.factors(layer, task) for layer in self.coefficients[task]}
        factors = {layer: (left, right.T) for layer, (left, right) in pairs.items()}
        return Adapter(factors, *copy.deepcopy(self.about[task][1:]))

    def retained(self):
        """{task: ‖ΔW‖² as held now, as a part of what came in}, about 0 … 1, over all layers."""
        held = {task: self.reconstruct(task).energy() for task in self.tasks}
        return {t: held[t] / energy if energy else 1.0 for t, (energy, *_) in self.about.items()}

    def remove(self, task):
        """Forget a task; the bases stay. If it is selected, None is then."""
        self.coefficients[task]  # raises UnknownTask
        del self.coefficients[task], self.about[task]
        self.selected = None if self.selected == task else self.selected

    def num_parameters(self, task=None):
        """How many numbers are stored: for one task (coefficients, extras), or in all."""
        if task is None:
            bases = sum(basis.numel() for pair in self.bases.values() for basis in pair)
            return bases + sum(map(self.num_parameters, self.tasks))
        eps = [e for pair in self.coefficients[task].values() for e in pair]
        return sum(t.numel() for t in (*eps, *self.about[task][1].values()))

    def select(self, task):
        """What attached models add from now on: this task, or for None nothing."""
        if task is not None:
            self.coefficients[task]  # raises UnknownTask
        self.selected = task

    def attach(self, model):
        """Put a ShareLinear where the share has a layer, freeze all parameters; returns `model`.

        Heads and other extras are left to the caller. ValueError, with nothing changed: a layer is
        missing, is not a plain nn.Linear (others may bypass forward), or has another shape.
        """
        linears = {}  # {place in the model: its layer's name, its nn.Linear}
        for layer, (beta, alpha) in self.bases.items():
            path, _, leaf = layer.rpartition(".")
            try:
                place = model.get_submodule(path), leaf
                linear = getattr(*place)
            except AttributeError:
                raise ValueError(f"layer {layer!r} is not in the model") from None
            if isinstance(linear, ShareLinear) and (linear.share, linear.layer) == (self, layer):
                continue  # attached before
            if type(linear) is not nn.Linear or not isinstance(linear.weight, nn.Parameter):
                raise ValueError(f"layer {layer!r} is {type(linear).__name__}, no plain nn.Linear")
            if (shape := tuple(linear.weight.shape)) != (len(beta), len(alpha)):
                raise ValueError(f"layer {layer!r} is {shape}, its bases {len(beta), len(alpha)}")
            if place in linears:
                raise ValueError(f"layer {layer!r} is in the share under a second name, too")
            linears[place] = layer, linear
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for (parent, leaf), (layer, linear) in linears.items():
            model.requires_grad_(False)
            setattr(parent, leaf, ShareLinear(linear, self, layer, frozen))
        return model

    def detach(self, model, task=None):
        """Put the nn.Linear back as they were, or copies with a task folded in; returns `model`."""
        layers = {n: m for n, m in model.named_modules() if isinstance(m, ShareLinear)}
        layers = {name: m for name, m in layers.items() if m.share is self}
        if not layers:
            raise ValueError("the model has no layer of this share; attach(model) comes first")
        if task is not None:
            self.coefficients[task]  # raises UnknownTask
        for name, m in layers.items():
            for parameter in m.frozen:
                parameter.requires_grad_(True)
            model.set_submodule(name, m.linear(task))
        return model

    def save(self, path):
        """Write everything to one .safetensors file, which appears whole or not at all."""
        tensors, path = [], Path(path)
        def number(tensor):  # what JSON has in a tensor's place
            tensors.append(tensor.detach().cpu().contiguous())
            return {"tensor": len(tensors) - 1}
        about = {t: (e, x, json.dumps(config)) for t, (e, x, config) in self.about.items()}
        state = {"version": 1, "rule": (self.variance, self.center, self.stack), "about": about}
        state |= {"bases": self.bases, "coefficients": self.coefficients}
        text = json.dumps(state, default=number)
        specs = {  # safetensors.torch.save would need numpy
            str(i): safetensors.TensorSpec(
                dtype=str(t.dtype)[6:], shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes
            )
            for i, t in enumerate(tensors)
        }
        raw = safetensors.serialize(specs, {"share": text, "crc32": "0" * 8})
        beside = path.with_name(path.name + ".part")
        beside.write_bytes(CRC.sub(b'"crc32":"%08x"' % zlib.crc32(raw), raw, count=1))
        beside.replace(path)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; ValueError for any other file, or if a single bit has changed."""
        raw = Path(path).read_bytes()
        found, zeroed = CRC.search(raw), CRC.sub(b'"crc32":"00000000"', raw, count=1)
        if not found or int(found[1], 16) != zlib.crc32(zeroed):
            raise ValueError(f"{path} is not a Share file, or is damaged")
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        tensors = safetensors.torch.load(raw)
        state = json.loads(
            header["__metadata__"]["share"],
            object_hook=lambda d: tensors[str(n)] if isinstance(n := d.get("tensor"), int) else d,
        )
        if state["version"] != 1:
            raise ValueError(f"{path} has version {state['version']!r}; this code reads version 1")
        share = cls(*state["rule"])
        share.bases.update(state["bases"])
        share.coefficients.update(state["coefficients"])
        for task, (energy, extras, config) in state["about"].items():
            share.about[task] = energy, extras, json.loads(config)
        return share


def _about(adapter):
    """What a share notes of an adapter: (‖ΔW‖², extras, config), the latter two copied."""
    extras = {name: extra.detach().clone() for name, extra in adapter.extras.items()}
    return adapter.energy(), extras, copy.deepcopy(adapter.config)


def _hook(*_):
    """With a hook on a layer, nn.TransformerEncoderLayer calls it instead of taking a fast path."""


class ShareLinear(nn.Module):
    """h = W0 x + (beta eps_beta)(alpha eps_alpha)^T x for the selected task; (..., d) -> (..., n).

    The brackets are formed first: each token then costs what a rank-p LoRA costs, whatever k is.
    The state_dict is the nn.Linear's; bases and coefficients live in the share and move along.
    """

    def __init__(self, base, share, layer, frozen=()):
        super().__init__()
        self.weight, self.bias, self.base = base.weight, base.bias, [base]  # a list: no submodule
        self.in_features, self.out_features = base.in_features, base.out_features
        self.share, self.layer, self.frozen = share, layer, frozen  # frozen: thawed by detach
        self.register_forward_pre_hook(_hook)
        self._apply(lambda t: t)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.share.move(self.layer, self.weight.device)  # but no model.half(): that would round
        return self

    def forward(self, x):
        out, task = F.linear(x, self.weight, self.bias), self.share.selected
        if task is None:
            return out
        pair = task(self.layer) if callable(task) else self.share.factors(self.layer, task)
        if pair is None:
            return out
        left, right = pair
        return out + (x.to(right.dtype) @ right @ left.T).to(out.dtype)

    def linear(self, task=None):
        """The nn.Linear as it was, or a copy with the task's ΔW folded in, rounded once."""
        linear = self.base[0]
        linear.weight, linear.bias = self.weight, self.bias
        pair = None if task is None else self.share.factors(self.layer, task)
        if pair is not None:
            linear = copy.deepcopy(linear)
            linear.weight.data = (self.weight + pair[0] @ pair[1].T).detach().to(self.weight.dtype)
        return linear


class LoRALinear(nn.Module):
    """h = W0 x + B A x with W0 frozen (Hu et al. 2021): the baseline and the source of adapters."""

    def __init__(self, base, r=8):
        super().__init__()
        (n, d), dtype = base.weight.shape, torch.promote_types(base.weight.dtype, torch.float32)
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(r, d, dtype=dtype, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(n, r, dtype=dtype, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        out = self.base(x)
        return out + (x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T).to(out.dtype)


def attach_lora(model, targets, r=8):
    """Put a LoRALinear where an nn.Linear's name ends in one of `targets`, freeze all else.

    Returns `model`. Raises ValueError for a target that ends no nn.Linear's name.
    """
    _check(r=r)
    modules = model.named_modules(remove_duplicate=False)
    linears = {name: m for name, m in modules if name and type(m) is nn.Linear}
    found = {t: [name for name in linears if f".{name}".endswith(f".{t}")] for t in targets}
    for target, names in found.items():
        if not names:
            raise ValueError(f"target {target!r} ends the name of no nn.Linear in the model")
    model.requires_grad_(False)
    for name in {name: None for names in found.values() for name in names}:
        model.set_submodule(name, LoRALinear(linears[name], r))
    return model


def lora_adapter(model):
    """The Adapter, a copy, that a model's LoRALinear layers hold."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    return Adapter({n: (m.lora_B.detach().clone(), m.lora_A.detach().clone()) for n, m in layers})


@contextmanager
def _training(share, model, extra):
    """Training mode, gradients for `extra` alone; then all as before, if it fails `extra`, too."""
    held = [(m._buffers, name, t) for m in model.modules() for name, t in m._buffers.items()]
    buffers = [(where, name, t, t.clone()) for where, name, t in held if t is not None]
    values = [(t, t.detach().clone()) for t in extra]
    flags = [(q, q.requires_grad, q.grad) for q in {*model.parameters(), *extra}]
    modes, selected = [(m, m.training) for m in model.modules()], share.selected
    try:
        model.train()
        for q, _, _ in flags:
            q.requires_grad_(any(q is e for e in extra)).grad = None
        yield
    except BaseException:
        with torch.no_grad():
            for t, before in values:
                t.copy_(before)
        raise
    finally:
        for where, name, t, before in buffers:
            where[name] = t.copy_(before)
        for q, requires_grad, grad in flags:
            q.requires_grad_(requires_grad).grad = grad
        for m, mode in modes:
            m.training = mode
        share.selected = selected if selected in share.coefficients else None


def train_coefficients(
    share, model, task, batches, loss_fn, *, p=1, phi=0, lr=1e-2, sigma=0.03,
    extra_parameters=(), finetune=False, grow=False, on_step=None,
):
    """Phase 2: learn a task by coefficients alone; returns each step's loss (before any merge).

    model: `share.attach` was called on it. batches: whatever loss_fn(model, batch) -> scalar takes,
    each a step of Adam at rate lr. p: pseudo-rank. The coefficients start as N(0, sigma²) on both
    sides: with both zero every gradient would be zero. phi: temporary columns, trained too, fewer
    than the largest basis has; phi > 0 ends in `Share.merge` (with `grow`: all of the residual).
    extra_parameters: what else to train, as an optimizer takes it (tensors, or groups with an lr).
    finetune: go on with a task that exists, at its p. on_step(step, loss): called after each step.

    Afterwards selection, modes, buffers, requires_grad and .grad are as before, and so, after a
    failure or Ctrl-C, are share and extra parameters. Raises ValueError for an argument out of
    range, a model that is not attached, no batch, or a loss that is NaN or infinite.
    """
    attached = {m.layer for m in model.modules() if isinstance(m, ShareLinear) and m.share is share}
    if missing := share.bases.keys() - attached:
        raise ValueError(f"layers {sorted(missing)} are not attached; share.attach(model) does it")
    _check(p=p)
    largest = max(basis.shape[1] for pair in share.bases.values() for basis in pair)
    if type(phi) is not int or not 0 <= phi < max(largest, 1) or (phi and finetune):
        raise ValueError(f"phi is {phi!r}; it takes 0, or less than {largest} unless finetune")
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma!r}; it takes a number above 0")
    learned, columns, rest = {}, {}, ()
    for layer, bases in share.bases.items():  # for each side (k + phi, p) and (n, phi)
        learned[layer] = [sigma * torch.randn(b.shape[1] + phi, p).to(b) for b in bases]
        columns[layer] = [torch.randn(len(b), phi).to(b) / math.sqrt(len(b)) for b in bases]
    if finetune:
        learned = {n: [e.clone() for e in pair] for n, pair in share.coefficients[task].items()}
        rest = share.about[task][1:]
    else:
        share._check_new(task)

    def factors(layer):  # as Share.factors: (n, p) and (d, p), or None
        sides = zip(share.bases[layer], learned.get(layer, ()), columns[layer])
        if phi:
            return [b @ eps[:-phi] + new @ eps[-phi:] for b, eps, new in sides]
        return [b @ eps for b, eps, _ in sides] or None

    extra = list(extra_parameters)
    groups = extra if extra and isinstance(extra[0], dict) else [{"params": extra}]
    own = [t.requires_grad_() for ts in (*learned.values(), *columns.values()) for t in ts]
    optimizer, losses = torch.optim.Adam([{"params": own}, *groups], lr=lr), []
    extra = [q for group in optimizer.param_groups[1:] for q in group["params"]]
    with _training(share, model, extra):
        for step, batch in enumerate(batches):
            share.selected = factors  # each time: on_step may select, to look at other tasks
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            if not loss.isfinite():
                raise ValueError(f"step {step}: the loss is {loss.item()}")
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(step, losses[-1])
        if not losses:
            raise ValueError("batches is empty; it takes one or more")
        if not all(t.isfinite().all() for t in (*own, *extra)):
            raise ValueError(f"step {step}: a trained number is NaN or infinite")
        with torch.no_grad():
            pairs = {layer: factors(layer) for layer in learned}
        pairs = {layer: (left, right.T) for layer, (left, right) in pairs.items()}
        adapter = Adapter(pairs, *rest)
        if phi:
            share.merge({task: adapter}, variance=1.0 if grow else None, grow=grow)
        else:
            eps = {layer: tuple(e.detach() for e in pair) for layer, pair in learned.items()}
            share.coefficients[task], share.about[task] = eps, _about(adapter)
    return losses


class ToyTransformer(nn.Module):
    """A causal transformer: tokens (batch, T <= length) -> logits (batch, T, vocabulary)."""

    def __init__(self, vocabulary=64, width=64, depth=2, heads=4, length=16):
        super().__init__()
        sizes = dict.fromkeys("qkvo", (width, width))
        sizes |= {"up": (width, 4 * width), "down": (4 * width, width)}
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
            for _ in range(depth)
        )
        self.heads, self.head = heads, nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            y = F.layer_norm(x, x.shape[-1:])
            qkv = (block[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
            y = F.scaled_dot_product_attention(*qkv, is_causal=True)  # (batch, heads, T, head size)
            x = x + block["o"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](F.layer_norm(x, x.shape[-1:]))))
        return self.head(F.layer_norm(x, x.shape[-1:]))
