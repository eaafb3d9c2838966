// What tests choose and learn of the emulation; part of no build but theirs.
#include "emulation.h"

extern "C" {

// order: 0 forward, 1 reverse, 2 random by `seed`. left_out: the barrier to leave out, -1 for none; `forget` numbers
// barriers anew.
void tgdp_emulation_choose(int order, uint64_t seed, int left_out, int forget) {
  auto& settings = tgdp::emulation::settings;
  settings.order = static_cast<tgdp::emulation::Order>(order);
  settings.seed = seed;
  settings.left_out = left_out;
  if (forget != 0) settings.barriers.clear();
}

// Barriers met since they were forgotten: places in the source.
int tgdp_emulation_barriers() { return static_cast<int>(tgdp::emulation::settings.barriers.size()); }

// Matrices loaded for tensor cores whose rows share banks, since the last answer.
int64_t tgdp_emulation_bank_conflicts() { return std::exchange(tgdp::emulation::settings.bank_conflicts, int64_t{0}); }

// Further turns of other accesses to shared memory, since the last answer; from now on they are counted, or not.
int64_t tgdp_emulation_access_conflicts(int watch) {
  tgdp::emulation::settings.watch_accesses = watch != 0;
  return std::exchange(tgdp::emulation::settings.access_conflicts, int64_t{0});
}

// Bytes of shared memory; clusters that run at once.
void tgdp_emulation_device(int sms, int shared_per_block, int shared_per_sm, int clusters) {
  auto& settings = tgdp::emulation::settings;
  settings.sms = sms;
  settings.shared_per_block = shared_per_block;
  settings.shared_per_sm = shared_per_sm;
  settings.clusters = clusters;
}

}  // extern "C"
