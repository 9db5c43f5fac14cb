// The slots and groups of wn_surgery.fused, compiled: the same rules, for weights on the CPU, without
// Python around each weight.

#include <Python.h>
#include <frameobject.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_weight_norm_interface.h>
#include <ATen/ops/_weight_norm_interface_backward.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/norm_except_dim.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/SafePyObject.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What Python gives to `setup`: functions for what is rare.
PyObject* values = nullptr;          // wn_surgery.norm.math.values
PyObject* gradients = nullptr;       // wn_surgery.norm.math.gradients
PyObject* differentiable = nullptr;  // wn_surgery.norm.math.differentiable_gradients
PyObject* raise_unwritten = nullptr; // wn_surgery.norm.math.check_unwritten
PyObject* raise_stale = nullptr;     // raises the error of a weight that has become old
PyObject* step = nullptr;            // wn_surgery.fused.sharing.STEP

PyObject *s_original0, *s_original1, *s_0, *s_dim, *s_eps, *s_norm_dtype, *s_training, *s_here,
    *s_thread, *s_owner, *s_calls, *s_steps, *s_reuse, *s_happened, *s_note_reuse, *s_compute;

// A reference that is owned.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : p_(owned) {}
  Ref(Ref&& other) noexcept : p_(other.p_) { other.p_ = nullptr; }
  Ref& operator=(Ref&& other) noexcept {
    PyObject* before = p_;
    p_ = other.p_;
    other.p_ = nullptr;
    Py_XDECREF(before);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(p_); }
  static Ref to(PyObject* borrowed) { Py_XINCREF(borrowed); return Ref(borrowed); }
  PyObject* get() const { return p_; }
  PyObject* give() { PyObject* p = p_; p_ = nullptr; return p; }
  explicit operator bool() const { return p_ != nullptr; }
  void clear() { PyObject* before = p_; p_ = nullptr; Py_XDECREF(before); }

 private:
  PyObject* p_ = nullptr;
};

const Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

[[noreturn]] void throw_python() {
  python_error error;
  error.persist();
  throw std::move(error);
}

// The two tensors that a Python function returns for these tensors and the options.
std::pair<Tensor, Tensor> called(PyObject* function, std::initializer_list<Tensor> tensors, const c10::SafePyObject& options) {
  pybind11::gil_scoped_acquire gil;
  PyObject* held = options.ptr(getPyInterpreter());
  const auto given = static_cast<Py_ssize_t>(tensors.size());
  Ref args(PyTuple_New(given + PyTuple_GET_SIZE(held)));
  if (!args) throw_python();
  Py_ssize_t place = 0;
  for (const Tensor& tensor : tensors) PyTuple_SET_ITEM(args.get(), place++, THPVariable_Wrap(tensor));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(held); ++i) {
    PyTuple_SET_ITEM(args.get(), place++, Ref::to(PyTuple_GET_ITEM(held, i)).give());
  }
  Ref pair(PyObject_CallObject(function, args.get()));
  if (!pair) throw_python();
  PyObject *one = PyTuple_GetItem(pair.get(), 0), *other = PyTuple_GetItem(pair.get(), 1);
  if (one == nullptr || other == nullptr) throw_python();
  return {one == Py_None ? Tensor() : tensor_of(one), other == Py_None ? Tensor() : tensor_of(other)};
}

// In the memory format of v, which torch's kernel drops.
Tensor like(const Tensor& w, const Tensor& v) {
  if (v.is_contiguous() || (v.dim() != 4 && v.dim() != 5)) return w;
  const auto last = v.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  return v.is_contiguous(last) ? w.contiguous(last) : w;
}

// Small weights ----------------------------------------------------------------------------------

// For a weight of a few kilobytes an operator of torch costs more than its arithmetic. These loops
// add in the order of torch's kernel for the first axis, so the bits are the same; `setup` compares
// them, and where they differ they are not used.

constexpr size_t small_bytes = 32 << 10;
int lanes = 0; // of torch's vectors, in floats; 0: its order of adding is not known

