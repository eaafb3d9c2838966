// The part of CUDA that the kernels use, on the CPU, for tests: the same kernel sources compile as C++17 with
// TGDP_EMULATION defined.
//
// Blocks run one after the other, those of a cluster by turns. The threads of a block are fibers: each runs until it waits
// at a barrier or at an operation of its warp, in an order that tests choose. Reported as errors, whatever the order:
// - accesses to shared memory by two threads, one of them a write, without a barrier between them (all accesses go
//   through Shared<T>, which knows who touched every two bytes since the last barrier); by threads of two blocks of a
//   cluster, without a barrier of the cluster;
// - accesses to the shared memory of another block before the first barrier of the cluster, for it may not have started,
//   or when it has ended;
// - reads of shared memory that nothing has written, or that an asynchronous copy is still writing;
// - accesses outside of a shared array, or misaligned ones;
// - threads, or blocks of a cluster, that wait at different barriers, lanes at different operations of their warp, and
//   barriers that ended threads miss.
// Not seen: accesses outside of global memory (tests surround their buffers), and races in it.
#pragma once

#if !defined(TGDP_EMULATION)
#error "emulation.h stands in for CUDA: define TGDP_EMULATION"
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
// Arrays of a fixed size in shared memory: one block runs at a time. Accesses to them are not watched.
#define __shared__ static

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint3 {
  uint32_t x, y, z;
};
struct dim3 {
  dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
  uint32_t x, y, z;
};

namespace tgdp::emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order : int { forward = 0, reverse = 1, random = 2 };

// A line of the source; as a default argument, that of the caller.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line);
  }
};

// What tests choose and learn.
struct Settings {
  Order order = Order::forward;  // of threads and of blocks
  uint64_t seed = 0;
  int left_out = -1;            // number of a barrier that is left out, in the order of `barriers`
  std::vector<Place> barriers;  // those that were met so far
  int64_t bank_conflicts = 0;   // of matrices loaded for tensor cores
  // Of other accesses, where they are watched: of lanes that access shared memory equally often between barriers, the
  // further turns that an access takes.
  bool watch_accesses = false;
  int64_t access_conflicts = 0;
  // Of the device: as sm_90 but for its size, and as long as tests do not ask for them, without clusters.
  int sms = 2, shared_per_block = 227 << 10, shared_per_sm = 228 << 10;
  int clusters = 0;  // that run at once
};
inline Settings settings;

// One flow of control on a stack of its own.
#if defined(__x86_64__)
// Saves the registers that a call preserves and the stack pointer; goes on where the other flow stopped.
extern "C" void tgdp_emulation_switch(void** saved, void* other);
asm(R"(
.text
.weak tgdp_emulation_switch
.type tgdp_emulation_switch, @function
tgdp_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tgdp_emulation_switch, .-tgdp_emulation_switch
)");

class Flow {
 public:
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = nullptr;  // keeps the stack as a call leaves it
    *--top = nullptr;
    top[0] = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
  }
  static void change(Flow& from, Flow& to) { tgdp_emulation_switch(&from.pointer_, to.pointer_); }

 private:
  void* pointer_ = nullptr;
};
#else
class Flow {
 public:
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void change(Flow& from, Flow& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};
#endif

constexpr int kLanes = 32;
constexpr size_t kStackBytes = size_t{128} << 10;

enum class State { ready, at_barrier, at_cluster_barrier, at_warp, ended };

// An asynchronous copy that has not arrived.
struct Copy {
  uint32_t offset;
  unsigned char data[16];
};

struct Thread {
  Flow flow;
  std::unique_ptr<unsigned char[]> stack;
  State state = State::ended;
  uint3 index{};
  int number = 0;
  Place place{"", 0};      // where it waits
  void* operand = nullptr;  // of the operation of its warp
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> copies;  // of the group that is not committed yet
  std::vector<std::pair<uint32_t, uint32_t>> accesses;  // offset and bytes, since the last barrier, if watched

