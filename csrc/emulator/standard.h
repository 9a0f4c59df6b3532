// The standard library's headers that the sources of an instance include: compiled once for all of them (emulate.py).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>