template <int L>
float sum_of_products(const float* x, const float* y, int64_t n) {
  if (n < L) {
    float sum = x[0] * y[0];
    for (int64_t i = 1; i < n; ++i) sum += x[i] * y[i];
    return sum;
  }
  float sums[L];
  for (int l = 0; l < L; ++l) sums[l] = x[l] * y[l];
  int64_t d = L;
  for (; d + L <= n; d += L) {
    for (int l = 0; l < L; ++l) sums[l] += x[d + l] * y[d + l];
  }
  for (int l = 0; d + l < n; ++l) sums[l] += x[d + l] * y[d + l];
  for (int half = L / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

template <int L>
void forward_rows(const float* v, const float* g, float* w, float* norms, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i, v += n, w += n) {
    norms[i] = std::sqrt(sum_of_products<L>(v, v, n));
    const float scale = g[i] / norms[i];
    for (int64_t j = 0; j < n; ++j) w[j] = v[j] * scale;
  }
}

template <int L>
void backward_rows(
    const float* dw, const float* v, const float* g, const float* norms, float* dv, float* dg, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i, dw += n, v += n, dv += n) {
    dg[i] = sum_of_products<L>(dw, v, n) / norms[i];
    const float scale = g[i] / norms[i], along = scale * dg[i] / norms[i];
    for (int64_t j = 0; j < n; ++j) dv[j] = std::fma(-along, v[j], scale * dw[j]);
  }
}

// Middle axes ------------------------------------------------------------------------------------

// For these torch has no kernel, and each of its operators is a pass over memory. Seen as (before,
// kept, after), with `after` a multiple of the lanes, the norms take one pass and the weight one;
// the backward takes two. The order of adding is that of torch.norm_except_dim, as above.

bool middle_is_known = false;
bool middle_fuses = false; // whether torch rounds a square before it is added

struct Axes {
  int64_t before, kept, after;

  // Call `columns(first, end)` for ranges of `kept`, one for each thread. Shorter ones, which would
  // stay in the cache for a second pass, are slower: their pieces are a power of two apart.
  template <typename F>
  void each(F&& columns) const {
    at::parallel_for(0, kept, std::max<int64_t>(1, (1 << 15) / (before * after)), columns);
  }
};

template <int L, bool fuse>
void middle_forward(const float* v, const float* g, float* w, float* norms, float eps, const Axes& axes) {
  axes.each([&](int64_t first, int64_t end) {
    std::vector<float> sums((end - first) * L, 0.0f);
    for (int64_t b = 0; b < axes.before; ++b) {
      const float* x = v + (b * axes.kept + first) * axes.after;
      for (float* s = sums.data(); s < sums.data() + sums.size(); s += L) {
        for (int64_t a = 0; a < axes.after; a += L, x += L) {
          for (int l = 0; l < L; ++l) s[l] = fuse ? std::fma(x[l], x[l], s[l]) : s[l] + x[l] * x[l];
        }
      }
    }
    for (int64_t k = first; k < end; ++k) {
      const float* s = sums.data() + (k - first) * L;
      float sum = s[0];
      for (int l = 1; l < L; ++l) sum += s[l];
      norms[k] = std::sqrt(sum);
      if (norms[k] < eps) norms[k] = eps; // a NaN stays one
    }
    for (int64_t b = 0; b < axes.before; ++b) {
      for (int64_t k = first; k < end; ++k) {
        const float scale = g[k] / norms[k];
        const int64_t start = (b * axes.kept + k) * axes.after;
        for (int64_t j = start; j < start + axes.after; ++j) w[j] = v[j] * scale;
      }
    }
  });
}

void middle_backward(
    const float* dw, const float* v, const float* g, const float* norms, float* dv, float* dg, float eps, const Axes& axes) {
  constexpr int L = 8;
  axes.each([&](int64_t first, int64_t end) {
    std::vector<float> sums((end - first) * L, 0.0f), along(end - first);
    for (int64_t b = 0; b < axes.before; ++b) {
      const int64_t start = (b * axes.kept + first) * axes.after;
      const float *x = v + start, *y = dw + start;
      for (float* s = sums.data(); s < sums.data() + sums.size(); s += L) {
        for (int64_t a = 0; a < axes.after; a += L, x += L, y += L) {
          for (int l = 0; l < L; ++l) s[l] += y[l] * x[l];
        }
      }
    }
    for (int64_t k = first; k < end; ++k) {
      double sum = 0;
      for (int l = 0; l < L; ++l) sum += sums[(k - first) * L + l];
      dg[k] = static_cast<float>(sum) / norms[k];
      // A norm that is clamped is a constant.
      along[k - first] = eps > 0 && !(norms[k] > eps) ? 0 : g[k] / norms[k] * dg[k] / norms[k];
    }
    for (int64_t b = 0; b < axes.before; ++b) {
      for (int64_t k = first; k < end; ++k) {
        const float scale = g[k] / norms[k], less = along[k - first];
        const int64_t start = (b * axes.kept + k) * axes.after;
        for (int64_t j = start; j < start + axes.after; ++j) dv[j] = std::fma(-less, v[j], scale * dw[j]);
      }
    }
  });
}

