"""``diffopt.functional``: a module as a function of its parameters, beside the module itself and plain autograd."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import diffopt
import diffopt.tasks
from diffopt import StructureError
from diffopt.estimators import ForwardMode, Reverse, Unrolled


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network(generator: torch.Generator) -> nn.Sequential:
    """A body and a head, in float64, with weights of its own."""
    module = nn.Sequential(
        OrderedDict(body=nn.Linear(3, 4), activation=nn.Tanh(), head=nn.Linear(4, 2, bias=False))
    ).double()
    for parameter in module.parameters():
        parameter.data = drawn(tuple(parameter.shape), generator)
    return module


def test_it_is_the_module_with_other_parameters(generator):
    module, x = network(generator), drawn((5, 3), generator)
    function, params = diffopt.functional(module)
    torch.testing.assert_close(function(params, x), module(x), rtol=1e-12, atol=1e-12)
    others = {name: drawn(tuple(value.shape), generator) for name, value in params.items()}
    expected = torch.tanh(x @ others["body.weight"].T + others["body.bias"]) @ others["head.weight"].T
    torch.testing.assert_close(function(others, x), expected, rtol=1e-12, atol=1e-12)


def test_params_are_detached_copies_that_require_grad(generator):
    module = network(generator)
    function, params = diffopt.functional(module)
    own = dict(module.named_parameters())
    assert list(params) == list(own)
    for name, value in params.items():
        assert torch.equal(value, own[name])
        assert value.is_leaf
        assert value.requires_grad
        assert type(value) is Tensor
        assert value.data_ptr() != own[name].data_ptr()
    function(params, drawn((1, 3), generator)).sum().backward()
    assert all(value.grad is None for value in own.values())
    assert all(value.grad is not None for value in params.values())


class Options(nn.Module):
    """A module with several inputs, one called as the first argument of its function is, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, *more: Tensor, params: float = 1.0, both: bool = False) -> dict[str, Tensor]:
        found = {"scaled": self.scale * sum((x, *more)) * params}
        return {**found, "x": x} if both else found


def test_inputs_go_by_position_and_by_name_and_outputs_are_any(generator):
    function, params = diffopt.functional(Options())
    one, two = torch.tensor(1.0), torch.tensor(5.0)
    assert function(params, one)["scaled"] == 2
    assert function(params, one, two)["scaled"] == 12
    assert set(function(params, one, params=3.0, both=True)) == {"scaled", "x"}
    assert function(params, x=two, params=3.0)["scaled"] == 30
    assert function({"scale": torch.tensor(7.0)}, one)["scaled"] == 7


# ------------------------------------------------------------------------------------------------- frozen parameters


