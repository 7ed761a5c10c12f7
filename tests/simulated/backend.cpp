// Accelerators that are not there: the device type "sim", whose memory is host memory and whose operators are the CPU's.
//
// What is real: numbers, storages, streams, events, an error where tensors of two devices meet, a limit on each device's memory.
// What is simulated: the time that a link takes. Work on a device's default stream is done when its call returns; other streams
// only copy. Under the real clock each of them has a thread, which sleeps for as long as its link would take. Under the virtual
// clock nothing sleeps: every stream counts seconds, events carry them, and memory that is read before it was written, or
// written while it is still read, is an error: what a missing event would do, on a device that is as slow as it may be.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>

// Of the interpreter that loads this: torch waits for events with the lock held, and a copy may need it to let a tensor go.
extern "C" {
int PyGILState_Check();
void* PyEval_SaveThread();
void PyEval_RestoreThread(void* state);
}

namespace {

struct WithoutInterpreterLock {
  void* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  ~WithoutInterpreterLock() {
    if (state != nullptr) {
      PyEval_RestoreThread(state);
    }
  }
};

constexpr int kMost = 8;
constexpr auto kSim = c10::DeviceType::PrivateUse1;

// --- Devices: what is counted of each

struct DeviceState {
  int64_t limit = INT64_MAX, used = 0, peak = 0;
  int64_t allocations = 0, synchronizations = 0, flushes = 0, operators = 0;
  double link_bytes_per_s = 0;  // 0: at once
  double operator_s = 0;        // under the virtual clock
};

std::mutex lock;  // of all that follows
std::array<DeviceState, kMost> devices;
int num_devices = 0;
bool is_virtual = false;
bool is_unified = false;
double host_s = 0;  // of the virtual clock: nothing begins before the host asked for it
int64_t num_missing_events = 0;
thread_local int current_device = 0;

// Memory of a device: when it was last written and read, in seconds of the virtual clock.
struct Use {
  double written_s = 0, read_s = 0;
};
std::unordered_map<const void*, Use> uses;

void account(int device, int64_t nbytes) {
  std::lock_guard<std::mutex> held(lock);
  auto& state = devices.at(device);
  if (nbytes > 0 && state.used + nbytes > state.limit) {
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "sim:", device, " out of memory. Tried to allocate ", nbytes, " bytes beside ", state.used,
        " of ", state.limit);
  }
  state.used += nbytes;
  state.peak = std::max(state.peak, state.used);
  state.allocations += nbytes > 0;
}

struct Block {
  int device;
  int64_t nbytes;
  void* memory;
  c10::Storage owner;  // of memory that an operator of the CPU made; empty for our own
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> held(lock);
    uses.erase(block->memory);
  }
  account(block->device, -block->nbytes);
  if (!block->owner) {
    std::free(block->memory);
  }
  delete block;
}

c10::DataPtr data_of(Block* block) {
  return {block->memory, block, &release, c10::Device(kSim, static_cast<c10::DeviceIndex>(block->device))};
}

struct SimAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    const int device = current_device;
    if (nbytes == 0) {
      return {nullptr, nullptr, &c10::detail::deleteNothing, c10::Device(kSim, static_cast<c10::DeviceIndex>(device))};
    }
    account(device, static_cast<int64_t>(nbytes));
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, 4096, nbytes) == 0);
    return data_of(new Block{device, static_cast<int64_t>(nbytes), memory, {}});
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* into, const void* from, size_t count) const override { default_copy_data(into, from, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    std::lock_guard<std::mutex> held(lock);
    devices.at(current_device).flushes++;
  }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> held(lock);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* each : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      (*each)[0].current = devices.at(device).used;
      (*each)[0].peak = devices.at(device).peak;
    }
    stats.num_device_alloc = devices.at(device).allocations;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> held(lock);
    devices.at(device).peak = devices.at(device).used;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> held(lock);
    auto& state = devices.at(device);
    return {static_cast<size_t>(state.limit - state.used), static_cast<size_t>(state.limit)};
  }
};

SimAllocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

// --- Streams and events

struct Moment {  // what an event was recorded at
  std::mutex mutex;
  std::condition_variable changed;
  bool is_past = false;
  double at_s = 0;  // of the virtual clock
  std::chrono::steady_clock::time_point past_at;  // of the real one
  void pass() {
    std::lock_guard<std::mutex> held(mutex);
    is_past = true;
    past_at = std::chrono::steady_clock::now();
    changed.notify_all();
  }
  void wait() {
    WithoutInterpreterLock unlocked;
    std::unique_lock<std::mutex> held(mutex);
    changed.wait(held, [this] { return is_past; });
  }
};
using Event = std::shared_ptr<Moment>;