// Where matrix products read a weight fastest, and round as for one that has memory of its own.
int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// The next part of a buffer, in the shape of `like`.
Tensor part_of(const Tensor& buffer, const Tensor& like, int64_t& place) {
  Tensor part = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(buffer.storage()), buffer.key_set(), buffer.dtype());
  part.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), place);
  place += aligned(like.numel());
  return part;
}

// The node ---------------------------------------------------------------------------------------

// One weight while it is computed, and what its backward needs.
struct Member {
  Tensor v, g, norms, kept;
  uint32_t v_version, g_version;
  std::shared_ptr<const c10::SafePyObject> options; // dim, eps and norm_dtype
  int64_t kernel;     // the axis for torch's kernel; negative where there is none
  float eps = -1;     // of a norm over a middle axis, the second of v; negative for others
  bool small = false; // computed by the loops above

  bool is_small() const {
    return lanes > 0 && kernel == 0 && v.scalar_type() == at::kFloat && v.nbytes() <= small_bytes && v.is_contiguous() &&
        g.is_contiguous() && c10::impl::TorchDispatchModeTLS::stack_len() == 0;
  }

  // Whether the loops for middle axes compute it.
  bool is_middle() const {
    return eps >= 0 && middle_is_known && v.is_contiguous() && g.is_contiguous() && axes().after % lanes == 0 &&
        c10::impl::TorchDispatchModeTLS::stack_len() == 0;
  }

  Axes axes() const { return {v.size(0), v.size(1), v.numel() / (v.size(0) * v.size(1))}; }

  Tensor compute_middle() {
    const Tensor w = at::detail::empty_cpu(v.sizes(), at::kFloat);
    norms = at::detail::empty_cpu(g.sizes(), at::kFloat);
    const auto forward = lanes == 16 ? (middle_fuses ? middle_forward<16, true> : middle_forward<16, false>)
                                     : (middle_fuses ? middle_forward<8, true> : middle_forward<8, false>);
    forward(v.const_data_ptr<float>(), g.const_data_ptr<float>(), w.mutable_data_ptr<float>(),
            norms.mutable_data_ptr<float>(), eps, axes());
    return w;
  }

  std::pair<Tensor, Tensor> backward_middle(const Tensor& grad) const {
    const Tensor dw = grad.contiguous();
    Tensor dv = at::detail::empty_cpu(v.sizes(), at::kFloat), dg = at::detail::empty_cpu(g.sizes(), at::kFloat);
    middle_backward(dw.const_data_ptr<float>(), v.const_data_ptr<float>(), g.const_data_ptr<float>(),
                    norms.const_data_ptr<float>(), dv.mutable_data_ptr<float>(), dg.mutable_data_ptr<float>(), eps, axes());
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
    Tensor dv = at::detail::empty_cpu(v.sizes(), at::kFloat), dg = at::detail::empty_cpu(g.sizes(), at::kFloat);
    const auto rows = lanes == 16 ? backward_rows<16> : backward_rows<8>;
    rows(dw.const_data_ptr<float>(), v.const_data_ptr<float>(), g.const_data_ptr<float>(),
         norms.const_data_ptr<float>(), dv.mutable_data_ptr<float>(), dg.mutable_data_ptr<float>(), g.numel(),
         v.numel() / g.numel());
    return {dv, dg};
  }

  void check_unwritten() const {
    if (v._version() == v_version && g._version() == g_version) return;
    pybind11::gil_scoped_acquire gil;
    Ref x(THPVariable_Wrap(v)), m(THPVariable_Wrap(g));
    Ref before(Py_BuildValue("(II)", v_version, g_version));
    Ref none(PyObject_CallFunctionObjArgs(raise_unwritten, x.get(), m.get(), before.get(), nullptr));
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
    auto [of_v, of_g] = at::_weight_norm_interface_backward(dw, v.contiguous(), g.contiguous(), norms, kernel);
    return {like(of_v, v), of_g};
  }

