// The only file that knows Python: mobilenet_fast._C.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/extension.h>

#include <array>
#include <cstring>

#include "engine/plan.h"
#include "steps/training.h"

namespace mobilenet_fast {
namespace {

using Quad = std::array<int64_t, 4>;

ImageShape image_shape(const Quad& nchw) { return {nchw[0], nchw[2], nchw[3], nchw[1]}; }

// Stands for a value of the plan among the arguments of an ATen operator.
struct ValueRef {
  int64_t index;
};

Storage parse_storage(const std::string& name) {
  if (name == "arena") return Storage::kArena;
  if (name == "part") return Storage::kPart;
  if (name == "input") return Storage::kInput;
  if (name == "output") return Storage::kOutput;
  if (name == "aten") return Storage::kAten;
  if (name == "slice") return Storage::kSlice;
  throw py::value_error("Plan: storage must be arena, part, input, output, aten or slice, got '" + name + "'");
}

AtenArgument aten_argument(const py::handle& object, const c10::Argument& argument) {
  if (py::isinstance<ValueRef>(object)) {
    return {AtenArgument::kValue, {}, {object.cast<ValueRef>().index}};
  }
  if (py::isinstance<py::list>(object) || py::isinstance<py::tuple>(object)) {
    std::vector<int64_t> values;
    bool refers = false, optional = false, other = false;
    for (const py::handle& item : object) {
      const bool is_value = py::isinstance<ValueRef>(item);
      other |= !is_value && !item.is_none();
      refers |= is_value;
      optional |= item.is_none();
      values.push_back(is_value ? item.cast<ValueRef>().index : -1);
    }
    if (refers) {
      if (other) throw py::value_error("Plan: a list among the arguments must hold values only, or constants only");
      const auto list = argument.type()->cast<c10::ListType>();
      optional |= list && list->getElementType()->kind() == c10::TypeKind::OptionalType;
      return {optional ? AtenArgument::kOptionalValues : AtenArgument::kValues, {}, std::move(values)};
    }
  }
  return {AtenArgument::kConstant, torch::jit::toIValue(object, argument.type()), {}};
}

// Whether the module with this __dict__ runs its class's forward() and nothing else at a call.
bool is_unobserved(const py::dict& module, const py::tuple& global_hooks) {
  static PyObject* const kHooks[] = {
      PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
      PyUnicode_InternFromString("_backward_hooks"), PyUnicode_InternFromString("_backward_pre_hooks")};
  static PyObject* const kForward = PyUnicode_InternFromString("forward");
  static PyObject* const kCompiled = PyUnicode_InternFromString("_compiled_call_impl");
  const auto is_empty = [](PyObject* hooks) { return hooks != nullptr && PyDict_Check(hooks) && !PyDict_Size(hooks); };
  for (const py::handle& hooks : global_hooks) {
    if (!is_empty(hooks.ptr())) return false;
  }
  for (PyObject* name : kHooks) {
    if (!is_empty(PyDict_GetItemWithError(module.ptr(), name))) return false;
  }
  const PyObject* compiled = PyDict_GetItemWithError(module.ptr(), kCompiled);
  return (compiled == nullptr || compiled == Py_None) && PyDict_GetItemWithError(module.ptr(), kForward) == nullptr;
}

// The run of a plan for one tensor, if nothing about the call is out of the ordinary: else None, and the long way round
// through Python decides. Between two runs a network has driven out of the caches what does not belong to it, and each
// page of code and of tables that a call touches again takes about a microsecond.
py::object run_usual(Plan& plan, const py::object& x, const py::dict& module, const py::tuple& global_hooks) {
  if (!THPVariable_CheckExact(x.ptr()) || !is_unobserved(module, global_hooks)) return py::none();
  const at::Tensor& input = THPVariable_Unpack(x.ptr());
  static constexpr c10::DispatchKeySet kPlain{c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                              c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU};
  const bool plain = (input.key_set().raw_repr() & ~kPlain.raw_repr()) == 0 &&
                     !(input.requires_grad() && at::GradMode::is_enabled()) && !input._fw_grad(0).defined();
  const bool watched = c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled() ||
                       torch::jit::tracer::isTracing() || at::autocast::is_autocast_enabled(at::kCPU) ||
                       c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
  if (!plain || watched || !plan.takes(input)) return py::none();
  std::vector<at::Tensor> results;
  {
    const py::gil_scoped_release release;
    results = plan.run({input});
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(results[0])));
}

// Whether tensors, dense and of one length each, hold the same bits.
bool hold_the_same(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const at::Tensor& x, const at::Tensor& y) {
    return x.nbytes() == y.nbytes() && std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
  });
}