// A stream of copies: a thread that does one thing after another. Never ends: streams live as long as the process.
struct Queue {
  double at_s = 0;  // of the virtual clock
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> jobs;
  bool is_busy = false, has_thread = false;

  void add(std::function<void()> job) {
    std::lock_guard<std::mutex> held(mutex);
    jobs.push_back(std::move(job));
    if (!has_thread) {
      has_thread = true;
      std::thread([this] { run(); }).detach();
    }
    changed.notify_all();
  }
  void drain() {
    WithoutInterpreterLock unlocked;
    std::unique_lock<std::mutex> held(mutex);
    changed.wait(held, [this] { return jobs.empty() && !is_busy; });
  }
  void run() {
    std::unique_lock<std::mutex> held(mutex);
    while (true) {
      changed.wait(held, [this] { return !jobs.empty(); });
      auto job = std::move(jobs.front());
      jobs.pop_front();
      is_busy = true;
      held.unlock();
      job();
      job = nullptr;
      held.lock();
      is_busy = false;
      changed.notify_all();
    }
  }
};

std::map<std::pair<int, c10::StreamId>, Queue*> queues;
c10::StreamId last_stream = 0;
thread_local std::array<c10::StreamId, kMost> current_streams{};

Queue& queue_of(int device, c10::StreamId stream) {
  std::lock_guard<std::mutex> held(lock);
  auto*& queue = queues[{device, stream}];
  if (queue == nullptr) {
    queue = new Queue();
  }
  return *queue;
}

c10::Stream stream_of(c10::Device device, c10::StreamId number) { return c10::Stream(c10::Stream::UNSAFE, device, number); }

void wait_for(c10::Stream stream) {
  auto& queue = queue_of(stream.device_index(), stream.id());
  queue.drain();
  std::lock_guard<std::mutex> held(lock);
  devices.at(stream.device_index()).synchronizations++;
  host_s = std::max(host_s, queue.at_s);
}

struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    current_device = device.index();
    return before;
  }
  c10::Device getDevice() const override { return {kSim, static_cast<c10::DeviceIndex>(current_device)}; }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  c10::Stream getStream(c10::Device device) const override {
    const int index = device.has_index() ? device.index() : current_device;
    return stream_of({kSim, static_cast<c10::DeviceIndex>(index)}, current_streams.at(index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    std::lock_guard<std::mutex> held(lock);
    return stream_of(device, ++last_stream);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_streams.at(stream.device_index()) = stream.id();
    return before;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Event();
    }
    auto moment = std::make_shared<Moment>();
    *static_cast<Event*>(*event) = moment;
    auto& queue = queue_of(stream.device_index(), stream.id());
    {
      std::lock_guard<std::mutex> held(lock);
      moment->at_s = std::max(queue.at_s, host_s);
    }
    if (stream.id() == 0 || is_virtual) {
      moment->pass();
    } else {
      queue.add([moment] { moment->pass(); });
    }
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) {
      return;
    }
    auto moment = *static_cast<Event*>(event);
    auto& queue = queue_of(stream.device_index(), stream.id());
    if (is_virtual) {
      std::lock_guard<std::mutex> held(lock);
      queue.at_s = std::max(queue.at_s, moment->at_s);
    } else if (stream.id() == 0) {
      moment->wait();  // the host is the device: no synchronisation of the two
    } else {
      queue.add([moment] { moment->wait(); });
    }
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) {
      return true;
    }
    auto moment = *static_cast<Event*>(event);
    if (is_virtual) {
      std::lock_guard<std::mutex> held(lock);
      return moment->at_s <= host_s;
    }
    std::lock_guard<std::mutex> held(moment->mutex);
    return moment->is_past;
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) {
      return;
    }
    auto moment = *static_cast<Event*>(event);
    moment->wait();
    std::lock_guard<std::mutex> held(lock);
    devices.at(current_device).synchronizations++;
    host_s = std::max(host_s, moment->at_s);
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(num_devices); }
  bool queryStream(const c10::Stream& stream) const override {
    auto& queue = queue_of(stream.device_index(), stream.id());
    std::lock_guard<std::mutex> held(queue.mutex);
    return queue.jobs.empty() && !queue.is_busy;
  }
  void synchronizeStream(const c10::Stream& stream) const override { wait_for(stream); }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    std::vector<c10::StreamId> streams{0};
    {
      std::lock_guard<std::mutex> held(lock);
      for (auto& [key, queue] : queues) {
        if (key.first == device && key.second != 0) {
          streams.push_back(key.second);
        }
      }
    }
    for (auto each : streams) {
      wait_for(stream_of({kSim, device}, each));
    }
  }
  double elapsedTime(void* before, void* after, const c10::DeviceIndex) const override {
    const auto &begin = *static_cast<Event*>(before), &end = *static_cast<Event*>(after);
    if (is_virtual) {
      return 1e3 * (end->at_s - begin->at_s);
    }
    return std::chrono::duration<double, std::milli>(end->past_at - begin->past_at).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, SimGuard);