  std::pair<Tensor, Tensor> backward_with_graph(const Tensor& grad) const {
    return called(differentiable, {grad, v, g}, *options);
  }
};

// What a node keeps. It saves nothing in autograd's sense: see _Group in fused/evaluator.py.
struct Members : torch::CustomClassHolder {
  std::vector<Member> each;
  std::optional<c10::SafePyObject> lasting; // a Lasting, where weights outlive a forward

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
  static variable_list forward(
      AutogradContext* ctx, c10::intrusive_ptr<Members> members, const variable_list* weights, at::TensorList v,
      at::TensorList g) {
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
    const bool again = c10::GradMode::is_enabled(); // with create_graph
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

// Slots ------------------------------------------------------------------------------------------

// All that a weight depends on but its options, which must be those of the slot.
struct State {
  PyObject *g = nullptr, *v = nullptr; // an entry owns them, so that no other tensor has their id
  uint32_t g_version, v_version;
  bool g_grad, v_grad;
  const void *g_data, *v_data;

  bool operator==(const State& other) const {
    return g == other.g && v == other.v && g_version == other.g_version && v_version == other.v_version &&
        g_grad == other.g_grad && v_grad == other.v_grad && g_data == other.g_data && v_data == other.v_data;
  }
};

struct Entry {
  Ref weight, extent, g, v;
  uint32_t version;
  State state;

  void clear() { weight.clear(); extent.clear(); g.clear(); v.clear(); }
  int visit(visitproc visit, void* arg) {
    Py_VISIT(weight.get());
    Py_VISIT(extent.get());
    Py_VISIT(g.get());
    Py_VISIT(v.get());
    return 0;
  }
};

struct Fields {
  Ref group;                      // a weak reference
  Ref scope, parameters, modules, hooks, norm, dim, eps, norm_dtype, name;
  PyObject* options = nullptr;    // the dictionary of norm, which owns it
  std::vector<int64_t> shape, g_shape;
  at::ScalarType dtype;
  std::shared_ptr<const c10::SafePyObject> all_options;
  int64_t kernel;
  float middle_eps;
  Entry grad, plain;
};

struct Slot {
  PyObject_HEAD
  Fields* f;
};

bool is_option(PyObject* options, PyObject* name, PyObject* wanted) {
  PyObject* found = PyDict_GetItemWithError(options, name);
  if (found == wanted) return true;
  if (found == nullptr) return false;
  const int same = PyObject_RichCompareBool(found, wanted, Py_EQ);
  if (same < 0) PyErr_Clear(); // what cannot be compared is another value
  return same == 1;
}

bool is_set(PyObject* hooks) { return PyDict_Check(hooks) ? PyDict_GET_SIZE(hooks) > 0 : PyObject_IsTrue(hooks) == 1; }

// Fill `state` with what the weight depends on; false where it must be computed as if unfused.
bool look(const Fields& f, bool hooks, State& state) {
  PyObject* g = PyDict_GetItemWithError(f.parameters.get(), s_original0);
  PyObject* v = PyDict_GetItemWithError(f.parameters.get(), s_original1);
  if (g == nullptr || v == nullptr || !THPVariable_CheckExact(g) || !THPVariable_CheckExact(v)) return false;
  PyObject* modules = f.modules.get();
  if (PyDict_GET_SIZE(modules) != 1 || PyDict_GetItemWithError(modules, s_0) != f.norm.get()) return false;
  if (hooks) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(f.hooks.get()); ++i) {
      if (is_set(PyTuple_GET_ITEM(f.hooks.get(), i))) return false;
    }
  }
  if (!is_option(f.options, s_dim, f.dim.get()) || !is_option(f.options, s_eps, f.eps.get()) ||
      !is_option(f.options, s_norm_dtype, f.norm_dtype.get())) return false;
  const Tensor &m = tensor_of(g), &x = tensor_of(v);
  if (m.is_inference() || x.is_inference() || !m.has_storage() || !x.has_storage()) return false;
  state = {g, v, static_cast<uint32_t>(m._version()), static_cast<uint32_t>(x._version()),
           m.requires_grad(), x.requires_grad(), m.const_data_ptr(), x.const_data_ptr()};
  return true;
}

