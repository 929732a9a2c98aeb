// A device that exists in software: memory, streams, events and a clock, without torch.
//
// Device addresses lie in a reserved region that the host may not touch; the bytes of address `a` are kept at
// `bytes_at(a)`. Work is queued and runs only when somebody waits for it, so a missing wait gives wrong bytes
// every time. One process, one device; a lock makes it safe for several threads.
#pragma once

#include <pthread.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sim {

using Address = uintptr_t;
using StreamId = int64_t;

constexpr unsigned char POISON = 0xFF;  // NaN in every float type, -1 in every integer type

struct Range {
  Address start = 0;
  size_t nbytes = 0;
  bool on_device = true;
  bool meets(const Range& other) const {
    return start < other.start + other.nbytes && other.start < start + nbytes;
  }
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Block {
  Address start = 0;
  size_t size = 0;
  StreamId stream = 0;
  bool live = true;
  std::set<StreamId> used_on;  // beside `stream`, by record_stream
  std::string pool;            // tag of the pool that was open when it was made
};

struct Event {
  StreamId stream = 0;
  uint64_t place = 0;  // in the queue of that stream; 0: never recorded
  double seconds = 0;  // of the virtual clock
};

struct Item {
  std::function<void()> run;
  std::vector<Range> touches;
  StreamId waits_for = -1;  // a stream, up to `place`
  uint64_t place = 0;
};

struct Stream {
  std::deque<Item> queue;
  uint64_t done = 0, queued = 0;  // items that ran, and that were ever put into the queue
  double seconds = 0;             // when its last item is over
};

// What is counted. Bytes are those of the payload.
struct Counters {
  int64_t launches = 0, synchronizations = 0, event_waits = 0, segments = 0;
  int64_t copies_to_device = 0, copies_to_host = 0, copies_on_device = 0;
  int64_t bytes_to_device = 0, bytes_to_host = 0, bytes_on_device = 0;
  int64_t fallbacks = 0;
};

enum class Engine { kernel, to_device, to_device_pageable, to_host, on_device };

class Runtime {
 public:
  static Runtime& get();

  // -- memory
  Address allocate(size_t nbytes);
  void release(Address start);
  void record_stream(Address address, StreamId stream);
  void empty_cache();
  unsigned char* bytes_at(Address address);
  bool owns(Address address) const;
  void require_usable(const Range& range);  // Error: freed, out of bounds, or asleep
  bool is_live(Address address, size_t nbytes);
  void* allocate_pinned(size_t nbytes);
  void release_pinned(void* start);
  bool is_pinned(const void* address);

  // -- streams
  StreamId current_stream() const;
  StreamId exchange_stream(StreamId stream);
  StreamId new_stream();
  void launch(Engine engine, size_t payload, std::vector<Range> touches, std::function<void()> run);
  void finish_stream(StreamId stream);    // runs all of it: a wait of the host, which is counted
  void drain(StreamId stream);            // the same, not counted: a wait inside of an operation
  void finish_device();
  void record(Event& event, StreamId stream);
  void wait(const Event& event, StreamId stream);
  bool is_done(const Event& event);
  void finish_event(const Event& event);
  bool idle(StreamId stream);
  void charge(Engine engine, size_t payload);  // of an operation that runs at once on the drained stream

  // -- what tests set and ask
  void set_limit(size_t nbytes);
  void set_order(int64_t seed);  // negative: nothing runs before it is waited for
  void set_timing(bool measured, bool moves, double scale);
  void advance(double seconds);  // the host worked so long
  void reset();                  // counters, peaks and the clock
  void open_pool(std::string tag);
  void discard(const std::string& tag);
  void set_asleep(const std::string& tag, bool asleep);
  std::vector<std::string> take_traps();
  void raise_traps();
  void note_trap(Address address);
  void poll();  // in a random order, lets some queued work run

  std::recursive_mutex mutex;
  Counters counters;
  size_t allocated = 0, reserved = 0, peak_allocated = 0, peak_reserved = 0, limit;
  size_t pinned = 0, peak_pinned = 0, pinned_limit = size_t(1) << 40;
  double host_seconds = 0;
  double measured_seconds = 0;  // of the thread that set the timing, outside of the device's own calls
  bool moves = true;            // whether queued copies and fills change bytes

 private:
  friend class Clocked;
  Runtime();
  Block* block_of(Address address);
  Address carve(size_t size);
  void unmap(std::map<Address, Block>::iterator found);
  void to_free_list(Block& block);
  void finish_frees(bool wait);
  void release_cached();
  bool touched_by_queue(StreamId stream, const Range& range);
  void run_until(StreamId stream, uint64_t place);
  void enqueue(StreamId stream, Item item);
  void set_protection(Address page, bool open);

  struct PendingFree {
    Address start;
    std::vector<std::pair<StreamId, uint64_t>> after;
  };
  Address base_ = 0;
  unsigned char* bytes_ = nullptr;
  std::map<Address, Block> blocks_;
  std::map<std::pair<StreamId, size_t>, std::vector<Address>> free_;
  std::map<Address, size_t> unmapped_;
  std::vector<PendingFree> pending_;
  std::map<Address, size_t> pinned_;
  std::map<Address, size_t> dying_pinned_;
  std::map<StreamId, Stream> streams_;
  std::array<double, 5> engine_seconds_{};
  std::set<std::string> asleep_;
  std::string pool_;
  StreamId last_stream_ = 0;
  bool random_ = false, running_ = false;
  bool measured_ = false;
  pthread_t timed_ = 0;
  double left_ = 0, scale_ = 1;  // when the device's own calls were last left; what payloads count for
  std::mt19937_64 rng_;
};

// Around each call of the device. Where the timing is measured, the processor's time of the calling thread since
// the last one counts for the host, and that within does not: the simulation costs what a device does not.
class Clocked {
 public:
  Clocked();
  ~Clocked();

 private:
  bool outermost_;
};

// Holds the lock, lets random orders happen, and raises what the host did to device memory.
class Entry {
 public:
  explicit Entry(bool raises = true) : lock_(Runtime::get().mutex) {
    if (raises) Runtime::get().raise_traps();
    Runtime::get().poll();
  }

 private:
  Clocked clocked_;
  std::lock_guard<std::recursive_mutex> lock_;
};

}  // namespace sim
