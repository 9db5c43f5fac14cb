// The slots and groups of wn_surgery.fused, compiled: the same rules, for weights on the CPU,
// without Python around each weight.

#include <Python.h>
#include <c10/core/InferenceMode.h>
#include <frameobject.h>

#include <memory>
#include <utility>
#include <vector>

#include "checks.h"
#include "node.h"
#include "pyobjects.h"

namespace wn_surgery {
namespace {

// All that a weight depends on but its options, which must be those of the slot.
struct State {
  PyObject *g = nullptr, *v = nullptr;  // an entry owns them, so that no other tensor has their id
  uint32_t g_version, v_version;
  bool g_grad, v_grad;
  const void *g_data, *v_data;

  bool operator==(const State& other) const {
    return g == other.g && v == other.v && g_version == other.g_version &&
           v_version == other.v_version && g_grad == other.g_grad && v_grad == other.v_grad &&
           g_data == other.g_data && v_data == other.v_data;
  }
};

struct Entry {
  Ref weight, extent, g, v;
  uint32_t version;
  State state;

  void clear() {
    weight.clear();
    extent.clear();
    g.clear();
    v.clear();
  }
  int visit(visitproc visit, void* arg) {
    Py_VISIT(weight.get());
    Py_VISIT(extent.get());
    Py_VISIT(g.get());
    Py_VISIT(v.get());
    return 0;
  }
};

struct Fields {
  Ref group;  // a weak reference
  Ref scope, parameters, modules, hooks, norm, dim, eps, norm_dtype, name;
  Ref options;  // the dictionary of norm
  std::vector<int64_t> shape, g_shape;
  at::ScalarType dtype;
  std::shared_ptr<const c10::SafePyObject> all_options;
  int64_t kernel;
  float middle_eps;
  Entry grad, plain;
};

struct Slot {
  PyObject_HEAD Fields* f;
};

bool is_option(PyObject* options, PyObject* name, PyObject* wanted) {
  PyObject* found = PyDict_GetItemWithError(options, name);
  if (found == wanted) return true;
  if (found == nullptr) return false;
  const int same = PyObject_RichCompareBool(found, wanted, Py_EQ);
  if (same < 0) PyErr_Clear();  // what cannot be compared is another value
  return same == 1;
}

bool is_set(PyObject* hooks) {
  return PyDict_Check(hooks) ? PyDict_GET_SIZE(hooks) > 0 : PyObject_IsTrue(hooks) == 1;
}

// Fill `state` with what the weight depends on; false where it must be computed as if unfused.
bool look(const Fields& f, bool hooks, State& state) {
  PyObject* g = PyDict_GetItemWithError(f.parameters.get(), s_original0);
  PyObject* v = PyDict_GetItemWithError(f.parameters.get(), s_original1);
  if (g == nullptr || v == nullptr || !THPVariable_CheckExact(g) || !THPVariable_CheckExact(v))
    return false;
  PyObject* modules = f.modules.get();
  if (PyDict_GET_SIZE(modules) != 1 || PyDict_GetItemWithError(modules, s_0) != f.norm.get())
    return false;
  if (hooks) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(f.hooks.get()); ++i) {
      if (is_set(PyTuple_GET_ITEM(f.hooks.get(), i))) return false;
    }
  }
  if (!is_option(f.options.get(), s_dim, f.dim.get()) ||
      !is_option(f.options.get(), s_eps, f.eps.get()) ||
      !is_option(f.options.get(), s_norm_dtype, f.norm_dtype.get()))
    return false;
  const Tensor &m = tensor_of(g), &x = tensor_of(v);
  if (m.is_inference() || x.is_inference() || !m.has_storage() || !x.has_storage()) return false;
  state = {g,
           v,
           static_cast<uint32_t>(m._version()),
           static_cast<uint32_t>(x._version()),
           m.requires_grad(),
           x.requires_grad(),
           m.const_data_ptr(),
           x.const_data_ptr()};
  return true;
}

bool fits(const Fields& f, const State& state) {
  const Tensor &m = tensor_of(state.g), &x = tensor_of(state.v);
  return m.scalar_type() == f.dtype && x.scalar_type() == f.dtype && m.is_cpu() && x.is_cpu() &&
         m.layout() == at::kStrided && x.layout() == at::kStrided && m.sizes() == f.g_shape &&
         x.sizes() == f.shape;
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
  return PyDict_GetItemWithError(f.options.get(), s_training) == Py_True;
}

bool note_reuse(const Fields& f) {
  Ref reuse(PyObject_GetAttr(f.scope.get(), s_reuse));
  if (!reuse) return false;
  Ref happened(PyObject_GetAttr(reuse.get(), s_happened));
  if (!happened) return false;
  if (happened.get() == Py_True) return true;
  return bool(Ref(PyObject_CallMethodNoArgs(f.scope.get(), s_note_reuse)));
}

