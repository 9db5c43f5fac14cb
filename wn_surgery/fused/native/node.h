// A weight while it is computed, and the autograd node of a group.

#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_weight_norm_interface.h>
#include <ATen/ops/_weight_norm_interface_backward.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/isnan.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <memory>
#include <optional>

#include "loops.h"
#include "pyobjects.h"

namespace wn_surgery {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// In the memory format of v, which torch's kernel drops.
inline Tensor like(const Tensor& w, const Tensor& v) {
  if (v.is_contiguous() || (v.dim() != 4 && v.dim() != 5)) return w;
  const auto last =
      v.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  return v.is_contiguous(last) ? w.contiguous(last) : w;
}

// Where matrix products read a weight fastest, and round as for one that has memory of its own.
inline int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// The next part of a buffer, in the shape of `like`.
inline Tensor part_of(const Tensor& buffer, const Tensor& like, int64_t& place) {
  Tensor part = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(buffer.storage()),
                                                         buffer.key_set(), buffer.dtype());
  part.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), place);
  place += aligned(like.numel());
  return part;
}

// One weight while it is computed, and what its backward needs.
struct Member {
  Tensor v, g, norms, kept;
  uint32_t v_version, g_version;
  std::shared_ptr<const c10::SafePyObject> options;  // dim, eps and norm_dtype
  int64_t kernel;      // the axis for torch's kernel; negative where there is none
  float eps = -1;      // of a norm over a middle axis, the second of v; negative for others
  bool small = false;  // computed by the loops above

  bool is_small() const {
    return lanes > 0 && kernel == 0 && v.scalar_type() == at::kFloat && v.nbytes() <= small_bytes &&
           v.is_contiguous() && g.is_contiguous() &&
           c10::impl::TorchDispatchModeTLS::stack_len() == 0;
  }

  // Whether the loops for middle axes compute it.
  bool is_middle() const {
    return eps >= 0 && middle_is_known && v.is_contiguous() && g.is_contiguous() &&
           axes().after % lanes == 0 && c10::impl::TorchDispatchModeTLS::stack_len() == 0;
  }

  Axes axes() const { return {v.size(0), v.size(1), v.numel() / (v.size(0) * v.size(1))}; }

  Tensor compute_middle() {
    const Tensor w = at::detail::empty_cpu(v.sizes(), at::kFloat);
    norms = at::detail::empty_cpu(g.sizes(), at::kFloat);
    const auto forward = lanes == 16
                             ? (middle_fuses ? middle_forward<16, true> : middle_forward<16, false>)
                             : (middle_fuses ? middle_forward<8, true> : middle_forward<8, false>);
    forward(v.const_data_ptr<float>(), g.const_data_ptr<float>(), w.mutable_data_ptr<float>(),
            norms.mutable_data_ptr<float>(), eps, axes());
    return w;
  }

  std::pair<Tensor, Tensor> backward_middle(const Tensor& grad) const {
    const Tensor dw = grad.contiguous();
    Tensor dv = at::detail::empty_cpu(v.sizes(), at::kFloat),
           dg = at::detail::empty_cpu(g.sizes(), at::kFloat);
    middle_backward(dw.const_data_ptr<float>(), v.const_data_ptr<float>(),
                    g.const_data_ptr<float>(), norms.const_data_ptr<float>(),
                    dv.mutable_data_ptr<float>(), dg.mutable_data_ptr<float>(), eps, axes());
    return {dv, dg};
  }

  Tensor compute() {
    Tensor w;
    if (is_middle()) return compute_middle();
    if (kernel < 0) {
      std::tie(w, norms) = called(values, {v, g}, *options);
      return w;
    }
    const Tensor contiguous = v.contiguous();
    std::tie(w, norms) = at::_weight_norm_interface(contiguous, g.contiguous(), kernel);
    return v.is_contiguous() ? w : like(w, v);
  }

  // Into `w`, in a buffer of the group.
  void compute_small(const Tensor& w) const {
    const auto rows = lanes == 16 ? forward_rows<16> : forward_rows<8>;
    rows(v.const_data_ptr<float>(), g.const_data_ptr<float>(), w.mutable_data_ptr<float>(),
         norms.mutable_data_ptr<float>(), g.numel(), v.numel() / g.numel());
  }

  std::pair<Tensor, Tensor> backward_small(const Tensor& grad) const {
    const Tensor dw = grad.contiguous();
    Tensor dv = at::detail::empty_cpu(v.sizes(), at::kFloat),
           dg = at::detail::empty_cpu(g.sizes(), at::kFloat);
    const auto rows = lanes == 16 ? backward_rows<16> : backward_rows<8>;
    rows(dw.const_data_ptr<float>(), v.const_data_ptr<float>(), g.const_data_ptr<float>(),
         norms.const_data_ptr<float>(), dv.mutable_data_ptr<float>(), dg.mutable_data_ptr<float>(),
         g.numel(), v.numel() / g.numel());
    return {dv, dg};
  }

