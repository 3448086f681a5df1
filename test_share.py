"""Read this as the specification of Share: each test states one law and checks it.
The references are independent of the code: dense matrices, torch.linalg.svd, slow twins written
like the paper. Equality is claimed in float64. Refusals are tables of calls and words, beside what
is accepted. A law that needs PEFT, transformers or accelerate has "real" in its name.
"""
import copy
import itertools
import json
import os
import re
import warnings
import weakref
from pathlib import Path
from xml.etree import ElementTree
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
import train
from share import Adapter, Share, ShareLinear, ToyTransformer, build_basis, train_coefficients
from train import LoRALinear, Router, attach_lora, average, load_peft, lora_adapter, save_peft

pytestmark = pytest.mark.filterwarnings("error")  # a warning that is ours is a failure
torch.set_num_threads(1)  # these matrices are too small for more; a busy machine punishes it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"first": (20, 30), "second": (40, 12)}
NARROW = {"first": (3, 30), "second": (40, 2)}  # a side has fewer rows than adapters have rank
NAN, INF = float("nan"), float("inf")

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def make_adapters(tasks, ranks=(3, 2, 4), shapes=SHAPES, dtype=torch.float64, shared=None):
    """Random adapters of rank ranks[i mod len]; with `shared`, all in so many directions a side."""
    adapters = {task: Adapter({}) for task in tasks}
    for layer, shape in shapes.items():
        spans = [torch.randn(m, min(shared or m, m), dtype=dtype) for m in shape]
        left, right = (torch.linalg.qr(span).Q for span in spans)
        for adapter, r in zip(adapters.values(), itertools.cycle(ranks)):
            B = left @ torch.randn(left.shape[1], r, dtype=dtype)
            adapter.factors[layer] = B, torch.randn(r, right.shape[1], dtype=dtype) @ right.T
    return adapters

class Net(nn.Module):
    """A model that is not ours: three linear layers, one without a bias, and a normalisation."""
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(30, 20), nn.BatchNorm1d(20)
        self.middle, self.second = nn.Linear(20, 12), nn.Linear(12, 40, bias=False)
    def forward(self, x):
        return self.second(torch.tanh(self.middle(self.norm(self.first(x)))))
def make_share(tasks="ab", dtype=torch.float64, **settings):
    return Share.from_adapters(make_adapters(tasks, dtype=dtype), **settings)
def attached(tasks="ab", dtype=torch.float64, **settings):
    share = make_share(tasks, torch.promote_types(dtype, torch.float32), **settings)
    return share, share.attach(Net().to(DEVICE, dtype).eval())
def batch(dtype=torch.float64, size=16):
    return torch.randn(size, 30, dtype=dtype, device=DEVICE)
def square_loss(model, x):
    return (model(x) - 1).square().mean()

def fit(model, parameters, x, steps=5):
    """A caller's own loop: Adam on one batch; returns the losses."""
    optimizer, losses = torch.optim.Adam(parameters, lr=0.05), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = square_loss(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
def outputs(share, model, x, tasks):
    return [(share.select(task), model(x))[1] for task in tasks]
def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())
def error(share, adapters):
    """How far tasks are from their adapters: of all their layers the largest relative error."""
    pairs = [(share.reconstruct(task), adapter) for task, adapter in adapters.items()]
    return max(relative(a.delta(x), b.delta(x)) for a, b in pairs for x in b.factors)
def same_span(a, b, tolerance=1e-5):
    return a.shape == b.shape and (a @ a.T - b @ b.T).norm() < tolerance
def orthonormal(basis, tolerance):
    product = basis.double().T @ basis.double()
    return (product - torch.eye(len(product)).to(product)).abs().max() < tolerance
def sizes(share):
    return [basis.shape[1] for pair in share.bases.values() for basis in pair]
def tensors(share):
    held = [pair for tasks in share.coefficients.values() for pair in tasks.values()]
    return [tensor for pair in (*share.bases.values(), *held) for tensor in pair]
def state(share, model=nn.Identity()):
    """Everything that what fails must leave as it was, as plain values."""
    numbers = dict(enumerate(tensors(share))) | model.state_dict()
    numbers |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    numbers = {name: t.clone() for name, t in numbers.items() if t is not None}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = [(type(m), m.training) for m in model.modules()]
    return numbers, flags, share.tasks, share.selected, modules

def assert_same(before, after):
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert [name for name, t in before[0].items() if not torch.equal(t, after[0][name])] == []
class Watch(TorchDispatchMode):
    """The most bytes that the tensors made in its block have at once."""
    peak = held = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = [filter(torch.is_tensor, tree_leaves(tree)) for tree in ((args, kwargs), out)]
        given, found = ({id(t.untyped_storage()): t.untyped_storage() for t in x} for x in leaves)
        for storage in [found[place] for place in found.keys() - given.keys()]:
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())
        return out
    def change(self, size):
        self.held += size
        self.peak = max(self.peak, self.held)

# --- The slow twins, written like the paper
def slow_basis(stack, variance, center=True, least=0):
    """Phase 1, then the mean's direction added; in any case `least` columns."""
    mean = stack.mean(1, keepdim=True)
    U, S, _ = torch.linalg.svd(stack - mean if center else stack, full_matrices=False)
    k = 1
    while (S[:k] ** 2).sum() < variance * (S**2).sum():
        k += 1
    basis = torch.linalg.qr(torch.cat([U[:, :k], mean], 1)).Q if center else U[:, :k]
    return basis if basis.shape[1] >= least else torch.linalg.svd(stack).U[:, :least]

def slow_stacks(adapters, layer, stack="factors"):
    """The two stacks of a layer: all B and all A^T; or both sides of each ΔW, at unit norm."""
    sides = [], []
    for B, A in [a.factors[layer] for a in adapters.values() if layer in a.factors]:
        if stack == "updates":
            U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
            B, A = (U * S / S.norm())[:, : len(A)], (Vh.T * S / S.norm())[:, : len(A)].T
        sides[0].append(B), sides[1].append(A.T)
    return [torch.cat(side, 1) for side in sides]

def slow_merge(share, adapters, layer):
    """Phase 3 for one layer: rebuild, stack, SVD (k never smaller), project."""
    everything = {task: share.reconstruct(task) for task in share.tasks} | adapters
    sides = zip(slow_stacks(everything, layer, share.stack), share.bases[layer])
    bases = [slow_basis(x, share.variance, share.center, old.shape[1]) for x, old in sides]
    deltas = {task: a.delta(layer) for task, a in everything.items() if layer in a.factors}
    return bases, {task: project(delta, *bases) for task, delta in deltas.items()}
def project(delta, beta, alpha):
    return beta @ beta.T @ delta @ alpha @ alpha.T
