"""Read this as the specification of Share: each test states one law and checks it.

It begins with the paper: a small complete Share, slow and on dense matrices, and the laws of its
three phases, against which share.py is held. Then come using it with a model, any training loop,
the file, refusals, and train.py. Equality is claimed in float64. What needs the real PEFT,
transformers or accelerate has "real" in its name.
"""

import contextlib
import copy
import functools
import itertools
import json
import os
import re
import sys
import textwrap
import warnings
from collections import OrderedDict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import share as module
import train
from share import Adapter, Share, ShareLinear, build_basis, train_coefficients
from train import Router, attach_lora, average, load_peft, lora_adapter, save_peft


# --- The paper, slow and plain
class SlowShare:
    """A complete Share on dense matrices, in which nothing is clever. stack: "factors", or ours."""

    def __init__(self, variance, stack="factors"):
        self.variance = variance
        self.stack = stack
        self.bases = {}  # layer: [beta, alpha]
        self.factors = {}  # layer: {task: (B, A)}, B = beta eps_beta and A = (alpha eps_alpha)^T

    def merge(self, adapters):
        """Phase 3, and phase 1 for a layer that no task has had."""
        for layer in {layer for adapter in adapters.values() for layer in adapter.factors}:
            # 1. Rebuild the old factors. 2. Put the new ones beside them.
            pairs = dict(self.factors.get(layer, {}))
            for task, adapter in adapters.items():
                if layer in adapter.factors:
                    pairs[task] = adapter.factors[layer]
            left, right = slow_stacks(pairs, self.stack)
            # 3. Take the main directions: beta of the B's, alpha of the A^T's.
            beta = self.new_basis(left, self.bases.get(layer, [None, None])[0])
            alpha = self.new_basis(right, self.bases.get(layer, [None, None])[1])
            # 4. Project every task: eps_beta = (beta^T beta)^-1 beta^T B, and likewise for alpha.
            for task, (B, A) in pairs.items():
                eps_beta = torch.linalg.inv(beta.T @ beta) @ beta.T @ B
                eps_alpha = torch.linalg.inv(alpha.T @ alpha) @ alpha.T @ A.T
                pairs[task] = beta @ eps_beta, (alpha @ eps_alpha).T
            self.bases[layer] = [beta, alpha]
            self.factors[layer] = pairs

    def new_basis(self, stack, old_basis):
        build = slow_basis if self.stack == "factors" else slow_directions
        basis = build(stack, self.variance)
        if old_basis is not None and basis.shape[1] < old_basis.shape[1]:  # ours: it keeps its size
            return torch.linalg.svd(stack).U[:, : old_basis.shape[1]]
        return basis

    def learn(self, model, starts, batches, lr):
        """Phase 2: Adam on {layer: (eps_beta, eps_alpha)}, in dense weights W0 + ΔW."""
        optimizer = torch.optim.Adam([eps for pair in starts.values() for eps in pair], lr=lr)
        for x in batches:
            weights = {}
            for layer, (eps_beta, eps_alpha) in starts.items():
                beta, alpha = self.bases[layer]
                delta = (beta @ eps_beta) @ (alpha @ eps_alpha).T
                weights[f"{layer}.weight"] = model.get_submodule(layer).weight.detach() + delta
            optimizer.zero_grad()
            (torch.func.functional_call(model, weights, x) - 1).square().mean().backward()
            optimizer.step()


def slow_directions(stack, variance, k=None):
    """The fewest left singular vectors that explain so much, or k of them."""
    U, S, _ = torch.linalg.svd(stack, full_matrices=False)
    if k is None:
        k = 1
        while (S[:k] ** 2).sum() < variance * (S**2).sum():
            k += 1
    return U[:, :k]


def slow_basis(stack, variance):
    """Centre, SVD, the main directions; ours: and the mean's direction, unless it lies in these."""
    mean = stack.mean(1, keepdim=True)
    directions = slow_directions(stack - mean, variance)
    outside = mean - directions @ (directions.T @ mean)
    if outside.norm() < 1e-9 * mean.norm():
        return directions
    return torch.cat([directions, outside / outside.norm()], 1)


def slow_stacks(pairs, stack):
    """[B_1 … B_t] and [A_1^T … A_t^T] of {task: (B, A)}."""
    if stack == "updates":
        pairs = {task: slow_update(B, A) for task, (B, A) in pairs.items()}
    left = torch.cat([B for B, _ in pairs.values()], 1)
    right = torch.cat([A.T for _, A in pairs.values()], 1)
    return left, right


def slow_update(B, A):
    """Ours: ΔW at norm 1, its singular values in both of its sides, in place of B and A."""
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    weights = S[: len(A)] / S.norm()
    return U[:, : len(A)] * weights, weights[:, None] * Vh[: len(A)]


# --- The laws of the three phases
SHAPES = {"first": (20, 30), "second": (40, 12)}
NARROW = {"first": (3, 30), "second": (40, 2)}  # a side has fewer rows than adapters have rank
STACKS = ["factors", "updates"]


def variants(**values):
    return pytest.mark.parametrize(list(values), list(itertools.product(*values.values())))


def cases(names, *rows):
    return pytest.mark.parametrize(names, rows)


@variants(stack=STACKS, shapes=[SHAPES, NARROW], variance=[0.5, 0.6, 0.95])
def test_phase_1_is_svd_and_projection(stack, shapes, variance):
    adapters = make_adapters("abcd", (5, 3), shapes)
    share = Share.from_adapters(adapters, variance=variance, stack=stack)
    slow = SlowShare(variance, stack)
    slow.merge(adapters)
    assert_equal_to_slow(share, slow)
    assert len(set(sizes(share))) > 1  # k differs by layer and side


@cases("layer, task, absent", ("first", "a", "c"), ("second", "b", "c"), ("middle", "c", "a"))
def test_the_forward_pass_equals_the_dense_formula(layer, task, absent):
    share, model = attached()
    share.merge(make_adapters("c", shapes={"middle": (12, 20)}))
    linear = share.attach(model).get_submodule(layer)  # again: a merge has brought a layer
    patched(linear)  # which changes nothing
    x = randn(2, 3, linear.in_features).to(DEVICE)
    bare, left_alone, out = outputs(share, linear, x, (None, absent, task))
    beta, alpha = share.bases[layer]
    eps_beta, eps_alpha = share.coefficients[layer][task]
    update = x @ ((beta @ eps_beta) @ (alpha @ eps_alpha).T).T
    assert torch.equal(bare, nn.functional.linear(x, linear.weight, linear.bias))
    assert torch.allclose(out, bare + update, atol=1e-12)
    assert torch.equal(out, linear(input=x))  # called as nn.Linear may be
    assert torch.equal(left_alone, bare)  # a task leaves alone what its adapter lacks
    assert share.factors(layer, absent) is None


def test_phase_2_is_adam_on_dense_weights():
    share, model = attached()
    plain = net()
    plain.load_state_dict(model.state_dict())
    x = [batch() for _ in range(5)]
    start = start_of(share, model, p=2, seed=7)
    starts = {"first": start[:2], "second": start[2:]}
    slow = SlowShare(0.6)
    slow.bases = share.bases
    slow.learn(plain, starts, x, lr=0.01)  # the default
    train_coefficients(share, model, "new", x, square_loss, p=2, seed=7)
    learned = {layer: held["new"] for layer, held in share.coefficients.items()}
    torch.testing.assert_close(learned, starts, rtol=0, atol=1e-9)


@variants(stack=STACKS)
@cases("t, shared", (1, None), (8, None), (8, 3), (60, None), (60, 3))
def test_phase_3_is_rebuilding_stacking_svd_and_projection(t, shared, stack):
    share = Share(0.8, stack)
    slow = SlowShare(0.8, stack)
    merges = [make_adapters(map(str, range(t)), (3, 1, 5), shared=shared)]  # phase 1: it is empty
    for name in "xyz":
        merges.append(make_adapters([name, name + "'"], (4, 2), SHAPES | {name: (6, 5)}))
        del merges[-1][name].factors["second"]
    for adapters in merges:
        share.merge(adapters)
        slow.merge(adapters)
        assert_equal_to_slow(share, slow)


@variants(stack=STACKS, rule=[{"variance": 1.0}, {"k": 3}])
def test_a_merge_is_phase_1_of_rebuilt_and_new_adapters(stack, rule):
    share = make_share("abc", variance=0.9, stack=stack)
    share.remove("b")  # the directions that it alone used are lost
    adapters = {task: share.reconstruct(task) for task in "ac"}
    adapters |= make_adapters("d", (5,), SHAPES | {"new": (9, 9)})  # a layer more
    anew = Share.from_adapters(adapters, stack=stack, **rule)
    share.merge({"d": adapters["d"]}, **rule)
    for basis, expected in zip(bases(share), bases(anew), strict=True):
        assert same_span(basis, expected)
    assert error(share, {task: anew.reconstruct(task) for task in "acd"}) < 1e-9


def test_a_merge_on_long_columns_finds_no_more_directions(monkeypatch):
    for seed in range(60):
        torch.manual_seed(seed)
        a, b, c = make_adapters("abc", (3,), {"x": (50, 30)}, torch.float32).values()
        share = Share.from_adapters({"a": a, "b": b}, variance=0.8)
        plain = copy.deepcopy(share)
        share.merge({"c": c}, variance=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(module, "merge_layer_fast", module.merge_layer)
            plain.merge({"c": c}, variance=1.0)
        assert sizes(plain) == sizes(share)


# --- Worked examples: the same laws in small numbers
def test_example_the_best_rank_1_fit_is_not_the_first_column():
    delta = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # singular values 3 and 1, along (1, ±1)
    best = torch.tensor([[1.5, 1.5], [1.5, 1.5]])  # 3 (1, 1)^T (1, 1) / 2
    first_column = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    adapter = Adapter({"x": (delta, torch.eye(2)), "y": (torch.eye(2), torch.eye(2))})
    share = Share.from_adapters({"a": adapter}, variance=1.0, p=1)
    assert torch.allclose(share.reconstruct("a").delta("x"), best)
    assert float((delta - best).norm()) == pytest.approx(1)
    assert float((delta - first_column).norm()) == pytest.approx(5**0.5)
    assert share.retained() == {"a": pytest.approx((9 + 1) / (9 + 1 + 1 + 1))}  # squares of them


def test_example_an_update_counts_the_same_however_it_is_split():
    B, A = torch.tensor([[3.0], [4.0], [0.0]]), torch.tensor([[1.0, 1.0]])
    other = Adapter({"x": (torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[1.0, -1.0]]))})
    between = torch.tensor([[0.6], [0.8], [1.0]]) / 2**0.5  # of (0.6, 0.8, 0) and (0, 0, 1)
    for factor in (1, 100):
        adapters = {"a": Adapter({"x": (factor * B, A / factor)}), "b": other}
        adapters["both"] = Adapter({"x": (between, A)})
        beta, _ = Share.from_adapters(adapters, k=1, stack="updates").bases["x"]
        assert same_span(beta, between)


@variants(grow=[False, True])
def test_example_only_growing_keeps_a_direction_no_task_uses(grow):
    first, second, third = torch.eye(3).unsqueeze(-1)  # e1, e2, e3 as columns
    a, b, c = [Adapter({"x": (column, torch.ones(1, 2))}) for column in (first, second, third)]
    share = Share.from_adapters({"a": a, "b": b}, variance=1.0)
    assert same_span(share.bases["x"][0], torch.cat([first, second], 1))
    share.remove("a")
    share.remove("b")
    share.merge({"c": c}, variance=1.0, grow=grow)
    kept = [first, second, third] if grow else [third]
    assert same_span(share.bases["x"][0], torch.cat(kept, 1))


def test_the_papers_count_688128_against_1456():
    small = {f"layer {i}": (64, 64) for i in range(28)}  # coefficients do not depend on n and d
    share = Share.from_adapters(make_adapters("abcd", (8,), small, torch.float32), k=26, p=1)
    large = {str(i): nn.Linear(1536, 1536, device="meta") for i in range(28)}
    lora = attach_lora(nn.ModuleDict(large), list(large))
    assert sum(q.numel() for q in lora.parameters() if q.requires_grad) == 688_128
    assert train.num_parameters(share, "a") == 1_456
    assert train.num_parameters(share) == 28 * 26 * (64 + 64) + 4 * 1_456


