// Errors of the runtime as torch raises them.
#pragma once

#include <c10/util/Exception.h>

#include "runtime.h"

namespace sim {

template <class Function>
void checked(Function function) {
  try {
    Entry entry;
    function();
  } catch (const OutOfMemory& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
  } catch (const Error& error) {
    TORCH_CHECK(false, error.what());
  }
}

}  // namespace sim
