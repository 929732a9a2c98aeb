// What torch asks of a device: allocators, the guard over streams and events, hooks.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <cstring>

#include "checks.h"

namespace sim {

namespace {

using at::DeviceType;

constexpr DeviceType TYPE = DeviceType::PrivateUse1;

Runtime& runtime() { return Runtime::get(); }

at::Device only_device() { return at::Device(TYPE, 0); }

// -- memory ---------------------------------------------------------------------------------------

void free_device(void* start) {
  Clocked clocked;
  std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  runtime().release(reinterpret_cast<Address>(start));
}

struct DeviceMemory final : c10::DeviceAllocator {
  at::DataPtr allocate(size_t nbytes) override {
    void* start = nullptr;
    checked([&] { start = reinterpret_cast<void*>(runtime().allocate(nbytes)); });
    return {start, start, &free_device, only_device()};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free_device; }
  void copy_data(void* target, const void* source, size_t count) const override {
    memcpy(runtime().bytes_at(reinterpret_cast<Address>(target)),
           runtime().bytes_at(reinterpret_cast<Address>(source)), count);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    checked([] { runtime().empty_cache(); });
  }
  void recordStream(const at::DataPtr& pointer, c10::Stream stream) override {
    Clocked clocked;
    std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
    runtime().record_stream(reinterpret_cast<Address>(pointer.get()), stream.id());
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto set = [](auto& array, size_t now, size_t peak) {
      array[0].current = static_cast<int64_t>(now);
      array[0].peak = static_cast<int64_t>(peak);
    };
    set(stats.allocated_bytes, runtime().allocated, runtime().peak_allocated);
    set(stats.active_bytes, runtime().allocated, runtime().peak_allocated);
    set(stats.requested_bytes, runtime().allocated, runtime().peak_allocated);
    set(stats.reserved_bytes, runtime().reserved, runtime().peak_reserved);
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {
    runtime().peak_allocated = runtime().allocated;
    runtime().peak_reserved = runtime().reserved;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    size_t limit = runtime().limit, reserved = runtime().reserved;
    return {limit > reserved ? limit - reserved : 0, limit};
  }
};

DeviceMemory device_memory;
REGISTER_ALLOCATOR(TYPE, &device_memory);

void free_pinned(void* start) {
  Clocked clocked;
  std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  runtime().release_pinned(start);
}

struct PinnedMemory final : at::HostAllocator {
  at::DataPtr allocate(size_t nbytes) override {
    void* start = nullptr;
    checked([&] { start = runtime().allocate_pinned(nbytes); });
    return {start, start, &free_pinned, at::Device(DeviceType::CPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* target, const void* source, size_t count) const override {
    memcpy(target, source, count);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedMemory pinned_memory;
REGISTER_HOST_ALLOCATOR(TYPE, &pinned_memory)

// -- streams and events ---------------------------------------------------------------------------

c10::Stream stream_of(StreamId id) { return c10::Stream(c10::Stream::UNSAFE, only_device(), id); }

Event& event_at(void* event) { return *static_cast<Event*>(event); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return TYPE; }
  at::Device exchangeDevice(at::Device) const override { return only_device(); }
  at::Device getDevice() const override { return only_device(); }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(at::Device) const override { return stream_of(runtime().current_stream()); }
  c10::Stream getDefaultStream(at::Device) const override { return stream_of(0); }
  c10::Stream getStreamFromGlobalPool(at::Device, bool) const override {
    return stream_of(runtime().new_stream());
  }
  c10::Stream getNewStream(at::Device, int) const override { return stream_of(runtime().new_stream()); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(runtime().exchange_stream(stream.id()));
  }
  bool queryStream(const c10::Stream& stream) const override {
    bool idle = false;
    checked([&] { idle = runtime().idle(stream.id()); });
    return idle;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    checked([&] { runtime().finish_stream(stream.id()); });
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    checked([] { runtime().finish_device(); });
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag)
      const override {
    if (!*event) *event = new Event();
    checked([&] { runtime().record(event_at(*event), stream.id()); });
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) checked([&] { runtime().wait(event_at(event), stream.id()); });
  }
  bool queryEvent(void* event) const override {
    bool done = true;
    if (event) checked([&] { done = runtime().is_done(event_at(event)); });
    return done;
  }
  void synchronizeEvent(void* event) const override {
    if (event) checked([&] { runtime().finish_event(event_at(event)); });
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    return (event_at(end).seconds - event_at(begin).seconds) * 1e3;
  }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override {
    device_memory.recordStream(pointer, stream);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// -- hooks ----------------------------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return only_device(); }
  bool isPinnedPtr(const void* address) const override { return runtime().is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    auto* held = storage.unsafeGetStorageImpl();
    at::DataPtr fresh = device_memory.allocate(nbytes);
    size_t kept = std::min(nbytes, held->nbytes());
    if (kept) {
      Range from{reinterpret_cast<Address>(held->data_ptr().get()), kept};
      Range to{reinterpret_cast<Address>(fresh.get()), kept};
      checked([&] {
        runtime().launch(Engine::on_device, kept, {from, to}, [from, to] {
          memcpy(runtime().bytes_at(to.start), runtime().bytes_at(from.start), to.nbytes);
        });
      });
    }
    held->set_data_ptr_noswap(std::move(fresh));
    held->set_nbytes(nbytes);
  }
};

struct RegisterHooks {
  RegisterHooks() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
} register_hooks;

}  // namespace

}  // namespace sim
