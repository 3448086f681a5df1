"""Read this as the specification of Share: each test states one law and checks it.

The references are independent of the code: dense matrices, torch.linalg.svd, slow twins written
like the paper. Equality is claimed in float64. Refusals stand beside what is accepted.
"""

import copy
import json
import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from share import (
    Adapter,
    LoRALinear,
    Router,
    Share,
    ShareLinear,
    ToyTransformer,
    _serialize,
    attach_lora,
    build_basis,
    load_peft,
    lora_adapter,
    save_peft,
    train_coefficients,
)

pytestmark = pytest.mark.filterwarnings("error")  # a warning that is ours is a failure
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"first": (20, 30), "second": (40, 12)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_adapters(tasks, ranks=(3, 2, 4), shapes=SHAPES, dtype=torch.float64, shared=None):
    """Random adapters of rank ranks[i mod len]; with `shared`, all in so many directions a side."""
    span = {
        (layer, m): torch.linalg.qr(torch.randn(m, min(shared or m, m), dtype=dtype)).Q
        for layer, shape in shapes.items()
        for m in shape
    }
    adapters = {}
    for i, task in enumerate(tasks):
        r, factors = ranks[i % len(ranks)], {}
        for layer, (n, d) in shapes.items():
            left, right = span[layer, n], span[layer, d]
            B = left @ torch.randn(left.shape[1], r, dtype=dtype)
            factors[layer] = B, torch.randn(r, right.shape[1], dtype=dtype) @ right.T
        adapters[task] = Adapter(factors)
    return adapters


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def assert_same_span(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a @ a.T - b @ b.T).norm() < tolerance


def slow_basis(stack, variance, center=True, least=0):
    """The paper's phase 1, then the mean's direction added; in any case `least` columns."""
    mean = stack.mean(1, keepdim=True)
    U, S, _ = torch.linalg.svd(stack - mean if center else stack, full_matrices=False)
    k = 1
    while (S[:k] ** 2).sum() < variance * (S**2).sum():
        k += 1
    basis = torch.linalg.qr(torch.cat([U[:, :k], mean], 1)).Q if center else U[:, :k]
    if basis.shape[1] >= least:
        return basis
    return torch.linalg.svd(stack).U[:, :least]


def stacks(adapters, layer):
    """The paper's two stacks, n × Σr and d × Σr."""
    pairs = [a.factors[layer] for a in adapters.values() if layer in a.factors]
    return torch.cat([B for B, _ in pairs], 1), torch.cat([A.T for _, A in pairs], 1)


