// An accelerator that is none: ordinary memory behind PyTorch's PrivateUse1 key, with exact counters of what would
// cross to a device and back. Every operator is the CPU's. What is counted, and how it is used: __init__.py.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>

// By position: the order is that of NUMBERS in counters.py.
enum Number {
  H2D, H2D_COPIES, D2H, D2H_COPIES, D2D, D2D_COPIES,  // bytes and calls
  ALLOCATED, PEAK, PINNED, PINNED_PEAK,               // bytes now and at most
  TOTAL,                                              // bytes that the device has; Python sets it
  LISTENING, LATE, PINNING_FAILS,                     // switches
  STEPS, HOW_MANY                                     // steps that are kept; numbers
};
extern "C" std::atomic<int64_t> counting_numbers[HOW_MANY];
std::atomic<int64_t> counting_numbers[HOW_MANY] = {};

namespace {

auto& numbers = counting_numbers;
constexpr auto COUNTING = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(COUNTING, 0);

struct Task {  // a copy, or without tensors: wait until `stream` has done so many tasks
  at::Tensor from, to;
  int64_t stream, tasks;
};

struct Queue {
  std::deque<Task> waiting;  // issued and not done
  int64_t issued = 0, done = 0;
};

struct State {
  std::recursive_mutex lock;  // recursive: what does a copy also frees its tensors
  std::vector<std::string> steps;                         // a line each
  std::map<int64_t, Queue> queues;                        // by stream
  std::map<int64_t, std::pair<int64_t, int64_t>> events;  // stream, and how many of its tasks came before
  std::map<const char*, size_t> pinned;                   // bytes by first byte
  int64_t last_stream = 0, last_event = 0;
};

// Never freed: tensors that live until the process ends are freed after static objects.
State& state() {
  static auto* made = new State;
  return *made;
}

using Locked = std::lock_guard<std::recursive_mutex>;
thread_local int64_t current_stream = 0;
thread_local bool inside_operator = false;

void note(std::string what, std::string name, int64_t stream, int64_t event = 0, int64_t bytes = 0,
          bool non_blocking = false, bool pinned = false) {
  if (!numbers[LISTENING]) return;
  Locked locked(state().lock);
  if (!numbers[STEPS]) state().steps.clear();
  auto line = what + '\t' + name;
  for (int64_t field : {stream, event, bytes, int64_t{non_blocking}, int64_t{pinned}})
    line += '\t' + std::to_string(field);
  state().steps.push_back(line + '\n');
  numbers[STEPS]++;
}

void count_copy(Number kind, int64_t bytes, const char* name = "", bool non_blocking = false, bool pinned = false) {
  numbers[kind] += bytes;
  numbers[kind + 1] += bytes > 0;
  auto what = kind == H2D ? "h2d" : kind == D2H ? "d2h" : "d2d";
  if (bytes) note(what, name, current_stream, 0, bytes, non_blocking, pinned);
}

template <Number NOW>  // ALLOCATED for the device's, PINNED for pinned host memory
struct Memory final : c10::Allocator {
  struct Block {
    char* data;
    int64_t bytes;
  };
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    Locked locked(state().lock);
    if (NOW == PINNED) state().pinned.erase(block->data);
    numbers[NOW] -= block->bytes;
    std::free(block->data);
    delete block;
  }
  c10::DataPtr allocate(size_t size) override {
    auto bytes = static_cast<int64_t>(size);
    Locked locked(state().lock);
    TORCH_CHECK(NOW != PINNED || !numbers[PINNING_FAILS], "no pinned memory to be had: ", bytes, " bytes wanted");
    TORCH_CHECK_WITH(OutOfMemoryError, NOW == PINNED || numbers[ALLOCATED] + bytes <= numbers[TOTAL],
                     "counting device out of memory: ", bytes, " bytes wanted, ", numbers[TOTAL].load(), " in all");
    auto* block = new Block{static_cast<char*>(std::aligned_alloc(64, (bytes / 64 + 1) * 64)), bytes};
    if (NOW == PINNED) state().pinned[block->data] = size;
    numbers[NOW] += bytes;
    numbers[NOW + 1] = std::max<int64_t>(numbers[NOW], numbers[NOW + 1]);
    return {block->data, block, &release, NOW == PINNED ? c10::Device(c10::DeviceType::CPU) : DEVICE};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory<ALLOCATED> device_memory;
Memory<PINNED> pinned_memory;
REGISTER_ALLOCATOR(COUNTING, &device_memory);

bool is_pinned(const void* data) {
  Locked locked(state().lock);
  auto next = state().pinned.upper_bound(static_cast<const char*>(data));
  if (next == state().pinned.begin()) return false;
  --next;
  return static_cast<const char*>(data) < next->first + std::max<size_t>(next->second, 1);
}

// The same memory as a CPU tensor.
at::Tensor on_cpu(const at::Tensor& t) {
  return t.is_cpu() ? t : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

void move(const at::Tensor& from, const at::Tensor& to) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  on_cpu(to).copy_(on_cpu(from));
}

// Does what waits on a stream, up to its `until`-th task.
void run(int64_t stream, int64_t until = INT64_MAX) {
  Locked locked(state().lock);
  auto& queue = state().queues[stream];
  for (; !queue.waiting.empty() && queue.done < until; queue.done++) {
    auto task = std::move(queue.waiting.front());
    queue.waiting.pop_front();
    if (task.from.defined()) move(task.from, task.to);
    else run(task.stream, task.tasks);
  }
}

void put_off(int64_t stream, Task task) {
  Locked locked(state().lock);
  state().queues[stream].waiting.push_back(std::move(task));
  state().queues[stream].issued++;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (inside_operator) {
    move(from, to);
    return to;
  }
  auto kind = from.is_cpu() ? H2D : to.is_cpu() ? D2H : D2D;
  // What crosses has the type of the side that is the device: CUDA converts on the host, either way.
  auto bytes = static_cast<int64_t>(to.numel() * (kind == D2H ? from : to).element_size());
  bool pinned = kind != D2D && is_pinned((kind == H2D ? from : to).storage().data());
  count_copy(kind, bytes, "", non_blocking, pinned);
  // Only a copy in one piece from or to pinned memory goes on beside the host: CUDA stages all others.
  bool converts = from.sizes() != to.sizes() || from.dtype() != to.dtype();
  bool one_piece = !converts && from.is_contiguous() && to.is_contiguous();
  if (numbers[LATE] && non_blocking && pinned && one_piece) {
    put_off(current_stream, {from.detach(), to.detach(), 0, 0});
    std::memset(to.data_ptr(), 0xFF, bytes);  // nan or -1 for whoever reads before it waits
    return to;
  }
  run(current_stream);
  move(from, to);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) {
  count_copy(D2H, tensor.element_size(), "item");
  run(current_stream);
  return on_cpu(tensor).item();
}

// CUDA refuses a CPU tensor of more than one number beside one of its own, or a weight that was left behind would go
// unseen; so must we. Indices alone may be on the CPU and are brought over (`index` has done that when it comes here).
void check_places(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& name = op.schema().name();
  bool indexing = name == "aten::index" || name == "aten::index_put" || name == "aten::_index_put_impl_";
  auto check = [&](const at::Tensor& tensor, bool is_index) {
    if (!tensor.defined() || !tensor.is_cpu() || tensor.dim() == 0) return;
    TORCH_CHECK(is_index, "Expected all tensors to be on the same device, but found at least two devices, counting:0 ",
                "and cpu! (", name, " got a CPU tensor of shape ", tensor.sizes(), ")");
    if (name != "aten::index") count_copy(H2D, tensor.nbytes(), "index");
  };
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) check(value.toTensor(), false);
    if (value.isTensorList())
      for (const auto& tensor : value.toTensorVector()) check(tensor, indexing);
    if (value.isOptionalTensorList())
      for (const auto& tensor : value.toOptionalTensorVector()) check(tensor.value_or(at::Tensor()), indexing);
  }
}

