"""The mathematics, against torch's own operator and against numerical differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from wn_surgery import apply
from wn_surgery.norm import math, nodes
from wn_surgery.norm.limits import zero_slices
from wn_surgery.norm.math import Dim, g_shape, magnitude, norm_except
from wn_surgery.norm.operator import weight_norm

# torch 2.13 writes its forward-mode decompositions in TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")

SHAPES: list[tuple[int, ...]] = [(3,), (3, 4), (2, 3, 2), (2, 2, 1, 3)]
CASES: list[tuple[tuple[int, ...], Dim]] = [
    (shape, dim)
    for shape in SHAPES
    for dim in [None, *range(len(shape)), *([(0, 1)] if len(shape) > 1 else [])]
] + [((2, 3, 2), (0, 1, 2)), ((2, 3, 2), (0, 2))]
EXACT = [torch.float64, torch.float32]
HALF = [torch.bfloat16, torch.float16]


def pair(shape: tuple[int, ...], dim: Dim, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    v = torch.randn(shape, dtype=dtype)
    real = dtype.to_real() if dtype.is_complex else dtype
    g = torch.rand(g_shape(shape, dim)).add(0.5).to(real)
    return v.requires_grad_(), g.requires_grad_()


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_gradients_of_both_orders_and_forward_mode(
    shape: tuple[int, ...], dim: Dim, dtype: torch.dtype, eps: float
) -> None:
    v, g = pair(shape, dim, dtype)

    def f(v: Tensor, g: Tensor) -> Tensor:
        return weight_norm(v, g, dim, eps)

    assert gradcheck(f, (v, g), check_forward_ad=True)
    # Complex weights never reach the kernel; along random directions is four times as fast.
    assert gradgradcheck(f, (v, g), check_fwd_over_rev=True, fast_mode=dtype.is_complex)


@pytest.mark.parametrize("dim", [0, 1, None, (0, 1)])
def test_a_zero_slice_with_eps_is_right_to_both_orders(dim: Dim) -> None:
    v, g = pair((3, 4), dim, torch.float64)
    with torch.no_grad():
        v[1] = 0
        v[:, 2] = 0
        if dim is None:
            v.zero_()

    def f(v: Tensor, g: Tensor) -> Tensor:
        return weight_norm(v, g, dim, 1e-2)

    assert gradcheck(f, (v, g), check_forward_ad=True)
    assert gradgradcheck(f, (v, g))


@pytest.mark.parametrize("dim", [0, 2])
def test_torchs_fused_operator_is_wrong_to_second_order(dim: int) -> None:
    v, g = pair((2, 3, 4), dim, torch.float64)
    assert not gradgradcheck(
        lambda v, g: torch._weight_norm(v, g, dim), (v, g), raise_exception=False
    )
    assert gradgradcheck(lambda v, g: weight_norm(v, g, dim), (v, g))


def test_torchs_fused_operator_has_no_forward_mode() -> None:
    v, g = pair((2, 3), 0, torch.float64)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jacfwd(lambda v: torch._weight_norm(v, g, 0))(v)
    assert jacfwd(lambda v: weight_norm(v, g, 0))(v).shape == (2, 3, 2, 3)


@pytest.mark.skipif(not math._HALF_ON_CPU, reason="this torch has no kernel to compare with")
@pytest.mark.parametrize("dim", [0, 1])
def test_float16_without_torchs_kernel(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch 2.6, where the formula takes the kernel's place on the CPU."""
    v, g = pair((64, 33), dim, torch.float16)
    upstream = torch.randn(64, 33).half()

    def found() -> list[Tensor]:
        w = weight_norm(v, g, dim)
        grads = torch.autograd.grad(w, (v, g), upstream)
        return [w.detach(), *grads, magnitude(v, dim)]

    wanted = found()
    monkeypatch.setattr(math, "_HALF_ON_CPU", False)
    monkeypatch.setattr(torch, "_weight_norm_interface", None)
    for module in (math, nodes):
        monkeypatch.setattr(module, "kernel_backward", None)
    for ours, theirs in zip(found(), wanted, strict=True):
        assert ours.dtype == torch.float16
        eps = torch.finfo(torch.float16).eps
        torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("dtype", [*EXACT, *HALF])