def best(delta, p):
    """The nearest matrix of rank p (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :p] @ torch.diag(S[:p]) @ Vh[:p]

# --- Linear algebra
@pytest.mark.parametrize("m", [8, 60])
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_a_basis_is_orthonormal_in_float32_at_least_and_finds_a_planted_subspace(m, dtype, near):
    planted = torch.linalg.qr(torch.randn(50, 5, dtype=torch.float64)).Q
    stack = planted @ torch.randn(5, m, dtype=torch.float64)
    basis = build_basis((stack + 1e-7 * torch.randn(50, m)).to(dtype), k=5)
    assert basis.dtype == torch.promote_types(dtype, torch.float32)
    assert orthonormal(basis, 1e-6) and same_span(basis.double(), planted, near)

@pytest.mark.parametrize("variance", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_k_is_the_smallest_number_of_directions_that_explains_the_variance(shape, variance):
    stack = torch.randn(*shape, dtype=torch.float64)
    assert same_span(build_basis(stack, variance), slow_basis(stack, variance))
    plain = build_basis(stack, variance, center=False)
    assert same_span(plain, slow_basis(stack, variance, center=False))

SPECTRA = {  # of stacks so large that a few directions are searched for, where that is faster
    "few": lambda i: (i < 37) * (1 + 0.1 * i) + 1e-3, "falling": lambda i: 1 / (1 + i),
    "flat": lambda i: 2 - i / 600, "ten": lambda i: (i < 10) * (1 + 0.1 * i),
}
@pytest.mark.parametrize("n, m, turned", [(600, 600, False), (450, 900, True), (900, 450, True)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_large_stack_has_the_directions_of_a_plain_svd(spectrum, n, m, turned):
    values = SPECTRA[spectrum](torch.arange(min(n, m), dtype=torch.float64).flip(0))
    left, right = torch.randn(n, len(values)).double(), torch.randn(m, len(values)).double()
    left = torch.linalg.qr(left).Q if turned else torch.eye(n).double()
    stack = left * values @ torch.linalg.qr(right).Q.T
    assert same_span(build_basis(stack, center=False), slow_basis(stack, 0.6, False))
    assert same_span(build_basis(stack), slow_basis(stack, 0.6))
    heaviest = torch.linalg.svd(stack).U[:, : 10 if spectrum == "ten" else 15]
    assert same_span(build_basis(stack, k=15), heaviest)
    assert build_basis(stack, k=50).shape == (n, 10 if spectrum == "ten" else 50)

def test_a_large_stack_takes_no_random_numbers_and_always_gets_the_same_basis():
    stack = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 400, dtype=torch.float64)
    before = torch.get_rng_state()
    basis = build_basis(stack, k=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(build_basis(stack, k=5), basis)

def test_a_variance_that_is_met_exactly_asks_for_no_further_direction():
    stack = torch.diag(torch.tensor([2.0, 1.0, 1.0]))  # energies 4, 1, 1: five sixths are 4 + 1
    assert build_basis(stack, 5 / 6, center=False).shape == (3, 2)
    assert build_basis(stack, 5 / 6 + 1e-6, center=False).shape == (3, 3)

def test_k_caps_the_basis_and_keeps_the_mean_where_it_outweighs_a_direction():
    noise = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64)).Q * 0.1
    common = torch.ones(20, 1, dtype=torch.float64)
    basis = build_basis(noise + common, k=2)
    assert basis.shape == (20, 2) and relative(basis @ (basis.T @ common), common) < 0.02

def test_a_mean_that_lies_inside_the_basis_adds_no_direction():
    plane = torch.linalg.qr(torch.randn(20, 2, dtype=torch.float64)).Q
    stack = plane @ (torch.randn(2, 9, dtype=torch.float64) + 3)
    assert build_basis(stack, 1.0).shape == (20, 2)
    assert build_basis(stack + 1e-9 * torch.randn(20, 1, dtype=torch.float64), 1.0).shape == (20, 2)

def test_a_zero_stack_has_no_direction_and_a_single_column_has_one():
    column = torch.randn(7, 1)
    assert build_basis(0 * column).shape == (7, 0)
    assert torch.allclose(build_basis(column).abs(), (column / column.norm()).abs(), atol=1e-6)
    assert build_basis(torch.full((99, 99), 999.0).half()).shape == (99, 1)  # its norm is inf

@pytest.mark.parametrize("stack, settings, words", [
    *[(torch.eye(5), {"variance": v}, "variance is") for v in (0, -0.1, 1.01, NAN)],
    *[(torch.eye(5), {"k": k}, "k is") for k in (0, -1, 1.5, True)],
    *[(s, {}, "the stack") for s in (torch.ones(5), torch.ones(5, 0), torch.eye(5) / 0)],
])
def test_build_basis_refuses_what_has_no_directions(stack, settings, words):
    assert build_basis(torch.eye(5), variance=1.0).shape == build_basis(torch.eye(5), k=5).shape
    with pytest.raises(ValueError, match=words):
        build_basis(stack, **settings)

# --- One side of a layer: phases 1 and 3
@pytest.mark.parametrize("shapes", [SHAPES, NARROW])
@pytest.mark.parametrize("stack", ["factors", "updates"])
def test_each_layer_and_side_has_the_basis_of_its_own_stack(stack, shapes):
    adapters = make_adapters("abcd", (5, 3), shapes)
    share = Share.from_adapters(adapters, variance=0.6, stack=stack)
    for layer in shapes:
        for basis, side in zip(share.bases[layer], slow_stacks(adapters, layer, stack)):
            assert same_span(basis, slow_basis(side, 0.6, center=stack == "factors"))
    assert len(set(sizes(share))) > 1

def test_coefficients_are_the_least_squares_solution_in_the_basis():
    adapters = make_adapters("abc")
    share = Share.from_adapters(adapters, variance=0.6)
    for layer, task in itertools.product(SHAPES, "abc"):
        B, A = adapters[task].factors[layer]
        for e, basis, factor in zip(share.coefficients[layer][task], share.bases[layer], (B, A.T)):
            assert torch.allclose(e, torch.linalg.lstsq(basis, factor).solution, atol=1e-9)

def test_stacked_updates_do_not_depend_on_how_an_update_is_split_or_on_its_size():
    adapters = make_adapters("abcd")
    changed = copy.deepcopy(adapters)
    for i, adapter in enumerate(changed.values()):
        for layer, (B, A) in adapter.factors.items():
            G = torch.randn(len(A), len(A), dtype=A.dtype)
            adapter.factors[layer] = 10.0**i * B @ G, torch.linalg.solve(G, A)
    one, other = (Share.from_adapters(a, stack="updates", p=2) for a in (adapters, changed))
    for layer in SHAPES:
        assert all(map(same_span, one.bases[layer], other.bases[layer]))
        for i, task in enumerate(adapters):
            delta = other.reconstruct(task).delta(layer) / 10.0**i
            assert relative(delta, one.reconstruct(task).delta(layer)) < 1e-5
    paper, other = (Share.from_adapters(a) for a in (adapters, changed))
    assert not same_span(paper.bases["first"][0], other.bases["first"][0], 0.1)

@pytest.mark.parametrize("stack", ["factors", "updates"])  # the mean is no part of updates
def test_merging_into_an_empty_share_gives_what_from_adapters_gives(stack):
    adapters = make_adapters("abc")
    share, made = Share(0.6, stack=stack), Share.from_adapters(adapters, variance=0.6, stack=stack)
    share.merge(adapters)
    assert error(share, {task: made.reconstruct(task) for task in adapters}) < 1e-6

def test_building_holds_two_stacks_at_a_time():
    names, shapes = [str(i) for i in range(100)], {"first": (512, 512), "second": (512, 512)}
    adapters = make_adapters(names, (8,), shapes, torch.float32, shared=8)
    with Watch() as watch:
        Share.from_adapters(adapters)
    assert 1 < watch.peak / (512 * 800 * 8) < 2  # of one in float64; the adapters are in float32

@pytest.mark.parametrize("rule", ["factors centred", "factors", "updates"])
@pytest.mark.parametrize("t, shared", [(1, None), (8, None), (8, 3), (60, None), (60, 3)])
def test_a_merge_equals_rebuilding_stacking_and_projecting_everything(t, shared, rule):
    adapters = make_adapters([str(i) for i in range(t)], (3, 1, 5), shared=shared)
    rule = {"stack": rule.split()[0], "center": "centred" in rule}
    share = Share.from_adapters(adapters, variance=0.8, **rule)
    for name in "xyz":
        new = make_adapters([name, name + "'"], (4, 2))
        del new[name].factors["second"]
        slow = {layer: slow_merge(share, new, layer) for layer in SHAPES}
        share.merge(new)
        for layer, (bases, deltas) in slow.items():
            assert all(map(same_span, share.bases[layer], bases))
            for task, delta in deltas.items():
                assert relative(share.reconstruct(task).delta(layer), delta) < 1e-5

@pytest.mark.parametrize("shapes", [SHAPES, NARROW])
@pytest.mark.parametrize("stack", ["factors", "updates"])
def test_a_growing_merge_moves_no_earlier_update_and_returns_the_new_one(stack, shapes):
    held = make_adapters("abc", shapes=shapes, dtype=torch.float32)
    share = Share.from_adapters(held, stack=stack)
    for name in "xyz":
        before, k = {task: share.reconstruct(task) for task in share.tasks}, sizes(share)
        new = make_adapters(name, shapes=shapes, dtype=torch.float32)
        share.merge(new, variance=1.0, grow=True)
        assert error(share, before) < 1e-6 and error(share, new) < 1e-5
        assert all(0 <= after - size <= 3 for size, after in zip(k, sizes(share)))

def test_a_growing_merge_adds_nothing_for_an_adapter_inside_the_bases():
    adapters = make_adapters("abcd", shared=4)
    share = Share.from_adapters({t: adapters[t] for t in "abc"}, variance=1.0)
    before = [basis for pair in share.bases.values() for basis in pair]
    share.merge({"d": adapters["d"]}, grow=True)
    assert all(map(torch.equal, before, tensors(share)))  # the bases come first
    assert error(share, adapters) < 1e-5

@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("k, expected", [(None, None), (9, 9), (4, 4), (3, 3), (2, 3), (1, 3)])
def test_a_growing_merge_keeps_to_its_cap_and_centres_as_the_share_does(k, expected, center):
    share, new = make_share("ab", center=center, k=3), make_adapters("c", (6,))
    before = share.bases["first"]
    share.merge(new, k=k, grow=True)
    for basis, old, side in zip(share.bases["first"], before, slow_stacks(new, "first")):
        assert torch.equal(basis[:, :3], old) and basis.shape[1] == (expected or basis.shape[1])
        if k is None:
            added = slow_basis(side - old @ old.T @ side, 0.6, center)
            assert same_span(basis, torch.cat([old, added], 1))

def test_k_never_shrinks_by_itself_but_a_cap_can_make_it():
    share = make_share("abcd", variance=0.9)
    k, big = sizes(share), make_adapters("e", (1,))
    for B, _ in big["e"].factors.values():
        B *= 1000  # by the variance rule this one direction would be a basis by itself
    share.merge(big, variance=0.6)
    assert sizes(share) == k
    share.merge(make_adapters("f"), k=2)
    assert set(sizes(share)) == {2}

@pytest.mark.parametrize("removed, scale, kept", [("ab", 0, 0.999), ("a", 0, 0.999), ("a", 1, 0.2)])
def test_directions_that_no_task_uses_any_more_stay_in_the_bases(removed, scale, kept):
    adapters = make_adapters("ab", (4,), {"first": SHAPES["first"]})
    share = Share.from_adapters(adapters, variance=1.0)
    for task in removed:
        share.remove(task)
    B, A = make_adapters("c", (3,), shared=3)["c"].factors["first"]
    share.merge({"c": Adapter({"first": (scale * B, scale * A)})})
    share.add("a again", adapters["a"])
    assert share.retained()["a again"] > kept and sizes(share) == [8, 8]

def test_a_direction_that_no_task_uses_gives_way_to_a_tiny_one_that_a_task_does():
    share, adapters = make_share("a", variance=1.0), make_adapters("bc", (1,))
    share.remove("a")
    adapters["c"].factors = {x: (1e-5 * B, 1e-5 * A) for x, (B, A) in adapters["c"].factors.items()}
    share.merge(adapters, variance=0.9)
    assert share.retained() == pytest.approx({"b": 1, "c": 1})

def test_float32_bases_stay_orthonormal_over_sixty_merges_of_far_and_of_near_adapters():
    share = make_share("a", torch.float32)
    for i in range(60):
        new, k = make_adapters(["new"], (2,), dtype=torch.float32)["new"], sizes(share)
        if i % 3 == 0:  # almost inside the bases; but the little that is outside counts
            for layer, (B, A) in share.reconstruct(share.tasks[-1]).factors.items():
                nudge = new.factors[layer][0] @ torch.ones(2, len(A))
                new.factors[layer] = B + 1e-5 * nudge, A
        share.merge({str(i): new}, variance=1.0 if i == 0 else None, grow=i % 2 == 0)
        assert all(orthonormal(basis, 2e-6) for pair in share.bases.values() for basis in pair)
        assert i > 0 or sizes(share)[0] > k[0]

def test_rounding_left_of_a_lost_task_takes_no_direction_from_the_others():
    adapters = make_adapters("abcde", (4,), {"first": SHAPES["first"]}, torch.float32)
    share = Share.from_adapters({"a": adapters["a"]}, variance=1.0, stack="updates")
    alone, (beta, alpha) = copy.deepcopy(share), share.bases["first"]
    for task in "bcd":  # all outside the bases, so that only rounding is left of them
        B, A = adapters[task].factors["first"]
        outside = B - beta @ (beta.T @ B), A - (A @ alpha) @ alpha.T
        share.add(task, Adapter({"first": outside}))
    for s in (share, alone):
        s.merge({"e": adapters["e"]}, k=4)
    for task in "ae":
        assert share.retained()[task] == pytest.approx(alone.retained()[task], abs=1e-2)

@pytest.mark.parametrize("stack", ["factors", "updates"])
def test_a_merge_keeps_a_small_adapter_that_lies_in_the_bases_beside_a_large_one(stack):
    share = make_share("abc", variance=1.0, stack=stack)
    small = {"small": share.reconstruct("a")}
    for layer, (B, A) in small["small"].factors.items():
        small["small"].factors[layer] = 1e-8 * B, A
    share.merge(make_adapters(["large"]) | small, grow=True)
    assert error(share, small) < 1e-6

def test_the_variance_rule_applied_afresh_forgets_and_ours_does_not():
    adapters = make_adapters("abcdefghijklmnop", (2,), shared=8)
    first, rule = {t: adapters[t] for t in "abcd"}, 0.6
    ours, grown = (Share.from_adapters(first, variance=rule, center=False) for _ in range(2))
    published = {t: a.factors["first"] for t, a in first.items()}
    before = grown.retained()
    for task in "efghijklmnop":
        ours.merge({task: adapters[task]})
        grown.merge({task: adapters[task]}, grow=True)
        published[task] = adapters[task].factors["first"]
        held = {t: Adapter({"first": pair}) for t, pair in published.items()}
        beta, alpha = (slow_basis(x, rule, center=False) for x in slow_stacks(held, "first"))
        published = {t: (beta @ beta.T @ B, A @ alpha @ alpha.T) for t, (B, A) in published.items()}
    retained = sum(torch.mm(*published[t]).norm() ** 2 / adapters[t].delta("first").norm() ** 2
                   for t in first)
    assert retained / 4 < 0.05  # next to nothing is left of the first tasks
    assert sum(ours.retained()[t] for t in first) > 0.5 * sum(before.values())
    assert all(grown.retained()[t] == pytest.approx(before[t]) for t in first)

# --- Adapter and Share: phase 1, add, merge
@pytest.mark.parametrize("stack", ["factors", "updates"])
@pytest.mark.parametrize("common", [0.0, 100.0])
@pytest.mark.parametrize("tasks", ["a", "abcde"])
def test_with_all_the_variance_every_adapter_returns(stack, common, tasks):
    adapters = make_adapters(tasks)
    for B, _ in [pair for adapter in adapters.values() for pair in adapter.factors.values()]:
        B += common
    if tasks != "a":
        del adapters["b"].factors["first"]  # a task that leaves a layer alone
    share = Share.from_adapters(adapters, variance=1.0, stack=stack)
    for task, adapter in adapters.items():
        assert share.reconstruct(task).factors.keys() == adapter.factors.keys()
    assert error(share, adapters) < 1e-5
    assert share.retained() == pytest.approx(dict.fromkeys(tasks, 1))

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("p", [1, 2, 9])
def test_rank_p_coefficients_are_the_best_that_the_bases_allow(p, dtype):
    shapes = {"first": (3, 30), "second": (40, 12)}
    adapters, late = [make_adapters(tasks, shapes=shapes, dtype=dtype) for tasks in ("abc", "d")]
    share = Share.from_adapters(adapters, variance=0.8, p=p)
    share.add("d", late["d"], p=p)
    for task, adapter in (adapters | late).items():
        for layer, bases in share.bases.items():
            inside = project(adapter.delta(layer), *bases)
            assert relative(share.reconstruct(task).delta(layer), best(inside, p)) < 1e-5
            pair, r = share.coefficients[layer][task], len(adapter.factors[layer][1])
            assert {(e.shape[1], e.dtype) for e in pair} == {(min(p, r, *map(len, pair)), dtype)}
            assert relative(*[eps.norm(dim=0) for eps in pair]) < 1e-4  # evenly split
    assert sizes(share)[0] != sizes(share)[1]  # the two sides differ

def test_retained_is_one_minus_the_squared_relative_error():
    adapters = make_adapters("abc")
    share = Share.from_adapters(adapters)
    for task, part in share.retained().items():
        pairs = [(share.reconstruct(task).delta(x), adapters[task].delta(x)) for x in SHAPES]
        held, came = (torch.cat([delta.flatten() for delta in side]) for side in zip(*pairs))
        assert part == pytest.approx(1 - relative(held, came) ** 2)

def test_a_task_is_bases_times_coefficients_and_leaves_a_layer_alone_that_it_lacks():
    adapters = make_adapters("ab")
    del adapters["a"].factors["second"]
    share = Share.from_adapters(adapters)
    (beta, alpha), (eps_beta, eps_alpha) = share.bases["first"], share.coefficients["first"]["a"]
    B, A = share.factors("first", "a")
    assert torch.allclose(B, beta @ eps_beta) and torch.allclose(A, (alpha @ eps_alpha).T)
    assert share.factors("second", "a") is None and "a" not in share.coefficients["second"]
    second, x = share.attach(Net().double()).second, torch.ones(4, 12).double()
    bare, a, b = outputs(share, second, x, (None, "a", "b"))
    assert torch.equal(a, bare) and not torch.equal(b, bare)

def test_extras_and_config_travel_with_their_task_as_copies():
    adapters = make_adapters("ab")
    head = adapters["a"].extras["head.weight"] = torch.randn(3, 4).half()
    adapters["a"].config["task_type"] = "SEQ_CLS"
    share, kept = Share.from_adapters(adapters), head.clone()
    for _ in range(2):  # neither what came in nor what goes out is the share's own
        head.zero_()
        back = share.reconstruct("a")
        head = back.extras["head.weight"]
        assert torch.equal(head, kept) and head.dtype == torch.float16
        assert back.config.pop("task_type") == "SEQ_CLS" and share.reconstruct("b").config == {}
    numbers = [e.numel() for held in share.coefficients.values() for e in held["a"]]
    assert share.num_parameters("a") == 3 * 4 + sum(numbers)

@pytest.mark.parametrize("stack", ["factors", "updates"])
@pytest.mark.parametrize("first", ["a", "abc"])
def test_a_task_without_any_update_is_no_hindrance_to_others(first, stack, tmp_path):
    adapters, rule = make_adapters("abcd"), {"variance": 1.0, "center": False, "stack": stack}
    for layer, (B, A) in adapters["a"].factors.items():
        adapters["a"].factors[layer] = 0 * B, A
    share = Share.from_adapters({t: adapters[t] for t in first}, **rule)
    if first == "a":
        with pytest.raises(ValueError, match="the bases are empty"):
            share.learn(share.attach(Net().double()), "new").__enter__()
    share.add("again", share.reconstruct("a"), p=2)
    share.merge({t: adapter for t, adapter in adapters.items() if t not in first})
    average(share, ["a", "again"], "mean")
    save_peft(share.reconstruct("again"), tmp_path)
    for adapter in (*map(share.reconstruct, ("a", "again", "mean")), load_peft(tmp_path)):
        assert not any(adapter.delta(layer).any() for layer in SHAPES)
        assert all(len(A) >= 1 for _, A in adapter.factors.values())
    assert share.retained()["a"] == 1.0 and error(share, {t: adapters[t] for t in "bcd"}) < 1e-6

def test_a_merge_may_bring_a_layer_and_may_lack_one():
    share = make_share("a", variance=1.0)
    new = make_adapters("b", shapes={"second": SHAPES["second"], "third": (6, 5)})
    share.merge(new)
    assert share.layers == ["first", "second", "third"]
    assert share.reconstruct("a").factors.keys() == {"first", "second"}
    assert error(share, new) < 1e-5

def test_adapters_that_still_require_gradients_leave_no_graph_behind():
    adapters = make_adapters("abcd")
    for adapter in adapters.values():
        adapter.extras["head"] = torch.ones(2)
        for tensor in itertools.chain(*adapter.factors.values(), adapter.extras.values()):
            tensor.requires_grad_(True)
    share = Share.from_adapters({t: adapters[t] for t in "ab"}, p=1)
    share.add("c", adapters["c"])
    share.merge({"d": adapters["d"]})
    extras = [share.reconstruct(task).extras["head"] for task in "abcd"]
    assert not any(t.requires_grad for t in (*tensors(share), *extras))

def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)

@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("context", [autocast, torch.inference_mode, torch.no_grad])
def test_a_share_made_in_any_context_is_exact_and_can_be_trained(context, loaded, tmp_path):
    adapters, x = make_adapters("abcd", dtype=torch.float32, shared=5), batch(torch.float32)
    model = Net().to(DEVICE).eval()
    with context():
        share = Share.from_adapters({t: adapters[t] for t in "ab"}, variance=1.0)
        share.add("c", adapters["c"], p=4)
        share.merge({"d": adapters["d"]}, grow=True)
        share.save(tmp_path / "share")
        share = Share.load(tmp_path / "share") if loaded else share
    assert error(share, adapters) < 1e-5
    losses = train_coefficients(share, share.attach(model), "new", [x] * 3, square_loss)
    expected = model.first.weight + adapters["a"].delta("first").to(DEVICE)
    with context():
        share.detach(model, "a")
    assert losses[-1] < losses[0] and relative(model.first.weight, expected) < 1e-6
    assert not model.first.weight.is_inference()

@pytest.mark.parametrize("change, words", [
    (lambda B, A: (B, A[:, :-1]), r"\(40, 12\)"), (lambda B, A: (B[:-1], A), r"\(40, 12\)"),
    (lambda B, A: (B[:, :, None], A), "takes"), (lambda B, A: (B[:, 0], A[0]), "takes"),
    (lambda B, A: (B[:, :-1], A), "takes"), (lambda B, A: (B[:, :0], A[:0]), "takes"),
    (lambda B, A: (B.fill_diagonal_(INF), A), "or inf"), (lambda B, A: (B, 0 / A.tril()), "NaN"),
    (lambda B, A: (B, A + 0j), "float"), (lambda B, A: (B.int(), A), "float"),
])
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_nothing_changes(change, words):
    share, good = make_share(), make_adapters("c")["c"]
    bad, before = copy.deepcopy(good), state(share)
    bad.factors["second"] = change(*bad.factors["second"])
    for call in (lambda: share.add("c", bad), lambda: share.merge({"d": good, "c": bad})):
        with pytest.raises(ValueError, match="task 'c', layer 'second'.*" + words):
            call()
    assert_same(before, state(share))
    share.add("c", good)

ODD = {"generator": (i for i in "a")}  # a config that cannot be copied
UNKNOWN = r"task 'x' is unknown; the share has \['a', 'b'\]"
@pytest.mark.parametrize("call, words", [
    (lambda s, a: Share.from_adapters(a, variance=0), "variance is 0"),
    (lambda s, a: Share.from_adapters(a, stack="rows"), "stack is 'rows'.*updates"),
    (lambda s, a: Share.from_adapters(a, k=0), "k is 0"),
    (lambda s, a: Share.from_adapters(a, p=0), "p is 0"),
    (lambda s, a: Share.from_adapters({}), "adapters is empty"),
    (lambda s, a: Share.from_adapters({"a": Adapter({})}), r"'a': its layers are \[\]"),
    (lambda s, a: s.merge({t: Adapter({"x": (torch.ones(n, 1), torch.ones(1, 3))})
                           for t, n in (("c", 4), ("d", 5))}), r"'d', layer 'x'.*\(4, 3\)"),
    (lambda s, a: s.merge({"c": Adapter({0: a["a"].factors["first"]})}), r"layers are \[0\]"),
    (lambda s, a: s.add("a", a["a"]), "task 'a' exists"),
    (lambda s, a: s.add(3, a["a"]), "task 3 .*is no string"),
    (lambda s, a: s.add("c", a["a"], p=0), "p is 0"),
    (lambda s, a: s.add("c", Adapter({"x": (1, 1)})), r"layer \['x'\]: no bases"),
    (lambda s, a: s.add("c", Adapter(a["a"].factors, {}, ODD)), "generator"),
    (lambda s, a: s.merge({"c": Adapter(a["a"].factors, {}, ODD)}), "generator"),
    (lambda s, a: s.merge({"a": a["a"]}), "task 'a' exists"),
    (lambda s, a: s.merge({"c": a["a"]}, variance=1.5), "variance is 1.5"),
    (lambda s, a: s.merge({"c": a["a"]}, k=1.0), "k is 1.0"),
    (lambda s, a: s.select("x"), UNKNOWN), (lambda s, a: s.select(["a", "x"]), UNKNOWN),
    (lambda s, a: s.remove("x"), UNKNOWN), (lambda s, a: s.reconstruct("x"), UNKNOWN),
    (lambda s, a: s.num_parameters("x"), UNKNOWN), (lambda s, a: s.factors("first", "x"), UNKNOWN),
])
def test_what_cannot_be_built_added_merged_or_found_is_refused_and_nothing_changes(call, words):
    adapters = make_adapters("ab")
    share = Share.from_adapters(adapters, variance=1.0, k=4, p=1, stack="updates")
    share.select("b")
    before = state(share)
    with pytest.raises((ValueError, TypeError), match=words):
        call(share, adapters)
    assert_same(before, state(share))
    share.add("c", adapters["a"], p=1)
    share.merge({"d": adapters["b"]}, variance=1.0, k=1)

# --- Share: select, remove, num_parameters
@pytest.mark.parametrize("selected, left", [
    ("a", None), ("b", "b"), (["a", None], None), (["b", None], ("b", None))])
def test_a_removed_task_is_gone_and_not_selected_and_the_others_stay(selected, left):
    share, _ = attached("abc")
    kept = {task: share.reconstruct(task) for task in "bc"}
    share.select(selected)
    share.remove("a")
    assert share.tasks == ["b", "c"] and share.selected == left and error(share, kept) == 0
    assert all(held.keys() == {"b", "c"} for held in share.coefficients.values())

def test_whatever_comes_and_goes_each_task_has_its_own_coefficients_and_there_is_no_other():
    share, model = attached("abc")
    late, x = make_adapters("def"), batch()
    for change in (
        lambda: share.remove("b"), lambda: share.add("d", late["d"], p=1),
        lambda: train_coefficients(share, model, "new", [x], square_loss, p=2),
        lambda: share.remove("a"), lambda: share.merge({"e": late["e"]}, grow=True),
        lambda: train_coefficients(share, model, "c", [x], square_loss, finetune=True),
        lambda: share.remove("new"), lambda: share.add("f", late["f"]),
    ):
        before = {task: share.reconstruct(task) for task in share.tasks}
        change()
        kept = before.keys() & set(share.tasks) - {"c"}
        assert error(share, {task: before[task] for task in kept}) < 1e-12
        for layer, held in share.coefficients.items():
            assert held.keys() == set(share.tasks)
            k = [basis.shape[1] for basis in share.bases[layer]]
            assert all([len(eps) for eps in pair] == k for pair in held.values())

def test_the_papers_count_688128_against_1456():
    small = {f"layer {i}": (64, 64) for i in range(28)}  # coefficients do not depend on n and d
    share = Share.from_adapters(make_adapters("abcd", (8,), small, torch.float32), k=26, p=1)
    assert sum(8 * (1536 + 1536) for _ in small) == 688_128  # as LoRA of rank 8 counts
    assert share.num_parameters("a") == 1_456
    assert share.num_parameters() == 28 * 26 * (64 + 64) + 4 * 1_456

# --- attach, ShareLinear, detach
def test_the_forward_pass_equals_the_dense_formula():
    share, model = attached()
    x = torch.randn(2, 3, 30, dtype=torch.float64, device=DEVICE)
    layer, bare = model.first, nn.functional.linear(x, model.first.weight, model.first.bias)
    for task, out in zip("ab", outputs(share, layer, x, "ab")):
        update = x @ share.reconstruct(task).delta("first").T
        assert torch.allclose(out, bare + update, atol=1e-12)
    assert torch.equal(layer(input=x), out)  # as nn.Linear takes it
    assert torch.equal(outputs(share, layer, x, [None])[0], bare)

def test_attach_changes_the_output_alone_and_detach_brings_back_the_model_bit_for_bit():
    share, model = make_share(dtype=torch.float32), Net().to(DEVICE)
    model.second.weight.requires_grad_(False)
    before, first = state(share, model), model.first
    assert share.attach(model) is model and model.first is first
    assert_same(before[:4], state(share, model)[:4])  # names, numbers and requires_grad
    share.detach(model)
    assert_same(before, state(share, model))

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_folded_task_gives_the_outputs_of_the_attached_one_and_is_rounded_once(dtype, tolerance):
    share, model = attached(dtype=dtype)
    weight, x = model.first.weight.detach().double(), batch(dtype)
    share.select("b")
    expected = model(x)
    share.detach(model, "b")
    assert type(model.first) is nn.Linear and model.first.weight.requires_grad
    assert expected.dtype == dtype and relative(model(x).float(), expected.float()) < tolerance
    weight += share.reconstruct("b").delta("first").to(DEVICE)
    assert torch.equal(model.first.weight, weight.to(dtype))
    with pytest.raises(ValueError, match="no layer of this share"):
        share.detach(model)

def with_another_forward():
    linear = nn.Linear(12, 40)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight)  # accelerate's hooks do so
    return linear

@pytest.mark.parametrize("make, words", [
    (lambda: None, "missing"), (lambda: nn.Conv1d(3, 3, 1), "Conv1d"),
    (lambda: nn.Linear(12, 41), r"Linear.*; its bases take \(40, 12\)"),
    (lambda: nn.Linear(12, 40, device="meta"), "Linear.* not on meta"),
    (with_another_forward, "Linear.* forward"), (lambda: nn.Linear(13, 40), "Linear.* bases take"),
    (lambda: prune.identity(nn.Linear(12, 40), "weight"), "Linear"),  # makes its weight anew
    (lambda: attached()[1].second, "ShareLinear"),  # another share's
    (lambda: nn.MultiheadAttention(40, 1).out_proj, "NonDynamically"),  # is never called
])
def test_attach_refuses_a_layer_by_name_and_changes_nothing(make, words):
    share, model = make_share(), Net()
    before, good, bad = state(share, model), model.second, make()
    model.second = bad
    with pytest.raises(ValueError, match=f"layer 'second' is {words}"):
        share.attach(model)
    assert model.second is bad and not model.first._forward_pre_hooks
    assert {t.device.type for t in tensors(share)} == {"cpu"}
    model.second = good
    assert_same(before, state(share, model))
    share.attach(model)

def test_detach_refuses_a_layer_that_it_cannot_fold_into_and_changes_nothing():
    share, model = attached()
    share.merge(make_adapters("c", shapes={"middle": (12, 20)}))  # is not attached yet
    model.second.forward = model.second.forward  # accelerate's hooks do so
    for task, layers in (("c", "'middle'"), ("a", "'second'"), (None, "'first', 'second'")):
        model.first.to("meta" if task is None else DEVICE)
        before = state(share, model)
        with pytest.raises(ValueError, match=rf"layers \[{layers}\]"):
            share.detach(model, task)
        assert before[1:] == state(share, model)[1:]

def test_attaching_again_adds_the_layers_that_a_merge_brought():
    share, model = attached()
    share.merge(make_adapters("c", shapes={"middle": (12, 20)}))
    share.select("c")
    x, first = torch.randn(4, 20, dtype=torch.float64, device=DEVICE), model.first
    bare = model.middle(x)
    assert share.attach(model).first is first
    update = x @ share.reconstruct("c").delta("middle").T.to(x)
    assert torch.allclose(model.middle(x), bare + update)
    assert not any(isinstance(m, ShareLinear) for m in share.detach(model).modules())

def test_a_linear_used_in_two_places_has_one_adapter_and_refuses_a_second():
    shared = nn.Linear(6, 6).double()
    model = nn.ModuleDict({"x": shared, "y": shared})
    share = Share.from_adapters(make_adapters("a", shapes={"x": (6, 6)}))
    v = torch.randn(2, 6, dtype=torch.float64)
    expected = shared(v) + v @ share.reconstruct("a").delta("x").T
    share.attach(model)
    for name in "xy":
        assert torch.allclose(outputs(share, model[name], v, "a")[0], expected)
    share.detach(model)
    with pytest.raises(ValueError, match="layer 'y' has a second name"):
        Share.from_adapters(make_adapters("a", shapes={"x": (6, 6), "y": (6, 6)})).attach(model)
    assert type(shared) is nn.Linear

def test_folding_a_task_in_leaves_a_module_alone_that_shares_the_weight():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    before = model["b"].weight.clone()
    share = Share.from_adapters({"t": Adapter({"a": (torch.ones(6, 1), torch.ones(1, 6))})})
    share.detach(share.attach(model), "t")
    assert torch.equal(model["b"].weight, before)
    assert torch.allclose(model["a"].weight, before + 1, atol=1e-5)

def test_hooks_of_a_linear_layer_are_called_while_attached():
    (share, model), seen = attached(), []
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert outputs(share, model, batch(), "a")[0].shape == (16, 40) and seen == [(16, 20)]
    bare = share.detach(model).first
    assert len(bare._forward_hooks) == 1 and not bare._forward_pre_hooks

def test_a_fast_path_that_bypasses_linear_layers_is_not_taken():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    adapters = make_adapters("a", shapes={"linear1": (16, 8)}, dtype=torch.float32)
    share, x = Share.from_adapters(adapters), torch.randn(2, 3, 8)
    found = outputs(share, share.attach(model), x, "a")[0]
    assert torch.allclose(found, share.detach(model, "a")(x), atol=1e-5)

@pytest.mark.parametrize("order", ["one two one two", "one two two one", "two one one two"])
def test_two_shares_on_one_model_attach_and_detach_in_any_order(order):
    adapters = [make_adapters("x", shapes={layer: SHAPES[layer]}) for layer in SHAPES]
    shares = dict(zip(("one", "two"), map(Share.from_adapters, adapters)))
    (a, b, c, d), model, x = map(shares.get, order.split()), Net().double().eval(), batch().cpu()
    model.first.weight.requires_grad_(False)
    before, bare = state(a, model), model(x)
    b.attach(a.attach(model))
    a.select("x"), b.select("x")
    model.share, both = a, model(x)  # an attribute of that name makes no ShareLinear
    c.detach(model)
    assert not torch.equal(model(x), both) and not torch.equal(model(x), bare)
    assert torch.equal(d.detach(model)(x), bare)
    a.select(None)
    assert_same(before, state(a, model))

@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_the_plain_model_loads_while_attached_and_is_kept(assign):
    (share, model), plain, x = attached(), Net().double().to(DEVICE).eval(), batch()
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict(), assign=assign)
    assert torch.equal(model(x), plain(x)) and torch.equal(share.detach(model)(x), plain(x))

@pytest.mark.parametrize("selected", ["a" * 16, ["a", "b"] * 8])
def test_half_precision_is_the_models_alone_but_a_device_is_the_shares_as_well(selected):
    share, model = attached(dtype=torch.float32)
    before, x = state(share), batch(torch.bfloat16)
    model.to(torch.bfloat16)
    assert_same(before, state(share))
    share.select("a" if selected == "a" * 16 else selected)
    found, bare = model.first(x), nn.functional.linear(x, model.first.weight, model.first.bias)
    assert found.dtype == model(x).dtype == torch.bfloat16
    for i, task in enumerate(selected):
        expected = bare[i].float() + x[i].float() @ share.reconstruct(task).delta("first").T
        assert relative(found[i].float(), expected) < 0.01
    for device in ("cpu", "meta"):  # on meta the share's numbers would be lost
        model.to(device)
        assert {t.device.type for t in tensors(share)} == {"cpu"}

def test_a_deep_copy_of_an_attached_model_is_independent_and_complete():
    (share, model), x = attached(), batch()
    share.select("a")
    expected, twin = model(x), copy.deepcopy(model)
    share.remove("a")
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)
    twin.first.share.select(None)
    assert not torch.equal(twin(x), expected)
    share.detach(model)
    assert isinstance(twin.first, ShareLinear)

def test_a_compiled_model_follows_the_selection_without_a_break():
    share, model = attached()
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), batch()
    for task in (None, "a", "b", ["a", None] * 8, ["b"] * 16, None):
        share.select(task)
        assert torch.allclose(compiled(x), model(x))

def test_selecting_and_applying_a_task_forms_no_dense_update():
    adapters = make_adapters("ab", shapes={"0": (300, 400)}, dtype=torch.float32)
    share, model = Share.from_adapters(adapters), nn.Sequential(nn.Linear(400, 300)).to(DEVICE)
    share.attach(model)
    with torch.no_grad(), Watch() as watch:
        outputs(share, model, torch.ones(2, 400, device=DEVICE), ("a", "b", ["a", "b"]))
    assert 0 < watch.peak < 4 * 300 * 400 / 5

def test_each_sample_of_a_mixed_batch_gets_its_own_task():
    adapters = make_adapters("abc", (3, 1, 2))
    del adapters["b"].factors["second"]
    share = Share.from_adapters(adapters, variance=0.9)
    model = share.attach(Net().to(DEVICE, torch.float64).eval())
    names = ["b", None, "a", "c", "a", None]
    for x in (torch.randn(6, 4, 5, 30).double().to(DEVICE), batch(size=6)):
        run = model if x.dim() == 2 else model.first  # BatchNorm takes two dimensions
        alone = [outputs(share, run, sample[None], [name])[0] for sample, name in zip(x, names)]
        for mixed in outputs(share, run, x, (names, (name for name in names))):
            assert relative(mixed, torch.cat(alone)) < 1e-9
    assert torch.equal(*outputs(share, model, x, ([None] * 6, None)))
    assert outputs(share, model, x[:0], [[]])[0].shape == (0, 40)
    with pytest.raises(ValueError, match="2 tasks for a batch of 6 samples"):
        outputs(share, model, x, [["a", "b"]])

# --- learn: phase 2 for every training loop
@pytest.mark.parametrize("p, phi", [(1, 0), (2, 0), (2, 3)])
def test_in_the_block_the_new_coefficients_alone_are_trained_and_they_are_in_the_model(p, phi):
    share, model = attached(variance=1.0)
    before, shapes = state(share, model), [b.shape for pair in share.bases.values() for b in pair]
    with share.learn(model, "new", p=p, phi=phi) as parameters:
        start = {name: t.clone() for name, t in model.state_dict().items()}
        trainable = [q for q in model.parameters() if q.requires_grad]
        assert list(map(id, trainable)) == list(map(id, parameters))
        assert sum(q.numel() for q in trainable) == sum((k + phi) * p + n * phi for n, k in shapes)
        assert parameters[0].std() < 0.06 and all(q.norm() > 1 for q in parameters[2:4] if phi)
        fit(model, parameters, batch(), steps=1)
        moved = [name for name, t in model.state_dict().items() if not torch.equal(t, start[name])]
        assert len(moved) == len(parameters) and moved == [x for x in start if x not in before[0]]
        model.load_state_dict(start)
        assert all(torch.equal(t, start[name]) for name, t in model.state_dict().items())
    share.remove("new")
    after = state(share, model)
    assert before[0].keys() == after[0].keys() and before[1:] == after[1:]

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loop_with_adamw_a_schedule_clipping_and_accumulation_learns(dtype):
    (share, model), x = attached(dtype=dtype), batch(dtype)
    with share.learn(model, "new") as parameters:
        start = square_loss(model, x).item()
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
        for _ in range(15):
            for part in x.split(8):
                (square_loss(model, part) / 2).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    share.select("new")
    assert square_loss(model, x) < 0.99 * start
    assert {e.dtype for e in tensors(share)} == {torch.promote_types(dtype, torch.float32)}

@pytest.mark.parametrize("phi, tolerance", [(0, 0), (2, 1e-4)])
def test_what_the_model_gives_at_the_end_of_the_block_is_what_the_task_gives(phi, tolerance):
    def learn():
        with share.learn(model, "new", phi=phi, grow=True) as parameters:
            fit(model, parameters, x)
            return model(x), parameters  # ends the block as well
    (share, model), x = attached(variance=0.5), batch()
    end, parameters = learn()
    assert [q.data.add_(1) for q in parameters]  # as an optimizer would that goes on: too late
    assert relative(end, *outputs(share, model, x, ["new"])) <= tolerance
    assert share.retained()["new"] == pytest.approx(1)

@pytest.mark.parametrize("selected", [None, "b", ("a", None) * 8])
def test_every_earlier_output_stays_bit_for_bit_the_same_in_the_block_and_after(selected):
    share, model = attached("abc")
    x, tasks = batch(), (None, *"abc", ["a", "b"] * 8)
    before = outputs(share, model, x, tasks)
    share.select(selected)
    with share.learn(model, "new", p=2) as parameters:
        learned = model(x)
        assert all(map(torch.equal, outputs(share, model, x, tasks), before))
        share.select("new")  # another task may be looked at, and then the new one again
        assert torch.equal(model(x), learned)
        losses = fit(model, parameters, x)
    assert losses[-1] < losses[0] and share.selected == selected
    assert all(map(torch.equal, outputs(share, model, x, tasks), before))

@pytest.mark.parametrize("kind, steps", [(RuntimeError, 0), (KeyboardInterrupt, 2)])
@pytest.mark.parametrize("settings", [{}, {"phi": 1}, {"finetune": True, "task": "a"}])
def test_a_block_that_fails_or_is_interrupted_leaves_everything_as_it_was(settings, kind, steps):
    share, model = attached()
    model.norm.train()
    model.middle.weight.grad = torch.ones_like(model.middle.weight)
    model.second.weight.requires_grad_(False)
    head = torch.ones(3, device=DEVICE)
    share.select("b")
    before, extra = state(share, model), [head, *model.middle.parameters()]
    used = {"task": "new", "extra": extra} | settings
    with pytest.raises(kind), share.learn(model, **used) as parameters:
        assert not any(q.grad is not None for q in extra)
        fit(model, [*parameters, *extra], batch(), steps)
        head.data += 1
        share.select("a")
        raise kind
    assert_same(before, state(share, model))
    assert head.tolist() == [1, 1, 1] and not head.requires_grad and head.grad is None

@pytest.mark.parametrize("call", [
    lambda s, m: s.learn(m, "other").__enter__(), lambda s, m: s.merge(make_adapters("c")),
    lambda s, m: s.remove("a"), lambda s, m: s.detach(m), lambda s, m: s.select(["a", "new"]),
    lambda s, m: s.add("c", make_adapters("c")["c"]),
])
def test_in_the_block_what_would_break_it_is_refused_and_the_block_goes_on(call):
    (share, model), x = attached(), batch()
    with share.learn(model, "new") as parameters:
        with pytest.raises(ValueError, match="task .'new'. is being learned"):
            call(share, model)
        share.select(["a", None] * 8)  # a mixed batch of others is none of its business
        assert model(x).shape == (16, 40)
        share.select("new")
        losses = fit(model, parameters, x)
    assert losses[-1] < losses[0] and share.tasks == ["a", "b", "new"]
    share.merge(make_adapters("c"))
    share.detach(model)

@pytest.mark.parametrize("settings, words", [
    ({"p": 0}, "p is 0"), ({"p": None}, "p is None"), ({"sigma": 0}, "sigma is 0"),
    ({"phi": -1}, "phi is -1"), ({"phi": 1.0}, "phi is 1.0"), ({"phi": 5}, "phi is 5; .* 5"),
    ({"phi": 1, "finetune": True, "task": "a"}, "phi is 1"), ({"task": "a"}, "task 'a' exists"),
    ({"finetune": True, "task": "x"}, UNKNOWN), ({"extra": torch.ones(3, 2)}, "extra: a view"),
    ({"model": nn.Identity()}, r"layers \['first', 'second'\] are not attached"),
])
def test_what_learning_cannot_use_is_refused_before_anything_changes(settings, words):
    share, model = attached(variance=1.0)  # of 3 + 2 columns, the largest basis has 5
    before, used = state(share, model), {"model": model, "task": "new"} | settings
    with pytest.raises(ValueError, match=words), share.learn(**used):
        pytest.fail("the block must not begin")
    assert_same(before, state(share, model))
    for used in ({"task": "new", "phi": 4, "sigma": 1e-9}, {"task": "a", "finetune": True}):
        share.learn(model, **used)(lambda: None)()  # around nothing

def test_extra_tensors_are_trained_along_and_may_come_from_a_generator():
    share, model = attached()
    before = state(share, model)
    with share.learn(model, "new", extra=model.middle.parameters()) as parameters:
        trainable = [q for q in model.parameters() if q.requires_grad]
        assert len(trainable) == len(parameters) + 2
        fit(model, trainable, batch())
        expected = model.middle.weight.clone()
    share.remove("new")
    after = state(share, model)
    moved = [name for name, t in after[0].items() if not torch.equal(t, before[0][name])]
    assert moved == ["middle.weight", "middle.bias"] and before[1:] == after[1:]
    assert torch.equal(model.middle.weight, expected) and model.middle.weight.grad is None

@pytest.mark.parametrize("cast", ["autocast", "model.bfloat16()"])
def test_in_half_precision_a_block_learns_and_the_share_stays_float32(cast):
    share, model = attached(dtype=torch.float32)
    model.middle.bias.grad = torch.ones_like(model.middle.bias)
    half = torch.autocast(DEVICE, torch.bfloat16, enabled=cast == "autocast")
    with half, share.learn(model, "new", phi=1, grow=True) as parameters:
        model.to(torch.float32 if cast == "autocast" else torch.bfloat16)  # and what is learned
        x = batch(model.first.weight.dtype)
        losses, end = fit(model, parameters, x, 20), model(x)
        assert end.dtype == torch.bfloat16 and {q.dtype for q in parameters} == {x.dtype}
    share.select("new")
    assert model.middle.bias.grad.dtype == x.dtype and model.middle.bias.grad.sum() == 12
    assert losses[-1] < losses[0] and relative(model(x).float(), end.float()) < 0.02
    assert {t.dtype for t in tensors(share)} == {torch.float32}

@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("phi", [0, 2])
def test_gradient_checkpointing_gives_the_losses_of_none(phi, reentrant):
    losses, wrapped = [], lambda model: lambda x: checkpoint(model, x, use_reentrant=reentrant)
    for wrap in (lambda model: model, wrapped):
        torch.manual_seed(1)
        (share, model), x = attached(), batch().requires_grad_(reentrant)  # what that form needs
        with share.learn(model, "new", phi=phi) as parameters:
            losses.append(fit(wrap(model), parameters, x, 8))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]

def learn_in_parallel(rank, folder):
    """One process of two, which start from different coefficients; or the whole batch in one."""
    torch.manual_seed(0)
    (share, model), x = attached(), batch()
    torch.manual_seed(rank or 0)
    with share.learn(model, "new", p=2) as parameters:
        run = model
        if rank is not None:
            where = f"file://{folder}/meeting"
            torch.distributed.init_process_group("gloo", where, rank=rank, world_size=2)
            run, x = nn.parallel.DistributedDataParallel(model), x[rank::2]
        fit(run, parameters, x)
    share.save(folder / f"rank {rank}")
    if rank is not None:
        torch.distributed.barrier()
        os._exit(0)  # as a process ends in the usual way, gloo's threads abort it now and then

def test_data_parallel_ranks_end_equal_and_equal_to_one_process(tmp_path):
    torch.multiprocessing.spawn(learn_in_parallel, (tmp_path,), nprocs=2)
    learn_in_parallel(None, tmp_path)
    one, two, alone = (tensors(Share.load(tmp_path / f"rank {rank}")) for rank in (0, 1, None))
    assert all(map(torch.equal, one, two))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, alone, strict=True))

# --- train_coefficients
def test_training_is_adam_on_the_dense_formula():
    """The slow twin: one dense weight a layer, autograd and torch's Adam."""
    share, model = attached()
    x, runs = [batch() for _ in range(5)], {}
    for name, lr in (("start", 0.0), ("end", 0.02)):
        torch.manual_seed(1)
        train_coefficients(share, model, name, x, square_loss, p=2, lr=lr)
        runs[name] = {layer: share.coefficients[layer][name] for layer in share.layers}
    plain = Net().to(DEVICE, torch.float64).eval()
    plain.load_state_dict(model.state_dict())
    eps = {x: [e.clone().requires_grad_() for e in pair] for x, pair in runs["start"].items()}
    assert all((e != 0).all() for pair in eps.values() for e in pair)  # both 0: nothing moves
    optimizer = torch.optim.Adam([e for pair in eps.values() for e in pair], lr=0.02)
    for batch_ in x:
        weights = {}
        for layer, (beta, alpha) in share.bases.items():
            update = (beta @ eps[layer][0]) @ (alpha @ eps[layer][1]).T
            weights[f"{layer}.weight"] = plain.get_submodule(layer).weight.detach() + update
        optimizer.zero_grad()
        (torch.func.functional_call(plain, weights, batch_) - 1).square().mean().backward()
        optimizer.step()
    for layer, pair in runs["end"].items():
        assert all(torch.allclose(e, slow, atol=1e-9) for e, slow in zip(pair, eps[layer]))