void operate(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_places(op, *stack);
  note("op", op.schema().name(), current_stream);
  run(current_stream);
  struct Inside {
    bool before = std::exchange(inside_operator, true);
    ~Inside() { inside_operator = before; }
  } inside;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);  // a view that is a copy would lose writes
}

// PyTorch hands a foreign device's convolutions to operators of their own, which the CPU does not have.
void convolve(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  operate(c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", ""), stack);
}

void convolve_backward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto first = stack->end() - op.schema().arguments().size();
  auto channels = first[6].toBool() ? first[2].toTensor().size(1) * first[8].toInt() : first[2].toTensor().size(0);
  stack->insert(first + 3, c10::IValue(std::vector<int64_t>{channels}));  // the shape of the bias
  operate(c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", ""), stack);
}

c10::DispatchKeySet keys(std::optional<c10::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!device || device->index() <= 0, "there is one counting device, not counting:", int(device->index()));
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
}

at::Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                 std::optional<c10::Device> device, std::optional<bool> pin, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &device_memory, keys(device, pin), c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> type,
                         std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool> pin) {
  auto dtype = c10::dtype_or_default(type);
  return at::detail::empty_strided_generic(sizes, strides, &device_memory, keys(device, pin), dtype);
}

void record_stream(at::Tensor& tensor, at::Stream stream) {
  note("record_stream", "", stream.id(), 0, tensor.storage().nbytes());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&operate>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  library.impl("_local_scalar_dense", TORCH_FN(item));
  library.impl("record_stream", TORCH_FN(record_stream));
  library.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolve>());
  library.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolve_backward>());
  library.impl("resize_", TORCH_FN(at::native::resize_));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  library.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  library.impl("set_.source_Storage", TORCH_FN((at::Tensor & (*)(at::Tensor&, at::Storage)) at::native::set_));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
}

