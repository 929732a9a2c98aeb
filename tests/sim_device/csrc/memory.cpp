// Device memory: a region that traps the host, blocks with per-stream free lists, pinned host memory.
#include "runtime.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace sim {

namespace {

constexpr size_t SPACE = size_t(1) << 36;  // bytes of device address space
constexpr size_t PAGE = 4096;
constexpr size_t ROUND = 512;  // as torch's caching allocator rounds

Address region_start = 0;
struct sigaction previous_handler;

// Opens the page, so that the host reads poison and its writes are lost, and notes the access. The next
// operation of the device raises: an access by the host must not end the whole test run.
void on_fault(int number, siginfo_t* info, void* context) {
  Address address = reinterpret_cast<Address>(info->si_addr);
  if (region_start && address >= region_start && address < region_start + SPACE) {
    Runtime::get().note_trap(address);
    return;
  }
  if (previous_handler.sa_flags & SA_SIGINFO) {
    previous_handler.sa_sigaction(number, info, context);
  } else if (previous_handler.sa_handler != SIG_DFL && previous_handler.sa_handler != SIG_IGN) {
    previous_handler.sa_handler(number);
  } else {
    signal(number, SIG_DFL);
  }
}

struct Trap {
  Address address;
};
constexpr size_t MOST_TRAPS = 64;
Trap traps[MOST_TRAPS];  // a signal handler may not allocate
std::atomic<size_t> trap_count{0};

void* map(size_t nbytes, int protection) {
  void* got = mmap(nullptr, nbytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) throw Error("the simulated device got no address space");
  return got;
}

std::string hex(Address address) {
  std::ostringstream text;
  text << "0x" << std::hex << address;
  return text.str();
}

}  // namespace

Runtime& Runtime::get() {
  static Runtime* runtime = new Runtime();  // never freed: tensors outlive static destructors
  return *runtime;
}

Runtime::Runtime() : limit(SPACE / 2) {
  base_ = region_start = reinterpret_cast<Address>(map(SPACE, PROT_NONE));
  bytes_ = static_cast<unsigned char*>(map(SPACE, PROT_READ | PROT_WRITE));
  unmapped_[base_ + PAGE] = SPACE - PAGE;
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous_handler);
}

bool Runtime::owns(Address address) const { return address >= base_ && address < base_ + SPACE; }

unsigned char* Runtime::bytes_at(Address address) {
  return owns(address) ? bytes_ + (address - base_) : reinterpret_cast<unsigned char*>(address);
}

Block* Runtime::block_of(Address address) {
  auto found = blocks_.upper_bound(address);
  if (found == blocks_.begin()) return nullptr;
  --found;
  Block& block = found->second;
  return address < block.start + block.size ? &block : nullptr;
}

void Runtime::require_usable(const Range& range) {
  if (!range.nbytes || !range.on_device) return;
  Block* block = block_of(range.start);
  if (!block || !block->live || range.start + range.nbytes > block->start + block->size) {
    throw Error("illegal memory access on the simulated device: " + std::to_string(range.nbytes) +
                " bytes at " + hex(range.start) + " are " +
                (block && !block->live ? "freed" : "not in one allocation"));
  }
  if (asleep_.count(block->pool)) {
    throw Error("illegal memory access on the simulated device: " + hex(range.start) + " is in the pool '" +
                block->pool + "', which is asleep");
  }
}

bool Runtime::is_live(Address address, size_t nbytes) {
  Block* block = block_of(address);
  return block && block->live && address + nbytes <= block->start + block->size;
}

// -- allocation -----------------------------------------------------------------------------------

Address Runtime::allocate(size_t nbytes) {
  if (!nbytes) return 0;
  size_t size = (nbytes + ROUND - 1) / ROUND * ROUND;
  StreamId stream = current_stream();
  finish_frees(false);
  auto take = [&]() -> Address {
    for (auto& [key, list] : free_) {
      if (key.first != stream || key.second != size) continue;
      for (auto place = list.rbegin(); place != list.rend(); ++place) {
        if (blocks_[*place].pool != pool_) continue;
        Address start = *place;
        list.erase(std::next(place).base());
        return start;
      }
    }
    return 0;
  };
  Address start = take();
  if (!start && reserved + size > limit) {
    finish_frees(true);
    if (!(start = take())) release_cached();
  }
  if (!start) {
    if (reserved + size > limit) {
      std::ostringstream text;
      text << "sim out of memory. Tried to allocate " << size << " bytes. " << limit << " bytes are there, "
           << allocated << " are allocated and " << reserved - allocated << " reserved beside them.";
      throw OutOfMemory(text.str());
    }
    start = carve(size);
  }
  Block& block = blocks_[start];
  block.live = true;
  block.used_on.clear();
  allocated += size;
  peak_allocated = std::max(peak_allocated, allocated);
  return start;
}

Address Runtime::carve(size_t size) {
  for (auto found = unmapped_.begin(); found != unmapped_.end(); ++found) {
    if (found->second < size) continue;
    Address start = found->first;
    size_t left = found->second - size;
    unmapped_.erase(found);
    if (left) unmapped_[start + size] = left;
    Block block;
    block.start = start;
    block.size = size;
    block.stream = current_stream();
    block.pool = pool_;
    blocks_[start] = block;
    memset(bytes_at(start), POISON, size);
    reserved += size;
    peak_reserved = std::max(peak_reserved, reserved);
    counters.segments++;
    return start;
  }
  throw OutOfMemory("sim out of memory: no device addresses are left");
}