class Net(nn.Module):
    """A model that is not ours: two linear layers, one without a bias, and a normalisation."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(30, 20), nn.BatchNorm1d(20)
        self.middle, self.second = nn.Linear(20, 12), nn.Linear(12, 40, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.middle(self.norm(self.first(x)))))


def attached(tasks="ab", dtype=torch.float64, **settings):
    """A share of some adapters, and a Net in evaluation mode that it is attached to."""
    share = Share.from_adapters(make_adapters(tasks), **settings)
    model = Net().to(DEVICE, dtype).eval()
    return share, share.attach(model)


def batch(dtype=torch.float64):
    return torch.randn(16, 30, dtype=dtype, device=DEVICE)


def square_loss(model, x):
    return (model(x) - 1).square().mean()


def state(share, model):
    """Everything that a training run must not touch, as plain values."""
    numbers = [b.clone() for pair in share.bases.values() for b in pair]
    numbers += [e.clone() for pair in share.coefficients.values() for e in pair]
    numbers += [t.clone() for t in model.state_dict().values()]
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return numbers, flags, [m.training for m in model.modules()], share.tasks, share.selected


def assert_same_state(before, after):
    assert len(before[0]) == len(after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0]))
    assert before[1:] == after[1:]


# Linear algebra


@pytest.mark.parametrize("m", [8, 60])
def test_a_basis_has_orthonormal_columns_and_recovers_a_planted_subspace(m):
    planted = torch.linalg.qr(torch.randn(50, 5, dtype=torch.float64)).Q
    stack = planted @ torch.randn(5, m, dtype=torch.float64)
    stack += 1e-7 * torch.randn(50, m, dtype=torch.float64)
    basis = build_basis(stack, k=5)
    assert torch.allclose(basis.T @ basis, torch.eye(5, dtype=torch.float64), atol=1e-9)
    assert_same_span(basis, planted)


@pytest.mark.parametrize("variance", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_k_is_the_smallest_number_of_directions_that_explains_the_variance(shape, variance):
    stack = torch.randn(*shape, dtype=torch.float64)
    assert_same_span(build_basis(stack, variance, center=False), slow_basis(stack, variance, False))
    assert_same_span(build_basis(stack, variance), slow_basis(stack, variance))


SPECTRA = {  # of stacks so large that the main directions are iterated for, where that is fast
    "few": lambda i: (i < 37) * (1 + 0.1 * i) + 1e-3,
    "falling": lambda i: 1 / (1 + i),
    "flat": lambda i: 2 - i / 600,
    "ten": lambda i: (i < 10) * (1 + 0.1 * i),
}


@pytest.mark.parametrize("n, m, turned", [(600, 600, False), (450, 900, True), (900, 450, True)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_large_stack_has_the_directions_of_a_plain_svd(spectrum, n, m, turned):
    values = SPECTRA[spectrum](torch.arange(min(n, m), dtype=torch.float64).flip(0))
    left, right = torch.randn(n, len(values)).double(), torch.randn(m, len(values)).double()
    left = torch.linalg.qr(left).Q if turned else torch.eye(n).double()
    stack = left * values @ torch.linalg.qr(right).Q.T
    assert_same_span(build_basis(stack, center=False), slow_basis(stack, 0.6, False))
    assert_same_span(build_basis(stack), slow_basis(stack, 0.6))
    heaviest = torch.linalg.svd(stack).U[:, : 10 if spectrum == "ten" else 15]
    assert_same_span(build_basis(stack, k=15), heaviest)
    assert build_basis(stack, k=50).shape == (n, 10 if spectrum == "ten" else 50)


def test_a_large_stack_takes_no_random_numbers_and_always_gets_the_same_basis():
    stack = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 400, dtype=torch.float64)
    state = torch.get_rng_state()
    basis = build_basis(stack, k=5)
    assert torch.equal(torch.get_rng_state(), state)
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
    assert basis.shape == (20, 2)
    assert relative(basis @ (basis.T @ common), common) < 0.02


def test_a_mean_that_lies_inside_the_basis_adds_no_direction():
    plane = torch.linalg.qr(torch.randn(20, 2, dtype=torch.float64)).Q
    stack = plane @ (torch.randn(2, 9, dtype=torch.float64) + 3)
    assert build_basis(stack, 1.0).shape == (20, 2)
    assert build_basis(stack + 1e-9 * torch.randn(20, 1, dtype=torch.float64), 1.0).shape == (20, 2)


def test_a_zero_stack_has_no_direction_and_a_single_column_has_one():
    assert build_basis(torch.zeros(7, 3)).shape == (7, 0)
    column = torch.randn(7, 1)
    assert torch.allclose(build_basis(column).abs(), (column / column.norm()).abs(), atol=1e-6)


def test_a_half_precision_stack_gives_a_float32_basis():
    basis = build_basis(torch.randn(20, 6).bfloat16(), k=3)
    assert basis.dtype == torch.float32
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-6)


def test_build_basis_refuses_what_has_no_directions():
    stack = torch.randn(5, 4)
    assert build_basis(stack, variance=1.0, k=None).shape[0] == 5
    for variance in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="variance is"):
            build_basis(stack, variance)
    assert build_basis(stack, k=1).shape == (5, 1)
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k is"):
            build_basis(stack, k=k)
    for bad in (torch.randn(5), torch.randn(5, 0), torch.full((5, 2), float("nan"))):
        with pytest.raises(ValueError, match="stack"):
            build_basis(bad)


# Phase 1


@pytest.mark.parametrize("stack", ["factors", "updates"])
@pytest.mark.parametrize("common", [0.0, 100.0])
@pytest.mark.parametrize("tasks", ["a", "abcde"])
def test_with_all_the_variance_every_adapter_returns(stack, common, tasks):
    adapters = make_adapters(tasks)
    for adapter in adapters.values():
        for B, A in adapter.factors.values():
            B += common * torch.ones(len(B), 1, dtype=B.dtype)
    if tasks != "a":
        del adapters["b"].factors["first"]  # a task that leaves a layer alone
        adapters["c"].factors["second"][0].zero_()
    share = Share.from_adapters(adapters, variance=1.0, stack=stack)
    for task, adapter in adapters.items():
        back = share.reconstruct(task)
        assert back.factors.keys() == adapter.factors.keys()
        for layer in adapter.factors:
            error = (back.delta(layer) - adapter.delta(layer)).norm()
            assert error <= 1e-5 * adapter.delta(layer).norm()
    assert all(part == pytest.approx(1.0) for part in share.retained().values())


def test_each_layer_and_side_has_the_basis_of_its_own_stack():
    adapters = make_adapters("abcd")
    share = Share.from_adapters(adapters, variance=0.6)
    for layer in SHAPES:
        for basis, stack in zip(share.bases[layer], stacks(adapters, layer)):
            assert_same_span(basis, slow_basis(stack, 0.6))
    assert len({basis.shape[1] for pair in share.bases.values() for basis in pair}) > 1


def test_the_orthonormal_shortcut_agrees_with_the_pseudoinverse_of_any_basis():
    adapters = make_adapters("abc")
    share = Share.from_adapters(adapters, variance=0.6)
    for task, adapter in adapters.items():
        B, _ = adapter.factors["first"]
        beta, _ = share.bases["first"]
        skewed = beta @ torch.randn(beta.shape[1], beta.shape[1], dtype=beta.dtype)
        general = torch.linalg.solve(skewed.T @ skewed, skewed.T @ B)
        assert torch.allclose(share.eps("first", task)[0], beta.T @ B, atol=1e-9)
        assert torch.allclose(skewed @ general, beta @ (beta.T @ B), atol=1e-6)
        assert not torch.allclose(skewed @ (skewed.T @ B), beta @ (beta.T @ B), atol=0.1)


@pytest.mark.parametrize("p", [1, 2])
def test_rank_p_coefficients_are_the_best_that_the_bases_allow(p):
    adapters = make_adapters("abc")
    share = Share.from_adapters(adapters, variance=0.8, p=p)
    late = make_adapters("d")["d"]
    share.add("d", late, p=p)
    for task, adapter in (adapters | {"d": late}).items():
        for layer, (beta, alpha) in share.bases.items():
            inside = beta @ beta.T @ adapter.delta(layer) @ alpha @ alpha.T
            U, S, Vh = torch.linalg.svd(inside)
            best = U[:, :p] @ torch.diag(S[:p]) @ Vh[:p]
            assert relative(share.reconstruct(task).delta(layer), best) < 1e-6
            assert share.eps(layer, task)[0].shape == (beta.shape[1], p)


def test_stacked_updates_do_not_depend_on_how_an_update_is_split_or_on_its_size():
    adapters = make_adapters("abcd")
    changed = copy.deepcopy(adapters)
    for i, adapter in enumerate(changed.values()):
        for layer, (B, A) in adapter.factors.items():
            G = torch.randn(len(A), len(A), dtype=A.dtype)
            adapter.factors[layer] = 10.0**i * B @ G, torch.linalg.solve(G, A)
    one, other = (Share.from_adapters(a, stack="updates", p=2) for a in (adapters, changed))
    for layer in SHAPES:
        for basis, basis_ in zip(one.bases[layer], other.bases[layer]):
            assert_same_span(basis, basis_)
        for i, task in enumerate(adapters):
            delta = other.reconstruct(task).delta(layer) / 10.0**i
            assert relative(delta, one.reconstruct(task).delta(layer)) < 1e-5
    paper, paper_ = (Share.from_adapters(a) for a in (adapters, changed))
    (beta, _), (beta_, _) = paper.bases["first"], paper_.bases["first"]
    assert beta.shape != beta_.shape or (beta @ beta.T - beta_ @ beta_.T).norm() > 0.1


def test_retained_is_one_minus_the_squared_relative_error():
    adapters = make_adapters("abc")
    share = Share.from_adapters(adapters)
    for task, part in share.retained().items():
        back, whole = share.reconstruct(task), adapters[task]
        lost = sum(float((back.delta(x) - whole.delta(x)).square().sum()) for x in SHAPES)
        all_of_it = sum(float(whole.delta(x).square().sum()) for x in SHAPES)
        assert part == pytest.approx(1 - lost / all_of_it)


def test_the_papers_count_688128_against_1456():
    shapes = {f"layer {i}": (1536, 1536) for i in range(28)}
    model = nn.ModuleDict({name: nn.Linear(d, n, device="meta") for name, (n, d) in shapes.items()})
    lora = sum(8 * (m.in_features + m.out_features) for m in model.values())
    small = {f"layer {i}": (64, 64) for i in range(28)}  # coefficients do not depend on n and d
    share = Share.from_adapters(make_adapters("abcd", (8,), small, torch.float32), k=26, p=1)
    assert lora == 688_128
    assert share.num_parameters("a") == 1_456
    assert share.num_parameters() == 28 * 26 * (64 + 64) + 4 * 1_456


def test_extras_and_config_travel_with_their_task():
    adapters = make_adapters("ab")
    adapters["a"].extras["head.weight"] = torch.randn(3, 4).half()
    adapters["a"].config["task_type"] = "SEQ_CLS"
    share = Share.from_adapters(adapters)
    back = share.reconstruct("a")
    assert torch.equal(back.extras["head.weight"], adapters["a"].extras["head.weight"])
    assert back.config == {"task_type": "SEQ_CLS"} and share.reconstruct("b").config == {}
    without = share.num_parameters("b")
    assert share.num_parameters("a") == 12 + sum(
        e.numel() for layer in share.layers for e in share.eps(layer, "a")
    )
    assert without > 0


def test_a_removed_task_is_gone_and_the_others_keep_their_updates():
    share, model = attached("abc")
    before = share.reconstruct("b").delta("first")
    share.select("a")
    share.remove("a")
    assert share.tasks == ["b", "c"] and share.selected is None
    assert torch.equal(share.reconstruct("b").delta("first"), before)


def test_whatever_comes_and_goes_each_task_has_its_own_columns_and_there_is_no_other():
    share, model = attached("abc")
    late, x = make_adapters("def"), batch()
    for change in (
        lambda: share.remove("b"),
        lambda: share.add("d", late["d"], p=1),
        lambda: train_coefficients(share, model, "new", [x], square_loss, p=2),
        lambda: share.remove("a"),
        lambda: train_coefficients(share, model, "c", [x], square_loss, finetune=True),
        lambda: share.merge({"e": late["e"]}, grow=True),
        lambda: share.remove("new"),
        lambda: share.add("f", late["f"]),
    ):
        before = {task: share.reconstruct(task).delta("second") for task in share.tasks}
        change()
        kept = before.keys() & set(share.tasks) - {"c"}
        for task in kept:
            assert relative(share.reconstruct(task).delta("second"), before[task]) < 1e-12
        for layer, spans in share.spans.items():
            used = [i for start, p in spans.values() for i in range(start, start + p)]
            held = share.coefficients[layer][0].shape[1]
            assert sorted(used) == [*range(held)] and spans.keys() == set(share.tasks)


def test_a_task_without_any_update_stays_so_and_is_no_hindrance_to_a_merge():
    adapters = make_adapters("ab")
    for layer, (B, A) in adapters["a"].factors.items():
        adapters["a"].factors[layer] = torch.zeros_like(B), A
    share = Share.from_adapters({"a": adapters["a"]}, variance=1.0, center=False)
    share.merge({"b": adapters["b"]})
    for layer in SHAPES:
        assert not share.reconstruct("a").delta(layer).any()
        assert relative(share.reconstruct("b").delta(layer), adapters["b"].delta(layer)) < 1e-9


@pytest.mark.parametrize("stack", ["factors", "updates"])
def test_a_merge_keeps_a_small_adapter_that_lies_in_the_bases_beside_a_large_one(stack):
    share = Share.from_adapters(make_adapters("abc"), variance=1.0, stack=stack)
    (B, A), large = share.reconstruct("a").factors["first"], make_adapters("l")["l"]
    large.factors = {"first": large.factors["first"]}
    share.merge({"large": large, "small": Adapter({"first": (1e-8 * B, A)})}, grow=True)
    assert relative(share.reconstruct("small").delta("first"), 1e-8 * B @ A) < 1e-6


def test_an_untrained_layer_keeps_a_rank_that_other_adapters_and_files_accept(tmp_path):
    adapters = make_adapters("ab")
    for adapter in adapters.values():
        B, A = adapter.factors["first"]
        adapter.factors["first"] = torch.zeros_like(B), A
    share = Share.from_adapters(adapters, p=2)
    share.add("again", share.reconstruct("a"))
    share.average(["a", "b"], "mean")
    save_peft(share.reconstruct("a"), tmp_path / "a")
    B, A = load_peft(tmp_path / "a").factors["first"]
    assert not B.any() and B.shape[1] == len(A) == 1


def test_the_mean_is_never_part_of_stacked_updates_however_the_share_is_made():
    adapters = make_adapters("abc")
    share = Share(variance=0.6, stack="updates")
    share.merge(adapters)
    made = Share.from_adapters(adapters, variance=0.6, stack="updates")
    assert torch.equal(share.bases["first"][0], made.bases["first"][0])


def test_removing_a_task_of_a_selected_mixture_selects_none():
    share, model = attached("ab")
    share.select(["a", None])
    share.remove("b")
    assert share.selected == ("a", None)
    share.remove("a")
    assert share.selected is None


def test_an_empty_batch_and_tasks_from_a_generator_can_be_selected():
    share, model = attached("ab")
    x = batch()[:2]
    share.select(task for task in ("a", "b"))
    mixed = model(x)
    share.select("b")
    assert relative(mixed[1], model(x)[1]) < 1e-12
    share.select([])
    assert model(x[:0]).shape == mixed[:0].shape


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda B, A: (B, A[:, :-1]), "do not fit the layer"),
        (lambda B, A: (B[:-1], A), "do not fit the layer"),
        (lambda B, A: (B[:, :-1], A), r"not \(n, r\)"),
        (lambda B, A: (B[:, :0], A[:0]), r"not \(n, r\)"),
        (lambda B, A: (B * float("inf"), A), "NaN or infinity"),
        (lambda B, A: (B, A + 0j), "not real"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_nothing_changes(change, words):
    share = Share.from_adapters(make_adapters("ab"))
    good = make_adapters("c")["c"]
    bad = copy.deepcopy(good)
    bad.factors["second"] = change(*bad.factors["second"])
    for call in (lambda: share.add("c", bad), lambda: share.merge({"d": good, "c": bad})):
        with pytest.raises(ValueError, match="task 'c', layer 'second'.*" + words):
            call()
    assert share.tasks == ["a", "b"]
    share.add("c", good)
    assert share.tasks == ["a", "b", "c"]


def test_names_and_numbers_out_of_range_are_refused():
    adapters = make_adapters("ab")
    share = Share.from_adapters(adapters, variance=1.0, k=4, p=1, stack="updates")
    for settings in ({"variance": 0}, {"k": 0}, {"p": 0}, {"stack": "rows"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Share.from_adapters(adapters, **settings)
    with pytest.raises(ValueError, match="adapters is empty"):
        Share.from_adapters({})
    with pytest.raises(ValueError, match="no LoRA factors"):
        Share.from_adapters({"a": Adapter({})})
    with pytest.raises(ValueError, match="task 'a' exists"):
        share.add("a", adapters["a"])
    with pytest.raises(ValueError, match="p is 0"):
        share.add("c", make_adapters("c")["c"], p=0)
    with pytest.raises(ValueError, match="layer 'third': no bases"):
        share.add("c", Adapter({"third": adapters["a"].factors["first"]}))
    for call in (share.reconstruct, share.remove, share.select, share.num_parameters):
        for kind in (KeyError, ValueError):
            with pytest.raises(kind, match="task 'x' is unknown; the share has"):
                call("x")


# Phase 3


def slow_merge(share, adapters, layer):
    """The paper's phase 3 for one layer: reconstruct, stack, SVD (k never smaller), project."""
    everything = {task: share.reconstruct(task) for task in share.tasks} | adapters
    beta, alpha = (
        slow_basis(stack, share.variance, share.center, least=old.shape[1])
        for stack, old in zip(stacks(everything, layer), share.bases[layer])
    )
    deltas = {task: a.delta(layer) for task, a in everything.items() if layer in a.factors}
    inside = {t: beta @ beta.T @ delta @ alpha @ alpha.T for t, delta in deltas.items()}
    return (beta, alpha), inside


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("tasks", ["a", "abcd"])
def test_a_merge_equals_reconstructing_and_stacking_everything(tasks, center):
    share = Share.from_adapters(make_adapters(tasks), variance=0.7, center=center)
    for name in "wxyz":
        new = make_adapters([name, name + "'"])
        del new[name].factors["second"]
        slow = {layer: slow_merge(share, new, layer) for layer in SHAPES}
        share.merge(new)
        for layer, (bases, deltas) in slow.items():
            for basis, slow_one in zip(share.bases[layer], bases):
                assert_same_span(basis, slow_one)
            for task, delta in deltas.items():
                assert relative(share.reconstruct(task).delta(layer), delta) < 1e-5


