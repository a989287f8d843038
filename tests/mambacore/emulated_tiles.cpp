// The code for AMX tiles with the tiles in software: the products of layers equal those without tiles, bit for bit.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
} tiles[8];

void _tile_loadconfig(const void* shapes) {
  const auto* at = static_cast<const uint8_t*>(shapes);
  for (int tile = 0; tile < 8; ++tile) {
    uint16_t bytes;
    std::memcpy(&bytes, at + 16 + 2 * tile, sizeof bytes);
    tiles[tile].bytes = bytes, tiles[tile].rows = at[48 + tile];
  }
}
void _tile_release() {
  for (Tile& tile : tiles) tile.rows = tile.bytes = 0;
}
void _tile_zero(int tile) { std::memset(tiles[tile].data, 0, sizeof tiles[tile].data); }
void _tile_loadd(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < tiles[tile].rows; ++row)
    std::memcpy(tiles[tile].data[row], static_cast<const uint8_t*>(from) + row * stride, size_t(tiles[tile].bytes));
}
void _tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < tiles[tile].rows; ++row)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles[tile].data[row], size_t(tiles[tile].bytes));
}
// Signed bytes of `left` times unsigned bytes of `right`, four neighbours at a time.
void _tile_dpbsud(int sums, int left, int right) {
  const Tile &a = tiles[left], &b = tiles[right];
  if (a.bytes != 4 * b.rows || tiles[sums].rows != a.rows || tiles[sums].bytes != b.bytes) std::puts("shapes do not fit"), std::exit(1);
  for (int row = 0; row < a.rows; ++row)
    for (int column = 0; column < b.bytes / 4; ++column) {
      int32_t sum;
      std::memcpy(&sum, tiles[sums].data[row] + 4 * column, sizeof sum);
      for (int byte = 0; byte < a.bytes; ++byte)
        sum += int32_t(int8_t(a.data[row][byte])) * int32_t(b.data[byte / 4][4 * column + byte % 4]);
      std::memcpy(tiles[sums].data[row] + 4 * column, &sum, sizeof sum);
    }
}

}  // namespace

#define MAMBACORE_EMULATED_TILES
#include "panels.h"

std::atomic<mambacore::Team> mambacore::team{nullptr};

int main() {
  using namespace mambacore::MAMBACORE_INSTRUCTION_SET;
  if (!multiplies_tiles()) return std::puts("the known product does not add up"), 1;
  uint32_t state = 3;
  const auto next = [&] { return state = state * 1664525u + 1013904223u, state >> 8; };
  for (const int64_t inputs : {4, 36, 64, 76, 128, 200}) {
    for (const int64_t outputs : {16, 36, 64, 100, 256}) {
      for (const int64_t items : {8, 16, 21, 64}) {
        const int64_t padded_outputs = (outputs + 15) / 16 * 16;
        RoundedInputs rounded(items, inputs), again(items, inputs);
        PanelLayer<float> layer{nullptr, MAMBACORE_INT8, inputs, outputs, nullptr, &rounded};
        std::vector<uint8_t> weights(size_t(padded_outputs / 16 * layer.stride()));
        for (uint8_t& weight : weights) weight = uint8_t(next());
        for (int64_t panel_at = 0; panel_at < padded_outputs / 16; ++panel_at)
          for (int64_t output = 0; output < 16; ++output) {
            const float scale = float(next() % 1000 + 1) / 1000;
            std::memcpy(weights.data() + (panel_at + 1) * layer.stride() - 64 + 4 * output, &scale, sizeof scale);
          }
        layer.weight = weights.data();
        std::vector<float> from(size_t(items * inputs)), bias(size_t(padded_outputs), 0.25f);
        std::vector<float> by_tiles(size_t(items * padded_outputs)), alone(size_t(items * padded_outputs));
        layer.bias = bias.data();
        for (float& number : from) number = float(next() % 2000) / 1000 - 1;
        std::vector<const float*> sources;
        std::vector<float*> first, second;
        for (int64_t item = 0; item < items; ++item) {
          sources.push_back(from.data() + item * inputs);
          first.push_back(by_tiles.data() + item * padded_outputs);
          second.push_back(alone.data() + item * padded_outputs);
        }
        layer.all(sources.data(), first.data(), items);
        layer.rounded = &again;
        for (int64_t item = 0; item < items; ++item) layer.all(sources.data() + item, second.data() + item, 1);
        if (by_tiles != alone) return std::printf("%d inputs, %d outputs, %d items differ\n", int(inputs), int(outputs), int(items)), 1;
      }
    }
  }
  return std::puts("equal"), 0;
}
