// Takes training steps of two small networks, with the sanitizers that scripts/sanitize.py compiles
// in. Every buffer is exactly as large as its tensor, so that a step past its end is seen.

#include "../src/normlab/kernels/steps.cpp"

#include <cstdio>
#include <vector>

namespace {

struct Network {
  std::vector<std::vector<char>> memory;
  std::vector<Instruction> program;

  int64_t make(int64_t bytes) {
    memory.emplace_back(bytes);
    return static_cast<int64_t>(memory.size()) - 1;
  }
  int64_t values(int64_t count, float value = 0) {
    const int64_t place = make(count * 4);
    for (int64_t i = 0; i < count; ++i)
      reinterpret_cast<float*>(memory[place].data())[i] = value + 0.01f * static_cast<float>(i % 7);
    return place;
  }
  void write(Operation operation, std::vector<int64_t> operands, std::vector<int64_t> sizes,
             std::vector<double> numbers = {}) {
    Instruction one{operation, {-1, -1, -1, -1, -1, -1, -1, -1}, {}, {}};
    std::copy(operands.begin(), operands.end(), one.operands);
    std::copy(sizes.begin(), sizes.end(), one.sizes);
    std::copy(numbers.begin(), numbers.end(), one.numbers);
    program.push_back(one);
  }
};

double train(bool batch, bool adam) {
  using O = Operation;
  const int64_t images = 9, pixels = 5, n = 3, width = 6, classes = 4, steps = 3;
  Network net;
  const int64_t data = net.make(images * pixels), labels = net.make(images * 8);
  for (int64_t i = 0; i < images; ++i)
    reinterpret_cast<int64_t*>(net.memory[labels].data())[i] = i % classes;
  const int64_t order = net.make(images * 8), masks = net.values(steps * n * width, 1);
  for (int64_t i = 0; i < images; ++i)
    reinterpret_cast<int64_t*>(net.memory[order].data())[i] = images - 1 - i;
  const int64_t w1 = net.values(width * pixels), b1 = net.values(width), gamma = net.values(width, 1);
  const int64_t beta = net.values(width), w2 = net.values(classes * width), b2 = net.values(classes);
  const int64_t mean = net.values(width), var = net.values(width, 1), counter = net.make(8);
  auto matrix = [&](int64_t columns) { return net.values(n * columns); };
  const int64_t x = matrix(pixels), y = net.make(n * 8), one = net.values(1, 1), loss = net.values(1);
  const int64_t largest = net.make(n * 8), equal = net.make(n), hits = net.make(8);
  net.write(O::kGather, {data, order, x}, {n, pixels}, {1.0 / 255, 0});
  net.write(O::kLabels, {labels, order, y}, {n});
  const int64_t z = matrix(width), normed = matrix(width), active = matrix(width);
  const int64_t dropped = matrix(width), logits = matrix(classes), log = matrix(classes);
  net.write(O::kProduct, {b1, x, w1, z}, {n, width, pixels, 0, 1});
  const int64_t kept = batch ? net.make(2 * width * 8) : net.values(2 * n * 2);
  if (batch) {
    net.write(O::kCount, {counter}, {});
    net.write(O::kBatchNorm, {z, gamma, beta, mean, var, normed, kept}, {n, width, 1},
              {0.1, 1e-5});
  } else {
    net.write(O::kGroupNorm, {z, gamma, beta, normed, kept}, {n, width, 2, 1}, {0, 1e-5});
  }
  net.write(batch ? O::kReLU : O::kTanh, {normed, active}, {n * width});
  net.write(O::kMultiply, {active, masks, dropped}, {n * width});
  net.write(O::kProduct, {b2, dropped, w2, logits}, {n, classes, width, 0, 1});
  net.write(O::kLogSoftmax, {logits, log}, {n, classes});
  net.write(O::kNLL, {log, y, loss}, {n, classes});
  net.write(O::kArgmax, {logits, largest}, {n, classes});
  net.write(O::kEqual, {largest, y, equal}, {n});
  net.write(O::kCountEqual, {equal, hits}, {n});
  const int64_t by_log = matrix(classes), by_logits = matrix(classes), by_dropped = matrix(width);
  const int64_t by_active = matrix(width), by_normed = matrix(width), by_z = matrix(width);
  const int64_t by_w2 = net.values(classes * width), by_b2 = net.values(classes);
  const int64_t by_gamma = net.values(width), by_beta = net.values(width);
  const int64_t by_w1 = net.values(width * pixels), by_b1 = net.values(width);
  net.write(O::kNLLBackward, {one, y, by_log}, {n, classes});
  net.write(O::kLogSoftmaxBackward, {by_log, log, by_logits}, {n, classes});
  net.write(O::kProduct, {-1, by_logits, w2, by_dropped}, {n, width, classes, 0, 0});
  net.write(O::kProduct, {-1, by_logits, dropped, by_w2}, {classes, width, n, 1, 0});
  net.write(O::kColumnSums, {by_logits, by_b2}, {n, classes});
  net.write(O::kMultiply, {by_dropped, masks, by_active}, {n * width});
  net.write(batch ? O::kReLUBackward : O::kTanhBackward, {by_active, active, by_normed}, {n * width});
  if (batch)
    net.write(O::kBatchNormBackward, {by_normed, z, gamma, -1, kept, by_z, by_gamma, by_beta},
              {n, width, 1}, {0, 1e-5});
  else
    net.write(O::kGroupNormBackward, {by_normed, z, gamma, kept, by_z, by_gamma, by_beta},
              {n, width, 2, 1});
  net.write(O::kProduct, {-1, by_z, x, by_w1}, {width, pixels, n, 1, 0});
  net.write(O::kColumnSums, {by_z, by_b1}, {n, width});

  const std::vector<int64_t> moved{w1, b1, gamma, beta, w2, b2};
  const std::vector<int64_t> gradients{by_w1, by_b1, by_gamma, by_beta, by_w2, by_b2};
  std::vector<int64_t> sizes;
  std::vector<void*> parameters, first, second;
  std::vector<std::vector<float>> moments;
  moments.reserve(2 * moved.size());
  for (const int64_t place : moved) {
    sizes.push_back(static_cast<int64_t>(net.memory[place].size()) / 4);
    parameters.push_back(net.memory[place].data());
    for (auto* each : {&first, &second})
      each->push_back(moments.emplace_back(sizes.back()).data());
  }
  float step = 0;
  const Update update{adam, 0.05, 0.9, 0.9, 0.999, 1e-8, 0.01, static_cast<int64_t>(moved.size()),
                      sizes.data(), gradients.data(), parameters.data(), first.data(),
                      second.data(), &step};
  std::vector<void*> table;
  for (auto& each : net.memory) table.push_back(each.data());
  const Feed feeds[] = {{masks, n * width * 4}, {order, n * 8}};
  double losses = 0;
  int64_t right = 0;
  normlab_take_steps_base(net.program.data(), static_cast<int64_t>(net.program.size()),
                          table.data(), feeds, 2, steps, loss, hits, &update, 0, &losses, &right);
  return right >= 0 && right <= n * steps ? losses : -1;
}

}  // namespace

int main() {
  for (const bool batch : {false, true})
    for (const bool adam : {false, true}) {
      const double total = train(batch, adam);
      if (!(total > 0 && total < 20)) return std::printf("losses sum up to %g\n", total), 1;
    }
  return 0;
}