def slow_updates(stack, other, ranks):
    """Left singular vectors times values of each ΔW, at unit norm, by dense SVDs."""
    columns = []
    for B, A in zip(stack.split(ranks, 1), other.split(ranks, 1)):
        U, S, _ = torch.linalg.svd(B @ A.T)
        columns.append((U[:, : len(S)] * S / S.norm())[:, : B.shape[1]])
    return torch.cat(columns, 1)


@pytest.mark.parametrize("shared", [None, 3])  # 3: a rank-deficient stack
@pytest.mark.parametrize("stack", ["factors", "updates"])
@pytest.mark.parametrize("t", [1, 8, 60])
def test_one_more_task_equals_the_long_way_for_few_tasks_and_for_many(t, stack, shared):
    adapters = make_adapters([f"task {i}" for i in range(t)], (3, 1, 5), shared=shared)
    share = Share.from_adapters(adapters, variance=0.8, stack=stack)
    new = make_adapters(["new"], (4,))
    everything = {task: share.reconstruct(task) for task in share.tasks} | new
    ranks = [a.factors["first"][0].shape[1] for a in everything.values()]
    left, right = stacks(everything, "first")
    sides = [left, right]
    if stack == "updates":
        sides = [slow_updates(left, right, ranks), slow_updates(right, left, ranks)]
    k = [basis.shape[1] for basis in share.bases["first"]]
    share.merge(new)
    slow = [slow_basis(s, 0.8, stack == "factors", least) for s, least in zip(sides, k)]
    for basis, slow_one in zip(share.bases["first"], slow):
        assert_same_span(basis, slow_one)
    beta, alpha = slow
    for task, adapter in everything.items():
        inside = beta @ beta.T @ adapter.delta("first") @ alpha @ alpha.T
        assert relative(share.reconstruct(task).delta("first"), inside) < 1e-5


@pytest.mark.parametrize("stack", ["factors", "updates"])
def test_a_growing_merge_moves_no_earlier_update_and_returns_the_new_one(stack):
    share = Share.from_adapters(make_adapters("abc", dtype=torch.float32), stack=stack)
    for name in "xyz":
        before = {t: share.reconstruct(t) for t in share.tasks}
        k = [basis.shape[1] for pair in share.bases.values() for basis in pair]
        new = make_adapters(name, dtype=torch.float32)
        share.merge(new, variance=1.0, grow=True)
        for task, adapter in before.items():
            for layer in SHAPES:
                assert (share.reconstruct(task).delta(layer) - adapter.delta(layer)).norm() < 1e-6
        for layer in SHAPES:
            assert relative(share.reconstruct(name).delta(layer), new[name].delta(layer)) < 1e-5
        grown = [basis.shape[1] for pair in share.bases.values() for basis in pair]
        assert all(0 <= b - a <= 3 for a, b in zip(k, grown))


def test_a_growing_merge_adds_nothing_for_an_adapter_inside_the_bases():
    adapters = make_adapters("abcd", shared=4)
    share = Share.from_adapters({t: adapters[t] for t in "abc"}, variance=1.0)
    before = copy.deepcopy(share.bases)
    share.merge({"d": adapters["d"]}, grow=True)
    for layer in SHAPES:
        assert all(torch.equal(a, b) for a, b in zip(before[layer], share.bases[layer]))
        assert relative(share.reconstruct("d").delta(layer), adapters["d"].delta(layer)) < 1e-5


def test_k_never_shrinks_by_itself_but_a_cap_can_make_it():
    share = Share.from_adapters(make_adapters("abcd"), variance=0.9)
    k = [basis.shape[1] for pair in share.bases.values() for basis in pair]
    big = make_adapters("e", (1,))
    for B, _ in big["e"].factors.values():
        B *= 1000  # by the variance rule this one direction would be a basis by itself
    share.merge(big, variance=0.6)
    assert [basis.shape[1] for pair in share.bases.values() for basis in pair] == k
    share.merge(make_adapters("f"), k=2)
    assert {basis.shape[1] for pair in share.bases.values() for basis in pair} == {2}


def test_building_holds_little_more_than_one_stack_in_double_at_a_time():
    names, shapes = [str(i) for i in range(100)], {"first": (512, 512), "second": (512, 512)}
    settings = {"ranks": (8,), "shapes": shapes, "dtype": torch.float32, "shared": 8}
    adapters = make_adapters(names, **settings)
    peak = train.peak_memory(lambda: Share.from_adapters(adapters))
    assert 1 < peak / (512 * 800 * 8) < 1.5


def test_bases_stay_when_no_task_is_left_and_one_without_an_update_comes():
    share = Share.from_adapters(make_adapters("a"))
    before, (B, A) = share.bases["first"], share.reconstruct("a").factors["first"]
    share.remove("a")
    share.merge({"zero": Adapter({"first": (0 * B, 0 * A)})})
    for basis, old in zip(share.bases["first"], before):
        assert_same_span(basis, old)


def test_directions_that_no_task_uses_any_more_stay_in_the_bases():
    adapters = make_adapters("ab", (4,))
    share = Share.from_adapters(adapters, variance=1.0)
    share.remove("a")
    share.merge({"c": make_adapters("c", (1,), shared=1)["c"]})
    share.add("a again", adapters["a"])
    assert share.retained()["a again"] > 0.5
    beta, _ = share.bases["first"]
    assert torch.allclose(beta.T @ beta, torch.eye(beta.shape[1], dtype=beta.dtype), atol=1e-9)


def test_float32_bases_stay_orthonormal_when_a_new_adapter_lies_almost_inside():
    adapters = make_adapters("ab", shared=4, dtype=torch.float32)
    share = Share.from_adapters({"a": adapters["a"]}, variance=1.0)
    B, A = adapters["a"].factors["first"]
    nudge = make_adapters("n", (3,), dtype=torch.float32)["n"].factors["first"][0]
    share.merge({"b": Adapter({"first": (B + 1e-5 * nudge, A)})}, variance=1.0, grow=True)
    beta = share.bases["first"][0].double()
    assert beta.shape[1] > 3
    assert (beta.T @ beta - torch.eye(beta.shape[1], dtype=torch.float64)).abs().max() < 1e-6