struct SimHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return num_devices > 0; }
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(num_devices); }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return static_cast<c10::DeviceIndex>(std::exchange(current_device, device));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    const auto before = exchangeDevice(storage.device().index());
    auto data = allocator.allocate(nbytes);
    exchangeDevice(before);
    std::memcpy(data.get(), storage.data(), std::min(nbytes, storage.nbytes()));
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(nbytes);
  }
};

// --- Tensors of the host over a device's memory, and the other way round

at::Tensor tensor_over(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  return tensor;
}

at::Tensor on_host(const at::Tensor& tensor) {
  const auto& own = tensor.storage();
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), own.nbytes(), c10::DataPtr(own.mutable_data(), c10::Device(c10::kCPU)), nullptr, false);
  auto alias = tensor_over(std::move(storage), tensor, c10::DispatchKey::CPU);
  alias._set_conj(tensor.is_conj());
  alias._set_neg(tensor.is_neg());
  return alias;
}

// What an operator of the CPU made becomes the device's, without a copy.
at::Tensor adopted(const at::Tensor& made, int device) {
  const auto nbytes = static_cast<int64_t>(made.storage().nbytes());
  const c10::Device on(kSim, static_cast<c10::DeviceIndex>(device));
  c10::DataPtr data(nullptr, on);
  if (nbytes > 0) {
    account(device, nbytes);
    data = data_of(new Block{device, nbytes, made.storage().mutable_data(), made.storage()});
  }
  c10::Storage storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data), &allocator, true);
  return tensor_over(std::move(storage), made, c10::DispatchKey::PrivateUse1);
}

// --- Time

void begin_reading(const at::Tensor& tensor, double at_s, const char* what) {
  const auto found = uses.find(tensor.storage().data());
  const bool is_ordered = found == uses.end() || at_s >= found->second.written_s;
  num_missing_events += !is_ordered;
  TORCH_CHECK(
      is_ordered, what, " reads memory of ", tensor.device(), " at ", at_s, " s that is written until ",
      found->second.written_s, " s: an event is missing");
}

void begin_writing(const at::Tensor& tensor, double at_s, const char* what) {
  const auto found = uses.find(tensor.storage().data());
  const bool is_ordered = found == uses.end() || at_s >= std::max(found->second.written_s, found->second.read_s);
  num_missing_events += !is_ordered;
  TORCH_CHECK(
      is_ordered, what, " writes memory of ", tensor.device(), " at ", at_s, " s that is in use until ",
      std::max(found->second.written_s, found->second.read_s), " s: an event is missing");
}

// An operator on a device's default stream.
void pass_time(const std::vector<at::Tensor>& reads, int device, const std::string& name) {
  auto& queue = queue_of(device, 0);
  std::lock_guard<std::mutex> held(lock);
  auto& state = devices.at(device);
  state.operators++;
  if (!is_virtual) {
    return;
  }
  const double start = std::max(queue.at_s, host_s);
  queue.at_s = start + state.operator_s;
  for (const auto& each : reads) {
    if (each.storage().nbytes() > 0) {
      begin_reading(each, start, name.c_str());
      auto& use = uses[each.storage().data()];
      use.read_s = std::max(use.read_s, queue.at_s);
    }
  }
}

// --- Copies