@pytest.mark.parametrize("shape", [(64, 33), (16, 9, 7)])
def test_values_and_gradients_are_torchs_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if dtype is torch.float16 and not math._HALF_ON_CPU:
        pytest.skip("this torch has no kernel to compare with")
    for dim in [None, *range(len(shape))]:
        v, g = pair(shape, dim, dtype)
        ours, theirs = weight_norm(v, g, dim), torch._weight_norm(v, g, -1 if dim is None else dim)
        assert torch.equal(ours, theirs), dim
        upstream = torch.randn(shape).to(dtype)
        for a, b in zip(
            torch.autograd.grad(ours, (v, g), upstream),
            torch.autograd.grad(theirs, (v, g), upstream),
            strict=True,
        ):
            if dim in (0, len(shape) - 1):  # torch's kernel, both times
                assert torch.equal(a, b), dim
            else:  # one short formula here, step by step there
                rounding = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(a, b, rtol=rounding, atol=8 * rounding)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [*EXACT, torch.complex64])
@pytest.mark.parametrize(("shape", "dim"), [*CASES, ((300, 200), 0), ((300, 200), 1)])
def test_the_magnitude_gives_the_weight_back(
    shape: tuple[int, ...], dim: Dim, dtype: torch.dtype, eps: float
) -> None:
    v, _ = pair(shape, dim, dtype)
    g = magnitude(v, dim, eps)
    assert tuple(g.shape) == g_shape(shape, dim) and not g.requires_grad and not g.is_complex()
    assert torch.equal(weight_norm(v, g, dim, eps), v)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_in_half_precision_the_weight_comes_back_to_a_rounding(
    dim: Dim, dtype: torch.dtype
) -> None:
    v, _ = pair((64, 32), dim, dtype)
    weight = weight_norm(v, magnitude(v, dim), dim)
    torch.testing.assert_close(weight, v, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_norm_dtype_is_closer_to_the_truth() -> None:
    v, g = pair((64, 8, 16), 1, torch.bfloat16)  # a middle axis: torch computes it in bfloat16
    truth = weight_norm(v.double(), g.double(), 1)
    wide = weight_norm(v, g, 1, norm_dtype=torch.float32)
    assert wide.dtype == torch.bfloat16
    assert (wide - truth).abs().max() < (weight_norm(v, g, 1) - truth).abs().max()


def test_a_wider_g_is_promoted() -> None:
    v, g = pair((4, 3), 0, torch.bfloat16)
    weight = weight_norm(v, g.float(), 0)
    assert weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((8, 4, 3, 3), torch.channels_last), ((8, 4, 3, 3, 3), torch.channels_last_3d)],
)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_channels_last_is_kept(shape: tuple[int, ...], memory_format: Any, dim: Dim) -> None:
    v, g = pair(shape, dim, torch.float32)
    last = v.detach().contiguous(memory_format=memory_format).requires_grad_()
    weight = weight_norm(last, g, dim)
    assert weight.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(weight, weight_norm(v, g, dim))
    assert torch.equal(weight_norm(last, magnitude(last, dim), dim), last)
    weight.sum().backward()
    assert last.grad is not None and last.grad.shape == shape


def test_func_transforms() -> None:
    v, g = (t.detach() for t in pair((3, 4), 0, torch.float64))

    def loss(v: Tensor, g: Tensor) -> Tensor:
        return weight_norm(v, g, 0).pow(3).sum()

    torch.testing.assert_close(
        grad(loss)(v, g), torch.autograd.functional.jacobian(lambda v: loss(v, g), v)
    )
    torch.testing.assert_close(jacrev(loss)(v, g), jacfwd(loss)(v, g))
    assert hessian(loss)(v, g).shape == (3, 4, 3, 4)
    batch = torch.stack([v, 2 * v, v + 1])
    torch.testing.assert_close(
        vmap(weight_norm, in_dims=(0, None))(batch, g),
        torch.stack([weight_norm(each, g) for each in batch]),
    )


