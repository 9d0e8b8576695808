// The pieces of a PLIF on [-bound, bound], numbered from the left (monosoftmax/transforms/plif.py).
#pragma once

#include <cstdint>

namespace monosoftmax {

// The largest slope of a piece: SCALE_LIMIT in monosoftmax/transforms/base.py.
constexpr double kMostSlope = 1e4;

struct PlifGrid {
  int64_t pieces;
  int64_t centre;  // the piece that contains 0
  double inside;   // distance of 0 from the left end of that piece
  double width;    // of a piece
};

inline PlifGrid plif_grid(int64_t pieces, double bound) {
  const double width = 2 * bound / static_cast<double>(pieces);
  const auto found = static_cast<int64_t>(bound / width);
  const int64_t centre = found < pieces ? found : pieces - 1;
  return {pieces, centre, bound - static_cast<double>(centre) * width, width};
}

}  // namespace monosoftmax