def test_bases_stay_orthonormal_over_sixty_merges():
    share = Share.from_adapters(make_adapters("a", dtype=torch.float32))
    for i in range(60):
        share.merge(make_adapters([f"task {i}"], dtype=torch.float32), grow=i % 2 == 0)
    for pair in share.bases.values():
        for basis in pair:
            assert (basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-5


def test_a_growing_merge_keeps_to_its_cap_and_centres_as_the_share_does():
    for center in (True, False):
        share = Share.from_adapters(make_adapters("a", (2,)), center=center, k=2)
        new = make_adapters("b", (6,))
        residual = [s - b @ b.T @ s for b, s in zip(share.bases["first"], stacks(new, "first"))]
        capped = copy.deepcopy(share)
        capped.merge(new, k=3, grow=True)
        assert {b.shape[1] for pair in capped.bases.values() for b in pair} == {3}
        old = share.bases["first"]
        share.merge(new, grow=True)
        for basis, before, rest in zip(share.bases["first"], old, residual):
            slow = slow_basis(rest, 0.6, center)
            assert_same_span(basis, torch.cat([before, slow], 1))


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


def test_a_merge_or_an_add_that_fails_changes_nothing():
    share = Share.from_adapters(make_adapters("ab"))
    before = share.num_parameters()
    bad = make_adapters("c")["c"]
    bad.config["file"] = open(__file__)  # cannot be copied
    for call in (lambda: share.merge({"c": bad}), lambda: share.add("c", bad)):
        with pytest.raises(TypeError):
            call()
        assert share.tasks == ["a", "b"] and share.num_parameters() == before
    bad.config.pop("file").close()


def test_adapters_that_still_require_gradients_leave_no_graph_behind():
    adapters = make_adapters("abc")
    for adapter in adapters.values():
        for pair in adapter.factors.values():
            for factor in pair:
                factor.requires_grad_(True)
    share = Share.from_adapters({t: adapters[t] for t in "ab"}, p=1)
    share.add("c", adapters["c"])
    tensors = [t for pair in share.bases.values() for t in pair]
    tensors += [t for pair in share.coefficients.values() for t in pair]
    assert not any(t.requires_grad for t in tensors)


def test_a_merge_may_bring_a_layer_and_may_lack_one():
    share = Share.from_adapters(make_adapters("a"), variance=1.0)
    new = make_adapters("b", shapes={"second": SHAPES["second"], "third": (6, 5)})
    share.merge(new)
    assert share.layers == ["first", "second", "third"]
    assert share.reconstruct("a").factors.keys() == {"first", "second"}
    for layer in new["b"].factors:
        assert relative(share.reconstruct("b").delta(layer), new["b"].delta(layer)) < 1e-5


def test_the_variance_rule_applied_afresh_forgets_and_ours_does_not():
    """The trap: what a merge drops of old tasks makes the newest one louder in the next merge."""
    adapters = make_adapters("abcdefghijkl", (2,), shared=8)
    first, rule = {t: adapters[t] for t in "abcd"}, 0.6
    ours, grown = (Share.from_adapters(first, variance=rule, center=False) for _ in range(2))
    published = {t: a.factors["first"] for t, a in first.items()}
    before = grown.retained()
    for task in "efghijkl":
        ours.merge({task: adapters[task]})
        grown.merge({task: adapters[task]}, grow=True)
        published[task] = adapters[task].factors["first"]
        stack = stacks({t: Adapter({"first": pair}) for t, pair in published.items()}, "first")
        beta, alpha = (slow_basis(side, rule, center=False) for side in stack)
        published = {t: (beta @ beta.T @ B, A @ alpha @ alpha.T) for t, (B, A) in published.items()}
    errors = [relative(torch.mm(*published[t]), adapters[t].delta("first")) for t in first]
    assert sum(errors) / 4 > 0.99  # nothing is left of the first tasks
    assert sum(ours.retained()[t] for t in first) > 0.5 * sum(before.values())
    assert all(grown.retained()[t] == pytest.approx(before[t]) for t in first)


# ShareLinear, attach and detach


def test_the_forward_pass_equals_the_dense_formula():
    share, model = attached()
    x = torch.randn(2, 3, 30, dtype=torch.float64, device=DEVICE)
    layer, bare = model.first, nn.functional.linear(x, model.first.weight, model.first.bias)
    assert torch.equal(layer(x), bare)
    for task in "ab":
        share.select(task)
        delta = share.reconstruct(task).delta("first")
        assert torch.allclose(layer(x), bare + x @ delta.T, atol=1e-12)
    share.select(None)
    assert torch.equal(layer(x), bare)


def test_after_detach_the_model_is_bit_for_bit_what_it_was():
    share = Share.from_adapters(make_adapters("ab", dtype=torch.float32))
    model = Net().to(DEVICE)
    model.middle.weight.requires_grad_(False)
    twin, first = copy.deepcopy(model), model.first
    share.attach(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == twin.state_dict().keys()
    share.select("a")
    share.detach(model)
    assert model.first is first and type(model.second) is nn.Linear
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_folded_task_gives_the_outputs_that_the_attached_one_gave(dtype, tolerance):
    share = Share.from_adapters(make_adapters("ab", dtype=torch.float32))
    model = share.attach(Net().to(DEVICE, dtype).eval())
    x = batch(dtype)
    share.select("b")
    expected = model(x)
    assert expected.dtype == dtype
    share.detach(model, "b")
    assert type(model.first) is nn.Linear and model.first.weight.requires_grad
    assert relative(model(x).float(), expected.float()) < tolerance
    with pytest.raises(ValueError, match="no layer of this share"):
        share.detach(model)


def test_a_task_that_lacks_a_layer_leaves_it_alone():
    adapters = make_adapters("ab")
    del adapters["a"].factors["first"]
    share = Share.from_adapters(adapters)
    model = share.attach(Net().to(DEVICE, torch.float64).eval())
    x = batch()
    bare = model.first(x)
    share.select("a")
    assert torch.equal(model.first(x), bare)
    share.select("b")
    assert not torch.equal(model.first(x), bare)


def test_attach_refuses_a_layer_by_name_and_changes_nothing():
    share = Share.from_adapters(make_adapters("ab"))
    for layer, other, words in (
        ("second", None, "of the model is None, no plain nn.Linear"),
        ("second", nn.Conv1d(3, 3, 1), r"of the model is Conv1d.*, no plain nn.Linear"),
        ("second", nn.Linear(12, 41), r"is \(41, 12\), its bases \(40, 12\)"),
    ):
        model = Net()
        delattr(model, layer)
        if other is not None:
            setattr(model, layer, other)
        with pytest.raises(ValueError, match=f"layer '{layer}' {words}"):
            share.attach(model)
        assert type(model.first) is nn.Linear and model.first.weight.requires_grad
    model = Net()
    share.attach(model)
    with pytest.raises(ValueError, match="ShareLinear.*, no plain nn.Linear"):
        Share.from_adapters(make_adapters("ab")).attach(model)
    attention = nn.MultiheadAttention(6, 1)  # reads its out_proj's weight and never calls it
    adapter = make_adapters("a", shapes={"out_proj": (6, 6)})
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        Share.from_adapters(adapter).attach(attention)


def test_attaching_again_adds_the_layers_that_a_merge_brought():
    share, model = attached()
    share.merge(make_adapters("c", shapes={"middle": (12, 20)}))
    share.select("c")
    x = torch.randn(4, 20, dtype=torch.float64, device=DEVICE)
    bare = model.middle(x)
    first = model.first
    share.attach(model)
    assert model.first is first
    update = x @ share.reconstruct("c").delta("middle").T.to(x)
    assert torch.allclose(model.middle(x), bare + update)
    share.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_linear_used_in_two_places_has_one_adapter_and_refuses_a_second():
    shared = nn.Linear(6, 6).double()
    model = nn.ModuleDict({"x": shared, "y": shared})
    share = Share.from_adapters(make_adapters("a", shapes={"x": (6, 6)}))
    share.attach(model)
    share.select("a")
    v = torch.randn(2, 6, dtype=torch.float64)
    weight = shared.weight + share.reconstruct("a").delta("x")
    expected = nn.functional.linear(v, weight, shared.bias)
    assert all(torch.allclose(model[name](v), expected) for name in "xy")
    share.detach(model)
    twice = Share.from_adapters(make_adapters("a", shapes={"x": (6, 6), "y": (6, 6)}))
    with pytest.raises(ValueError, match="layer 'y' has a second name"):
        twice.attach(model)
    assert type(shared) is nn.Linear and shared.weight.requires_grad


def test_hooks_of_a_linear_layer_are_called_while_attached():
    share, model = attached()
    seen = []
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    share.select("a")
    y = model(batch())
    assert len(seen) == 1 and seen[0].shape == (16, 20) and y.shape == (16, 40)
    bare = share.detach(model).first
    assert len(bare._forward_hooks) == 1 and not bare._forward_pre_hooks


def test_a_fast_path_that_bypasses_linear_layers_is_not_taken():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    adapters = make_adapters("a", shapes={"linear1": (16, 8)}, dtype=torch.float32)
    share, x = Share.from_adapters(adapters), torch.randn(2, 3, 8)
    share.attach(model)
    share.select("a")
    attached_output = model(x)
    assert torch.allclose(attached_output, share.detach(model, "a")(x), atol=1e-5)


def test_two_shares_on_one_model_detach_apart():
    one = Share.from_adapters(make_adapters("a", shapes={"first": (20, 30)}))
    two = Share.from_adapters(make_adapters("b", shapes={"second": (40, 12)}))
    model = two.attach(one.attach(Net()))
    model.share = one  # an attribute of that name makes no ShareLinear
    one.detach(model, "a")
    assert type(model.first) is nn.Linear and isinstance(model.second, ShareLinear)


def test_folding_rounds_the_sum_once():
    share = Share.from_adapters(make_adapters("a", dtype=torch.float32))
    model = Net().bfloat16()
    expected = (model.first.weight.float() + share.reconstruct("a").delta("first")).bfloat16()
    assert torch.equal(share.detach(share.attach(model), "a").first.weight, expected)


def test_weights_that_were_assigned_while_attached_are_kept():
    share, model = attached()
    new = {name: torch.randn_like(t) for name, t in model.state_dict().items() if t.dim()}
    model.load_state_dict(new, assign=True, strict=False)
    share.detach(model)
    assert torch.equal(model.first.weight, new["first.weight"])


def test_moving_a_model_moves_its_share():
    share, model = attached()
    model.to("meta")
    tensors = [t for pair in share.bases.values() for t in pair]
    tensors += [t for pair in share.coefficients.values() for t in pair]
    assert len(tensors) == 8 and {t.device.type for t in tensors} == {"meta"}


def test_half_precision_rounds_the_model_but_not_the_share():
    share = Share.from_adapters(make_adapters("ab", dtype=torch.float32))
    before = copy.deepcopy(share.bases)
    model = share.attach(Net().to(DEVICE)).to(torch.bfloat16).eval()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(share.bases["first"], before["first"]))
    share.select("a")
    x = batch(torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    bare = nn.functional.linear(x, model.first.weight, model.first.bias)
    update = (x.float() @ share.reconstruct("a").delta("first").T).bfloat16()
    assert torch.allclose(model.first(x).float(), (bare + update).float(), rtol=0.01, atol=0.01)


def test_a_deep_copy_of_an_attached_model_is_independent_and_complete():
    share, model = attached()
    share.select("a")
    x = batch()
    expected, twin = model(x), copy.deepcopy(model)
    share.select("b")
    share.remove("a")
    assert torch.equal(twin(x), expected)
    twin.first.share.select(None)
    assert not torch.equal(twin(x), expected) and not torch.equal(model(x), expected)
    share.detach(model)
    assert isinstance(twin.first, ShareLinear)


def test_a_compiled_model_follows_the_selection():
    share, model = attached()
    x = batch()
    compiled = torch.compile(model, backend="eager")
    for task in (None, "a", "b", None):
        share.select(task)
        assert torch.allclose(compiled(x), model(x))


def test_folding_a_task_in_leaves_a_module_alone_that_shares_the_weight():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 6), "b": torch.nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    before = model["b"].weight.clone()
    share = Share.from_adapters({"t": Adapter({"a": (torch.ones(6, 1), torch.ones(1, 6))})})
    share.detach(share.attach(model), "t")
    assert torch.equal(model["b"].weight, before)
    assert torch.allclose(model["a"].weight, before + 1, atol=1e-5)


def test_selecting_and_applying_a_task_forms_no_dense_update():
    share = Share.from_adapters(make_adapters("ab", shapes={"0": (300, 400)}, dtype=torch.float32))
    model = share.attach(nn.Sequential(nn.Linear(400, 300)).to(DEVICE))
    x, sizes = torch.randn(2, 400, device=DEVICE), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.untyped_storage().data_ptr() != place:
                sizes.append(out.numel())
            return out

    place = model[0].weight.untyped_storage().data_ptr()
    with torch.no_grad(), Watch():
        for task in ("a", "b", ["a", "b"]):
            share.select(task)
            model(x)
    assert 0 < max(sizes) < 300 * 400 / 10


def test_a_state_dict_is_that_of_the_plain_model():
    share, model = attached()
    plain = Net().double()
    model.load_state_dict(plain.state_dict())
    x = batch()
    assert torch.equal(model(x), plain.to(DEVICE).eval()(x))


# LoRA


def test_a_lora_layer_starts_as_the_base_and_trains_its_factors_alone():
    model = Net().to(DEVICE).eval()
    x, plain = batch(torch.float32), copy.deepcopy(model)
    assert attach_lora(model, ["first", "second"], r=4) is model
    assert torch.equal(model(x), plain(x))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.lora_{side}" for layer in ("first", "second") for side in "AB"}
    for p in model.parameters():
        nn.init.normal_(p) if p.requires_grad else None
    adapter = lora_adapter(model)
    h = nn.functional.linear(x, plain.first.weight + adapter.delta("first"), plain.first.bias)
    assert torch.allclose(model.first(x), h, atol=1e-4)
    assert isinstance(model.first, LoRALinear) and adapter.factors["second"][1].shape == (4, 12)
    with pytest.raises(ValueError, match="target 'third'"):
        attach_lora(Net(), ["first", "third"])
    with pytest.raises(ValueError, match="r is 0"):
        attach_lora(Net(), ["first"], r=0)


# Phase 2


def test_training_learns_and_moves_coefficients_alone():
    share, model = attached()
    before, x = state(share, model), batch()
    losses = train_coefficients(share, model, "new", [x] * 30, square_loss, lr=0.05)
    assert len(losses) == 30 and losses[-1] < losses[0]
    for layer, (beta, alpha) in share.bases.items():
        shapes = [e.shape for e in share.eps(layer, "new")]
        assert shapes == [(beta.shape[1], 1), (alpha.shape[1], 1)]
    assert share.retained()["new"] == pytest.approx(1.0)
    share.select("new")
    assert square_loss(model, x) < losses[0]
    share.select(None)
    share.remove("new")
    assert_same_state(before, state(share, model))


def test_training_is_adam_on_the_dense_formula():
    """The slow twin: one dense weight a layer, autograd and torch's Adam."""
    share, model = attached()
    x, runs = [batch() for _ in range(5)], {}
    for name, lr in (("start", 0.0), ("end", 0.02)):
        torch.manual_seed(1)
        train_coefficients(share, model, name, x, square_loss, lr=lr)
        runs[name] = {layer: share.eps(layer, name) for layer in share.layers}
    plain = Net().to(DEVICE, torch.float64).eval()
    plain.load_state_dict(model.state_dict())
    start = runs["start"].items()
    eps = {layer: [e.clone().requires_grad_() for e in pair] for layer, pair in start}
    optimizer = torch.optim.Adam([e for pair in eps.values() for e in pair], lr=0.02)
    for batch_ in x:
        weights = {
            f"{layer}.weight": plain.get_submodule(layer).weight.detach()
            + (beta @ eps[layer][0]) @ (alpha @ eps[layer][1]).T
            for layer, (beta, alpha) in share.bases.items()
        }
        optimizer.zero_grad()
        (torch.func.functional_call(plain, weights, batch_) - 1).square().mean().backward()
        optimizer.step()
    for layer, pair in runs["end"].items():
        for e, slow in zip(pair, eps[layer]):
            assert torch.allclose(e, slow, atol=1e-9)


def test_only_coefficients_and_extra_parameters_have_gradients_in_training():
    share, model = attached()
    model.requires_grad_(True)  # thawed by somebody
    seen = {}

    def look(step, loss):
        seen.update({n: p.grad is not None for n, p in model.named_parameters()})

    head = [model.middle.bias]
    settings = {"extra_parameters": head, "on_step": look}
    train_coefficients(share, model, "new", [batch()], square_loss, **settings)
    assert [name for name, on in seen.items() if on] == ["middle.bias"]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_training_happens_in_the_mode_of_the_model_and_moves_no_batch_statistics(mode):
    share, model = attached()
    model.train(mode)
    seen, before = [], model.norm.running_mean.clone()

    def loss(model, x):
        seen.append(model.norm.training)
        return square_loss(model, x)

    train_coefficients(share, model, "new", [batch()], loss)
    assert seen == [mode] and torch.equal(model.norm.running_mean, before)


def test_temporary_columns_are_trained():
    deltas = []
    for lr in (0.0, 0.05):
        torch.manual_seed(2)
        share, model = attached(variance=0.5)
        columns = [b.clone() for b in share.bases["first"]]
        train_coefficients(share, model, "new", [batch()] * 5, square_loss, phi=1, lr=lr, grow=True)
        beta, alpha = columns
        delta = share.reconstruct("new").delta("first")
        outside = delta - beta @ (beta.T @ delta)
        deltas.append(torch.linalg.svd(outside).U[:, 0].abs())
    assert (deltas[0] - deltas[1]).norm() > 0.01


def test_a_training_step_that_ends_in_nan_is_not_kept():
    share, model = attached()

    def loss(model, x):
        y = model(x)
        return y.square().mean() + (y * 0).abs().sqrt().sum()  # finite, with a gradient that is not

    with pytest.raises(ValueError, match="step 0: a trained number is NaN"):
        train_coefficients(share, model, "new", [batch()], loss)
    bias = model.middle.bias

    def loss_of_bias(model, x):
        return square_loss(model, x) + (bias * 0).abs().sqrt().sum()

    before = bias.clone()
    with pytest.raises(ValueError, match="step 0: a trained number is NaN"):
        train_coefficients(share, model, "new", [batch()], loss_of_bias, extra_parameters=[bias])
    assert torch.equal(bias, before) and share.tasks == ["a", "b"]


@pytest.mark.parametrize("p", [1, 4])
def test_a_step_keeps_no_more_for_the_backward_pass_than_a_lora_of_rank_p(p):
    share, x = Share.from_adapters(make_adapters("ab", dtype=torch.float32)), batch(torch.float32)

    def kept(model, permanent):
        """Numbers that autograd saves, but for those that are there anyway; each storage once."""
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model.first(x)
        y.sum().backward()
        there = {t.untyped_storage().data_ptr() for t in permanent}
        return sum(size for place, size in sizes.items() if place not in there)

    lora = attach_lora(Net().to(DEVICE), ["first"], p)
    of_lora = kept(lora, [x, lora.first.weight])  # its factors count, since ours are formed anew
    seen = []

    def loss(model, x):
        permanent = [x, model.first.weight, *share.bases["first"]]
        seen.append(kept(model, permanent))
        return square_loss(model, x)

    train_coefficients(share, share.attach(Net().to(DEVICE)), "new", [x], loss, p=p)
    coefficients = sum(e.numel() for e in share.eps("first", "new"))
    assert 0 < seen[0] <= of_lora + coefficients


def test_both_coefficient_matrices_have_gradients_at_the_first_step():
    share, model = attached()
    x = batch()
    starts = []
    for name, lr in (("still", 0.0), ("moved", 0.01)):
        torch.manual_seed(1)
        train_coefficients(share, model, name, [x], square_loss, lr=lr, p=2)
        starts.append([e for layer in share.layers for e in share.eps(layer, name)])
    for still, moved in zip(*starts):
        assert still.std() > 0 and ((still - moved).abs() > 0.005).all()


@pytest.mark.parametrize("selected", [None, "b"])
def test_learning_leaves_every_earlier_output_bit_for_bit_the_same(selected):
    share, model = attached("abc")
    x, outputs = batch(), {}
    for task in (None, *"abc"):
        share.select(task)
        outputs[task] = model(x)
    share.select(selected)
    for name in ("d", "e"):
        train_coefficients(share, model, name, [batch()] * 3, square_loss, p=2)
    assert share.selected == selected
    for task, expected in outputs.items():
        share.select(task)
        assert torch.equal(model(x), expected)


def broken(kind):
    """A loss, and batches, that fail in their third step."""
    if kind is KeyboardInterrupt:
        def batches():
            yield from [batch(), batch()]
            raise KeyboardInterrupt

        return square_loss, batches()
    steps = iter([1.0, 1.0, float("nan")])

    def loss(model, x):
        factor = next(steps)
        if kind is RuntimeError and factor != 1.0:
            raise RuntimeError("out of memory")
        return factor * square_loss(model, x)

    return loss, [batch()] * 3


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("settings", [{}, {"phi": 1}, {"finetune": True}])
def test_a_run_that_fails_or_is_interrupted_leaves_everything_as_it_was(kind, settings):
    share, model = attached()
    model.middle.weight.grad = torch.ones_like(model.middle.weight)
    model.norm.train()
    share.select("b")
    before = state(share, model)
    loss, batches = broken(kind)
    task = "a" if "finetune" in settings else "new"
    with pytest.raises(kind):
        head = model.middle.parameters()
        train_coefficients(share, model, task, batches, loss, extra_parameters=head, **settings)
    assert_same_state(before, state(share, model))


def test_extra_parameters_are_trained_along_at_their_own_rate():
    share, model = attached()
    weight, bias = model.middle.weight.clone(), model.middle.bias.clone()
    groups = [{"params": [model.middle.weight], "lr": 0.5}, {"params": model.middle.bias}]
    settings = {"lr": 1e-3, "extra_parameters": groups}
    train_coefficients(share, model, "new", [batch()], square_loss, **settings)
    assert float((model.middle.weight - weight).abs().max()) == pytest.approx(0.5, rel=0.01)
    assert float((model.middle.bias - bias).abs().max()) == pytest.approx(1e-3, rel=0.01)
    assert not model.middle.weight.requires_grad and model.middle.weight.grad is None


def test_finetuning_goes_on_from_the_stored_coefficients_of_that_task_alone():
    adapters = make_adapters("ab")
    adapters["a"].config["kept"], adapters["a"].extras["head"] = True, torch.ones(2)
    share = Share.from_adapters(adapters)
    model = share.attach(Net().to(DEVICE, torch.float64).eval())
    x, before = batch(), copy.deepcopy(share)
    share.select("a")
    start = float(square_loss(model, x))
    losses = train_coefficients(share, model, "a", [x] * 20, square_loss, finetune=True)
    assert losses[0] == pytest.approx(start) and losses[-1] < start
    for layer in SHAPES:
        for e, old in zip(share.eps(layer, "a"), before.eps(layer, "a")):
            assert e.shape == old.shape and not torch.equal(e, old.to(e))
        for e, old in zip(share.eps(layer, "b"), before.eps(layer, "b")):
            assert torch.equal(e, old.to(e))
    kept = share.reconstruct("a")
    assert kept.config == {"kept": True} and torch.equal(kept.extras["head"], torch.ones(2))
    with pytest.raises(ValueError, match="task 'x' is unknown"):
        train_coefficients(share, model, "x", [x], square_loss, finetune=True)


def test_groups_of_extra_parameters_can_be_used_again_at_another_rate():
    share, model = attached()
    bias = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    groups = [{"params": [bias]}]
    loss = lambda model, x: square_loss(model, x) + (bias - 9).square().sum()
    for task, lr in (("slow", 1e-3), ("fast", 0.1)):
        before = bias.clone()
        train_coefficients(share, model, task, [batch()], loss, lr=lr, extra_parameters=groups)
        assert float(bias - before) == pytest.approx(lr, rel=1e-3)


@pytest.mark.parametrize("grow", [True, False])
def test_temporary_columns_reach_outside_the_bases_and_end_in_a_merge(grow):
    share, model = attached(center=False)
    share.variance = 0.1  # by its own rule a merge would take in one direction
    x, before = batch(), {t: share.reconstruct(t).delta("first") for t in "ab"}
    k = {layer: [b.shape[1] for b in pair] for layer, pair in share.bases.items()}
    outside = copy.deepcopy(share.bases)
    train_coefficients(share, model, "new", [x] * 40, square_loss, phi=2, p=2, lr=0.05, grow=grow)
    for layer, pair in share.bases.items():
        for basis, size in zip(pair, k[layer]):
            assert basis.shape[1] == size + 2 if grow else size <= basis.shape[1] <= size + 2
    beta = outside["first"][0].to(DEVICE)
    delta = share.reconstruct("new").delta("first")
    assert (delta - beta @ (beta.T @ delta)).norm() > 0.01 * delta.norm()
    moved = max(relative(share.reconstruct(t).delta("first"), before[t]) for t in "ab")
    assert moved < 1e-6 if grow else moved > 1e-6
    if grow:  # all of what the new task has outside is taken in
        assert share.retained()["new"] == pytest.approx(1.0)


def test_what_training_cannot_use_is_refused():
    share, model = attached()
    x = batch()
    largest = max(basis.shape[1] for pair in share.bases.values() for basis in pair)
    for settings, words in (
        ({"p": 0}, "p is 0"),
        ({"sigma": 0}, "sigma is 0"),
        ({"phi": largest}, f"phi is {largest}"),
        ({"phi": -1}, "phi is -1"),
        ({"phi": 1, "finetune": True}, "phi is 1"),
    ):
        with pytest.raises(ValueError, match=words):
            train_coefficients(share, model, "new", [x], square_loss, **settings)
    train_coefficients(share, model, "new", [x], square_loss, p=1, phi=largest - 1)
    with pytest.raises(ValueError, match="task 'new' exists"):
        train_coefficients(share, model, "new", [x], square_loss)
    with pytest.raises(ValueError, match="batches is empty"):
        train_coefficients(share, model, "none", [], square_loss)
    with pytest.raises(ValueError, match=r"layers \['first', 'second'\] are not attached"):
        train_coefficients(share, Net(), "none", [x], square_loss)


def test_on_step_reports_each_step_and_may_look_at_other_tasks():
    share, model = attached()
    x, seen = batch(), []

    def look(step, loss):
        seen.append((step, loss))
        share.select("a")

    losses = train_coefficients(share, model, "new", [x] * 4, square_loss, on_step=look)
    assert seen == list(enumerate(losses)) and losses[-1] < losses[0]


def test_training_works_on_a_bfloat16_base():
    share = Share.from_adapters(make_adapters("ab", dtype=torch.float32))
    model = share.attach(Net().to(DEVICE, torch.bfloat16))
    x = batch(torch.bfloat16)
    losses = train_coefficients(share, model, "new", [x] * 20, square_loss, lr=0.05)
    assert losses[-1] < losses[0]
    assert share.eps("first", "new")[0].dtype == torch.float32


# The average of tasks


def test_the_average_is_the_best_fit_to_the_mean_of_the_updates():
    adapters = make_adapters("abc")
    del adapters["b"].factors["second"]
    share = Share.from_adapters(adapters, variance=1.0)
    share.average("abc", "all")
    share.average(["a", "c"], "two", p=2)
    for layer, tasks, name, p in (("first", "abc", "all", 9), ("second", "ac", "all", 7)):
        mean = sum(adapters[t].delta(layer) for t in tasks) / 3  # a task without a layer adds 0
        assert relative(share.reconstruct(name).delta(layer), mean) < 1e-6
        assert share.eps(layer, name)[0].shape[1] <= p
    mean = (adapters["a"].delta("first") + adapters["c"].delta("first")) / 2
    U, S, Vh = torch.linalg.svd(mean)
    best = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]
    assert relative(share.reconstruct("two").delta("first"), best) < 1e-6
    assert share.tasks == ["a", "b", "c", "all", "two"]