bool fits(const Fields& f, const State& state) {
  const Tensor &m = tensor_of(state.g), &x = tensor_of(state.v);
  return m.scalar_type() == f.dtype && x.scalar_type() == f.dtype && m.is_cpu() && x.is_cpu() &&
      m.layout() == at::kStrided && x.layout() == at::kStrided && m.sizes() == f.g_shape && x.sizes() == f.shape;
}

bool has_gradient_hooks(PyObject* object) {
  const auto* variable = reinterpret_cast<THPVariable*>(object);
  for (PyObject* hooks : {variable->backward_hooks, variable->post_accumulate_grad_hooks}) {
    if (hooks != nullptr && hooks != Py_None && is_set(hooks)) return true;
  }
  return false;
}

// Whether a weight may be shared until the next optimizer step; -1 with a Python error.
int lasts(const Fields& f) {
  Ref steps(PyObject_GetAttr(f.scope.get(), s_steps));
  if (!steps) return -1;
  if (steps.get() != Py_True) return 0;
  return PyDict_GetItemWithError(f.options, s_training) == Py_True;
}

bool note_reuse(const Fields& f) {
  Ref reuse(PyObject_GetAttr(f.scope.get(), s_reuse));
  if (!reuse) return false;
  Ref happened(PyObject_GetAttr(reuse.get(), s_happened));
  if (!happened) return false;
  if (happened.get() == Py_True) return true;
  return bool(Ref(PyObject_CallMethodNoArgs(f.scope.get(), s_note_reuse)));
}

// Whether a frame is being executed. Python's public answer is an exception, from its `clear()`. But
// the data of a frame that has ended are in the frame itself; `setup` has seen that this is so.
bool frames_are_known = false;

bool is_executed(PyObject* frame) {
  struct Frame {
    PyObject_HEAD
    void* back;
    char* data;
  };
  const char *data = reinterpret_cast<Frame*>(frame)->data, *start = reinterpret_cast<char*>(frame);
  return data < start || data >= start + 16 * sizeof(Frame);
}

// Scope.here(), without Python where the call of the root is under way in this thread.
Ref here(const Fields& f) {
  if (frames_are_known) {
    Ref thread(PyObject_GetAttr(f.scope.get(), s_thread));
    if (!thread) return thread;
    if (thread.get() != Py_None && PyLong_AsUnsignedLong(thread.get()) == PyThread_get_thread_ident()) {
      Ref owner(PyObject_GetAttr(f.scope.get(), s_owner));
      if (!owner) return owner;
      if (PyFrame_Check(owner.get()) && is_executed(owner.get())) return Ref(PyObject_GetAttr(f.scope.get(), s_calls));
    }
  }
  return Ref(PyObject_CallMethodNoArgs(f.scope.get(), s_here));
}

PyObject* slot_weight(Slot* self, PyObject*) {
  HANDLE_TH_ERRORS
  Fields& f = *self->f;
  const bool builds = c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled();
  const int stays = builds ? lasts(f) : 0;
  if (stays < 0) return nullptr;
  Ref extent = stays ? Ref::to(step) : here(f);
  if (!extent || extent.get() == Py_None) return extent.give();
  if (stays && !note_reuse(f)) return nullptr;
  const Entry& entry = builds ? f.grad : f.plain;
  PyObject* alone = Py_False;
  if (entry.weight) {
    const int same = PyObject_RichCompareBool(entry.extent.get(), extent.get(), Py_EQ);
    if (same < 0) return nullptr;
    if (same) {
      State now;
      // Hooks on what computes the weight wait for the next time that it is computed.
      if (static_cast<uint32_t>(tensor_of(entry.weight.get())._version()) == entry.version &&
          look(f, !stays, now) && now == entry.state) {
        return Ref::to(entry.weight.get()).give();
      }
      alone = Py_True;
    }
  }
  Ref group(PyObject_CallNoArgs(f.group.get()));
  if (!group || group.get() == Py_None) return group.give();
  return PyObject_CallMethodObjArgs(group.get(), s_compute, self, extent.get(), alone, nullptr);
  END_HANDLE_TH_ERRORS
}

