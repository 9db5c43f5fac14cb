// Whether the loops give the bits of torch's kernels on this machine.

#pragma once

#include <ATen/ops/norm_except_dim.h>

#include "node.h"

namespace wn_surgery {

inline uint32_t seed = 1;  // not torch's generator, whose state is the user's

inline Tensor numbers(at::IntArrayRef shape) {
  Tensor made = at::detail::empty_cpu(shape, at::kFloat);
  for (int64_t i = 0; i < made.numel(); ++i) {
    seed = seed * 1664525u + 1013904223u;
    made.mutable_data_ptr<float>()[i] = static_cast<float>(seed / 4294967296.0 - 0.3);
  }
  return made;
}

// Whether the norms over a middle axis are those of torch.
inline bool middle_agrees(bool fuse) {
  middle_fuses = fuse;
  for (const int64_t after : {16, 32, 48, 80}) {
    Member member;
    member.kernel = -1;
    member.eps = 0;
    member.v = numbers({37, 5, after});
    member.g = numbers({1, 5, 1});
    member.compute_middle();
    if (!at::equal(member.norms, at::norm_except_dim(member.v, 2, 1))) return false;
  }
  return true;
}

// Whether the loops give the bits of torch's kernels with vectors of so many floats.
inline bool agrees(int count) {
  lanes = count;
  for (const int64_t n : {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 72, 100, 129, 1000, 2047}) {
    Member member;
    member.kernel = 0;
    member.v = numbers({9, n});
    member.g = numbers({9, 1});
    const Tensor dw = numbers({9, n}), mine = at::detail::empty_cpu({9, n}, at::kFloat);
    const Tensor w = member.compute(), norms = member.norms;
    const auto [dv, dg] = at::_weight_norm_interface_backward(dw, member.v, member.g, norms, 0);
    member.norms = at::detail::empty_cpu({9, 1}, at::kFloat);
    member.compute_small(mine);
    const auto [my_dv, my_dg] = member.backward_small(dw);
    if (!at::equal(mine, w) || !at::equal(member.norms, norms) || !at::equal(my_dv, dv) ||
        !at::equal(my_dg, dg)) {
      return false;
    }
  }
  return true;
}

}  // namespace wn_surgery
