// The choice among the kernels of a trajectory.
#pragma once

#include "launch.h"
#include "row_plan.h"
#include "trajectory.cuh"

namespace tgdp::cuda {

// A plan and the kernel that it is for.
struct Choice {
  RowPlan plan;
  void (*kernel)(TrajectoryArguments) = nullptr;
};

// Takes clusters where they are cheaper than `choice`, or where there is no other, and the device has room for one.
void consider_clusters(const TrajectoryKernelCall& call, const RowDemand& demand, const Limits& limits, Choice& choice);

}  // namespace tgdp::cuda