def test_example_retained_is_a_size_which_does_not_tell_a_turn():
    """A merge with k = 1 and a far larger adapter turns the basis to it: by 45°, and again."""
    e1, e2, one = torch.eye(2)[:, :1], torch.eye(2)[:, 1:], torch.ones(1, 1)
    share = Share.from_adapters({"a": Adapter({"x": (e1, one)})}, k=1)
    share.merge({"b": Adapter({"x": (1e6 * (e1 + e2), one)})}, k=1)
    share.merge({"c": Adapter({"x": (1e12 * e2, one)})}, k=1)
    assert torch.allclose(share.reconstruct("a").delta("x"), e2 / 2, atol=1e-5)  # no e1 at all
    assert share.retained()["a"] == pytest.approx(1 / 4, rel=1e-4)


# --- What the tests use
pytestmark = pytest.mark.filterwarnings("error")  # a warning that is ours is a failure
torch.set_num_threads(1)  # these matrices are too small for more
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
randn = functools.partial(torch.randn, dtype=torch.float64)
assert_all_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
AUTOCAST = functools.partial(torch.autocast, DEVICE, torch.bfloat16)
fold = functools.partial(Share.detach, task="a")
EVERY = (Share.attach, Share.detach, fold)
OwnParameter = type("OwnParameter", (nn.Parameter,), {})
F8, F16, F32, F64 = torch.float8_e4m3fn, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_adapters(tasks, ranks=(3, 2, 4), shapes=SHAPES, dtype=torch.float64, shared=None):
    """Random adapters of rank ranks[i mod len]; with `shared`, all in so many directions a side."""
    adapters = {task: Adapter({}) for task in tasks}
    for layer, shape in shapes.items():
        spans = [torch.randn(m, min(shared or m, m), dtype=dtype) for m in shape]
        left, right = [torch.linalg.qr(span).Q for span in spans]
        for adapter, r in zip(adapters.values(), itertools.cycle(ranks), strict=False):
            B = left @ torch.randn(left.shape[1], r, dtype=dtype)
            A = torch.randn(r, right.shape[1], dtype=dtype) @ right.T
            adapter.factors[layer] = B, A
    return adapters


def make_share(tasks="ab", dtype=torch.float64, shapes=SHAPES, **settings):
    return Share.from_adapters(make_adapters(tasks, shapes=shapes, dtype=dtype), **settings)


def net(dtype=torch.float64):
    """A model that is not ours."""
    layers = {"first": nn.Linear(30, 20), "norm": nn.BatchNorm1d(20), "middle": nn.Linear(20, 12)}
    layers |= {"tanh": nn.Tanh(), "second": nn.Linear(12, 40, bias=False)}
    return nn.Sequential(OrderedDict(layers)).to(DEVICE, dtype).eval()


def attached(tasks="ab", dtype=torch.float64, **settings):
    share = make_share(tasks, torch.promote_types(dtype, torch.float32), **settings)
    return share, share.attach(net(dtype))


def both_signs(columns):
    """Columns of which the mean is 0."""
    return torch.cat([columns, -columns], 1)


def batch(dtype=torch.float64, size=16):
    return torch.randn(size, 30, dtype=dtype, device=DEVICE)


def square_loss(model, x):
    return (model(x) - 1).square().mean()


def fit(model, parameters, x, steps=5):
    """A caller's own loop: AdamW, a schedule, clipping, accumulation; returns the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    losses = []
    for _ in range(steps):
        for half in x.chunk(2):
            loss = square_loss(model, half)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def outputs(share, model, x, tasks):
    found = []
    for task in tasks:
        share.select(task)
        found.append(model(x))
    return found


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def error(share, adapters):
    """How far tasks are from their adapters: of all their layers the largest relative error."""
    errors = []
    for task, adapter in adapters.items():
        held = share.reconstruct(task)
        errors += [relative(held.delta(x), adapter.delta(x)) for x in adapter.factors]
    return float(torch.tensor(errors).max())  # of NaN NaN


def same_span(a, b, tolerance=1e-5):
    return a.shape == b.shape and (a @ a.T - b @ b.T).norm() < tolerance


def bases(share):
    return [basis for pair in share.bases.values() for basis in pair]


def sizes(share):
    return [basis.shape[1] for basis in bases(share)]


def tensors(share):
    held = [pair for tasks in share.coefficients.values() for pair in tasks.values()]
    return bases(share) + [eps for pair in held for eps in pair]


def state(share, model=None):
    """Everything that what fails must leave as it was, as plain values."""
    model = model or nn.Identity()
    numbers = dict(enumerate(tensors(share))) | model.state_dict()
    numbers = {name: x.detach().clone() for name, x in numbers.items() if not x.is_meta}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = [(type(m), m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    return numbers, flags, copy.deepcopy(list(share.records.items())), share.selected, modules


def changed(before, after):
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@contextlib.contextmanager
def assert_unchanged(share, model=None, but=()):
    before = state(share, model)
    yield
    after = state(share, model)
    assert before[1:] == after[1:]
    assert changed(before[0], after[0]) == list(but)


def refused(words):
    return pytest.raises(ValueError, match=words)


def assert_equal_to_slow(share, slow):
    for layer, found in slow.bases.items():
        for fast, basis in zip(share.bases[layer], found, strict=True):
            assert same_span(fast, basis)
        assert share.coefficients[layer].keys() == slow.factors[layer].keys()
        for task, pair in slow.factors[layer].items():
            for fast, factor in zip(share.factors(layer, task), pair, strict=True):
                assert relative(fast, factor) < 1e-5


def start_of(share, model, **settings):
    """Of each layer eps_beta, eps_alpha, as learning starts."""
    with refused("no parameter has moved"), share.learn(model, "start", **settings) as parameters:
        start = copy.deepcopy(parameters)
    return start


# --- Directions and coefficients
MIRRORED = both_signs(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
TWELFTHS = both_signs(torch.eye(12).double())  # each direction is a twelfth
PLANE = torch.tensor([[1, 2, 4], [1, 0, 3], [0, 0, 0]]).double()
ABOVE = torch.tensor([[0], [0], [1]]).double()
ROOTS = torch.arange(1.0, 51.0).sqrt().unsqueeze(1)


def with_singular_values(values, n, m):
    left = torch.linalg.qr(randn(n, len(values))).Q
    right = torch.linalg.qr(randn(m, len(values))).Q
    return (left * values) @ right.T


@variants(shape=[(500, 500), (500, 800), (800, 500)], dtype=[torch.float64, torch.float32])
def test_faint_directions_beside_heavy_ones_are_those_of_the_svd(shape, dtype):
    faint = torch.logspace(-4.52, -5.7, 490, dtype=torch.float64)  # from 3e-5 to 2e-6
    stack = with_singular_values(torch.cat([torch.ones(10).double(), faint]), *shape).to(dtype)
    expected = torch.linalg.svd(stack.double()).U[:, 10:20]
    basis = build_basis(stack, k=400).double()
    assert (expected.T @ basis[:, 10:20]).norm() ** 2 / 10 > 0.99
    assert (basis.T @ basis - torch.eye(400)).abs().max() < 1e-6


@variants(shape=[(50, 80), (80, 50)])
def test_a_basis_lies_in_the_span_of_its_stack(shape):
    stack = with_singular_values(torch.tensor([1.0, 1e-3, 3e-6]).double(), *shape)
    assert same_span(build_basis(stack, k=9), torch.linalg.svd(stack).U[:, :3], 1e-9)


@variants(stack=STACKS, dtype=[torch.float64, torch.float32])
def test_one_adapter_merged_many_times_keeps_its_directions(stack, dtype):
    """Faint directions stay as well, rounding brings none, and its errors do not add up."""
    B = with_singular_values(torch.tensor([1.0, 0.9, 3e-5, 1e-5]).double(), 40, 4)
    same = Adapter({"x": (B.to(dtype), torch.linalg.qr(randn(30, 4)).Q.T.to(dtype))})
    share = Share.from_adapters({"a": same, "b": same}, variance=1.0, stack=stack)
    for i in range(81):
        share.merge({str(i): same}, variance=1.0, grow=i % 2 == 0)
    assert same_span(share.bases["x"][0].double(), torch.linalg.svd(B).U[:, :4], 0.02)
    assert sizes(share) == [4, 4]
    assert error(share, dict.fromkeys(share.tasks, same)) < 8e-7


@cases(
    "stack, rule, k",
    (MIRRORED, {"variance": 5 / 6}, 2),  # energies 4, 1, 1: five sixths are 4 + 1
    (MIRRORED, {"variance": 5 / 6 + 1e-6}, 3),
    (MIRRORED + 9, {"variance": 5 / 6}, 3),  # and the mean, which without centring would be all
    *[(TWELFTHS, {"variance": i / 12}, i) for i in range(1, 13)],  # in spite of rounding
    (PLANE, {"variance": 1.0}, 2),  # its mean lies in the plane
    (PLANE.repeat(1, 2000) + 1e-5 * ABOVE, {"variance": 1.0}, 3),  # little, but in all columns
    *[(ROOTS.expand(50, t), {"variance": 1.0}, 1) for t in (1, 2, 3, 40, 90)],
    *[(ROOTS.expand(50, t), {"k": 7}, 1) for t in (1, 2, 3, 40, 90)],
    (torch.full((99, 99), 999.0).half(), {}, 1),  # its norm is infinite in half precision
    (1e3 * ROOTS.expand(50, 9) * (1 + 1e-7 * torch.randn(50, 9)), {"variance": 1.0}, 1),
    (both_signs(torch.eye(4)[:, :2]) + 1e-9 * torch.eye(4)[:, 3:], {"variance": 1.0}, 2),
    (torch.zeros(3, 5), {}, 0),
    (torch.zeros(3, 5), {"k": 7}, 0),
)
def test_a_basis_has_the_fewest_directions_and_the_mean(stack, rule, k):
    basis = build_basis(stack, **rule)
    assert basis.shape == (len(stack), k)
    assert basis.dtype == torch.promote_types(stack.dtype, torch.float32)


@variants(stack=STACKS, rule=[{"k": 10}, {"variance": 1.0}], dtype=[torch.float32, torch.float64])
def test_rounding_is_no_direction_of_a_basis(stack, rule, dtype):
    B, A = torch.randn(20, 2, dtype=dtype), torch.randn(2, 30, dtype=dtype)
    wide, noise = torch.randn(2, 5, dtype=dtype), 1e-20 * torch.randn(20, 1, dtype=dtype)
    same = B @ wide, torch.linalg.pinv(wide) @ A  # five columns, of rank 2 but for rounding
    inside = 1e6 * torch.cat([B, noise], 1), torch.cat([A, noise[:1].expand(1, 30)])
    adapters = {"a": Adapter({"x": same}), "b": Adapter({"x": inside})}
    share = Share.from_adapters({"a": adapters["a"]}, stack=stack, **rule)
    assert sizes(share) == [2, 2]
    share.merge({"b": adapters["b"]}, grow=True, **rule)
    assert sizes(share) == [2, 2]
    assert error(share, adapters) < 1e-5


@cases("scale, k", (3e-3, 2), (9e2, 2), (2e3, 1))  # ΔW below 1e-6 of the largest is rounding
def test_updates_weigh_the_same_whatever_their_size(scale, k):
    one, two = [torch.eye(4)[:, i : i + 1] for i in (0, 1)]
    adapters = {"one": Adapter({"x": (one, one.T)})}
    adapters["two"] = Adapter({"x": (scale * two, scale * two.T)})
    share = Share.from_adapters(adapters, variance=0.6, stack="updates")  # one alone is a half
    assert sizes(share) == [k, k]
    assert share.retained()["two"] == pytest.approx(1)


@variants(dtype=[torch.float64, torch.float32])
def test_coefficients_cut_to_p_bring_no_rounding_into_a_merge(dtype):
    wide, rank_4, new = make_adapters("abc", (4, 4, 1), {"x": (20, 30)}, dtype).values()
    B, A = wide.factors["x"]
    wide.factors["x"] = B[:, :2] @ torch.randn(2, 4, dtype=dtype), A  # four columns, of rank 2
    share = Share.from_adapters({"wide": wide, "rank 4": rank_4}, variance=1.0, p=4)
    share.remove("rank 4")
    share.merge({"new": new}, variance=1.0)
    assert sizes(share) == [3, 3]


def best(delta, p):
    """The nearest matrix of rank p (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :p] @ torch.diag(S[:p]) @ Vh[:p]