def test_an_adapter_and_its_mirror_image_average_to_themselves():
    adapters = make_adapters("a")
    mirror = {layer: (-B, -A) for layer, (B, A) in adapters["a"].factors.items()}
    share = Share.from_adapters(adapters | {"b": Adapter(mirror)}, variance=1.0)
    share.average("ab", "mean")
    delta = adapters["a"].delta("first")
    assert relative(share.reconstruct("mean").delta("first"), delta) < 1e-6
    naive = sum(share.eps("first", t)[0] for t in "ab") / 2
    assert naive.norm() < 1e-9  # the trap: coefficients averaged side by side


def test_an_average_of_nothing_of_strangers_or_under_a_taken_name_is_refused():
    share = Share.from_adapters(make_adapters("ab"))
    for tasks, name, p, words in (
        ([], "new", None, "has no LoRA factors"),
        (["a", "x"], "new", None, "task 'x' is unknown"),
        (["a", "b"], "a", None, "task 'a' exists"),
        (["a", "b"], "new", 0, "p is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            share.average(tasks, name, p)
    assert share.tasks == ["a", "b"]


# Mixed batches


def test_each_sample_of_a_mixed_batch_gets_its_own_task():
    adapters = make_adapters("abc", (3, 1, 2))
    del adapters["b"].factors["second"]
    share = Share.from_adapters(adapters, variance=0.9)
    model = share.attach(Net().to(DEVICE, torch.float64).eval())
    names = ["b", None, "a", "c", "a", None]
    for x in (torch.randn(6, 30, dtype=torch.float64), torch.randn(6, 4, 5, 30).double()):
        x, alone = x.to(DEVICE), []
        run = model if x.dim() == 2 else model.first  # BatchNorm takes two dimensions
        for sample, name in zip(x, names):
            share.select(name)
            alone.append(run(sample[None]))
        share.select(names)
        assert relative(run(x), torch.cat(alone)) < 1e-9
    share.select([None] * 6)
    bare = nn.functional.linear(x, model.first.weight, model.first.bias)
    assert torch.equal(model.first(x), bare)


def test_a_mixed_batch_works_on_a_bfloat16_base():
    share = Share.from_adapters(make_adapters("ab", dtype=torch.float32))
    model = share.attach(Net().to(DEVICE, torch.bfloat16).eval())
    x = batch(torch.bfloat16)[:2]
    share.select("b")
    expected = model(x)
    share.select(["b", "b"])
    assert model(x).dtype == torch.bfloat16
    assert relative(model(x).float(), expected.float()) < 0.02


def test_a_mixed_batch_of_the_wrong_size_or_with_a_stranger_is_refused():
    share, model = attached()
    share.select(["a", None, "b"])
    assert model(batch()[:3]).shape == (3, 40)
    with pytest.raises(ValueError, match="3 tasks are selected; the batch has 16 samples"):
        model(batch())
    with pytest.raises(ValueError, match="task 'x' is unknown"):
        share.select(["a", "x"])
    assert share.selected == ("a", None, "b")


def test_a_general_set_trains_on_a_mixture_of_batches():
    share, model = attached()
    x = [batch() for _ in range(4)]
    losses = train_coefficients(share, model, "general", x * 10, square_loss, lr=0.05)
    assert len(losses) == 40 and losses[-1] < losses[0]


# Files


def test_a_saved_share_loads_with_identical_outputs(tmp_path):
    adapters = make_adapters(["a/b", "a_b", "", "tensor", "Ω" * 300])
    adapters["tensor"].extras["tensor"] = torch.randn(2, 2).half()
    adapters["tensor"].config["tensor"] = {"tensor": 3}
    del adapters["a_b"].factors["first"]
    share = Share.from_adapters(adapters, stack="updates", variance=0.9)
    share.select("a/b")
    share.save(tmp_path / "share.safetensors")
    loaded = Share.load(tmp_path / "share.safetensors")
    assert share.selected == "a/b" and loaded.selected is None
    with pytest.raises(KeyError, match="task 'x' is unknown"):
        loaded.select("x")
    assert (loaded.tasks, loaded.layers, loaded.num_parameters()) == (
        share.tasks, share.layers, share.num_parameters(),
    )
    assert loaded.retained() == share.retained() and loaded.stack == "updates"
    assert loaded.reconstruct("tensor").config == {"tensor": {"tensor": 3}}
    extra = loaded.reconstruct("tensor").extras["tensor"]
    assert extra.dtype == torch.float16 and torch.equal(extra, adapters["tensor"].extras["tensor"])
    model, x = Net().to(DEVICE, torch.float64).eval(), batch()
    twin = copy.deepcopy(model)
    share.attach(model), loaded.attach(twin)
    for task in share.tasks:
        share.select(task), loaded.select(task)
        assert torch.equal(model(x), twin(x))
    new = make_adapters("n")
    share.merge(new), loaded.merge(new)
    assert torch.equal(share.bases["first"][0], loaded.bases["first"][0])


def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path):
    path = tmp_path / "share.safetensors"
    Share.from_adapters(make_adapters("ab", dtype=torch.float32)).save(path)
    raw = path.read_bytes()
    Share.load(path)
    places = torch.randint(0, 8 * len(raw), (200,)).tolist()
    damaged = [raw[:n] for n in (0, 1, 8, 100, len(raw) - 1)] + [b"\x80\x02.", raw + b"\0"]
    for place in places:
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="share.safetensors is not a Share file"):
            Share.load(path)
    with pytest.raises(FileNotFoundError):
        Share.load(tmp_path / "none")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "share.safetensors"
    share = Share.from_adapters(make_adapters("ab"))
    share.save(path)
    before = path.read_bytes()
    share.remove("a")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        share.save(path)
    assert path.read_bytes() == before