// compute(slots, builds, extent, lasting): their weights as a list; None if one does not fit.
PyObject* compute(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  PyObject* slots = args[0];
  const bool builds = args[1] == Py_True;
  PyObject *extent = args[2], *lasting = args[3];
  const Py_ssize_t count = PyTuple_GET_SIZE(slots);
  std::vector<State> states(count);
  std::vector<Member> members(count);
  variable_list v, g;
  v.reserve(count);
  g.reserve(count);
  std::vector<Ref> held; // g and v, while other threads may run
  held.reserve(2 * count);
  bool needed = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Fields& f = *reinterpret_cast<Slot*>(PyTuple_GET_ITEM(slots, i))->f;
    State& state = states[i];
    if (!look(f, true, state) || !fits(f, state)) Py_RETURN_NONE;
    if (builds && count > 1 && (has_gradient_hooks(state.g) || has_gradient_hooks(state.v))) Py_RETURN_NONE;
    held.push_back(Ref::to(state.g));
    held.push_back(Ref::to(state.v));
    v.push_back(tensor_of(state.v));
    g.push_back(tensor_of(state.g));
    members[i] = {v.back(), g.back(), {}, {}, state.v_version, state.g_version, f.all_options, f.kernel, f.middle_eps};
    needed |= state.g_grad || state.v_grad;
  }
  variable_list weights(count);
  {
    pybind11::gil_scoped_release no_gil;
    // Not inference tensors: those have no version, by which a write into them is seen.
    c10::InferenceMode not_inference(false);
    at::AutoDispatchBelowADInplaceOrView below;
    at::NoGradGuard no_grad;
    // Small weights are parts of one tensor, but to autograd none is a view.
    int64_t size = 0, rows = 0;
    for (Member& member : members) {
      member.small = member.is_small();
      if (member.small) size += aligned(member.v.numel()), rows += aligned(member.g.numel());
    }
    Tensor buffer, norms;
    if (size > 0) {
      buffer = at::detail::empty_cpu({size}, at::kFloat);
      norms = at::detail::empty_cpu({rows}, at::kFloat);
    }
    int64_t place = 0, row = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      Member& member = members[i];
      if (member.small) {
        weights[i] = part_of(buffer, member.v, place);
        member.norms = part_of(norms, member.g, row);
        member.compute_small(weights[i]);
      } else {
        weights[i] = member.compute();
      }
      if (builds && lasting != Py_None) members[i].kept = weights[i].detach();
    }
  }
  if (builds && needed) {
    auto kept = c10::make_intrusive<Members>();
    kept->each = std::move(members);
    if (lasting != Py_None) {
      Py_INCREF(lasting);
      kept->lasting.emplace(lasting, getPyInterpreter());
    }
    const variable_list computed = std::move(weights);
    weights = WeightNormGroup::apply(std::move(kept), &computed, at::TensorList(v), at::TensorList(g));
  }
  Ref found(PyList_New(count));
  if (!found) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Fields& f = *reinterpret_cast<Slot*>(PyTuple_GET_ITEM(slots, i))->f;
    Entry& entry = builds ? f.grad : f.plain;
    Ref weight(THPVariable_Wrap(weights[i]));
    if (!weight) return nullptr;
    PyList_SET_ITEM(found.get(), i, Ref::to(weight.get()).give());
    entry.version = static_cast<uint32_t>(weights[i]._version());
    entry.state = states[i];
    entry.weight = std::move(weight);
    entry.extent = Ref::to(extent);
    entry.g = std::move(held[2 * i]);
    entry.v = std::move(held[2 * i + 1]);
  }
  return found.give();
  END_HANDLE_TH_ERRORS
}

PyObject* slot_lasts(Slot* self, PyObject* builds) {
  const int found = builds == Py_True ? lasts(*self->f) : 0;
  return found < 0 ? nullptr : PyBool_FromLong(found);
}

PyObject* slot_forget(Slot* self, PyObject*) {
  self->f->grad.clear();
  self->f->plain.clear();
  Py_RETURN_NONE;
}

PyObject* slot_forget_plain(Slot* self, PyObject*) {
  self->f->plain.clear();
  Py_RETURN_NONE;
}

PyObject* slot_reduce(Slot*, PyObject*) { return Py_BuildValue("(O())", Py_TYPE(Py_None)); }

std::vector<int64_t> sizes_of(PyObject* tuple) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) found.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
  return found;
}