  int warp() const { return number / kLanes; }
  int lane() const { return number % kLanes; }
};

struct Warp {
  int size = 0, arrived = 0;
  uint32_t epoch = 0;  // counts __syncwarp
  const char* operation = "";
  Place place{"", 0};
};

// Who touched two bytes of shared memory last.
struct Touch {
  static constexpr int kNobody = -1, kSeveral = -2;
  int thread = kNobody, warp = kNobody, block = kNobody;  // block: its rank
  uint32_t epoch = 0, warp_epoch = 0, cluster_epoch = 0;
};
struct Granule {
  Touch write, read;
  bool written = false, pending = false;
};

class Block;

// Blocks by their rank.
struct Cluster {
  std::vector<Block*> blocks;
  uint32_t epoch = 0;  // counts barriers
};

// What became of a block when its threads ran as far as they can.
enum class Progress { ran, at_cluster_barrier, ended };

class Block {
 public:
  Block(dim3 grid, dim3 block, size_t shared_bytes, Cluster& cluster, int rank)
      : grid_size(grid), block_size(block), shared_(shared_bytes + 128), granules_((shared_bytes + 1) / 2),
        shared_bytes_(static_cast<uint32_t>(shared_bytes)), cluster_(cluster), rank_(rank),
        random_(settings.seed + static_cast<uint64_t>(rank)) {
    memory_ = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_.data()) + 127) & ~uintptr_t{127});
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024) throw Error("a block has 1 to 1024 threads, not " + std::to_string(threads));
    threads_ = std::vector<Thread>(threads);
    warps_.resize((threads + kLanes - 1) / kLanes);
    for (size_t i = 0; i < threads; ++i) {
      threads_[i].stack.reset(new unsigned char[kStackBytes]);
      threads_[i].number = static_cast<int>(i);
      const auto n = static_cast<uint32_t>(i);
      threads_[i].index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
      order_.push_back(static_cast<int>(i));
    }
    if (settings.order == Order::reverse) std::reverse(order_.begin(), order_.end());
  }

  // Makes ready to run body() in every thread of one block.
  template <typename Body>
  void begin(uint3 block, const Body& body) {
    block_index = block;
    body_ = [](const void* what) { (*static_cast<const Body*>(what))(); };
    body_argument_ = &body;
    epoch_ = 0;
    // Not a number in every format.
    std::memset(memory_, 0xff, shared_bytes_);
    std::fill(granules_.begin(), granules_.end(), Granule{});
    for (size_t w = 0; w < warps_.size(); ++w) {
      warps_[w] = Warp{};
      warps_[w].size = static_cast<int>(std::min<size_t>(kLanes, threads_.size() - w * kLanes));
    }
    for (Thread& thread : threads_) {
      thread.state = State::ready;
      thread.groups.clear();
      thread.copies.clear();
      thread.accesses.clear();
      thread.flow.start(thread.stack.get(), kStackBytes, &Block::enter);
    }
  }

  // Every thread that can runs until it waits.
  Progress step() {
    active = this;
    if (settings.order == Order::random) std::shuffle(order_.begin(), order_.end(), random_);
    bool ran = false;
    for (int number : order_) {
      if (threads_[static_cast<size_t>(number)].state != State::ready) continue;
      current_ = number;
      Flow::change(main_, threads_[static_cast<size_t>(number)].flow);
      ran = true;
      // The other flows are dropped as they are: kernels own nothing.
      if (!failure_.empty()) throw Error(failure_);
    }
    if (ran) return Progress::ran;
    const Thread& first = threads_.front();
    for (const Thread& thread : threads_) {
      if (thread.state == first.state && (thread.state == State::ended || thread.place == first.place)) continue;
      throw Error("threads diverge: " + describe(first) + " " + whereabouts(first) + ", " + describe(thread) + " " +
                  whereabouts(thread));
    }
    if (first.state == State::ended) {
      for (size_t w = 0; w < warps_.size(); ++w) count_conflicts(static_cast<int>(w));
      return Progress::ended;
    }
    if (first.state == State::at_cluster_barrier) return Progress::at_cluster_barrier;
    if (first.state != State::at_barrier) throw Error("threads wait for lanes that never come");
    release();
    return Progress::ran;
  }

  // Where all threads wait, once the whole block waits or has ended.
  Place waits_in() const { return threads_.front().place; }

  // Ends a barrier.
  void release() {
    ++epoch_;
    for (size_t w = 0; w < warps_.size(); ++w) count_conflicts(static_cast<int>(w));
    for (Thread& thread : threads_) thread.state = State::ready;
  }

  int rank() const { return rank_; }

  Thread& thread() { return threads_[static_cast<size_t>(current_)]; }

  void barrier(Place place) {
    if (!left_out(place)) wait(State::at_barrier, place);
  }
  void cluster_barrier(Place place) {
    if (!left_out(place)) wait(State::at_cluster_barrier, place);
  }
  void warp_barrier(Place place) {
    char none = 0;
    if (left_out(place)) return;
    meet("__syncwarp", place, none, [this](char**, Warp& warp) {
      ++warp.epoch;
      count_conflicts(static_cast<int>(&warp - warps_.data()));
    });
  }

  // The lanes of a warp meet; the last to come performs the operation on the operands of all.
  template <typename Operand, typename Perform>
  void meet(const char* operation, Place place, Operand& operand, const Perform& perform) {
    Thread& self = thread();
    Warp& warp = warps_[static_cast<size_t>(self.warp())];
    if (warp.arrived == 0) {
      warp.operation = operation;
      warp.place = place;
    } else if (std::strcmp(warp.operation, operation) != 0 || !(warp.place == place)) {
      throw Error(describe(self) + " is at " + operation + " (" + place.text() + "), others of its warp at " +
                  warp.operation + " (" + warp.place.text() + ")");
    }
    self.operand = &operand;
    if (++warp.arrived < warp.size) {
      wait(State::at_warp, place);
      return;
    }
    warp.arrived = 0;
    Operand* operands[kLanes] = {};
    for (int lane = 0; lane < warp.size; ++lane) {
      Thread& other = threads_[static_cast<size_t>(self.warp() * kLanes + lane)];
      operands[lane] = static_cast<Operand*>(other.operand);
      other.state = State::ready;
    }
    perform(operands, warp);
  }

  void check(uint32_t offset, uint32_t begin, uint32_t end, size_t bytes, size_t alignment) const {
    if (offset < begin || offset + bytes > end || end > shared_bytes_) {
      throw Error("access outside of shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                  " of an array at " + std::to_string(begin) + " to " + std::to_string(end) + ", " +
                  std::to_string(shared_bytes_) + " bytes in all");
    }
    if (offset % alignment != 0) throw Error("misaligned access to shared memory at " + std::to_string(offset));
  }

  void read(uint32_t offset, void* to, size_t bytes) {
    const Thread& self = thread();
    for (uint32_t g = offset / 2; g <= (offset + bytes - 1) / 2; ++g) {
      Granule& granule = granules_[g];
      if (granule.pending) throw Error(describe(self) + " reads shared memory before a copy to it has arrived");
      if (!granule.written) throw Error(describe(self) + " reads shared memory that nothing has written");
      if (conflicts(granule.write, self)) race(self, "reads", "wrote", granule.write);
      remember(granule.read, self);
    }
    watch(offset, bytes);
    std::memcpy(to, memory_ + offset, bytes);
  }

  void write(uint32_t offset, const void* from, size_t bytes, bool pending = false) {
    if (!pending) watch(offset, bytes);
    write(*this, offset, from, bytes, pending);
  }

  // Into the memory of a block of the cluster.
  void write_to(int rank, uint32_t offset, const void* from, size_t bytes) {
    if (rank < 0 || static_cast<size_t>(rank) >= cluster_.blocks.size()) throw Error("a block outside of the cluster");
    Block& other = *cluster_.blocks[static_cast<size_t>(rank)];
    const auto ended = [](const Thread& thread) { return thread.state == State::ended; };
    if (cluster_.epoch == 0) throw Error("a write to shared memory of a block that may not have started");
    if (std::all_of(other.threads_.begin(), other.threads_.end(), ended)) {
      throw Error("a write to shared memory of a block that has ended");
    }
    write(other, offset, from, bytes, false);
  }

  void copy(uint32_t offset, const void* from, size_t bytes) {
    Copy copy{offset, {}};
    std::memcpy(copy.data, from, bytes);  // the rest is zero
    write(offset, copy.data, sizeof(copy.data), true);
    thread().copies.push_back(copy);
  }
  void commit() {
    thread().groups.push_back(std::move(thread().copies));
    thread().copies.clear();
  }
  // All but the latest groups have arrived.
  void wait_for_copies(size_t pending) {
    auto& groups = thread().groups;
    while (groups.size() > pending) {
      for (const Copy& copy : groups.front()) write(copy.offset, copy.data, sizeof(copy.data));
      groups.erase(groups.begin());
    }
  }

  static inline Block* active = nullptr;
  dim3 grid_size, block_size;
  uint3 block_index{};

 private:
  static void enter() {
    Block* block = active;
    try {
      block->body_(block->body_argument_);
    } catch (const std::exception& error) {
      if (block->failure_.empty()) block->failure_ = error.what();
    }
    block->thread().state = State::ended;
    for (;;) Flow::change(block->thread().flow, block->main_);
  }

  static bool left_out(Place place) {
    auto known = std::find(settings.barriers.begin(), settings.barriers.end(), place);
    if (known == settings.barriers.end()) known = settings.barriers.insert(known, place);
    return known - settings.barriers.begin() == settings.left_out;
  }

  void write(Block& owner, uint32_t offset, const void* from, size_t bytes, bool pending) const {
    const Thread& self = threads_[static_cast<size_t>(current_)];
    for (uint32_t g = offset / 2; g <= (offset + bytes - 1) / 2; ++g) {
      Granule& granule = owner.granules_[g];
      if (conflicts(granule.write, self)) race(self, "writes", "wrote", granule.write);
      if (conflicts(granule.read, self)) race(self, "writes", "read", granule.read);
      granule.write = touch_of(self);
      granule.written = true;
      granule.pending = pending;
    }
    if (pending) {
      std::memset(owner.memory_ + offset, 0xff, bytes);
    } else {
      std::memcpy(owner.memory_ + offset, from, bytes);
    }
  }

  void watch(uint32_t offset, size_t bytes) {
    if (settings.watch_accesses) thread().accesses.emplace_back(offset, static_cast<uint32_t>(bytes));
  }

  // The n-th accesses of the lanes of a warp are taken for one instruction. Lanes come together as far as they ask for 128
  // bytes; each turn serves one word of four bytes of each of 32 banks.
  void count_conflicts(int warp) {
    if (!settings.watch_accesses) return;
    const auto first = threads_.begin() + warp * kLanes, last = first + warps_[static_cast<size_t>(warp)].size;
    const size_t count = first->accesses.size();
    const bool alike = std::all_of(first, last, [&](const Thread& lane) { return lane.accesses.size() == count; });
    for (size_t i = 0; alike && i < count; ++i) {
      const auto together = static_cast<std::ptrdiff_t>(128 / std::max(first->accesses[i].second, 4u));
      for (auto begin = first; begin < last; begin += std::min(together, last - begin)) {
        std::vector<uint32_t> words[32];
        for (auto lane = begin; lane != begin + std::min(together, last - begin); ++lane) {
          const auto [offset, bytes] = lane->accesses[i];
          for (uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
            auto& bank = words[word % 32];
            if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
          }
        }
        size_t turns = 1;
        for (const auto& bank : words) turns = std::max(turns, bank.size());
        settings.access_conflicts += static_cast<int64_t>(turns - 1);
      }
    }
    for (auto lane = first; lane != last; ++lane) lane->accesses.clear();
  }

  void wait(State state, Place place) {
    Thread& self = thread();
    self.state = state;
    self.place = place;
    Flow::change(self.flow, main_);
  }

  // Whether an earlier access of somebody is not ordered before one of this thread.
  bool conflicts(const Touch& touch, const Thread& self) const {
    if (touch.thread == Touch::kNobody || touch.cluster_epoch != cluster_.epoch) return false;
    if (touch.block != rank_) return true;
    if (touch.epoch != epoch_ || touch.thread == self.number) return false;
    return touch.warp != self.warp() || touch.warp_epoch == warps_[static_cast<size_t>(self.warp())].epoch;
  }

  Touch touch_of(const Thread& self) const {
    const uint32_t warp_epoch = warps_[static_cast<size_t>(self.warp())].epoch;
    return {self.number, self.warp(), rank_, epoch_, warp_epoch, cluster_.epoch};
  }

  void remember(Touch& touch, const Thread& self) const {
    const uint32_t warp_epoch = warps_[static_cast<size_t>(self.warp())].epoch;
    const bool current = touch.thread != Touch::kNobody && touch.epoch == epoch_ && touch.cluster_epoch == cluster_.epoch;
    if (current && touch.warp != self.warp()) {
      touch.thread = touch.warp = Touch::kSeveral;
    } else if (current && touch.warp_epoch == warp_epoch && touch.thread != self.number) {
      touch.thread = Touch::kSeveral;
    } else {
      touch = touch_of(self);
    }
  }

  [[noreturn]] void race(const Thread& self, const char* does, const char* did, const Touch& touch) const {
    std::string who = touch.thread >= 0 ? "thread " + std::to_string(touch.thread) : "another thread";
    if (touch.block != rank_) who += " of block " + std::to_string(touch.block) + " of the cluster";
    throw Error("race: " + describe(self) + " " + does + " shared memory that " + who + " " + did +
                " since the last barrier");
  }

  static std::string describe(const Thread& thread) { return "thread " + std::to_string(thread.number); }
  static std::string whereabouts(const Thread& thread) {
    switch (thread.state) {
      case State::at_barrier:
        return "waits at the barrier in " + thread.place.text();
      case State::at_cluster_barrier:
        return "waits at the barrier of the cluster in " + thread.place.text();
      case State::at_warp:
        return "waits for its warp in " + thread.place.text();
      default:
        return "has ended";
    }
  }

  std::vector<unsigned char> shared_;
  std::vector<Granule> granules_;
  uint32_t shared_bytes_;
  Cluster& cluster_;
  int rank_;
  unsigned char* memory_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> order_;
  std::mt19937_64 random_;
  Flow main_;
  void (*body_)(const void*) = nullptr;
  const void* body_argument_ = nullptr;
  int current_ = 0;
  uint32_t epoch_ = 0;  // counts barriers
  std::string failure_;
};