def test_functional_call() -> None:
    layer = nn.Linear(3, 2)
    apply(layer, {"names": ""})
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    parameters["parametrizations.weight.original0"] = torch.zeros(2, 1)
    x = torch.randn(4, 3)
    assert torch.equal(functional_call(layer, parameters, (x,)), layer.bias.detach().expand(4, 2))
    torch.testing.assert_close(
        vmap(lambda x: functional_call(layer, dict(layer.named_parameters()), (x,)))(x), layer(x)
    )


def test_backward_twice_and_an_edit_in_between() -> None:
    v, g = pair((3, 4), 0, torch.float32)
    weight = weight_norm(v, g)
    weight.sum().backward(retain_graph=True)
    weight.sum().backward()
    weight = weight_norm(v, g)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weight.sum().backward()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs_get_no_gradient(frozen: int) -> None:
    tensors = pair((3, 4), 0, torch.float32)
    tensors[frozen].requires_grad_(False)
    weight_norm(*tensors).sum().backward()
    assert tensors[frozen].grad is None and tensors[1 - frozen].grad is not None


def test_tracing_records_an_operator() -> None:
    v, g = (t.detach() for t in pair((3, 4), 0, torch.float32))
    traced = torch.jit.trace(weight_norm, (v, g))
    assert "PythonOp" not in str(traced.graph)
    assert torch.equal(traced(2 * v, g), weight_norm(2 * v, g))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_tensors_without_elements(shape: tuple[int, ...]) -> None:
    for dim in (0, len(shape) - 1, None, (0,)):
        v = torch.empty(shape, requires_grad=True)
        g = magnitude(v, dim)
        assert g.shape == norm_except(v, dim).shape == g_shape(shape, dim)
        assert zero_slices(v, dim) == g.numel()  # a norm over nothing is zero
        w = weight_norm(v, g, dim)
        w.sum().backward()
        assert w.shape == shape and v.grad is not None