# PEFT directories


LAYERS = {"model.layers.0.q_proj": (20, 30), "model.layers.1.q_proj": (20, 30), "lm_head": (7, 20)}


def peft_directory(path, changes=(), tensors=(), dtype=torch.float32, r=4):
    """A directory as PEFT writes it, with changes to its config; its factors as stored."""
    factors = {
        layer: (torch.randn(n, r).to(dtype), torch.randn(r, d).to(dtype))
        for layer, (n, d) in LAYERS.items()
    }
    save_peft(Adapter(factors, dict(tensors)), path)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
    config |= {"base_model_name_or_path": "some/model", "bias": "none", **dict(changes)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "changes, scaling",
    [
        ({}, [2, 2, 2]),
        ({"use_rslora": True}, [4, 4, 4]),
        ({"alpha_pattern": {"q_proj": 1}}, [0.25, 0.25, 2]),
        ({"alpha_pattern": {"layers.0.q_proj": 1, "q_proj": 2}}, [0.25, 0.5, 2]),
        ({"alpha_pattern": {r".*\.1\..*": 16, "^lm_head": 4}}, [2, 4, 1]),
        ({"alpha_pattern": {"proj": 1, "m_head": 1, "q_pro": 1}}, [2, 2, 2]),
        ({"alpha_pattern": {"q_proj": 2}, "use_rslora": True}, [1, 1, 4]),
        ({"rank_pattern": {"q_proj": 4}, "r": 9}, [2, 2, 2]),
    ],
)
def test_the_scaling_is_folded_in_as_peft_computes_it(tmp_path, changes, scaling, dtype):
    stored = peft_directory(tmp_path / "a", changes, dtype=dtype)
    adapter = load_peft(tmp_path / "a")
    for (layer, (B, A)), scale in zip(stored.items(), scaling):
        assert torch.allclose(adapter.delta(layer), scale * (B.float() @ A.float()), atol=1e-4)
        assert adapter.factors[layer][0].dtype == torch.float32


