// greenmim_kernels._partition: planning over NumPy arrays. The interpreter lock is released while
// the work is done, so that loader threads plan side by side.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
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

// visible: [H, W] or [P, H, W]. Returns token_index [P, G, S], window_id [P, G, S],
// coords [P, G, S, 2] and the number of tokens; 0 stands for None in group_size and capacity.
py::tuple group_partition(const py::array_t<bool, py::array::c_style>& visible,
                          int32_t window_rows, int32_t window_columns, int32_t shift_rows,
                          int32_t shift_columns, int64_t group_size, int64_t capacity) {
  const py::ssize_t dims = visible.ndim();
  const int64_t images = dims == 3 ? visible.shape(0) : 1;
  const Axis rows{static_cast<int32_t>(visible.shape(dims - 2)), window_rows, shift_rows};
  const Axis columns{static_cast<int32_t>(visible.shape(dims - 1)), window_columns, shift_columns};
  const auto* data = reinterpret_cast<const uint8_t*>(visible.data());

  const Grouping grouping = [&] {
    py::gil_scoped_release release;
    return Grouping(data, images, rows, columns, group_size, capacity);
  }();
  const py::ssize_t groups = grouping.num_groups();
  const py::ssize_t slots = grouping.group_size();
  py::array_t<int32_t> token_index({static_cast<py::ssize_t>(images), groups, slots});
  py::array_t<int32_t> window_id({static_cast<py::ssize_t>(images), groups, slots});
  py::array_t<int32_t> coords({static_cast<py::ssize_t>(images), groups, slots, py::ssize_t{2}});
  int32_t* token_index_data = token_index.mutable_data();
  int32_t* window_id_data = window_id.mutable_data();
  int32_t* coords_data = coords.mutable_data();
  {
    py::gil_scoped_release release;
    grouping.fill(token_index_data, window_id_data, coords_data);
  }
  return py::make_tuple(token_index, window_id, coords, grouping.num_tokens());
}

}  // namespace
}  // namespace greenmim

PYBIND11_MODULE(_partition, module) {
  module.doc() = "Planning of group partitions; use greenmim_kernels.partition.";
  module.def("pack_windows", &greenmim::pack_windows, py::arg("counts"), py::arg("group_size"));
  module.def("group_partition", &greenmim::group_partition, py::arg("visible"),
             py::arg("window_rows"), py::arg("window_columns"), py::arg("shift_rows"),
             py::arg("shift_columns"), py::arg("group_size"), py::arg("capacity"));
  module.def("fixed_group_size", &greenmim::fixed_group_size, py::arg("window_area"),
             py::arg("num_tokens"));
  module.def("group_cost", &greenmim::group_cost, py::arg("group_size"));
}