// On the stream that is current on the device; where both are devices, on the source's, and the target's waits.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& into, bool is_non_blocking) {
  const bool is_down = !into.is_privateuseone(), is_up = !from.is_privateuseone();
  const int device = is_up ? into.device().index() : from.device().index();
  const auto stream = current_streams.at(device);
  auto& queue = queue_of(device, stream);
  const bool is_across = !is_down && !is_up && from.device() != into.device();
  double link_s = 0, start = 0;
  {
    std::lock_guard<std::mutex> held(lock);
    const double rate = devices.at(device).link_bytes_per_s;
    if ((is_up || is_down || is_across) && rate > 0) {
      link_s = static_cast<double>(into.nbytes()) / rate;
    }
    if (is_virtual) {
      start = std::max(queue.at_s, host_s);
      if (is_across) {
        start = std::max(start, queues[{into.device().index(), 0}] ? queues[{into.device().index(), 0}]->at_s : 0.0);
      }
      if (!is_up) {
        begin_reading(from, start, "A copy");
        auto& use = uses[from.storage().data()];
        use.read_s = std::max(use.read_s, start + link_s);
      }
      if (!is_down && into.storage().nbytes() > 0) {
        begin_writing(into, start, "A copy");
        uses[into.storage().data()].written_s = start + link_s;
      }
      queue.at_s = start + link_s;
    }
  }
  if (is_virtual && is_across) {
    auto& other = queue_of(into.device().index(), 0);
    std::lock_guard<std::mutex> held(lock);
    other.at_s = std::max(other.at_s, start + link_s);
  }
  auto source = is_up ? from : on_host(from), target = is_down ? into : on_host(into);
  auto copy = [source, target, from, into, link_s, stream] {
    if (!is_virtual && link_s > 0) {
      std::this_thread::sleep_for(std::chrono::duration<double>(link_s));
    }
    c10::InferenceMode mode(target.is_inference());  // the thread that copies is in no mode
    target.copy_(source);
  };
  if (stream == 0 || is_virtual) {
    copy();
  } else {
    queue.add(std::move(copy));
  }
  if (is_down || (is_up && !is_non_blocking)) {
    wait_for(stream_of({kSim, static_cast<c10::DeviceIndex>(device)}, stream));
  }
  return into;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& into) {
  if (from.sizes() != into.sizes()) {
    into.resize_(from.sizes());
  }
  return copy_from(from, into, false);
}

at::Scalar local_scalar_dense(const at::Tensor& tensor) {
  wait_for(stream_of(tensor.device(), 0));
  return on_host(tensor).item();
}

// --- Operators

at::Tensor empty_memory_format(
    c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device> device,
    std::optional<bool>, std::optional<c10::MemoryFormat> memory_format) {
  const int index = device.has_value() && device->has_index() ? device->index() : current_device;
  TORCH_CHECK(index < num_devices, "There is no sim:", index, " among ", num_devices);
  const int before = std::exchange(current_device, index);
  at::Tensor made;
  try {
    made = at::detail::empty_generic(
        size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), memory_format);
  } catch (...) {
    current_device = before;
    throw;
  }
  current_device = before;
  return made;
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
    std::optional<c10::Device> device, std::optional<bool> pin) {
  const auto elements = at::detail::computeStorageNbytes(size, stride, 1);
  auto made = empty_memory_format({static_cast<int64_t>(elements)}, dtype, layout, device, pin, std::nullopt);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}

