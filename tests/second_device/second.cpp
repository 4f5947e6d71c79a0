// A second device whose memory is host memory: it computes with the CPU's kernels, but is as strict as CUDA.
//
// Every operator without a kernel of its own here comes to `on_host`, which refuses tensors of another device and
// integers where CUDA has no kernel for them, lends the tensors' memory to CPU tensors, calls the operator on those and
// gives what it returns to the device again. What makes a GPU wait for the host, or the host for it, is counted.
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

namespace {

constexpr auto kSecond = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kSecond, 0);

// ---------------------------------------------------------------------------------------------------- counted events

std::mutex events_mutex;
py::object* listener = nullptr; // called with the kind of each event; null: no one listens

void report(const std::string& kind) {
  if (listener == nullptr) return;
  py::gil_scoped_acquire gil;
  std::lock_guard<std::mutex> lock(events_mutex);
  if (listener != nullptr) (*listener)(kind);
}

// ------------------------------------------------------------------------------------------------------------ memory

c10::DataPtr kept_by(const c10::Storage& owner, c10::Device where) {
  return {owner.mutable_data(), new c10::Storage(owner), [](void* held) { delete static_cast<c10::Storage*>(held); }, where};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return kept_by(
        c10::Storage(c10::Storage::use_byte_size_t(), static_cast<int64_t>(bytes), c10::GetCPUAllocator(), false), kDevice);
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};
Memory memory;
REGISTER_ALLOCATOR(kSecond, &memory)

struct PinnedMemory final : c10::Allocator {
  static std::set<const void*>& blocks() {
    static std::set<const void*> pointers;
    return pointers;
  }
  static std::mutex& mutex() {
    static std::mutex lock;
    return lock;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(mutex());
    blocks().insert(data);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      blocks().erase(data);
    }
    c10::free_cpu(data);
  }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex());
    return blocks().count(data) > 0;
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};
PinnedMemory pinned_memory;

// -------------------------------------------------------------------------------------------------- device, generator

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSecond; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream stream() const noexcept { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct SecondGenerator final : c10::GeneratorImpl {
  at::Generator host = at::detail::createCPUGenerator();
  SecondGenerator() : GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.unsafeGetGeneratorImpl()->seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  SecondGenerator* clone_impl() const override {
    auto* copy = new SecondGenerator();
    copy->host = host.clone();
    return copy;
  }
};

at::Generator& default_generator() {
  static auto generator = at::make_generator<SecondGenerator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<SecondGenerator>(); }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr grown = memory.allocate(bytes);
    memory.copy_data(grown.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(grown));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};
Hooks hooks;

// --------------------------------------------------------------------------------------------- operators on the host