// A place in an array in shared memory, used as a pointer; every access is checked.
template <typename T>
class Shared {
 public:
  class Reference {
   public:
    Reference(uint32_t offset, uint32_t begin, uint32_t end) : offset_(offset) {
      Block::active->check(offset, begin, end, sizeof(T), alignof(T));
    }
    operator T() const {
      T value;
      Block::active->read(offset_, &value, sizeof(T));
      return value;
    }
    const Reference& operator=(const T& value) const {
      Block::active->write(offset_, &value, sizeof(T));
      return *this;
    }
    const Reference& operator=(const Reference& other) const { return *this = static_cast<T>(other); }

   private:
    uint32_t offset_;
  };

  Shared() = default;
  Shared(size_t offset, size_t begin, size_t end)
      : offset_(static_cast<uint32_t>(offset)), begin_(static_cast<uint32_t>(begin)), end_(static_cast<uint32_t>(end)) {}
  Reference operator[](int64_t i) const { return *(*this + i); }
  Reference operator*() const { return Reference(offset_, begin_, end_); }
  Shared operator+(int64_t i) const {
    return Shared(static_cast<size_t>(static_cast<int64_t>(offset_) + i * static_cast<int64_t>(sizeof(T))), begin_, end_);
  }
  template <typename To>
  Shared<To> as() const {
    return Shared<To>(offset_, begin_, end_);
  }
  uint32_t offset() const { return offset_; }
  void check(size_t bytes) const { Block::active->check(offset_, begin_, end_, bytes, bytes); }

