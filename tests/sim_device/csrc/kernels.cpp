// Operators: views, copies and fills are the device's own and queued; everything else runs on the CPU, after
// the current stream was drained, and counts as one launch.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "checks.h"

namespace sim {

namespace {

using at::Tensor;

Runtime& runtime() { return Runtime::get(); }

thread_local int in_fallback = 0;

// -- tensors as the runtime sees them -------------------------------------------------------------

Address address_of(const Tensor& tensor) { return reinterpret_cast<Address>(tensor.const_data_ptr()); }

bool on_device(const Tensor& tensor) { return tensor.device().type() == at::kPrivateUse1; }

Range range_of(const Tensor& tensor) {
  if (!tensor.numel()) return {};
  int64_t last = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  return {address_of(tensor), static_cast<size_t>(last) * tensor.itemsize(), on_device(tensor)};
}

// Geometry without the tensor: queued work must not keep memory alive that its owner gave back.
struct Place {
  Address address;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;

  explicit Place(const Tensor& tensor)
      : address(address_of(tensor)),
        sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        dtype(tensor.scalar_type()) {}

  Tensor on_host() const {
    return at::from_blob(runtime().bytes_at(address), sizes, strides, at::TensorOptions().dtype(dtype));
  }
};

// Queued work runs inside whatever call waits for it: nothing of that call's modes may see it.
struct Unwatched {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard python{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

std::function<void()> copying(const Tensor& from, const Tensor& to) {
  return [source = Place(from), target = Place(to)] {
    Unwatched unwatched;
    target.on_host().copy_(source.on_host());
  };
}

void queue_copy(Engine engine, const Tensor& from, const Tensor& to) {
  size_t payload = to.numel() * to.itemsize();
  checked([&] { runtime().launch(engine, payload, {range_of(from), range_of(to)}, copying(from, to)); });
}

void finish_current() {
  checked([] { runtime().finish_stream(runtime().current_stream()); });
}

void drain_current() {
  checked([] { runtime().drain(runtime().current_stream()); });
}

// -- copies ---------------------------------------------------------------------------------------

// Inside the fallback: no copy that a real device would make.
void copy_unseen(const Tensor& from, const Tensor& to) {
  checked([&] {
    runtime().require_usable(range_of(from));
    runtime().require_usable(range_of(to));
    copying(from, to)();
  });
}

bool one_memcpy(const Tensor& from, const Tensor& to) {
  return from.scalar_type() == to.scalar_type() && from.strides() == to.strides() &&
         to.is_non_overlapping_and_dense() && from.is_conj() == to.is_conj() && from.is_neg() == to.is_neg();
}

void to_device(const Tensor& given, const Tensor& to, bool non_blocking) {
  Tensor from = given;
  if (!one_memcpy(from, to)) {
    from = given.to(to.scalar_type()).contiguous();  // on the host, in pageable memory
    if (!to.is_contiguous()) {
      Tensor whole = at::empty(to.sizes(), to.options());
      to_device(from, whole, false);
      queue_copy(Engine::on_device, whole, to);
      return;
    }
  }
  bool pinned = runtime().is_pinned(from.const_data_ptr());
  if (pinned) {
    queue_copy(Engine::to_device, from, to);
    if (!non_blocking) finish_current();
    return;
  }
  // The driver reads pageable memory before it returns.
  drain_current();
  checked([&] {
    runtime().require_usable(range_of(to));
    runtime().charge(Engine::to_device_pageable, to.numel() * to.itemsize());
    if (runtime().moves) copying(from, to)();
  });
  finish_current();
}

void to_host(const Tensor& given, const Tensor& to, bool non_blocking) {
  Tensor from = given;
  if (!one_memcpy(from, to)) {
    from = given.to(to.scalar_type()).contiguous();  // on the device
    if (!to.is_contiguous()) {
      Tensor whole = at::empty(to.sizes(), to.options());
      to_host(from, whole, false);
      const_cast<Tensor&>(to).copy_(whole);
      return;
    }
  }
  queue_copy(Engine::to_host, from, to);
  if (!non_blocking || !runtime().is_pinned(to.const_data_ptr())) finish_current();
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  Tensor source = self.sizes() == target.sizes() ? self : self.expand(target.sizes());
  if (!target.numel()) return target;
  if (in_fallback) {
    copy_unseen(source, target);
  } else if (on_device(source) && on_device(target)) {
    queue_copy(Engine::on_device, source, target);
  } else if (on_device(target)) {
    to_device(source, target, non_blocking);
  } else {
    to_host(source, target, non_blocking);
  }
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  at::native::resize_(target, self.sizes(), std::nullopt);
  return copy_from(self, target, false);
}

Tensor& fill(Tensor& self, const at::Scalar& value) {
  if (!self.numel()) return self;
  checked([&] {
    auto run = [target = Place(self), value] {
      Unwatched unwatched;
      target.on_host().fill_(value);
    };
    runtime().launch(Engine::kernel, self.numel() * self.itemsize(), {range_of(self)}, run);
  });
  return self;
}

Tensor& zero(Tensor& self) { return fill(self, 0); }

at::Scalar local_scalar_dense(const Tensor& self) {
  queue_copy(Engine::to_host, self, self);  // in place: the value is read below
  finish_current();
  Unwatched unwatched;
  return Place(self).on_host().item();
}

void record_stream(Tensor& self, c10::Stream stream) {
  std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  runtime().record_stream(reinterpret_cast<Address>(self.storage().data_ptr().get()), stream.id());
}

// -- factories and views --------------------------------------------------------------------------

c10::Allocator* memory() { return at::GetAllocator(at::kPrivateUse1); }

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, memory(), KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, memory(), KEYS, c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> at) {
  return at::native::as_strided_tensorimpl(self, size, stride, at);
}

const Tensor& resize(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}

Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

Tensor view(const Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }

Tensor unfold(const Tensor& self, int64_t axis, int64_t size, int64_t step) {
  return at::native::unfold(self, axis, size, step);
}

Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }

Tensor& set_storage(Tensor& self, at::Storage source) { return at::native::set_(self, source); }

Tensor& set_empty(Tensor& self) {
  at::Storage none(at::Storage::use_byte_size_t(), 0, memory(), true);
  return self.set_(none, 0, {0}, {1});
}

Tensor& set_view(Tensor& self, at::Storage source, int64_t at, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, at, size, stride);
}

// -- everything else ------------------------------------------------------------------------------

size_t bytes_of(const torch::jit::Stack& stack, size_t count) {
  size_t total = 0;
  for (size_t place = stack.size() - count; place < stack.size(); ++place) {
    if (stack[place].isTensor() && stack[place].toTensor().defined()) total += stack[place].toTensor().nbytes();
  }
  return total;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Clocked clocked;
  drain_current();
  size_t payload = bytes_of(*stack, op.schema().arguments().size());
  if (!in_fallback) {
    checked([&] {
      runtime().counters.fallbacks++;
      runtime().charge(Engine::kernel, payload);
    });
  }
  struct Inside {
    Inside() { ++in_fallback; }
    ~Inside() { --in_fallback; }
  } inside;
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &as_strided);
  library.impl("resize_", &resize);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("view", &view);
  library.impl("unfold", &unfold);
  library.impl("set_", &set_empty);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &set_view);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("fill_.Scalar", &fill);
  library.impl("zero_", &zero);
  library.impl("_local_scalar_dense", &local_scalar_dense);
  library.impl("record_stream", &record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace sim