@pytest.mark.parametrize("mode", [True, False])
def test_training_happens_in_the_mode_of_the_model_and_leaves_its_buffers(mode):
    (share, model), seen = attached(), []
    model.register_buffer("expanded", torch.zeros(1).expand(5))  # unchanged; cannot be written to
    model.register_buffer("offloaded", torch.zeros(1, device="meta"))
    loss = lambda model, x: (seen.append(model.norm.training), square_loss(model, x))[1]
    before = state(share, model.train(mode))
    train_coefficients(share, model, "new", [batch()], loss)
    share.remove("new")
    del model.offloaded, before[0]["offloaded"]  # has no values to compare
    assert seen == [mode]
    assert_same(before, state(share, model))

@pytest.mark.parametrize("p", [1, 4])
def test_a_step_keeps_no_more_for_the_backward_pass_than_a_lora_of_rank_p(p):
    def kept(model, permanent):
        """Numbers that autograd saves, but for those that are there anyway; each storage once."""
        found, there = {}, {t.untyped_storage().data_ptr() for t in (x, *permanent)}
        pack = lambda t: found.setdefault(t.untyped_storage().data_ptr(), t)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.first(x).sum().backward()
        return sum(t.untyped_storage().nbytes() // 4 for at, t in found.items() if at not in there)
    x, lora = batch(torch.float32), attach_lora(Net().to(DEVICE), ["first"], p)
    of_lora = kept(lora, [lora.first.weight])  # its factors count, since ours are formed anew
    share, model = attached(dtype=torch.float32)
    with share.learn(model, "new", p=p) as parameters:
        of_share = kept(model, [model.first.weight, *share.bases["first"]])
    assert 0 < of_share <= of_lora + sum(q.numel() for q in parameters[:2])

def test_extra_parameters_are_trained_along_at_their_own_rate_and_can_be_used_again():
    share, model = attached()
    weight, bias = model.middle.parameters()
    groups = [{"params": [weight], "lr": 0.5}, {"params": bias}]
    for t, lr in (("slow", 1e-3), ("fast", 0.1)):
        before = weight.detach().clone(), bias.detach().clone()
        train_coefficients(share, model, t, [batch()], square_loss, lr=lr, extra_parameters=groups)
        moved = [float((q - old).detach().abs().max()) for q, old in zip((weight, bias), before)]
        assert moved == pytest.approx([0.5, lr], rel=0.01)

def test_finetuning_goes_on_from_the_stored_coefficients_of_that_task_alone():
    adapters = make_adapters("ab")
    adapters["a"].config["kept"], adapters["a"].extras["head"] = True, torch.ones(2)
    share, x = Share.from_adapters(adapters), batch()
    model, before = share.attach(Net().to(DEVICE, torch.float64).eval()), copy.deepcopy(share)
    share.select("a")
    start = square_loss(model, x).item()
    losses = train_coefficients(share, model, "a", [x] * 20, square_loss, finetune=True)
    assert losses[0] == pytest.approx(start) and losses[-1] < start
    for layer, task in itertools.product(SHAPES, "ab"):
        now, old = share.coefficients[layer][task], before.coefficients[layer][task]
        assert [torch.equal(e, f.to(e)) for e, f in zip(now, old)] == [task == "b"] * 2
    kept = share.reconstruct("a")
    assert kept.config == {"kept": True} and torch.equal(kept.extras["head"], torch.ones(2))

@pytest.mark.parametrize("grow", [True, False])
def test_temporary_columns_reach_outside_the_bases_and_end_in_a_merge(grow):
    share, model = attached(center=False)
    share.variance = 0.1  # by its own rule a merge would take in one direction
    x, before, k = batch(), {t: share.reconstruct(t) for t in "ab"}, sizes(share)
    beta = share.bases["first"][0].clone()
    train_coefficients(share, model, "new", [x] * 40, square_loss, phi=2, p=2, lr=0.05, grow=grow)
    for size, now in zip(k, sizes(share)):
        assert now == size + 2 if grow else size <= now <= size + 2
    delta = share.reconstruct("new").delta("first")
    assert (delta - beta @ (beta.T @ delta)).norm() > 0.01 * delta.norm()
    assert (error(share, before) < 1e-6) == grow  # and all of what is outside is taken in:
    assert not grow or share.retained()["new"] == pytest.approx(1.0)

@pytest.mark.parametrize("call", [
    lambda s, m, **grow: s.merge(make_adapters("c"), **grow),
    lambda s, m, **grow: s.learn(m, "c", phi=1, **grow)(lambda: None)(),  # around nothing
    lambda s, m, **grow: train_coefficients(s, m, "c", [batch()], square_loss, phi=1, **grow),
])
def test_the_bases_grow_only_if_that_is_asked_for(call):
    found = []
    for settings in ({}, {"grow": False}, {"grow": True}):
        torch.manual_seed(1)
        share, model = attached(variance=0.5)
        call(share, model, **settings)
        found.append(tensors(share))
    default, shrunk, grown = found
    assert all(map(torch.equal, default, shrunk)) and not all(map(torch.equal, default, grown))

def test_on_step_reports_each_step_and_may_look_at_other_tasks():
    (share, model), x, seen = attached(), batch(), []
    look = lambda step, loss: (seen.append((step, loss)), share.select("a"))
    share.select("b")
    losses = train_coefficients(share, model, "new", [x] * 4, square_loss, on_step=look)
    assert seen == list(enumerate(losses)) and losses[-1] < losses[0] and share.selected == "b"

def test_under_autocast_each_step_sees_the_newest_values_of_a_head():
    def loss(model, x):
        with torch.no_grad(), torch.autocast(DEVICE, enabled=False):
            exact = square_loss(model, x).item()
        rounded = square_loss(model, x)
        assert rounded.item() == pytest.approx(exact, rel=0.05)
        return rounded
    (share, model), x = attached(dtype=torch.float32), batch(torch.float32)
    settings = {"extra_parameters": model.middle.parameters(), "lr": 0.1}
    with autocast():
        losses = train_coefficients(share, model, "new", [x] * 20, loss, **settings)
    share.select("new")
    assert square_loss(model, x).item() == pytest.approx(losses[-1], rel=0.1)
    assert losses[-1] < 0.8 * losses[0]

def throw(error):
    raise error
UNREACHED = "the loss reached no coefficient"
@pytest.mark.parametrize("settings", [{}, {"phi": 1}, {"finetune": True, "task": "a"}])
@pytest.mark.parametrize("loss, extra, words", [
    (lambda m, x: throw(RuntimeError("out of memory")), True, "out of memory"),
    (lambda m, x: throw(KeyboardInterrupt("Ctrl-C")), True, "Ctrl-C"),
    (lambda m, x: square_loss(m, x) * NAN, True, "step 2: the loss is nan"),
    (lambda m, x: (m(x) * 0).abs().sqrt().sum(), False, "is NaN or inf"),  # 0, but its slope
    (lambda m, x: square_loss(m, x) + (m.middle.bias * 0).abs().sqrt().sum(), True, "is NaN or"),
    (lambda m, x: square_loss(m, x).detach(), False, UNREACHED),
    (lambda m, x: x.clone().requires_grad_().square().sum(), False, UNREACHED),
    (lambda m, x: m.middle.weight.square().sum(), True, UNREACHED),
    (None, False, "batches is empty"),
])
def test_a_run_that_fails_or_learns_nothing_leaves_all_as_it_was(loss, extra, words, settings):
    share, model = attached()
    model.norm.train()
    share.select("b")
    good = [] if words == UNREACHED else [square_loss] * 2
    before, steps = state(share, model), itertools.chain(good, itertools.repeat(loss))
    used = {"task": "new", "loss_fn": lambda m, x: next(steps)(m, x)} | settings
    used["extra_parameters"] = model.middle.parameters() if extra else ()
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt), match=words):
        train_coefficients(share, model, batches=[batch()] * (3 if loss else 0), **used)
    assert_same(before, state(share, model))