@pytest.mark.parametrize("r", [1, 7, 20, 50])
def test_a_peft_directory_goes_through_a_share_file_and_out_again(tmp_path, r):
    extras = {"base_model.model.head.weight": torch.randn(3, 2).half()}
    peft_directory(tmp_path / "in", {"lora_alpha": 3}, extras, r=r)
    adapter = load_peft(tmp_path / "in")
    adapter.factors["lm_head"][0].zero_()
    others = make_adapters("b", shapes={"lm_head": (7, 20)}, dtype=torch.float32)
    Share.from_adapters({"a": adapter, **others}, variance=1.0).save(tmp_path / "share")
    save_peft(Share.load(tmp_path / "share").reconstruct("a"), tmp_path / "out")
    back = load_peft(tmp_path / "out")
    for layer in LAYERS:
        error = (back.delta(layer) - adapter.delta(layer)).norm()
        assert error <= 1e-5 * adapter.delta(layer).norm()
    assert back.extras.keys() == extras.keys()
    for name, tensor in extras.items():
        assert torch.equal(back.extras[name], tensor) and back.extras[name].dtype == tensor.dtype
    for key in ("base_model_name_or_path", "target_modules", "bias"):
        assert back.config[key] == adapter.config[key]


def test_a_written_directory_says_each_layers_rank_and_nothing_else_of_scaling(tmp_path):
    ranks = {"a.q": 3, "b.q": 1}
    factors = {layer: (torch.randn(5, r), torch.randn(r, 4)) for layer, r in ranks.items()}
    save_peft(Adapter(factors, config={"use_rslora": True, "init_lora_weights": "eva"}), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^a\.q": 3, r"^b\.q": 1}
    assert not config["use_rslora"] and config["target_modules"] == ["a.q", "b.q"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert relative(load_peft(tmp_path).delta("b.q"), factors["b.q"][0] @ factors["b.q"][1]) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [{"peft_type": "LOHA"}, {"init_lora_weights": "pissa"}]
    + [{name: True} for name in ("use_dora", "lora_bias", "use_qalora", "target_parameters")]
    + [{"layer_replication": [[0, 1]]}, {"alora_invocation_tokens": [1]}],
)
def test_what_is_not_plain_lora_is_refused_by_directory_and_reason(tmp_path, changes):
    plain = {"use_dora": False, "init_lora_weights": "gaussian", "target_parameters": []}
    peft_directory(tmp_path / "a", plain)
    load_peft(tmp_path / "a")
    peft_directory(tmp_path / "a", changes)
    with pytest.raises(ValueError, match=f"a is no plain LoRA .*{next(iter(changes))}"):
        load_peft(tmp_path / "a")


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": v} for v in (None, "x")] + [{"alpha_pattern": v} for v in ([1], {"(": 2})],
)
def test_a_scaling_that_cannot_be_computed_is_refused_by_directory_and_layer(tmp_path, changes):
    peft_directory(tmp_path / "a", changes)
    with pytest.raises(ValueError, match="a, layer '.*no scaling"):
        load_peft(tmp_path / "a")
    peft_directory(tmp_path / "a", {"lora_alpha": 2, "alpha_pattern": {"q": 2}})
    load_peft(tmp_path / "a")


def test_a_peft_directory_with_other_tensors_is_refused_by_name(tmp_path):
    prefix = "base_model.model.q_proj.lora_"
    cases = {
        f"{prefix}magnitude_vector": (torch.ones(3), "magnitude_vector' is no factor"),
        f"{prefix}embedding_A": (torch.ones(3, 3), "embedding_A' is no factor"),
        f"{prefix}B.bias": (torch.ones(3), "B.bias' is no factor"),
        f"{prefix}B.weight": (torch.ones(3, 3), r"layer 'q_proj': .* are not A \(r, d\) and B"),
    }
    for name, (tensor, words) in cases.items():
        peft_directory(tmp_path, tensors={name: tensor})
        with pytest.raises(ValueError, match=words):
            load_peft(tmp_path)
    for a, b in (((2, 3), (4, 3)), ((2, 3, 1, 1), (4, 2, 1, 1))):
        A, B = torch.ones(a), torch.ones(b)
        peft_directory(tmp_path, tensors={f"{prefix}A.weight": A, f"{prefix}B.weight": B})
        with pytest.raises(ValueError, match="layer 'q_proj'"):
            load_peft(tmp_path)


def test_a_peft_directory_that_is_damaged_or_missing_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_peft(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        peft_directory(tmp_path)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-3])
        with pytest.raises(ValueError, match=f"{tmp_path.name} is damaged"):
            load_peft(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_peft(tmp_path)
    for text in ("3", "[1]", '"words"'):
        peft_directory(tmp_path)
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"{tmp_path.name} is damaged"):
            load_peft(tmp_path)
    peft_directory(tmp_path)
    save = {"base_model.model.head.weight": torch.ones(2)}
    (tmp_path / "adapter_model.safetensors").write_bytes(_serialize(save, {}))
    with pytest.raises(ValueError, match="has no LoRA weights"):
        load_peft(tmp_path)