// Slot(group, scope, parameters, modules, hooks, norm, options, shape, g_shape, kernel, name, example)
PyObject* slot_new(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *group, *scope, *parameters, *modules, *hooks, *norm, *options, *shape, *g_shape, *name, *example;
  long long kernel;
  if (!PyArg_ParseTuple(args, "OOO!O!O!OO!O!O!LOO", &group, &scope, &PyDict_Type, &parameters, &PyDict_Type, &modules,
                        &PyTuple_Type, &hooks, &norm, &PyTuple_Type, &options, &PyTuple_Type, &shape, &PyTuple_Type,
                        &g_shape, &kernel, &name, &example)) return nullptr;
  Ref held(PyObject_GenericGetDict(norm, nullptr));
  if (!held) return nullptr;
  auto* self = reinterpret_cast<Slot*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->f = new Fields();
  Fields& f = *self->f;
  f.group = Ref::to(group);
  f.scope = Ref::to(scope);
  f.parameters = Ref::to(parameters);
  f.modules = Ref::to(modules);
  f.hooks = Ref::to(hooks);
  f.norm = Ref::to(norm);
  f.dim = Ref::to(PyTuple_GET_ITEM(options, 0));
  f.eps = Ref::to(PyTuple_GET_ITEM(options, 1));
  f.norm_dtype = Ref::to(PyTuple_GET_ITEM(options, 2));
  f.name = Ref::to(name);
  f.options = held.get();
  f.dtype = tensor_of(example).scalar_type();
  f.shape = sizes_of(shape);
  f.g_shape = sizes_of(g_shape);
  f.kernel = kernel;
  const bool middle = kernel < 0 && f.dtype == at::kFloat && f.shape.size() > 2 && PyLong_Check(f.dim.get()) &&
      PyLong_AsLongLong(f.dim.get()) == 1 && f.norm_dtype.get() == Py_None;
  f.middle_eps = middle ? static_cast<float>(PyFloat_AsDouble(f.eps.get())) : -1;
  f.all_options = std::make_shared<const c10::SafePyObject>(Ref::to(options).give(), getPyInterpreter());
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}

int slot_traverse(Slot* self, visitproc visit, void* arg) {
  Fields& f = *self->f;
  for (Ref* ref : {&f.group, &f.scope, &f.parameters, &f.modules, &f.hooks, &f.norm, &f.dim, &f.eps, &f.norm_dtype, &f.name}) {
    Py_VISIT(ref->get());
  }
  if (const int code = f.grad.visit(visit, arg)) return code;
  return f.plain.visit(visit, arg);
}

int slot_clear(Slot* self) {
  self->f->grad.clear();
  self->f->plain.clear();
  return 0;
}

void slot_dealloc(Slot* self) {
  PyObject_GC_UnTrack(self);
  delete self->f;
  Py_TYPE(self)->tp_free(reinterpret_cast<PyObject*>(self));
}

PyObject* slot_name(Slot* self, void*) { return Ref::to(self->f->name.get()).give(); }

PyMethodDef slot_methods[] = {
    {"weight", reinterpret_cast<PyCFunction>(slot_weight), METH_NOARGS, nullptr},
    {"lasts", reinterpret_cast<PyCFunction>(slot_lasts), METH_O, nullptr},
    {"forget", reinterpret_cast<PyCFunction>(slot_forget), METH_NOARGS, nullptr},
    {"forget_plain", reinterpret_cast<PyCFunction>(slot_forget_plain), METH_NOARGS, nullptr},
    {"__reduce__", reinterpret_cast<PyCFunction>(slot_reduce), METH_NOARGS, nullptr},
    {nullptr}};

PyGetSetDef slot_fields[] = {{"name", reinterpret_cast<getter>(slot_name), nullptr, nullptr, nullptr}, {nullptr}};

PyTypeObject slot_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

uint32_t seed = 1; // not torch's generator, whose state is the user's

Tensor numbers(at::IntArrayRef shape) {
  Tensor made = at::detail::empty_cpu(shape, at::kFloat);
  for (int64_t i = 0; i < made.numel(); ++i) {
    seed = seed * 1664525u + 1013904223u;
    made.mutable_data_ptr<float>()[i] = static_cast<float>(seed / 4294967296.0 - 0.3);
  }
  return made;
}

