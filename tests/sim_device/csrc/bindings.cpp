// What tests set and ask, as a Python module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime.h"

namespace py = pybind11;

using sim::Runtime;

namespace {

Runtime& runtime() { return Runtime::get(); }

std::lock_guard<std::recursive_mutex> locked() { return std::lock_guard<std::recursive_mutex>(runtime().mutex); }

std::map<std::string, double> counters() {
  sim::Clocked clocked;
  auto lock = locked();
  const auto& c = runtime().counters;
  return {
      {"launches", c.launches},
      {"synchronizations", c.synchronizations},
      {"event_waits", c.event_waits},
      {"segments", c.segments},
      {"copies_to_device", c.copies_to_device},
      {"copies_to_host", c.copies_to_host},
      {"copies_on_device", c.copies_on_device},
      {"bytes_to_device", c.bytes_to_device},
      {"bytes_to_host", c.bytes_to_host},
      {"bytes_on_device", c.bytes_on_device},
      {"fallbacks", c.fallbacks},
      {"allocated", runtime().allocated},
      {"reserved", runtime().reserved},
      {"peak_allocated", runtime().peak_allocated},
      {"peak_reserved", runtime().peak_reserved},
      {"pinned", runtime().pinned},
      {"peak_pinned", runtime().peak_pinned},
      {"limit", runtime().limit},
      {"host_seconds", runtime().host_seconds},
      {"measured_seconds", runtime().measured_seconds},
  };
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("counters", &counters);
  module.def("reset", [] { auto lock = locked(); runtime().reset(); });
  module.def("set_limit", [](size_t nbytes) { auto lock = locked(); runtime().set_limit(nbytes); });
  module.def("set_order", [](int64_t seed) { auto lock = locked(); runtime().set_order(seed); });
  module.def("set_timing", [](bool measured, bool moves, double scale) {
    auto lock = locked();
    runtime().set_timing(measured, moves, scale);
  });
  module.def("event_seconds", [](int64_t id) { auto lock = locked(); return reinterpret_cast<sim::Event*>(id)->seconds; });
  module.def("wait_until", [](double seconds) {
    sim::Clocked clocked;
    auto lock = locked();
    runtime().advance(std::max(0.0, seconds - runtime().host_seconds));
    return runtime().host_seconds;
  });
  module.def("advance", [](double seconds) {
    sim::Clocked clocked;
    auto lock = locked();
    runtime().advance(seconds);
  });
  module.def("set_pinned_limit", [](size_t nbytes) { auto lock = locked(); runtime().pinned_limit = nbytes; });
  module.def("synchronize", [] { auto lock = locked(); runtime().finish_device(); });
  module.def("empty_cache", [] { auto lock = locked(); runtime().empty_cache(); });
  module.def("current_stream", [] { return runtime().current_stream(); });
  module.def("take_traps", [] { auto lock = locked(); return runtime().take_traps(); });
  module.def("is_live", [](sim::Address at, size_t nbytes) { auto lock = locked(); return runtime().is_live(at, nbytes); });
  module.def("open_pool", [](std::string tag) { auto lock = locked(); runtime().open_pool(tag); });
  module.def("discard", [](std::string tag) { auto lock = locked(); runtime().discard(tag); });
  module.def("set_asleep", [](std::string tag, bool asleep) { auto lock = locked(); runtime().set_asleep(tag, asleep); });
}
