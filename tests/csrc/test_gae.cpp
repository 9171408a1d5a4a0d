#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "gae.h"

int main() {  // two sequences, gamma = lam = 1: an advantage is the reward to go minus the value; token 1 is no action
  const float rewards[] = {0, 7, 0, 1, 2}, values[] = {.5f, 7, .25f, .125f, 1};
  const bool action[] = {true, false, true, true, true};
  const int32_t cu_seqlens[] = {0, 4, 5};
  const float want[] = {.5f, 0, .75f, .875f, 1};
  int failures = 0;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (!aligner::force_cpu_isa(isa)) continue;
    float advantages[5], returns[5];
    aligner::gae_cpu({rewards, values, action, cu_seqlens, advantages, returns, 2, 1.0, 1.0});
    for (int t = 0; t < 5; ++t) {
      if (advantages[t] == want[t] && returns[t] == (action[t] ? want[t] + values[t] : 0)) continue;
      std::printf("%s: advantage %d is %g, want %g\n", isa, t, advantages[t], want[t]);
      ++failures;
    }
  }
  return failures;
}
