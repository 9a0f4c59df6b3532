// The calls of kernels that order something, and the one that is left out (machine.h, Site).
#include <cstring>
#include <map>

#include "machine.h"

namespace fa::emu {

static std::string left_out;
static std::map<std::pair<char const*, int>, std::map<char const*, bool>>
    known;  // file and line, what: is it left out?

static std::string name_of(Site const& site) {
  char const* const slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + " " + site.what;
}

bool Site::is_left_out() const {
  auto& at = known[{file, line}];
  auto const found = at.find(what);
  if (found != at.end()) return found->second;
  return at[what] = name_of(*this) == left_out;
}

void leave_out(std::string const& site) { left_out = site; }

std::set<std::string> sites() {
  std::set<std::string> all;
  for (auto const& [place, calls] : known) {
    for (auto const& [what, is_left_out] : calls) all.insert(name_of({what, place.first, place.second}));
  }
  return all;
}

}  // namespace fa::emu