@variants(p=[1, 2, 9], dtype=[torch.float64, torch.float32])
def test_rank_p_coefficients_are_the_best_the_bases_allow(p, dtype):
    adapters = make_adapters("abcd", shapes=NARROW, dtype=dtype)
    share = Share.from_adapters({t: adapters[t] for t in "abc"}, variance=0.8, p=p)
    share.add("d", adapters["d"], p=p)
    for layer, (task, adapter) in itertools.product(NARROW, adapters.items()):
        beta, alpha = share.bases[layer]
        inside = beta @ beta.T @ adapter.delta(layer) @ alpha @ alpha.T
        assert relative(share.reconstruct(task).delta(layer), best(inside, p)) < 1e-5
        eps_beta, eps_alpha = share.coefficients[layer][task]
        r = len(adapter.factors[layer][1])
        assert eps_beta.shape[1] == eps_alpha.shape[1] <= min(p, r)
        assert eps_beta.dtype == eps_alpha.dtype == dtype
        assert relative(eps_beta.norm(dim=0), eps_alpha.norm(dim=0)) < 1e-4  # evenly split


def test_the_signs_of_cut_coefficients_are_those_of_the_whole():
    """An SVD leaves them open, and the mean that a later merge subtracts depends on them."""
    adapters = make_adapters("abcd")
    share = Share.from_adapters(adapters, variance=0.8, p=2)
    for task, adapter in adapters.items():
        for layer, (B, _) in adapter.factors.items():
            columns, _ = share.factors(layer, task)
            assert torch.all(columns.T @ B.sum(1) > 0)


def test_retained_is_one_minus_the_squared_relative_error():
    adapters = make_adapters("abc")
    share = Share.from_adapters(adapters)
    for task, part in share.retained().items():
        held = torch.cat([share.reconstruct(task).delta(x).flatten() for x in SHAPES])
        came = torch.cat([adapters[task].delta(x).flatten() for x in SHAPES])
        assert part == pytest.approx(1 - relative(held, came) ** 2)


# --- Merges
def slow_growth(basis, columns, variance=0.6, k=None):
    """A basis, and beside it the main directions of what columns have outside of it."""
    outside = columns - basis @ (basis.T @ columns)
    room = None if k is None else max(0, k - basis.shape[1])
    return torch.cat([basis, slow_directions(outside, variance, room)], 1)


@variants(rule=[{}, {"variance": 1.0}, {"k": 8}, {"k": 4}, {"k": 2}], stack=STACKS, scale=[1, 1e9])
def test_growing_keeps_all_and_adds_what_each_has_outside(rule, stack, scale):
    share = make_share("ab", stack=stack, k=3)
    before = copy.deepcopy(share)
    new = make_adapters("cd", (3, 4))
    new["d"].factors = {layer: (scale * B, A) for layer, (B, A) in new["d"].factors.items()}
    share.merge(new, grow=True, **rule)
    for layer, (beta, alpha) in before.bases.items():
        for adapter in new.values():  # one by one
            left, right = slow_stacks({"new": adapter.factors[layer]}, "updates")  # ΔW's directions
            beta = slow_growth(beta, left, **rule)
            alpha = slow_growth(alpha, right, **rule)
        assert same_span(share.bases[layer][0], beta)
        assert same_span(share.bases[layer][1], alpha)
    assert_all_equal([basis[:, :3] for basis in bases(share)], bases(before))
    assert error(share, {task: before.reconstruct(task) for task in "ab"}) < 1e-12


@variants(scale=[1e20, 1e-23], stack=STACKS, grow=[False, True])
def test_an_update_beyond_the_range_of_float32_is_held(scale, stack, grow):
    adapters = make_adapters("abc", dtype=torch.float32)
    for adapter in adapters.values():
        adapter.factors = {x: (scale * B, scale * A) for x, (B, A) in adapter.factors.items()}
    share = Share.from_adapters({t: adapters[t] for t in "ab"}, variance=1.0, stack=stack)
    share.merge({"c": adapters["c"]}, variance=1.0, grow=grow)
    assert share.retained() == pytest.approx(dict.fromkeys("abc", 1.0))


def test_float32_bases_stay_orthonormal_over_sixty_merges():
    share = make_share("a", torch.float32)
    k = sizes(share)[0]
    for i in range(60):
        new = make_adapters("a", (2,), dtype=torch.float32)["a"]
        if i % 3 == 0:  # almost inside the bases; but the little that is outside counts
            for layer, (B, A) in share.reconstruct(share.tasks[-1]).factors.items():
                nudge = new.factors[layer][0] @ torch.ones(2, len(A))
                new.factors[layer] = B + 1e-5 * nudge, A
        share.merge({str(i): new}, variance=1.0 if i == 0 else None, grow=i % 2 == 0)
        assert sizes(share)[0] > k
        for basis in bases(share):
            gram = basis.double().T @ basis.double()
            assert (gram - torch.eye(len(gram))).abs().max() < 2e-6


def test_the_variance_rule_applied_afresh_forgets_more_than_ours():
    adapters = make_adapters("abcdefghijklmnop", (2,), {"first": SHAPES["first"]})
    ours = Share()
    published = SlowShare(0.6)
    published.new_basis = lambda stack, old_basis: slow_directions(stack, 0.6)
    for tasks in ("abcd", *"efghijklmnop"):
        ours.merge({task: adapters[task] for task in tasks})
        published.merge({task: adapters[task] for task in tasks})
    at_first = Share.from_adapters({task: adapters[task] for task in "abcd"}).retained()
    left_by_published = 0
    for task in "abcd":
        B, A = published.factors["first"][task]
        left_by_published += float((B @ A).norm() / adapters[task].delta("first").norm()) ** 2
    assert left_by_published < 0.2 * sum(at_first.values())
    assert sum(ours.retained()[task] for task in "abcd") > 1.5 * left_by_published


# --- A share and its adapters
def test_extras_and_config_travel_with_their_task_as_copies():
    head = torch.ones(3, 4).half()
    adapter = Adapter(GOOD.factors, {"head": head.clone()}, {"task_type": "SEQ_CLS"})
    share = Share.from_adapters({"a": adapter})
    model = share.attach(net())
    for _ in range(2):  # neither what came in nor what goes out is the share's own
        adapter.extras["head"].zero_()
        adapter.config.clear()
        train_coefficients(share, model, "a", [batch()], square_loss, finetune=True)
        adapter = share.reconstruct("a")
        assert torch.equal(adapter.extras["head"], head)
        assert adapter.config == {"task_type": "SEQ_CLS"}
    numbers = sum(eps.numel() for held in share.coefficients.values() for eps in held["a"])
    assert train.num_parameters(share, "a") == 3 * 4 + numbers


@variants(common=[0.0, 100.0], first=["a", "abc"], stack=STACKS)
def test_with_all_the_variance_every_adapter_returns(common, first, stack):
    adapters = make_adapters("abcd")
    for adapter in adapters.values():
        for B, _ in adapter.factors.values():
            B += common  # a column mean that all have
    del adapters["b"].factors["first"]
    share = Share.from_adapters({t: adapters[t] for t in first}, variance=1.0, stack=stack)
    share.merge({t: adapters[t] for t in "abcd" if t not in first})
    assert error(share, adapters) < 1e-6


@variants(stack=STACKS)
def test_a_task_without_an_update_stays_without_one(stack, tmp_path):
    adapters = make_adapters("abc")
    for B, _ in adapters["a"].factors.values():
        B.zero_()
    share = Share.from_adapters({"a": adapters["a"]}, variance=1.0, stack=stack)
    share.add("again", adapters["a"], p=2)
    share.merge({t: adapters[t] for t in "bc"})
    average(share, ["a", "again"], "mean")
    share.save(tmp_path / "share")
    save_peft(Share.load(tmp_path / "share").reconstruct("again"), tmp_path)
    held = [*map(share.reconstruct, ("a", "again", "mean")), load_peft(tmp_path)]
    for adapter, layer in itertools.product(held, SHAPES):
        assert not adapter.delta(layer).any()
    assert error(share, {task: adapters[task] for task in "bc"}) < 1e-6
    assert share.retained() == pytest.approx(dict.fromkeys(share.tasks, 1))


@variants(context=[AUTOCAST, torch.no_grad, torch.inference_mode])
def test_a_share_made_in_any_context_is_exact_and_trains(context, tmp_path):
    adapters = make_adapters("abcd", dtype=torch.float32, shared=5)
    for adapter in adapters.values():
        adapter.extras["head"] = torch.ones(2, requires_grad=True)
        for factor in itertools.chain(*adapter.factors.values()):
            factor.requires_grad_(True)
    with context():
        share = Share.from_adapters({t: adapters[t] for t in "ab"}, variance=1.0)
        share.add("c", adapters["c"], p=4)
        share.merge({"d": adapters["d"]}, grow=True)
        share.save(tmp_path / "share")
        loaded = Share.load(tmp_path / "share")
    extras = [share.reconstruct(task).extras["head"] for task in "abcd"]
    assert not any(tensor.requires_grad for tensor in tensors(share) + extras)
    x = batch(torch.float32)
    for made in (share, loaded):
        assert error(made, adapters) < 1e-5
        model = made.attach(net(torch.float32))
        for task, finetune in (("a", True), ("new", False)):
            losses = train_coefficients(made, model, task, [x] * 3, square_loss, finetune=finetune)
            assert losses[-1] < losses[0]
        made.select(["a", None] * 8)
        model(x.clone().requires_grad_()).sum().backward()  # through a mixed batch, too


