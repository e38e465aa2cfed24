// A device that stands in for a GPU where there is none.
//
// Its memory is the CPU's, and so are its kernels; but it refuses what a GPU refuses: tensors from
// elsewhere among the arguments, and, while a graph is recorded, that a value is looked at. What is
// recorded leaves all memory as it was, and is done when it is replayed, on the same memory.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <functional>
#include <map>
#include <vector>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

using Tape = std::vector<std::function<void()>>;
auto& tapes = *new std::vector<Tape>;  // Never destroyed: what holds tensors may live longer.
bool recording = false;

void did(std::function<void()> again) {
  if (recording) tapes.back().push_back(std::move(again));
}

void look() {
  TORCH_CHECK(!recording, "a value was moved off or onto the device while a graph was recorded");
}

// ------------------------------------------------------------------------- memory

auto& blocks = *new std::map<void*, size_t>;

void give_back(void* data) {
  blocks.erase(data);
  c10::free_cpu(data);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    if (data != nullptr) blocks[data] = bytes;
    return {data, data, &give_back, c10::Device(kType, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* into, const void* from, std::size_t bytes) const override {
    default_copy_data(into, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(kType, &memory);

// The same memory, as a CPU's.
at::Tensor seen(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(),
                       tensor.options().device(at::kCPU).requires_grad(false));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, type);
}

const at::Tensor& resize(const at::Tensor& tensor, c10::IntArrayRef size,
                         std::optional<at::MemoryFormat>) {
  auto* it = tensor.unsafeGetTensorImpl();
  it->set_sizes_contiguous(size);
  const size_t bytes = (it->storage_offset() + it->numel()) * it->itemsize();
  if (auto* storage = it->storage().unsafeGetStorageImpl(); bytes > storage->nbytes()) {
    storage->set_data_ptr_noswap(memory.allocate(bytes));
    storage->set_nbytes(bytes);
  }
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset,
                        c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* it = tensor.unsafeGetTensorImpl();
  it->set_storage_keep_dtype(std::move(storage));
  it->set_storage_offset(offset);
  it->set_sizes_and_strides(size, stride);
  return tensor;
}

at::Tensor& set_whole(at::Tensor& tensor, at::Storage storage) {
  const int64_t size = storage.nbytes() / tensor.element_size();
  return set_storage(tensor, std::move(storage), 0, {size}, {1});
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& into, bool) {
  if (from.device() != into.device()) look();
  seen(into).copy_(seen(from));
  did([from, into] { seen(into).copy_(seen(from)); });
  return into;
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  look();
  return at::native::_local_scalar_dense_cpu(seen(tensor));
}

// ------------------------------------------------------------------------- kernels

// What it is done with, done by the CPU; the results are moved here.
at::Tensor taken(const at::Tensor& made) {
  if (!made.defined()) return made;
  auto here = empty_strided(made.sizes(), made.strides(), made.scalar_type(), {}, {}, {});
  seen(here).copy_(made);
  return here;
}

using Tensors = std::vector<at::Tensor>;

Tensors done(std::function<Tensors()> work) {
  Tensors results;
  for (const at::Tensor& made : work()) results.push_back(taken(made));
  did([work, results] {
    const Tensors made = work();
    for (size_t i = 0; i < made.size(); ++i)
      if (made[i].defined()) seen(results[i]).copy_(made[i]);
  });
  return results;
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, c10::IntArrayRef stride,
                       c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef more, int64_t groups) {
  const bool biased = bias && bias->defined();
  return done([=, b = biased ? *bias : at::Tensor(), stride = stride.vec(), padding = padding.vec(),
               dilation = dilation.vec(), more = more.vec()]() -> Tensors {
    return {at::convolution(seen(x), seen(weight), biased ? std::optional(seen(b)) : std::nullopt,
                            stride, padding, dilation, transposed, more, groups)};
  })[0];
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef more,
    int64_t groups, std::array<bool, 3> want) {
  const std::vector<int64_t> bias{weight.size(transposed ? 1 : 0)};
  const auto results = done([=, stride = stride.vec(), padding = padding.vec(),
                             dilation = dilation.vec(), more = more.vec()]() {
    auto [a, b, c] = at::convolution_backward(
        seen(grad), seen(x), seen(weight), want[2] ? at::OptionalIntArrayRef(bias) : std::nullopt,
        stride, padding, dilation, transposed, more, groups, want);
    return Tensors{a, b, c};
  });
  return {results[0], results[1], results[2]};
}

// Replaces the tensors of some values of a stack, in their order; `map` also gets the value's place.
void replace_tensors(torch::jit::Stack& stack, size_t begin,
                     const std::function<at::Tensor(const at::Tensor&, size_t)>& map) {
  for (size_t i = begin; i < stack.size(); ++i) {
    c10::IValue& each = stack[i];
    if (each.isTensor()) {
      each = map(each.toTensor(), i - begin);
    } else if (each.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : each.toTensorList()) list.push_back(map(tensor, i - begin));
      each = list;
    } else if (each.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : each.toOptionalTensorVector())
        list.push_back(tensor ? std::optional(map(*tensor, i - begin)) : std::nullopt);
      each = list;
    } else if (each.isDevice()) {
      each = at::Device(at::kCPU);
    } else if (each.isGenerator()) {
      TORCH_CHECK(each.toGenerator().device().type() == kType, "Expected a generator of the device");
    }
  }
}

