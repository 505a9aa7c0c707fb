// greenmim_kernels._partition: planning over NumPy arrays. The interpreter lock is released while
// the work is done, so that loader threads plan side by side.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "grouping.h"
#include "packing.h"

namespace py = pybind11;

namespace greenmim {
namespace {

// Steps of one call of pack_windows, at most some 0.1 s: it is called by hand, not in
// every step.
constexpr int64_t kSearchEffort = 4'000'000;

// counts: [windows], each in [1, group_size]. List of int64 index arrays, one per group.
py::list pack_windows(const py::array_t<int32_t, py::array::c_style>& counts, int64_t group_size) {
  const int32_t* data = counts.data();
  const int n = static_cast<int>(counts.size());
  std::vector<std::vector<int64_t>> groups;
  {
    py::gil_scoped_release release;
    Packer packer;
    groups.resize(packer.pack(data, n, group_size, kSearchEffort));
    for (int window = 0; window < n; ++window) {
      groups[packer.group_of()[window]].push_back(window);
    }
  }
  py::list result;
  for (const std::vector<int64_t>& group : groups) {
    result.append(py::array_t<int64_t>(static_cast<py::ssize_t>(group.size()), group.data()));
  }
  return result;
}

using Integers = py::array_t<int32_t, py::array::c_style>;

// visible: [axes] or [P, axes]; window and shift one number per axis; segment of the shape of visible,
// in [0, num_segments), or None. Returns token_index, window_id, query_row and key_row [P, G, S] and
// the number of tokens; 0 stands for None in group_size and capacity.
py::tuple group_partition(const py::array_t<bool, py::array::c_style>& visible,
                          const std::vector<int32_t>& window, const std::vector<int32_t>& shift,
                          const std::optional<Integers>& segment, int64_t num_segments,
                          int64_t group_size, int64_t capacity) {
  const py::ssize_t first = visible.ndim() - static_cast<py::ssize_t>(window.size());
  const int64_t images = first == 1 ? visible.shape(0) : 1;
  std::vector<Axis> axes;
  for (size_t i = 0; i < window.size(); ++i) {
    axes.push_back({static_cast<int32_t>(visible.shape(first + i)), window[i], shift[i]});
  }
  const auto* data = reinterpret_cast<const uint8_t*>(visible.data());
  const int32_t* segment_data = segment ? segment->data() : nullptr;

  const Grouping grouping = [&] {
    py::gil_scoped_release release;
    return Grouping(data, images, axes, segment_data, num_segments, group_size, capacity);
  }();
  const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(images), grouping.num_groups(),
                                       grouping.group_size()};
  Integers token_index(shape), window_id(shape), query_row(shape), key_row(shape);
  int32_t* token_index_data = token_index.mutable_data();
  int32_t* window_id_data = window_id.mutable_data();
  int32_t* query_row_data = query_row.mutable_data();
  int32_t* key_row_data = key_row.mutable_data();
  {
    py::gil_scoped_release release;
    grouping.fill(token_index_data, window_id_data, query_row_data, key_row_data);
  }
  return py::make_tuple(token_index, window_id, query_row, key_row, grouping.num_tokens());
}

}  // namespace
}  // namespace greenmim

PYBIND11_MODULE(_partition, module) {
  module.doc() = "Planning of group partitions; use greenmim_kernels.partition.";
  module.def("pack_windows", &greenmim::pack_windows, py::arg("counts"), py::arg("group_size"));
  module.def("group_partition", &greenmim::group_partition, py::arg("visible"), py::arg("window"),
             py::arg("shift"), py::arg("segment"), py::arg("num_segments"), py::arg("group_size"),
             py::arg("capacity"));
  module.def("fixed_group_size", &greenmim::fixed_group_size, py::arg("window_area"),
             py::arg("num_tokens"));
  module.def("group_cost", &greenmim::group_cost, py::arg("group_size"));
}