# Against the real PEFT, where it is installed


def random_peft_model(kind):
    """A transformers model with random weights, its input, and a config of LoRA adapters for it."""
    peft = pytest.importorskip("peft", reason="peft is not installed; .ci/run runs this with it")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = torch.randint(50, (3, 7))
    if kind == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=48, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
        lora = {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}
        lora |= {"r": 4, "lora_alpha": 6, "alpha_pattern": {"0.attention.self.query": 3}}
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=1)
        model = transformers.LlamaForCausalLM(config)
        lora = {"target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        lora |= {"r": 40, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"k_proj": 2}}
    return peft, model.eval(), tokens, lora


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_real_peft_reads_what_we_write_and_gives_the_same_outputs(tmp_path, kind):
    warnings.simplefilter("ignore")  # theirs
    peft, base, tokens, settings = random_peft_model(kind)
    adapters, expected = {}, {}
    for name in ("one", "two"):
        wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(tmp_path / name)
        adapters[name], expected[name] = load_peft(tmp_path / name), wrapped(tokens).logits
    exact = Share.from_adapters(adapters, variance=1.0)
    rough = Share.from_adapters(adapters, variance=0.6, p=2)
    for share in (exact, rough):
        model = share.attach(copy.deepcopy(base))
        for name in adapters:
            back = share.reconstruct(name)
            save_peft(back, tmp_path / "out")
            written = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
            prefix = "base_model.model."
            head = {n.removeprefix(prefix): t for n, t in back.extras.items()}
            assert not model.load_state_dict(head, strict=False).unexpected_keys
            share.select(name)
            assert relative(written(tokens).logits, model(tokens).logits) < 1e-5
            if share is exact:
                assert relative(written(tokens).logits, expected[name]) < 1e-5
            config = load_peft(tmp_path / "out").config
            assert back.config["target_modules"] == config["target_modules"]


# Router


def gaussian_classes(f, count, apart=6.0):
    """Means at least `apart` standard deviations from each other."""
    means = []
    while len(means) < count:
        mean = apart * torch.randn(f)
        if all((mean - other).norm() >= apart for other in means):
            means.append(mean)
    return means


@pytest.mark.parametrize("f", [4, 16])
def test_the_router_knows_its_classes_and_sends_strangers_to_the_base(f):
    spread = torch.rand(f) + 0.5  # features of different sizes
    *means, stranger = gaussian_classes(f, 9)
    draw = lambda mean, n: (mean + torch.randn(n, f)) * spread
    router = Router.fit({f"task {i}": draw(mean, 60) for i, mean in enumerate(means)})
    right = [router.route(draw(mean, 200)).count(f"task {i}") for i, mean in enumerate(means)]
    assert sum(right) / 1600 >= 0.95
    assert router.route(draw(stranger, 400)).count(None) / 400 >= 0.95
    nan = torch.full((1, f), float("nan"))
    assert router.route(nan) == [None]


def test_a_router_is_worked_out_by_hand():
    features = {"a": torch.tensor([[1.0], [3.0]]), "b": torch.tensor([[11.0], [13.0]])}
    router = Router.fit(features)  # every sample is 2 from the other one of its task
    assert router.scale.tolist() == [[0.5]] and router.means.tolist() == [[1.0], [6.0]]
    # scaled: 1 from the own mean; 4.5 or 5.5 from the other one
    assert router.radius == pytest.approx((1 + 4.5) / 2)
    x = torch.tensor([[-3.4], [-3.6], [6.9], [17.4], [17.6]])
    assert router.route(x) == ["a", None, "a", "b", None]
    alone = Router.fit({"a": features["a"]})
    assert alone.radius == pytest.approx(1.0)


def test_a_router_sees_a_small_difference_where_a_task_hardly_varies():
    noise = torch.randn(200, 1) @ torch.ones(1, 5) * 2  # all features vary together
    offset = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
    draw = lambda sign: noise + sign * offset + 0.1 * torch.randn(200, 5)
    router = Router.fit({"plus": draw(1), "minus": draw(-1)})
    assert router.route(draw(1)).count("plus") > 190 and router.route(draw(-5)).count(None) > 190


def test_a_router_is_saved_and_loaded_with_the_share(tmp_path):
    share = Share.from_adapters(make_adapters("ab"))
    assert share.router is None
    share.router = Router.fit({t: torch.randn(20, 3) + 9 * i for i, t in enumerate("ab")})
    share.save(tmp_path / "s")
    loaded, x = Share.load(tmp_path / "s"), torch.randn(50, 3) * 9
    assert loaded.router.route(x) == share.router.route(x)
    assert loaded.router.radius == share.router.radius
    without = copy.copy(share)
    without.router = None
    assert loaded.num_parameters() == without.num_parameters() + 2 * 3 + 3 * 3  # means, scale


def test_a_router_refuses_what_has_no_mean_or_spread():
    good = torch.randn(2, 3)
    assert Router.fit({"a": good}).tasks == ["a"]
    for bad in (good[:1], good[0], torch.full((2, 3), float("inf"))):
        with pytest.raises(ValueError, match="task 'b': features"):
            Router.fit({"a": good, "b": bad})
    with pytest.raises(ValueError, match="features of 4 numbers.*3"):
        Router.fit({"a": good}).route(torch.randn(1, 4))


# The toy model, train.py and the README


def test_the_toy_transformer_is_causal():
    model = ToyTransformer(vocabulary=20, width=16, depth=2, heads=2, length=8)
    tokens = torch.randint(0, 20, (3, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 20
    difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert model(tokens).shape == (3, 8, 20)
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()


def test_acc_bwt_and_forgetting_on_a_matrix_worked_by_hand():
    R = [[0.9, 0.1, 0.2], [0.6, 0.8, 0.1], [0.7, 0.5, 1.0]]
    metrics = train.metrics(R)
    assert metrics["acc"] == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert metrics["bwt"] == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert metrics["forgetting"] == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert train.metrics([[0.5, 0.0], [0.9, 1.0]])["forgetting"] == pytest.approx(-0.4)


def test_several_runs_are_shown_as_mean_and_standard_deviation():
    assert train.spread([1.0, 2.0, 4.5], 2) == "2.50 ± 1.80"  # sqrt((1.5² + 0.5² + 2²) / 2)
    assert train.spread([0.25], 3) == "0.250" and train.spread([None], 3) == ""


def test_the_picture_has_a_cell_for_each_accuracy_of_both_methods():
    R = [[0.9, 0.1, 0.2], [0.6, 0.8, 0.1], [0.7, 0.5, 1.0]]
    row = {"accuracy_matrix": R, **train.metrics(R)}
    root = ElementTree.fromstring(train.svg({"lora_sequential": row, "share": row}))
    shades = [e.get("fill-opacity") for e in root if e.tag.endswith("rect")]
    assert shades == [f"{value:.2f}" for values in R for value in values] * 2
    words = [e.text for e in root if e.tag.endswith("text")]
    assert "One LoRA" in words and "Share" in words and "ACC 0.73, forgetting 0.25" in words


@pytest.mark.parametrize("flags", ["--json no/x", "--svg no/x", "--seeds 0", "--unknown"])
def test_flags_that_cannot_be_followed_are_refused_before_the_run(flags, capsys):
    with pytest.raises(SystemExit):
        train.main(flags.split())
    assert flags.split()[-1] in capsys.readouterr().err


def test_a_cipher_is_the_sum_of_letter_and_key():
    answer = train.encipher(torch.tensor([[1, 2, 15]]), torch.tensor([[0, 15, 3, 4, 5, 6] * 2]))
    assert answer.tolist() == [[1, 1, 2, 5, 7, 5] * 2]


def test_the_readme_example_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parent / "README.md").read_text("utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["share"].tasks == ["one", "two", "three"]


def test_the_readme_path_for_peft_adapters_runs(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parent / "README.md").read_text("utf-8")
    example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert len(example.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    Path("adapters").mkdir()
    for name in ("one", "two"):
        peft_directory(tmp_path / "adapters" / name)
    exec(example, {})
    assert load_peft("served").factors.keys() == LAYERS.keys()
    assert "'two': " in capsys.readouterr().out


def test_the_readme_shows_the_two_commands_first():
    readme = (Path(__file__).parent / "README.md").read_text("utf-8")
    commands = re.findall(r"^pip install.*$", readme, re.MULTILINE)
    assert commands[:2] == [
        "pip install -r requirements.txt && python train.py",
        "pip install -r requirements.txt && pytest",
    ]