 private:
  uint32_t offset_ = 0, begin_ = 0, end_ = 0;
};

// Runs the blocks of a cluster, each as far as it can before the next, or in random order by turns.
inline void run_cluster(Cluster& cluster, std::mt19937_64& random) {
  std::vector<Block*> order = cluster.blocks;
  if (settings.order == Order::reverse) std::reverse(order.begin(), order.end());
  for (;;) {
    if (settings.order == Order::random) std::shuffle(order.begin(), order.end(), random);
    size_t ran = 0, ended = 0;
    for (Block* block : order) {
      Progress progress = block->step();
      if (progress == Progress::ran) ++ran;
      while (settings.order != Order::random && progress == Progress::ran) progress = block->step();
      if (progress == Progress::ended) ++ended;
    }
    if (ran > 0) continue;
    if (ended == order.size()) return;
    if (ended > 0) throw Error("a block has ended, others of its cluster wait for it");
    for (const Block* block : order) {
      if (!(block->waits_in() == order.front()->waits_in())) throw Error("blocks of a cluster wait at different barriers");
    }
    ++cluster.epoch;
    for (Block* block : order) block->release();
  }
}

// Runs a kernel; throws Error. Clusters are made of `cluster_size` blocks that follow one another.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, uint32_t cluster_size, dim3 block, size_t shared_bytes,
            const Arguments&... arguments) {
  if (grid.x % cluster_size != 0) throw Error("blocks that are no whole clusters");
  Cluster cluster;
  std::vector<std::unique_ptr<Block>> emulated;
  for (uint32_t rank = 0; rank < cluster_size; ++rank) {
    emulated.push_back(std::make_unique<Block>(grid, block, shared_bytes, cluster, static_cast<int>(rank)));
    cluster.blocks.push_back(emulated.back().get());
  }
  std::vector<uint3> first_blocks;
  for (uint32_t z = 0; z < grid.z; ++z) {
    for (uint32_t y = 0; y < grid.y; ++y) {
      for (uint32_t x = 0; x < grid.x; x += cluster_size) first_blocks.push_back({x, y, z});
    }
  }
  std::mt19937_64 random(settings.seed);
  if (settings.order == Order::reverse) std::reverse(first_blocks.begin(), first_blocks.end());
  if (settings.order == Order::random) std::shuffle(first_blocks.begin(), first_blocks.end(), random);
  const auto body = [&] { kernel(arguments...); };
  struct Idle {
    ~Idle() { Block::active = nullptr; }
  } idle;
  for (uint3 first : first_blocks) {
    cluster.epoch = 0;
    for (auto& one : emulated) {
      one->begin(first, body);
      ++first.x;
    }
    run_cluster(cluster, random);
  }
}

