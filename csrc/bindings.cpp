// tts_engine._C: the only file that knows Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "kv_tree.h"

namespace py = pybind11;
using tts::KVTree;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

using Shape = std::vector<py::ssize_t>;

std::string describe(const Shape& shape) {
  std::string text = "[";
  for (py::ssize_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// The buffer of a caller's array, which must be exactly so: nothing is converted or copied on the way.
template <class T>
T* buffer(const char* name, const py::array& array, const Shape& shape) {
  const Shape got(array.shape(), array.shape() + array.ndim());
  if (!Array<T>::check_(array) || !array.writeable() || got != shape)
    throw std::invalid_argument(std::string(name) + " must be a writable C-contiguous " +
                                py::str(py::dtype::of<T>()).cast<std::string>() + " " + describe(shape) + ", got " +
                                py::str(array.dtype()).cast<std::string>() + " " + describe(got));
  return static_cast<T*>(const_cast<py::array&>(array).mutable_data());
}

template <class T>
const T* column(const char* name, const Array<T>& array, py::ssize_t num_rows) {
  const Shape got(array.shape(), array.shape() + array.ndim());
  if (got != Shape{num_rows})
    throw std::invalid_argument(std::string(name) + " must be [" + std::to_string(num_rows) + "], got " + describe(got));
  return array.data();
}

size_t extend_many(KVTree& tree, const Array<int64_t>& leases, int64_t num_tokens) {
  const int64_t* data = column("leases", leases, leases.size());
  py::gil_scoped_release unlocked;
  return tree.extend_many(data, leases.size(), num_tokens);
}

void context_slots(const KVTree& tree, const Array<int64_t>& handles, const Array<bool>& is_lease,
                   const Array<int32_t>& lens, const py::array& out) {
  const py::ssize_t num_rows = handles.size(), width = out.ndim() == 2 ? out.shape(1) : 0;
  const int64_t* handle = column("handles", handles, num_rows);
  const bool* lease = column("is_lease", is_lease, num_rows);
  const int32_t* len = column("lens", lens, num_rows);
  int32_t* slots = buffer<int32_t>("out", out, {num_rows, width});
  py::gil_scoped_release unlocked;
  tree.context_slots(handle, lease, len, num_rows, slots, width);
}

void write_slots(const KVTree& tree, const Array<int64_t>& handles, const Array<bool>& is_lease,
                 const Array<int32_t>& starts, const Array<int32_t>& counts, const py::array& out) {
  const py::ssize_t num_rows = handles.size();
  const int64_t* handle = column("handles", handles, num_rows);
  const bool* lease = column("is_lease", is_lease, num_rows);
  const int32_t* start = column("starts", starts, num_rows);
  const int32_t* count = column("counts", counts, num_rows);
  int64_t* slots = buffer<int64_t>("out", out, {out.size()});
  py::gil_scoped_release unlocked;
  tree.write_slots(handle, lease, start, count, num_rows, slots, out.size());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ parts of tts_engine; use them through their Python faces (tts_engine.kv.tree).";

  py::class_<KVTree>(module, "KVTree")
      .def(py::init<int64_t, int64_t>(), py::arg("num_blocks"), py::arg("block_size"))
      .def("find", &KVTree::find, py::arg("parent"), py::arg("tokens"))
      .def("insert", &KVTree::insert, py::arg("parent"), py::arg("tokens"))
      .def("hold", &KVTree::hold, py::arg("node"))
      .def("drop", &KVTree::drop, py::arg("node"))
      .def("set_computed", &KVTree::set_computed, py::arg("node"), py::arg("num_tokens"))
      .def("computed", &KVTree::computed, py::arg("node"))
      .def("num_tokens", &KVTree::num_tokens, py::arg("node"))
      .def("parent", &KVTree::parent, py::arg("node"))
      .def("path_len", &KVTree::path_len, py::arg("node"))
      .def("lease", &KVTree::lease, py::arg("parent"))
      .def("extend", &KVTree::extend, py::arg("lease"), py::arg("num_tokens"))
      .def("extend_many", extend_many, py::arg("leases").noconvert(), py::arg("num_tokens"))
      .def("seal", &KVTree::seal, py::arg("lease"), py::arg("tokens"), py::arg("computed"))
      .def("release", &KVTree::release, py::arg("lease"))
      .def("lease_start", &KVTree::lease_start, py::arg("lease"))
      .def("evict", &KVTree::evict, py::arg("num_blocks"))
      .def("evict_all", &KVTree::evict_all)
      .def("counts",
           [](const KVTree& tree) {
             const tts::Counts now = tree.counts();
             return py::make_tuple(now.free, now.filling, now.pinned, now.idle);
           })
      .def("check", &KVTree::check)
      .def("context_slots", context_slots, py::arg("handles").noconvert(), py::arg("is_lease").noconvert(),
           py::arg("lens").noconvert(), py::arg("out"))
      .def("write_slots", write_slots, py::arg("handles").noconvert(), py::arg("is_lease").noconvert(),
           py::arg("starts").noconvert(), py::arg("counts").noconvert(), py::arg("out"))
      .def_property_readonly("num_blocks", &KVTree::num_blocks)
      .def_property_readonly("block_size", &KVTree::block_size);
}