def head_only(generator: torch.Generator) -> nn.Sequential:
    module = network(generator)
    module.body.requires_grad_(False)
    return module


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), Unrolled(), ForwardMode()], ids=repr)
def test_frozen_parameters_are_constants_and_the_rest_is_trained(estimator, generator):
    """As fine-tuning the head by a plain loop; the hypergradient of the initial head and of the data, by autograd."""
    module, x = head_only(generator), drawn((5, 3), generator).requires_grad_()
    function, params = diffopt.functional(module)
    assert list(params) == ["head.weight"]

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (function(params, x) - 1).square().mean()

    before = {name: value.clone() for name, value in module.state_dict().items()}
    end = diffopt.solve(loss, params, x, optimizer=diffopt.SGD(0.1), steps=3, estimator=estimator).params
    found = torch.autograd.grad(end["head.weight"].pow(3).sum(), [params["head.weight"], x])

    start = params["head.weight"].detach().clone().requires_grad_()
    weight = start
    for _ in range(3):
        value = (torch.tanh(x @ module.body.weight.T + module.body.bias) @ weight.T - 1).square().mean()
        weight = weight - 0.1 * torch.autograd.grad(value, weight, create_graph=True)[0]
    expected = torch.autograd.grad(weight.pow(3).sum(), [start, x])
    torch.testing.assert_close(end["head.weight"], weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_frozen_parameters_are_read_from_the_module_and_not_copied(generator):
    module, x = head_only(generator), drawn((2, 3), generator)
    function, params = diffopt.functional(module)
    before = function(params, x)
    with torch.no_grad():
        module.body.bias.add_(1)
        module.head.weight.mul_(2)  # a trained one: its copy in params is what counts
    expected = torch.tanh(x @ module.body.weight.T + module.body.bias) @ params["head.weight"].T
    torch.testing.assert_close(function(params, x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(function(params, x), before)
    assert module.body.weight.grad is None


def test_a_frozen_parameter_may_be_one_that_cannot_be_trained():
    """Quantised weights are integers."""
    module = nn.Linear(2, 1)
    module.codes = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * module.codes,))
    function, params = diffopt.functional(module)
    assert sorted(params) == ["bias", "weight"]
    torch.testing.assert_close(function(params, torch.ones(2)), module(torch.ones(2)))


def test_freezing_after_the_call_changes_nothing(generator):
    module, x = network(generator), drawn((2, 3), generator)
    function, params = diffopt.functional(module)
    module.requires_grad_(False)
    assert all(value.requires_grad for value in params.values())
    assert function(params, x).requires_grad


def test_a_parameter_unfrozen_after_the_call_is_no_silent_constant(generator):
    module, x = head_only(generator), drawn((2, 3), generator)
    function, params = diffopt.functional(module)
    module.body.bias.requires_grad_()
    with pytest.raises(StructureError, match=r"'body\.bias' requires grad, expected a parameter that is frozen"):
        function(params, x)
    module.body.bias.requires_grad_(False)
    function(params, x)


# ----------------------------------------------------------------------------------------------- tied ones, buffers


class Tied(nn.Module):
    """Two linear layers with one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3, bias=False).double()
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs)) + self.shift


def test_tied_weights_move_together(generator):
    function, params = diffopt.functional(Tied())
    assert sorted(params) == ["first.bias", "first.weight"]
    weight, bias, inputs = (drawn(size, generator) for size in ((3, 3), (3,), (5, 3)))
    weight.requires_grad_()
    expected = (inputs @ weight.T + bias) @ weight.T + torch.arange(3.0)
    found = function({"first.weight": weight, "first.bias": bias}, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad(value.square().sum(), weight)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_tied_weight_that_is_frozen_is_constant_in_both_places(generator):
    module, inputs = Tied(), drawn((5, 3), generator)
    module.second.weight.requires_grad_(False)
    function, params = diffopt.functional(module)
    assert list(params) == ["first.bias"]
    torch.testing.assert_close(function(params, inputs), module(inputs), rtol=1e-13, atol=1e-13)


def test_calls_leave_no_trace_in_buffers(generator):
    module = nn.BatchNorm1d(2)
    function, params = diffopt.functional(module)
    inputs = torch.randn(8, 2, generator=generator) + 3
    first = function(params, inputs)
    assert torch.equal(module.running_mean, torch.zeros(2))
    module.running_mean.fill_(9)
    module.eval()
    # Evaluation reads the running statistics of the time when the function was made.
    torch.testing.assert_close(function(params, inputs), inputs / (1 + 1e-5) ** 0.5)
    module.train()
    assert torch.equal(function(params, inputs), first)


def test_a_batch_of_tasks_is_a_loop_over_them(generator):
    module, x = head_only(generator), drawn((4, 5, 3), generator)
    function, params = diffopt.functional(module)

    def adapted(params: dict[str, Tensor], x: Tensor) -> Tensor:
        def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return (function(params, x) - 1).square().mean()

        return loss(diffopt.solve(loss, params, x, optimizer=diffopt.SGD(0.1), steps=3).params, x + 1)

    found = torch.func.vmap(torch.func.grad(adapted), in_dims=(None, 0))(params, x)
    looped = torch.stack([torch.func.grad(adapted)(params, one)["head.weight"] for one in x])
    torch.testing.assert_close(found["head.weight"], looped, rtol=1e-10, atol=1e-12)


def test_a_lazy_module_is_taken_after_its_first_call():
    module = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(diffopt.LeafError, match="call the lazy module once"):
        diffopt.functional(module)
    module(torch.randn(4, 3))
    assert diffopt.functional(module)[1]["0.weight"].shape == (2, 3)


def test_a_lazy_module_that_lacks_only_its_buffers_is_refused():
    with pytest.raises(diffopt.LeafError, match=r"'1\.running_mean' is a UninitializedBuffer, .*call the lazy module"):
        diffopt.functional(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)))


# ---------------------------------------------------------------------------------------------------- its names


def without(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in params.items() if name != "head.weight"}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (without, r"params\['head\.weight'\] is missing, expected the 3 names"),
        (lambda params: {**params, "head.bias": torch.ones(2)}, r"params\['head\.bias'\] is unknown, expected the 3"),
        (lambda params: {**without(params), "a": torch.ones(2, 4)}, r"'head\.weight'\] is missing, .*'a'\] is unknown"),
        (lambda params: list(params.values()), "params is list .*, expected the 3 names .*in a dictionary"),
    ],
    ids=["missing", "unknown", "renamed", "a list"],
)
def test_other_names_are_refused(other, says, generator):
    function, params = diffopt.functional(network(generator))
    with pytest.raises(StructureError, match=says):
        function(other(params), drawn((2, 3), generator))


def test_an_order_of_the_names_or_another_mapping_makes_no_difference(generator):
    function, params = diffopt.functional(network(generator))
    x = drawn((2, 3), generator)
    turned = OrderedDict(reversed(list(params.items())))
    assert torch.equal(function(turned, x), function(params, x))


# ------------------------------------------------------------------------------------------------------------ its place


@pytest.mark.parametrize("take", [nn.Module.parameters, nn.Module.named_parameters], ids=["parameters", "named"])
def test_an_optimizer_that_was_given_a_module_s_parameters_names_their_place(take, generator):
    """As ``torch.optim`` takes them: ``SGD(net.parameters(), 0.1)``."""
    module = network(generator)
    function, params = diffopt.functional(module)
    optimizer = diffopt.SGD(take(module), 0.1)
    x = drawn((1, 3), generator)
    for start in (params, params["head.weight"]):  # lr may be a tree like the first, and not like the second
        with pytest.raises(diffopt.DiffoptError, match="takes no parameters here: they are solve's second argument"):
            diffopt.solve(lambda p: function(p, x).sum(), start, optimizer=optimizer, steps=1)


def test_the_tasks_have_the_same_function():
    assert diffopt.tasks.functional is diffopt.functional


def test_it_needs_neither_pillow_nor_einops():
    code = (
        "import sys; sys.modules.update(PIL=None, einops=None); import torch, diffopt; "
        "function, params = diffopt.functional(torch.nn.Linear(2, 1)); print(function(params, torch.ones(2)).shape)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "torch.Size([1])"


class Crowd(nn.Module):
    """Counts how many threads are in its forward at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inside, self.most = nn.Parameter(torch.ones(3)), [], 0

    def forward(self, x: Tensor) -> Tensor:
        self.inside.append(x)
        self.most = max(self.most, len(self.inside))
        time.sleep(0.02)
        result = x * self.weight
        self.inside.pop()
        return result


def test_threads_wait_for_each_other_in_one_module():
    """A call puts other tensors into the module for a while; so two functions of it wait as well."""
    net, x = Crowd(), torch.randn(3)
    functions = [diffopt.functional(net)[0] for _ in range(2)]
    given = [{"weight": torch.randn(3)} for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: functions[i % 2](given[i], x), range(8)))
    assert net.most == 1
    assert all(torch.equal(got, x * params["weight"]) for got, params in zip(found, given, strict=True))
    assert isinstance(net.weight, nn.Parameter)