def test_ctrl_c_right_after_the_merge_that_ends_a_block_takes_the_merge_back(monkeypatch):
    (share, model), merge = attached(), Share.merge
    before, late = state(share, model), lambda *a, **k: (merge(*a, **k), throw(KeyboardInterrupt()))
    monkeypatch.setattr(Share, "merge", late)
    with pytest.raises(KeyboardInterrupt):
        share.learn(model, "new", phi=1)(lambda: None)()  # around nothing
    assert_same(before, state(share, model))

def test_a_loop_of_ones_own_in_which_only_a_head_learns_is_an_error():
    share, model = attached()
    before, head = state(share, model), [model.middle.weight]
    with pytest.raises(ValueError, match=UNREACHED), share.learn(model, "new", extra=head) as own:
        optimizer = torch.optim.Adam([*own, *head])
        model.middle.weight.square().sum().backward()
        optimizer.step()
    assert_same(before, state(share, model))

# --- The share's file
def test_a_saved_share_loads_with_identical_outputs(tmp_path):
    adapters = make_adapters(["a/b", "a_b", "", "tensor", "Ω" * 300])
    adapters["tensor"].extras["tensor"] = torch.randn(2, 2).half()
    adapters["tensor"].config["tensor"] = {"tensor": 3, "set": {"v", "q", "k"}}
    del adapters["a_b"].factors["first"]
    share = Share.from_adapters(adapters, stack="updates", variance=0.9)
    share.select("a/b")
    with torch.device("meta"):  # a default device plays no part
        share.save(tmp_path / "share.safetensors")
    loaded = Share.load(tmp_path / "share.safetensors")
    assert share.selected == "a/b" and loaded.selected is None
    for name in ("tasks", "layers", "stack", "variance", "center"):
        assert getattr(loaded, name) == getattr(share, name)
    assert loaded.retained() == share.retained()
    back, extra = loaded.reconstruct("tensor"), adapters["tensor"].extras["tensor"]
    assert back.config == {"tensor": {"tensor": 3, "set": ["k", "q", "v"]}}  # a set, sorted
    assert back.extras["tensor"].dtype == extra.dtype and back.extras["tensor"].equal(extra)
    model, x = Net().to(DEVICE, torch.float64).eval(), batch()
    twin, new = loaded.attach(copy.deepcopy(model)), make_adapters("n")
    of_share = outputs(share, share.attach(model), x, share.tasks)
    assert all(map(torch.equal, of_share, outputs(loaded, twin, x, share.tasks)))
    share.merge(new), loaded.merge(new)
    assert all(map(torch.equal, tensors(share), tensors(loaded)))