@variants(stack=STACKS)
@cases(
    "dtypes, expected",  # of B and A of one adapter, and of another
    ((F16, F16, F16, F16), F32),
    ((F8, F8, F32, torch.bfloat16), F32),
    ((F32, F32, F64, F32), F64),
    ((F32, F64, F32, F32), F64),
)
def test_a_share_is_float32_or_if_one_factor_is_float64(stack, dtypes, expected):
    shapes = [(9, 2), (2, 7), (9, 2), (2, 7)]
    factors = [randn(*shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    one = Adapter({"x": factors[:2]})
    two = Adapter({"x": [factor.to(DEVICE) for factor in factors[2:]]})  # goes to that of the first
    share = Share.from_adapters({"one": one, "two": two}, variance=1.0, stack=stack)
    share.add("added", one)
    share.merge({"merged": two})
    assert {tensor.dtype for tensor in tensors(share)} == {expected}
    for task, adapter in {"one": one, "added": one, "two": two, "merged": two}.items():
        B, A = [factor.cpu().double() for factor in adapter.factors["x"]]
        assert relative(share.reconstruct(task).delta("x"), B @ A) < 1e-5


@cases("selected, left", ("a", None), ("b", "b"), (["a", None], None), (["b", None], ("b", None)))
def test_a_removed_task_is_no_longer_selected(selected, left):
    share = make_share("abc")
    share.select(selected)
    share.remove("a")
    assert share.selected == left


# --- With a model
@variants(context=[contextlib.nullcontext, AUTOCAST, torch.inference_mode])
@cases("dtype, tolerance", (torch.float32, 1e-5), (torch.bfloat16, 0.05))
def test_a_folded_task_gives_the_outputs_of_the_attached_one(dtype, tolerance, context):
    share, model = make_share(dtype=torch.float32), net(dtype)
    weight = model.first.weight.detach().double() + share.reconstruct("b").delta("first")
    x = batch(dtype)
    share.select("b")
    model.second.weight.requires_grad_(False)
    expected = share.attach(model)(x)
    with context():
        share.detach(model, "b")
    with torch.no_grad():
        folded = model(x)
    assert torch.equal(model.first.weight, weight.to(dtype))  # rounded once
    assert model.first.weight.requires_grad
    assert not model.first.weight.is_inference()  # it can go on to train
    assert not model.second.weight.requires_grad
    assert relative(folded.float(), expected.float()) < tolerance


def patched(linear):
    linear.forward = functools.partial(linear.forward)  # accelerate's hooks do so
    return linear


def with_weight(linear, weight):
    linear.weight = weight
    return linear


@cases(
    "change, calls, words",  # of a layer; the calls that refuse it
    (parametrizations.weight_norm, EVERY, "without pruning"),
    (lambda x: prune.identity(x, "weight"), EVERY, "without pruning"),
    (patched, EVERY, "or a patched forward: attach first, offload later"),
    (lambda x: patched(x.to("meta")), EVERY, "or a patched forward"),  # offloaded
    (lambda x: x.to("meta"), EVERY, "with its weights loaded"),
    # a subclass, which is never called
    (lambda x: nn.MultiheadAttention(40, 1).out_proj, [Share.attach], "is NonDyn.*Linear itself"),
    (lambda x: nn.Linear(12, 41), [Share.attach], r"is \(41, 12\), not \(40, 12\)"),
    # as ZeRO-3 leaves it: in_features still fits
    (lambda x: with_weight(x, nn.Parameter(torch.zeros(0))), [Share.attach], r"is \(0,\), not"),
    (
        lambda x: with_weight(x, nn.Parameter(x.weight.char(), False)),
        [fold],
        "cannot be added to a",
    ),
    (
        lambda x: with_weight(x, nn.Parameter(x.weight.to(F8), False)),
        [fold],
        "cannot be added to a",
    ),
    (lambda x: with_weight(x, OwnParameter(x.weight)), [fold], "cannot be added to a"),
)
def test_an_odd_layer_is_refused_with_its_name_and_the_reason(change, calls, words):
    for call in calls:
        share, model = make_share(), net()
        if call is not Share.attach:
            share.attach(model)
        model.second = change(model.second)
        with assert_unchanged(share, model), refused(f"layer 'second'.*{words}"):
            call(share, model)
    if calls == [fold]:  # without a task to fold in it is fine
        assert type(share.detach(model).second) is nn.Linear


def test_a_copied_model_has_a_share_of_its_own():
    share, model = attached()
    share.select("b")
    copied = copy.deepcopy(model)
    x = batch()
    expected = model(x)
    share.remove("b")
    assert torch.equal(copied(x), expected)
    assert not torch.equal(model(x), expected)
    for call in (*EVERY, enter):
        with refused("another share|is ShareLinear"):
            call(share, copied)
    train_coefficients(copied.first.share, copied, "new", [x], square_loss)
    copied.first.share.detach(copied, "a")
    assert isinstance(model.first, ShareLinear)


def test_a_layer_of_two_names_has_one_adapter_which_is_its_own():
    model = nn.ModuleDict({"x": nn.Linear(6, 6), "other": nn.Linear(6, 6)}).double()
    model["y"] = model["x"]
    model["other"].weight = model["x"].weight
    with refused("layer 'y' is another layer of the share as well"):
        make_share("a", shapes={"x": (6, 6), "y": (6, 6)}).attach(model)
    share = make_share("a", shapes={"x": (6, 6)})
    share.select("a")
    v = randn(2, 6)
    bare = model["other"](v)
    expected = model["x"](v) + v @ share.reconstruct("a").delta("x").T
    for change in (Share.attach, fold):
        change(share, model)
        assert torch.allclose(model["x"](v), expected)
        assert torch.allclose(model["y"](v), expected)
        assert torch.equal(model["other"](v), bare)


@variants(masked=[False, True])  # with a mask it makes nested tensors
def test_the_fast_path_of_an_encoder_is_not_taken(masked):
    warnings.simplefilter("ignore")  # theirs: nested tensors are in prototype stage
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    share = make_share("a", torch.float32, {"layers.1.linear1": (16, 8)})
    x = torch.randn(3, 5, 8)
    mask = torch.arange(15).reshape(3, 5) > 12 if masked else None  # padding
    share.select("a")
    lora = attach_lora(copy.deepcopy(model), ["layers.1.linear1"], r=3)
    linear = lora.layers[1].linear1
    linear.lora_B.data, linear.lora_A.data = share.factors("layers.1.linear1", "a")
    with torch.no_grad():
        of_lora = lora(x, src_key_padding_mask=mask)
        found = share.attach(model)(x, src_key_padding_mask=mask)
        expected = share.detach(model, "a")(x, src_key_padding_mask=mask)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(of_lora, expected, atol=1e-5)


@variants(assign=[False, True])
@cases("a, b, c, d", (0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 0, 1))
def test_two_shares_come_and_go_and_change_outputs_alone(a, b, c, d, assign):
    shares = [make_share("x", shapes={layer: SHAPES[layer]}) for layer in SHAPES]
    for share in shares:
        share.select("x")
    model = net()
    model.second.weight.requires_grad_(False)
    model.share = shares[a]  # an attribute of that name makes no ShareLinear
    plain = copy.deepcopy(model.state_dict())
    x = batch()
    bare = model(x)
    with assert_unchanged(shares[0], model):
        both = shares[b].attach(shares[a].attach(model))(x)
        model.load_state_dict(plain, assign=assign)  # the plain model's fits
        assert not model.second.weight.requires_grad
        one = shares[c].detach(model)(x)
        none = shares[d].detach(model)(x)
    assert not torch.equal(one, both)
    assert not torch.equal(one, bare)
    assert torch.equal(none, bare)


def test_a_layers_numbers_move_to_where_its_weight_is(monkeypatch):
    share, model = attached()
    with torch.inference_mode():
        beta, alpha = share.bases["first"]
        on_meta = beta.to("meta"), alpha.to("meta")
        share._store({}, {"first": (on_meta, share.coefficients["first"])})
    assert {eps.device.type for eps in share.coefficients["first"]["a"]} == {"meta"}
    assert {basis.device.type for basis in share.bases["first"]} == {"meta"}
    assert not any(tensor.is_inference() for tensor in tensors(share))  # such can never be trained
    for way in (lambda: model(batch()), lambda: enter(share, model), lambda: share.attach(net())):
        with pytest.raises(RuntimeError, match="copy out of meta"):  # it tries to
            way()
    to = torch.Tensor.to

    def to_or_zeros(tensor, *args, **kwargs):  # as if meta could be left
        return (
            torch.zeros_like(tensor, device="cpu")
            if tensor.is_meta
            else to(tensor, *args, **kwargs)
        )

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to_or_zeros)
        model(batch())
    assert not any(tensor.is_meta for tensor in tensors(share))
    share, model = attached()
    monkeypatch.delattr(Share, "_store")  # not where they are there, or it is on meta
    model(batch())
    model.to("meta")(batch().to("meta"))
    share.attach(net())(batch())


def test_a_compiled_model_follows_the_selection_without_a_break():
    share, model = attached()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = batch()
    for task in (None, "a", "b", ["a", None] * 8, ["b"] * 16, None):
        share.select(task)
        assert torch.allclose(compiled(x), model(x))


def flops_of_a_step(linear, x):
    with FlopCounterMode(display=False) as counter:
        linear(x).sum().backward()
    return counter.get_total_flops()


@variants(p=[1, 4])
def test_a_step_costs_what_a_lora_of_rank_p_costs(p):
    x = batch()
    share, model = attached()
    with refused("no parameter has moved"), share.learn(model, "new", p=p):
        of_share = flops_of_a_step(model.first, x)
    formed = 6 * p * sum(basis.numel() for basis in share.bases["first"])  # no n × d matrix
    lora = attach_lora(net(), ["first"], p)
    assert 0 < of_share <= flops_of_a_step(lora.first, x) + formed


def test_each_sample_of_a_mixed_batch_gets_its_own_task():
    share, model = attached("abc", variance=0.9)
    share.merge(make_adapters("d", (1,), {"first": SHAPES["first"]}))  # it lacks the second layer
    names = ["d", None, "a", "c", "a", None]
    for x, run in ((randn(6, 4, 5, 30).to(DEVICE), model.first), (batch(size=6), model)):
        each = [outputs(share, run, x[i : i + 1], [name])[0] for i, name in enumerate(names)]
        for mixed in outputs(share, run, x, (names, (name for name in names))):
            assert relative(mixed, torch.cat(each)) < 1e-9
        share.select([])
        assert run(x[:0]).shape == mixed[:0].shape  # an empty batch
    nobody, bare = outputs(share, model, x, ([None] * 6, None))
    assert torch.equal(nobody, bare)
    share.select(["a", "b"])
    with refused("2 tasks are selected for a batch of 6 samples"):
        model(x)


# --- Any training loop
@cases("p, phi, mode", (1, 0, True), (2, 0, False), (2, 3, True))
def test_in_the_block_the_new_parameters_alone_are_trained(p, phi, mode):
    share, model = attached(variance=1.0)
    model.train(mode)  # in which a batch changes the buffers of `norm`
    square_loss(model, batch()).backward()  # gradients from before count for nothing
    plain = model.state_dict().keys()
    count = sum((k + phi) * p + n * phi for n, k in [basis.shape for basis in bases(share)])
    with assert_unchanged(Share(), model), share.learn(model, "new", p=p, phi=phi) as parameters:
        start = copy.deepcopy(model.state_dict())
        trainable = [q for q in model.parameters() if q.requires_grad]
        assert list(map(id, trainable)) == list(map(id, parameters))
        assert sum(q.numel() for q in trainable) == count
        fit(model, list(model.parameters()), batch(), steps=1)
        end = copy.deepcopy(model.state_dict())  # a checkpoint
        model.load_state_dict(end)
        assert {x for x in changed(start, end) if "norm" not in x} == start.keys() - plain


def test_a_start_depends_on_its_seed_and_on_nothing_global():
    share, model = attached()
    before = torch.get_rng_state()
    first = start_of(share, model, p=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert_all_equal(start_of(share, model, p=2), first)
    finally:
        torch.set_default_dtype(torch.float32)
    for eps, other in zip(first, start_of(share, model, p=2, seed=1), strict=True):
        assert not torch.equal(eps, other)


@cases("settings, sigma", ({}, 0.03), ({"sigma": 0.5}, 0.5))
def test_coefficients_start_as_wide_as_sigma_columns_of_norm_1(settings, sigma):
    share, model = attached(variance=1.0)
    start = [q.detach() for q in start_of(share, model, p=99, phi=2, **settings)]
    for eps, columns in zip(start[::2], start[1::2], strict=True):
        assert eps.std().item() == pytest.approx(sigma, rel=0.1)
        assert (columns.norm(dim=0) - 1).abs().max() < 0.5


@variants(phi=[0, 1], zeros=["B", "A"])
def test_a_layer_with_an_empty_basis_is_trained_with_phi_only(phi, zeros):
    adapters = make_adapters("a") | make_adapters("b")
    for adapter in adapters.values():
        B, A = adapter.factors["first"]
        adapter.factors["first"] = (0 * B, A) if zeros == "B" else (B, 0 * A)
    share = Share.from_adapters(adapters)
    model = share.attach(net())
    for settings in ({"task": "new", "phi": phi}, {"task": "a", "finetune": True}):
        with share.learn(model, **settings) as parameters:
            assert all(q.numel() > 0 for q in model.parameters() if q.requires_grad)
            fit(model, parameters, batch())
    assert ("first" in share.reconstruct("new").factors) == (phi == 1)
    assert "second" in share.reconstruct("new").factors


@variants(
    selected=[None, "b", ("a", None) * 8],
    settings=[{"task": "new", "p": 2}, {"task": "c", "finetune": True}],
)
def test_every_other_output_stays_bit_for_bit_the_same(selected, settings):
    share, model = attached("abc")
    x = batch()
    others = (None, "a", "b", ["a", "b"] * 8)
    before = outputs(share, model, x, others)
    share.select(selected)
    with share.learn(model, **settings) as parameters:
        assert_all_equal(outputs(share, model, x, others), before)
        share.select(settings["task"])  # after a look at others
        losses = fit(model, parameters, x)
        end = model(x)
    for parameter in parameters:
        parameter.data.add_(1)  # as an optimizer would that goes on: too late
    assert losses[-1] < losses[0]
    assert share.selected == selected
    assert share.retained()[settings["task"]] == pytest.approx(1)
    assert_all_equal(outputs(share, model, x, (*others, settings["task"])), [*before, end])


def press_ctrl_c(model, x):
    model.first.share.select("a")
    raise KeyboardInterrupt("Ctrl-C")


@variants(settings=[{"task": "new"}, {"task": "new", "phi": 1}, {"task": "a", "finetune": True}])
@cases(
    "losses, words",  # one for each step
    ([square_loss, square_loss, press_ctrl_c], "Ctrl-C"),
    ([lambda m, x: (m(x) * 0).abs().sqrt().sum()], "NaN or infinity"),  # in its slope
    ([], "task '(new|a)': no parameter has moved; is the optimizer from the block"),
)
def test_a_run_that_fails_or_learns_nothing_leaves_all(losses, words, settings):
    share, model = attached()
    model.norm.train()
    model.second.weight.requires_grad_(False)
    share.select("b")
    used = {"loss_fn": lambda model, step: losses[step](model, batch())} | settings
    with assert_unchanged(share, model), pytest.raises(BaseException, match=words):
        train_coefficients(share, model, batches=range(len(losses)), **used)


@variants(phi=[0, 2], stack=STACKS, cast=[torch.float32, torch.bfloat16])
def test_a_layer_that_the_loss_never_reached_is_no_part(phi, stack, cast):
    share, model = attached(dtype=torch.float32, stack=stack, variance=0.9)
    before = copy.deepcopy(share)
    for settings in ({"task": "new", "phi": phi}, {"task": "a", "finetune": True}):
        with share.learn(model, **settings) as parameters:
            model.to(cast)  # which moves no layer
            fit(model.first, parameters[::2], batch(cast), 20)  # of one side, which is enough
    assert share.reconstruct("new").factors.keys() == {"first"}
    assert share.reconstruct("a").factors.keys() == SHAPES.keys()
    assert share.retained()["a"] == pytest.approx(1, rel=1e-4)
    share.merge(make_adapters("c", shapes={"first": SHAPES["first"]}))
    assert_all_equal(share.bases["second"], before.bases["second"])
    assert_all_equal(share.coefficients["second"], before.coefficients["second"])


def test_what_would_break_a_block_is_refused_and_it_goes_on():
    share, model = attached()
    x = batch()
    held = [eps for tasks in share.coefficients.values() for eps in tasks["a"]]
    with share.learn(model, "a", finetune=True) as parameters:
        assert_all_equal(parameters, held)  # it starts there, in the order of a new task's
        for change in (*CHANGES, Share.detach):
            with refused("task 'a' is being learned"):
                change(share, model)
        share.select(["b", None] * 8)  # a mixed batch of others is none of its business
        assert model(x).shape == (16, 40)
        share.select("a")
        losses = fit(model, parameters, x)
    assert losses[-1] < losses[0]
    share.detach(model)


def test_a_mixed_batch_trains_the_task_being_learned():
    share, model = attached()
    x = batch()
    with share.learn(model, "new", phi=1) as parameters:
        alone = torch.autograd.grad(model(x[::2]).square().sum(), parameters)
        share.select(["new", "b"] * 8)
        mixed = torch.autograd.grad(model(x)[::2].square().sum(), parameters)
        for gradient, expected in zip(mixed, alone, strict=True):
            assert torch.allclose(gradient, expected)
        fit(model, parameters, batch(size=32))  # two halves


def test_two_models_of_one_share_train_as_one():
    share, one = attached()
    two = share.attach(net())
    both = nn.ModuleList([one, two])
    x = batch()
    with share.learn(both, "new") as parameters:
        assert len(parameters) == len([q for q in both.parameters() if q.requires_grad])
        bare = [model(x) for model in both]
        fit(one, parameters, x)
        assert not torch.equal(two(x), bare[1])
    share.detach(both, "new")
    assert not any(isinstance(module, ShareLinear) for module in both.modules())


@variants(half=["autocast", "before the block", "in it"])
def test_in_half_precision_a_block_learns_the_share_is_float32(half):
    dtype = torch.float32 if half == "autocast" else torch.bfloat16
    share, model = attached(dtype=dtype if half == "before the block" else torch.float32)
    x = batch(dtype)
    with AUTOCAST(enabled=half == "autocast"), share.learn(model, "new", phi=1) as parameters:
        model.to(dtype)  # and what is learned
        losses = fit(model, parameters, x, 20)
        end = model(x)
    assert losses[-1] < losses[0]
    assert end.dtype == torch.bfloat16
    assert {q.dtype for q in parameters} == {dtype}
    assert {tensor.dtype for tensor in tensors(share)} == {torch.float32}
    for amp in (False, half == "autocast"):
        with AUTOCAST(enabled=amp):
            for out in outputs(share, model, x, ("new", ["new"] * 16)):
                assert out.dtype == (torch.bfloat16 if amp else dtype)
                assert relative(out.float(), end.float()) < 0.02


def learn_in_parallel(rank, folder, wrap, phi):
    """One process of two; or, without a wrap, the whole batch in one."""
    torch.manual_seed(0)
    share = make_share("ab", torch.float32, SHAPES | {"first.unused": (5, 5)})
    model = net(torch.float32).cpu()
    model.first.unused = nn.Linear(5, 5)
    share.attach(model)
    x = batch(torch.float32).cpu()
    if wrap:
        torch.distributed.init_process_group("gloo", f"file://{folder}/all", None, 2, rank)
        x = x[rank::2]
    torch.manual_seed(rank)  # processes may be seeded differently
    with share.learn(model, "new", p=2, phi=phi) as parameters:
        run = model
        if wrap == "DistributedDataParallel":
            run = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        if wrap == "FSDPModule":
            fully_shard(model.first)
            fully_shard(model)
            parameters = [q for q in model.parameters() if q.requires_grad]
        fit(run, parameters, x)
    assert all(parameter.requires_grad for parameter in model.parameters())
    if wrap:  # what another block trained would be each process's own
        run(x)  # after a forward a sharded model holds plain tensors
        with refused(f"the model is in {wrap}: wrap"):
            enter(share, run, "other")
    share.save(folder / f"{wrap} {rank}")
    if wrap:
        torch.distributed.barrier()
        os._exit(0)  # as a process ends in the usual way, gloo's threads abort it now and then


@variants(wrap=["DistributedDataParallel", "FSDPModule"], phi=[0, 2])
def test_parallel_ranks_end_equal_and_as_one_process(tmp_path, wrap, phi):
    torch.multiprocessing.spawn(learn_in_parallel, (tmp_path, wrap, phi), nprocs=2)
    learn_in_parallel(0, tmp_path, None, phi)
    one, two = [Share.load(tmp_path / f"{wrap} {rank}") for rank in (0, 1)]
    alone = Share.load(tmp_path / "None 0").reconstruct("new")
    assert_all_equal(tensors(one), tensors(two))
    assert one.reconstruct("new").factors.keys() == SHAPES.keys()  # what moved, in each
    assert error(one, {"new": alone}) < 1e-3


def test_a_head_unfrozen_in_the_block_trains_and_is_the_callers():
    share, model = attached(dtype=torch.float32)
    model.middle.bias.requires_grad_(False)
    head = list(model.middle.parameters())
    x = batch(torch.float32)
    with assert_unchanged(share, model, but=["middle.weight", "middle.bias"]):
        with share.learn(model, "new") as parameters:
            model.middle.requires_grad_(True)
            losses = fit(model, [*parameters, *head], x, 20)
        share.remove("new")
        with refused("no parameter has moved"), share.learn(model, "new"):
            model.middle.requires_grad_(True)
            fit(model, head, x)  # as with an optimizer from before the block
    assert losses[-1] < 0.9 * losses[0]


def test_buffers_of_a_checkpoint_are_put_back_where_they_can_be():
    share, model = attached()
    model.register_buffer("of_shared_memory", torch.zeros(1).expand(3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("grown", torch.zeros(1))
    model.register_buffer("cache", torch.zeros(3), persistent=False)  # no checkpoint has it
    with torch.inference_mode():
        model.register_buffer("of_inference", torch.zeros(3))
    model.norm.train()
    mean = model.norm.running_mean.clone()
    with share.learn(model, "new") as parameters:
        fit(model, parameters, batch())
        model.grown = torch.ones(3)
        model.cache += 1
    assert torch.equal(model.norm.running_mean, mean)
    assert model.grown.all()
    assert model.cache.all()


@cases("settings, lossless", ({}, True), ({"grow": False}, False))
def test_temporary_columns_reach_outside_and_end_in_a_merge(settings, lossless):
    share, model = attached(stack="updates", variance=0.9)
    share.variance = 0.1  # by its own rule a merge would take in one direction
    before = {task: share.reconstruct(task) for task in "ab"}
    k = sizes(share)
    beta = share.bases["first"][0]
    x = batch()
    with share.learn(model, "new", phi=2, p=2, **settings) as parameters:
        fit(model, parameters, x, 40)
        end = model(x)
    share.select("new")
    delta = share.reconstruct("new").delta("first")
    assert (delta - beta @ (beta.T @ delta)).norm() > 0.01 * delta.norm()
    assert torch.equal(share.bases["first"][0][:, : k[0]], beta) == lossless
    assert (relative(model(x), end) < 1e-6) == lossless
    assert (error(share, before) < 1e-6) == lossless
    for size, now in zip(k, sizes(share), strict=True):
        assert size + 2 * lossless <= now <= size + 2


# --- The share's file
def test_a_saved_share_loads_with_every_number_the_same(tmp_path):
    adapters = make_adapters(["a/b", "a_b", "", "Ω", "tensor"])
    adapters["tensor"].extras["tensor"] = torch.randn(2, 2).half()
    adapters["tensor"].config["tensor"] = {"tensor": 3}
    del adapters["a_b"].factors["first"]
    share = Share.from_adapters(adapters, stack="updates", variance=torch.tensor(0.9))
    share.select("a/b")
    with torch.device("meta"):  # a default device plays no part
        share.save(tmp_path / "share")
    loaded = Share.load(tmp_path / "share")
    assert_all_equal(tensors(loaded), tensors(share))
    for name in ("tasks", "layers", "stacking", "variance"):
        assert getattr(loaded, name) == getattr(share, name)
    assert loaded.retained() == share.retained()
    assert loaded.selected is None
    back = loaded.reconstruct("tensor")
    assert back.config == {"tensor": {"tensor": 3}}
    assert torch.equal(back.extras["tensor"], adapters["tensor"].extras["tensor"])
    for task in share.tasks:
        share.remove(task)
    share.save(tmp_path / "share")  # its bases, without tasks
    assert_all_equal(tensors(Share.load(tmp_path / "share")), bases(share))


def test_nothing_in_the_header_grows_with_the_tasks(tmp_path):
    shapes = {f"layer {i}": (3, 3) for i in range(10)}
    names = ["Ω" + "n" * 10_000 + str(i) for i in range(110)]
    headers = []
    for t in (10, 110):
        adapters = make_adapters(names[:t], (1,), shapes, torch.float32)
        for adapter in adapters.values():
            adapter.config = {"words": "w" * 37_000}
        Share.from_adapters(adapters, k=1).save(tmp_path / "share")
        raw = (tmp_path / "share").read_bytes()
        headers.append(int.from_bytes(raw[:8], "little"))
        with safetensors.safe_open(tmp_path / "share", "pt") as file:  # as any reader does
            assert {"0.basis.0", "0.eps.1", "state", "checksum"} <= set(file.keys())
    assert headers[1] - headers[0] < 200  # some digits of shapes and offsets


def assert_whole(share):
    """Every task that is listed has numbers in some layer, and all numbers fit their bases."""
    for task in share.tasks:
        assert share.reconstruct(task).factors
    for layer, held in share.coefficients.items():
        for pair in held.values():
            assert [len(eps) for eps in pair] == [b.shape[1] for b in share.bases[layer]]


def interrupted(interrupt, function, *arguments):
    """Call a function, and interrupt before each line of share.py, as a signal or a thread may."""

    def trace(frame, event, argument):  # nothing is traced in here
        if frame.f_code.co_filename not in files:
            return None
        lines.append(frame.f_lineno)
        interrupt()
        return trace

    files = (module.__file__, Path.write_bytes.__code__.co_filename)  # and before each of pathlib
    lines = []
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(None)
    assert len(lines) > 10


CHANGES = [
    lambda s, model: s.add("c", GOOD, p=1),
    lambda s, model: train_coefficients(s, model, "d", [batch()], square_loss, p=2),
    lambda s, model: train_coefficients(s, model, "e", [batch()], square_loss, phi=1),
    lambda s, model: train_coefficients(s, model, "b", [batch()], square_loss, finetune=True),
    lambda s, model: s.remove("b"),
    lambda s, model: s.merge({"f": GOOD}),
    lambda s, model: s.merge({"g": GOOD}, grow=True),
]


def test_each_change_shows_whole_tasks_and_spares_the_others():
    share, model = attached(variance=1.0)
    for change in CHANGES:
        before = {task: share.reconstruct(task) for task in share.tasks}
        interrupted(lambda: assert_whole(share), change, share, model)
        kept = before.keys() & set(share.tasks) - {"b"}  # b is trained on
        assert error(share, {task: before[task] for task in kept}) < 1e-9


def test_a_save_is_whole_whoever_else_changes_saves_or_loads(tmp_path):
    def interrupt():
        loaded = Share.load(path)
        assert_whole(loaded)
        seen.add(loaded.tasks[0])
        other.save(path)
        share.add(str(len(share.tasks)), GOOD)

    path = tmp_path / "share"
    share = make_share("ab")
    other = make_share("xyz")
    other.save(path)
    seen = set()
    interrupted(interrupt, share.save, path)
    assert seen == {"a", "x"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path):
    path = tmp_path / "share.safetensors"
    make_share(dtype=torch.float32).save(path)
    raw = path.read_bytes()
    Share.load(path)
    damaged = [raw[:n] for n in (0, 1, 8, 100, len(raw) - 1)] + [b"\x80\x02.", raw + b"\0"]
    damaged.append(safetensors.torch.save({"weight": torch.ones(2)}))
    damaged.append((21).to_bytes(8, "little") + b'{"__metadata__":null}')
    for i in torch.randint(0, len(raw), (200,)).tolist():  # and any flipped bit
        damaged.append(raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with refused("share.safetensors is not a Share file"):
            Share.load(path)
    with pytest.raises(FileNotFoundError):
        Share.load(tmp_path / "none")


@cases(
    "save, words",
    (lambda s, path: s.save(path / "share"), "set is not JSON serializable"),
    (lambda s, path: make_share().save(path), "test_a_save"),
    (lambda s, path: save_peft(s.reconstruct("c"), path), "JSON cannot hold the config"),
    (lambda s, path: save_peft(s.reconstruct("c"), path / "new"), "JSON cannot hold the config"),
    (lambda s, path: save_peft(unfit(GOOD_B[:, :1], GOOD_A), path), "layer 'second'.*takes"),
)
def test_a_save_that_fails_says_why_and_leaves_what_was(tmp_path, save, words):
    share = make_share()
    share.save(tmp_path / "share")
    save_peft(share.reconstruct("a"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    share.add("c", Adapter(GOOD.factors, config={"x": {3, 1}}))
    with pytest.raises((ValueError, TypeError, OSError), match=words):
        save(share, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))


# --- Refusals: each beside what is accepted
ADAPTERS = make_adapters("ab")
GOOD = make_adapters("c")["c"]
GOOD_B, GOOD_A = GOOD.factors["second"]
UNKNOWN = r"task 'x' is unknown; the share has \['a', 'b'\]"
EYE = torch.eye(5)
EMPTY = Share.from_adapters({"a": Adapter({"first": (torch.zeros(20, 1), torch.zeros(1, 30))})})
X = [Adapter({"x": (torch.ones(n, 1), torch.ones(1, 3))}) for n in (4, 5)]
PREPARED = ("DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
WRAPPERS = [type(x, (nn.Sequential,), {}) for x in PREPARED]


def enter(share, model, task="new", **settings):
    share.learn(model, task, **settings).__enter__()


def unfit(B, A):
    return Adapter(GOOD.factors | {"second": (B, A)})


@cases(
    "call, words",
    *[(lambda s, m, v=v: build_basis(EYE, v), "variance is") for v in (0, -0.1, 1.01, torch.nan)],
    *[(lambda s, m, v=v: build_basis(EYE, v), "variance is") for v in ("0.9", None)],
    *[(lambda s, m, k=k: build_basis(EYE, k=k), "k is") for k in (0, -1, 1.5, True)],
    *[(lambda s, m, x=x: build_basis(x), "the stack") for x in (EYE[0], EYE[:, :0], EYE / 0)],
    (lambda s, m: build_basis(EYE * 1j), "the stack"),
    (lambda s, m: Share(variance=0), "variance is 0"),
    *[(lambda s, m, v=v: Share.from_adapters(ADAPTERS, **{v: 0}), f"{v} is 0") for v in "kp"],
    (lambda s, m: Share.from_adapters(ADAPTERS, stack="rows"), "stack is 'rows'.*updates"),
    *[(lambda s, m, x=x: Share.from_adapters(x), "adapters is empty or no") for x in ({}, [GOOD])],
    (lambda s, m: Share.from_adapters({"a": Adapter({})}), "task 'a': its adapter has no layers"),
    (lambda s, m: s.add("c", unfit(GOOD_B, GOOD_A[:, :-1])), r"takes \(40, r\) and \(r, 12\)"),
    (lambda s, m: s.add("c", unfit(GOOD_B[:-1], GOOD_A)), r"takes \(40, r\) and \(r, 12\)"),
    (lambda s, m: s.add("c", unfit(GOOD_B[:, :-1], GOOD_A)), r"takes \(n, r\) and \(r, d\)"),
    (lambda s, m: s.add("c", unfit(GOOD_B[:, :, None], GOOD_A)), r"'c', layer 'second'.*takes \(n"),
    (lambda s, m: s.add("c", unfit(GOOD_B, GOOD_A[:, :, None])), r"'c', layer 'second'.*takes \(n"),
    (lambda s, m: s.add("c", unfit(GOOD_B[:, :0], GOOD_A[:0])), r"'c', layer 'second'.*takes \(n"),
    (lambda s, m: s.add("c", unfit(GOOD_B / 0, GOOD_A)), "'c', layer 'second'.*infinity"),
    (lambda s, m: s.add("c", unfit(GOOD_B, 0 / GOOD_A.tril())), "'c', layer 'second'.*NaN"),
    (lambda s, m: s.add("c", unfit(GOOD_B, GOOD_A + 0j)), "'c', layer 'second'.*floats"),
    (lambda s, m: s.merge({"c": X[0], "d": X[1]}), "'d', layer 'x'"),
    (lambda s, m: s.merge({"a": GOOD}), "task 'a' exists"),
    (lambda s, m: s.merge({"c": GOOD}, variance=1.5, grow=True), "variance is 1.5"),
    (lambda s, m: s.merge({"c": GOOD}, k=0, grow=True), "k is 0"),
    (lambda s, m: s.add(3, GOOD), "task 3 .*is no string"),
    (lambda s, m: s.add("c", GOOD, p=0), "p is 0"),
    (lambda s, m: s.add("c", X[0]), "layer 'x': no bases"),
    *[(lambda s, m, f=f: f(s, "x"), UNKNOWN) for f in (Share.select, Share.remove)],
    *[(lambda s, m, f=f: f(s, "x"), UNKNOWN) for f in (Share.reconstruct, train.num_parameters)],
    (lambda s, m: s.select(["a", "x"]), UNKNOWN),
    (lambda s, m: s.select(5), "task 5 is unknown"),
    (lambda s, m: s.select([["a"]]), r"task \['a'\] is unknown"),
    (lambda s, m: s.factors("first", "x"), UNKNOWN),
    (lambda s, m: make_share().attach(nn.Identity()), "the model has no layer 'first'"),
    (lambda s, m: s.detach(nn.Identity()), "no layer of the model is attached"),
    (lambda s, m: s.detach(nn.Sequential(m.first), "a"), "layer 'second' is not attached"),
    *[(lambda s, m, cls=cls: enter(s, nn.Sequential(cls(m))), cls.__name__) for cls in WRAPPERS],
    (lambda s, m: enter(s, nn.Identity()), "layer 'first' is not attached"),
    *[(lambda s, m, p=p: enter(s, m, p=p), "p is") for p in (0, None, 1.5)],
    *[(lambda s, m, v=v: enter(s, m, sigma=v), "sigma is") for v in (0, -1, torch.inf, torch.nan)],
    *[(lambda s, m, v=v: enter(s, m, phi=v), f"phi is {v}; .* k, 4") for v in (-1, 1.0, 4)],
    (lambda s, m: enter(Share(), m, phi=1), "phi is 1; .* k, 0"),
    (lambda s, m: enter(s, m, "a"), "task 'a' exists"),
    (lambda s, m: enter(EMPTY, EMPTY.attach(net()), phi=0), "task 'new' has nothing to train"),
    (lambda s, m: enter(s, m, "a", finetune=True, phi=1), "phi is 1"),
    (lambda s, m: enter(EMPTY, m, "a", finetune=True), "task 'a' has nothing to train"),
    (lambda s, m: enter(s, m, "x", finetune=True), UNKNOWN),
    (lambda s, m: average(s, "", "new"), "adapter has no layers"),
    *[(lambda s, m, x=x: attach_lora(net(), x), "ends the name of no") for x in ([], ["third"])],
    (lambda s, m: attach_lora(net(), ["first"], 0), "r is 0"),
    *[(lambda s, m, x=x: Router.fit({"b": x}), "'b': f") for x in (EYE[:1], EYE[0], EYE[0, 0])],
    (lambda s, m: Router.fit({"b": EYE / 0}), "'b': features"),
    (lambda s, m: Router.fit({"b": EYE, "c": EYE[:, :4]}), r"'c': features \(5, 4\)"),
    (lambda s, m: Router.fit({}), "features is empty"),
    (lambda s, m: Router.fit({"a": EYE}).route(EYE[:, 1:]), r"features \(5, 4\) are not \(N, 5\)"),
)
def test_what_cannot_be_made_found_or_learned_is_refused(call, words):
    share = Share.from_adapters(ADAPTERS, variance=1.0, k=4, p=1, stack="updates")
    model = share.attach(net())
    share.select("b")
    with assert_unchanged(share, model), refused(words):
        call(share, model)
    train_coefficients(share, model, "new", [batch()], square_loss, phi=3)
    share.add("c", GOOD, p=1)
    share.merge({"d": GOOD}, variance=1.0, k=1)


# --- train.py: LoRA and PEFT's files
LAYERS = {"model.layers.0.q_proj": (20, 30), "model.layers.1.q_proj": (20, 30), "lm_head": (7, 20)}
DROPPED = "eva_config corda_config loftq_config rank_pattern alpha_pattern exclude_modules "
DROPPED += "layers_to_transform layers_pattern"  # what finished weights do not need


def test_a_lora_layer_starts_as_the_base_and_trains_its_factors():
    plain = net(torch.float32)
    model = attach_lora(copy.deepcopy(plain), ["first", "second"], r=4)
    x = batch(torch.float32)
    assert torch.equal(model(x), plain(x))
    trained = {name: q for name, q in model.named_parameters() if q.requires_grad}
    assert trained.keys() == {f"{layer}.lora_{x}" for layer in SHAPES for x in "AB"}
    for parameter in trained.values():
        nn.init.normal_(parameter)
    adapter = lora_adapter(model)
    h = nn.functional.linear(x, plain.first.weight + adapter.delta("first"), plain.first.bias)
    assert torch.allclose(model.first(x), h, atol=1e-4)


@cases("targets, found", (["q"], {"q", "b.q"}), (["eq", "b.q"], {"eq", "b.q"}))
def test_targets_are_whole_last_parts_of_names(targets, found):
    layers = {name: nn.Linear(2, 2) for name in ("q", "eq", "q_")}
    model = nn.ModuleDict(layers | {"b": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    attach_lora(model, iter(targets))
    assert lora_adapter(model).factors.keys() == found


def peft_directory(path, changes=(), extras=(), dtype=torch.float32, r=4):
    """A directory as PEFT writes it, with changes to its config; its factors as stored."""
    factors = make_adapters("a", (r,), LAYERS, torch.float32)["a"].factors
    factors = {x: (B.to(dtype), A.to(dtype)) for x, (B, A) in factors.items()}
    save_peft(Adapter(factors, dict(extras)), path)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
    config |= {"base_model_name_or_path": "some/model", "bias": "none", **dict(changes)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return factors


@variants(dtype=[torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@cases(
    "changes, scaling",
    ({}, [2, 2, 2]),
    ({"use_rslora": True}, [4, 4, 4]),
    ({"rank_pattern": {"q_proj": 4}, "r": 9}, [2, 2, 2]),
    ({"alpha_pattern": {"layers.0.q_proj": 1, "q_proj": 2}}, [0.25, 0.5, 2]),
    ({"alpha_pattern": {r".*\.1\..*": 16, "^lm_head": 4}}, [2, 4, 1]),
    ({"alpha_pattern": {"proj": 1, "m_head": 1, "q_pro": 1}}, [2, 2, 2]),
    ({"alpha_pattern": {"q_proj": 2}, "use_rslora": True, "r": 9}, [1, 1, 4]),
)
def test_the_scaling_is_folded_in_as_peft_computes_it(tmp_path, changes, scaling, dtype):
    stored = peft_directory(tmp_path / "a", changes, dtype=dtype)
    adapter = load_peft(tmp_path / "a")
    for (layer, (B, A)), scale in zip(stored.items(), scaling, strict=True):
        assert relative(adapter.delta(layer), scale * (B.float() @ A.float())) < 1e-6
        assert adapter.factors[layer][0].dtype == torch.float32


@variants(r=[1, 7, 20, 50])
def test_a_peft_directory_goes_through_a_share_and_out_again(tmp_path, r):
    extras = {"base_model.model.head.weight": torch.randn(3, 2).half()}
    changes = {"lora_alpha": 3, "use_rslora": True, "init_lora_weights": "eva"}
    peft_directory(tmp_path / "in", dict.fromkeys(DROPPED.split()) | changes, extras, r=r)
    adapter = load_peft(tmp_path / "in")
    share = Share.from_adapters({"a": adapter}, variance=1.0)
    assert list(adapter.factors) == sorted(adapter.factors)  # learning starts alike in any process
    save_peft(share.reconstruct("a"), tmp_path / "out")
    back = load_peft(tmp_path / "out")
    assert error(share, {"a": back}) < 1e-5
    assert error(share, {"a": adapter}) < 1e-5
    assert_all_equal(back.extras, extras)
    for key in ("base_model_name_or_path", "bias"):
        assert back.config[key] == adapter.config[key]
    assert back.config.keys().isdisjoint(DROPPED.split())
    assert back.config["init_lora_weights"] is True


def test_save_peft_names_every_layer_and_gives_all_one_rank(tmp_path):
    factors = {"h.0.q": (torch.randn(8, 1), torch.randn(1, 8))}
    factors["h.1.v"] = torch.randn(8, 3), torch.randn(3, 8)
    save_peft(Adapter(factors, config={"target_modules": ["q"]}), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert written["target_modules"] == r"h\.0\.q|h\.1\.v"
    assert written["r"] == written["lora_alpha"] == 3
    for layer, (B, A) in factors.items():  # a reader that scales by lora_alpha / a tensor's rank
        stored_A = stored[f"base_model.model.{layer}.lora_A.weight"]
        stored_B = stored[f"base_model.model.{layer}.lora_B.weight"]
        assert stored_A.shape == (3, 8)
        assert relative(stored_B @ stored_A, B @ A) < 1e-6


VARIANTS = {name: True for name in ("use_dora", "lora_bias", "use_qalora", "target_parameters")}
VARIANTS |= {"peft_type": "LOHA", "init_lora_weights": "pissa", "layer_replication": [[0, 1]]}
VARIANTS |= {"alora_invocation_tokens": [1], "trainable_token_indices": [1], "use_bdlora": True}
VARIANTS |= {f"{name}_config": {"r": 1} for name in ("arrow", "kasa", "monteclora")}
Q = "base_model.model.q_proj.lora_"
ONES = torch.ones(1, 3, 3)


@cases(
    "changes, extras, words",
    *[({name: value}, {}, f"is no plain LoRA .*{name}") for name, value in VARIANTS.items()],
    *[({"lora_alpha": value}, {}, "layer '.*no scaling") for value in (None, "x")],
    *[({"alpha_pattern": value}, {}, "layer '.*no scaling") for value in ([1], {"(": 2})],
    *[({}, {Q + x: ONES[0, 0]}, f"{x}' is no") for x in ("magnitude_vector", "B.bias")],
    ({"modules_to_save": ["head"]}, {Q + "embedding_A": ONES[0]}, "embedding_A' is no"),
    ({}, {Q + "B.weight": ONES[0]}, "layer 'q_proj' has no A"),
    ({}, {Q[17:] + "A.weight": ONES[0]}, "'q_proj.lora_A.weight' is no base_model.model.LAYER"),
    ({}, {Q + "A.weight": ONES[0]}, r"layer 'q_proj' has no A \(r, d\) with a B \(n, r\)"),
    ({}, {Q + "A.weight": ONES[0, :2], Q + "B.weight": ONES[0]}, "layer 'q_proj' has no A"),
    ({}, {Q + "A.weight": ONES[0, :0], Q + "B.weight": ONES[0, :, :0]}, "layer 'q_proj' has no A"),
)
def test_what_is_no_plain_lora_is_refused_by_directory(tmp_path, changes, extras, words):
    plain = {"use_dora": False, "init_lora_weights": "gaussian", "target_parameters": []}
    plain |= {"alpha_pattern": {"q": 2}, "modules_to_save": ["lora_head"]}
    heads = {f"{Q[:-5]}bias": ONES, "base_model.model.lora_head.weight": ONES}
    heads["base_model.model.my_lora_head.weight"] = ONES
    default = {Q + x: ONES[0] for x in ("A.default.weight", "B.default.weight")}
    peft_directory(tmp_path / "a", plain, heads | default)
    adapter = load_peft(tmp_path / "a")
    assert adapter.extras.keys() == heads.keys()
    assert torch.allclose(adapter.delta("q_proj"), 8 / 3 * ONES[0] @ ONES[0])
    peft_directory(tmp_path / "a", changes, extras)
    with refused(f"a(:|,)? .*{words}"):
        load_peft(tmp_path / "a")


@variants(name=["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_or_missing_peft_file_is_refused_by_name(tmp_path, name):
    peft_directory(tmp_path)
    cut = (tmp_path / name).read_bytes()[:-3]
    for content in [cut] + [b"3", b"[1]", b'"words"'] * name.endswith("json"):
        (tmp_path / name).write_bytes(content)
        with refused(f"{tmp_path.name} is damaged"):
            load_peft(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_peft(tmp_path)
    peft_directory(tmp_path)
    safetensors.torch.save_file({"head": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with refused("has no LoRA weights"):
        load_peft(tmp_path)


# --- Against the real PEFT, transformers and accelerate, where they are installed
installed = functools.partial(pytest.importorskip, reason="not installed; .ci/run has it")


def random_model(kind):
    """A transformers model with random weights, and settings of LoRA adapters for it."""
    warnings.simplefilter("ignore")  # theirs
    transformers = installed("transformers")
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        config = transformers.BertConfig(**config, intermediate_size=48, num_labels=3)
        lora = {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}
        lora |= {"r": 4, "lora_alpha": 6, "alpha_pattern": {"0.attention.self.query": 3}}
        return transformers.BertForSequenceClassification(config).eval(), lora
    config = transformers.LlamaConfig(**config, intermediate_size=48, num_key_value_heads=1)
    lora = {"target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    lora |= {"r": 40, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"k_proj": 2}}
    return transformers.LlamaForCausalLM(config).eval(), lora


@variants(kind=["bert", "llama"])
def test_real_peft_and_we_read_each_other_with_equal_outputs(tmp_path, kind):
    peft = installed("peft")
    base, settings = random_model(kind)
    tokens = torch.randint(50, (3, 7))
    expected = {}
    for name in ("one", "two"):
        wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
        for parameter in filter(lambda q: q.requires_grad, wrapped.parameters()):
            nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(tmp_path / name)
        expected[name] = wrapped(tokens).logits
    adapters = {name: load_peft(tmp_path / name) for name in expected}
    share = Share.from_adapters(adapters, variance=1.0)
    model = share.attach(copy.deepcopy(base))
    for name, logits in expected.items():
        back = share.reconstruct(name)
        save_peft(back, tmp_path / "out")
        written = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
        head = {n.removeprefix("base_model.model."): t for n, t in back.extras.items()}
        model.load_state_dict(head, strict=False)
        share.select(name)
        assert relative(written(tokens).logits, logits) < 1e-5
        assert relative(model(tokens).logits, logits) < 1e-5


def test_real_peft_takes_full_names_and_any_rank_and_lora_heads(tmp_path):
    peft = installed("peft")
    inner = nn.Sequential(nn.ReLU(), nn.Linear(4, 3))  # "2.0" ends as "0" does, and is no layer
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), inner)
    model.add_module("lora_head", nn.Linear(3, 2))
    factors = {"0": (torch.randn(4, 1), torch.randn(1, 5))}
    factors["2.1"] = torch.randn(3, 2), torch.randn(2, 4)
    head = {"lora_head.weight": torch.ones(2, 3), "lora_head.bias": torch.ones(2)}
    extras = {f"base_model.model.{name}": tensor for name, tensor in head.items()}
    config = {"init_lora_weights": "orthogonal", "modules_to_save": ["lora_head"]}
    adapter = Adapter(factors, extras, config)
    save_peft(adapter, tmp_path)
    written = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    share = Share.from_adapters({"a": adapter}, variance=1.0)
    model.load_state_dict(head, strict=False)
    share.attach(model)
    share.select("a")
    x = torch.randn(2, 5)
    assert relative(written(x), model(x)) < 1e-5
    written.save_pretrained(tmp_path / "again")
    assert load_peft(tmp_path / "again").extras.keys() == adapter.extras.keys()


@cases("phi, reentrant", (0, None), (2, True), (0, False))
def test_real_trainer_learns_our_parameters_and_checkpoints(tmp_path, phi, reentrant):
    installed("accelerate")
    transformers = installed("transformers")
    model, _ = random_model("llama")
    shapes = {f"model.layers.{i}.self_attn.v_proj": (16, 32) for i in (0, 1)}
    share = make_share("ab", torch.float32, shapes, variance=1.0)
    share.attach(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    settings = {"max_steps": 20, "learning_rate": 0.1, "logging_steps": 1, "save_steps": 10}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(tmp_path, **settings)
    tokens = torch.randint(50, (8, 7))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    with share.learn(model, "new", phi=phi) as parameters:
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        assert trainer.get_num_trainable_parameters() == sum(q.numel() for q in parameters)
        end = model.eval()(tokens).logits
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (tmp_path / "checkpoint-20").is_dir()
    share.select("new")
    assert relative(model(tokens).logits, end) < 1e-4


# --- train.py: Router and average
def test_a_router_is_worked_out_by_hand():
    features = {"a": torch.tensor([[1.0], [3.0]]), "b": torch.tensor([[11.0], [13.0]])}
    features["a"].requires_grad_()  # as a model's hidden state does; it must leave no graph
    router = Router.fit(features)  # every sample is 2 from the other one of its task: 1, scaled
    assert router.radius == pytest.approx((1 + 4.5) / 2)  # to the own, the nearer other
    x = torch.tensor([[-3.4], [-3.6], [6.9], [17.4], [17.6], [torch.nan]])
    assert router.route(x) == ["a", None, "a", "b", None, None]
    assert not router.means.requires_grad
    assert Router.fit({"a": features["a"]}).radius == pytest.approx(1.0)
    for constant in (torch.zeros(2, 1), torch.zeros(2, 2)):  # a feature, or all of them
        flat = torch.cat([features["a"], constant], 1)[:, -2:]
        assert Router.fit({"a": flat}).radius < float("inf")


@variants(apart=[0.5, 3.0, 30.0], origin=[0, 1e8])
def test_a_router_is_as_its_docstring_says(apart, origin):
    def distance(r):  # Mahalanobis'
        return (r @ torch.linalg.solve(C, r)).sqrt()

    samples = origin + apart * randn(3, 1, 4) + randn(3, 60, 4) @ randn(4, 4)
    residuals = []
    for x in samples:
        residuals += [x[i] - torch.cat([x[:i], x[i + 1 :]]).mean(0) for i in range(60)]
    C = sum(torch.outer(r, r) for r in residuals) / 180
    C = 0.9 * C + 0.1 * C.diagonal().diag()
    to_own = torch.stack([distance(r) for r in residuals])
    to_others = []
    for a, b, c in (samples, samples[[1, 2, 0]], samples[[2, 0, 1]]):
        to_others += [min(distance(x - b.mean(0)), distance(x - c.mean(0))) for x in a]
    own, others = to_own.quantile(0.98), torch.stack(to_others).quantile(0.02)
    router = Router.fit(dict(zip("cab", samples, strict=True)))  # in no order
    assert router.route(torch.stack([x.mean(0) for x in samples])) == ["c", "a", "b"]
    assert router.radius == pytest.approx(max(own, (own + others) / 2).item())
    r = samples[0][0] - samples[1][0]
    assert float((r @ router.scale).norm()) == pytest.approx(float(distance(r)))


def test_a_feature_that_hardly_varies_decides_nothing():
    x = randn(50, 2) * torch.tensor([1.0, 1e-9])
    router = Router.fit({"a": x})
    assert router.route(x + torch.tensor([0.0, 1e-7])) == router.route(x)


def test_the_average_is_the_best_fit_to_the_mean_of_the_updates():
    adapters = make_adapters("abc")
    del adapters["b"].factors["second"]
    share = Share.from_adapters(adapters, variance=1.0)
    average(share, "abcabc", "all")  # each counts twice
    average(share, ["a", "c"], "two", p=2)
    for layer, tasks in (("first", "abc"), ("second", "ac")):
        mean = sum(adapters[t].delta(layer) for t in tasks) / 3  # a task without a layer adds 0
        assert relative(share.reconstruct("all").delta(layer), mean) < 1e-6
    width = share.coefficients["first"]["all"][0].shape[1]
    assert width <= max(sizes(share))  # not the columns of all tasks together
    mean = (adapters["a"].delta("first") + adapters["c"].delta("first")) / 2
    assert relative(share.reconstruct("two").delta("first"), best(mean, 2)) < 1e-6


# --- train.py: the experiment
TINY = dict(width=16, base_steps=2, later=2, lora_steps=2, steps=2, joint_steps=2, test=8, first=2)
FLAGS = ("--all", "--seeds 2", "--json x", "--svg x", "--quick", "--sweep", "--scaling")
README = (Path(__file__).parent / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MATRIX = [[0.6, 0.9, 0.2], [0.9, 0.8, 0.1], [0.7, 0.5, 1.0]]  # row i: after learning task i


def test_the_metrics_are_those_worked_out_by_hand():
    metrics = train.metrics(MATRIX, trained=1, stored=2)
    assert metrics["acc"] == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert metrics["bwt"] == pytest.approx(((0.7 - 0.6) + (0.5 - 0.8)) / 2)
    assert metrics["forgetting"] == pytest.approx(((0.9 - 0.7) + (0.9 - 0.5)) / 2)
    assert train.metrics([[0.5, 0.0], [0.9, 1.0]], 1, 2)["forgetting"] == pytest.approx(-0.4)


def test_the_spread_is_the_standard_deviation():
    assert train.spread([1.0, 2.0, 4.5], 2) == "2.50 ± 1.80"  # sqrt((1.5² + 0.5² + 2²) / 2)


def test_share_breaks_even_when_lora_for_each_task_stores_more():
    share = {"stored": 130, "trained_per_task": 10, "accuracy_matrix": MATRIX}  # bases of 100
    methods = {"share": share, "lora": {"trained_per_task": 30}}  # 100 + 10 t < 30 t from 6 on
    assert train.break_even(methods, "lora", first=2) == 6
    assert train.break_even(methods, "lora", first=8) == 8
    for trained in (10, 9):
        methods["lora"]["trained_per_task"] = trained
        assert train.break_even(methods, "lora", first=2) is None


def test_the_key_is_added_to_the_message_over_and_over():
    tokens, answer = train.make_batch(torch.Generator(), torch.tensor([[1, 2, 15]]))
    assert torch.equal(answer, (tokens[:, 3:] + torch.tensor([1, 2, 15] * 4).to(tokens)) % 16)


def test_the_picture_has_a_cell_for_each_accuracy_of_both():
    row = {"accuracy_matrix": [[0.9, 0.1], [0.7, 0.5]], "acc": 0.6, "forgetting": -0.0}
    root = ElementTree.fromstring(train.svg({"lora_sequential": row, "share": row}, 7))
    shades = [e.get("fill-opacity") for e in root.iter() if e.tag.endswith("rect")]
    assert shades == ["0.90", "0.10", "0.70", "0.50"] * 2
    words = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"One LoRA, seed 7", "Share, seed 7", "ACC 0.60, forgetting 0.00"} <= set(words)


@cases(
    "name, key, value, claim",
    ("share", "trained_per_task", 10.1, "LoRA's trained"),
    ("lora_sequential", "forgetting", 0.49, "lora_sequential: forgetting"),
    *[(f"share{x}", "acc", 0.97, f"share{x}: ACC / lora") for x in ("", "_merge", "_grow")],
    *[(f"share{x}", "forgetting", 0.021, f"share{x}: forg") for x in ("", "_merge", "_grow")],
    ("share", "forgetting", 0.011, "share: forgetting"),
    ("share_routed", "acc", 0.98, "share_routed: ACC"),
    ("share_routed", "base_kept", 0.94, "share_routed: base"),
    ("random_basis", "acc", 1.01, "random_basis: ACC"),
)
def test_a_claim_that_does_not_hold_is_an_error(name, key, value, claim):
    names = "lora_per_task lora_sequential share share_merge share_grow share_routed random_basis"
    good = {"acc": 1.0, "forgetting": 0.0, "trained_per_task": 1000, "base_kept": 0.95}
    methods = {name: dict(good) for name in names.split()}
    methods["share"]["trained_per_task"] = 10
    methods["lora_sequential"]["forgetting"] = 0.5
    methods["random_basis"]["acc"] = 0.9
    train.check(methods)
    train.check({name: methods[name] for name in names.split()[:3]})  # of a run without --all
    methods[name][key] = value
    with pytest.raises(AssertionError, match=claim + ".* is not between"):
        train.check(methods)


@variants(phi=[0, 1])
def test_a_row_has_what_was_trained_stored_and_measured(phi):
    e = train.Experiment(train.Settings(**TINY | {"later": 1}))
    adapters, _ = e.lora_per_task("lora", 8, 0.1)
    share = Share.from_adapters({name: adapters[name] for name in e.names[:2]})
    trained = sum(k + phi + phi * n for n, k in [basis.shape for basis in bases(share)])
    model, row = e.learn_tasks("share", share, [[0.0] * 3] * 2, phi)
    assert row["trained_per_task"] == trained
    assert row["stored"] == sum(tensor.numel() for tensor in tensors(share))
    assert e.lora_sequential()["accuracy_matrix"][0][1:] == e.base_accuracies[1:]  # not yet learned
    for j, (tokens, answer) in enumerate(e.tests):
        share.select(e.names[j])
        right = model(tokens)[:, 3:, :16].argmax(-1) == answer
        assert row["accuracy_matrix"][2][j] == pytest.approx(right.double().mean().item())


def recorded(monkeypatch, owner, name):
    """[(arguments, settings)] of each call of a function that will be made; shares are copied."""

    def record(*arguments, **settings):
        copies = [copy.deepcopy(x) if isinstance(x, Share) else x for x in arguments]
        calls.append((copies, settings))
        return function(*arguments, **settings)

    calls = []
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, record)
    return calls


def test_each_row_is_of_the_method_it_is_named_after(monkeypatch):
    learned = recorded(monkeypatch, train.Experiment, "learn_tasks")
    monkeypatch.setattr(Router, "route", lambda self, features: [None] * len(features))
    rows = train.compare(train.Settings(**TINY), everything=True)
    ways = {"share": {"phi": 0}, "share_merge": {"phi": 1, "grow": False}}
    ways["share_grow"] = {"phi": 1, "grow": True}
    (e, _, built, lora_matrix), _ = learned[0]
    assert built.tasks == e.names[:2]
    assert lora_matrix is rows["lora_per_task"]["accuracy_matrix"]  # that of lora_r1 may be equal
    for (_, method, share, matrix), settings in learned[:3]:
        assert settings == ways.pop(method)
        assert matrix is lora_matrix
        assert_all_equal(tensors(share), tensors(built))
    (_, method, random, rows_before), _ = learned[3]
    assert method == "random_basis"
    assert random.tasks == rows_before == []
    for own, basis in zip(bases(random), bases(built), strict=True):
        assert own.shape == basis.shape
        assert torch.allclose(own.T @ own, torch.eye(own.shape[1]), atol=1e-5)
        assert not torch.allclose(own @ own.T, basis @ basis.T, atol=0.1)
    assert rows["share_routed"]["acc"] == sum(e.base_accuracies) / 4  # the Router said so


def test_each_method_is_trained_at_its_rate_on_its_tasks(monkeypatch):
    fits = recorded(monkeypatch, train, "fit")
    general = recorded(monkeypatch, train, "train_coefficients")
    s = train.Settings(**TINY)
    train.compare(s, everything=True)
    rates = [(arguments[2], settings.get("last_lr", 0.0)) for arguments, settings in fits]
    lora, lora_r1, of_share = (s.lora_lr, 0.0), (s.lora_r1_lr, 0.0), (s.lr, s.lr)
    assert rates[:13] == [(s.base_lr, 0.0), *[lora] * 4, *[lora_r1] * 4, *[lora] * 4]
    assert set(rates[13:]) == {of_share, lora}
    assert general[0][1] == {"p": s.general_p, "lr": s.lr, "seed": s.seed}
    batches = train.Experiment(s).mixed_batches(9)
    assert {int(tag) - 32 for tokens, _ in batches for tag in tokens[:, 0]} == {0, 1, 2, 3}


def test_the_rate_goes_in_a_line():
    def record(optimizer, arguments, settings):
        rates.append(optimizer.param_groups[0]["lr"])

    rates = []
    batches = [train.make_batch(torch.Generator(), torch.tensor([[1, 2, 3]]))] * 4
    hook = register_optimizer_step_pre_hook(record)
    train.fit(train.ToyTransformer(32, 16).to(DEVICE), batches, 0.1, last_lr=0.02)
    hook.remove()
    assert rates == pytest.approx([0.1, 0.08, 0.06, 0.04])


def test_a_row_does_not_depend_on_which_others_ran():
    s = train.Settings(**TINY)
    few = train.compare(s)
    everything = train.compare(s, everything=True)
    assert list(everything)[: len(few)] == list(few)
    assert {name: everything[name] for name in few} == few
    assert len(everything) == 12
    torch.manual_seed(9)
    assert train.Experiment(s).lora_sequential() == few["lora_sequential"]  # alone


@pytest.fixture
def tiny_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Settings", functools.partial(train.Settings, **TINY))
    monkeypatch.setattr(train, "QUICK", {})
    monkeypatch.setattr(train, "check", lambda methods: None)  # nothing is learned in so few steps
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@variants(flags=itertools.combinations(FLAGS, 2))
def test_a_pair_of_flags_works_or_is_refused(flags, tiny_runs, capsys):
    arguments = " ".join(flags).split()
    if flags[1] in ("--sweep", "--scaling") and flags[0] != "--quick":
        with pytest.raises(SystemExit):
            train.main(arguments)
        assert "--sweep and --scaling go with --seed and --quick" in capsys.readouterr().err
    else:
        train.main(arguments)
        assert capsys.readouterr().out
        assert Path("x").exists() == ("x" in arguments)


@variants(flags=["--json no/x", "--svg no/x", "--json ..", "--seeds 0", "--unknown"])
def test_flags_that_cannot_be_followed_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        train.main(flags.split())
    assert flags.split()[-1] in capsys.readouterr().err


def test_results_are_written_in_utf_8_before_the_table(tiny_runs, monkeypatch):
    def text_encoding(encoding, level=2):  # for files: of Windows, where none is named
        return encoding or "cp1252"

    monkeypatch.setattr("io.text_encoding", text_encoding)
    monkeypatch.delattr(train, "print_table")
    with pytest.raises(NameError):
        train.main(["--json", "results", "--svg", "picture", "--seed", "3", "--seeds", "2"])
    runs = json.loads(Path("results").read_text("utf-8"))["runs"]
    assert [run["seed"] for run in runs] == [3, 4]
    assert runs[0]["methods"] != runs[1]["methods"]
    ElementTree.fromstring(Path("picture").read_text("utf-8"))


def test_the_example_of_share_py_is_the_readmes_and_runs(capsys):
    in_share = module.__doc__[module.__doc__.index("    adapters =") :].split("\n\n")[0]
    assert EXAMPLES[0].split("\n\n")[-1].strip() == textwrap.dedent(in_share).strip()
    names = {}
    exec(EXAMPLES[0], names)
    assert names["share"].tasks == ["a", "b", "new", "c"]
    assert names["model"](names["batches"][0]).shape == (8, 16, 64)
    retained = names["share"].retained()
    assert retained == pytest.approx(dict.fromkeys(names["share"].tasks, 1.0), abs=1e-5)
    assert capsys.readouterr().out == f"{retained}\n"


def test_the_readme_says_how_much_there_is_to_read():
    lines = Path(module.__file__).read_text("utf-8").splitlines()
    part_1 = [line.startswith("# --- Part 2") for line in lines].index(True)
    assert f"{len(lines):,} lines. The first {part_1} are the paper" in " ".join(README.split())


def test_the_readmes_other_examples_run(tmp_path, monkeypatch):
    def loss_fn(model, x):
        blocks = model["model"]["layers"]
        return sum(model["lm_head"](block["q_proj"](x)).square().mean() for block in blocks)

    monkeypatch.chdir(tmp_path)
    peft_directory(tmp_path / "adapters")  # PEFT's adapter "default" lies in the folder itself
    peft_directory(tmp_path / "adapters" / "one")
    (tmp_path / "adapters" / "README.md").touch()  # PEFT writes one
    layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(30, 20)}) for _ in range(2))
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": layers}), "lm_head": nn.Linear(20, 7)})
    plain = copy.deepcopy(model)
    names = {"model": model, "batches": [torch.ones(4, 30)] * 3, "loss_fn": loss_fn}
    exec(EXAMPLES[1], names)
    assert names["share"].tasks == ["adapters", "adapters/one", "new"]
    (tmp_path / "adapters" / "one").rename(tmp_path / "another")
    names["model"] = plain
    exec(EXAMPLES[2], names)
    assert names["share"].tasks == ["adapters", "adapters/one", "new", "another"]
    assert load_peft("served").factors.keys() == LAYERS.keys()
    assert not any(isinstance(m, ShareLinear) for m in plain.modules())