  void check_unwritten() const {
    if (v._version() == v_version && g._version() == g_version) return;
    pybind11::gil_scoped_acquire gil;
    Ref x(THPVariable_Wrap(v)), m(THPVariable_Wrap(g));
    Ref before(Py_BuildValue("(II)", v_version, g_version));
    Ref none(
        PyObject_CallFunctionObjArgs(raise_unwritten, x.get(), m.get(), before.get(), nullptr));
    throw_python();
  }

  std::pair<Tensor, Tensor> backward(const Tensor& grad) const {
    at::AutoDispatchBelowADInplaceOrView below;
    // An ordinary tensor has no keys that v has not, and v is one.
    if (grad.scalar_type() == v.scalar_type() && v.key_set() == (v.key_set() | grad.key_set()) &&
        c10::impl::TorchDispatchModeTLS::stack_len() == 0) {
      if (small) return backward_small(grad);
      if (is_middle()) return backward_middle(grad);
    }
    if (kernel < 0) return called(gradients, {grad, v, g, norms}, *options);
    const Tensor dw = grad.to(v.scalar_type()).contiguous();
    auto [of_v, of_g] =
        at::_weight_norm_interface_backward(dw, v.contiguous(), g.contiguous(), norms, kernel);
    return {like(of_v, v), of_g};
  }

  std::pair<Tensor, Tensor> backward_with_graph(const Tensor& grad) const {
    return called(differentiable, {grad, v, g}, *options);
  }
};

// What a node keeps. It saves nothing in autograd's sense: see _Group in fused/evaluator.py.
struct Members : torch::CustomClassHolder {
  std::vector<Member> each;
  std::optional<c10::SafePyObject> lasting;  // a Lasting, where weights outlive a forward

  bool reused() const {
    if (!lasting) return false;
    pybind11::gil_scoped_acquire gil;
    Ref reuse(PyObject_GetAttr(lasting->ptr(getPyInterpreter()), s_reuse));
    if (!reuse) throw_python();
    Ref found(PyObject_GetAttr(reuse.get(), s_happened));
    if (!found) throw_python();
    return found.get() == Py_True;
  }

  // Exactly: torch does not count what is written through .data, numpy or the storage.
  void check_kept(size_t i) const {
    at::NoGradGuard no_grad;
    Member copy = each[i];
    const Tensor now = copy.compute(), &before = each[i].kept;
    if (at::equal(now, before)) return;
    // The NaNs of a diverged model are as they were.
    const Tensor both = at::isnan(now).logical_and(at::isnan(before));
    if (!now.ne(before).logical_and(both.logical_not()).any().item<bool>()) return;
    pybind11::gil_scoped_acquire gil;
    Ref number(PyLong_FromSize_t(i));
    PyObject* held = lasting->ptr(getPyInterpreter());
    Ref none(PyObject_CallFunctionObjArgs(raise_stale, held, number.get(), nullptr));
    throw_python();
  }
};

struct WeightNormGroup : torch::autograd::Function<WeightNormGroup> {
  static variable_list forward(AutogradContext* ctx, c10::intrusive_ptr<Members> members,
                               const variable_list* weights, at::TensorList v, at::TensorList g) {
    variable_list frozen;
    for (size_t i = 0; i < v.size(); ++i) {
      if (!v[i].requires_grad() && !g[i].requires_grad()) frozen.push_back((*weights)[i]);
    }
    if (!frozen.empty()) ctx->mark_non_differentiable(frozen);
    ctx->set_materialize_grads(false);
    ctx->saved_data["members"] = c10::IValue::make_capsule(std::move(members));
    return *weights;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto held = ctx->saved_data["members"].toCapsule();
    const auto& members = static_cast<const Members&>(*held);
    const size_t count = members.each.size();
    variable_list found(2 + 2 * count);
    // A backward may reach a part of the group only. It does not concern the rest.
    for (size_t i = 0; i < count; ++i) {
      if (grads[i].defined()) members.each[i].check_unwritten();
    }
    if (members.reused()) {
      for (size_t i = 0; i < count; ++i) {
        if (grads[i].defined()) members.check_kept(i);
      }
    }
    const bool again = c10::GradMode::is_enabled();  // with create_graph
    for (size_t i = 0; i < count; ++i) {
      const bool need_v = ctx->needs_input_grad(i), need_g = ctx->needs_input_grad(count + i);
      if (!grads[i].defined() || !(need_v || need_g)) continue;
      const Member& member = members.each[i];
      const auto [v, g] = again ? member.backward_with_graph(grads[i]) : member.backward(grads[i]);
      if (need_v) found[2 + i] = v;
      if (need_g) found[2 + count + i] = g;
    }
    return found;
  }
};

}  // namespace wn_surgery