// Exchange within a warp: lane i gets the value of lane from(i).
template <typename T, typename From>
T shuffle(const char* operation, Place place, unsigned mask, T value, const From& from) {
  if (mask != 0xffffffffu) throw Error("only whole warps exchange values");
  struct Operand {
    T value, result;
  } operand{value, value};
  Block::active->meet(operation, place, operand, [&](Operand** lanes, const Warp& warp) {
    for (int lane = 0; lane < warp.size; ++lane) {
      const int source = from(lane);
      if (source >= 0 && source < warp.size) lanes[lane]->result = lanes[source]->value;
    }
  });
  return operand.result;
}

}  // namespace tgdp::emulation

#define threadIdx (::tgdp::emulation::Block::active->thread().index)
#define blockIdx (::tgdp::emulation::Block::active->block_index)
#define blockDim (::tgdp::emulation::Block::active->block_size)
#define gridDim (::tgdp::emulation::Block::active->grid_size)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  tgdp::emulation::Block::active->barrier({file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (mask != 0xffffffffu) throw tgdp::emulation::Error("only whole warps are synchronized");
  tgdp::emulation::Block::active->warp_barrier({file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return tgdp::emulation::shuffle("__shfl_xor_sync", {file, line}, mask, value, [bits](int lane) { return lane ^ bits; });
}

// Every lane reads from the one that it names, as on a GPU.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  struct Operand {
    T value;
    int source;
    T result;
  } operand{value, source, value};
  if (mask != 0xffffffffu) throw tgdp::emulation::Error("only whole warps exchange values");
  tgdp::emulation::Block::active->meet("__shfl_sync", {file, line}, operand,
                                       [](Operand** lanes, const tgdp::emulation::Warp& warp) {
                                         for (int lane = 0; lane < warp.size; ++lane) {
                                           lanes[lane]->result = lanes[lanes[lane]->source % warp.size]->value;
                                         }
                                       });
  return operand.result;
}

// Threads run one at a time, so that every operation is atomic.
template <typename T>
T atomicAdd(T* where, T value) {
  const T old = *where;
  *where = old + value;
  return old;
}
template <typename T>
T atomicMin(T* where, T value) {
  const T old = *where;
  *where = std::min(old, value);
  return old;
}
