// What is needed of Python: references, names, and functions of the library for what is rare.

#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/SafePyObject.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <initializer_list>
#include <utility>

namespace wn_surgery {

using at::Tensor;

// What Python gives to `setup`: functions for what is rare.
inline PyObject* values = nullptr;           // wn_surgery.norm.math.values
inline PyObject* gradients = nullptr;        // wn_surgery.norm.math.gradients
inline PyObject* differentiable = nullptr;   // wn_surgery.norm.math.differentiable_gradients
inline PyObject* raise_unwritten = nullptr;  // wn_surgery.norm.math.check_unwritten
inline PyObject* raise_stale = nullptr;      // raises the error of a weight that has become old
inline PyObject* step = nullptr;             // wn_surgery.fused.sharing.STEP

// Names, interned by `intern_names`.
inline PyObject *s_original0, *s_original1, *s_0, *s_dim, *s_eps, *s_norm_dtype, *s_training,
    *s_here, *s_thread, *s_owner, *s_calls, *s_steps, *s_reuse, *s_happened, *s_note_reuse,
    *s_compute;

inline void intern_names() {
  const std::initializer_list<std::pair<PyObject**, const char*>> names = {
      {&s_original0, "original0"},
      {&s_original1, "original1"},
      {&s_0, "0"},
      {&s_dim, "dim"},
      {&s_eps, "eps"},
      {&s_norm_dtype, "norm_dtype"},
      {&s_training, "training"},
      {&s_here, "here"},
      {&s_thread, "_thread"},
      {&s_owner, "_owner"},
      {&s_calls, "calls"},
      {&s_steps, "steps"},
      {&s_reuse, "reuse"},
      {&s_happened, "happened"},
      {&s_note_reuse, "note_reuse"},
      {&s_compute, "compute"},
  };
  for (auto [name, text] : names) *name = PyUnicode_InternFromString(text);
}

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
  static Ref to(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Ref(borrowed);
  }
  PyObject* get() const { return p_; }
  PyObject* give() {
    PyObject* p = p_;
    p_ = nullptr;
    return p;
  }
  explicit operator bool() const { return p_ != nullptr; }
  void clear() {
    PyObject* before = p_;
    p_ = nullptr;
    Py_XDECREF(before);
  }

 private:
  PyObject* p_ = nullptr;
};

inline const Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

[[noreturn]] inline void throw_python() {
  python_error error;
  error.persist();
  throw std::move(error);
}

// The two tensors that a Python function returns for these tensors and the options.
inline std::pair<Tensor, Tensor> called(PyObject* function, std::initializer_list<Tensor> tensors,
                                        const c10::SafePyObject& options) {
  pybind11::gil_scoped_acquire gil;
  PyObject* held = options.ptr(getPyInterpreter());
  const auto given = static_cast<Py_ssize_t>(tensors.size());
  Ref args(PyTuple_New(given + PyTuple_GET_SIZE(held)));
  if (!args) throw_python();
  Py_ssize_t place = 0;
  for (const Tensor& tensor : tensors)
    PyTuple_SET_ITEM(args.get(), place++, THPVariable_Wrap(tensor));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(held); ++i) {
    PyTuple_SET_ITEM(args.get(), place++, Ref::to(PyTuple_GET_ITEM(held, i)).give());
  }
  Ref pair(PyObject_CallObject(function, args.get()));
  if (!pair) throw_python();
  PyObject *one = PyTuple_GetItem(pair.get(), 0), *other = PyTuple_GetItem(pair.get(), 1);
  if (one == nullptr || other == nullptr) throw_python();
  return {one == Py_None ? Tensor() : tensor_of(one),
          other == Py_None ? Tensor() : tensor_of(other)};
}

}  // namespace wn_surgery