def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path):
    path = tmp_path / "share.safetensors"
    make_share(dtype=torch.float32).save(path)
    raw = path.read_bytes()
    Share.load(path)
    damaged = [raw[:n] for n in (0, 1, 8, 100, len(raw) - 1)] + [b"\x80\x02.", raw + b"\0"]
    damaged.append(safetensors.torch.save({"weight": torch.ones(2)}))
    for i in torch.randint(0, len(raw), (200,)).tolist():  # and any flipped bit
        damaged.append(raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="share.safetensors is not a Share file"):
            Share.load(path)
    with pytest.raises(FileNotFoundError):
        Share.load(tmp_path / "none")

@pytest.mark.parametrize("config, name, kind, words", [
    ({"numbers": range(3)}, "share", ValueError, r"range\(0, 3\) in a config has no form in JSON"),
    ({"numbers": {3, 1}}, "folder", OSError, "folder"),
])
def test_a_save_that_fails_says_why_and_leaves_what_was_there(tmp_path, config, name, kind, words):
    share, bad = make_share(), make_adapters("c")["c"]
    share.save(tmp_path / "share")
    (tmp_path / "folder").mkdir()
    before, bad.config = (tmp_path / "share").read_bytes(), config
    share.add("c", bad)
    with pytest.raises(kind, match=words):
        share.save(tmp_path / name)
    assert (tmp_path / "share").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"share", "folder"}  # none temporary