// CPU tensors over the memory of the device's, for the time of one operator; and back again.
class Loan {
 public:
  c10::Storage host(const c10::Storage& owner) {
    auto found = hosts_.find(owner.unsafeGetStorageImpl());
    if (found != hosts_.end()) return found->second;
    c10::Storage lent(
        c10::Storage::use_byte_size_t(), owner.sym_nbytes(), kept_by(owner, c10::kCPU), c10::GetCPUAllocator(), true);
    hosts_.emplace(owner.unsafeGetStorageImpl(), lent);
    owners_.emplace(lent.unsafeGetStorageImpl(), owner);
    return lent;
  }

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kSecond) return tensor;
    at::Tensor lent = over(host(tensor.storage()), tensor, c10::DispatchKeySet(c10::DispatchKey::CPU));
    keys_.emplace(lent.storage().unsafeGetStorageImpl(), tensor.key_set());
    tensors_.emplace(lent.unsafeGetTensorImpl(), std::make_pair(tensor, lent));
    return lent;
  }

  at::Tensor back(const at::Tensor& result) {
    if (!result.defined() || result.device().type() != c10::kCPU) return result;
    auto lent = tensors_.find(result.unsafeGetTensorImpl());
    if (lent != tensors_.end()) return lent->second.first;
    auto viewed = keys_.find(result.storage().unsafeGetStorageImpl());
    if (viewed != keys_.end()) return over(owner(result.storage()), result, viewed->second, true);
    return over(owner(result.storage()), result, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1));
  }

  // Sizes and memory that the operator changed, as `resize_`, `set_` and `out=` do.
  void settle() {
    for (auto& [impl, pair] : tensors_) {
      auto& [tensor, lent] = pair;
      c10::Storage kept = owner(lent.storage());
      auto* storage = kept.unsafeGetStorageImpl();
      if (storage->data() != lent.storage().data() || storage->nbytes() != lent.storage().nbytes()) {
        storage->set_data_ptr_noswap(kept_by(lent.storage(), kDevice));
        storage->set_nbytes(lent.storage().nbytes());
      }
      auto* own = tensor.unsafeGetTensorImpl();
      if (tensor.storage().unsafeGetStorageImpl() != storage) own->set_storage_keep_dtype(kept);
      if (tensor.sizes() != lent.sizes() || tensor.strides() != lent.strides())
        own->set_sizes_and_strides(lent.sizes(), lent.strides());
      if (tensor.storage_offset() != lent.storage_offset()) own->set_storage_offset(lent.storage_offset());
    }
  }

 private:
  c10::Storage owner(const c10::Storage& lent) {
    auto found = owners_.find(lent.unsafeGetStorageImpl());
    if (found != owners_.end()) return found->second;
    c10::Storage made(c10::Storage::use_byte_size_t(), lent.sym_nbytes(), kept_by(lent, kDevice), &memory, true);
    owners_.emplace(lent.unsafeGetStorageImpl(), made);
    return made;
  }

  // A view keeps the keys of what it shows: in inference mode that of a common tensor is a common one, too.
  static at::Tensor over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKeySet keys, bool view = false) {
    auto tensor = view
        ? at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storage), keys, like.dtype())
        : at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
    tensor.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
    tensor._set_conj(like.is_conj());
    tensor._set_neg(like.is_neg());
    return tensor;
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts_, owners_;
  std::unordered_map<c10::StorageImpl*, c10::DispatchKeySet> keys_; // of the tensors whose memory is lent
  std::unordered_map<c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> tensors_;
};

bool contains(const std::string& name, std::initializer_list<const char*> parts) {
  return std::any_of(parts.begin(), parts.end(), [&](const char* part) { return name.find(part) != std::string::npos; });
}

bool among(const std::string& name, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* one) { return name == one; });
}

// CUDA takes a CPU tensor without dimensions where it takes a number, and CPU indices.
bool may_lie_on_cpu(const c10::OperatorHandle& op, const std::string& argument, const at::Tensor& tensor) {
  const std::string name = op.schema().name();
  if (argument == "indices" && contains(name, {"aten::index", "aten::_index_put_impl_", "aten::_unsafe_index"})) {
    report("copy to the device");
    return true;
  }
  if (tensor.dim() > 0) return false;
  return op.hasTag(at::Tag::pointwise) || contains(name, {"masked_fill", "index_put", "fill_", "where"});
}

void check_devices(const c10::OperatorHandle& op, const std::string& argument, const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() == kSecond) return;
  TORCH_CHECK(
      tensor.device().type() == c10::kCPU && may_lie_on_cpu(op, argument, tensor),
      "Expected all tensors to be on the same device, but argument ", argument, " of ", op.schema().name(), " is on ",
      tensor.device(), " and others are on ", kDevice);
}

// Operators that CUDA has for floating-point numbers only, where the CPU takes integers also.
void check_numbers(const std::string& name, const at::Tensor& tensor) {
  const bool floats_only = contains(
      name, {"linear1d", "linear2d", "linear3d", "bicubic2d", "max_pool", "avg_pool", "reflection_pad", "replication_pad",
             "grid_sampler", "convolution", "cdist"}) || among(name, {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm",
             "aten::addmv", "aten::addmv_", "aten::mv", "aten::dot", "aten::vdot"});
  TORCH_CHECK(
      !floats_only || at::isFloatingType(tensor.scalar_type()) || at::isComplexType(tensor.scalar_type()),
      name, " is not implemented for ", tensor.scalar_type(), " on CUDA");
  TORCH_CHECK(!contains(name, {"aten::histogram", "aten::_histogramdd"}), name, " is not implemented on CUDA");
}

