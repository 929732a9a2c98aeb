// Streams are queues that run when somebody waits; events are places in them; the clock is virtual.
#include "runtime.h"

#include <time.h>

#include <algorithm>

namespace sim {

namespace {

// Seconds, and bytes a second: published rates of an H200 with PCIe 5.
constexpr double LAUNCH = 5e-6, SYNCHRONIZE = 20e-6;
constexpr double BUS = 55e9, BUS_PAGEABLE = 9.7e9, MEMORY = 2.2e12;

double rate_of(Engine engine) {
  switch (engine) {
    case Engine::to_device:
    case Engine::to_host:
      return BUS;
    case Engine::to_device_pageable:
      return BUS_PAGEABLE;
    default:
      return MEMORY;
  }
}

thread_local StreamId current = 0;
thread_local int inside = 0;

double processor_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

}  // namespace

Clocked::Clocked() : outermost_(!inside++) {
  Runtime& runtime = Runtime::get();
  if (!outermost_ || !runtime.measured_ || !pthread_equal(pthread_self(), runtime.timed_)) return;
  double spent = processor_seconds() - runtime.left_;
  std::lock_guard<std::recursive_mutex> lock(runtime.mutex);
  runtime.host_seconds += spent;
  runtime.measured_seconds += spent;
}

Clocked::~Clocked() {
  --inside;
  Runtime& runtime = Runtime::get();
  if (outermost_ && runtime.measured_ && pthread_equal(pthread_self(), runtime.timed_)) {
    runtime.left_ = processor_seconds();
  }
}

void Runtime::set_timing(bool measured, bool moves_bytes, double scale) {
  measured_ = measured;
  moves = moves_bytes;
  scale_ = scale;
  timed_ = pthread_self();
  left_ = processor_seconds();
}

void Runtime::advance(double seconds) { host_seconds += seconds; }

StreamId Runtime::current_stream() const { return current; }

StreamId Runtime::exchange_stream(StreamId stream) { return std::exchange(current, stream); }

StreamId Runtime::new_stream() { return ++last_stream_; }

void Runtime::enqueue(StreamId id, Item item) {
  Stream& stream = streams_[id];
  stream.queue.push_back(std::move(item));
  stream.queued++;
}

void Runtime::launch(Engine engine, size_t payload, std::vector<Range> touches, std::function<void()> run) {
  for (auto& range : touches) require_usable(range);
  charge(engine, payload);
  enqueue(current, Item{moves ? std::move(run) : nullptr, std::move(touches)});
}

// The host spends a launch; the engine begins when stream and engine are free.
void Runtime::charge(Engine engine, size_t payload) {
  counters.launches++;
  host_seconds += LAUNCH;
  size_t number = static_cast<size_t>(engine == Engine::to_device_pageable ? Engine::to_device : engine);
  Stream& stream = streams_[current];
  double begins = std::max({stream.seconds, engine_seconds_[number], host_seconds});
  stream.seconds = engine_seconds_[number] = begins + double(payload) * scale_ / rate_of(engine);
  switch (engine) {
    case Engine::to_device:
    case Engine::to_device_pageable:
      counters.copies_to_device++;
      counters.bytes_to_device += payload;
      break;
    case Engine::to_host:
      counters.copies_to_host++;
      counters.bytes_to_host += payload;
      break;
    case Engine::on_device:
      counters.copies_on_device++;
      counters.bytes_on_device += payload;
      break;
    case Engine::kernel:
      break;
  }
}

bool Runtime::touched_by_queue(StreamId id, const Range& range) {
  auto found = streams_.find(id);
  if (found == streams_.end()) return false;
  for (auto& item : found->second.queue) {
    for (auto& touched : item.touches) {
      if (touched.meets(range)) return true;
    }
  }
  return false;
}

void Runtime::run_until(StreamId id, uint64_t place) {
  while (streams_[id].done < place && !streams_[id].queue.empty()) {
    Item item = std::move(streams_[id].queue.front());
    streams_[id].queue.pop_front();
    if (item.waits_for >= 0) run_until(item.waits_for, item.place);
    if (item.run) item.run();
    streams_[id].done++;
  }
}

void Runtime::drain(StreamId id) { run_until(id, streams_[id].queued); }

void Runtime::finish_stream(StreamId id) {
  drain(id);
  counters.synchronizations++;
  host_seconds = std::max(host_seconds, streams_[id].seconds) + SYNCHRONIZE;
}

void Runtime::finish_device() {
  for (bool more = true; more;) {
    more = false;
    for (auto& [id, stream] : streams_) {
      more |= !stream.queue.empty();
      run_until(id, stream.queued);
      host_seconds = std::max(host_seconds, stream.seconds);
    }
  }
  counters.synchronizations++;
  host_seconds += SYNCHRONIZE;
}

void Runtime::record(Event& event, StreamId id) {
  enqueue(id, Item{});
  event.stream = id;
  event.place = streams_[id].queued;
  event.seconds = streams_[id].seconds = std::max(streams_[id].seconds, host_seconds);
}

void Runtime::wait(const Event& event, StreamId id) {
  if (!event.place || event.stream == id) return;
  counters.event_waits++;
  Item item;
  item.waits_for = event.stream;
  item.place = event.place;
  enqueue(id, std::move(item));
  streams_[id].seconds = std::max(streams_[id].seconds, event.seconds);
}

bool Runtime::is_done(const Event& event) {
  if (measured_ && event.seconds <= host_seconds) run_until(event.stream, event.place);
  return streams_[event.stream].done >= event.place;
}

void Runtime::finish_event(const Event& event) {
  run_until(event.stream, event.place);
  counters.synchronizations++;
  host_seconds = std::max(host_seconds, event.seconds) + SYNCHRONIZE;
}

bool Runtime::idle(StreamId id) { return streams_[id].queue.empty(); }

void Runtime::poll() {
  if (!random_ || running_ || streams_.empty()) return;
  running_ = true;
  std::vector<StreamId> ids;
  for (auto& [id, stream] : streams_) {
    if (!stream.queue.empty()) ids.push_back(id);
  }
  if (!ids.empty() && rng_() % 2) {
    StreamId id = ids[rng_() % ids.size()];
    run_until(id, streams_[id].done + 1 + rng_() % streams_[id].queue.size());
  }
  running_ = false;
}

void Runtime::set_limit(size_t nbytes) { limit = nbytes; }

void Runtime::set_order(int64_t seed) {
  random_ = seed >= 0;
  if (random_) rng_.seed(seed);
}

void Runtime::reset() {
  counters = Counters();
  peak_allocated = allocated;
  peak_reserved = reserved;
  peak_pinned = pinned;
  host_seconds = measured_seconds = 0;
  left_ = processor_seconds();
  engine_seconds_ = {};
  for (auto& [id, stream] : streams_) stream.seconds = 0;
}

}  // namespace sim