def save_over_and_over(rank, folder):
    (folder / f"ready {rank}").touch()
    saves = 0
    while saves < 200:  # from when both are there
        Share.load(folder / "share").save(folder / "share")
        saves += len(list(folder.glob("ready *"))) == 2

def test_two_processes_save_to_one_path_while_a_third_loads_it(tmp_path):
    share = make_share()
    share.save(tmp_path / "share")
    savers = torch.multiprocessing.spawn(save_over_and_over, (tmp_path,), nprocs=2, join=False)
    while not savers.join(timeout=0.01):  # raises if one of them fails
        loaded = Share.load(tmp_path / "share")
        assert all(map(torch.equal, tensors(loaded), tensors(share)))
    assert {path.name for path in tmp_path.iterdir()} == {"share", "ready 0", "ready 1"}

# --- The toy model
def test_the_toy_transformer_is_causal():
    model = ToyTransformer(vocabulary=20, width=16, depth=2, heads=2, length=8)
    tokens = torch.randint(0, 20, (3, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 20
    difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert model(tokens).shape == (3, 8, 20)
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()

# --- train.py: LoRA and PEFT's files
def test_a_lora_layer_starts_as_the_base_and_trains_its_factors_alone():
    model, x = Net().to(DEVICE).eval(), batch(torch.float32)
    plain = copy.deepcopy(model)
    assert attach_lora(model, ["first", "second"], r=4) is model
    assert torch.equal(model(x), plain(x)) and isinstance(model.first, LoRALinear)
    trained = {name: q for name, q in model.named_parameters() if q.requires_grad}
    assert trained.keys() == {f"{layer}.lora_{x}" for layer in ("first", "second") for x in "AB"}
    for parameter in trained.values():
        nn.init.normal_(parameter)
    adapter = lora_adapter(model)
    assert adapter.factors["second"][1].shape == (4, 12)
    h = nn.functional.linear(x, plain.first.weight + adapter.delta("first"), plain.first.bias)
    assert torch.allclose(model.first(x), h, atol=1e-4)
    for targets, r, words in ((["first", "third"], 4, "target 'third'"), (["first"], 0, "r is 0")):
        with pytest.raises(ValueError, match=words):
            attach_lora(Net(), targets, r)

LAYERS = {"model.layers.0.q_proj": (20, 30), "model.layers.1.q_proj": (20, 30), "lm_head": (7, 20)}
def peft_directory(path, changes=(), extras=(), dtype=torch.float32, r=4):
    """A directory as PEFT writes it, with changes to its config; its factors as stored."""
    factors = {x: (torch.randn(n, r), torch.randn(r, d)) for x, (n, d) in LAYERS.items()}
    factors = {x: (B.to(dtype), A.to(dtype)) for x, (B, A) in factors.items()}
    save_peft(Adapter(factors, dict(extras)), path)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
    config |= {"base_model_name_or_path": "some/model", "bias": "none", **dict(changes)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return factors

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes, scaling", [
    ({}, [2, 2, 2]), ({"use_rslora": True}, [4, 4, 4]),
    ({"rank_pattern": {"q_proj": 4}, "r": 9}, [2, 2, 2]),
    ({"alpha_pattern": {"q_proj": 1}}, [0.25, 0.25, 2]),
    ({"alpha_pattern": {"layers.0.q_proj": 1, "q_proj": 2}}, [0.25, 0.5, 2]),
    ({"alpha_pattern": {r".*\.1\..*": 16, "^lm_head": 4}}, [2, 4, 1]),
    ({"alpha_pattern": {"proj": 1, "m_head": 1, "q_pro": 1}}, [2, 2, 2]),
    ({"alpha_pattern": {"q_proj": 2}, "use_rslora": True}, [1, 1, 4]),
])
def test_the_scaling_is_folded_in_as_peft_computes_it(tmp_path, changes, scaling, dtype):
    stored = peft_directory(tmp_path / "a", changes, dtype=dtype)
    adapter = load_peft(tmp_path / "a")
    for (layer, (B, A)), scale in zip(stored.items(), scaling):
        assert torch.allclose(adapter.delta(layer), scale * (B.float() @ A.float()), atol=1e-4)
        assert adapter.factors[layer][0].dtype == torch.float32

@pytest.mark.parametrize("r", [1, 7, 20, 50])
def test_a_peft_directory_goes_through_a_share_file_and_out_again(tmp_path, r):
    extras = {"base_model.model.head.weight": torch.randn(3, 2).half()}
    peft_directory(tmp_path / "in", {"lora_alpha": 3, "use_rslora": True}, extras, r=r)
    adapter = load_peft(tmp_path / "in")
    adapter.factors["lm_head"][0].zero_()
    others = make_adapters("b", shapes={"lm_head": (7, 20)}, dtype=torch.float32)
    Share.from_adapters({"a": adapter, **others}, variance=1.0).save(tmp_path / "share")
    save_peft(Share.load(tmp_path / "share").reconstruct("a"), tmp_path / "out")
    back = load_peft(tmp_path / "out")
    for layer in LAYERS:
        delta = adapter.delta(layer)
        assert (back.delta(layer) - delta).norm() <= 1e-5 * delta.norm()
    assert back.extras.keys() == extras.keys()
    for name, tensor in extras.items():
        assert torch.equal(back.extras[name], tensor) and back.extras[name].dtype == tensor.dtype
    for key in ("base_model_name_or_path", "target_modules", "bias"):
        assert back.config[key] == adapter.config[key]
    ranks = {"^" + re.escape(layer): len(A) for layer, (_, A) in back.factors.items()}
    assert back.config["rank_pattern"] == back.config["alpha_pattern"] == ranks
    assert back.config["r"] == back.config["lora_alpha"] and not back.config["use_rslora"]

VARIANTS = {name: True for name in ("use_dora", "lora_bias", "use_qalora", "target_parameters")}
VARIANTS |= {"peft_type": "LOHA", "init_lora_weights": "pissa", "layer_replication": [[0, 1]]}
VARIANTS |= {"alora_invocation_tokens": [1], "trainable_token_indices": [1], "use_bdlora": True}
VARIANTS |= {f"{name}_config": {"r": 1} for name in ("arrow", "kasa", "monteclora")}
Q, ONES = "base_model.model.q_proj.lora_", torch.ones(1, 3, 3)
@pytest.mark.parametrize("changes, extras, words", [
    *[({name: value}, {}, f"is no plain LoRA .*{name}") for name, value in VARIANTS.items()],
    *[({"lora_alpha": value}, {}, "layer '.*no scaling") for value in (None, "x")],
    *[({"alpha_pattern": value}, {}, "layer '.*no scaling") for value in ([1], {"(": 2})],
    *[({}, {Q + x: ONES[0, 0]}, f"{x}' is no") for x in ("magnitude_vector", "B.bias")],
    ({}, {Q + "embedding_A": ONES[0]}, "embedding_A' is no"),
    ({}, {Q + "B.weight": ONES[0]}, r"layer 'q_proj': .* A \(r, d\) and B"),
    *[({}, {Q + "A.weight": A, Q + "B.weight": B}, "layer 'q_proj'") for A, B in (
        (ONES[0, :2], ONES[0]), (ONES, ONES))],
])
def test_what_is_no_plain_lora_is_refused_by_directory_and_reason(tmp_path, changes, extras, words):
    plain = {"use_dora": False, "init_lora_weights": "gaussian", "target_parameters": []}
    peft_directory(tmp_path / "a", plain | {"alpha_pattern": {"q": 2}}, {f"{Q[:-5]}bias": ONES})
    load_peft(tmp_path / "a")
    peft_directory(tmp_path / "a", changes, extras)
    with pytest.raises(ValueError, match=f"a(:|,)? .*{words}"):
        load_peft(tmp_path / "a")

def test_a_config_is_written_whole_or_nothing_is(tmp_path):
    old, new = make_adapters("ab", dtype=torch.float32).values()
    starts = {f"{name}_config": {} for name in ("eva", "corda", "loftq")}
    old.config = {"init_lora_weights": "eva", "target_modules": {"q", "k"}} | starts
    save_peft(old, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k", "q"]  # a set, as LoraConfig.to_dict() has it
    assert config["init_lora_weights"] is True and starts.keys().isdisjoint(config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new.config["dtype"] = torch.float32
    for path in (tmp_path, tmp_path / "other"):
        with pytest.raises(ValueError, match="torch.float32 .* JSON"):
            save_peft(new, path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

@pytest.mark.parametrize("cast", [torch.float32, torch.float8_e4m3fn])
def test_files_that_peft_reads_are_read_and_a_missing_prefix_is_called_so(tmp_path, cast):
    stored = peft_directory(tmp_path, dtype=torch.float32)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: t.to(cast) for name, t in safetensors.torch.load_file(path).items()}
    longer = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
    safetensors.torch.save_file(longer, path)
    for layer, (B, A) in stored.items():
        product = B.to(cast).float() @ A.to(cast).float()
        assert relative(load_peft(tmp_path).delta(layer), 2 * product) < 1e-6
    safetensors.torch.save_file({name[17:]: t for name, t in tensors.items()}, path)
    with pytest.raises(ValueError, match="'[^b].*weight' is no base_model.model.LAYER"):
        load_peft(tmp_path)

@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_peft_directory_that_is_damaged_or_missing_is_refused_by_name(tmp_path, name):
    peft_directory(tmp_path)
    cut = (tmp_path / name).read_bytes()[:-3]
    for content in [cut] + [b"3", b"[1]", b'"words"'] * name.endswith("json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path.name} is damaged"):
            load_peft(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_peft(tmp_path)
    peft_directory(tmp_path)
    safetensors.torch.save_file({"head": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has no LoRA weights"):
        load_peft(tmp_path)

# --- Against the real PEFT, transformers and accelerate, where they are installed
def random_model(kind):
    """A transformers model with random weights, and settings of LoRA adapters for it."""
    warnings.simplefilter("ignore")  # theirs
    transformers = pytest.importorskip("transformers", reason="not installed; .ci/run has it")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=48, num_labels=3)
        lora = {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}
        lora |= {"r": 4, "lora_alpha": 6, "alpha_pattern": {"0.attention.self.query": 3}}
        return transformers.BertForSequenceClassification(config).eval(), lora
    config = transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=1)
    lora = {"target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    lora |= {"r": 40, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"k_proj": 2}}
    return transformers.LlamaForCausalLM(config).eval(), lora

@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_real_peft_reads_what_we_write_and_gives_the_same_outputs(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="not installed; .ci/run has it")
    (base, settings), tokens = random_model(kind), torch.randint(50, (3, 7))
    adapters, expected = {}, {}
    for name in ("one", "two"):
        wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
        for parameter in filter(lambda q: q.requires_grad, wrapped.parameters()):
            nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(tmp_path / name)
        adapters[name], expected[name] = load_peft(tmp_path / name), wrapped(tokens).logits
    for rule in ({"variance": 1.0}, {"variance": 0.6, "p": 2}):
        share = Share.from_adapters(adapters, **rule)
        model = share.attach(copy.deepcopy(base))
        for name in adapters:
            back = share.reconstruct(name)
            save_peft(back, tmp_path / "out")
            written = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
            head = {n.removeprefix("base_model.model."): t for n, t in back.extras.items()}
            assert not model.load_state_dict(head, strict=False).unexpected_keys
            share.select(name)
            assert relative(written(tokens).logits, model(tokens).logits) < 1e-5
            assert "p" in rule or relative(written(tokens).logits, expected[name]) < 1e-5

def test_real_peft_takes_layers_by_their_full_names_and_any_rank(tmp_path):
    peft = pytest.importorskip("peft", reason="not installed; .ci/run has it")
    inner = nn.Sequential(nn.ReLU(), nn.Linear(4, 3))  # "2.0" ends as "0" does, and is no layer
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), inner)
    adapter = make_adapters("a", (1,), {"0": (4, 5), "2.1": (3, 4)}, torch.float32)["a"]
    adapter.config["init_lora_weights"] = "orthogonal"  # which would take an even rank
    save_peft(adapter, tmp_path)
    written = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    share, x = Share.from_adapters({"a": adapter}, variance=1.0), torch.randn(2, 5)
    assert relative(written(x), *outputs(share, share.attach(model), x, "a")) < 1e-5

@pytest.mark.parametrize("phi, reentrant", [(0, None), (2, True), (0, False)])
def test_real_trainer_learns_our_parameters_alone_and_writes_checkpoints(tmp_path, phi, reentrant):
    pytest.importorskip("accelerate", reason="not installed; .ci/run has it")
    model, tokens = random_model("llama")[0], torch.randint(50, (8, 7))
    linears = [(name, m) for name, m in model.named_modules() if name.endswith("v_proj")]
    shapes = {name: tuple(m.weight.shape) for name, m in linears}
    share = Share.from_adapters(make_adapters("ab", (4,), shapes, torch.float32), variance=1.0)
    settings = {"max_steps": 20, "learning_rate": 0.1, "logging_steps": 1, "save_steps": 10}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with share.learn(share.attach(model), "new", phi=phi, grow=True) as parameters:
        transformers = pytest.importorskip("transformers")
        arguments = transformers.TrainingArguments(tmp_path, **settings)
        data = {"train_dataset": [{"input_ids": row, "labels": row} for row in tokens]}
        trainer = transformers.Trainer(model, arguments, **data)
        trainer.train()
        assert trainer.get_num_trainable_parameters() == sum(q.numel() for q in parameters)
        end = model.eval()(tokens).logits
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and (tmp_path / "checkpoint-20").is_dir()
    share.select("new")
    assert relative(model(tokens).logits, end) < 1e-4

# --- train.py: Router and average
@pytest.mark.parametrize("f", [4, 16])
def test_the_router_knows_its_classes_and_sends_strangers_to_the_base(f):
    spread, means = torch.rand(f) + 0.5, []  # features of different sizes
    while len(means) < 9:
        mean = 6 * torch.randn(f)
        if all((mean - other).norm() >= 6 for other in means):  # standard deviations apart
            means.append(mean)
    draw = lambda mean, n: (mean + torch.randn(n, f)) * spread
    router = Router.fit({f"task {i}": draw(mean, 60) for i, mean in enumerate(means[:8])})
    right = [router.route(draw(mean, 200)).count(f"task {i}") for i, mean in enumerate(means)]
    assert sum(right) / 1600 >= 0.95
    assert router.route(draw(means[8], 400)).count(None) / 400 >= 0.95
    assert router.route(torch.full((1, f), NAN)) == [None]

def test_a_router_is_worked_out_by_hand():
    features = {"a": torch.tensor([[1.0], [3.0]]), "b": torch.tensor([[11.0], [13.0]])}
    features["a"].requires_grad_()  # as a model's hidden state does; it must leave no graph
    router = Router.fit(features)  # every sample is 2 from the other one of its task
    assert router.scale.tolist() == [[0.5]] and router.means.tolist() == [[1.0], [6.0]]
    assert router.radius == pytest.approx((1 + 4.5) / 2)  # scaled: to the own, the nearer other
    x = torch.tensor([[-3.4], [-3.6], [6.9], [17.4], [17.6]])
    assert router.route(x) == ["a", None, "a", "b", None] and not router.means.requires_grad
    assert Router.fit({"a": features["a"]}).radius == pytest.approx(1.0)

def test_a_router_sees_a_small_difference_where_a_task_hardly_varies():
    noise = torch.randn(200, 1) @ torch.ones(1, 5) * 2  # all features vary together
    offset = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
    draw = lambda sign: noise + sign * offset + 0.1 * torch.randn(200, 5)
    router = Router.fit({"plus": draw(1), "minus": draw(-1)})
    assert router.route(draw(1)).count("plus") > 190 and router.route(draw(-5)).count(None) > 190

def test_a_router_refuses_what_has_no_mean_or_spread():
    good = torch.randn(2, 3)
    for bad in (good[:1], good[0], good * INF):
        with pytest.raises(ValueError, match="task 'b': features"):
            Router.fit({"a": good, "b": bad})
    with pytest.raises(ValueError, match="features of 4 numbers.*3"):
        Router.fit({"a": good}).route(torch.randn(1, 4))

def test_the_average_is_the_best_fit_to_the_mean_of_the_updates():
    adapters = make_adapters("abc")
    del adapters["b"].factors["second"]
    share = Share.from_adapters(adapters, variance=1.0)
    average(share, "abc", "all"), average(share, ["a", "c"], "two", p=2)
    for layer, tasks, p in (("first", "abc", 9), ("second", "ac", 7)):
        mean = sum(adapters[t].delta(layer) for t in tasks) / 3  # a task without a layer adds 0
        assert relative(share.reconstruct("all").delta(layer), mean) < 1e-6
        assert share.coefficients[layer]["all"][0].shape[1] <= p
    mean = (adapters["a"].delta("first") + adapters["c"].delta("first")) / 2
    assert relative(share.reconstruct("two").delta("first"), best(mean, 2)) < 1e-6
    assert share.tasks == ["a", "b", "c", "all", "two"]

@pytest.mark.parametrize("tasks, name, p, words", [
    ("", "new", None, r"its layers are \[\]"), ("ax", "new", None, "task 'x' is unknown"),
    ("ab", "a", None, "task 'a' exists"), ("ab", "new", 0, "p is 0")])
def test_an_average_of_nothing_of_strangers_or_under_a_taken_name_is_refused(tasks, name, p, words):
    share = make_share("ab")
    with pytest.raises(ValueError, match=words):
        average(share, tasks, name, p)
    assert share.tasks == ["a", "b"]

# --- train.py: the experiment
R = [[0.9, 0.1, 0.2], [0.6, 0.8, 0.1], [0.7, 0.5, 1.0]]
def test_acc_bwt_and_forgetting_on_a_matrix_worked_by_hand():
    metrics = train.metrics(R)
    assert metrics["acc"] == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert metrics["bwt"] == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert metrics["forgetting"] == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert train.metrics([[0.5, 0.0], [0.9, 1.0]])["forgetting"] == pytest.approx(-0.4)

def test_several_runs_are_shown_as_mean_and_standard_deviation():
    assert train.spread([1.0, 2.0, 4.5], 2) == "2.50 ± 1.80"  # sqrt((1.5² + 0.5² + 2²) / 2)
    assert train.spread([0.25], 3) == "0.250" and train.spread([None], 3) == ""

def test_the_picture_has_a_cell_for_each_accuracy_of_both_methods():
    row = {"accuracy_matrix": R, **train.metrics(R)}
    root = ElementTree.fromstring(train.svg({"lora_sequential": row, "share": row}))
    shades = [e.get("fill-opacity") for e in root if e.tag.endswith("rect")]
    assert shades == [f"{value:.2f}" for values in R for value in values] * 2
    words = [e.text for e in root if e.tag.endswith("text")]
    assert "One LoRA" in words and "Share" in words and "ACC 0.73, forgetting 0.25" in words

def test_share_stores_less_as_soon_as_its_bases_are_paid_for():
    share = {"stored": 130, "trained_per_task": 10, "accuracy_matrix": R}  # bases of 100
    methods = {"share": share, "lora": {"trained_per_task": 30}}  # 100 + 10 t < 30 t from 6 on
    assert [train.break_even(methods, "lora", first) for first in (2, 8)] == [6, 8]

def test_a_claim_that_does_not_hold_is_an_error():
    names = "lora_per_task lora_sequential share share_merge share_grow share_routed random_basis"
    good = {"acc": 1.0, "forgetting": 0.0, "trained_per_task": 1000, "base_kept": 0.95}
    methods = {name: dict(good) for name in names.split()}
    methods["share"]["trained_per_task"], methods["lora_sequential"]["forgetting"] = 10, 0.5
    train.check(methods)
    for name in names.split()[1:]:
        worse = {"acc": 1.01 if name == "random_basis" else 0.97, "forgetting": 0.021}
        with pytest.raises(AssertionError, match="is not between"):
            train.check(methods | {name: methods[name] | worse})

FLAGS = "--json no/x, --svg no/x, --seeds 0, --unknown, --json x --sweep, --seeds 2 --scaling"
@pytest.mark.parametrize("flags", FLAGS.split(", "))
def test_flags_that_cannot_be_followed_are_refused_before_the_run(flags, capsys):
    with pytest.raises(SystemExit):
        train.main(flags.split())
    assert flags.split()[-1] in capsys.readouterr().err

def test_a_cipher_is_the_sum_of_letter_and_key():
    answer = train.encipher(torch.tensor([[1, 2, 15]]), torch.tensor([[0, 15, 3, 4, 5, 6] * 2]))
    assert answer.tolist() == [[1, 1, 2, 5, 7, 5] * 2]

README = (Path(__file__).parent / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
def test_the_readme_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        peft_directory(tmp_path / "adapters" / name)
    names = {}
    exec(EXAMPLES[0], names)
    assert names["share"].tasks == ["one", "two", "three", "four"]
    exec(EXAMPLES[1], {})
    assert load_peft("served").factors.keys() == LAYERS.keys()
    assert "'two': " in capsys.readouterr().out and len(EXAMPLES[1].splitlines()) <= 15