void run(const c10::OperatorHandle& op, const c10::OperatorHandle& called, bool redispatch, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const std::string name = op.schema().name();
  if (contains(name, {"nonzero", "masked_select", "_unique", "unique_", "aten::equal", "bincount"}) ||
      (name == "aten::repeat_interleave" && torch::jit::last(stack, arguments.size()).back().isNone()))
    report("wait for the device (" + name + ")");

  Loan loan;
  const size_t count = arguments.size();
  const size_t begin = stack->size() - count;
  bool first = true;
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[begin + i];
    const auto& argument = arguments[i];
    if (value.isTensor()) {
      const auto& tensor = value.toTensor();
      check_devices(op, argument.name(), tensor);
      if (first && tensor.defined()) check_numbers(name, tensor);
      first = false;
      value = loan.host(tensor);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> lent;
      for (const at::Tensor tensor : value.toTensorVector()) {
        check_devices(op, argument.name(), tensor);
        lent.push_back(loan.host(tensor));
      }
      value = lent;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> lent;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        if (tensor.has_value()) check_devices(op, argument.name(), *tensor);
        lent.push_back(tensor.has_value() ? std::optional(loan.host(*tensor)) : std::nullopt);
      }
      value = lent;
    } else if (value.isStorage()) {
      value = loan.host(value.toStorage());
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (argument.name() == "generator") {
      at::Generator generator = value.isNone() ? default_generator() : value.toGenerator();
      TORCH_CHECK(
          generator.device().type() == kSecond,
          "Expected a '", kSecond, "' device type for generator but found '", generator.device(), "' in ", name);
      value = static_cast<SecondGenerator*>(generator.unsafeGetGeneratorImpl())->host;
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (redispatch)
      called.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    else
      called.callBoxed(stack);
  }
  loan.settle();
  for (size_t i = stack->size() - called.schema().returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = loan.back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> given;
      for (const at::Tensor tensor : value.toTensorVector()) given.push_back(loan.back(tensor));
      value = given;
    }
  }
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { run(op, op, true, stack); }

// The convolution of a backend from outside, by the CPU's.
void convolution(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run(op, c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", ""), false, stack);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  for (const auto& tensor : {grad, input, weight})
    TORCH_CHECK(tensor.device() == kDevice, "Expected all tensors to be on the same device in convolution_backward");
  Loan loan;
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  at::AutoDispatchBelowADInplaceOrView below;
  auto [by_input, by_weight, by_bias] = at::convolution_backward(
      loan.host(grad), loan.host(input), loan.host(weight), {{channels}}, stride, padding, dilation, transposed,
      output_padding, groups, mask);
  return {loan.back(by_input), loan.back(by_weight), loan.back(by_bias)};
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (to.device().type() == c10::kCPU)
    report("copy to the host");
  else if (from.device().type() == c10::kCPU)
    report(non_blocking ? "asynchronous copy to the device" : "copy to the device");
  Loan loan;
  at::AutoDispatchBelowADInplaceOrView below;
  loan.host(to).copy_(loan.host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  report("item");
  Loan loan;
  at::AutoDispatchBelowADInplaceOrView below;
  return at::_local_scalar_dense(loan.host(tensor));
}

int64_t choose_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

// Autocast by CUDA's lists, which are not the CPU's.
#define TO_LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define TO_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define TO_FP32_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define TO_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
using namespace at;
using namespace at::autocast;
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(TO_LOW)
  AT_FORALL_FP32(TO_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(TO_FP32_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(TO_WIDEST)
}

} // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
} // namespace at::native

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register", [] { at::RegisterPrivateUse1HooksInterface(&hooks); });
  m.def("default_generator", [] { return default_generator(); });
  m.def("listen", [](const py::object& called) {
    std::lock_guard<std::mutex> lock(events_mutex);
    delete listener;
    listener = called.is_none() ? nullptr : new py::object(called);
  });
}