def test_inference_mode_and_autocast() -> None:
    v, g = pair((3, 4), 0, torch.float32)
    with torch.inference_mode():
        assert torch.equal(weight_norm(v, g), weight_norm(v.detach(), g.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert weight_norm(v, g).dtype == torch.float32


def test_zero_slices_and_clamped_norms() -> None:
    v = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    assert zero_slices(v, 0) == 3
    assert zero_slices(v[:1], 0) == zero_slices(v[:2], 1) == zero_slices(v[:2], None) == 0
    assert zero_slices(v[:2], (0, 1)) == 2
    assert norm_except(v[:2], 0, 0.5).flatten().tolist() == [5.0, 0.5]
    assert magnitude(v[1:2], 0, 0.5).item() == 0.5


@pytest.mark.parametrize(
    ("shape", "dim", "expected"),
    [
        ((5,), 0, (5,)),
        ((5,), None, ()),
        ((4, 3), 0, (4, 1)),
        ((4, 3), 1, (1, 3)),
        ((4, 3), (), (1, 1)),
        ((4, 3, 2), 1, (1, 3, 1)),
        ((4, 3, 2), (0, 2), (4, 1, 2)),
        ((4, 3, 2), (0, 1, 2), (4, 3, 2)),
        ((4, 3, 2), None, ()),
    ],
)
def test_the_shape_of_g(shape: tuple[int, ...], dim: Dim, expected: tuple[int, ...]) -> None:
    assert g_shape(shape, dim) == expected
    v = torch.randn(shape)
    assert tuple(norm_except(v, dim).shape) == tuple(magnitude(v, dim).shape) == expected
    if not isinstance(dim, tuple):
        assert tuple(torch.norm_except_dim(v, 2, -1 if dim is None else dim).shape) == expected


LAID_OUT: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(5, 40).t(),
    "every other": lambda: torch.randn(40, 10)[:, ::2],
    "expanded": lambda: torch.randn(1, 5).expand(40, 5),
    "permuted": lambda: torch.randn(6, 5, 7).permute(2, 0, 1),
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_any_strides(layout: str) -> None:
    torch.manual_seed(0)
    v = LAID_OUT[layout]()
    assert not v.is_contiguous()
    for dim in [None, *range(v.ndim), (0, 1)]:
        g = magnitude(v, dim)
        assert torch.equal(weight_norm(v, g, dim), v), dim
        laid_out, dense = v.detach().requires_grad_(), v.detach().contiguous().requires_grad_()
        upstream = torch.randn(v.shape)
        for a, b in zip(
            torch.autograd.grad(weight_norm(laid_out, 2 * g, dim), laid_out, upstream),
            torch.autograd.grad(weight_norm(dense, 2 * g, dim), dense, upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("dim", [0, 1, 2, None, (0, 2)])
def test_vmap_over_v_and_g(dim: Dim, eps: float) -> None:
    v, g = (t.detach() for t in pair((2, 3, 4), dim, torch.float64))
    vs, gs = torch.stack([v, v + 1, -v]), torch.stack([g, 2 * g, -g])

    def f(v: Tensor, g: Tensor) -> Tensor:
        return weight_norm(v, g, dim, eps)

    def apart(v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        v, g = v.clone().requires_grad_(), g.clone().requires_grad_()
        return torch.autograd.grad(f(v, g).sin().sum(), (v, g))

    torch.testing.assert_close(vmap(f)(vs, gs), torch.stack(list(map(f, vs, gs))))
    torch.testing.assert_close(
        vmap(f, in_dims=(None, 0), out_dims=1)(v, gs), torch.stack([f(v, g) for g in gs], 1)
    )
    gradients = vmap(grad(lambda v, g: f(v, g).sin().sum(), argnums=(0, 1)))(vs, gs)
    for a, b in zip(gradients, zip(*map(apart, vs, gs), strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_every_way_to_a_hessian_agrees(dim: Dim) -> None:
    """The kernel's own backward, differentiated, against torch.func's composite formula."""
    v, g = (t.detach() for t in pair((2, 3, 4), dim, torch.float64))

    def loss(v: Tensor) -> Tensor:
        return weight_norm(v, g, dim).sin().sum()

    expected = hessian(loss)(v)
    for vectorize, strategy in [(False, "reverse-mode"), (True, "reverse-mode")]:
        found = torch.autograd.functional.hessian(
            loss, v, vectorize=vectorize, outer_jacobian_strategy=strategy
        )
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(jacrev(jacrev(loss))(v), expected)
    torch.testing.assert_close(jacfwd(jacfwd(loss))(v), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_third_order(dim: int) -> None:
    v, g = pair((3, 4), dim, torch.float64)

    def third(eps: float) -> Tensor:
        out = weight_norm(v, g, dim, eps).sin().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(out, v, create_graph=True)
            out = gradient.square().sum()
        return gradient

    # Nothing is small, so eps only chooses the composite formula over the kernel.
    torch.testing.assert_close(third(0.0), third(1e-9))


@pytest.mark.parametrize("dtype", HALF)
def test_second_order_in_half_precision(dtype: torch.dtype) -> None:
    v, g = pair((4, 3), 0, dtype)
    gradients = torch.autograd.grad(weight_norm(v, g).square().sum(), (v, g), create_graph=True)
    total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    for gradient in torch.autograd.grad(total, (v, g)):
        assert gradient.dtype == dtype and gradient.isfinite().all()


def test_an_edit_of_g_is_noticed_too() -> None:
    v, g = pair((3, 4), 0, torch.float32)
    weight = weight_norm(v, g)
    with torch.no_grad():
        g.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weight.sum().backward()


@pytest.mark.parametrize("dim", [0, 1, None])
def test_without_eps_a_zero_slice_is_nan_as_in_torch(dim: int | None) -> None:
    v, g = pair((3, 4), dim, torch.float32)
    with torch.no_grad():
        v.zero_() if dim is None else v.select(dim, 1).zero_()
    ours, theirs = weight_norm(v, g, dim), torch._weight_norm(v, g, -1 if dim is None else dim)
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()
    gradients = torch.autograd.grad(weight_norm(v, g, dim, 1e-3).sum(), (v, g))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_checkpointing_recomputes_the_same() -> None:
    v, g = pair((3, 4), 0, torch.float32)
    expected = torch.autograd.grad(weight_norm(v, g).sin().sum(), (v, g))
    again = torch.utils.checkpoint.checkpoint(weight_norm, v, g, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.sin().sum(), (v, g)), expected, strict=True):
        assert torch.equal(a, b)


def test_a_g_of_the_wrong_shape_is_refused() -> None:
    """torch's kernel reads behind its end, and takes the process down."""
    v = torch.randn(64, 3, requires_grad=True)
    for shape, dim in (((2, 1), 0), ((1, 64), 0), ((64,), 0), ((64, 1), 1), ((1,), None)):
        for g in (torch.ones(shape), torch.ones(shape, requires_grad=True)):
            with pytest.raises(ValueError, match="expected"):
                weight_norm(v, g, dim)
    layer = torch.nn.Linear(3, 64)
    apply(layer, {"names": ""})
    wrong = dict(layer.named_parameters())
    wrong["parametrizations.weight.original0"] = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"g has shape \(2, 1\); expected \(64, 1\)"):
        torch.func.functional_call(layer, wrong, (torch.ones(1, 3),))
    layer.parametrizations.weight.original0 = torch.nn.Parameter(torch.ones(2, 1))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="g has shape"):
        layer(torch.ones(1, 3))


@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (2, 1)])
def test_a_g_of_the_wrong_shape_is_refused_under_transforms_and_tracers(
    shape: tuple[int, int],
) -> None:
    """Some of these shapes broadcast in the forward; the kernel of the backward then reads on."""
    layer = torch.nn.Linear(3, 64)
    apply(layer, {"names": ""})
    layer.parametrizations.weight.original0 = torch.nn.Parameter(torch.ones(shape))  # type: ignore[union-attr]
    x = torch.ones(2, 3)
    for run in (
        torch.compile(layer, backend="eager"),
        lambda x: torch.export.export(layer, (x,)),
        torch.func.vmap(layer),
        lambda x: torch.func.jvp(layer, (x,), (x,)),
    ):
        with pytest.raises(ValueError, match=r"expected \(64, 1\)"):
            run(x)


def test_shapes_may_be_symbols() -> None:
    layer = torch.nn.Linear(3, 4)
    apply(layer, {"names": ""})
    parameters = dict(layer.named_parameters())

    def run(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,))  # type: ignore[no-any-return]

    x = torch.randn(2, 3)
    graph = make_fx(run, tracing_mode="symbolic")(parameters, x)
    torch.testing.assert_close(graph(parameters, x), layer(x))


@pytest.mark.parametrize("dim", [0, 1])
def test_inference_mode_with_grad_enabled(dim: int) -> None:
    v, g = pair((3, 4, 2), dim, torch.float32)
    expected = weight_norm(v, g, dim)
    with torch.inference_mode(), torch.enable_grad():
        found = weight_norm(v, g, dim)
    assert torch.equal(found, expected) and found.is_inference()


class Called(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dim", [0, 1, None, (0, 1)])
@pytest.mark.parametrize("norm_dtype", [None, torch.float64])
def test_on_meta_only_shapes_are_computed(dim: Any, norm_dtype: torch.dtype | None) -> None:
    """torch computes them by operators written in Python, which takes milliseconds a weight."""
    v = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    there = v.to("meta").requires_grad_()
    expected = magnitude(v, dim, 0.0, norm_dtype)
    with Called() as called:
        g = magnitude(there, dim, 0.0, norm_dtype).requires_grad_()
        w = weight_norm(there, g, dim, 0.0, norm_dtype)
    # A cast is quick.
    assert called.names <= {"detach", "empty", "empty_strided", "_to_copy"}
    assert g.is_meta and (g.shape, g.dtype) == (expected.shape, expected.dtype)
    assert w.is_meta and (w.shape, w.dtype, w.stride()) == (v.shape, v.dtype, v.stride())
    w.sum().backward()
    assert there.grad is not None and there.grad.shape == v.shape
    assert g.grad is not None and g.grad.shape == g.shape