void add_aten(Plan& plan, const std::string& name, const std::string& overload, const py::list& arguments,
              std::vector<int64_t> outputs, bool returned) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  const auto& schema = op.schema();
  if (arguments.size() != schema.arguments().size()) {
    throw py::value_error("Plan: " + name + " takes " + std::to_string(schema.arguments().size()) + " arguments, got " +
                          std::to_string(arguments.size()));
  }
  AtenStep step{op, {}, std::move(outputs), returned};
  for (size_t i = 0; i < arguments.size(); ++i) {
    step.arguments.push_back(aten_argument(arguments[i], schema.arguments()[i]));
  }
  plan.add(std::move(step));
}

// Checks raised with TORCH_CHECK_VALUE and its kind become Python's own exceptions, without a C++ trace.
void translate_exception(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const c10::NotImplementedError& e) {
    PyErr_SetString(PyExc_NotImplementedError, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::register_local_exception_translator(translate_exception);
  current_isa();  // an impossible MOBILENET_FAST_ISA is reported on import

  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_isa", [] { return std::string(isa_name(current_isa())); });
  m.def("override_isa", &override_isa, py::arg("name"));
  m.def("release_memory", &release_images);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.push_back(isa_name(isa));
    return names;
  });

  m.def("depthwise_conv2d", &depthwise_conv2d, py::arg("input"), py::arg("weight"), py::arg("bias") = py::none(),
        py::arg("stride") = std::vector<int64_t>{1, 1}, py::arg("padding") = std::vector<int64_t>{0, 0},
        py::arg("dilation") = std::vector<int64_t>{1, 1}, py::arg("activation") = "none", py::arg("scale") = py::none(),
        py::arg("isa") = py::none(), release);
  m.def("pointwise_conv2d", &pointwise_conv2d, py::arg("input"), py::arg("weight"), py::arg("bias") = py::none(),
        py::arg("activation") = "none", py::arg("gate") = py::none(), py::arg("residual") = py::none(),
        py::arg("scale") = py::none(), py::arg("isa") = py::none(), release);
  m.def("batch_norm_act", &batch_norm_act, py::arg("input"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("weight") = py::none(), py::arg("bias") = py::none(), py::arg("eps") = 1e-5,
        py::arg("activation") = "none", py::arg("isa") = py::none(), release);
  m.def("squeeze_excite", &squeeze_excite, py::arg("input"), py::arg("weight1"), py::arg("bias1"), py::arg("weight2"),
        py::arg("bias2"), py::arg("squeeze_activation") = "relu", py::arg("gate_activation") = "hardsigmoid",
        py::arg("isa") = py::none(), release);

  const auto isa_of = [](const std::string& name) { return choose_isa("Plan", name); };
  const auto act_of = [](const std::string& name) { return parse_activation("Plan", name); };
  py::class_<NetworkWeights>(m, "NetworkWeights").def(py::init<>());
  const auto def_pack = [&](const char* name, auto pack) {
    m.def(
        name,
        [=](const at::Tensor& weight, const OptionalTensor& bias, const std::string& isa, NetworkWeights& memory) {
          return pack(weight, bias, isa_of(isa), memory);
        },
        py::arg("weight"), py::arg("bias"), py::arg("isa"), py::arg("memory"));
  };
  def_pack("pack_conv2d", [](const at::Tensor& weight, const OptionalTensor& bias, Isa isa, WeightMemory& memory) {
    return pack_conv2d(weight, bias, std::nullopt, isa, memory);
  });
  def_pack("pack_depthwise_conv2d",
           [](const at::Tensor& weight, const OptionalTensor& bias, Isa isa, WeightMemory& memory) {
             return pack_depthwise_conv2d(weight, bias, std::nullopt, isa, memory);
           });
  def_pack("pack_winograd", pack_winograd);
  m.def(
      "fold_batch_norm",
      [](const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
         double eps) { return fold_batch_norm(mean, var, weight, bias, eps, current_isa()); },
      py::arg("mean"), py::arg("var"), py::arg("weight"), py::arg("bias"), py::arg("eps"));
  m.def("batch_norm_fold", &batch_norm_fold, py::arg("statistics"), py::arg("weight"), py::arg("bias"),
        py::arg("running_mean"), py::arg("running_var"), py::arg("momentum"), py::arg("count"), py::arg("eps"));
  m.def("batch_norm_coefficients", &batch_norm_coefficients, py::arg("mean"), py::arg("inverse_deviation"),
        py::arg("weight"), py::arg("sums"), py::arg("count"), py::arg("by_batch"));
  m.def("l2_cache_bytes", &l2_cache_bytes);
  m.def("hold_the_same", &hold_the_same);
  m.def(
      "peak_gflops",
      [=](const std::string& isa, int threads) { return peak_gflops(isa_of(isa), std::max(1, threads)); },
      py::arg("isa"), py::arg("threads"), release);

  py::class_<Arenas, std::shared_ptr<Arenas>>(m, "Arenas")
      .def(py::init<>())
      .def_property_readonly("idle_bytes", &Arenas::idle_bytes);
  py::class_<ValueRef>(m, "ValueRef").def(py::init<int64_t>()).def_readonly("index", &ValueRef::index);
  py::class_<Plan>(m, "Plan")
      .def(py::init([](const std::string& dtype,
                       const std::vector<std::tuple<std::string, int64_t, std::vector<int64_t>, bool, int64_t>>& values,
                       const std::vector<int64_t>& outputs, int64_t arena_bytes, int64_t part_bytes,
                       std::shared_ptr<Arenas> arenas) {
             std::vector<Value> converted;
             for (const auto& [storage, location, shape, any_strides, channel] : values) {
               converted.push_back({parse_storage(storage), location, shape, any_strides, channel});
             }
             return std::make_unique<Plan>(dtype == "float64" ? at::kDouble : at::kFloat, std::move(converted), outputs,
                                           arena_bytes, part_bytes, std::move(arenas));
           }),
           py::arg("dtype"), py::arg("values"), py::arg("outputs"), py::arg("arena_bytes"), py::arg("part_bytes"),
           py::arg("arenas"))
      .def_readwrite("parts", &Plan::parts)
      .def("run", &Plan::run, release)
      .def("run_usual", &run_usual)
      .def("profile", &Plan::profile, release)
      .def("describe", &Plan::describe)
      .def("add_aten", &add_aten, py::arg("name"), py::arg("overload"), py::arg("arguments"), py::arg("outputs"),
           py::arg("returned"))
      .def(
          "add_pointwise_conv2d",
          [=](Plan& plan, const std::string& isa, Quad x_shape, int64_t out_channels, const at::Tensor& packed,
              const std::string& activation, int x, int y, int gate, int residual) {
            plan.add(make_pointwise_conv2d(isa_of(isa), image_shape(x_shape), out_channels, packed, act_of(activation),
                                           x, y, gate, residual));
          },
          py::kw_only(), py::arg("isa"), py::arg("x_shape"), py::arg("out_channels"), py::arg("packed"),
          py::arg("activation"), py::arg("x"), py::arg("y"), py::arg("gate"), py::arg("residual"))
      .def(
          "add_conv2d",
          [=](Plan& plan, const std::string& isa, Quad x_shape, Quad y_shape, const at::Tensor& packed,
              std::array<int64_t, 8> w, const std::string& activation, int x, int y, int residual) {
            plan.add(make_conv2d(isa_of(isa), image_shape(x_shape), image_shape(y_shape), packed,
                                 {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]}, act_of(activation), x, y, residual));
          },
          py::kw_only(), py::arg("isa"), py::arg("x_shape"), py::arg("y_shape"), py::arg("packed"), py::arg("window"),
          py::arg("activation"), py::arg("x"), py::arg("y"), py::arg("residual"))
      .def(
          "add_winograd",
          [=](Plan& plan, const std::string& isa, Quad x_shape, Quad y_shape, const at::Tensor& packed, int64_t pad_top,
              int64_t pad_left, const std::string& activation, int x, int y, int residual) {
            plan.add(make_winograd(isa_of(isa), image_shape(x_shape), image_shape(y_shape), packed, pad_top, pad_left,
                                   act_of(activation), x, y, residual));
          },
          py::kw_only(), py::arg("isa"), py::arg("x_shape"), py::arg("y_shape"), py::arg("packed"), py::arg("pad_top"),
          py::arg("pad_left"), py::arg("activation"), py::arg("x"), py::arg("y"), py::arg("residual"))
      .def(
          "add_depthwise_conv2d",
          [=](Plan& plan, const std::string& isa, Quad x_shape, Quad y_shape, const at::Tensor& packed,
              std::array<int64_t, 8> w, const std::string& activation, int x, int y, int sums) {
            plan.add(make_depthwise_conv2d(isa_of(isa), image_shape(x_shape), image_shape(y_shape), packed,
                                           {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]}, act_of(activation), x, y,
                                           sums));
          },
          py::kw_only(), py::arg("isa"), py::arg("x_shape"), py::arg("y_shape"), py::arg("packed"), py::arg("window"),
          py::arg("activation"), py::arg("x"), py::arg("y"), py::arg("sums"))
      .def(
          "add_inverted_residual",
          [=](Plan& plan, const std::string& isa, Quad x_shape, Quad y_shape, int64_t hidden_channels,
              const OptionalTensor& expand, const at::Tensor& depthwise, const OptionalTensor& project,
              const std::array<std::string, 3>& activations, std::array<int64_t, 8> w, int x, int y, int sums,
              int residual) {
            const auto tensor = [](const OptionalTensor& t) { return t.has_value() ? *t : at::Tensor(); };
            plan.add(make_inverted_residual(isa_of(isa), {image_shape(x_shape),
                                                          image_shape(y_shape),
                                                          hidden_channels,
                                                          tensor(expand),
                                                          depthwise,
                                                          tensor(project),
                                                          act_of(activations[0]),
                                                          act_of(activations[1]),
                                                          act_of(activations[2]),
                                                          {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]},
                                                          x,
                                                          y,
                                                          sums,
                                                          residual}));
          },
          py::kw_only(), py::arg("isa"), py::arg("x_shape"), py::arg("y_shape"), py::arg("hidden_channels"),
          py::arg("expand"), py::arg("depthwise"), py::arg("project"), py::arg("activations"), py::arg("window"),
          py::arg("x"), py::arg("y"), py::arg("sums"), py::arg("residual"))
      .def(
          "add_squeeze_excite",
          [=](Plan& plan, const std::string& isa, Quad x_shape, int64_t squeeze_channels, const at::Tensor& packed1,
              const at::Tensor& packed2, const std::string& squeeze_activation, const std::string& gate_activation,
              int x, int sums, int64_t parts, int gate) {
            const ImageShape shape = image_shape(x_shape);
            plan.add(make_squeeze_excite(
                isa_of(isa), shape,
                {packed1, std::nullopt, act_of(squeeze_activation), shape.c, squeeze_channels, true},
                {packed2, std::nullopt, act_of(gate_activation), squeeze_channels, shape.c, true}, x, sums, parts,
                gate));
          },
          py::kw_only(), py::arg("isa"), py::arg("x_shape"), py::arg("squeeze_channels"), py::arg("packed1"),
          py::arg("packed2"), py::arg("squeeze_activation"), py::arg("gate_activation"), py::arg("x"), py::arg("sums"),
          py::arg("parts"), py::arg("gate"))
      .def(
          "add_pool2d",
          [=](Plan& plan, const std::string& isa, Quad x_shape, Quad y_shape, std::array<int64_t, 8> w, bool mean,
              bool count_padding, int64_t divisor, int x, int y) {
            plan.add(make_pool2d(isa_of(isa), plan.dtype(), image_shape(x_shape), image_shape(y_shape),
                                 {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]}, {mean, count_padding, divisor}, x,
                                 y));
          },
          py::kw_only(), py::arg("isa"), py::arg("x_shape"), py::arg("y_shape"), py::arg("window"), py::arg("mean"),
          py::arg("count_padding"), py::arg("divisor"), py::arg("x"), py::arg("y"))
      .def(
          "add_global_avg_pool",
          [=](Plan& plan, const std::string& isa, Quad x_shape, int x, int sums, int64_t parts, int y) {
            plan.add(make_global_avg_pool(isa_of(isa), plan.dtype(), image_shape(x_shape), x, sums, parts, y));
          },
          py::kw_only(), py::arg("isa"), py::arg("x_shape"), py::arg("x"), py::arg("sums"), py::arg("parts"),
          py::arg("y"))
      .def(
          "add_scale_shift_act",
          [=](Plan& plan, const std::string& isa, Quad shape, const OptionalTensor& folded, int gate,
              const std::string& activation, int x, int y) {
            plan.add(make_scale_shift_act(isa_of(isa), plan.dtype(), image_shape(shape), folded, gate,
                                          act_of(activation), x, y));
          },
          py::kw_only(), py::arg("isa"), py::arg("shape"), py::arg("folded"), py::arg("gate"), py::arg("activation"),
          py::arg("x"), py::arg("y"))
      .def(
          "add_add_act",
          [=](Plan& plan, const std::string& isa, int64_t elements, const std::string& activation, int a, int b,
              int y) { plan.add(make_add_act(isa_of(isa), plan.dtype(), elements, act_of(activation), a, b, y)); },
          py::kw_only(), py::arg("isa"), py::arg("elements"), py::arg("activation"), py::arg("a"), py::arg("b"),
          py::arg("y"));
}

}  // namespace mobilenet_fast
