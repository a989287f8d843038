// Root-mean-square normalisation on a CPU: y = x / sqrt(mean(x^2) + epsilon) * weight, row by row. Where there is a gate z,
// x is x * silu(z), which is never written: what one row needs of it stays in the cache.

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

template <typename Element> struct Rows {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  const MambacoreNorm& norm;

  int64_t units() const { return (norm.width + lanes - 1) / lanes; }
  int width(int64_t unit) const { return static_cast<int>(std::min<int64_t>(lanes, norm.width - unit * lanes)); }
  Vector read(const void* data, int64_t row, int64_t unit) const {
    return load<Real>(static_cast<const Element*>(data) + row * norm.width + unit * lanes, width(unit));
  }
  void write(void* data, int64_t row, int64_t unit, Vector value) const {
    store(static_cast<Element*>(data) + row * norm.width + unit * lanes, value, width(unit));
  }
  Vector weight(int64_t unit) const { return load(static_cast<const Real*>(norm.weight) + unit * lanes, width(unit)); }
  Vector gate(int64_t row, int64_t unit) const {
    return load<Real>(static_cast<const Element*>(norm.gate) + row * norm.gate_stride + unit * lanes, width(unit));
  }
  Real* inverse() const { return static_cast<Real*>(norm.inverse); }
};

template <typename Element> void gated_forward(const MambacoreNorm& norm) {
  using Real = typename Rows<Element>::Real;
  const Rows<Element> rows{norm};
  parallel_for(norm.segments, norm.threads, [&](int64_t segment) {
    Scratch<Lanes<Real>> values(rows.units());
    for (int64_t row = norm.rows * segment / norm.segments; row < norm.rows * (segment + 1) / norm.segments; ++row) {
      Lanes<Real> squares = Lanes<Real>{};
      for (int64_t unit = 0; unit < rows.units(); ++unit) {
        const auto gate = rows.gate(row, unit);
        values[unit] = rows.read(norm.inputs, row, unit) * gate * sigmoid_lanes<Real>(gate);
        squares += values[unit] * values[unit];
      }
      const Real mean = sum_of_lanes<Real>(squares) / static_cast<Real>(norm.width);
      const Real inverse = Real(1) / std::sqrt(mean + static_cast<Real>(norm.epsilon));
      rows.inverse()[row] = inverse;
      for (int64_t unit = 0; unit < rows.units(); ++unit)
        rows.write(norm.outputs, row, unit, values[unit] * inverse * rows.weight(unit));
    }
  });
}

// As `backward`, with v = x * silu(z) for x: grad_x = silu(z) * grad_v, grad_z = x * silu'(z) * grad_v.
template <typename Element> void gated_backward(const MambacoreNorm& norm) {
  using Real = typename Rows<Element>::Real;
  const Rows<Element> rows{norm};
  parallel_for(norm.segments, norm.threads, [&](int64_t segment) {
    Scratch<Lanes<Real>> grad_weight(rows.units()), opened(rows.units());
    for (int64_t row = norm.rows * segment / norm.segments; row < norm.rows * (segment + 1) / norm.segments; ++row) {
      const Real inverse = rows.inverse()[row];
      Lanes<Real> products = Lanes<Real>{};
      for (int64_t unit = 0; unit < rows.units(); ++unit) {
        const auto gate = rows.gate(row, unit);
        opened[unit] = sigmoid_lanes<Real>(gate);
        const auto along = rows.read(norm.grad_outputs, row, unit) * rows.read(norm.inputs, row, unit) * gate * opened[unit];
        products += along * rows.weight(unit);
        grad_weight[unit] += along * inverse;
      }
      const Real pull = sum_of_lanes<Real>(products) / static_cast<Real>(norm.width) * inverse * inverse;
      for (int64_t unit = 0; unit < rows.units(); ++unit) {
        const auto gate = rows.gate(row, unit), input = rows.read(norm.inputs, row, unit), silu = gate * opened[unit];
        const auto grad = (rows.read(norm.grad_outputs, row, unit) * rows.weight(unit) - input * silu * pull) * inverse;
        rows.write(norm.grad_inputs, row, unit, grad * silu);
        rows.write(norm.grad_gate, row, unit, grad * input * (opened[unit] + silu * (Real(1) - opened[unit])));
      }
    }
    for (int64_t unit = 0; unit < rows.units(); ++unit)
      store<Real>(static_cast<Real*>(norm.grad_weight) + segment * norm.width + unit * rows.lanes, grad_weight[unit], rows.width(unit));
  });
}

template <typename Element> void forward(const MambacoreNorm& norm) {
  using Real = typename Rows<Element>::Real;
  const Rows<Element> rows{norm};
  parallel_for(norm.segments, norm.threads, [&](int64_t segment) {
    for (int64_t row = norm.rows * segment / norm.segments; row < norm.rows * (segment + 1) / norm.segments; ++row) {
      Lanes<Real> squares = Lanes<Real>{};
      for (int64_t unit = 0; unit < rows.units(); ++unit) {
        const auto value = rows.read(norm.inputs, row, unit);
        squares += value * value;
      }
      const Real mean = sum_of_lanes<Real>(squares) / static_cast<Real>(norm.width);
      const Real inverse = Real(1) / std::sqrt(mean + static_cast<Real>(norm.epsilon));
      rows.inverse()[row] = inverse;
      for (int64_t unit = 0; unit < rows.units(); ++unit)
        rows.write(norm.outputs, row, unit, rows.read(norm.inputs, row, unit) * inverse * rows.weight(unit));
    }
  });
}

// With r the inverse root mean square and g = weight * grad_output: grad_x = r * (g - x * r^2 * mean(g * x)).
template <typename Element> void backward(const MambacoreNorm& norm) {
  using Real = typename Rows<Element>::Real;
  const Rows<Element> rows{norm};
  parallel_for(norm.segments, norm.threads, [&](int64_t segment) {
    Scratch<Lanes<Real>> grad_weight(rows.units());
    for (int64_t row = norm.rows * segment / norm.segments; row < norm.rows * (segment + 1) / norm.segments; ++row) {
      const Real inverse = rows.inverse()[row];
      Lanes<Real> products = Lanes<Real>{};
      for (int64_t unit = 0; unit < rows.units(); ++unit) {
        const auto grad = rows.read(norm.grad_outputs, row, unit);
        const auto along = grad * rows.read(norm.inputs, row, unit);
        products += along * rows.weight(unit);
        grad_weight[unit] += along * inverse;
      }
      const Real pull = sum_of_lanes<Real>(products) / static_cast<Real>(norm.width) * inverse * inverse;
      for (int64_t unit = 0; unit < rows.units(); ++unit) {
        const auto grad = rows.read(norm.grad_outputs, row, unit) * rows.weight(unit);
        rows.write(norm.grad_inputs, row, unit, (grad - rows.read(norm.inputs, row, unit) * pull) * inverse);
      }
    }
    for (int64_t unit = 0; unit < rows.units(); ++unit)
      store<Real>(static_cast<Real*>(norm.grad_weight) + segment * norm.width + unit * rows.lanes, grad_weight[unit], rows.width(unit));
  });
}

}  // namespace

void norm_forward(const MambacoreNorm& norm) {
  with_element(norm.element, [&](auto element) {
    if (norm.gate) gated_forward<decltype(element)>(norm);
    else forward<decltype(element)>(norm);
  });
}
void norm_backward(const MambacoreNorm& norm) {
  with_element(norm.element, [&](auto element) {
    if (norm.gate) gated_backward<decltype(element)>(norm);
    else backward<decltype(element)>(norm);
  });
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