// Whether a frame is being executed. Python's public answer is an exception, from its `clear()`.
// But the data of a frame that has ended are in the frame itself; `setup` has seen that this is so.
bool frames_are_known = false;

bool is_executed(PyObject* frame) {
  struct Frame {
    PyObject_HEAD void* back;
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
    if (thread.get() != Py_None &&
        PyLong_AsUnsignedLong(thread.get()) == PyThread_get_thread_ident()) {
      Ref owner(PyObject_GetAttr(f.scope.get(), s_owner));
      if (!owner) return owner;
      if (PyFrame_Check(owner.get()) && is_executed(owner.get()))
        return Ref(PyObject_GetAttr(f.scope.get(), s_calls));
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
  std::vector<Ref> held;  // g and v, while other threads may run
  held.reserve(2 * count);
  bool needed = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Fields& f = *reinterpret_cast<Slot*>(PyTuple_GET_ITEM(slots, i))->f;
    State& state = states[i];
    if (!look(f, true, state) || !fits(f, state)) Py_RETURN_NONE;
    if (builds && count > 1 && (has_gradient_hooks(state.g) || has_gradient_hooks(state.v)))
      Py_RETURN_NONE;
    held.push_back(Ref::to(state.g));
    held.push_back(Ref::to(state.v));
    v.push_back(tensor_of(state.v));
    g.push_back(tensor_of(state.g));
    members[i] = {v.back(),        g.back(),      {},       {},          state.v_version,
                  state.g_version, f.all_options, f.kernel, f.middle_eps};
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
    weights =
        WeightNormGroup::apply(std::move(kept), &computed, at::TensorList(v), at::TensorList(g));
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
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i)
    found.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
  return found;
}

// Slot(group, scope, parameters, modules, hooks, norm, options, shape, g_shape, kernel, name,
// example)
PyObject* slot_new(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *group, *scope, *parameters, *modules, *hooks, *norm, *options, *shape, *g_shape, *name,
      *example;
  long long kernel;
  if (!PyArg_ParseTuple(args, "OOO!O!O!OO!O!O!LOO", &group, &scope, &PyDict_Type, &parameters,
                        &PyDict_Type, &modules, &PyTuple_Type, &hooks, &norm, &PyTuple_Type,
                        &options, &PyTuple_Type, &shape, &PyTuple_Type, &g_shape, &kernel, &name,
                        &example))
    return nullptr;
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
  f.options = std::move(held);
  f.dtype = tensor_of(example).scalar_type();
  f.shape = sizes_of(shape);
  f.g_shape = sizes_of(g_shape);
  f.kernel = kernel;
  const bool middle = kernel < 0 && f.dtype == at::kFloat && f.shape.size() > 2 &&
                      PyLong_Check(f.dim.get()) && PyLong_AsLongLong(f.dim.get()) == 1 &&
                      f.norm_dtype.get() == Py_None;
  f.middle_eps = middle ? static_cast<float>(PyFloat_AsDouble(f.eps.get())) : -1;
  f.all_options =
      std::make_shared<const c10::SafePyObject>(Ref::to(options).give(), getPyInterpreter());
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}

int slot_traverse(Slot* self, visitproc visit, void* arg) {
  Fields& f = *self->f;
  for (Ref* ref : {&f.group, &f.scope, &f.parameters, &f.modules, &f.hooks, &f.norm, &f.dim, &f.eps,
                   &f.norm_dtype, &f.name, &f.options}) {
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

PyGetSetDef slot_fields[] = {
    {"name", reinterpret_cast<getter>(slot_name), nullptr, nullptr, nullptr}, {nullptr}};

PyTypeObject slot_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyObject* setup(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *executed, *ended;  // frames
  if (!PyArg_ParseTuple(args, "OOOOOOO!O!", &values, &gradients, &differentiable, &raise_unwritten,
                        &raise_stale, &step, &PyFrame_Type, &executed, &PyFrame_Type, &ended))
    return nullptr;
  frames_are_known = is_executed(executed) && !is_executed(ended);
  for (PyObject* object : {values, gradients, differentiable, raise_unwritten, raise_stale, step})
    Py_INCREF(object);
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
    {"compute", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(compute)), METH_FASTCALL,
     nullptr},
    {nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "wn_surgery_native", nullptr, -1, functions};

PyObject* make_module() {
  intern_names();
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

}  // namespace
}  // namespace wn_surgery

// Named by torch's loader.
#define INIT_OF_(name) PyInit_##name
#define INIT_OF(name) INIT_OF_(name)

PyMODINIT_FUNC INIT_OF(TORCH_EXTENSION_NAME)() { return wn_surgery::make_module(); }