// Whether the norms over a middle axis are those of torch.
bool middle_agrees(bool fuse) {
  middle_fuses = fuse;
  for (const int64_t after : {16, 32, 48, 80}) {
    Member member;
    member.kernel = -1;
    member.eps = 0;
    member.v = numbers({37, 5, after});
    member.g = numbers({1, 5, 1});
    member.compute_middle();
    if (!at::equal(member.norms, at::norm_except_dim(member.v, 2, 1))) return false;
  }
  return true;
}

// Whether the loops give the bits of torch's kernels with vectors of so many floats.
bool agrees(int count) {
  lanes = count;
  for (const int64_t n : {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 72, 100, 129, 1000, 2047}) {
    Member member;
    member.kernel = 0;
    member.v = numbers({9, n});
    member.g = numbers({9, 1});
    const Tensor dw = numbers({9, n}), mine = at::detail::empty_cpu({9, n}, at::kFloat);
    const Tensor w = member.compute(), norms = member.norms;
    const auto [dv, dg] = at::_weight_norm_interface_backward(dw, member.v, member.g, norms, 0);
    member.norms = at::detail::empty_cpu({9, 1}, at::kFloat);
    member.compute_small(mine);
    const auto [my_dv, my_dg] = member.backward_small(dw);
    if (!at::equal(mine, w) || !at::equal(member.norms, norms) || !at::equal(my_dv, dv) || !at::equal(my_dg, dg)) {
      return false;
    }
  }
  return true;
}

PyObject* setup(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *executed, *ended; // frames
  if (!PyArg_ParseTuple(args, "OOOOOOO!O!", &values, &gradients, &differentiable, &raise_unwritten, &raise_stale, &step, &PyFrame_Type,
                        &executed, &PyFrame_Type, &ended)) return nullptr;
  frames_are_known = is_executed(executed) && !is_executed(ended);
  for (PyObject* object : {values, gradients, differentiable, raise_unwritten, raise_stale, step}) Py_INCREF(object);
  at::AutoDispatchBelowADInplaceOrView below;
  at::NoGradGuard no_grad;
  c10::InferenceMode not_inference(false);
  if (!agrees(16) && !agrees(8)) lanes = 0;
  middle_is_known = lanes > 0 && (middle_agrees(false) || middle_agrees(true));
  return Py_BuildValue("(iO)", lanes, middle_is_known ? Py_True : Py_False);
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"setup", setup, METH_VARARGS, nullptr},
    {"compute", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(compute)), METH_FASTCALL, nullptr},
    {nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "wn_surgery_native", nullptr, -1, functions};

} // namespace

// Named by torch's loader.
#define INIT_OF_(name) PyInit_##name
#define INIT_OF(name) INIT_OF_(name)

PyMODINIT_FUNC INIT_OF(TORCH_EXTENSION_NAME)() {
  for (auto [name, text] : std::initializer_list<std::pair<PyObject**, const char*>>{
           {&s_original0, "original0"}, {&s_original1, "original1"}, {&s_0, "0"}, {&s_dim, "dim"}, {&s_eps, "eps"},
           {&s_norm_dtype, "norm_dtype"}, {&s_training, "training"}, {&s_here, "here"}, {&s_thread, "_thread"},
           {&s_owner, "_owner"}, {&s_calls, "calls"}, {&s_steps, "steps"},
           {&s_reuse, "reuse"}, {&s_happened, "happened"}, {&s_note_reuse, "note_reuse"}, {&s_compute, "compute"}}) {
    *name = PyUnicode_InternFromString(text);
  }
  slot_type.tp_name = "wn_surgery_native.Slot";
  slot_type.tp_basicsize = sizeof(Slot);
  slot_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC;
  slot_type.tp_new = slot_new;
  slot_type.tp_traverse = reinterpret_cast<traverseproc>(slot_traverse);
  slot_type.tp_clear = reinterpret_cast<inquiry>(slot_clear);
  slot_type.tp_dealloc = reinterpret_cast<destructor>(slot_dealloc);
  slot_type.tp_methods = slot_methods;
  slot_type.tp_getset = slot_fields;
  if (PyType_Ready(&slot_type) < 0) return nullptr;
  PyObject* made = PyModule_Create(&definition);
  if (made == nullptr) return nullptr;
  Py_INCREF(&slot_type);
  if (PyModule_AddObject(made, "Slot", reinterpret_cast<PyObject*>(&slot_type)) < 0) return nullptr;
  return made;
}
