// emulate CASES SEED: as main.cpp, for the kernels of decoding.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "decode_case.h"

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: emulate CASES SEED\n"), 2;
  int const cases = std::atoi(arguments[1]);
  uint32_t const seed = static_cast<uint32_t>(std::atoi(arguments[2]));
  for (auto const& instance : fa::emu::decode_instances()) {
    auto const start = std::chrono::steady_clock::now();
    fa::emu::Report report;
    for (int i = 0; i < cases; ++i) {
      fa::emu::DecodeCase const c = fa::emu::random_case(instance, seed + static_cast<uint32_t>(i));
      std::string const wrong = fa::emu::check_decode(instance, c, report);
      if (wrong.empty()) continue;
      std::printf("FAILED  %s, %s\n%s\n", instance.name.c_str(), fa::emu::describe(c).c_str(), wrong.c_str());
      return 1;
    }
    double const seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("ok  %-44s %3d cases, %6llu wgmma, %6llu TMA loads, %.1f s\n", instance.name.c_str(), cases,
                static_cast<unsigned long long>(report.products), static_cast<unsigned long long>(report.loads), seconds);
    std::fflush(stdout);
  }
}