// Anything else is done by the CPU's kernel in the same memory, if all that it gets is here.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::vector<std::pair<at::Tensor, at::Tensor>> lent;  // One here, and what the CPU sees of it.
  const size_t begin = stack->size() - schema.arguments().size();
  replace_tensors(*stack, begin, [&](const at::Tensor& tensor, size_t place) {
    if (!tensor.defined()) return tensor;
    TORCH_CHECK(tensor.device().type() == kType || tensor.dim() == 0,
                "Expected all tensors to be on the same device: ", schema.name(), " got one on ",
                tensor.device());
    // A result that is to be made larger cannot be so in memory that is lent.
    const auto* alias = schema.arguments()[place].alias_info();
    const bool grows = alias != nullptr && alias->isWrite() && tensor.numel() == 0;
    const auto options = tensor.options().device(at::kCPU);
    lent.emplace_back(tensor, grows ? at::empty({0}, options) : seen(tensor));
    return lent.back().second;
  });
  auto home = [lent](const at::Tensor& tensor) {
    for (const auto& [here, there] : lent)
      if (tensor.is_same(there)) return here;
    return at::Tensor();
  };
  auto run = [=](torch::jit::Stack own) {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &own);
    for (const auto& [here, there] : lent) {
      if (there.numel() == 0 || here.data_ptr() == there.data_ptr()) continue;
      if (here.numel() == 0) resize(here, there.sizes(), std::nullopt);
      seen(here).copy_(there);
    }
    return own;
  };
  const torch::jit::Stack arguments(stack->begin() + begin, stack->end());
  torch::jit::Stack returned = run(arguments);
  Tensors results;
  replace_tensors(returned, 0, [&](const at::Tensor& tensor, size_t) {
    if (const auto here = home(tensor); here.defined()) return here;
    results.push_back(taken(tensor));
    return results.back();
  });
  for (const auto& each : returned)
    if (each.isScalar() || each.isBool()) look();
  did([=] {
    size_t next = 0;
    torch::jit::Stack again = run(arguments);
    replace_tensors(again, 0, [&](const at::Tensor& tensor, size_t) {
      if (home(tensor).defined()) return tensor;
      const at::Tensor& into = results[next++];
      if (tensor.defined()) seen(into).copy_(tensor);
      return tensor;
    });
  });
  stack->erase(stack->begin() + begin, stack->end());
  stack->insert(stack->end(), returned.begin(), returned.end());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage", &set_whole);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("unfold", at::native::unfold);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("_copy_from", &copy_from);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}

std::map<void*, std::vector<char>> before;

}  // namespace

extern "C" {

int standin_begin() {
  for (const auto& [data, bytes] : blocks) {
    const char* start = static_cast<const char*>(data);
    before[data] = std::vector<char>(start, start + bytes);
  }
  tapes.emplace_back();
  recording = true;
  return static_cast<int>(tapes.size()) - 1;
}

void standin_end() {
  recording = false;
  for (const auto& [data, bytes] : before) {
    const auto block = blocks.find(data);  // Another one may be at that place by now.
    if (block != blocks.end() && block->second == bytes.size())
      std::memcpy(data, bytes.data(), bytes.size());
  }
  before.clear();
}

void standin_replay(int tape) {
  for (const auto& again : tapes[tape]) again();
}
}
