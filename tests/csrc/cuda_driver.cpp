// Compares emulated CUDA kernels with their CPU twins: `cuda_driver compare OP FIRST_SEED SEEDS` prints a line for each
// difference and exits with 1 when there is one; `cuda_driver large OP` prints the memory traffic of one large run.
#include <cstdlib>
#include <cstring>

#include "cuda_check.h"

extern "C" const char* aligner_emulation_traffic(int index, uint64_t* launches, uint64_t* load_sectors,
                                                 uint64_t* store_sectors);

int main(int count, char** arguments) {
  const bool compare = count == 5 && strcmp(arguments[1], "compare") == 0;
  const bool large = count == 3 && strcmp(arguments[1], "large") == 0;
  const check::Cases* cases = check::Cases::first;
  while (cases && count > 2 && strcmp(cases->name, arguments[2]) != 0) cases = cases->next;
  if (!cases || !(compare || (large && cases->large))) {
    fprintf(stderr, "usage: cuda_driver compare OP FIRST_SEED SEEDS | cuda_driver large OP\n");
    return 2;
  }
  if (compare) {
    const int first = atoi(arguments[3]), seeds = atoi(arguments[4]);
    for (int seed = first; seed < first + seeds; ++seed) {
      aligner_emulation_set_seed(seed);
      check::Random random(seed);
      cases->compare(random);
      if (check::failures == 0) continue;
      printf("%s, seed %d: %d comparisons failed\n", cases->name, seed, check::failures);
      return 1;
    }
    return 0;
  }
  cases->large();
  uint64_t launches, loads, stores;
  for (int i = 0; const char* kernel = aligner_emulation_traffic(i, &launches, &loads, &stores); ++i) {
    printf("moved %s %lu %lu %lu\n", kernel, (unsigned long)launches, (unsigned long)loads * 32,
           (unsigned long)stores * 32);
  }
  return check::failures > 0;
}