// Everything else: the CPU's operator, on tensors over the same memory.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack), name_(toString(op.operator_name())) {
    const auto& arguments = op.schema().arguments();
    const auto begin = stack->size() - arguments.size();
    for (size_t n = 0; n < arguments.size(); ++n) {
      const auto* alias = arguments[n].alias_info();
      auto& value = (*stack)[begin + n];
      originals_.push_back(value);
      value = translated(value, alias != nullptr && alias->isWrite());
    }
    if (device_ < 0) {
      device_ = asked_ >= 0 ? asked_ : current_device;
    }
    const auto begins = [this](const char* with) { return name_.find(with) == 0; };
    const bool takes_host = begins("aten::index.") || begins("aten::index_put") || begins("aten::_index_put");
    TORCH_CHECK(
        !has_host_tensor_ || takes_host || reads_.empty(), "Expected all tensors to be on the same device, but found at least two ",
        "devices, sim:", device_, " and cpu! (", name_, ")");
  }

  void run() {
    pass_time(reads_, device_, name_);
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (auto& [original, alias] : resized_) {
      if (alias.numel() > 0) {
        auto made = adopted(alias, device_);
        original.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
        original.unsafeGetTensorImpl()->set_storage_offset(made.storage_offset());
        original.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides());
      }
    }
    const auto& returns = op_.schema().returns();
    const auto begin = stack_->size() - returns.size();
    for (size_t n = 0; n < returns.size(); ++n) {
      auto& value = (*stack_)[begin + n];
      const auto* alias = returns[n].alias_info();
      if (alias != nullptr && alias->isWrite()) {
        value = written(*alias);
      } else if (value.isTensor() && value.toTensor().defined()) {
        value = given(value.toTensor());
      } else if (value.isTensorList()) {
        std::vector<at::Tensor> list;
        for (const at::Tensor& each : value.toTensorVector()) {
          list.push_back(given(each));
        }
        value = list;
      }
    }
  }

 private:
  c10::IValue translated(const c10::IValue& value, bool is_written) {
    if (value.isTensor()) {
      return translated(value.toTensor(), is_written);
    }
    if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& each : value.toTensorVector()) {
        list.push_back(translated(each, is_written));
      }
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& each : value.toOptionalTensorVector()) {
        list.push_back(each.has_value() ? std::optional<at::Tensor>(translated(*each, is_written)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice()) {
      asked_ = value.toDevice().has_index() ? value.toDevice().index() : current_device;
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  at::Tensor translated(const at::Tensor& tensor, bool is_written) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (!tensor.is_privateuseone()) {
      has_host_tensor_ |= tensor.dim() > 0;
      return tensor;
    }
    const int index = tensor.device().index();
    TORCH_CHECK(
        device_ < 0 || device_ == index, "Expected all tensors to be on the same device, but found at least two devices, sim:",
        device_, " and sim:", index, "! (", name_, ")");
    device_ = index;
    if (is_written && tensor.numel() == 0) {
      resized_.emplace_back(tensor, at::empty(tensor.sizes(), tensor.options().device(c10::kCPU)));
      return resized_.back().second;
    }
    reads_.push_back(tensor);
    return on_host(tensor);
  }

  c10::IValue written(const c10::AliasInfo& alias) const {
    const auto& arguments = op_.schema().arguments();
    for (size_t n = 0; n < arguments.size(); ++n) {
      const auto* other = arguments[n].alias_info();
      if (other != nullptr && other->beforeSets() == alias.beforeSets()) {
        return originals_[n];
      }
    }
    TORCH_CHECK(false, name_, " returns what it was not given");
  }

  at::Tensor given(const at::Tensor& result) const {
    if (!result.defined()) {
      return result;
    }
    if (result.storage().nbytes() > 0) {
      for (const auto& each : reads_) {
        if (each.storage().data() == result.storage().data()) {  // a view
          auto view = tensor_over(each.storage(), result, c10::DispatchKey::PrivateUse1);
          view._set_conj(result.is_conj());
          view._set_neg(result.is_neg());
          return view;
        }
      }
    }
    return adopted(result, device_);
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::string name_;
  std::vector<c10::IValue> originals_;
  std::vector<at::Tensor> reads_;
  std::vector<std::pair<at::Tensor, at::Tensor>> resized_;
  int device_ = -1, asked_ = -1;
  bool has_host_tensor_ = false;
};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

at::Tensor& set_storage(at::Tensor& tensor, c10::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, stride);
  return tensor;
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& source) {
  return set_storage(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// Accelerators count integers, which the CPU's kernel does not.
at::Tensor histc(const at::Tensor& tensor, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  pass_time({tensor}, tensor.device().index(), "aten::histc");
  auto values = on_host(tensor);
  if (at::isIntegralType(values.scalar_type(), false)) {
    return adopted(at::histc(values.to(at::kFloat), bins, low, high).to(values.scalar_type()), tensor.device().index());
  }
  return adopted(at::histc(values, bins, low, high), tensor.device().index());
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  std::vector<at::Tensor> reads{input, weight};
  const bool has_bias = bias.has_value() && bias->defined();
  if (has_bias) {
    reads.push_back(*bias);
  }
  for (const auto& each : reads) {
    TORCH_CHECK(
        each.device() == input.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
        input.device(), " and ", each.device(), "! (aten::convolution)");
  }
  pass_time(reads, input.device().index(), "aten::convolution");
  auto made = at::convolution_symint(
      on_host(input), on_host(weight), has_bias ? std::optional<at::Tensor>(on_host(*bias)) : std::nullopt, stride, padding,
      dilation, transposed, output_padding, std::move(groups));
  return adopted(made, input.device().index());
}

// Of a product that other devices put together of smaller ones.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& input, const at::Tensor& gradient, const at::Tensor& weight, std::array<bool, 3> wanted) {
  const auto rows = gradient.reshape({-1, gradient.size(-1)});
  at::Tensor of_input, of_weight, of_bias;
  if (wanted[0]) of_input = rows.mm(weight).view(input.sizes());
  if (wanted[1]) of_weight = rows.t().mm(input.reshape({-1, input.size(-1)}));
  if (wanted[2]) of_bias = rows.sum(0);
  return {of_input, of_weight, of_bias};
}

// The CPU's own kernel where no gradient is recorded, and otherwise the operators that it stands for.
at::Tensor attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& mask,
    double dropout, bool is_causal, std::optional<double> scale, bool shares_heads) {
  const bool is_recorded = at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() || value.requires_grad());
  if (is_recorded) {
    auto found = at::_scaled_dot_product_attention_math(
        query, key, value, mask, dropout, is_causal, std::nullopt, scale, shares_heads);
    return std::get<0>(found);
  }
  at::AutoDispatchBelowAutograd below;
  return at::scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale, shares_heads);
}