void Runtime::release(Address start) {
  auto found = blocks_.find(start);
  if (found == blocks_.end()) return;
  Block& block = found->second;
  block.live = false;
  allocated -= block.size;
  if (block.used_on.empty()) {
    to_free_list(block);
    return;
  }
  PendingFree pending{start, {}};
  for (StreamId stream : block.used_on) pending.after.emplace_back(stream, streams_[stream].queued);
  pending_.push_back(pending);
}

// The block may be had again at once by its own stream. Poison is written in that stream's order: at once,
// unless queued work of it still reads the block.
void Runtime::to_free_list(Block& block) {
  Range range{block.start, block.size};
  if (touched_by_queue(block.stream, range)) {
    unsigned char* bytes = bytes_at(block.start);
    size_t size = block.size;
    enqueue(block.stream, Item{[bytes, size] { memset(bytes, POISON, size); }, {range}});
  } else {
    memset(bytes_at(block.start), POISON, block.size);
  }
  free_[{block.stream, block.size}].push_back(block.start);
}

void Runtime::record_stream(Address address, StreamId stream) {
  Block* block = block_of(address);
  if (block && stream != block->stream) block->used_on.insert(stream);
}

void Runtime::finish_frees(bool wait) {
  std::vector<PendingFree> still;
  for (auto& pending : pending_) {
    bool over = true;
    for (auto [stream, place] : pending.after) {
      if (wait) run_until(stream, place);
      over &= streams_[stream].done >= place;
    }
    if (over) {
      to_free_list(blocks_[pending.start]);
    } else {
      still.push_back(pending);
    }
  }
  pending_ = still;
}

// Giving memory back to the driver waits for the device, as cudaFree does.
void Runtime::release_cached() {
  for (auto& [id, stream] : streams_) run_until(id, stream.queued);
  finish_frees(true);
  for (auto& [key, list] : free_) {
    for (Address start : list) unmap(blocks_.find(start));
  }
  free_.clear();
}

void Runtime::unmap(std::map<Address, Block>::iterator found) {
  Address start = found->second.start;
  size_t size = found->second.size;
  reserved -= size;
  blocks_.erase(found);
  auto next = unmapped_.lower_bound(start);
  if (next != unmapped_.end() && next->first == start + size) {
    size += next->second;
    next = unmapped_.erase(next);
  }
  if (next != unmapped_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == start) {
      before->second += size;
      return;
    }
  }
  unmapped_[start] = size;
}

void Runtime::empty_cache() { release_cached(); }

// -- pools that sleep -----------------------------------------------------------------------------

void Runtime::open_pool(std::string tag) { pool_ = std::move(tag); }

void Runtime::discard(const std::string& tag) {
  finish_device();
  for (auto& [start, block] : blocks_) {
    if (block.pool == tag) memset(bytes_at(start), POISON, block.size);
  }
}

void Runtime::set_asleep(const std::string& tag, bool asleep) {
  if (asleep) {
    asleep_.insert(tag);
  } else {
    asleep_.erase(tag);
  }
}

// -- pinned host memory ---------------------------------------------------------------------------

void* Runtime::allocate_pinned(size_t nbytes) {
  if (!nbytes) return nullptr;
  if (pinned + nbytes > pinned_limit) throw OutOfMemory("no host memory to pin");
  void* start = aligned_alloc(PAGE, (nbytes + PAGE - 1) / PAGE * PAGE);
  if (!start) throw OutOfMemory("no host memory to pin");
  pinned_[reinterpret_cast<Address>(start)] = nbytes;
  pinned += nbytes;
  peak_pinned = std::max(peak_pinned, pinned);
  return start;
}

// Queued copies may still read it: as torch's caching host allocator does, it lives until they are done.
void Runtime::release_pinned(void* start) {
  Address address = reinterpret_cast<Address>(start);
  auto found = pinned_.find(address);
  if (found == pinned_.end()) return;
  pinned -= found->second;
  dying_pinned_[address] = found->second;
  pinned_.erase(found);
  for (auto dying = dying_pinned_.begin(); dying != dying_pinned_.end();) {
    bool used = false;
    for (auto& [id, stream] : streams_) used |= touched_by_queue(id, {dying->first, dying->second, false});
    if (used) {
      ++dying;
    } else {
      free(reinterpret_cast<void*>(dying->first));
      dying = dying_pinned_.erase(dying);
    }
  }
}

bool Runtime::is_pinned(const void* address) {
  auto found = pinned_.upper_bound(reinterpret_cast<Address>(address));
  if (found == pinned_.begin()) return false;
  --found;
  return reinterpret_cast<Address>(address) < found->first + found->second;
}

// -- traps ----------------------------------------------------------------------------------------

void Runtime::note_trap(Address address) {
  if (trap_count < MOST_TRAPS) traps[trap_count].address = address;
  ++trap_count;
  Address page = address / PAGE * PAGE;
  mprotect(reinterpret_cast<void*>(page), PAGE, PROT_READ | PROT_WRITE);
  memset(reinterpret_cast<void*>(page), POISON, PAGE);
}

std::vector<std::string> Runtime::take_traps() {
  std::vector<std::string> texts;
  for (size_t place = 0; place < std::min<size_t>(trap_count, MOST_TRAPS); ++place) {
    texts.push_back("the host touched device memory at " + hex(traps[place].address));
    Address page = traps[place].address / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(page), PAGE, MADV_DONTNEED);
    mprotect(reinterpret_cast<void*>(page), PAGE, PROT_NONE);
  }
  trap_count = 0;
  return texts;
}

void Runtime::raise_traps() {
  if (!trap_count) return;
  auto texts = take_traps();
  throw Error("illegal host access: " + texts.front() +
              (texts.size() > 1 ? " and " + std::to_string(texts.size() - 1) + " more pages" : ""));
}

}  // namespace sim