// Of the interface and not of NoOpDeviceGuardImpl, which is final before torch 2.7.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, DEVICE, id); }
  static int64_t number(void* event) { return reinterpret_cast<int64_t>(event); }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::DeviceType type() const override { return COUNTING; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream exchangeStream(c10::Stream next) const noexcept override {
    return stream(std::exchange(current_stream, next.id()));
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    Locked locked(state().lock);
    return stream(++state().last_stream);
  }
  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    Locked locked(state().lock);
    if (!*event) *event = reinterpret_cast<void*>(++state().last_event);  // a number, never an address
    state().events[number(*event)] = {on.id(), state().queues[on.id()].issued};
    note("record", "", on.id(), number(*event));
  }
  static void reach(void* event) {
    Locked locked(state().lock);
    auto [stream, tasks] = state().events[number(event)];
    run(stream, tasks);
  }
  void block(void* event, const c10::Stream& waiting) const override {
    Locked locked(state().lock);
    note("wait", "", waiting.id(), number(event));
    auto [stream, tasks] = state().events[number(event)];
    put_off(waiting.id(), {{}, {}, stream, tasks});
  }
  void synchronizeEvent(void* event) const override {
    note("synchronize", "event", current_stream, number(event));
    reach(event);
  }
  bool queryEvent(void* event) const override { return reach(event), true; }  // done whenever somebody asks
  bool queryStream(const c10::Stream& asked) const override { return run(asked.id()), true; }
  void synchronizeStream(const c10::Stream& awaited) const override {
    note("synchronize", "stream", awaited.id());
    run(awaited.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    note("synchronize", "device", current_stream);
    Locked locked(state().lock);
    for (auto& queue : state().queues) run(queue.first);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }  // without `override`: torch 2.6 does not ask
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
};

[[maybe_unused]] const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

}  // namespace

// The steps from the `first` on: lines with tabs between fields, valid until the same thread asks again.
extern "C" const char* counting_steps(int64_t first) {
  thread_local std::string text;
  text.clear();
  Locked locked(state().lock);
  for (auto at = first; at < numbers[STEPS]; at++) text += state().steps[at];
  return text.c_str();
}