// Freed memory is given back at once: what writes into it later is found by the clock.
void record_stream(at::Tensor&, c10::Stream) {}

bool is_compatible(const at::Tensor& tensor, const at::Tensor& other) {
  auto is_dense = [](const at::Tensor& each) { return each.is_privateuseone() || each.is_cpu(); };
  return is_dense(tensor) && is_dense(other) && tensor.layout() == c10::kStrided && other.layout() == c10::kStrided;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("record_stream", &record_stream);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("histc", &histc);
  m.impl("convolution_overrideable", &convolution);
  m.impl("_has_compatible_shallow_copy_type", &is_compatible);
  // Composite for other devices; here the CPU's own kernel, so that the last bits are the CPU's.
  m.impl("scaled_dot_product_attention", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
  m.impl("linear", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
  m.impl("linear_backward", &linear_backward);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("scaled_dot_product_attention", &attention); }

// --- What tests set and read

void configure(int64_t count, bool with_virtual_clock) {
  std::lock_guard<std::mutex> held(lock);
  TORCH_CHECK(count >= 0 && count <= kMost, "at most ", kMost, " devices");
  for (auto& state : devices) {
    const auto used = state.used;
    state = DeviceState();
    state.used = state.peak = used;
  }
  for (auto& [key, queue] : queues) {
    queue->at_s = 0;
  }
  uses.clear();
  host_s = 0;
  num_missing_events = 0;
  num_devices = static_cast<int>(count);
  is_virtual = with_virtual_clock;
}

void set_device(int64_t device, int64_t limit, double link_bytes_per_s, double operator_s) {
  std::lock_guard<std::mutex> held(lock);
  auto& state = devices.at(device);
  state.limit = limit;
  state.link_bytes_per_s = link_bytes_per_s;
  state.operator_s = operator_s;
}

std::vector<int64_t> counts(int64_t device) {
  std::lock_guard<std::mutex> held(lock);
  const auto& state = devices.at(device);
  return {state.allocations, state.synchronizations, state.flushes, state.operators, state.used, state.peak};
}

// Seconds that a device's default stream has reached.
double seconds(int64_t device) {
  auto& queue = queue_of(static_cast<int>(device), 0);
  std::lock_guard<std::mutex> held(lock);
  return std::max(host_s, queue.at_s);
}

int64_t missing_events() {
  std::lock_guard<std::mutex> held(lock);
  return num_missing_events;
}

TORCH_LIBRARY(sim, m) {
  m.def("device_count() -> int", [] { return static_cast<int64_t>(num_devices); });
  m.def("current_device() -> int", [] { return static_cast<int64_t>(current_device); });
  m.def("configure(int count, bool with_virtual_clock) -> ()", &configure);
  m.def("set_device(int device, int limit, float link_bytes_per_s, float operator_s) -> ()", &set_device);
  m.def("counts(int device) -> int[]", &counts);
  m.def("seconds(int device) -> float", &seconds);
  m.def("missing_events() -> int", &missing_events);
}

const bool is_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new SimHooks());
  return true;
}();

}  // namespace
