// Reads the named groups from Python tuples, by position, and returns results as a plain tuple.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "groups.h"

namespace monosoftmax {

// The fields of a group, read one after the other.
class Fields {
 public:
  Fields(pybind11::handle source, const char* group, Py_ssize_t count) : tuple_(source.ptr()), group_(group) {
    if (!PyTuple_Check(tuple_)) fail(std::string(group) + " must be a tuple, got " + Py_TYPE(tuple_)->tp_name);
    if (PyTuple_GET_SIZE(tuple_) != count) {
      fail(std::string(group) + " has " + std::to_string(count) + " fields, got " +
           std::to_string(PyTuple_GET_SIZE(tuple_)));
    }
  }
  template <class T>
  Fields& read(const char* name, T& field) {
    // A bool field takes only a bool, as every Python object converts to one. A float field takes an int, too.
    constexpr bool converts = !std::is_same_v<T, bool>;
    const pybind11::handle value = PyTuple_GET_ITEM(tuple_, next_++);
    pybind11::detail::make_caster<T> caster;
    if (!caster.load(value, converts)) refuse(name, value);
    field = pybind11::detail::cast_op<T>(std::move(caster));
    return *this;
  }
  Fields& read(const char* name, c10::SmallVector<double, 4>& field) {
    const pybind11::handle value = PyTuple_GET_ITEM(tuple_, next_++);
    if (!PyList_Check(value.ptr()) && !PyTuple_Check(value.ptr())) refuse(name, value);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value.ptr()); ++i) {
      const double number = PyFloat_AsDouble(PySequence_Fast_GET_ITEM(value.ptr(), i));
      if (number == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
      field.push_back(number);
    }
    return *this;
  }

 private:
  [[noreturn]] static void fail(const std::string& message) { throw pybind11::type_error("monosoftmax: " + message); }
  [[noreturn]] void refuse(const char* name, pybind11::handle value) const {
    fail(std::string(group_) + "." + name + " cannot be of type " + Py_TYPE(value.ptr())->tp_name);
  }

  PyObject* tuple_;
  const char* group_;
  Py_ssize_t next_ = 0;
};

}  // namespace monosoftmax

namespace pybind11::detail {

template <>
struct type_caster<monosoftmax::groups::Transform> {
  PYBIND11_TYPE_CASTER(monosoftmax::groups::Transform, const_name("Transform"));
  bool load(handle source, bool) {
    monosoftmax::Fields(source, "Transform", 5)
        .read("coefficients", value.coefficients)
        .read("name", value.name)
        .read("constants", value.constants)
        .read("inner", value.inner)
        .read("temperature", value.temperature);
    return true;
  }
};

template <>
struct type_caster<monosoftmax::groups::LossOptions> {
  PYBIND11_TYPE_CASTER(monosoftmax::groups::LossOptions, const_name("LossOptions"));
  bool load(handle source, bool) {
    monosoftmax::Fields(source, "LossOptions", 5)
        .read("weight", value.weight)
        .read("ignore_index", value.ignore_index)
        .read("label_smoothing", value.label_smoothing)
        .read("z_loss", value.z_loss)
        .read("return_lse", value.return_lse);
    return true;
  }
};

template <>
struct type_caster<monosoftmax::groups::Divergence> {
  PYBIND11_TYPE_CASTER(monosoftmax::groups::Divergence, const_name("Divergence"));
  bool load(handle source, bool) {
    monosoftmax::Fields(source, "Divergence", 2).read("kind", value.kind).read("beta", value.beta);
    return true;
  }
};

template <>
struct type_caster<monosoftmax::groups::Upstream> {
  PYBIND11_TYPE_CASTER(monosoftmax::groups::Upstream, const_name("Upstream"));
  bool load(handle source, bool) {
    monosoftmax::Fields(source, "Upstream", 4)
        .read("loss", value.loss)
        .read("lse", value.lse)
        .read("factor", value.factor)
        .read("entropy", value.entropy);
    return true;
  }
};

template <>
struct type_caster<monosoftmax::groups::OutputMask> {
  PYBIND11_TYPE_CASTER(monosoftmax::groups::OutputMask, const_name("tuple[bool, bool]"));
  bool load(handle source, bool) {
    monosoftmax::Fields(source, "output_mask", 2).read("rows", value.rows).read("coefficients", value.coefficients);
    return true;
  }
};

template <>
struct type_caster<monosoftmax::groups::TokenStatistics> {
  PYBIND11_TYPE_CASTER(monosoftmax::groups::TokenStatistics, const_name("TokenStatistics"));
  static handle cast(const monosoftmax::groups::TokenStatistics& results, return_value_policy, handle) {
    const auto& [log_prob, entropy, argmax, lse, rank, row_stats] = results;
    return make_tuple(log_prob, entropy, argmax, lse, rank, row_stats).release();
  }
};

template <>
struct type_caster<monosoftmax::groups::RowResults> {
  PYBIND11_TYPE_CASTER(monosoftmax::groups::RowResults, const_name("RowResults"));
  static handle cast(const monosoftmax::groups::RowResults& results, return_value_policy, handle) {
    return make_tuple(results.loss, results.lse, results.row_stats, results.grad_rows, results.grad_coefficients)
        .release();
  }
};

}  // namespace pybind11::detail
