// tts_engine._C: the only file that knows Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu_ops.h"
#include "kv_tree.h"
#include "linear.h"
#include "rows.h"
#include "sampling.h"
#include "tree_attention.h"
#include "tree_plan.h"

namespace py = pybind11;
using tts::Forest;
using tts::KVTree;
using tts::Row;
using tts::Rows;
using tts::TreePlan;

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

template <class T>
Array<T> copied(const std::vector<T>& list) {
  Array<T> array(list.size());
  std::copy(list.begin(), list.end(), array.mutable_data());
  return array;
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

py::tuple lay_out(const KVTree& tree, const Array<int64_t>& handles, const Array<bool>& is_lease, const Array<int32_t>& starts,
                  const Array<int32_t>& counts, const Array<int32_t>& path_starts) {
  const py::ssize_t num_rows = handles.size();
  const int64_t* handle = column("handles", handles, num_rows);
  const bool* lease = column("is_lease", is_lease, num_rows);
  const int32_t* start = column("starts", starts, num_rows);
  const int32_t* count = column("counts", counts, num_rows);
  const int32_t* path_start = column("path_starts", path_starts, num_rows);
  const tts::Places places = tree.lay_out(handle, lease, start, count, path_start, num_rows);
  return py::make_tuple(copied(places.row_starts), copied(places.ends), copied(places.lens), copied(places.positions),
                        copied(places.slots));
}

Forest forest(const KVTree& tree, const Array<int64_t>& handles, const Array<bool>& is_lease, const Array<int32_t>& ends) {
  const py::ssize_t num_rows = handles.size();
  const int64_t* handle = column("handles", handles, num_rows);
  const bool* lease = column("is_lease", is_lease, num_rows);
  const int32_t* end = column("ends", ends, num_rows);
  py::gil_scoped_release unlocked;
  return tree.forest(handle, lease, end, num_rows);
}

std::vector<int32_t> listed(const Array<int32_t>& array) { return {array.data(), array.data() + array.size()}; }

// Records of int32 fields as a table [records, fields].
template <class Record>
Array<int32_t> table(const std::vector<Record>& records) {
  static_assert(sizeof(Record) % sizeof(int32_t) == 0, "a record is int32 fields");
  Array<int32_t> rows({records.size(), sizeof(Record) / sizeof(int32_t)});
  std::copy_n(reinterpret_cast<const int32_t*>(records.data()), rows.size(), rows.mutable_data());
  return rows;
}

TreePlan tree_plan(const Forest& forest, const Array<int32_t>& starts, const Array<int32_t>& row_starts, int32_t max_queries,
                   int32_t split, int32_t reserve, bool compress, int32_t tile, int32_t tail_queries, int32_t tail) {
  const py::ssize_t num_rows = starts.size();
  const int32_t* start = column("starts", starts, num_rows);
  const int32_t* row_start = column("row_starts", row_starts, num_rows + 1);
  py::gil_scoped_release unlocked;
  return TreePlan(forest, start, row_start, num_rows, {max_queries, split, reserve, compress, tile, tail_queries, tail});
}

bool reserve(TreePlan& plan, const Array<int64_t>& new_slots) {
  if (new_slots.ndim() != 2) throw std::invalid_argument("new_slots must be [steps, rows]");
  return plan.reserve(new_slots.data(), new_slots.shape(0), new_slots.shape(1));
}

py::tuple follow(const Rows& rows, const std::vector<tts::Run>& runs, const std::vector<int64_t>& sources, size_t num_rows) {
  const auto [columns, reads] = rows.follow(runs, sources, num_rows);
  return py::make_tuple(copied(columns.handles), copied(columns.is_lease), copied(columns.starts), copied(columns.counts),
                        copied(columns.path_starts), copied(columns.token_ids), copied(reads.tokens), copied(reads.sources));
}

py::tuple draws(const Rows& rows, int32_t sampling, const Array<int64_t>& sources) {
  const tts::Draws found = rows.draws(sampling, column("sources", sources, sources.size()), sources.size());
  Array<uint32_t> keys({found.rows.size(), size_t{2}});
  std::copy(found.keys.begin(), found.keys.end(), keys.mutable_data());
  return py::make_tuple(copied(found.rows), copied(found.sources), keys, copied(found.identities), copied(found.positions));
}

py::tuple append(Rows& rows, const Array<int64_t>& tokens, const std::optional<Array<uint8_t>>& after, const Array<bool>& eos,
                 int32_t closed, KVTree& tree) {
  const py::ssize_t vocab = eos.size();
  if (after && (after->ndim() != 2 || after->shape(1) != vocab)) throw std::invalid_argument("after must be [states, vocabulary]");
  const tts::Rule rule{after ? after->data() : nullptr, column("eos", eos, vocab), after ? after->shape(0) : 0, vocab, closed};
  const tts::Change change = rows.append(column("tokens", tokens, tokens.size()), tokens.size(), rule, tree);
  py::list parted;
  for (const auto& [place, lease, first] : change.parted) parted.append(py::make_tuple(place, lease, first));
  return py::make_tuple(change.left, parted, table(change.copies));
}

py::tuple fork_lease(KVTree& tree, int64_t lease) {
  std::vector<tts::Move> copies;
  const int64_t forked = tree.fork(lease, copies);
  return py::make_tuple(forked, table(copies));
}

template <class T>
T* address(uintptr_t number) {
  return reinterpret_cast<T*>(number);
}

tts::Element element(bool bfloat16) { return bfloat16 ? tts::Element::kBFloat16 : tts::Element::kFloat32; }

void tree_attention(const TreePlan& plan, uintptr_t q, int64_t q_stride, uintptr_t k, uintptr_t v, uintptr_t out, int32_t num_heads,
                    int32_t num_kv_heads, int32_t head_dim, bool bfloat16, const std::string& instruction_set, int num_threads) {
  py::gil_scoped_release unlocked;
  tts::tree_attention(plan,
                      {address<const void>(q), address<const void>(k), address<const void>(v), address<void>(out), q_stride,
                       num_heads, num_kv_heads, head_dim, element(bfloat16)},
                      instruction_set, num_threads);
}

void rms_norm(uintptr_t x, int64_t x_stride, int64_t group, uintptr_t weights, int64_t weight_rows, float epsilon, uintptr_t out,
              int64_t rows, int64_t width, bool bfloat16, int num_threads) {
  py::gil_scoped_release unlocked;
  tts::rms_norm(address<const void>(x), x_stride, group, address<const void>(weights), weight_rows, epsilon, address<void>(out),
                rows, width, element(bfloat16), num_threads);
}

void rotate(uintptr_t x, int64_t x_stride, uintptr_t cos, uintptr_t sin, uintptr_t out, int64_t tokens, int64_t heads, int64_t width,
            bool bfloat16, int num_threads) {
  py::gil_scoped_release unlocked;
  tts::rotate(address<const void>(x), x_stride, address<const float>(cos), address<const float>(sin), address<void>(out), tokens,
              heads, width, element(bfloat16), num_threads);
}

void quantise_rows(uintptr_t x, uintptr_t out, uintptr_t scales, int64_t rows, int64_t width, bool bfloat16, int num_threads) {
  py::gil_scoped_release unlocked;
  tts::quantise_rows(address<const void>(x), address<uint8_t>(out), address<float>(scales), rows, width, element(bfloat16),
                     num_threads);
}

void scale_rows(uintptr_t x, uintptr_t scales, uintptr_t more, int64_t more_stride, bool more_bfloat16, uintptr_t out, int64_t rows,
                int64_t width, bool bfloat16, int num_threads) {
  py::gil_scoped_release unlocked;
  tts::scale_rows(address<const float>(x), address<const float>(scales), address<const void>(more), more_stride,
                  element(more_bfloat16), address<void>(out), rows, width, element(bfloat16), num_threads);
}

void swiglu(uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t width, bool bfloat16, int num_threads) {
  py::gil_scoped_release unlocked;
  tts::swiglu(address<const void>(gate_up), address<void>(out), rows, width, element(bfloat16), num_threads);
}

void linear(uintptr_t x, bool x_bfloat16, uintptr_t packed, bool packed_bfloat16, uintptr_t more, int64_t more_stride, uintptr_t out, bool bfloat16,
            int64_t num_tokens, int64_t rows, int64_t columns, int num_threads) {
  py::gil_scoped_release unlocked;
  tts::linear({address<const void>(x), element(x_bfloat16), address<const void>(packed), element(packed_bfloat16), address<const void>(more), more_stride,
               address<void>(out), element(bfloat16), num_tokens, rows, columns},
              num_threads);
}

void pack(uintptr_t weight, uintptr_t packed, bool bfloat16, int64_t rows, int64_t columns, int num_threads) {
  py::gil_scoped_release unlocked;
  tts::pack(address<const void>(weight), address<void>(packed), element(bfloat16), rows, columns, num_threads);
}

Array<int64_t> sample(uintptr_t logits, int64_t num_logit_rows, int32_t vocab_size, float temperature, const Array<int64_t>& rows,
                      const Array<uint32_t>& keys, const Array<uint64_t>& identities, const Array<int64_t>& positions,
                      int num_threads) {
  const py::ssize_t count = rows.size();
  const Shape got(keys.shape(), keys.shape() + keys.ndim());
  if (got != Shape{count, 2}) throw std::invalid_argument("keys must be [" + std::to_string(count) + ", 2], got " + describe(got));
  for (py::ssize_t i = 0; i < count; ++i)
    if (rows.data()[i] < 0 || rows.data()[i] >= num_logit_rows) throw std::invalid_argument("a draw's row lies beyond the logits");
  const uint64_t* identity = column("identities", identities, count);
  const int64_t* position = column("positions", positions, count);
  Array<int64_t> tokens(count);
  int64_t* token = tokens.mutable_data();
  py::gil_scoped_release unlocked;
  tts::sample({address<const float>(logits), vocab_size, temperature}, rows.data(), keys.data(), identity, position,
              count, token, num_threads);
  return tokens;
}

void store_rows(uintptr_t rows, int64_t stride, uintptr_t to, int64_t bytes, const Array<int64_t>& slots) {
  const int64_t* slot = column("slots", slots, slots.size());
  py::gil_scoped_release unlocked;
  tts::store_rows(address<const void>(rows), stride, address<void>(to), bytes, slot, slots.size());
}

void copy_blocks(const std::vector<uintptr_t>& tables, int64_t bytes, const Array<int32_t>& moves) {
  if (moves.ndim() != 2 || moves.shape(1) != 2) throw std::invalid_argument("moves must be [moves, 2]");
  for (uintptr_t table : tables)
    for (py::ssize_t i = 0; i < moves.shape(0); ++i)
      std::memcpy(address<char>(table) + moves.at(i, 1) * bytes, address<char>(table) + moves.at(i, 0) * bytes, bytes);
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
      .def("retire", &KVTree::retire, py::arg("nodes"))
      .def("num_tokens", &KVTree::num_tokens, py::arg("node"))
      .def("parent", &KVTree::parent, py::arg("node"))
      .def("path_len", &KVTree::path_len, py::arg("node"))
      .def("lease", &KVTree::lease, py::arg("parent"))
      .def("extend", &KVTree::extend, py::arg("lease"), py::arg("num_tokens"))
      .def("extend_many", extend_many, py::arg("leases").noconvert(), py::arg("num_tokens"))
      .def("seal", &KVTree::seal, py::arg("lease"), py::arg("tokens"), py::arg("computed"))
      .def("keep", &KVTree::keep, py::arg("lease"), py::arg("tokens"), py::arg("computed"))
      .def("fork", fork_lease, py::arg("lease"))
      .def("release", &KVTree::release, py::arg("lease"))
      .def("lease_start", &KVTree::lease_start, py::arg("lease"))
      .def("available", &KVTree::available)
      .def("evict", &KVTree::evict, py::arg("num_blocks"))
      .def("evict_all", &KVTree::evict_all)
      .def("resize",
           [](KVTree& tree, int64_t num_blocks) -> py::object {
             const auto moves = tree.resize(num_blocks);
             return moves ? py::object(table(*moves)) : py::none();
           },
           py::arg("num_blocks"))
      .def("has_room", &KVTree::has_room, py::arg("num_blocks"))
      .def("extent", &KVTree::extent)
      .def_property_readonly("evicted", &KVTree::evicted)
      .def_property_readonly("refused", &KVTree::refused)
      .def_property_readonly("needed", &KVTree::needed)
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
      .def("lay_out", lay_out, py::arg("handles"), py::arg("is_lease"), py::arg("starts"), py::arg("counts"), py::arg("path_starts"))
      .def("forest", forest, py::arg("handles").noconvert(), py::arg("is_lease").noconvert(), py::arg("ends").noconvert())
      .def_property_readonly("num_blocks", &KVTree::num_blocks)
      .def_property_readonly("block_size", &KVTree::block_size);

  py::class_<Forest>(module, "Forest")
      .def(py::init([](const Array<int32_t>& parent, const Array<int32_t>& first, const Array<int32_t>& len,
                       const Array<int32_t>& node, const Array<int32_t>& slots) {
             return Forest{listed(parent), listed(first), listed(len), listed(node), listed(slots)};
           }),
           py::arg("parent"), py::arg("first"), py::arg("len"), py::arg("node"), py::arg("slots"))
      .def_property_readonly("parent", [](const Forest& f) { return copied(f.parent); })
      .def_property_readonly("first", [](const Forest& f) { return copied(f.first); })
      .def_property_readonly("len", [](const Forest& f) { return copied(f.len); })
      .def_property_readonly("node", [](const Forest& f) { return copied(f.node); })
      .def_property_readonly("slots", [](const Forest& f) { return copied(f.slots); });

  py::class_<TreePlan>(module, "TreePlan")
      .def(py::init(&tree_plan), py::arg("forest"), py::arg("starts").noconvert(), py::arg("row_starts").noconvert(), py::kw_only(),
           py::arg("max_queries"), py::arg("split"), py::arg("reserve"), py::arg("compress"), py::arg("tile") = 0,
           py::arg("tail_queries") = 0, py::arg("tail") = 0)
      .def("grow",
           [](TreePlan& plan, const Array<int64_t>& new_slots) { return plan.grow(new_slots.data(), new_slots.size()); },
           py::arg("new_slots").noconvert())
      .def("reserve", reserve, py::arg("new_slots").noconvert())
      .def_property_readonly("leaf", [](const TreePlan& p) { return copied(p.leaf); })
      .def_readonly("growth", &TreePlan::growth)
      .def_property_readonly("order", [](const TreePlan& p) { return copied(p.order); })
      .def_property_readonly("slots", [](const TreePlan& p) { return copied(p.slots); })
      .def_property_readonly("segments", [](const TreePlan& p) { return table(p.segments); })
      .def_property_readonly("items", [](const TreePlan& p) { return table(p.items); })
      .def_property_readonly("item_segments", [](const TreePlan& p) { return copied(p.item_segments); })
      .def_property_readonly("merges", [](const TreePlan& p) { return table(p.merges); })
      .def_property_readonly("merge_slots", [](const TreePlan& p) { return copied(p.merge_slots); })
      .def_readonly("num_partials", &TreePlan::num_partials);

  PYBIND11_NUMPY_DTYPE(Row, lease, newest, identity, key, sampling, path_start, length, room, state);
  py::class_<Rows>(module, "Rows")
      .def(py::init<size_t>(), py::arg("most"))
      .def_property_readonly(
          "records", [](Rows& rows) { return py::array_t<Row>(rows.records().size(), rows.records().data(), py::cast(rows)); })
      .def("add",
           [](Rows& rows, size_t place, int64_t lease, uint64_t identity, std::pair<uint32_t, uint32_t> key, int32_t sampling,
              int32_t path_start, int32_t length, int32_t room, int32_t state) {
             rows.add(place, {lease, 0, identity, {key.first, key.second}, sampling, path_start, length, room, state});
           })
      .def("follow", follow, py::arg("runs"), py::arg("sources"), py::arg("num_rows"))
      .def("draws", draws, py::arg("sampling"), py::arg("sources").noconvert())
      .def("append", append, py::arg("tokens").noconvert(), py::arg("after").noconvert(), py::arg("eos").noconvert(),
           py::arg("closed"), py::arg("tree"))
      .def("leases", [](const Rows& rows, size_t num_rows) { return copied(rows.leases(num_rows)); }, py::arg("num_rows"));

  module.def("instruction_sets", &tts::instruction_sets);
  module.def("tree_attention", tree_attention, py::arg("plan"), py::arg("q"), py::arg("q_stride"), py::arg("k"), py::arg("v"),
             py::arg("out"), py::kw_only(), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
             py::arg("bfloat16"), py::arg("instruction_set"), py::arg("num_threads"));
  module.def("rms_norm", rms_norm);
  module.def("rotate", rotate);
  module.def("quantise_rows", quantise_rows);
  module.def("scale_rows", scale_rows);
  module.def("swiglu", swiglu);
  module.def("multiplies_floats", &tts::multiplies_floats);
  module.def("multiplies_pairs", &tts::multiplies_pairs);
  module.def("packed_entries", &tts::packed_entries);
  module.def("pack", pack);
  module.def("linear", linear);
  module.def("philox", &tts::philox, py::arg("counter"), py::arg("key"));
  module.def("sample", sample, py::arg("logits"), py::arg("num_logit_rows"), py::arg("vocab_size"), py::arg("temperature"),
             py::arg("rows").noconvert(), py::arg("keys").noconvert(), py::arg("identities").noconvert(),
             py::arg("positions").noconvert(), py::arg("num_threads"));
  module.def("store_rows", store_rows, py::arg("rows"), py::arg("stride"), py::arg("to"), py::arg("bytes"),
             py::arg("slots").noconvert());
  module.def("copy_blocks", copy_blocks, py::arg("tables"), py::arg("bytes"), py::arg("moves").noconvert());
}
